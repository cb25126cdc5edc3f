"""Tokens per second, and the line about them."""

from __future__ import annotations

import logging

import pytest

from quire.config import EngineConfig
from quire.link import QueueLink
from quire_scheduler.engine import Engine
from quire_scheduler.throughput import WINDOW, Throughput


def test_rates_are_over_the_last_ten_seconds_and_end_with_the_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    engine = Engine(EngineConfig(), QueueLink())
    throughput = Throughput(engine)
    for second in range(2 * WINDOW):
        throughput.tick(float(second))
        engine.counters.output_tokens += 50
        engine.counters.prompt_tokens += 7
    assert (throughput.prompt, throughput.output) == (7.0, 50.0)
    assert "output 50.0 tokens/s" in caplog.text and "prompt 7.0" in caplog.text
    caplog.clear()
    for second in range(2 * WINDOW, 4 * WINDOW + 1):
        throughput.tick(float(second))
    assert (throughput.prompt, throughput.output) == (0.0, 0.0)
    assert caplog.text.count("tokens/s, running") <= 1  # silent while nothing happens
