"""Short forms of benchmarks/chaos.py: services stand still, clients leave, requests come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Chaos = Callable[..., dict[str, Any]]


def test_a_stopped_service_is_noticed_and_replaced(chaos: Chaos) -> None:
    found = chaos("freeze", "--seconds", "4", "--services", "worker", "scheduler")
    assert "rank 0" in found["worker"]["health"]
    assert found["worker"]["restarts"] == found["scheduler"]["restarts"] == 1


def test_a_stopped_worker_that_wakes_is_taken_back_by_a_new_epoch(chaos: Chaos) -> None:
    found = chaos("freeze", "--apart", "--seconds", "5", "--services", "worker")
    assert found["worker"]["restarts"] == 0
    assert "rank 0" in found["worker"]["health"]


def test_a_long_step_is_healthy(chaos: Chaos) -> None:
    found = chaos("slow", "--seconds", "6")  # longer than any limit on silence
    assert found["unhealthy"] == 0 and found["looked"] > 20


def test_clients_that_leave_leave_nothing_behind(chaos: Chaos) -> None:
    found = chaos("cancel", "--requests", "80")
    assert found["left"] > 40


def test_memory_descriptors_and_blocks_stay_flat(chaos: Chaos) -> None:
    chaos("flat", "--requests", "300")
