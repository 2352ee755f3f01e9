"""Runs of several processes, on MXNet's own parameter server: workers that train, servers that sum their gradients, a scheduler that knows them all.

``connected`` is the kvstore of a run, watched over so that nobody waits for ever for a node that is lost; ``serve`` is what a scheduler or a server
does; ``run_workers`` starts all of them on one machine. How the centers of all workers are joined is in ``train_model.Module``.
"""

import contextlib
import ctypes
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from runtime import (
    ROLE,
    THREADS_ARE_CHOSEN_HERE,
    Failure,
    InputError,
    Terminated,
    available_cpus,
    mx,
)

# Seconds after which a node of a distributed run that is not heard of is given up, and seconds from the start of its first node to that of its last.
NODE_TIMEOUT = max(2, int(os.environ.setdefault('PS_HEARTBEAT_TIMEOUT', '20')))
START_TIMEOUT = 120
os.environ.setdefault('PS_HEARTBEAT_INTERVAL', '1')


@contextlib.contextmanager
def connected(kind, checkpoints):
    """The kvstore of that kind; one over several processes is watched as long as it is in use, and closed."""
    if 'dist' not in kind:
        checkpoints.check_folder()
        yield mx.kv.create(kind)
        return
    check_environment(kind)
    with Watch(checkpoints.how_to_continue) as watch:
        with signals_that_end():
            watch.kv = kv = mx.kv.create(kind)
        try:
            if kv.rank == 0:
                checkpoints.check_folder()
            yield kv
        except BaseException:
            # The others do not come to the barrier at which MXNet would wait for them.
            mx.base.check_call(mx.base._LIB.MXKVStoreSetBarrierBeforeExit(kv.handle, 0))
            raise
        finally:
            watch.leave_after(
                2 * NODE_TIMEOUT, 'the other nodes have not come to the end of the run'
            )
            mx.base.check_call(mx.base._LIB.MXKVStoreFree(kv.handle))
            kv.handle = mx.base.KVStoreHandle()  # null: nothing is left for its destructor


def check_environment(kind):
    """Raise InputError where MXNet would not find the nodes of a distributed run."""
    missing = [
        name
        for name in (
            'DMLC_ROLE',
            'DMLC_PS_ROOT_URI',
            'DMLC_PS_ROOT_PORT',
            'DMLC_NUM_WORKER',
            'DMLC_NUM_SERVER',
        )
        if name not in os.environ
    ]
    if missing:
        raise InputError(
            f'--kv-store={kind} needs {", ".join(missing)} in the environment; --num-workers=2 starts two workers on this machine without'
        )


def serve():
    """Be the scheduler or a server, as DMLC_ROLE says, until the workers are done."""
    check_environment('dist_sync')
    with Watch(lambda: 'continue with --resume on every worker') as watch, signals_that_end():
        watch.kv = mx.kv.create('dist_sync')
        mx.kvstore.kvstore_server.KVStoreServer(watch.kv).run()


@contextlib.contextmanager
def signals_that_end():
    """Within it, Ctrl-C and SIGTERM end the process at once: it waits within MXNet, where Python's own handlers do not get their turn."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {
            number: signal.signal(number, signal.SIG_DFL)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Watch:
    """A thread that ends this process when the distributed run has lost a node, or never found all of them.

    MXNet would wait for ever, within a call that neither a signal nor an exception gets out of. The nodes send heartbeats to the scheduler, which
    answers them: it alone sees who is lost, and leaves; thereby all the others see that it is lost.

    Parameters
    ----------
    how_to_continue : callable
        A phrase for the end of what is told.
    """

    SCHEDULER, SERVERS, WORKERS, ALL = 1, 2, 4, 7  # ps-lite's groups of nodes

    def __init__(self, how_to_continue):
        self.how_to_continue = how_to_continue
        self.kv = None
        self.launcher = os.environ.get('LAUNCHER_PID')
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.done.set()

    def watch(self):
        begin, connected_at = time.monotonic(), math.inf
        while not self.done.wait(0.5):
            if self.launcher and self.launcher != str(os.getppid()):
                self.leave('the process that started this one is gone')
            # With a negative timeout every node is dead, once the connection is made.
            if (
                connected_at == math.inf
                and self.kv is not None
                and self.count_dead(self.ALL, -NODE_TIMEOUT) > 0
            ):
                connected_at = time.monotonic()
            if (
                time.monotonic() - connected_at > NODE_TIMEOUT
            ):  # before, nobody can have been silent for so long, whatever ps-lite says as it starts
                for group, kind in (
                    (self.SCHEDULER, 'the scheduler'),
                    (self.SERVERS, 'a server'),
                    (self.WORKERS, 'a worker'),
                ):
                    if self.count_dead(group, NODE_TIMEOUT):
                        hint = (
                            ''
                            if ROLE == 'scheduler'
                            else '; it leaves when a worker or a server is lost'
                        )
                        self.leave(
                            f'{kind} of the run has not been heard of for {NODE_TIMEOUT} s: killed, failed or cut off{hint}'
                        )
            if connected_at == math.inf and time.monotonic() - begin > START_TIMEOUT:
                self.leave(
                    'no connection to the scheduler at {DMLC_PS_ROOT_URI}:{DMLC_PS_ROOT_PORT} with all of the {DMLC_NUM_WORKER} workers and '
                    '{DMLC_NUM_SERVER} servers within {seconds} s'.format(
                        **os.environ, seconds=START_TIMEOUT
                    )
                )

    def count_dead(self, group, timeout):
        number = ctypes.c_int()
        mx.base.check_call(
            mx.base._LIB.MXKVStoreGetNumDeadNode(
                self.kv.handle, group, ctypes.byref(number), timeout
            )
        )
        return number.value

    def leave_after(self, seconds, what):
        """Watch no more over the nodes, but over the end of this process's part in the run."""
        self.done.set()
        self.thread.join()  # it may be asking the kvstore that is about to be freed
        deadline = threading.Timer(seconds, self.leave, [f'{what} within {seconds} s'])
        deadline.daemon = True
        deadline.start()

    def leave(self, what):
        """Tell it as a Failure would be told, in the log file and on stderr, and end the process."""
        sentence = f'{what}; {self.how_to_continue()}'
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                with contextlib.suppress(Failure):
                    handler.handle(logging.makeLogRecord({'msg': sentence}))
        print(f'{Path(sys.argv[0]).name}: error: {sentence}', file=sys.stderr, flush=True)
        os._exit(Failure.status)


