"""Faults on purpose: inert without the variable, and only for the request that is meant."""

from __future__ import annotations

import time

import pytest
from runtime_fakes import Planner, make_runner, reference_greedy

from quire.errors import ConfigError
from quire.v1 import step_pb2 as pb
from quire_worker import faults


def run(spec: str, prompt: list[int]) -> pb.StepResult:
    runner = make_runner()
    runner.fault = faults.from_environ({faults.VARIABLE: spec})
    planner = Planner(runner)
    plan = planner.plan({0: len(prompt)}, admit=[planner.admit(0, prompt)])
    return runner.execute(plan)


def test_nothing_is_set_without_the_variable() -> None:
    assert faults.from_environ({}) is None and faults.from_environ({faults.VARIABLE: ""}) is None


@pytest.mark.parametrize("prompt", [[5, 6, 7], [1, 5, 6, 7, 2]])
def test_a_step_fails_for_the_prompt_that_holds_the_tokens(prompt: list[int]) -> None:
    result = run("fail:5,6,7", prompt)
    assert result.status == pb.STEP_STATUS_FAILED and faults.VARIABLE in result.error


@pytest.mark.parametrize("prompt", [[5, 6], [7, 6, 5], [5, 6, 8, 7]])
def test_other_prompts_are_left_alone(prompt: list[int]) -> None:
    result = run("fail:5,6,7", prompt)
    assert result.status == pb.STEP_STATUS_OK
    assert list(memoryview(result.token_ids).cast("i"))[:1] == reference_greedy(prompt, 1)


def test_slow_takes_longer_while_it_prefills_and_faults_go_together() -> None:
    begin = time.monotonic()
    assert run("fail:9,9;slow=0.2:5,6", [5, 6, 7]).status == pb.STEP_STATUS_OK
    assert time.monotonic() - begin >= 0.2
    assert run("slow=0:5;fail:9,9", [9, 9]).status == pb.STEP_STATUS_FAILED


@pytest.mark.parametrize("spec", ["burn:1", "fail", "fail:x", "slow=1e9:1", "slow=x:1", "kill:2e9"])
def test_nonsense_is_a_configuration_error(spec: str) -> None:
    with pytest.raises(ConfigError, match=faults.VARIABLE):
        faults.from_environ({faults.VARIABLE: spec})
