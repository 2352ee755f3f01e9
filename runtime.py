"""The ground floor: what has to be in place before MXNet is imported, and what both command lines share.

Every script takes MXNet from here, ``from runtime import mx``, so that the order below cannot be got wrong:

* NumPy's old aliases (``np.bool`` and friends), which MXNet 1.9.1 still uses, are restored where NumPy >= 1.24 left them out;
* the number of CPU threads is chosen: OpenMP reads it once, when MXNet is loaded;
* a process with DMLC_ROLE=scheduler or server does not become one by the mere import, so that the program can watch over it;
* the engine is chosen, whose name MXNet reads at the import, and begun.
"""

import argparse
import contextlib
import ctypes
import functools
import math
import os
import signal
import sys
import warnings
from pathlib import Path


def leave(number, frame):
    """A signal handler that ends the program at once, without a traceback."""
    os._exit(128 + number)


# A script that is still being imported has nothing to lose: until run_script takes over, and when it is done, Ctrl-C and SIGTERM end it at once.
# Other programs that import this keep their handlers.
_script = getattr(sys.modules['__main__'], '__file__', None)
_here = Path(__file__).resolve().parent
if _script and Path(_script).resolve().parent in (_here, _here / 'tests'):
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) != signal.SIG_IGN:
            signal.signal(_number, leave)

import numpy as np  # noqa: E402

for _alias, _type in (('bool', bool), ('int', int), ('float', float), ('object', object)):
    if _alias not in vars(np):
        setattr(np, _alias, _type)


def available_cpus():
    """Processors this process may use: its CPU affinity, cut down to the container's quota where there is one (at least 1)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:  # cgroup v2: "QUOTA PERIOD", or "max PERIOD"
        quota, period = Path('/sys/fs/cgroup/cpu.max').read_text().split()
    except (OSError, ValueError):
        try:  # cgroup v1: -1 means no quota
            quota = Path('/sys/fs/cgroup/cpu/cpu.cfs_quota_us').read_text().strip()
            period = Path('/sys/fs/cgroup/cpu/cpu.cfs_period_us').read_text().strip()
        except OSError:
            return cpus
    if quota == 'max' or int(quota) <= 0:
        return cpus
    return max(1, min(cpus, math.floor(int(quota) / int(period))))


# What this process is in a run of several (worker, server or scheduler). MXNet reads it at its import, where a server or scheduler would stay for
# good; it gets it back afterwards.
ROLE = os.environ.pop('DMLC_ROLE', None)

# Left alone, MXNet takes half of the processors it sees. Threads that wait actively, for some microseconds, hand over between two
# operators without going to sleep: with LeNet's short operators that is the difference between a slower and a faster step. If they did so for
# longer they would keep from the processors whom they wait for: on a machine that is shared, a step took two to three times as long. For that
# reason they do not do it at all in a run of several processes. What the user has set stays.
THREADS_ARE_CHOSEN_HERE = 'OMP_NUM_THREADS' not in os.environ
if THREADS_ARE_CHOSEN_HERE:
    os.environ['OMP_NUM_THREADS'] = str(available_cpus() if ROLE in (None, 'worker') else 1)
    if 'OMP_WAIT_POLICY' not in os.environ:
        os.environ['OMP_WAIT_POLICY'] = 'active' if ROLE is None else 'passive'
        os.environ.setdefault('GOMP_SPINCOUNT', '3000' if ROLE is None else '0')
# MXNet would report on stderr, at every bind, that it fuses operators.
os.environ.setdefault('MXNET_SUBGRAPH_VERBOSE', '0')
# How many parameters a common update may take: those that train_model.py puts together, whatever their number.
os.environ.setdefault('MXNET_OPTIMIZER_AGGREGATION_SIZE', '45')
# Every worker updates its own weights from the summed gradient. The momentum then lives in this process, where a checkpoint can keep it.
os.environ['MXNET_UPDATE_ON_KVSTORE'] = '0'

# Whether every operation is executed by the thread that asks for it. MXNet's usual engine hands each to a thread of its own, and an operator in Python on
# to yet another one, with a processor to be woken every time: a call of the center loss took three times as long. GPUs compute beside the processors, and
# several processes wait for each other: both need the usual engine.
_engine_is_chosen_here = (
    'MXNET_ENGINE_TYPE' not in os.environ
    and ROLE is None
    and not any(argument.startswith('--gpus') for argument in sys.argv)
)
if _engine_is_chosen_here:
    os.environ['MXNET_ENGINE_TYPE'] = 'NaiveEngine'
SYNCHRONOUS = os.environ.get('MXNET_ENGINE_TYPE') == 'NaiveEngine'

with warnings.catch_warnings():
    warnings.simplefilter(
        'ignore'
    )  # of MXNet's own use of what Python and NumPy have deprecated since
    import mxnet as mx

if ROLE is not None:
    os.environ['DMLC_ROLE'] = ROLE


def start_engine():
    """Begin MXNet's engine, without the line on stderr in which it tells its name."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        mx.nd.waitall()
        return
    with open(os.devnull, 'w') as nowhere:
        os.dup2(nowhere.fileno(), 2)
        mx.nd.waitall()
    os.dup2(stderr, 2)
    os.close(stderr)


