"""Block names: golden values, because stored blocks and other processes depend on every byte."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from quire_scheduler.kv.names import (
    ModelIdentity,
    Namespace,
    chain,
    chain_bytes,
    root_name,
    root_of,
    token_bytes,
)

PLAIN = {
    "model_digest": bytes(range(16)),
    "dtype": "bfloat16",
    "kv_dtype": "bfloat16",
    "block_size": 16,
}


def test_root_name_is_pinned() -> None:
    assert root_name(**PLAIN).hex() == "240d5a230488ccfa6e01d828d072568c"


def test_root_name_with_every_field_is_pinned() -> None:
    name = root_name(
        model_digest=bytes(range(16)),
        dtype="bfloat16",
        kv_dtype="fp8_e4m3",
        block_size=16,
        adapter=b"ad",
        salt=b"tenant-1",
        name_key=b"key",
    )
    assert name.hex() == "311f9934e9d418f1e0dc954d747f3de7"


def test_chain_is_pinned() -> None:
    names = chain(root_name(**PLAIN), np.arange(35, dtype=np.int32), 16)
    assert names.hex() == "b9b1f22861edcc262904b2eaf8e537c74f0fa7afa9ef67bb80cdec11a77053ad"


def test_root_name_follows_the_written_recipe() -> None:
    fields = [
        struct.pack("<I", 1),
        bytes(range(16)),
        b"bfloat16",
        b"bfloat16",
        struct.pack("<I", 16),
        b"",
        b"",
        b"",
    ]
    encoded = b"".join(struct.pack("<I", len(field)) + field for field in fields)
    assert root_name(**PLAIN) == hashlib.blake2b(encoded, digest_size=16).digest()


def test_chain_follows_the_written_recipe() -> None:
    first = hashlib.blake2b(b"p" * 16 + struct.pack("<2i", 7, -1), digest_size=16).digest()
    second = hashlib.blake2b(first + struct.pack("<2i", 1, 2**31 - 1), digest_size=16).digest()
    tokens = np.array([7, -1, 1, 2**31 - 1, 5], np.int32)
    assert chain(b"p" * 16, tokens, 2) == first + second


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": b"other"},
        {"dtype": "float16"},
        {"kv_dtype": "fp8_e4m3"},
        {"block_size": 32},
        {"adapter": b"x"},
        {"salt": b"x"},
        {"name_key": b"x"},
    ],
)
def test_every_field_separates(change: dict) -> None:
    assert root_name(**(PLAIN | change)) != root_name(**PLAIN)


def test_bytes_cannot_move_between_fields() -> None:
    one = root_name(**PLAIN, adapter=b"ab", salt=b"c")
    other = root_name(**PLAIN, adapter=b"a", salt=b"bc")
    assert one != other


def test_chain_continues_where_it_stopped() -> None:
    tokens = np.arange(64, dtype=np.int32)
    whole = chain(b"r" * 16, tokens, 16)
    head = chain(b"r" * 16, tokens[:32], 16)
    assert head + chain(head[-16:], tokens[32:], 16) == whole
    assert chain_bytes(head[-16:], token_bytes(tokens[32:]), 64) == whole[32:]


def test_partial_block_has_no_name() -> None:
    assert chain(b"r" * 16, np.arange(15, dtype=np.int32), 16) == b""


def test_names_do_not_depend_on_the_array_layout() -> None:
    tokens = np.arange(32, dtype=np.int32)
    spread = np.repeat(tokens, 2)[::2]
    big = tokens.astype(">i4")
    assert chain(b"r" * 16, spread, 16) == chain(b"r" * 16, big, 16) == chain(b"r" * 16, tokens, 16)


def test_root_of_takes_deployment_and_namespace() -> None:
    identity = ModelIdentity(bytes(range(16)), "bfloat16", "fp8_e4m3", b"key")
    assert (
        root_of(identity, Namespace(b"ad", b"tenant-1"), 16).hex()
        == "311f9934e9d418f1e0dc954d747f3de7"
    )
