"""Views of a latent against sliced weights and torch's own transforms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.models.tokenizers.autoencoder import pad_to_multiple
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.models.tokenizers.dc_ae_blocks import repeat_channels
from pretrain.models.tokenizers.dc_ae_config import dc_ae_config
from pretrain.models.tokenizers.latent_view import LatentView, resize


def make(**changes: object) -> DCAE:
    torch.manual_seed(0)
    return DCAE(dc_ae_config("tiny", **{"decoder_norms": ("rms",) * 3, **changes}))


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("kept", [1, 3, 8])
def test_hidden_channels_are_sliced_weights(kept: int, shortcuts: bool) -> None:
    """The decoder's first convolution, of the kept input channels alone; a shortcut adds nothing for hidden ones."""
    model, images = make(latent_shortcuts=shortcuts), torch.randn(2, 3, 16, 24)
    latent, layer = model.encode(images), model.decoder.project_in
    features = F.conv2d(latent[:, :kept], layer.conv.weight[:, :kept], layer.conv.bias, padding=1)
    if shortcuts:
        repeated = repeat_channels(latent, features.shape[1])
        repeated[:, kept * 8 :] = 0.0  # 64 features, 8 of each latent channel
        features = features + repeated
    for step in model.decoder.steps()[1:]:
        features = step(features)
    output = model(images, None, LatentView(channels=torch.tensor([kept, kept])))
    torch.testing.assert_close(output.reconstruction, features)
    assert output.latent.count_nonzero(dim=(0, 2, 3)).bool().tolist() == [c < kept for c in range(8)]


def test_samples_keep_counts_of_their_own() -> None:
    model, images = make(), torch.randn(2, 3, 16, 16)
    mixed = model(images, None, LatentView(channels=torch.tensor([2, 8]))).reconstruction
    first = model(images[:1], None, LatentView(channels=torch.tensor([2]))).reconstruction
    torch.testing.assert_close(mixed[:1], first)
    torch.testing.assert_close(mixed[1:], model(images[1:]).reconstruction)


def test_divergence_counts_what_is_shown() -> None:
    model, images = make(gaussian=True), torch.randn(2, 3, 16, 16)
    encoded = images.contiguous(memory_format=torch.channels_last)
    for step in model.encoder.steps():
        encoded = step(encoded)
    mean, log_variance = encoded.chunk(2, dim=1)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    output = model(images, torch.zeros(2, 8, 4, 4), LatentView(channels=torch.tensor([3, 8])))
    expected = torch.stack([kl[0, :3].sum(), kl[1].sum()])
    torch.testing.assert_close(output.kl, expected)


def test_gradient_reaches_the_kept_channels_alone() -> None:
    model = make(latent_shortcuts=False)
    view = LatentView(channels=torch.tensor([3]))
    model(torch.randn(1, 3, 16, 16), None, view).reconstruction.square().mean().backward()
    for weight, axis in ((model.encoder.project_out.conv.weight, 0), (model.decoder.project_in.conv.weight, 1)):
        used = weight.grad.abs().amax(dim=[d for d in range(4) if d != axis]) > 0
        assert used.tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize("size", [(2, 3), (5, 4), (8, 6), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resizing_is_bilinear_interpolation(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, 6, dtype=dtype, requires_grad=True)
    expected = F.interpolate(x.float(), size, mode="bilinear", align_corners=False).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual = resize(x, size)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(actual)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (actual, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [None, (3, 2)])
def test_latents_and_images_move_alike(size: tuple[int, int] | None, turns: int) -> None:
    """A latent whose pixels are means of the image's moves where the image's means move."""
    view = LatentView(size=size, quarter_turns=turns)
    image = F.interpolate(torch.randn(1, 2, 6, 4), scale_factor=4.0, mode="nearest")
    latent = F.avg_pool2d(image, 4)
    moved, wanted = view.apply_to_latent(latent), view.apply_to_images(image, 4)
    height, width = size or (6, 4)
    assert moved.shape[2:] == ((width, height) if turns % 2 else (height, width))
    assert wanted.shape[2:] == (4 * moved.shape[2], 4 * moved.shape[3])
    by_hand = image if size is None else F.interpolate(image, (4 * height, 4 * width), mode="bilinear")
    for _ in range(turns):
        by_hand = by_hand.transpose(2, 3).flip(2)
    torch.testing.assert_close(wanted, by_hand)
    if size is None:
        torch.testing.assert_close(F.avg_pool2d(wanted, 4), moved)
        assert view.keeps_geometry == (turns == 0)


def test_a_moved_latent_is_decoded_whole() -> None:
    model, images = make(), torch.randn(1, 3, 13, 22)
    view = LatentView(size=(3, 4), quarter_turns=1)
    output = model(images, None, view)
    by_hand = F.interpolate(model.encode(images), (3, 4), mode="bilinear").transpose(2, 3).flip(2)
    torch.testing.assert_close(output.reconstruction, model.decode(by_hand))
    assert output.reconstruction.shape == view.apply_to_images(pad_to_multiple(images, 4), 4).shape == (1, 3, 16, 12)
