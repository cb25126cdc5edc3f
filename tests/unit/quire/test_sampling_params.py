"""SamplingParams: bounds, seeds, and the wire."""

from __future__ import annotations

import pytest

from quire.errors import InvalidRequest
from quire.sampling import SEED_MASK, SamplingParams, derive_seed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", float("nan")),
        ("temperature", "hot"), ("temperature", True), ("temperature", None), ("top_p", 0.0),
        ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0.0), ("presence_penalty", 2.5), ("frequency_penalty", -3),
        ("n", 0), ("n", 17), ("max_tokens", 0), ("max_tokens", 1 << 40), ("min_tokens", -1),
        ("logprobs", 21), ("prompt_logprobs", -1), ("seed", 1 << 64), ("seed", "x"),
        ("stop", ["x"] * 17), ("stop", [""]), ("stop", ["x" * 257]), ("stop", [1]),
        ("stop_token_ids", [-1]), ("stop_token_ids", [1 << 31]), ("stop_token_ids", [0] * 65),
        ("logit_bias", [(5, 101.0)]), ("logit_bias", [(-1, 0.0)]),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value}).check()  # type: ignore[arg-type]
    assert caught.value.param == field
    assert field in caught.value.message


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4).check()


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    SamplingParams(stop_token_ids=[99]).check(vocab_size=100)
    with pytest.raises(InvalidRequest, match="between 0 and 99"):
        SamplingParams(stop_token_ids=[100]).check(vocab_size=100)


def test_huge_numbers_are_answered_in_short() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(max_tokens=10**6000).check()
    assert len(caught.value.message) < 200


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").check().stop == ("END",)


def test_seeds_of_choices_differ_and_repeat() -> None:
    seeds = [derive_seed(7, i) for i in range(16)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 16
    assert all(0 <= s <= SEED_MASK for s in seeds)
    assert seeds == [derive_seed(7, i) for i in range(16)]


def test_seeded_draws_once_and_keeps_a_given_seed() -> None:
    drawn = SamplingParams().seeded()
    assert drawn.seed is not None and drawn.seeded() == drawn
    assert SamplingParams(seed=-1).seeded().seed == SEED_MASK
    assert SamplingParams().seeded().seed != SamplingParams().seeded().seed
    with pytest.raises(ValueError, match="seeded"):
        SamplingParams().choice(1)


def test_the_wire_keeps_every_field_it_has() -> None:
    params = SamplingParams(
        temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, repetition_penalty=1.5,
        presence_penalty=-1.0, frequency_penalty=0.5, max_tokens=9, min_tokens=3,
        stop_token_ids=(1, 2), ignore_eos=True, seed=SEED_MASK, logprobs=4, prompt_logprobs=0,
        logit_bias=((3, -1.5),), allowed_token_ids=(3, 4),
    ).check()  # fmt: skip
    assert SamplingParams.from_proto(params.to_proto()) == params


def test_unset_fields_on_the_wire_are_the_defaults() -> None:
    from quire.v1 import common_pb2 as pb

    found = SamplingParams.from_proto(pb.SamplingParams())
    assert found == SamplingParams(max_tokens=None)
    greedy = pb.SamplingParams(temperature=0.0)
    assert SamplingParams.from_proto(greedy).temperature == 0.0
