"""Our DC-AE against diffusers' `AutoencoderDC`: weights both ways, outputs, gradients, and the published sizes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.models.tokenizers.dc_ae_config import DCAE_PRESETS, DCAEConfig, dc_ae_config
from pretrain.weights.dc_ae_names import diffusers_config, from_diffusers, from_official, to_diffusers, to_official
from tests.pretrain.exact import EXACT, StaysDouble, assert_rounds_like, relative_error
from tests.pretrain.weights.tiny_dc_ae import tiny

diffusers = pytest.importorskip("diffusers", minversion="0.32")

TOLERANCE = 1e-5


SMALL = {
    "residual": tiny(),
    "batch-norm": tiny(decoder_norms=("batch", "batch", "batch")),
    "attention": tiny(blocks=("res", "attention", "attention")),
    "multiscale": tiny(blocks=("res", "multiscale", "multiscale")),
    "no-first-stage": tiny(encoder_depths=(0, 1, 1), decoder_depths=(0, 1, 1)),
    "interpolate": tiny(resampling="interpolate"),
    "interpolate-no-first-stage": tiny(resampling="interpolate", encoder_depths=(0, 1, 1), decoder_depths=(0, 1, 1)),
    "no-latent-shortcuts": tiny(latent_shortcuts=False, output_act="silu"),
    "five-channels": tiny(in_channels=5),
    "tiny": dc_ae_config("tiny"),
}
PUBLISHED = ("f32c32", "f64c128", "f128c512", "f32c32-sana", "1.5-f32c128", "1.5-f64c128")
MILLIONS = {
    "f32c32": (123.2, 200.2, 323.4),
    "f64c128": (264.6, 412.4, 676.9),
    "f128c512": (415.7, 705.0, 1120.7),
    "f32c32-sana": (153.0, 159.2, 312.3),
    "1.5-f32c128": (228.6, 295.0, 523.6),
    "1.5-f64c128": (306.5, 408.3, 714.7),
}


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Moves everything that starts at zero or one, so that a swapped or forgotten tensor shows."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            noise = 0.1 * torch.randn(tensor.shape, generator=generator)
            tensor.add_(noise.abs() if name.endswith("running_var") else noise)


def make_pair(config: DCAEConfig) -> tuple[DCAE, nn.Module]:
    """Ours with random weights, and theirs with the same."""
    torch.manual_seed(0)
    ours, theirs = DCAE(config), diffusers.AutoencoderDC(**diffusers_config(config))
    stir(ours)
    theirs.load_state_dict(to_diffusers(ours.state_dict()), strict=True)
    return ours, theirs


def their_output(theirs: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Latent and reconstruction."""
    latent = theirs.encode(images).latent
    return latent, theirs.decode(latent).sample


SIZES = pytest.mark.parametrize("size", [(16, 24), (48, 32)], ids=["quadratic", "linear"])


@SIZES
@pytest.mark.parametrize("name", SMALL)
def test_outputs_and_gradients_are_those_of_diffusers(name: str, size: tuple[int, int]) -> None:
    """In float64: among 49,152 queries one lay so close to 0 that ReLU let it pass in one implementation's float32 and
    not in the other's, and the gradient of the first convolution differed by 8e-4 of its norm.
    """
    config = SMALL[name]
    ours, theirs = (model.double() for model in make_pair(config))
    images = torch.randn(2, config.in_channels, *size).double()
    with StaysDouble():
        for training in (False, True):
            ours.train(training)
            theirs.train(training)
            latent, reconstruction = their_output(theirs, images)
            output = ours(images)
            assert output.reconstruction.dtype == reconstruction.dtype == torch.float64
            assert relative_error(output.latent, latent) <= EXACT
            assert relative_error(output.reconstruction, reconstruction) <= EXACT
        target = torch.randn_like(images)
        (output.reconstruction - target).square().mean().backward()
        (reconstruction - target).square().mean().backward()
    expected = from_diffusers({name: p.grad for name, p in theirs.named_parameters()})
    actual = {name: p.grad for name, p in ours.named_parameters()}
    assert actual.keys() == expected.keys()
    for key, gradient in actual.items():
        # A convolution's bias before batch norm has no gradient but rounding; so the largest one sets the scale.
        scale = max(expected[key].norm(), expected[key.replace("bias", "weight")].norm())
        assert (gradient - expected[key]).norm() <= EXACT * scale, key
    for key, tensor in from_diffusers(theirs.state_dict()).items():
        torch.testing.assert_close(ours.state_dict()[key], tensor, rtol=EXACT, atol=EXACT)  # running statistics too


