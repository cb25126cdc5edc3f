"""A full scheduler: refusals before the work, whole requests, and when to come back."""

from __future__ import annotations

from pathlib import Path

import pytest
from gateway_builders import served

from fakes.engine_server import FakeEngine, Reply
from quire.errors import QuireError
from quire.v1 import common_pb2
from quire_gateway.room import VALID_S, Room

FULL = common_pb2.Error(name="queue_full", message="full", retry_after_s=2.25)
BODY = {"prompt": "hello", "max_tokens": 3}


def is_full(room: Room, now: float) -> bool:
    try:
        room.check(now)
    except QuireError as error:
        assert error.name == "queue_full" and error.retry_after_s is not None
        return True
    return False


def test_nothing_is_refused_until_the_scheduler_did() -> None:
    room = Room()
    for _ in range(10_000):
        room.check(1.0)
        room.taken()


def test_a_place_that_is_left_is_given_to_one_request() -> None:
    room = Room()
    room.refused(1.0, 0.5)
    assert is_full(room, 1.0)
    room.freed(1.01)
    assert not is_full(room, 1.01)
    room.taken()
    assert is_full(room, 1.02)


def test_a_refusal_speaks_for_a_moment_only() -> None:
    room = Room()
    room.refused(1.0, 0.5)
    assert is_full(room, 1.0 + VALID_S)
    assert not is_full(room, 1.01 + VALID_S)
    room.refused(5.0, 0.5)
    room.forget()
    assert not is_full(room, 5.0)


def test_waits_follow_the_pace_at_which_places_are_left() -> None:
    room, now = Room(), 0.0
    for _ in range(400):
        now += 0.05
        room.refused(now, 0.05)
        room.freed(now)
    room.refused(now, 0.05)
    waits = []
    for _ in range(20):
        with pytest.raises(QuireError) as caught:
            room.check(now)
        waits.append(caught.value.retry_after_s)
    assert waits == sorted(waits) and 0.7 < (waits[-1] or 0) < 1.3


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_after_a_refusal_others_are_refused_unread(folder: Path, path: str) -> None:
    replies = [Reply(error=FULL, token_ids=())]
    body = BODY | {"messages": [{"role": "user", "content": "hi"}]}
    async with (
        FakeEngine(lambda submit: replies[0]) as engine,
        served(engine, folder) as s,
    ):
        status, answer, headers = await s.post(path, body)
        assert status == 429 and answer["error"]["code"] == "queue_full"
        assert headers["Retry-After"] == "3" and headers["retry-after-ms"] == "2250"
        seen = len(engine.submits)
        for _ in range(20):
            status, answer, headers = await s.post(path, body)
            assert status == 429 and answer["error"]["type"] == "rate_limit_error"
            assert int(headers["Retry-After"]) * 1000 >= int(headers["retry-after-ms"]) > 0
            s.gateway.engine.room._known_until += 1.0  # however slow this machine is
        assert len(engine.submits) == seen
        page = (await s.get("/metrics"))[1]
        assert 'quire_requests_refused_early_total{service="gateway"} 20.0' in page
        s.gateway.engine.room._known_until = 0.0
        replies[0] = Reply()
        status, _, _ = await s.post(path, body)  # asked again, and there is room
        assert status == 200 and s.gateway.active == 0


async def test_a_request_refused_in_part_is_refused_whole(folder: Path) -> None:
    def script(submit):
        last = submit.num_more == 0
        return Reply(error=FULL, token_ids=(), first_delay=0.05) if last else Reply(hang=True)

    async with FakeEngine(script) as engine, served(engine, folder) as s:
        status, _, _ = await s.post("/v1/completions", {"prompt": ["a", "b"], "n": 2})
        assert status == 429
        assert [submit.num_more for submit in engine.submits] == [3, 2, 1, 0]
        await engine.wait(lambda: len(engine.cancels) == 3)
        assert s.gateway.engine.num_open == 0
        s.gateway.engine.room.check(0.0)  # there may be room for one
