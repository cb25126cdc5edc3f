"""Position-keyed sampling: Philox against Random123's answers, the shortcuts against the
definition, rows alone and together.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire_kernels import sampling

# Random123, tests/kat_vectors: philox4x32 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


def batch(n: int, vocab: int, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(n, vocab, generator=generator) * scale
    seeds = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
    return logits, seeds, torch.arange(n) * 7 + 3, torch.ones(n)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    assert (sampling.philox4x32_numpy(words(counter), words(key)) == words(answer)).all()
    tensors = (
        [torch.tensor([int(x)]) for x in words(counter)],
        [torch.tensor([int(x)]) for x in words(key)],
    )
    assert [int(x) for x in sampling.philox4x32(*tensors)] == words(answer).tolist()


def test_noise_is_the_named_philox_word() -> None:
    seed, position, token, stream = -2 & (2**64 - 1), 1234, 4099, 5
    counter = np.array([position, token // 4, stream, 0], dtype=np.uint32)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32)
    bits = int(sampling.philox4x32_numpy(counter, key)[token % 4])
    u = ((bits >> 8) + 0.5) * 2.0**-24
    expected = np.float32(-np.log(-np.log(u)))
    got = sampling.gumbel_noise_at(
        torch.tensor([-2]), torch.tensor([position]), torch.tensor([[token]]), stream=stream
    )
    assert got.item() == pytest.approx(float(expected), rel=1e-7)


def test_the_extreme_bits_give_finite_noise() -> None:
    bits = torch.tensor([0, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000])
    noise = sampling.bits_to_gumbel(bits)
    assert torch.isfinite(noise).all()
    assert noise[1] == noise.max() == pytest.approx(17.32868, abs=1e-5)
    assert noise.max() < sampling.MAX_NOISE
    assert noise[2] < noise[3]


def test_noise_at_tokens_equals_noise_of_the_row() -> None:
    _, seeds, positions, _ = batch(3, 1)
    whole = sampling.gumbel_noise(seeds, positions, 1003)
    ids = torch.tensor([[0, 1, 2, 3, 1002]]).expand(3, -1)
    assert torch.equal(
        sampling.gumbel_noise_at(seeds[:, None], positions[:, None], ids), whole.gather(1, ids)
    )


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 30.0, 1e7])
def test_sample_equals_its_definition(scale: float) -> None:
    """Noise only where a token can still win is the argmax over noise everywhere, ties and all."""
    logits, seeds, positions, temperatures = batch(6, 5003, scale)
    logits[2, 1000:] = float("-inf")
    noise = sampling.gumbel_noise(seeds, positions, 5003)
    got = sampling.sample(logits, seeds, positions, temperatures)
    assert torch.equal(got, (logits + noise).argmax(dim=-1))


def test_greedy_rows_add_no_noise_and_take_the_lowest_of_equals() -> None:
    logits, seeds, positions, temperatures = batch(2, 50)
    logits[0, [30, 41]] = 100.0
    temperatures[0] = 0
    assert sampling.sample(logits, seeds, positions, temperatures)[0] == 30
    temperatures[1] = 0
    assert torch.equal(sampling.sample(logits, seeds, positions, temperatures), logits.argmax(-1))


def test_a_row_draws_the_same_token_alone_and_in_any_batch() -> None:
    logits, seeds, positions, temperatures = batch(9, 40_000, 1.0)
    logits[4, 10:] = float("-inf")
    together = sampling.sample(logits, seeds, positions, temperatures)
    for i in range(9):
        row = slice(i, i + 1)
        alone = sampling.sample(logits[row], seeds[row], positions[row], temperatures[row])
        assert alone == together[i]


def test_rows_without_a_finite_logit_give_a_valid_id() -> None:
    logits, seeds, positions, temperatures = batch(3, 20)
    logits[0] = float("-inf")
    logits[1, 4] = float("nan")
    logits[2, [6, 9]] = float("inf")
    assert sampling.sample(logits, seeds, positions, temperatures).tolist() == [0, 4, 6]


def test_sampling_follows_the_distribution() -> None:
    """20,000 draws from four tokens: within five standard deviations of softmax."""
    n = 20_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(n, -1)
    drawn = sampling.sample(logits, torch.full((n,), 42), torch.arange(n), torch.ones(n))
    probs = logits[0].softmax(-1)
    counts = torch.bincount(drawn, minlength=4)
    assert ((counts - n * probs).abs() < 5 * (n * probs * (1 - probs)).sqrt()).all()


@pytest.mark.usefixtures("interpreter")
def test_triton_noise_equals_reference() -> None:
    from unit.kernels.noise_kernel import triton_noise

    bits = torch.randint(0, 2**32, (1024,), generator=torch.Generator().manual_seed(0))
    bits[:5] = torch.tensor([0, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFE00])
    torch.testing.assert_close(
        triton_noise(bits), sampling.bits_to_gumbel(bits), atol=2e-6, rtol=1e-6
    )


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("vocab", [37, 4096, 9001])
def test_triton_sample_equals_reference(vocab: int) -> None:
    from quire_kernels.gpu.sampling import sample

    logits, seeds, positions, temperatures = batch(4, vocab)
    temperatures[1] = 0
    logits[2, : vocab // 2] = float("-inf")
    logits[3] = -3.0  # only the noise decides
    for stream in (0, 1):
        got = sample(logits, seeds, positions.int(), temperatures, stream=stream)
        assert torch.equal(
            got, sampling.sample(logits, seeds, positions, temperatures, stream=stream)
        )


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:All-NaN")  # numpy's, below the interpreter
def test_triton_sample_breaks_ties_low_and_stays_in_range() -> None:
    from quire_kernels.gpu.sampling import sample

    logits, seeds, positions, temperatures = batch(2, 5000)
    logits[0, [4999, 17, 4500]] = 50.0
    logits[1] = float("nan")
    got = sample(logits, seeds, positions, temperatures * 0)
    assert got[0] == 17
    assert 0 <= got[1] < 5000
