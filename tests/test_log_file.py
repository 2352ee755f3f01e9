"""The log: its lines, its file, and what happens when it cannot be written."""

import logging
import os
from pathlib import Path
import re
import tempfile

import pytest

from common.errors import Failure, InputError
from common.log_file import LogFile, log_to

pytestmark = pytest.mark.usefixtures('in_own_folder')


def test_lines_go_to_file_and_stderr(capsys):
    Path('log.txt').write_text('before\n')
    with log_to(Path('log.txt'), rank=3):
        logging.info('Epoch[%d] Train-accuracy=%f', 0, 0.5)
        logging.warning('beware')
    logging.warning('not in the log')
    before, *lines = Path('log.txt').read_text().splitlines()
    assert before == 'before'
    assert capsys.readouterr().err.splitlines()[:2] == lines
    for line, text in zip(lines, ('Epoch[0] Train-accuracy=0.500000', 'beware'), strict=True):
        assert re.fullmatch(
            rf'\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} Node\[3\] {re.escape(text)}', line
        )


def test_logger_is_restored():
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    for error in (None, Failure('x'), KeyboardInterrupt(), ZeroDivisionError()):
        try:
            with log_to(Path('log.txt')):
                assert root.level == logging.INFO and len(root.handlers) == len(before[1]) + 2
                if error:
                    raise error
        except BaseException as raised:
            assert raised is error
        assert (root.level, list(root.handlers)) == before


def test_folder_is_created():
    with log_to(Path('new/er/log.txt')):
        assert os.listdir() == []
        logging.info('a line')
    assert 'a line' in Path('new/er/log.txt').read_text()


def test_mistake_writes_no_log(capsys):
    with pytest.raises(InputError), log_to(Path('new/log.txt')):
        raise InputError('a mistake')
    assert os.listdir() == []
    assert capsys.readouterr().err == ''


def test_failure_is_logged_to_the_file(capsys):
    """On stderr the script reports it."""
    with pytest.raises(Failure), log_to(Path('log.txt')):
        logging.info('a line')
        raise Failure('it failed')
    assert Path('log.txt').read_text().splitlines()[-1].endswith('Node[0] it failed')
    assert 'it failed' not in capsys.readouterr().err


def test_log_of_another_run_is_reported(capsys):
    """Not that of another worker of the same run."""
    with log_to(Path('log.txt')):
        logging.info('first')
        with log_to(Path('log.txt'), rank=1), log_to(Path('other.txt')):
            logging.info('second')
        assert 'another run' not in capsys.readouterr().err
        with log_to(Path('log.txt')):
            for _ in range(3):
                logging.info('third')
        assert capsys.readouterr().err.count('another run writes to ') == 1
    with log_to(Path('log.txt')):
        logging.info('fourth')
    assert 'another run' not in capsys.readouterr().err


@pytest.mark.parametrize('what', ['file', 'folder'])
def test_deleted_log_is_made_again(what):
    path = Path('folder/log.txt')
    with log_to(path):
        logging.info('first')
        path.unlink()
        if what == 'folder':
            path.parent.rmdir()
        logging.info('second')
        logging.info('third')
    assert [line.split()[-1] for line in path.read_text().splitlines()] == ['second', 'third']


def test_replaced_log_is_followed():
    """As a program for rotating logs does it."""
    with log_to(Path('log.txt')):
        logging.info('first')
        Path('log.txt').rename('log.txt.1')
        logging.info('second')
    assert 'first' in Path('log.txt.1').read_text()
    assert 'second' in Path('log.txt').read_text()


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full on this machine')
def test_full_disk_is_reported_once(capsys):
    with log_to(Path('log.txt')):
        for _ in range(2):  # the handler knows its file from the second line on
            logging.info('first')
        (file,) = (h for h in logging.getLogger().handlers if isinstance(h, LogFile))
        file.setStream(Path('/dev/full').open('a')).close()  # noqa: SIM115
        for _ in range(3):
            logging.info('lost in the file')
    lines = capsys.readouterr().err.splitlines()
    assert sum('lost in the file' in line for line in lines) == 3
    (report,) = (line for line in lines if 'cannot write' in line)
    assert re.fullmatch(
        r'cannot write the log file .*/log.txt \(.*No space left on device\): '
        'training goes on without it',
        report,
    )


def test_log_that_cannot_be_made_again_is_reported_once(capsys):
    """Its folder has been replaced by a file."""
    with log_to(Path('folder/log.txt')):
        logging.info('first')
        Path('folder/log.txt').unlink()
        Path('folder').rmdir()
        Path('folder').touch()
        for _ in range(3):
            logging.info('lost')
    said = capsys.readouterr().err
    assert said.count('cannot write the log file') == 1 and 'goes on without it' in said


@pytest.mark.parametrize(
    'path, problem',
    [
        ('.', 'it is not a regular file'),
        ('folder', 'it is not a regular file'),
        ('pipe', 'it is not a regular file'),
        ('/dev/null', 'it is not a regular file'),
        ('file/log.txt', r'(Not a directory|file is not a folder)'),
        ('x' * 300, 'File name too long'),
        ('x' * 300 + '/log.txt', 'File name too long'),
    ],
)
def test_path_is_checked(path, problem):
    Path('folder').mkdir()
    Path('file').touch()
    os.mkfifo('pipe')
    with (
        pytest.raises(
            InputError,
            match=rf'cannot write the log file {re.escape(str(Path(path)))}: .*{problem}; '
            'see --log_dir and --log_file',
        ),
        log_to(Path(path)),
    ):
        pass


def test_no_permission():
    users = os.getresuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        if users[1] == 0:  # who may write everywhere
            os.setresuid(65534, 65534, 0)
        try:
            for name in ('log.txt', 'new/log.txt'):
                with (
                    pytest.raises(InputError, match=r'cannot write the log file .*: no permission'),
                    log_to(Path(folder, name)),
                ):
                    pass
        finally:
            os.setresuid(*users)
