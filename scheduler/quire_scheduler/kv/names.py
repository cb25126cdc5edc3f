"""Content names of full KV blocks: a BLAKE2b-128 chain, equal wherever and whenever it is computed.

Knows nothing of block ids, tiers or processes. Changing a byte here invalidates every stored block:
raise NAMING_VERSION with it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NAMING_VERSION = 1
NAME_BYTES = 16
_EMPTY = hashlib.blake2b(digest_size=NAME_BYTES)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What makes two blocks of the same tokens differ between deployments."""

    model_digest: bytes
    dtype: str
    kv_dtype: str
    name_key: bytes = b""  # --kv-name-key, shared by replicas


class Namespace(NamedTuple):
    """What makes them differ between requests of one deployment."""

    adapter: bytes = b""  # digest of the adapter
    salt: bytes = b""  # tenant or cache salt


def root_name(
    *,
    model_digest: bytes,
    dtype: str,
    kv_dtype: str,
    block_size: int,
    adapter: bytes = b"",
    salt: bytes = b"",
    name_key: bytes = b"",
) -> bytes:
    """name_0: 16 bytes from which a chain starts.

    Hashed are the version, the arguments in F3's order, each as its length (u32 little-endian) and
    its bytes; integers are u32 little-endian, text is UTF-8. So no two argument lists meet.
    """
    fields = (
        struct.pack("<I", NAMING_VERSION),
        model_digest,
        dtype.encode(),
        kv_dtype.encode(),
        struct.pack("<I", block_size),
        adapter,
        salt,
        name_key,
    )
    digest = hashlib.blake2b(digest_size=NAME_BYTES)
    for field in fields:
        digest.update(struct.pack("<I", len(field)))
        digest.update(field)
    return digest.digest()


def root_of(identity: ModelIdentity, namespace: Namespace, block_size: int) -> bytes:
    """root_name for a deployment and a namespace."""
    return root_name(
        model_digest=identity.model_digest,
        dtype=identity.dtype,
        kv_dtype=identity.kv_dtype,
        block_size=block_size,
        adapter=namespace.adapter,
        salt=namespace.salt,
        name_key=identity.name_key,
    )


def token_bytes(tokens: NDArray[np.int32]) -> bytes:
    """Token ids [num_tokens] as little-endian int32 bytes, the form edges and names are made of."""
    return tokens.astype("<i4", copy=False).tobytes()


def next_name(previous: bytes | bytearray, block: bytes) -> bytes:
    """Name of the block whose tokens are `block` (token_bytes), after a block of that name."""
    digest = _EMPTY.copy()  # cheaper than reading the parameters again
    digest.update(previous + block)
    return digest.digest()


def chain_bytes(previous: bytes, data: bytes, block_bytes: int) -> bytes:
    """Names of the whole blocks in `data` (token_bytes), 16 bytes each, following `previous`."""
    names: list[bytes] = []
    name = previous
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        name = next_name(name, data[start : start + block_bytes])
        names.append(name)
    return b"".join(names)


def chain(previous: bytes, tokens: NDArray[np.int32], block_size: int) -> bytes:
    """Names of the full blocks of `tokens` [num_tokens]: 16 * (num_tokens // block_size) bytes.

    `previous` is a root name or the name of the block before. A trailing partial block has none.
    """
    return chain_bytes(previous, token_bytes(tokens), 4 * block_size)
