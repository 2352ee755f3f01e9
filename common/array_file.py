"""MXNet's file of named arrays, as ``mx.nd.save`` writes it, written and read in Python.

MXNet's own reader believes every length that a file announces: a flipped bit makes it allocate
gigabytes, run for ever or crash. This one takes nothing that is not there. And MXNet's writer does
not notice a full disk.

    file    list magic u64, reserved u64, count u64, arrays, count u64, names (length u64, UTF-8)
    array   magic u32, [storage i32,] ndim u32, dimensions i64, device (i32, i32), type i32, values
"""

import math
import struct
from collections.abc import Iterator, Mapping

import numpy as np

from common.environment import mx

LIST_MAGIC = 0x112
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA  # before V1 the magic was ndim itself
DTYPES = [
    np.dtype(name) for name in ('f4', 'f8', 'f2', 'u1', 'i4', 'i1', 'i8', '?')
]  # MXNet's order
MAX_DIMENSIONS = 32  # NumPy's own limit


def encode_arrays(arrays: Mapping[str, mx.nd.NDArray]) -> Iterator[bytes | memoryview]:
    """Yield the file piece by piece, the bytes that ``mx.nd.save`` writes for a dict on the CPU."""
    yield struct.pack('<QQQ', LIST_MAGIC, 0, len(arrays))
    for array in arrays.values():
        values = np.ascontiguousarray(array.asnumpy())
        type_number = DTYPES.index(values.dtype)
        shape = array.shape
        yield struct.pack(f'<IiI{len(shape)}q', V2, 0, len(shape), *shape)
        yield struct.pack('<iii', 1, 0, type_number)  # device 1 is the CPU
        yield values.reshape(-1).view(np.uint8).data
    yield struct.pack('<Q', len(arrays))
    for name in arrays:
        encoded = name.encode()
        yield struct.pack('<Q', len(encoded)) + encoded


def is_array_file(data: bytes) -> bool:
    """Whether ``data`` begins as a file of arrays does."""
    return data[:8] == struct.pack('<Q', LIST_MAGIC)


def decode_arrays(data: bytes) -> dict[str, mx.nd.NDArray]:
    """Return the arrays of a file by name.

    Raises
    ------
    ValueError
        If ``data`` is not a whole file of dense named arrays. The text says why.
    """
    reader = _Reader(data)
    if not is_array_file(data):
        raise ValueError('it is not a file of MXNet arrays')
    reader.take('QQ')
    views = [reader.array() for _ in range(reader.count(smallest=12))]
    names = [reader.name() for _ in range(reader.count(smallest=8))]
    if reader.position != len(data):
        raise ValueError(f'it goes on for {len(data) - reader.position} bytes after its end')
    if len(names) != len(views) or len(set(names)) != len(names):
        raise ValueError(f'its {len(views)} arrays have {len(set(names))} names')
    return {
        name: mx.nd.array(view, dtype=view.dtype) for name, view in zip(names, views, strict=True)
    }


class _Reader:
    """Takes one thing after the other from bytes; what is not there raises ValueError."""

    def __init__(self, data):
        self.data = data
        self.position = 0

    def bytes(self, size):
        begin, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise ValueError(f'it ends at byte {len(self.data)} of at least {self.position}')
        return memoryview(self.data)[begin : self.position]

    def take(self, layout):
        return struct.unpack(f'<{layout}', self.bytes(struct.calcsize(f'<{layout}')))

    def count(self, smallest):
        """Return how many things follow, of ``smallest`` bytes each at least."""
        (count,) = self.take('Q')
        if count * smallest > len(self.data) - self.position:
            raise ValueError(f'it announces {count} items, which do not fit in its size')
        return count

    def name(self):
        return str(self.bytes(self.count(smallest=1)), 'utf-8')  # UnicodeError is a ValueError

    def array(self):
        (magic,) = self.take('I')
        if magic in (V2, V3):
            (storage,) = self.take('i')
            if storage != 0:
                raise ValueError(f'it holds an array of storage type {storage}, not a dense one')
        ndim = self.take('I')[0] if magic in (V1, V2, V3) else magic
        if not 1 <= ndim <= MAX_DIMENSIONS:
            raise ValueError(f'it holds an array of {ndim} dimensions')
        shape = self.take(f'{ndim}{"q" if magic in (V1, V2, V3) else "I"}')
        _, _, type_number = self.take('iii')
        if not 0 <= type_number < len(DTYPES) or min(shape) < 1:
            raise ValueError(f'it holds an array of shape {shape} and type {type_number}')
        values = self.bytes(math.prod(shape) * DTYPES[type_number].itemsize)
        return np.frombuffer(values, DTYPES[type_number]).reshape(shape)