@SIZES
@pytest.mark.parametrize("name", SMALL)
def test_rounding_is_that_of_diffusers(name: str, size: tuple[int, int]) -> None:
    """In float32, against float64: a sum in half precision, or an epsilon that is lost, would show here alone."""
    config = SMALL[name]
    ours, theirs = make_pair(config)
    exact = make_pair(config)[1].double()
    images = torch.randn(2, config.in_channels, *size)
    target = torch.randn_like(images)
    for training in (False, True):
        for model in (ours, theirs, exact):
            model.train(training)
        output, their_tensors = ours(images), their_output(theirs, images)
        with StaysDouble():
            exact_tensors = their_output(exact, images.double())
        for found, other, expected in zip(
            (output.latent, output.reconstruction), their_tensors, exact_tensors, strict=True
        ):
            assert_rounds_like(found, other, expected)
    for reconstruction in (output.reconstruction, their_tensors[1]):
        (reconstruction - target).square().mean().backward()
    expected = from_diffusers({name: p.grad for name, p in theirs.named_parameters()})
    for key, parameter in ours.named_parameters():
        scale = max(expected[key].norm(), expected[key.replace("bias", "weight")].norm())
        # Room for a few values that rounding takes over the kink of ReLU, see above.
        assert (parameter.grad - expected[key]).norm() <= 1e-2 * scale, key


@pytest.mark.parametrize("name", SMALL)
def test_their_weights_load_into_ours_and_names_go_both_ways(name: str) -> None:
    config = SMALL[name]
    torch.manual_seed(0)
    ours, theirs = DCAE(config).eval(), diffusers.AutoencoderDC(**diffusers_config(config)).eval()
    stir(theirs)
    ours.load_state_dict(from_diffusers(theirs.state_dict()), strict=True)
    state = ours.state_dict()
    for there, back in ((to_diffusers, from_diffusers), (lambda s: to_official(s, config), from_official)):
        returned = back(there(state))
        assert returned.keys() == state.keys()
        assert all(torch.equal(returned[key], state[key]) for key in state)
    images = torch.randn(1, config.in_channels, 32, 32).double()
    with StaysDouble():
        expected = their_output(theirs.double(), images)[1]
        assert relative_error(ours.double()(images).reconstruction, expected) <= EXACT


@pytest.mark.parametrize("name", ["tiny", "f32c32", "f64c128", "f128c512", "f32c32-sana"])
def test_official_names_are_those_that_diffusers_converts(name: str) -> None:
    module = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = dc_ae_config(name)
    with torch.device("meta"):
        ours, theirs = DCAE(config), diffusers.AutoencoderDC(**diffusers_config(config))
    converted = module.convert_autoencoder_dc_checkpoint_to_diffusers(to_official(ours.state_dict(), config))
    expected = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert {key: tensor.shape for key, tensor in converted.items()} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = DCAE(dc_ae_config(name)), diffusers.AutoencoderDC(**diffusers_config(dc_ae_config(name)))
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (ours.encoder, ours.decoder, ours)]
    assert counts == pytest.approx(MILLIONS[name], abs=0.1)
    ours_as_theirs = {key: tensor.shape for key, tensor in to_diffusers(ours.state_dict()).items()}
    assert ours_as_theirs == {key: tensor.shape for key, tensor in theirs.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_full_models_are_those_of_diffusers(name: str) -> None:
    """One forward at a small picture; f128c512 holds 1.1 G parameters twice (9 GB)."""
    config = DCAE_PRESETS[name]
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderDC(**diffusers_config(config)).eval()
    with torch.device("meta"):
        ours = DCAE(config)
    stir(theirs)
    ours.load_state_dict(from_diffusers(theirs.state_dict()), strict=True, assign=True)
    images = torch.randn(1, 3, max(config.factor, 64), 2 * max(config.factor, 64))
    with torch.no_grad():
        latent, reconstruction = their_output(theirs, images)
        output = ours.eval()(images)
    assert relative_error(output.latent, latent) <= TOLERANCE
    assert relative_error(output.reconstruction, reconstruction) <= TOLERANCE
    del ours, theirs
    gc.collect()
