"""IDX files, the format of MNIST: http://yann.lecun.com/exdb/mnist."""

import gzip
import hashlib
import math
import os
from pathlib import Path
import stat
import struct
import zlib

import numpy as np

from common.errors import InputError
from common.files import printable

MAX_FILE_SIZE = 1 << 30  # bytes before compression; EMNIST's largest file has half of it


def read_idx(path: Path) -> tuple[np.ndarray, str]:
    """Read an IDX file of unsigned bytes, raw or gzip; an InputError says what is wrong with it.

    A file whose size is not what its header announces is refused before its content is read.

    Returns
    -------
    array : numpy.ndarray
        uint8: labels with one dimension, images with three; none of them 0.
    digest : str
        SHA-256 of the raw file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError('not a regular file')
        with open(path, 'rb') as file:
            if file.read(2) == b'\x1f\x8b':  # gzip, whose last bytes are the size of the content
                file.seek(-4, os.SEEK_END)
                size = int.from_bytes(file.read(), 'little')
                file.seek(0)
                return _read_idx(gzip.open(file), size)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            return _read_idx(file, size)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, 'strerror', None) or error
        raise InputError(f'{printable(path)}: {reason}') from None


def _read_idx(file, file_size):
    magic = file.read(4)  # the last byte is the number of dimensions
    if magic[:3] != b'\0\0\x08' or magic[3:] not in (b'\1', b'\3'):
        raise ValueError(
            f'not an IDX file of bytes: it begins with {magic.hex(" ") or "nothing"}, not with '
            '00 00 08 01 (labels) or 00 00 08 03 (images)'
        )
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ValueError('its header is truncated')
    shape = struct.unpack(f'>{magic[3]}I', header)
    size = 4 + len(header) + math.prod(shape)
    if 0 in shape or size > MAX_FILE_SIZE:
        raise ValueError(f'its header announces {shape}: not from 1 byte to 1 GiB')
    if size != file_size:
        raise ValueError(f'damaged: its size is {file_size} bytes, its header announces {size}')
    array = np.empty(shape, np.uint8)
    sha256, rest = hashlib.sha256(magic + header), memoryview(array.reshape(-1))
    while rest and (count := file.readinto(rest[: 1 << 20])):
        sha256.update(rest[:count])
        rest = rest[count:]
    if rest or file.read(1):  # at the end gzip compares its own checksum
        raise ValueError('damaged: its size is not what its last bytes say')
    return array, sha256.hexdigest()
