"""Columns on the wire: packed little-endian arrays in `bytes` fields.

The stdlib half, for the services that have no numpy; where numpy is at hand,
`numpy.frombuffer(field, "<i4")` reads the same bytes without a copy.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

PROTOCOL_VERSION = 1
NAME_BYTES = 16  # a block name, BLAKE2b-128

_LITTLE = sys.byteorder == "little"


def _pack(code: str, values: Iterable[int] | Iterable[float]) -> bytes:
    column = array(code, values)
    if not _LITTLE:
        column.byteswap()
    return column.tobytes()


def _unpack(code: str, data: bytes) -> array:  # type: ignore[type-arg]
    column = array(code)
    column.frombytes(data)
    if not _LITTLE:
        column.byteswap()
    return column


def pack_i32(values: Iterable[int]) -> bytes:
    """int32 column. Raises OverflowError for values that do not fit."""
    return _pack("i", values)


def pack_u32(values: Iterable[int]) -> bytes:
    """uint32 column. Raises OverflowError for values that do not fit."""
    return _pack("I", values)


def pack_f32(values: Iterable[float]) -> bytes:
    """float32 column."""
    return _pack("f", values)


def unpack_i32(data: bytes) -> array:  # type: ignore[type-arg]
    """int32 column as array('i'). Raises ValueError when the length is no multiple of 4."""
    return _unpack("i", data)


def unpack_u32(data: bytes) -> array:  # type: ignore[type-arg]
    """uint32 column as array('I'). Raises ValueError when the length is no multiple of 4."""
    return _unpack("I", data)


def unpack_f32(data: bytes) -> array:  # type: ignore[type-arg]
    """float32 column as array('f'). Raises ValueError when the length is no multiple of 4."""
    return _unpack("f", data)
