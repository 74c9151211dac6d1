"""What holds for every autoencoder, shown for LiteVAE and ViTok (DC-AE's tests have it too): sizes, gradients, cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.tokenizers.autoencoder import Autoencoder
from pretrain.models.tokenizers.autoencoder_flops import training_flops
from pretrain.models.tokenizers.config import LiteVAEConfig, ViTAutoencoderConfig
from pretrain.models.tokenizers.lite_vae import LiteVAE
from pretrain.models.tokenizers.vit_autoencoder import ViTAutoencoder
from tests.pretrain.models.tokenizers.test_lite_vae import TINY as TINY_LITE_VAE
from tests.pretrain.models.tokenizers.test_vit_autoencoder import TINY as TINY_VITOK


@dataclass(frozen=True)
class Case:
    """A tiny autoencoder."""

    model: type[Any]
    config: type[Any]
    fields: dict[str, Any]
    """Of the configuration."""
    num_blocks: int
    """Blocks of both halves."""

    def make(self, **changes: object) -> Autoencoder:
        torch.manual_seed(0)
        model: Autoencoder = self.model(self.config(**{**self.fields, **changes}))
        model.init_weights()
        return model


CASES = {
    # Levels, joined, decoder: 3 and 2 between its stages.
    "lite_vae": Case(LiteVAE, LiteVAEConfig, TINY_LITE_VAE, num_blocks=3 + 1 + 5),
    "vitok": Case(ViTAutoencoder, ViTAutoencoderConfig, TINY_VITOK, num_blocks=1 + 2),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (24, 16), (13, 30)])
def test_any_size_and_number_of_channels(case: Case, channels: int, size: tuple[int, int]) -> None:
    model, images = case.make(in_channels=channels), torch.randn(2, channels, *size)
    output = model(images)
    assert output.reconstruction.shape == images.shape
    expected = [-(-side // model.config.factor) for side in size]
    assert output.latent.shape == (2, model.config.latent_channels, *expected)
    torch.testing.assert_close(model.decode(model.encode(images), size), output.reconstruction)


def test_gradients_reach_every_parameter_and_stop_at_frozen_steps(case: Case) -> None:
    model = case.make(gaussian=True)
    side, channels = 2 * model.config.factor, model.config.latent_channels
    images = torch.randn(2, 3, side, side)
    output = model(images, torch.randn(2, channels, 2, 2))
    (output.reconstruction.square().mean() + output.kl.mean()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model.zero_grad()
    model.train_only([r"decoder\..*"])
    assert model.num_frozen_steps == len(model.encoder.steps()) == 3
    output = model(images)
    assert not output.latent.requires_grad
    output.reconstruction.square().mean().backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"decoder"}


def test_a_start_from_meta_follows_the_seed_alone(case: Case) -> None:
    expected = case.make()
    with torch.device("meta"):
        other = case.make()
    other.to_empty(device="cpu")
    for parameter in other.parameters():
        parameter.detach().fill_(float("nan"))
    for model in (expected, other):
        torch.manual_seed(1)
        model.init_weights()
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(expected(images).reconstruction, other(images).reconstruction)
    assert len(other.blocks()) == case.num_blocks


def test_flops_are_those_counted(case: Case) -> None:
    model = case.make()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 16, 24))
    build = partial(case.model, model.config)
    assert training_flops(build, (16, 24), [".*"]) == 3 * counter.get_total_flops()
