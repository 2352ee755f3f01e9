"""Runs of several processes on MXNet's parameter server.

Workers train, servers sum their gradients, and a scheduler keeps the list of all nodes. A worker
takes its kvstore from :func:`connected`; a scheduler or a server calls :func:`serve`. In each a
:class:`NodeWatchdog` ends the process when another node is lost.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
import contextlib
import ctypes
import json
import logging
import os
from pathlib import Path
import signal
import socket
import sys
import threading
import time

import numpy as np

from common.environment import ROLE, mx
from common.command_line import number
from common.errors import Failure, InputError

START_TIMEOUT = 120  # seconds from the start of the first node to that of the last
NODE_GROUPS = {'the scheduler': 1, 'a server': 2, 'a worker': 4}  # their numbers in ps-lite
MAY_DIFFER = {'gpus', 'cpus'}  # options of a worker alone
REPORT_DELAY = 5  # seconds by which worker 0 is ahead in reporting a mistake that all workers find


@contextlib.contextmanager
def connected(kind: str, resume_hint: Callable[[], str]) -> Iterator[mx.kv.KVStore]:
    """Yield a kvstore of that kind; a distributed one is watched while in use, then closed.

    Parameters
    ----------
    kind
        'local', 'device', 'dist_sync' or 'dist_device_sync', as for ``mx.kv.create``.
    resume_hint
        Returns the phrase that ends a message about a lost node: what is saved, how to continue.

    Raises
    ------
    InputError
        If the environment does not describe a distributed run.
    """
    if 'dist' not in kind:
        yield mx.kv.create(kind)
        return
    check_environment(kind)
    with NodeWatchdog(resume_hint) as watchdog:
        with waiting_in_mxnet():
            watchdog.kv = kv = mx.kv.create(kind)
        try:
            yield kv
        except BaseException as error:
            if isinstance(error, Failure) and kv.rank > 0 and 'LAUNCHER_PID' in os.environ:
                time.sleep(REPORT_DELAY)  # if worker 0 has failed too, the launcher ends this one
            # The others will not come to the barrier at which MXNet would wait for them.
            mx.base.check_call(mx.base._LIB.MXKVStoreSetBarrierBeforeExit(kv.handle, 0))
            raise
        finally:
            with watchdog.only_until(2 * watchdog.node_timeout):
                mx.base.check_call(mx.base._LIB.MXKVStoreFree(kv.handle))
            kv.handle = mx.base.KVStoreHandle()  # null: its destructor has nothing left to free


def serve(resume_hint: Callable[[], str]) -> None:
    """Be the scheduler or a server, as DMLC_ROLE says, until the workers have finished."""
    check_environment('dist_sync')
    with NodeWatchdog(resume_hint) as watchdog, waiting_in_mxnet():
        watchdog.kv = mx.kv.create('dist_sync')
        mx.kvstore.kvstore_server.KVStoreServer(watchdog.kv).run()


def broadcast_from_rank_0(kv: mx.kv.KVStore, key: str, array: mx.nd.NDArray) -> mx.nd.NDArray:
    """Fill ``array`` with what worker 0 has in it, on every worker; a key can be used once."""
    kv.init(key, array)
    kv.pull(key, out=array)
    return array


def check_agreement(kv: mx.kv.KVStore, options: Mapping) -> None:
    """Raise InputError if the options (JSON) of this worker differ from those of worker 0.

    With other options a worker would wait for the others for ever, or train something else.
    """
    text = np.frombuffer(json.dumps(options).encode(), np.uint8)
    (size,) = broadcast_from_rank_0(kv, 'options_size', mx.nd.array([text.size])).asnumpy()
    text = mx.nd.array(np.resize(text, int(size)))
    text = broadcast_from_rank_0(kv, 'options', text).asnumpy().astype(np.uint8)
    theirs = json.loads(text.tobytes())
    different = [
        f'{name}: {options.get(name)} here, {theirs.get(name)} there'
        for name in sorted({*options, *theirs} - MAY_DIFFER)
        if json.dumps(options.get(name)) != json.dumps(theirs.get(name))
    ]
    if different:
        raise InputError(
            f'worker {kv.rank} was started with other options than worker 0 '
            f'({"; ".join(different)}): start every worker with the same command'
        )


def check_environment(kind: str) -> None:
    """Check the variables that MXNet's parameter server reads; host names become addresses."""
    required = ('ROLE', 'PS_ROOT_URI', 'PS_ROOT_PORT', 'NUM_WORKER', 'NUM_SERVER')
    missing = [f'DMLC_{name}' for name in required if f'DMLC_{name}' not in os.environ]
    if missing:
        raise InputError(
            f'--kv-store={kind} needs {", ".join(missing)} in the environment; without them, '
            '--num-workers=2 starts two workers on this machine'
        )
    if ROLE not in ('scheduler', 'server', 'worker'):
        raise InputError(f'DMLC_ROLE={ROLE} is none of scheduler, server and worker')
    number_in_environment('DMLC_PS_ROOT_PORT', minimum=1, maximum=65535)
    number_in_environment('DMLC_NUM_WORKER')
    number_in_environment('DMLC_NUM_SERVER')
    number_in_environment('PS_HEARTBEAT_INTERVAL', default=1, maximum=node_timeout() - 1)
    for name in ('DMLC_PS_ROOT_URI', 'DMLC_NODE_HOST'):
        if name in os.environ:  # MXNet binds sockets to it, which takes an address
            try:
                os.environ[name] = socket.gethostbyname(os.environ[name])
            except (OSError, UnicodeError):
                raise InputError(f'{name}={os.environ[name]} has no IPv4 address') from None


