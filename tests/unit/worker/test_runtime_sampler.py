"""Sampling: the rule of position-keyed noise, each parameter, rows that don't see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runtime_fakes import EOS, VOCAB, i32

from quire.sampling import SamplingParams
from quire.v1 import step_pb2 as pb
from quire_kernels.sampling import gumbel_noise
from quire_worker import sampler
from quire_worker.columns import Limits
from quire_worker.slots import SlotTable

LIMITS = Limits(max_slots=32, num_blocks=64, block_size=4, max_model_len=64, vocab_size=VOCAB)


def table_of(*requests, eos=(EOS,)) -> SlotTable:
    """requests: (params, prompt, output), one a slot."""
    table = SlotTable(LIMITS, torch.device("cpu"), eos)
    for slot, (params, prompt, output) in enumerate(requests):
        error = table.admit(
            pb.Admit(
                slot=slot, prompt_token_ids=i32(*prompt), output_token_ids=i32(*output),
                sampling_params=params.seeded().to_proto(),
            )
        )  # fmt: skip
        assert error is None, error
    return table


def draw(table, logits, slots=None, logprobs=False):
    slots = np.arange(len(logits), dtype=np.int32) if slots is None else np.array(slots, np.int32)
    wants = np.full(len(slots), logprobs)
    return sampler.sample(torch.as_tensor(logits).clone(), table, slots, wants)


def random_logits(n=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, VOCAB, generator=generator) * 3


def params(**fields):
    return SamplingParams(**{"temperature": 0, "seed": 11, **fields})


def one(fields, prompt=(1, 2), output=(), logits=None, **options):
    """The token of one row."""
    logits = random_logits() if logits is None else logits
    return draw(table_of((params(**fields), prompt, output), **options), logits).tokens[0]


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.zeros(1, VOCAB)
    logits[0, [40, 7, 90]] = 5
    assert one({}, logits=logits) == 7


@pytest.mark.parametrize("temperature", [0.25, 1.0, 1.7])
def test_a_token_is_the_argmax_of_logit_and_noise_keyed_by_seed_and_position(temperature):
    for position in range(2, 30):
        logits = random_logits(seed=position)
        for seed in (0, 5, (1 << 64) - 1):
            noise = gumbel_noise(
                torch.tensor([np.uint64(seed).astype(np.int64)]), torch.tensor([position]), VOCAB
            )
            expected = int((logits / temperature + noise).argmax())
            output = [4] * (position - 1)
            fields = {"temperature": temperature, "seed": seed}
            assert one(fields, prompt=[9], output=output, logits=logits) == expected


def test_a_small_vocabulary_s_shortcut_draws_the_same_tokens(monkeypatch):
    requests = [(params(seed=i, temperature=0.5 + i / 9, top_k=i), [1], []) for i in range(12)]
    logits = random_logits(12)
    table = table_of(*requests)
    short = draw(table, logits).tokens
    monkeypatch.setattr(sampler, "DENSE_VOCAB", 0)
    assert draw(table, logits).tokens.tolist() == short.tolist()


def test_the_place_in_the_sequence_counts_not_where_the_prompt_ended():
    fields = {"temperature": 1.0}
    logits = random_logits()
    assert one(fields, prompt=[1, 2, 3, 4], logits=logits) == one(
        fields, prompt=[1], output=[2, 3, 4], logits=logits
    )


MIXED = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.4, "presence_penalty": 0.3},
    {"temperature": 1.0, "frequency_penalty": -0.7},
    {"logit_bias": ((3, 4.0), (5, -100.0))},
    {"temperature": 1.0, "allowed_token_ids": (1, 50, 60)},
    {"min_tokens": 9, "stop_token_ids": (12,)},
    {"temperature": 1.9, "repetition_penalty": 0.8, "logit_bias": ((8, 1.5),)},
    {"temperature": 1.0, "min_tokens": 2},
    {"top_k": 1},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 2.0, "top_p": 0.01},
)


def test_a_row_has_the_same_token_and_logprob_bits_alone_and_in_a_batch():
    requests = [
        (params(seed=100 + i, logprobs=i % 7, **fields), [1, 2, 3 + i], [5] * i)
        for i, fields in enumerate(MIXED)
    ]
    for round_ in range(5):
        logits = random_logits(len(requests), seed=round_)
        table = table_of(*requests)
        together = draw(table, logits, logprobs=True)
        assert not together.errors
        for i in range(len(requests)):
            alone = draw(table, logits[i : i + 1], slots=[i], logprobs=True)
            assert alone.tokens[0] == together.tokens[i], MIXED[i]
            for name in ("sampled", "ranks", "top_ids", "top", "num_top"):
                mine = getattr(alone.logprobs, name)[0]
                theirs = getattr(together.logprobs, name)[i]
                assert mine.tobytes() == theirs.tobytes()


def test_rows_without_a_feature_keep_the_fast_path_s_token():
    logits = random_logits(3)
    plain = draw(table_of(*[(params(), [1], [])] * 3), logits).tokens
    mixed = table_of((params(), [1], []), (params(temperature=1.0), [1], []), (params(), [1], []))
    assert draw(mixed, logits).tokens[[0, 2]].tolist() == plain[[0, 2]].tolist()


# -- each parameter ---------------------------------------------------------------------------
def test_top_k_top_p_and_min_p_keep_to_the_most_likely():
    logits = torch.full((1, VOCAB), -4.0)
    logits[0, [10, 20, 30]] = torch.tensor([5.0, 4.5, 3.0])
    for fields, kept in (
        ({"top_k": 2}, {10, 20}),
        ({"top_p": 0.5}, {10}),
        ({"top_p": 0.9}, {10, 20}),
        ({"min_p": 0.5}, {10, 20}),
        ({"min_p": 0.1, "top_k": 2}, {10, 20}),
        ({"top_k": 3}, {10, 20, 30}),
    ):
        seen = {
            int(one({"temperature": 1.0, "seed": s, **fields}, logits=logits)) for s in range(80)
        }
        assert seen == kept, fields


def test_logit_bias_adds_to_logits():
    logits = torch.zeros(1, VOCAB)
    assert one({"logit_bias": ((30, 2.0),)}, logits=logits) == 30
    assert one({"logit_bias": ((0, -1.0), (30, 2.0), (31, 1.0), (31, 1.5))}, logits=logits) == 31


def test_only_allowed_tokens_are_sampled():
    allowed = (90, 4, 17)
    for seed in range(20):
        fields = {"temperature": 2.0, "seed": seed, "allowed_token_ids": allowed}
        assert one(fields, logits=random_logits(seed=seed)) in allowed


def test_penalties_count_from_the_prompt_s_end():
    logits = torch.zeros(1, VOCAB)
    logits[0, [3, 5, 8]] = torch.tensor([2.0, 1.8, 1.6])
    assert one({"presence_penalty": 1.0}, prompt=[3], logits=logits) == 3
    assert one({"presence_penalty": 1.0}, prompt=[1], output=[3], logits=logits) == 5
    assert one({"frequency_penalty": 0.15}, prompt=[1], output=[3], logits=logits) == 3
    assert one({"frequency_penalty": 0.15}, prompt=[1], output=[3, 3], logits=logits) == 5
    assert one({"repetition_penalty": 2.0}, prompt=[3], output=[5], logits=logits) == 8


def test_penalties_follow_the_tokens_of_a_running_slot():
    table = table_of((params(frequency_penalty=1.0), [1], []))
    logits = torch.zeros(1, VOCAB)
    logits[0, [3, 5]] = torch.tensor([2.0, 1.5])
    seen = []
    for _ in range(4):
        token = draw(table, logits).tokens
        seen.append(int(token[0]))
        row = np.zeros(1, np.int32)
        table.commit(row, row, row, token)
    assert seen == [3, 5, 3, 5]


def test_stop_tokens_are_masked_until_min_tokens():
    logits = torch.zeros(1, VOCAB)
    logits[0, [EOS, 40, 7]] = torch.tensor([9.0, 8.0, 7.0])
    fields = {"min_tokens": 2, "stop_token_ids": (40,)}
    assert one(fields, output=[1], logits=logits) == 7
    assert one(fields, output=[1, 1], logits=logits) == EOS
    assert one({**fields, "ignore_eos": True}, output=[1], logits=logits) == EOS


@pytest.mark.parametrize(
    ("fields", "token", "stops"),
    [
        ({}, EOS, True),
        ({"ignore_eos": True}, EOS, False),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, EOS, True),
        ({"stop_token_ids": (4, 6)}, 6, True),
        ({"stop_token_ids": (4, 6)}, 5, False),
    ],
)
def test_eos_and_stop_ids_finish_a_row(fields, token, stops):
    table = table_of((params(), [1], []), (params(**fields), [1], []))
    rows = np.array([0, 1], np.int32)
    stopped = table.commit(rows, np.ones(2, np.int32), rows, np.array([5, token], np.int32))
    assert stopped.tolist() == [False, stops]
    assert table.finished[:2].tolist() == [False, stops]


# -- log-probabilities ------------------------------------------------------------------------
def test_logprobs_are_of_the_logits_as_the_model_gave_them():
    fields = {"temperature": 0.3, "top_k": 3, "logit_bias": ((9, 50.0),), "logprobs": 4}
    logits = random_logits()
    out = draw(table_of((params(**fields), [1], [])), logits, logprobs=True)
    expected = logits.log_softmax(-1)[0]
    assert out.tokens[0] == 9
    assert out.logprobs.sampled[0] == expected[9]
    assert out.logprobs.ranks[0] == 1 + int((expected > expected[9]).sum())
    values, ids = expected.sort(descending=True)
    assert out.logprobs.num_top[0] == 4
    assert out.logprobs.top_ids[0].tolist() == ids[: sampler.MAX_LOGPROBS].tolist()
    assert out.logprobs.top[0].tolist() == values[: sampler.MAX_LOGPROBS].tolist()


# -- rows that fail alone ---------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"temperature": 0.5}]
)
def test_a_broken_logit_fails_its_row_alone(value, fields):
    table = table_of(*[(params(seed=i, **fields), [1], []) for i in range(3)])
    logits = random_logits(3)
    good = draw(table, logits).tokens
    broken = logits.clone()
    broken[1, 50] = value
    out = draw(table, broken)
    assert list(out.errors) == [1] and out.errors[1].name == "numeric_error"
    assert out.tokens[[0, 2]].tolist() == good[[0, 2]].tolist()


def test_a_row_with_every_token_forbidden_is_told_why():
    table = table_of((params(allowed_token_ids=(EOS,), min_tokens=3), [1], []))
    out = draw(table, random_logits())
    assert out.errors[0].name == "invalid_request" and "allowed_token_ids" in out.errors[0].message
