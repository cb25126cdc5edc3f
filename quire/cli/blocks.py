"""`quire blocks`: what the scheduler of a running server knows of its KV blocks.

Asks the address of --engine-address over gRPC. Knows no scheduler's insides.
"""

from __future__ import annotations

from typing import Any

from quire.cli.options import Line
from quire.config import Resolved
from quire.errors import ConfigError, QuireError

MAX_BLOCKS = 256
TIMEOUT_S = 10.0
ROW = "{:>8}  {:<7} {:<7} {:>7}  {:>9}  {:>7}  {:<32}  {}"


def run(line: Line, resolved: Resolved) -> int:
    """Print a line for each block; the exit status."""
    request = {
        "limit": line.integer("limit", 1, MAX_BLOCKS),
        "block_ids": block_ids(line),
        "tier": line.option("tier"),
    }
    for row in table(ask(resolved.config.engine_address, request)):
        print(row)
    return 0


def block_ids(line: Line) -> list[int]:
    """The numbers after --id. Raises ConfigError."""
    words = [word for word in line.option("id").split(",") if word.strip()]
    if not all(word.strip().isdecimal() and int(word) < 1 << 31 for word in words):
        raise ConfigError(f"--id takes block numbers such as 17 or 17,18, not {line.option('id')}.")
    if len(words) > MAX_BLOCKS:
        raise ConfigError(f"--id takes at most {MAX_BLOCKS} blocks, not {len(words)}.")
    return [int(word) for word in words]


def ask(address: str, request: dict[str, Any]) -> Any:
    """The scheduler's DescribeBlocksResponse. Raises QuireError."""
    import grpc

    from quire.errors import KINDS
    from quire.v1 import engine_pb2, engine_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            return stub.DescribeBlocks(
                engine_pb2.DescribeBlocksRequest(**request), timeout=TIMEOUT_S
            )
        except grpc.RpcError as error:
            name = dict(error.trailing_metadata() or ()).get("quire-error", "")
            if name in KINDS:
                raise QuireError(name, error.details()) from None
            raise QuireError(
                "scheduler_unavailable",
                f"No scheduler answers at {address} ({error.code().name}); --engine-address names "
                "another.",
            ) from None


def table(answer: Any) -> list[str]:
    """The lines to print for a DescribeBlocksResponse."""
    lines = [
        f"{answer.num_blocks} blocks of {answer.block_size} tokens: {answer.num_used} used, "
        f"{answer.num_cached} cached, {answer.num_free} free",
        ROW.format("block", "state", "tier", "holders", "age s", "hits", "name", "owners").rstrip(),
    ]
    for block in answer.blocks:
        age = f"{block.age_s:.1f}" if block.HasField("age_s") else "-"
        owners = ", ".join(block.owners) or "-"
        lines.append(
            ROW.format(
                block.block_id,
                block.state,
                block.tier,
                block.num_holders,
                age,
                block.hits,
                block.name.hex() or "-",
                owners,
            )
        )
    return lines
