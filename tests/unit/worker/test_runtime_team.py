"""How many threads a step gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from quire_worker.team import Team


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def machine(alone: float, together: float) -> Callable[[int], float]:
    """Seconds of a step per token: on one thread, and on more."""
    return lambda size: size * (alone if torch.get_num_threads() == 1 else together)


@pytest.mark.parametrize(
    ("alone", "together", "serial_tokens"),
    [
        (1e-5, 1e-5, 128),  # a team gains nothing: one thread for every small step
        (1e-5, 5e-6, 0),  # it halves the time
        (1e-3, 1e-3, 8),  # a long step gets the team anyway
        (1e-1, 1e-1, 0),
    ],
)
def test_small_steps_run_on_one_thread_where_a_team_gains_little(
    alone: float, together: float, serial_tokens: int
) -> None:
    team = Team(2)
    team.calibrate(machine(alone, together), largest=512)
    assert team.serial_tokens == serial_tokens
    team.gather(serial_tokens + 1)
    assert torch.get_num_threads() == 2
    if serial_tokens:
        team.gather(serial_tokens)
        assert torch.get_num_threads() == 1


def test_a_single_thread_is_never_measured() -> None:
    Team(1).calibrate(lambda size: pytest.fail("measured"), largest=512)
