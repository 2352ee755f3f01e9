"""Several devices, and several processes: real schedulers, servers and workers on this machine."""

import contextlib
import json
import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from common.environment import ROLE, mx
from common import distributed, launcher
from common.checkpoints import Checkpoints
from common.discriminants import discriminant_params
from common.errors import Failure, InputError
from common.module import Module
import data
from helpers import (
    ROOT,
    digits,
    run_python,
    run_train,
    saved_params,
    saved_state,
    small_network,
    train_small,
)
import train

pytestmark = pytest.mark.usefixtures('in_own_folder')

DIGITS = ['--dataset=mnist-5k', '--num-examples=320']
TRAIN = [sys.executable, str(ROOT / 'train.py'), *DIGITS]
BATCHES = ((0, 16), (16, 32), (32, 40))
OMP_VARIABLES = ('OMP_NUM_THREADS', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')

# A node of a run: a worker trains the small network with the options in its argument (JSON).
NODE = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
from common.command_line import run_script
import test_distributed
run_script(test_distributed.be_node)
"""


def be_node(argv):
    if ROLE != 'worker':
        distributed.serve(lambda: 'no hint')
        return
    options = json.loads(argv[0])
    if options.pop('uneven', False):
        options['data'] = uneven_parts
    if options.pop('discriminants', False):
        options['initial_params'] = discriminant_params
    if options.pop('interrupted', False):
        options['batch_end_callback'] = interrupt
    module = train_small(kv_store='dist_sync', log_file=f'{os.getpid()}.txt', **options)
    mx.nd.save(f'{os.getpid()}.weights', module.present_arrays())


def interrupt(param):
    """Stop as by Ctrl-C."""
    raise KeyboardInterrupt


def uneven_parts(batch_size, num_parts, part_index):
    """Two batches of 16 images and one of 8 for every worker."""
    pair = (
        mx.io.NDArrayIter(*digits(40, first), batch_size=batch_size)
        for first in (40 * part_index, 2000)
    )
    return tuple(map(data.DualLabelWrapper, pair))


@contextlib.contextmanager
def nodes(command, workers, servers=1, commands=None, **environment):
    """Start a scheduler, servers and workers with one command: {name: process}.

    ``commands`` are those of single nodes by name.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        'DMLC_PS_ROOT_URI': 'localhost',
        'DMLC_PS_ROOT_PORT': str(port),
        'DMLC_NODE_HOST': 'localhost',
        'DMLC_NUM_WORKER': str(workers),
        'DMLC_NUM_SERVER': str(servers),
        'OMP_NUM_THREADS': '1',
        **environment,
    }
    names = ['scheduler', *(f'server {i}' for i in range(servers))]
    names += [f'worker {i}' for i in range(workers)]
    with contextlib.ExitStack() as stack:
        processes = {}
        for name in names:
            process = subprocess.Popen(
                (commands or {}).get(name, command),
                env={**environment, 'DMLC_ROLE': name.split()[0]},
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            processes[name] = stack.enter_context(process)
            stack.callback(process.kill)
        yield processes


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'too slow'
        time.sleep(0.02)


def node_command(**options):
    return [sys.executable, '-c', NODE, json.dumps(options)]


def train_on_nodes(options, workers, servers=1):
    """Train with these options; all workers end with the same weights."""
    with nodes(node_command(**options), workers, servers) as processes:
        for name, process in processes.items():
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, (name, stderr)
    paths = list(Path().glob('*.weights'))
    first, *others = (mx.nd.load(str(path)) for path in paths)
    assert len(others) == workers - 1
    for other in others:
        for name in first:
            np.testing.assert_array_equal(first[name].asnumpy(), other[name].asnumpy(), name)
    for path in paths:
        path.unlink()


def children(pid):
    """The processes that a launcher has started: {role and number: pid}."""
    found = {}
    for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split():
        environment = Path(f'/proc/{child}/environ').read_bytes()
        role = re.search(rb'DMLC_ROLE=(\w+)', environment)[1].decode()
        found[f'{role} {sum(name.startswith(role) for name in found)}'] = int(child)
    return found


def saved_arrays(prefix, epoch):
    return {**saved_params(prefix, epoch), **saved_state(prefix, epoch)}


def assert_close(measured, expected, **tolerance):
    assert measured.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(measured[name], expected[name], err_msg=name, **tolerance)


@pytest.mark.slow
def test_several_devices_equal_one():
    """Weights, their average, momentum and centers: Eq. 4 is that of the whole batch."""
    for devices, kind in ((1, 'local'), (2, 'local'), (4, 'device')):
        train_small(
            batch_size=48,
            num_epochs=2,
            kv_store=kind,
            save_model_prefix=f'on{devices}',
            average_weights=0.1,
            devices=[mx.cpu(i) for i in range(devices)],
        )
    for devices in (2, 4):
        assert_close(saved_arrays(f'on{devices}', 2), saved_arrays('on1', 2), rtol=1e-4, atol=2e-6)


def test_centers_of_devices_stay_equal():
    module = Module(
        small_network(),
        label_names=['softmax_label', 'center_label'],
        context=[mx.cpu(i) for i in range(3)],
    )
    batches, _ = data.mnist_iterator(30, dataset='mnist-5k', num_examples=120)
    module.bind(batches.provide_data, batches.provide_label)
    module.init_params(mx.init.Xavier())
    module.init_optimizer(kvstore='local')
    before = None
    for batch in batches:
        module.forward_backward(batch)
        module.update()
        ((_, copies),) = module._centers()
        first, *others = (copy.asnumpy() for copy in copies)
        for other in others:
            np.testing.assert_array_equal(first, other)
        assert before is None or (first != before).any()
        before = first


@pytest.mark.slow
def test_workers_equal_one_process():
    options = {'average_weights': 0.1, 'num_epochs': 2}
    train_on_nodes({**options, 'batch_size': 16}, workers=3, servers=2)
    train_small(batch_size=48, save_model_prefix='alone', **options)
    assert_close(saved_arrays('run', 2), saved_arrays('alone', 2), rtol=1e-4, atol=2e-6)
    logs = [path.read_text() for path in Path().glob('[0-9]*.txt')]
    assert sorted(re.search(r'Node\[(\d)\]', log)[1] for log in logs) == ['0', '1', '2']
    assert ['Node[0]' in log for log in logs] == ['Validation-accuracy' in log for log in logs]
    assert all('Epoch[1] Train-accuracy' in log for log in logs)


@pytest.mark.slow
def test_last_batch_of_workers_may_be_smaller():
    """Its centers are synchronized as those of any other."""
    options = {'batch_size': 16, 'num_epochs': 2, 'uneven': True}
    train_on_nodes(options, workers=2)
    images, labels = digits(80)
    # The same images in the same steps: 32, 32 and 16 of them.
    order = np.concatenate([[*range(i, j), *range(40 + i, 40 + j)] for i, j in BATCHES])
    alone = mx.io.NDArrayIter(images[order], labels[order], batch_size=32)
    pair = data.DualLabelWrapper(alone), uneven_parts(16, 2, 0)[1]
    train_small(data=pair, batch_size=32, num_epochs=2, save_model_prefix='alone')
    assert_close(saved_arrays('run', 2), saved_arrays('alone', 2), rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_resumed_workers_equal_one_process():
    """With momentum and, from the start, discriminants of the images of all of them."""
    for epoch in (1, 2):
        options = {'batch_size': 16, 'num_epochs': epoch, 'resume': True, 'discriminants': True}
        train_on_nodes(options, workers=2)
    for epoch in (1, 2):
        train_small(
            batch_size=32,
            num_epochs=epoch,
            resume=True,
            save_model_prefix='alone',
            initial_params=discriminant_params,
        )
    assert_close(saved_arrays('run', 2), saved_arrays('alone', 2), rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_resumed_workers_know_what_is_saved():
    """One that is stopped in the first epoch after a resume names the checkpoint before it."""
    options = {'batch_size': 16, 'resume': True}
    train_on_nodes({**options, 'num_epochs': 1}, workers=2)
    command = node_command(**options, num_epochs=2, interrupted=True)
    with nodes(command, 2) as processes:
        for name in 'worker 0', 'worker 1':
            _, stderr = processes[name].communicate(timeout=60)
            assert 'the last whole checkpoint is run-0001.params; continue with' in stderr, name


@pytest.mark.slow
def test_workers_with_other_epochs_are_refused():
    options = {'batch_size': 16, 'resume': True}
    longer = {'worker 1': node_command(**options, num_epochs=3)}
    with nodes(node_command(**options, num_epochs=2), 2, commands=longer) as processes:
        workers = processes['worker 0'], processes['worker 1']
        wait_for(lambda: any(worker.poll() is not None for worker in workers), 60)
        refused = next(worker for worker in workers if worker.poll() is not None)
        assert refused.returncode == 2
        assert re.search(
            r'worker 1 was started with other options than worker 0 \(num_epochs: [23] here, [23] '
            r'there\): start every worker with the same command',
            refused.stderr.read(),
        )


@pytest.mark.slow
def test_killed_worker_stops_the_run():
    """The run then continues, to the weights of one process."""
    command = [*TRAIN, '--num-workers=2', '--batch-size=16']
    environment = {n: v for n, v in os.environ.items() if n not in OMP_VARIABLES}
    run = subprocess.Popen(
        [*command, '--num-epochs=500'], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        wait_for(Path('center_loss-0002.json').exists)
        started = children(run.pid)
        assert sorted(started) == ['scheduler 0', 'server 0', 'worker 0', 'worker 1']
        os.kill(started['worker 1'], signal.SIGKILL)
        _, stderr = run.communicate(timeout=20)
    finally:
        for process in children(run.pid).values() if run.poll() is None else ():
            os.kill(process, signal.SIGKILL)
        run.kill()
        run.wait()
    assert run.returncode == 1 and 'Traceback' not in stderr
    epochs = Checkpoints('center_loss').epochs()
    epoch = max(epoch for epoch in epochs if Path(f'center_loss-{epoch:04d}.json').exists())
    *lines, last = stderr.splitlines()
    assert re.fullmatch(
        r'train.py: error: worker 1 was killed by signal 9, the others are stopped; the last '
        rf'whole checkpoint is center_loss-{epoch:04d}.params; continue with: python .*train.py '
        '.* --num-workers=2 .* --resume',
        last,
    )
    assert not any(Path(f'/proc/{pid}').exists() for pid in started.values())
    assert all(re.match(r'\d{4}-\d\d-\d\d \S+ Node\[[01]\] ', line) for line in lines)

    more = [f'--num-epochs={epoch + 1}', '--resume']
    result = run_python(*command[1:], *more, unset=OMP_VARIABLES)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('accuracy on') and result.stdout.count('\n') == 1
    alone = ['--batch-size=32', f'--num-epochs={epoch + 1}', '--save-model-prefix=alone']
    train.main([*DIGITS, *alone])
    # Where max pooling chooses between two nearly equal values, rounding decides which one learns.
    assert_close(
        saved_arrays('center_loss', epoch + 1),
        saved_arrays('alone', epoch + 1),
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.slow
@pytest.mark.parametrize('victim, workers', [('worker 0', 2), ('server 0', 1)])
def test_lost_node_ends_all(victim, workers):
    command = [*TRAIN, '--batch-size=16', '--num-epochs=5000', '--kv-store=dist_sync']
    with nodes(command, workers, PS_HEARTBEAT_TIMEOUT='5') as processes:
        wait_for(Path('center_loss-0002.json').exists)  # by then all know of the first
        processes.pop(victim).kill()
        for name, process in processes.items():
            _, stderr = process.communicate(timeout=30)
            assert process.returncode == 1, (name, stderr)
            assert 'Traceback' not in stderr
            last = stderr.splitlines()[-1]
            # The scheduler ends first; the others see that it is lost.
            lost = f'a {victim.split()[0]}' if name == 'scheduler' else 'the scheduler'
            assert re.match(
                rf'train.py: error: {lost} of the run has not been heard from for 5 s', last
            ), (name, last)
            assert re.search(r'continue with: python .* --resume$', last)
            if name.startswith('worker'):
                assert re.search(r'the last whole checkpoint is center_loss-\d+.params; ', last)
                assert last.removeprefix('train.py: error: ') in Path('log.txt').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('role', ['worker', 'scheduler'])
def test_missing_nodes_end_the_wait(role):
    impatient = NODE.replace(
        'run_script(test', 'test_distributed.distributed.START_TIMEOUT = 1\nrun_script(test'
    )
    # The sentence is made with the environment, whatever that has.
    with nodes([sys.executable, '-c', impatient, '{}'], workers=2, seconds='x') as processes:
        kept = next(name for name in processes if name.startswith(role))
        for name in processes.keys() - {kept}:
            processes[name].kill()
        _, stderr = processes[kept].communicate(timeout=60)
        assert processes[kept].returncode == 1
    assert re.fullmatch(
        r'-c: error: no connection to the scheduler at 127.0.0.1:\d+ with all of the 2 workers '
        r'and 1 servers within 1 s; .*\n',
        stderr,
    )


@pytest.mark.slow
def test_waiting_node_can_be_stopped():
    with nodes([*TRAIN, '--kv-store=dist_sync'], workers=1) as processes:
        for name in ('scheduler', 'worker 0'):
            processes[name].kill()
        server = processes['server 0']
        wait_for(lambda: b'libmxnet' in Path(f'/proc/{server.pid}/maps').read_bytes())
        time.sleep(1)  # until it waits
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=10)
        assert server.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.slow
def test_launcher_checks_before_it_starts():
    result = run_train('--num-workers=3', '--batch-size=15', '--cpus=0,1', cwd='.')
    assert result.returncode == 2
    assert re.fullmatch(
        r'train.py: error: --batch-size=15 cannot be .* by 2 devices.*\n', result.stderr
    )


@pytest.mark.slow
def test_failure_of_all_workers_is_reported_once():
    options = ['--num-workers=3', '--batch-size=16', '--lr=1e6', '--clip-gradient=0']
    result = run_train(*DIGITS, *options, cwd='.')
    assert result.returncode == 1
    assert result.stderr.count('train.py: error: ') == 1
    assert 'diverged' in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_launcher_passes_signals_on(number):
    command = [*TRAIN, '--num-workers=2', '--batch-size=16', '--num-epochs=500']
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(Path('center_loss-0002.json').exists)
        started = children(run.pid)
        run.send_signal(number)
        _, stderr = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == 128 + number and 'Traceback' not in stderr
    assert re.search(r'stopped: the last whole checkpoint is center_loss-\d+.params; ', stderr)
    assert not any(Path(f'/proc/{pid}').exists() for pid in started.values())


@pytest.mark.slow
def test_workers_end_with_their_launcher():
    command = [*TRAIN, '--num-workers=1', '--batch-size=16', '--num-epochs=5000']
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(Path('center_loss-0001.json').exists)
        started = children(run.pid)
    finally:
        run.kill()
        run.wait()
    wait_for(lambda: not any(Path(f'/proc/{pid}').exists() for pid in started.values()), 10)
    assert 'the process that started this one is gone; ' in Path('log.txt').read_text()


class KVStore:
    """A distributed kvstore as worker 1 sees it; what worker 0 has under each key is given."""

    rank = 1

    def __init__(self, arrays):
        self.arrays = arrays

    def init(self, key, value):
        pass

    def pull(self, key, out):
        out[:] = self.arrays[key]


def test_other_options_are_refused():
    text = json.dumps({'lr': 0.1, 'batch_size': 50, 'gpus': [0], 'recipe': 'x' * 5000}).encode()
    kv = KVStore({'options_size': len(text), 'options': np.frombuffer(text, np.uint8)})
    options = json.loads(text)
    distributed.check_agreement(kv, options)
    distributed.check_agreement(kv, {**options, 'gpus': [1]})
    with pytest.raises(
        InputError, match=r'worker 1 .* than worker 0 \(batch_size: 60 here, 50 there\)'
    ):
        distributed.check_agreement(kv, {**options, 'batch_size': 60})
    with pytest.raises(
        InputError, match=r'\(alpha: 1 here, None there; recipe: None here, x+ there\)'
    ):
        distributed.check_agreement(kv, {'lr': 0.1, 'batch_size': 50, 'alpha': 1})


GOOD_ENVIRONMENT = {
    'DMLC_ROLE': 'worker',
    'DMLC_PS_ROOT_URI': 'localhost',
    'DMLC_PS_ROOT_PORT': '9000',
    'DMLC_NUM_WORKER': '2',
    'DMLC_NUM_SERVER': '1',
}


@pytest.fixture
def environment(monkeypatch):
    """Set the variables of a distributed run, with these changes; None leaves one out."""

    def change(**changes):
        variables = {**GOOD_ENVIRONMENT, **changes}
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed, 'ROLE', variables['DMLC_ROLE'])

    for name in ('PS_HEARTBEAT_TIMEOUT', 'PS_HEARTBEAT_INTERVAL', 'DMLC_NODE_HOST'):
        monkeypatch.setenv(name, '')  # to be restored
        monkeypatch.delenv(name)
    return change


def test_environment_is_completed(environment):
    environment(DMLC_NODE_HOST='localhost', DMLC_NUM_WORKER=' 2')
    distributed.check_environment('dist_sync')
    assert os.environ['DMLC_PS_ROOT_URI'] == os.environ['DMLC_NODE_HOST'] == '127.0.0.1'
    assert os.environ['DMLC_NUM_WORKER'] == '2'
    assert (os.environ['PS_HEARTBEAT_TIMEOUT'], os.environ['PS_HEARTBEAT_INTERVAL']) == ('20', '1')


@pytest.mark.parametrize(
    'name, value, message',
    [
        ('DMLC_PS_ROOT_PORT', None, 'dist_sync needs DMLC_PS_ROOT_PORT in the environment'),
        ('DMLC_PS_ROOT_PORT', 'abc', "variable DMLC_PS_ROOT_PORT: 'abc' is not a whole number"),
        ('DMLC_PS_ROOT_PORT', '70000', 'DMLC_PS_ROOT_PORT: 70000 is out of range'),
        ('DMLC_NUM_WORKER', '0', 'DMLC_NUM_WORKER: 0 is out of range'),
        ('DMLC_NUM_SERVER', '1.5', "DMLC_NUM_SERVER: '1.5' is not a whole number"),
        ('DMLC_ROLE', 'boss', 'DMLC_ROLE=boss is none of scheduler, server and worker'),
        ('PS_HEARTBEAT_TIMEOUT', '20s', "PS_HEARTBEAT_TIMEOUT: '20s' is not a whole number"),
        ('PS_HEARTBEAT_TIMEOUT', '0', 'PS_HEARTBEAT_TIMEOUT: 0 is out of range'),
        ('PS_HEARTBEAT_INTERVAL', '20', 'PS_HEARTBEAT_INTERVAL: 20 is out of range'),
        ('DMLC_PS_ROOT_URI', 'no host', 'DMLC_PS_ROOT_URI=no host has no IPv4 address'),
        ('DMLC_NODE_HOST', '::1', 'DMLC_NODE_HOST=::1 has no IPv4 address'),
    ],
)
def test_environment_is_checked(environment, name, value, message):
    environment(**{name: value})
    with pytest.raises(InputError, match=message):
        distributed.check_environment('dist_sync')


def test_environment_is_required():
    with pytest.raises(InputError, match=r'needs DMLC_ROLE, DMLC_PS_ROOT_URI, .*--num-workers=2'):
        train_small(kv_store='dist_sync')


@pytest.mark.parametrize('script', ['train', 'vis'])
def test_import_takes_no_role(script):
    """MXNet must not be imported before common.environment, or it would serve here."""
    run = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import {script}'
    result = run_python('-c', run, DMLC_ROLE='scheduler')
    assert (result.returncode, result.stderr) == (0, '')


def test_address_of_another_machine_is_refused():
    variables = {**GOOD_ENVIRONMENT, 'DMLC_ROLE': 'scheduler', 'DMLC_PS_ROOT_URI': '192.0.2.77'}
    result = run_python('-c', NODE, **variables)
    assert result.returncode == 2
    assert re.fullmatch(
        r'-c: error: this scheduler cannot take part with DMLC_.*: .*bind failed\n',
        result.stderr,
    )


def test_launcher_shares_cpus(monkeypatch):
    monkeypatch.setattr(launcher, 'available_cpus', lambda: 8)
    monkeypatch.setattr(launcher, 'THREADS_CHOSEN_BY_USER', False)
    monkeypatch.setenv('PORT', '80')
    environment = launcher.node_environment(3)
    assert environment['OMP_NUM_THREADS'] == '2'
    assert (environment['OMP_WAIT_POLICY'], environment['GOMP_SPINCOUNT']) == ('passive', '0')
    assert environment['DMLC_NUM_WORKER'] == '3' and 'PORT' not in environment
    assert launcher.node_environment(9)['OMP_NUM_THREADS'] == '1'

    monkeypatch.setattr(launcher, 'THREADS_CHOSEN_BY_USER', True)
    monkeypatch.setenv('OMP_NUM_THREADS', '5')
    assert launcher.node_environment(3)['OMP_NUM_THREADS'] == '5'


def test_launcher_names_any_signal():
    number = signal.SIGRTMIN + 1
    with subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE) as process:
        process.send_signal(number)
        with pytest.raises(Failure, match=f'worker 0 was killed by signal {number},'):
            launcher.wait_for_all({'worker 0': process}, lambda: '')


def test_launcher_checks_its_timeout(monkeypatch):
    monkeypatch.setenv('PS_HEARTBEAT_TIMEOUT', '20s')
    with pytest.raises(InputError, match="PS_HEARTBEAT_TIMEOUT: '20s' is not a whole number"):
        launcher.run_workers(['false'], 2, lambda: '')
