"""Packed columns: bytes and bounds."""

from __future__ import annotations

import numpy as np
import pytest

from quire import wire


def test_columns_are_little_endian_and_read_back() -> None:
    assert wire.pack_i32([1, -2]) == b"\x01\x00\x00\x00\xfe\xff\xff\xff"
    assert list(wire.unpack_i32(wire.pack_i32([1, -2]))) == [1, -2]
    assert list(wire.unpack_u32(wire.pack_u32([0, 2**32 - 1]))) == [0, 2**32 - 1]
    assert list(wire.unpack_f32(wire.pack_f32([0.5, -1.25]))) == [0.5, -1.25]


def test_numpy_reads_the_same_bytes() -> None:
    assert np.frombuffer(wire.pack_i32(range(5)), "<i4").tolist() == list(range(5))
    assert np.frombuffer(wire.pack_f32([1.5]), "<f4").tolist() == [1.5]


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_values_that_do_not_fit_are_refused(value: int) -> None:
    with pytest.raises(OverflowError):
        wire.pack_i32([value])


def test_a_cut_column_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        wire.unpack_i32(b"\x00\x00\x00")


def test_an_empty_column_is_no_bytes() -> None:
    assert wire.pack_u32([]) == b""
    assert list(wire.unpack_u32(b"")) == []
