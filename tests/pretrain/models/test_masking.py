"""Mask noise and random masking, against Python integers and against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.models.mask_sizes import num_kept
from pretrain.models.masking import position_noise, random_masking


def splitmix_finaliser(bits: int) -> int:
    bits %= 2**64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return bits ^ (bits >> 31)


def literal_noise(position: int, token: int, seed: int) -> float:
    golden = 0x9E3779B97F4A7C15
    sample_key = splitmix_finaliser(position * golden + splitmix_finaliser(seed))
    return (splitmix_finaliser(sample_key + (token + 1) * golden) >> 40) / 2**24


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=4), st.integers(-(2**70), 2**70))
def test_noise_is_the_hash_of_seed_position_and_token(positions: list[int], seed: int) -> None:
    noise = position_noise(torch.tensor(positions), 7, seed)
    assert noise.dtype == torch.float32
    assert noise.tolist() == [[literal_noise(p, token, seed) for token in range(7)] for p in positions]


def test_noise_is_pinned() -> None:
    # Masks of a resumed run must be those of the interrupted one, also across releases.
    noise = position_noise(torch.tensor([0, 123456789012]), 2, seed=7)
    assert (noise * 2**24).long().tolist() == [[11840778, 7328348], [10918857, 8421186]]


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    positions = torch.randint(2**40, (64,), generator=torch.Generator().manual_seed(0))
    together = position_noise(positions, 49, seed=3)
    alone = torch.cat([position_noise(position[None], 49, seed=3) for position in positions])
    assert torch.equal(together, alone)
    assert torch.equal(position_noise(positions.flip(0), 49, seed=3), together.flip(0))


def test_noise_is_uniform_and_uncorrelated() -> None:
    noise = position_noise(torch.arange(4000), 64, seed=0).double()
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.002  # standard error 0.0006
    assert abs(noise.var() - 1 / 12) < 0.001
    assert (noise.mean(0) - 0.5).abs().max() < 0.025  # standard error 0.0046 per token
    between_tokens = torch.corrcoef(noise.T).fill_diagonal_(0)
    assert between_tokens.abs().max() < 0.08  # standard error 0.016
    other_seed = position_noise(torch.arange(4000), 1, seed=1).double()
    assert abs(torch.corrcoef(torch.stack((noise[:, 0], other_seed[:, 0])))[0, 1]) < 0.08
    neighbours = torch.corrcoef(torch.stack((noise[1:].flatten(), noise[:-1].flatten())))
    assert abs(neighbours[0, 1]) < 0.01  # standard error 0.002


def test_each_token_is_hidden_equally_often() -> None:
    hidden = random_masking(position_noise(torch.arange(8000), 16, seed=5), 0.75).mask.float().mean(0)
    assert (hidden - 0.75).abs().max() < 0.025  # standard error 0.0048


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5, 0.75, 0.9])
def test_masking_equals_a_loop_over_samples(mask_ratio: float) -> None:
    noise = torch.rand(5, 21, generator=torch.Generator().manual_seed(0))
    noise[0, 3] = noise[0, 8] = noise[0, 11]  # ties keep their order
    keep_ids, restore_ids, mask = random_masking(noise, mask_ratio)
    kept = int(21 * (1 - mask_ratio))
    for sample in range(5):
        order = sorted(range(21), key=lambda token: noise[sample, token].item())
        assert keep_ids[sample].tolist() == order[:kept]
        assert [order[rank] for rank in restore_ids[sample].tolist()] == list(range(21))
        assert mask[sample].tolist() == [token not in order[:kept] for token in range(21)]
    assert mask.dtype == torch.bool


def test_kept_counts_are_those_of_the_paper() -> None:
    assert num_kept(196, 0.75) == 49
    assert num_kept(256, 0.75) == 64
    assert num_kept(196, 0.0) == 196


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "message"),
    [(4, 0.9, "leaves .* 0 tokens"), (16, 1.0, "in \\[0, 1\\)"), (16, -0.1, "in \\[0, 1\\)")],
)
def test_ratios_that_leave_nothing_are_refused(num_tokens: int, ratio: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_masking(torch.rand(1, num_tokens), ratio)


def test_noise_of_low_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="cast_forward_inputs"):
        random_masking(torch.rand(2, 16).bfloat16(), 0.75)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_and_masks_are_the_same_bits_on_a_gpu() -> None:
    positions = torch.randint(2**40, (64,), generator=torch.Generator().manual_seed(0))
    noise = position_noise(positions, 196, seed=3)
    assert torch.equal(position_noise(positions.cuda(), 196, seed=3).cpu(), noise)
    for here, there in zip(random_masking(noise, 0.75), random_masking(noise.cuda(), 0.75), strict=True):
        assert torch.equal(here, there.cpu())
