"""Several devices in one process, and several processes: real schedulers, servers and workers on this machine's loopback."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data
import distributed
import train
import train_model
from runtime import ROLE, InputError, mx
from test_train_model import arrays_of, options, small_network, train_small

ROOT = Path(__file__).resolve().parent.parent

# A worker that trains the small network of the tests and leaves its own weights and centers in a file of its own.
WORKER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
from runtime import run_script
import test_distributed
run_script(lambda: test_distributed.work(*sys.argv[1:]))
"""


def work(*line):
    if ROLE != 'worker':
        return distributed.serve()
    module = train_small('--kv-store', 'dist_sync', '--log_file', f'{os.getpid()}.txt', *line)
    mx.nd.save(
        f'{os.getpid()}.weights',
        {name: value for params in module.get_params() for name, value in params.items()},
    )


@contextlib.contextmanager
def nodes(command, workers, servers=1, **environment):
    """A scheduler, servers and workers that all run the command: {name: process}. None of them outlives the block."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        'DMLC_PS_ROOT_URI': '127.0.0.1',
        'DMLC_PS_ROOT_PORT': str(port),
        'DMLC_NODE_HOST': '127.0.0.1',
        'DMLC_INTERFACE': 'lo',
        'DMLC_NUM_WORKER': str(workers),
        'DMLC_NUM_SERVER': str(servers),
        'OMP_NUM_THREADS': '1',
        **environment,
    }
    processes = {}
    try:
        for name in [
            'scheduler',
            *(f'server {i}' for i in range(servers)),
            *(f'worker {i}' for i in range(workers)),
        ]:
            processes[name] = subprocess.Popen(
                list(map(str, command)),
                env={**environment, 'DMLC_ROLE': name.split()[0]},
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'too slow'
        time.sleep(0.02)


def children(pid):
    """The processes that a process has started: {role and number: pid}."""
    found = {}
    for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split():
        role = re.search(rb'DMLC_ROLE=(\w+)', Path(f'/proc/{child}/environ').read_bytes())[
            1
        ].decode()
        found[f'{role} {sum(name.startswith(role) for name in found)}'] = int(child)
    return found


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def assert_close(measured, expected, **tolerance):
    assert measured.keys() == expected.keys()
    for name in expected.keys() - {'digest', 'options'}:
        np.testing.assert_allclose(measured[name], expected[name], err_msg=name, **tolerance)


def test_two_and_four_devices_learn_what_one_learns_to_rounding():
    """The weights and their average, the momentum and the centers: in every batch, Eq. 4 is that of the whole batch."""
    for devices, kind in ((1, 'local'), (2, 'local'), (4, 'device')):
        train_small(
            '--num-epochs',
            2,
            '--batch-size',
            48,
            '--kv-store',
            kind,
            '--save-model-prefix',
            f'on{devices}',
            '--average-weights',
            0.1,
            '--cpus',
            ','.join(map(str, range(devices))),
        )
    for devices in (2, 4):
        for file in ('params', 'states'):
            assert_close(
                arrays_of(f'on{devices}-0002.{file}'),
                arrays_of(f'on1-0002.{file}'),
                rtol=1e-4,
                atol=2e-6,
            )


def test_the_centers_of_several_devices_are_the_same_after_every_step():
    module = train_model.Module(
        small_network(),
        label_names=['softmax_label', 'center_label'],
        context=[mx.cpu(i) for i in range(3)],
    )
    batches, _ = data.mnist_iterator(30, dataset='mnist-5k', num_examples=120)
    module.bind(batches.provide_data, batches.provide_label)
    module.init_params(train_model.INITIALIZERS['xavier'])
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


def test_three_workers_and_two_servers_learn_what_one_process_learns():
    with nodes(
        [
            sys.executable,
            '-c',
            WORKER,
            '--num-epochs',
            2,
            '--batch-size',
            16,
            '--average-weights',
            0.1,
        ],
        workers=3,
        servers=2,
    ) as processes:
        for name, process in processes.items():
            _, told = process.communicate(timeout=60)
            assert process.returncode == 0, (name, told)
    first, *others = (arrays_of(path) for path in Path().glob('*.weights'))
    assert len(others) == 2
    for other in others:
        for name in first:
            np.testing.assert_array_equal(first[name], other[name], err_msg=name)

    train_small(
        '--num-epochs',
        2,
        '--batch-size',
        48,
        '--average-weights',
        0.1,
        '--save-model-prefix',
        'alone',
        '--log_file',
        'alone.log',
    )
    for file in ('params', 'states'):
        assert_close(
            arrays_of(f'center_loss-0002.{file}'),
            arrays_of(f'alone-0002.{file}'),
            rtol=1e-4,
            atol=2e-6,
        )
    logs = [path.read_text() for path in Path().glob('*.txt')]
    assert sorted(re.search(r'Node\[(\d)\]', log)[1] for log in logs) == ['0', '1', '2']
    assert ['Node[0]' in log for log in logs] == ['Validation-accuracy' in log for log in logs]
    assert all('Epoch[1] Train-accuracy' in log for log in logs)


def test_a_worker_that_is_killed_stops_the_run_which_then_continues_to_the_same_weights():
    """By the command line, where one process starts all the others."""
    line = ['--dataset', 'mnist-5k', '--num-examples', '320']
    command = [sys.executable, str(ROOT / 'train.py'), *line, '--num-workers=2', '--batch-size=16']
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith('OMP_')
    }  # what this process has chosen for itself
    run = subprocess.Popen(
        [*command, '--num-epochs=500'], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        wait_for(Path('center_loss-0002.params').exists)
        started = children(run.pid)
        assert sorted(started) == ['scheduler 0', 'server 0', 'worker 0', 'worker 1']
        os.kill(started['worker 1'], signal.SIGKILL)
        _, told = run.communicate(timeout=20)
    finally:
        for process in children(run.pid).values() if run.poll() is None else ():
            os.kill(process, signal.SIGKILL)
        run.kill()
        run.wait()
    assert run.returncode == 1 and 'Traceback' not in told
    epoch = train_model.Checkpoints('center_loss').epochs()[-1]
    assert re.fullmatch(
        rf'train.py: error: the worker 1 was killed \(SIGKILL\), the others are stopped; the last whole checkpoint is '
        rf'center_loss-{epoch:04d}.params; continue with: python .*train.py .* --num-workers=2 .* --resume',
        told.splitlines()[-1],
    )
    assert not any(Path(f'/proc/{pid}').exists() for pid in started.values())
    assert all(
        re.match(r'\d{4}-\d\d-\d\d \S+ Node\[[01]\] ', line) for line in told.splitlines()[:-1]
    )  # those of two workers stay apart

    result = subprocess.run(
        [*command, f'--num-epochs={epoch + 1}', '--resume'],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    args = train.parse_args(
        [*line, '--batch-size=32', f'--num-epochs={epoch + 1}', '--save-model-prefix=alone']
    )
    train_model.fit(
        args,
        train.get_symbol(),
        functools.partial(data.mnist_iterator, dataset='mnist-5k', num_examples=320),
        (1, 28, 28),
    )
    # Where a max pooling chooses between two nearly equal values, rounding decides which of them learns: not to the last digit then.
    assert_close(
        arrays_of(f'center_loss-{epoch + 1:04d}.params'),
        arrays_of(f'alone-{epoch + 1:04d}.params'),
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.parametrize('victim, workers', [('worker 0', 2), ('server 0', 1)])
def test_nobody_waits_for_ever_for_a_node_that_is_lost(victim, workers):
    command = [
        sys.executable,
        ROOT / 'train.py',
        '--dataset=mnist-5k',
        '--num-examples=320',
        '--batch-size=16',
        '--num-epochs=5000',
        '--kv-store=dist_sync',
    ]
    with nodes(command, workers, PS_HEARTBEAT_TIMEOUT='2') as processes:
        wait_for(Path('center_loss-0002.params').exists)  # by then all know of the first
        processes.pop(victim).kill()
        for name, process in processes.items():
            _, told = process.communicate(timeout=30)
            assert process.returncode == 1, (name, told)
            assert 'Traceback' not in told
            last = told.splitlines()[-1]
            lost = (
                victim.split()[0] if name == 'scheduler' else 'scheduler'
            )  # which leaves, so that the others see it lost
            assert re.match(
                rf'train.py: error: (a|the) {lost} of the run has not been heard of for 2 s', last
            ), (name, last)
            if name.startswith('worker'):
                assert re.search(
                    r'the last whole checkpoint is center_loss-\d+.params; continue with: python .* --resume$',
                    last,
                )
                assert last.removeprefix('train.py: error: ') in Path('log.txt').read_text()


@pytest.mark.parametrize('role', ['worker', 'scheduler'])
def test_nobody_waits_for_ever_for_nodes_that_do_not_come(role):
    script = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import distributed, train; distributed.START_TIMEOUT = 1; train.run_script(train.main)'
    with nodes([sys.executable, '-c', script, '--kv-store=dist_sync'], workers=2) as processes:
        for name in processes.keys() - {next(name for name in processes if name.startswith(role))}:
            processes.pop(name).kill()
        ((name, process),) = processes.items()
        _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert re.fullmatch(
        r'-c: error: no connection to the scheduler at 127.0.0.1:\d+ with all of the 2 workers and 1 servers within 1 s; .*\n',
        told,
    )


def test_a_mistake_that_all_workers_find_is_told_once():
    command = [
        sys.executable,
        str(ROOT / 'train.py'),
        '--num-workers=3',
        '--batch-size=15',
        '--cpus=0,1',
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert (
        result.stderr
        == 'train.py: error: --batch-size=15 cannot be shared equally by 2 devices: take a multiple of 2\n'
    )


class OneMachine:
    """A distributed kvstore as worker 1 sees it, of which worker 0 has these arrays."""

    rank = 1

    def __init__(self, **arrays):
        self.arrays = arrays

    def init(self, key, value):
        pass

    def pull(self, key, out):
        out[:] = self.arrays[key]


def test_a_worker_with_other_options_than_worker_0_says_which():
    def of_worker_0(**options):
        return OneMachine(
            options=mx.nd.array(np.frombuffer(json.dumps(options).encode().ljust(4096), np.uint8))
        )

    distributed.check_agreement(
        of_worker_0(lr=0.1, batch_size=50), {'lr': 0.1, 'batch_size': 50, 'gpus': [1]}
    )
    with pytest.raises(
        InputError,
        match=r'worker 1 was started with other options than worker 0 \(batch_size: 60 here, 50 there\)',
    ):
        distributed.check_agreement(
            of_worker_0(lr=0.1, batch_size=50), {'lr': 0.1, 'batch_size': 60}
        )


def test_a_distributed_run_without_its_environment_says_what_is_missing(monkeypatch):
    monkeypatch.setenv('DMLC_NUM_SERVER', '1')
    with pytest.raises(
        InputError,
        match='--kv-store=dist_sync needs DMLC_ROLE, DMLC_PS_ROOT_URI, DMLC_PS_ROOT_PORT, DMLC_NUM_WORKER in the environment; '
        '--num-workers=2 starts two workers',
    ):
        train_small('--kv-store', 'dist_sync')


def test_the_workers_option_chooses_a_distributed_kvstore():
    assert options('--num-workers', 2).kv_store == 'dist_sync'
    assert options('--num-workers', 2, '--kv-store', 'device').kv_store == 'dist_device_sync'
    assert options().kv_store == 'local'


def test_a_node_that_waits_for_the_others_can_be_stopped():
    with nodes([sys.executable, ROOT / 'train.py', '--kv-store=dist_sync'], workers=1) as processes:
        for name in ('scheduler', 'worker 0'):
            processes.pop(name).kill()
        process = processes['server 0']
        wait_for(lambda: b'libmxnet' in Path(f'/proc/{process.pid}/maps').read_bytes())
        time.sleep(0.5)  # until it waits
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
