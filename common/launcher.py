"""Starts a distributed run on this machine: workers, with a scheduler and a server for them."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import os
import socket
import subprocess
import sys
import time

from common.environment import THREADS_CHOSEN_BY_USER, available_cpus
from common.distributed import node_timeout
from common.errors import Failure

POLL_INTERVAL = 0.05  # seconds


def run_workers(argv: Sequence[str], num_workers: int, resume_hint: Callable[[], str]) -> None:
    """Run a command line in several processes on this machine until all have finished.

    When one of them fails or is killed the others are stopped, and so they are by Ctrl-C and
    SIGTERM. Check what can be checked before: every worker would report the same mistake.

    Parameters
    ----------
    argv
        The command line that every worker runs, ``[sys.executable, *sys.argv]`` for this one.
    num_workers
        How many workers to start, besides the scheduler and one server.
    resume_hint
        Returns the phrase that ends the message: what is saved, how to continue.

    Raises
    ------
    Failure
        If a process was killed.
    SystemExit
        If a process has failed; it has reported the reason itself.
    """
    environment = node_environment(num_workers)
    names = ['scheduler', 'server', *(f'worker {rank}' for rank in range(num_workers))]
    processes = {}
    try:
        for name in names:
            processes[name] = subprocess.Popen(
                argv,
                env={**environment, 'DMLC_ROLE': name.split()[0]},
                start_new_session=True,  # Ctrl-C reaches this process alone
            )
        wait_for_all(processes, resume_hint)
    except KeyboardInterrupt:
        with contextlib.suppress(KeyError):  # not all were started
            stop([processes[name] for name in names[2:]], seconds=node_timeout())
        raise
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def node_environment(num_workers: int) -> dict[str, str]:
    """Return the environment of a run's processes on this machine, all but DMLC_ROLE."""
    node_timeout()  # a mistake in it is reported here, once
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        'DMLC_PS_ROOT_URI': '127.0.0.1',
        'DMLC_PS_ROOT_PORT': str(port),
        'DMLC_NODE_HOST': '127.0.0.1',
        'DMLC_INTERFACE': 'lo',
        'DMLC_NUM_WORKER': str(num_workers),
        'DMLC_NUM_SERVER': '1',
        'LAUNCHER_PID': str(os.getpid()),
    }
    environment.pop('PORT', None)  # MXNet would take it for the port of every node
    if not THREADS_CHOSEN_BY_USER:
        environment.update(
            OMP_NUM_THREADS=str(max(1, available_cpus() // num_workers)),
            OMP_WAIT_POLICY='passive',
            GOMP_SPINCOUNT='0',
        )
    return environment


def wait_for_all(processes: Mapping[str, subprocess.Popen], resume_hint: Callable[[], str]) -> None:
    """Wait until every process has finished; raise as soon as one fails."""
    while True:
        for name, process in processes.items():
            status = process.poll() or 0
            if status > 0:
                sys.exit(status)
            if status < 0:
                raise Failure(
                    f'{name} was killed by signal {-status}, the others are stopped; '
                    f'{resume_hint()}'
                )
        if all(process.returncode == 0 for process in processes.values()):
            return
        time.sleep(POLL_INTERVAL)


def stop(workers: Sequence[subprocess.Popen], seconds: float) -> None:
    """Let workers finish their batch and report; one may wait for another that has ended."""
    for worker in workers:
        worker.terminate()  # not SIGINT, which shows a traceback while Python is importing
    deadline = time.monotonic() + seconds
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        if any(worker.poll() is not None for worker in workers):
            deadline = min(deadline, time.monotonic() + 1)
        time.sleep(POLL_INTERVAL)
