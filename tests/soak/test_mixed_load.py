"""Minutes of mixed traffic: everything is answered, memory stays flat, blocks come back."""

from __future__ import annotations

import asyncio
import os
import random
import time

import openai
import pytest

from flow.conftest import Server
from flow.processes import descendants, until
from flow.test_serving import load

pytest_plugins = ["flow.conftest"]
MINUTES = float(os.environ.get("SOAK_MINUTES", "10"))


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def one(client: openai.AsyncOpenAI, rng: random.Random) -> None:
    """A whole answer, a stream, a stream that is left early, or a bad request."""
    kind = rng.random()
    request = {
        "model": "demo", "prompt": [rng.randrange(500) for _ in range(rng.randrange(1, 300))],
        "max_tokens": rng.randrange(1, 80), "temperature": rng.choice([0, 0.7, 1.0]),
    }  # fmt: skip
    if kind < 0.1:
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(**{**request, "temperature": -1})
    elif kind < 0.5:
        answer = await client.completions.create(**request)
        assert answer.choices[0].finish_reason in ("stop", "length")
    else:
        stream = await client.completions.create(**request, stream=True)
        left = rng.randrange(1, 200)
        async for _ in stream:
            left -= 1
            if not left:
                await stream.close()
                break


@pytest.mark.soak
@pytest.mark.timeout(MINUTES * 60 + 300)
async def test_memory_stays_flat(server: Server) -> None:
    stop = time.monotonic() + MINUTES * 60
    warm = time.monotonic() + MINUTES * 60 * 0.3
    before: dict[int, int] = {}

    async def client_loop(seed: int) -> int:
        rng, count = random.Random(seed), 0
        while time.monotonic() < stop:
            await one(client, rng)
            count += 1
            if not before and time.monotonic() > warm:
                before.update({p: resident_bytes(p) for p in descendants(server.process.pid)})
        return count

    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=120
    ) as client:
        counts = await asyncio.gather(*(client_loop(seed) for seed in range(16)))
    print(f"{sum(counts)} requests in {MINUTES} minutes")
    until(lambda: not load(server).num_blocks_used, 15, "all blocks returned")
    for pid, start in before.items():
        grown = resident_bytes(pid) - start
        assert grown < max(0.1 * start, 40 << 20), f"process {pid} grew by {grown >> 20} MiB"
