"""What the result of a run depends on besides its options."""

import functools
import hashlib
import os
from pathlib import Path
import platform

import numpy as np

from common.environment import mx

INSTRUCTION_SETS = ('avx512f', 'avx2', 'avx')


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the program and of what it runs on, for a log or a checkpoint.

    That of the program is a digest of its source.
    """
    root = Path(__file__).resolve().parent.parent
    sources = sorted([*root.glob('*.py'), *root.glob('common/*.py')])
    program = hashlib.sha256(b''.join(path.read_bytes() for path in sources))
    cpuinfo = Path('/proc/cpuinfo')
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return {
        'program': program.hexdigest()[:12],
        'python': platform.python_version(),
        'numpy': np.__version__,
        'mxnet': mx.__version__,
        'instruction_set': next((name for name in INSTRUCTION_SETS if name in flags), 'sse'),
        'threads': os.environ['OMP_NUM_THREADS'],
    }
