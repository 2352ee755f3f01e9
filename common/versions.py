"""What the result of a run depends on besides its options."""

import contextlib
import functools
import hashlib
import os
from pathlib import Path
import platform

import numpy as np

from common.environment import mx

INSTRUCTION_SETS = ('avx512f', 'avx2', 'avx')  # the widest first


@functools.cache
def instruction_set() -> str:
    """Return the widest vectors that oneDNN uses on this processor; 'sse' is the narrowest.

    DNNL_MAX_CPU_ISA, where it is set, forbids wider ones: AVX2, say, or AVX512_CORE.
    """
    cpuinfo = Path('/proc/cpuinfo')
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    most = os.environ.get('DNNL_MAX_CPU_ISA', '').lower().split('_')[0].replace('avx512', 'avx512f')
    if most in INSTRUCTION_SETS:
        flags = set(flags).difference(INSTRUCTION_SETS[: INSTRUCTION_SETS.index(most)])
    elif most.startswith('sse'):
        flags = ()
    return next((name for name in INSTRUCTION_SETS if name in flags), 'sse')


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the program and of what it runs on, for a log or a checkpoint.

    That of the program is a digest of its source, as far as it can be read.
    """
    root = Path(__file__).resolve().parent.parent
    program = hashlib.sha256()
    for path in sorted([*root.glob('*.py'), *root.glob('common/*.py')]):
        with contextlib.suppress(OSError):  # an editor's lock, a dangling link, looks like a script
            program.update(path.read_bytes())
    return {
        'program': program.hexdigest()[:12],
        'python': platform.python_version(),
        'numpy': np.__version__,
        'mxnet': mx.__version__,
        'instruction_set': instruction_set(),
        'threads': os.environ['OMP_NUM_THREADS'],
    }
