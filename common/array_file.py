"""MXNet's file of named arrays, what ``mx.nd.save`` writes, encoded and decoded in Python.

MXNet's own reader believes every length in a file: one flipped bit, and it allocates gigabytes,
runs for minutes or crashes. Its writer does not notice a full disk, and each use of both leaks.

    file    magic u64, reserved u64, count u64, arrays, count u64, names (length u64, UTF-8)
    array   magic u32, [storage i32,] ndim u32, shape i64, device 2 x i32, type i32, values
"""

from collections.abc import Iterator, Mapping
import math
import struct

import numpy as np

from common.environment import mx

MAGIC = struct.pack('<Q', 0x112)
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA  # before V1 ndim was in its place, and shape u32
# In the order of MXNet's numbers.
DTYPES = [np.dtype(name) for name in ('f4', 'f8', 'f2', 'u1', 'i4', 'i1', 'i8', '?')]
CPU = 1


def encode_arrays(arrays: Mapping[str, mx.nd.NDArray]) -> Iterator[bytes | memoryview]:
    """Yield, piece by piece, the bytes that ``mx.nd.save`` writes for arrays on the CPU."""
    yield MAGIC + struct.pack('<QQ', 0, len(arrays))
    for array in arrays.values():
        values = np.ascontiguousarray(array.asnumpy())
        dtype = DTYPES.index(values.dtype)
        yield struct.pack(
            f'<IiI{values.ndim}qiii', V2, 0, values.ndim, *values.shape, CPU, 0, dtype
        )
        yield values.reshape(-1).view(np.uint8).data
    yield struct.pack('<Q', len(arrays))
    for name in map(str.encode, arrays):
        yield struct.pack('<Q', len(name)) + name


def decode_arrays(data: bytes) -> dict[str, mx.nd.NDArray]:
    """Return the arrays of a file by name.

    Raises
    ------
    ValueError
        If ``data`` is not a whole file of dense named arrays. The text says why.
    """
    if not data.startswith(MAGIC):
        raise ValueError('it is not a file of MXNet arrays')
    reader = _Reader(data)
    _, _, count = reader.unpack('QQQ')
    values = [reader.array() for _ in range(count)]
    (count,) = reader.unpack('Q')
    names = [str(reader.bytes(*reader.unpack('Q')), 'utf-8') for _ in range(count)]
    if reader.position != len(data) or len(set(names)) != len(values):
        raise ValueError(f'it has {len(values)} arrays, {len(set(names))} names')
    return {
        name: mx.nd.array(value, dtype=value.dtype)
        for name, value in zip(names, values, strict=True)
    }


class _Reader:
    """Takes one thing after the other from bytes; raises ValueError for what is not there."""

    def __init__(self, data):
        self.data = memoryview(data)
        self.position = 0

    def bytes(self, size):
        begin, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise ValueError(f'it has {len(self.data)} bytes, and announces {self.position}')
        return self.data[begin : self.position]

    def unpack(self, layout):
        return struct.unpack(f'<{layout}', self.bytes(struct.calcsize(f'<{layout}')))

    def array(self):
        (version,) = self.unpack('I')
        storage = self.unpack('i')[0] if version in (V2, V3) else 0
        ndim = self.unpack('I')[0] if version in (V1, V2, V3) else version
        shape = self.unpack(f'{ndim}{"q" if version in (V1, V2, V3) else "I"}')
        _, _, dtype = self.unpack('iii')
        if storage != 0 or min(shape, default=0) < 1 or not 0 <= dtype < len(DTYPES):
            raise ValueError(f'it has an array of storage {storage}, shape {shape}, type {dtype}')
        values = self.bytes(math.prod(shape) * DTYPES[dtype].itemsize)
        return np.frombuffer(values, DTYPES[dtype]).reshape(shape)


def tagged(arg_params: Mapping, aux_params: Mapping) -> dict:
    """Join weights and centers under 'arg:NAME' and 'aux:NAME', as MXNet's .params files do."""
    return {
        **{f'arg:{name}': value for name, value in arg_params.items()},
        **{f'aux:{name}': value for name, value in aux_params.items()},
    }


def untagged(arrays: Mapping) -> tuple[dict, dict]:
    """Split what :func:`tagged` has joined into (arg_params, aux_params)."""
    return tuple(
        {name[4:]: value for name, value in arrays.items() if name.startswith(kind)}
        for kind in ('arg:', 'aux:')
    )
