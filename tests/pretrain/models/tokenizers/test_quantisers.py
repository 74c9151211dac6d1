"""Codebooks: nearest codes, gradients, look-ups, start from meta, precision."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.models.tokenizers.config import QuantisedDCAEConfig, QuantiserConfig
from pretrain.models.tokenizers.dc_ae_config import dc_ae_config
from pretrain.models.tokenizers.quantised_dc_ae import QuantisedDCAE
from pretrain.models.tokenizers.quantisers import FSQ, SimVQ, build_quantiser, code_metrics, count_codes

SIM_VQ = QuantiserConfig(kind="sim_vq", num_codes=40, commitment_weight=0.5, commitment_share=0.25)
GRID = QuantiserConfig(kind="fsq", levels=(5, 4, 3, 3))
BOTH = pytest.mark.parametrize("config", [SIM_VQ, GRID], ids=["sim_vq", "fsq"])


def make(config: QuantiserConfig) -> SimVQ | FSQ:
    torch.manual_seed(0)
    return build_quantiser(config, 8)


def model(config: QuantiserConfig) -> QuantisedDCAE:
    torch.manual_seed(0)
    return QuantisedDCAE(QuantisedDCAEConfig(dc_ae_config("tiny", decoder_norms=("rms",) * 3), config))


@BOTH
def test_a_look_up_gives_what_the_decoder_saw(config: QuantiserConfig) -> None:
    """Defect 6: numbers of codes lead back to projected codes, and to the same picture."""
    bottleneck, encoded = make(config), torch.randn(2, 8, 3, 5)
    latent = bottleneck(encoded, None)
    codes = bottleneck.to_codes(encoded)
    assert codes.dtype == torch.int64
    assert codes.shape == (2, 1 if config.kind == "sim_vq" else 2, 3, 5)
    assert 0 <= codes.min() <= codes.max() < config.codebook_size
    torch.testing.assert_close(bottleneck.from_codes(codes), latent.values)
    tokenizer, images = model(config), torch.randn(2, 3, 13, 18)
    codes = tokenizer.to_codes(images)
    assert codes.shape[2:] == (4, 5)
    torch.testing.assert_close(tokenizer.from_codes(codes, (13, 18)), tokenizer(images).reconstruction)


def test_sim_vq_takes_the_nearest_of_its_projected_codes() -> None:
    bottleneck, encoded = make(SIM_VQ), torch.randn(2, 8, 3, 5, requires_grad=True)
    codebook = bottleneck.codebook.frozen_codebook @ bottleneck.codebook.code_transform.weight.T
    places = encoded.permute(0, 2, 3, 1).reshape(-1, 8)
    numbers = torch.tensor([(codebook - place).square().sum(dim=1).argmin() for place in places]).view(2, 3, 5)
    assert torch.equal(bottleneck.to_codes(encoded)[:, 0], numbers)
    latent = bottleneck(encoded, None)
    chosen = codebook[numbers].permute(0, 3, 1, 2)
    torch.testing.assert_close(latent.values, chosen)
    torch.testing.assert_close(latent.commitment, 0.5 * 1.25 * (encoded - chosen).square().mean())
    weight = torch.randn_like(latent.values)
    (to_encoder,) = torch.autograd.grad((latent.values * weight).sum(), encoded, retain_graph=True)
    torch.testing.assert_close(to_encoder, weight)  # straight through
    latent.commitment.backward()
    torch.testing.assert_close(encoded.grad, 0.5 * 0.25 * 2 * (encoded - chosen).detach() / encoded.numel())
    assert bottleneck.codebook.code_transform.weight.grad.abs().max() > 0
    assert [name for name, _ in bottleneck.named_parameters()] == ["codebook.code_transform.weight"]


def test_fsq_rounds_each_channel_to_its_levels() -> None:
    bottleneck, encoded = make(GRID), (3.0 * torch.randn(4, 8, 6, 6)).requires_grad_()
    latent = bottleneck(encoded, None)
    for channel in range(8):
        levels = GRID.levels[channel % 4]
        assert latent.values[:, channel].mul(1e4).round().unique().numel() == levels
        # The paper's bound: tanh, shifted for even numbers of levels.
        half, offset = (levels - 1) * 1.001 / 2, 0.5 if levels % 2 == 0 else 0.0
        bounded = (encoded[:, channel] + math.atanh(offset / half)).tanh() * half - offset
        torch.testing.assert_close(latent.values[:, channel], bounded.round() / (levels // 2))
    assert latent.commitment is None
    assert latent.values.abs().max() <= 1
    latent.values.sum().backward()
    assert (encoded.grad[encoded.abs() < 3] > 0).all()  # the bound has a slope where the rounding has none
    assert not list(bottleneck.parameters())


def test_every_fsq_code_has_a_number_of_its_own() -> None:
    bottleneck = make(GRID)
    numbers = torch.arange(GRID.codebook_size).view(1, 2, -1, 1)
    values = bottleneck.from_codes(numbers)
    assert len({tuple(v) for v in values[0, :4, :, 0].T.tolist()}) == GRID.codebook_size // 2
    again = bottleneck.grid.codes_to_indices(values.permute(0, 2, 3, 1).unflatten(3, (-1, 4)))
    assert torch.equal(again.permute(0, 3, 1, 2).long(), numbers)


@BOTH
def test_a_start_from_meta_follows_the_seed_alone(config: QuantiserConfig) -> None:
    """By `init_weights`, or by a state dict alone, as sharded models are filled: no buffer is left out of it."""
    expected, encoded = make(config), torch.randn(2, 8, 3, 5)
    with torch.device("meta"):
        other = build_quantiser(config, 8)
    other.to_empty(device="cpu")
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.detach().fill_(7)
    for bottleneck in (expected, other):
        torch.manual_seed(1)
        bottleneck.init_weights()
    with torch.device("meta"):
        loaded = build_quantiser(config, 8)
    loaded.to_empty(device="cpu")
    loaded.load_state_dict(expected.state_dict(), strict=True)
    assert {name for name, _ in loaded.named_buffers()} <= set(loaded.state_dict())
    assert torch.equal(expected(encoded, None).values, loaded(encoded, None).values)
    assert torch.equal(expected.to_codes(encoded), other.to_codes(encoded))
    assert torch.equal(expected(encoded, None).values, other(encoded, None).values)
    state = torch.get_rng_state()
    other.train()(encoded, None)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn in training


@BOTH
def test_codes_are_chosen_in_float32(config: QuantiserConfig) -> None:
    bottleneck, encoded = make(config), torch.randn(8, 8, 8, 8).bfloat16()
    expected = bottleneck.to_codes(encoded.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bottleneck.to_codes(encoded), expected)
        latent = bottleneck(encoded, None)
    assert latent.values.dtype == torch.bfloat16
    assert latent.commitment is None or latent.commitment.dtype == torch.float32
    if isinstance(bottleneck, SimVQ):
        bottleneck.codebook.code_transform.bfloat16()  # as FSDP2 hands weights out
        assert bottleneck(encoded, None).values.dtype == torch.bfloat16


@BOTH
def test_gradients_reach_what_is_trained(config: QuantiserConfig) -> None:
    tokenizer, images = model(config), torch.randn(2, 3, 16, 16)
    output = tokenizer(images)
    loss = (output.reconstruction - images).square().mean()
    (loss if output.commitment is None else loss + output.commitment).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tokenizer.parameters())
    assert output.code_counts.sum() == (32 if config.kind == "sim_vq" else 64)
    tokenizer.zero_grad()
    tokenizer.train_only([r"decoder\.project_out\..*"])
    output = tokenizer(images)
    assert output.commitment is None or not output.commitment.requires_grad
    assert not output.latent.requires_grad
    if config.kind == "sim_vq":
        tokenizer.train_only([r"bottleneck\..*"])
        assert tokenizer.num_frozen_steps == len(tokenizer.encoder.steps())
        tokenizer(images).commitment.backward()
        assert [n for n, p in tokenizer.named_parameters() if p.grad is not None] == [
            "bottleneck.codebook.code_transform.weight"
        ]


def test_usage_and_perplexity() -> None:
    counts = count_codes(torch.tensor([[0, 0], [3, 3]]), 8)
    assert counts.tolist() == [2, 0, 0, 2, 0, 0, 0, 0]
    metrics = code_metrics(counts)
    assert metrics["code_usage"] == 0.25
    assert metrics["code_perplexity"] == pytest.approx(2.0)
    assert code_metrics(torch.tensor([5.0, 0.0]))["code_perplexity"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_codes": 1}, "num_codes is 1"),
        ({"levels": (5, 2)}, r"levels is \[5, 2\]; expected at least 3"),
        ({"kind": "fsq", "levels": (5, 5, 5)}, "has 8 channels and levels has 3 values"),
    ],
)
def test_impossible_codebooks_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantisedDCAEConfig(dc_ae_config("tiny"), QuantiserConfig(**fields))
    with pytest.raises(ValueError, match=r"autoencoder\.gaussian is true"):
        QuantisedDCAEConfig(dc_ae_config("tiny", gaussian=True))