def node_timeout() -> int:
    """Return the seconds after which a node that has not been heard from is given up."""
    return number_in_environment('PS_HEARTBEAT_TIMEOUT', default=20, minimum=2)


def number_in_environment(
    name: str, default: int | None = None, minimum: int = 1, maximum: int = 2**31 - 1
) -> int:
    """Return the whole number in a variable, which is set for MXNet to read the same."""
    try:
        value = number(int, minimum, maximum)(os.environ.get(name, str(default)))
    except argparse.ArgumentTypeError as error:
        raise InputError(f'the environment variable {name}: {error}') from None
    os.environ[name] = str(value)
    return value


@contextlib.contextmanager
def waiting_in_mxnet() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process at once, and explain why this node cannot start.

    MXNet waits for the other nodes in here; Python's signal handlers would wait for MXNet.
    """
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signal_number) != signal.SIG_IGN:
                handlers[signal_number] = signal.signal(signal_number, signal.SIG_DFL)
    try:
        yield
    except mx.MXNetError as error:
        names = sorted(name for name in os.environ if name == 'PORT' or name.startswith('DMLC_'))
        settings = ' '.join(f'{name}={os.environ[name]}' for name in names)
        reason = str(error).splitlines()[-1]
        raise InputError(f'this {ROLE} cannot take part with {settings}: {reason}') from None
    finally:
        for signal_number, handler in handlers.items():
            signal.signal(signal_number, handler)


class NodeWatchdog:
    """A thread that ends this process when the run loses a node or never finds all of them.

    MXNet would wait for ever, in a call that neither a signal nor an exception interrupts. Nodes
    send heartbeats to the scheduler, which answers them: it alone sees who is lost, and ends; the
    others then see that the scheduler is lost.
    """

    def __init__(self, resume_hint: Callable[[], str]):
        self.resume_hint = resume_hint
        self.node_timeout = node_timeout()
        self.kv = None
        self._launcher = os.environ.get('LAUNCHER_PID')
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()  # it may be asking the kvstore that is about to be freed

    @contextlib.contextmanager
    def only_until(self, seconds: float) -> Iterator[None]:
        """Stop watching the nodes, but end the process if the block takes longer than that."""
        self.__exit__()
        reason = f'the other nodes have not reached the end of the run within {seconds} s'
        deadline = threading.Timer(seconds, self._end_process, [reason])
        deadline.daemon = True
        deadline.start()
        yield
        deadline.cancel()

    def _watch(self):
        start, connected_at = time.monotonic(), None
        while not self._done.wait(0.5):
            now = time.monotonic()
            if self._launcher and self._launcher != str(os.getppid()):
                self._end_process('the process that started this one is gone')
            if connected_at is None:
                # With a negative timeout every node counts as dead, once there is a connection.
                if self.kv is not None and self._count_dead(sum(NODE_GROUPS.values()), -1):
                    connected_at = now
                elif now - start > START_TIMEOUT:
                    self._end_process(
                        'no connection to the scheduler at {DMLC_PS_ROOT_URI}:{DMLC_PS_ROOT_PORT} '
                        'with all of the {DMLC_NUM_WORKER} workers and {DMLC_NUM_SERVER} servers '
                        'within {} s'.format(START_TIMEOUT, **os.environ)
                    )
            elif now - connected_at > self.node_timeout:  # before, no node can be overdue
                self._check_nodes()

    def _check_nodes(self):
        for name, group in NODE_GROUPS.items():
            if self._count_dead(group, self.node_timeout):
                hint = '' if ROLE == 'scheduler' else '; it ends when a worker or a server is lost'
                self._end_process(
                    f'{name} of the run has not been heard from for {self.node_timeout} s: killed, '
                    f'failed or cut off{hint}'
                )

    def _count_dead(self, group, timeout):
        count = ctypes.c_int()
        handle, out = self.kv.handle, ctypes.byref(count)
        mx.base.check_call(mx.base._LIB.MXKVStoreGetNumDeadNode(handle, group, out, timeout))
        return count.value

    def _end_process(self, reason):
        """Report a Failure from this thread, on stderr and in the log file, and end the process."""
        try:
            message = f'{reason}; {self.resume_hint()}'
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.FileHandler):
                    handler.handle(logging.makeLogRecord({'msg': message}))
            print(f'{Path(sys.argv[0]).name}: error: {message}', file=sys.stderr, flush=True)
        finally:  # also where stderr is closed
            os._exit(Failure.exit_status)
