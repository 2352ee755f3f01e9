"""Parsers, numbers, and how a script ends."""

import argparse
import os
from pathlib import Path
import signal
import subprocess
import sys

import pytest

from common.environment import mx
from common.command_line import ArgumentParser, number, run_script
from common.errors import Failure, InputError
from common.monitoring import Diverged
from helpers import ROOT, run_python

pytestmark = pytest.mark.usefixtures('in_own_folder')

PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from common.command_line import run_script
from common.environment import mx
from common.errors import Failure, InputError
"""


def make_parser():
    parser = ArgumentParser(description='What it does.\n    and an example')
    parser.add_argument('--batch-size', type=number(int, minimum=1), default=100, help='images')
    parser.add_argument('--log_file', '--log-file', default='log.txt', help='the log')
    parser.add_argument('--log_dir', '--log-dir', default='.', help='its folder')
    parser.add_argument('--resume', action='store_true', help='go on')
    parser.add_argument('--seed', type=number(int), default=0, help='of the weights')
    return parser


@pytest.mark.parametrize(
    'parse, text, value',
    [
        (number(int, minimum=1), '1', 1),
        (number(int), '-3', -3),
        (number(float, above=0), '1e-3', 0.001),
        (number(float, minimum=0, maximum=1), '1', 1.0),
    ],
)
def test_number(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    'parse, text, said',
    [
        (number(int), '1.5', "'1.5' is not a whole number"),
        (number(int), '', "'' is not a whole number"),
        (number(float), 'x', "'x' is not a finite number"),
        (number(float), 'inf', "'inf' is not a finite number"),
        (number(float), 'nan', "'nan' is not a finite number"),
        (number(float), '1e999', "'1e999' is not a finite number"),
        (number(int, minimum=1), '0', '0 is out of range: it has to be at least 1'),
        (number(float, above=0), '0', '0 is out of range: it has to be greater than 0'),
        (number(float, maximum=1), '2', '2 is out of range: it has to be at most 1'),
    ],
)
def test_no_number(parse, text, said):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        parse(text)
    assert str(error.value) == said


def test_abbreviations():
    args = make_parser().parse_args(['--batch=128', '--log_f', 'x', '--log-d=y', '--res'])
    assert vars(args) == {
        'batch_size': 128,
        'log_file': 'x',
        'log_dir': 'y',
        'resume': True,
        'seed': 0,
    }


@pytest.mark.parametrize(
    'line, said',
    [
        ('--log=x', 'ambiguous option: --log'),
        ('--batch-sizes=3', 'unrecognized arguments: --batch-sizes=3'),
        ('file', 'unrecognized arguments: file'),
        ('--batch-size', 'argument --batch-size: expected one argument'),
        ('--batch-size=0', 'argument --batch-size: 0 is out of range'),
    ],
)
def test_mistakes_are_raised(line, said):
    with pytest.raises(InputError) as error:
        make_parser().parse_args(line.split())
    assert said in str(error.value)


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as leave:
        make_parser().parse_args(['--help'])
    assert leave.value.code == 0
    shown = capsys.readouterr().out
    assert 'images (default: 100)' in shown and 'the log (default: log.txt)' in shown
    assert 'of the weights (default: 0)' in shown
    assert 'go on\n' in shown, 'a default that says nothing'
    assert '\n    and an example\n' in shown


@pytest.mark.parametrize(
    'error, status, said',
    [
        (None, None, ''),
        (InputError('a mistake'), 2, 'tool.py: error: a mistake\n'),
        (Failure('no luck'), 1, 'tool.py: error: no luck\n'),
        (InputError('mnist is unavailable'), 2, 'tool.py: error: mnist is unavailable\n'),
        (Diverged('x is nan', 'epoch 1'), 1, 'tool.py: error: training diverged: x is nan in epo'),
        (MemoryError(), 1, 'tool.py: error: there is too little memory'),
        (mx.MXNetError('Failed to allocate CPU Memory'), 1, 'tool.py: error: there is too little'),
        (KeyboardInterrupt(), 130, ''),
        (SystemExit(7), 7, ''),
    ],
)
def test_run_script(error, status, said, restore_process, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['some/tool.py', '--a', 'b'])

    def main(argv):
        assert argv == ['--a', 'b']
        if error:
            raise error

    if status is None:
        assert run_script(main) is None
    else:
        with pytest.raises(SystemExit) as leave:
            run_script(main)
        assert leave.value.code == status
    shown = capsys.readouterr().err
    assert shown.startswith(said) and shown.count('\n') <= 1


def test_bugs_show_a_traceback(restore_process, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_script(lambda argv: 1 / 0)


@pytest.mark.slow
@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number, status):
    """Without a word, after what has to be done at the end."""
    program = f"""{PROGRAM}
