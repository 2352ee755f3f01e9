"""Which build of MXNet is installed, and what it takes to load it."""

import contextlib
import ctypes
from importlib import metadata, util
from pathlib import Path
import sys
from types import ModuleType

import numpy as np

from common.errors import InputError


def import_mxnet() -> ModuleType:
    """Import MXNet, after NVIDIA's libraries in site-packages if it does not load without them.

    The dynamic linker does not look there; PyTorch loads its own in the same way.

    Raises
    ------
    InputError
        If a package or a shared library is missing, or NumPy is too new.
    """
    if np.__version__ >= '2':
        raise InputError(
            f'MXNet does not work with NumPy {np.__version__}: pip install -r requirements.txt '
            'installs one that it works with'
        )
    try:
        import mxnet

        return mxnet
    except ModuleNotFoundError as error:
        raise InputError(
            f'{error}: pip install -r requirements.txt, in the environment of {sys.executable}'
        ) from None
    except OSError:
        pass
    nvidia = util.find_spec('nvidia')
    for folder in nvidia.submodule_search_locations if nvidia else ():
        for library in sorted(Path(folder).glob('*/lib/lib*.so.*')):
            with contextlib.suppress(OSError):  # the import says what it misses
                ctypes.CDLL(str(library))
    try:
        import mxnet
    except OSError as error:
        check_single_build()
        raise InputError(_explain(str(error))) from None
    return mxnet


def check_single_build() -> None:
    """Raise InputError where builds of MXNet are installed over each other.

    All of them own the folder ``mxnet/``, and pip does not notice.
    """
    builds = sorted({*metadata.packages_distributions().get('mxnet', ())})
    if len(builds) > 1:
        raise InputError(
            f'{" and ".join(builds)} are installed over each other, in the same folder mxnet/: in '
            'a fresh environment, pip install -r requirements-gpu.txt or, for the CPU, '
            'requirements.txt'
        )


def _explain(message):
    """Say what to do about an error of the dynamic linker, 'NAME: ...'."""
    name = message.partition(':')[0]
    if name == 'libcuda.so.1':
        return (
            'MXNet is installed for GPUs and does not load without the NVIDIA driver '
            '(libcuda.so.1): install the driver, start the container with --gpus=all, or, for the '
            'CPU, pip install -r requirements.txt in a fresh environment'
        )
    if name.startswith(('libgomp.so', 'libquadmath.so')):
        return (
            f'MXNet needs the system library {name}: apt-get install libgomp1 libquadmath0 '
            '(Debian, Ubuntu; elsewhere libgomp and libquadmath)'
        )
    if name.startswith(('libcu', 'libnccl', 'libnvrtc', 'libnvToolsExt')):
        return f'MXNet needs the NVIDIA library {name}: pip install -r requirements-gpu.txt'
    return f'MXNet does not load: {message}'
