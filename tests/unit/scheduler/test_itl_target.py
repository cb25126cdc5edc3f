"""--itl-target-ms: prompts get what the target leaves beside the rows that decode."""

from __future__ import annotations

import numpy as np
import pytest
from sched_helpers import Rig

from fakes.worker import Options
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire_scheduler.shares import hand_out

COSTS = [(1, 1, 1_050), (512, 512, 26_600), (1, 2048, 1_050), (16, 2048, 1_800)]  # 1 ms + 50 us


def rig(**config: object) -> Rig:
    options = Options(step_costs=COSTS, max_model_len=4096, num_blocks=2048)
    made = Rig(options, max_num_batched_tokens=2048, **config)
    # the simulated worker takes no time: the table is to hold
    made.engine._driver.pacer.cost.observe = lambda *_: None  # type: ignore[method-assign]
    return made


def largest_prompt_share(rig: Rig, decoding: int) -> int:
    """Most prompt tokens of a plan while `decoding` streams decode and a long prompt arrives."""
    for n in range(decoding):
        rig.submit([5 + n], max_tokens=200)
    for _ in range(4):
        rig.turn()
    rig.submit([3 + n % 900 for n in range(2000)], max_tokens=4)
    shares = [0]
    while rig.client[decoding].first_index is None:
        rig.turn()
        plans = rig.engine._driver.state.in_flight
        shares += [int(plan.num_tokens[plan.num_tokens > 1].sum()) for plan in plans]
    rig.run()
    return max(shares)


def test_a_long_prompt_is_cut_to_the_target():
    share = largest_prompt_share(rig(itl_target_ms=11), 4)
    assert share == 140  # (0.8 * 11 ms - 1 ms) / 50 us, and with four rows a multiple of 16


def test_without_a_target_the_budget_holds():
    assert largest_prompt_share(rig(), 4) == 2000


def test_with_nobody_decoding_there_is_no_pace_to_keep():
    assert largest_prompt_share(rig(itl_target_ms=11), 0) == 2000


def test_a_target_below_the_decode_step_still_lets_prompts_on():
    assert largest_prompt_share(rig(itl_target_ms=0.5), 4) == 16


def test_decoding_rows_are_not_cut_by_the_prompts_part():
    wanted = np.array([1] * 8 + [500], np.int32)
    nums, shares = hand_out(wanted, np.zeros(9, np.int64), [300], 2048, 40)
    assert nums[:8].tolist() == [1] * 8
    assert nums[8] == 20 and shares == [20]


def test_whole_prompts_and_a_target_exclude_each_other():
    with pytest.raises(ConfigError, match="--itl-target-ms.*--enable-chunked-prefill"):
        EngineConfig(itl_target_ms=20.0, enable_chunked_prefill=False).check()