import os
def main(argv):
    try:
        os.kill(os.getpid(), {int(number)})
    finally:
        print('cleaned up')
run_script(main)"""
    result = run_python('-c', program)
    assert (result.stdout, result.stderr, result.returncode) == ('cleaned up\n', '', status)


@pytest.mark.slow
@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_in_a_destructor(number, status):
    """Python would print an exception that is raised in there, and go on."""
    program = f"""{PROGRAM}
import os, time
class Freed:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        time.sleep(0.001)  # the handler runs before this returns
def main(argv):
    Freed()
    time.sleep(60)
run_script(main)"""
    result = run_python('-c', program)
    assert (result.stdout, result.stderr, result.returncode) == ('', '', status)


@pytest.mark.slow
def test_too_little_memory():
    """MXNet's own error, where it raises one."""
    program = f"""{PROGRAM}
import resource
def main(argv):
    limit = 2**30 + int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    mx.nd.zeros((2**20, 2**10)).wait_to_read()
run_script(main)"""
    result = run_python('-c', program)
    said = '-c: error: there is too little memory: end other programs, or take less at once\n'
    assert (result.stdout, result.stderr, result.returncode) == ('', said, 1)


@pytest.mark.slow
@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_while_mxnet_calls_back(number, status):
    """An exception would not come through: MXNet went on with unfilled results, and crashed."""
    program = f"""{PROGRAM}
import os
import center_loss
@mx.operator.register('stopped')
class Stopped(center_loss.CenterLossProp):
    def list_arguments(self):
        os.kill(os.getpid(), {int(number)})
        return super().list_arguments()
x, y = mx.sym.var('x'), mx.sym.var('y')
run_script(lambda argv: mx.sym.Custom(x, y, op_type='stopped', num_class=3))"""
    result = run_python('-c', program)
    assert (result.stdout, result.stderr, result.returncode) == ('', '', status)


@pytest.mark.slow
def test_ignored_signal_stays_ignored():
    """A shell has Ctrl-C ignored for what runs in the background."""
    program = f"""{PROGRAM}
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
run_script(lambda argv: os.kill(os.getpid(), signal.SIGINT))
print('goes on')"""
    result = run_python('-c', program)
    assert (result.stdout, result.stderr, result.returncode) == ('goes on\n', '', 0)


@pytest.mark.slow
@pytest.mark.parametrize('unbuffered', [(), ('-u',)])
@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
def test_nobody_reads_on(stream, unbuffered):
    """What follows is done, without a traceback."""
    program = f"""{PROGRAM}
def main(argv):
    for _ in range(3):
        print('a line', file=sys.stdout)
        print('a line', file=sys.stderr)
    open('done', 'w').close()
    raise Failure('no luck')
run_script(main)"""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, stream: writer}
    environment = {name: os.environ[name] for name in os.environ if name != 'PYTHONUNBUFFERED'}
    with subprocess.Popen(
        [sys.executable, *unbuffered, '-c', program], **streams, env=environment, text=True
    ) as process:
        os.close(writer)
        out, said = process.communicate(timeout=120)
    assert process.returncode == 1 and os.path.exists('done')
    if stream == 'stdout':
        assert said == 'a line\n' * 3 + '-c: error: no luck\n'
    else:
        assert out == 'a line\n' * 3


@pytest.mark.slow
def test_names_that_are_not_utf8():
    program = f'{PROGRAM}\nrun_script(lambda argv: print(argv[0]))'
    command = [sys.executable, '-c', program, b'a\xff']
    environment = {**os.environ, 'PYTHONIOENCODING': 'utf-8'}
    result = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert result.returncode == 0 and result.stdout == b'a\\udcff\n'


@pytest.mark.slow
@pytest.mark.parametrize('closed', ['>&-', '2>&-', '<&- >&- 2>&-'])
def test_closed_streams(closed):
    """Files that are opened do not take their places."""
    program = f"""{PROGRAM}
def main(argv):
    with open('file', 'w') as file:
        print('a line')
        print('a line', file=sys.stderr)
        os.write(2, b'from MXNet')
        file.write('its own')
import os
run_script(main)"""
    command = f'exec {sys.executable} -c "$0" {closed}'
    result = subprocess.run(['sh', '-c', command, program], capture_output=True, timeout=120)
    assert result.returncode == 0
    assert Path('file').read_text() == 'its own'