def of_rank_0(kv, key, array):
    """The array that worker 0 has, on every worker of a distributed kvstore."""
    kv.init(key, array)
    kv.pull(key, out=array)
    return array


def check_agreement(kv, options):
    """Raise InputError where this worker was started with other options than worker 0: one would wait for the other, or learn something else."""
    options = {name: value for name, value in options.items() if name not in ('gpus', 'cpus')}
    text = json.dumps(options).encode().ljust(4096)
    theirs = json.loads(
        of_rank_0(kv, 'options', mx.nd.array(np.frombuffer(text, np.uint8)))
        .asnumpy()
        .astype(np.uint8)
        .tobytes()
    )
    different = [
        f'{name}: {options.get(name)} here, {theirs.get(name)} there'
        for name in options
        if options[name] != theirs.get(name)
    ]
    if different:
        raise InputError(
            f'worker {kv.rank} was started with other options than worker 0 ({"; ".join(different)}): give all the same'
        )


def run_workers(num_workers, checkpoints, resume):
    """Run this program's command line in that many processes on this machine, with a scheduler and a server, until all are done.

    When one fails or is killed the others are stopped. Raises Failure for one that was killed, SystemExit for one that has told its failure itself.
    ``resume``: whether checkpoints that are there already are of this run.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    right_to_tell, end = os.pipe()
    os.write(end, b'.')
    os.set_blocking(right_to_tell, False)
    environment = {
        **os.environ,
        'DMLC_PS_ROOT_URI': '127.0.0.1',
        'DMLC_PS_ROOT_PORT': str(port),
        'DMLC_NODE_HOST': '127.0.0.1',
        'DMLC_INTERFACE': 'lo',
        'DMLC_NUM_WORKER': str(num_workers),
        'DMLC_NUM_SERVER': '1',
        'LAUNCHER_PID': str(os.getpid()),
        'RIGHT_TO_TELL': str(right_to_tell),
    }
    if THREADS_ARE_CHOSEN_HERE:
        environment.update(
            OMP_NUM_THREADS=str(max(1, available_cpus() // num_workers)),
            OMP_WAIT_POLICY='passive',
            GOMP_SPINCOUNT='0',
        )
    begin = time.time()
    processes = {}
    try:
        for name in ('scheduler', 'server', *(f'worker {number}' for number in range(num_workers))):
            # In a session of its own: Ctrl-C reaches this process alone, which passes it on.
            processes[name] = subprocess.Popen(
                [sys.executable, *sys.argv],
                env={**environment, 'DMLC_ROLE': name.split()[0]},
                start_new_session=True,
                pass_fds=[right_to_tell],
            )
        while any(process.poll() is None for process in processes.values()):
            for name, process in processes.items():
                if process.poll():
                    checkpoints.look(since=0 if resume else begin)
                    raise_failure_of(name, process.returncode, checkpoints)
            time.sleep(0.05)
    except KeyboardInterrupt as stop:
        workers = [process for name, process in processes.items() if name.startswith('worker')]
        for worker in workers:
            worker.send_signal(signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
        deadline = time.monotonic() + NODE_TIMEOUT
        while all(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # a worker may be waiting for one that has stopped already
            for worker in workers:
                worker.wait(1)
        raise
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def raise_failure_of(name, status, checkpoints):
    """End a run of several processes of which one has ended with a status that is not 0."""
    if status > 0:
        sys.exit(status)
    raise Failure(
        f'the {name} was killed ({signal.Signals(-status).name}), the others are stopped; {checkpoints.how_to_continue()}'
    )


@contextlib.contextmanager
def told_once():
    """Of several workers that :func:`run_workers` has started, and that find the same mistake, one tells it: who takes the one byte of a pipe."""
    try:
        yield
    except Failure as failure:
        try:
            first = 'RIGHT_TO_TELL' not in os.environ or os.read(
                int(os.environ['RIGHT_TO_TELL']), 1
            )
        except BlockingIOError:
            first = False
        if not first:
            time.sleep(5)  # run_workers ends this process as soon as the other one has told it
            sys.exit(failure.status)
        raise