if _engine_is_chosen_here:
    start_engine()
    del os.environ['MXNET_ENGINE_TYPE']  # the processes that this one starts choose for themselves

__all__ = [
    'ROLE',
    'SYNCHRONOUS',
    'THREADS_ARE_CHOSEN_HERE',
    'ArgumentParser',
    'Failure',
    'InputError',
    'Terminated',
    'available_cpus',
    'memory_of',
    'mx',
    'number',
    'run_script',
]


def memory_of(array, shape=None):
    """The memory of a float32 NDArray on the CPU as a NumPy array of the same shape, without a copy and without waiting for the engine.

    It may be touched where the engine cannot be at work on it: within the callback of an operator that was lent the array, or while nobody
    else knows of an array that is new. It is gone with the NDArray. Who knows the shape already may say it: asking MXNet takes as long as all the rest.
    """
    shape = array.shape if shape is None else shape
    address = ctypes.c_void_p()
    mx.base.check_call(mx.base._LIB.MXNDArrayGetData(array.handle, ctypes.byref(address)))
    return _floats_at(address.value, shape)


@functools.lru_cache(maxsize=256)  # every step of a training asks for the same few places
def _floats_at(address, shape):
    return np.frombuffer(
        (ctypes.c_float * math.prod(shape)).from_address(address), np.float32
    ).reshape(shape)


class Failure(Exception):
    """What ends a script. Its text is one sentence: what was wrong, which value, what to do."""

    status = 1


class InputError(Failure, ValueError):
    """A mistake in what the program was given."""

    status = 2


class Terminated(KeyboardInterrupt):
    """SIGTERM, told like Ctrl-C."""


class ArgumentParser(argparse.ArgumentParser):
    """An ``argparse.ArgumentParser`` whose help shows every default and whose errors are one sentence on stderr and exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n')


def number(kind, minimum=-math.inf, maximum=math.inf, above=-math.inf):
    """An argparse ``type`` for a finite ``kind`` (int or float) with minimum <= value <= maximum and value > above."""

    def parse(text):
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError
        except (ValueError, OverflowError):
            noun = 'a whole number' if kind is int else 'a finite number'
            raise argparse.ArgumentTypeError(f'{text!r} is not {noun}') from None
        for wrong, bound in (
            (value <= above, f'greater than {above}'),
            (value < minimum, f'at least {minimum}'),
            (value > maximum, f'at most {maximum}'),
        ):
            if wrong:
                raise argparse.ArgumentTypeError(f'{text} is out of range: it has to be {bound}')
        return value

    return parse


def run_script(main):
    """Run ``main()`` and leave: status 0, a :class:`Failure` told in one line on stderr with its status, or 130 and 143 for Ctrl-C and SIGTERM."""

    def interrupt(number, frame):
        while (
            frame is not None
        ):  # where MXNet is calling back into Python, as it does to bind an operator, an exception does not come through
            if frame.f_code.co_filename == mx.operator.__file__:
                leave(number, frame)
            frame = frame.f_back
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        main()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    except Failure as failure:
        print(f'{Path(sys.argv[0]).name}: error: {failure}', file=sys.stderr)
        sys.exit(failure.status)
    except KeyboardInterrupt as stop:
        sys.exit(128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
