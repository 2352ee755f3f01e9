"""Process set-up before MXNet is imported; every script imports MXNet from here.

Some settings take effect only if they are there when MXNet is loaded: NumPy's old aliases, the
number of OpenMP threads, the role in a distributed run. ``from common.environment import mx`` puts
them in place first; where MXNet does not load, it ends the script with one sentence.
``center_loss.py`` needs none of this and imports MXNet itself.
"""

import atexit
import contextlib
import gc
import os
from pathlib import Path
import warnings

import numpy as np

from common.errors import InputError
from common.mxnet_build import import_mxnet

__all__ = ['ROLE', 'THREADS_CHOSEN_BY_USER', 'available_cpus', 'mx']


def available_cpus() -> int:
    """Return how many processors this process may use: its affinity, limited by a cgroup quota."""
    cpus = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # cgroup v2: 'QUOTA PERIOD' or 'max PERIOD'
        quota, period = Path('/sys/fs/cgroup/cpu.max').read_text().split()
        return max(1, min(cpus, int(quota) // int(period)))
    with contextlib.suppress(OSError, ValueError):  # cgroup v1: a quota of -1 is none
        folder = Path('/sys/fs/cgroup/cpu')
        quota, period = (
            int((folder / f'cpu.cfs_{name}_us').read_text()) for name in ('quota', 'period')
        )
        if quota > 0:
            return max(1, min(cpus, quota // period))
    return cpus


# A closed stdin, stdout or stderr would be the number of the next file that is opened, and messages
# that MXNet prints would end up in that file.
for _descriptor in (0, 1, 2):
    try:
        os.fstat(_descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number

# MXNet 1.9.1 uses aliases that NumPy 1.24 removed.
for _alias, _type in (('bool', bool), ('int', int), ('float', float), ('object', object)):
    if _alias not in vars(np):
        setattr(np, _alias, _type)

# A process with DMLC_ROLE=scheduler or server would turn into one inside `import mxnet` and never
# return; it starts serving later, in common.distributed, where it can be watched.
ROLE = os.environ.pop('DMLC_ROLE', None)

# By default MXNet takes half of the processors. Threads that spin for some microseconds between two
# short operators are faster than threads that sleep; on a shared machine a longer spin made a step
# two to three times as slow, and several processes on one machine should not spin at all.
THREADS_CHOSEN_BY_USER = 'OMP_NUM_THREADS' in os.environ
if not THREADS_CHOSEN_BY_USER:
    os.environ['OMP_NUM_THREADS'] = str(available_cpus() if ROLE in (None, 'worker') else 1)
    if 'OMP_WAIT_POLICY' not in os.environ:
        os.environ['OMP_WAIT_POLICY'] = 'active' if ROLE is None else 'passive'
        os.environ.setdefault('GOMP_SPINCOUNT', '3000' if ROLE is None else '0')
# No line on stderr at every bind about the operators that MXNet fuses.
os.environ.setdefault('MXNET_SUBGRAPH_VERBOSE', '0')
# In the GPU build: no operators fused by NVRTC 11.7, which wants a new driver and does not know
# Ada; no convolutions chosen by timing them, with a line on stderr; no line where there is no GPU.
for _name in ('USE_FUSION', 'CUDNN_AUTOTUNE_DEFAULT', 'CUDA_LIB_CHECKING'):
    os.environ.setdefault(f'MXNET_{_name}', '0')
# Every worker updates its own weights from the summed gradient, so that the optimizer's state lives
# in this process, where a checkpoint can save it.
os.environ['MXNET_UPDATE_ON_KVSTORE'] = '0'

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # deprecated Python and NumPy features in MXNet's own code
    try:
        mx = import_mxnet()
    except InputError as error:  # before run_script could report it
        error.exit_script()

if ROLE is not None:
    os.environ['DMLC_ROLE'] = ROLE


@atexit.register
def wait_for_pending_ops() -> None:
    """Wait for operations under way before MXNet's exit handler stops the threads they need.

    Without it a custom operator that is still running at exit waits for ever. Executors stand in
    reference cycles; deleted after this, they abort the process (7 of 32 runs in ThreadedEngine).
    """
    gc.collect()
    with contextlib.suppress(mx.MXNetError):  # whoever read the failed result has reported it
        mx.nd.waitall()
