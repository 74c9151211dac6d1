"""Writes a tokenizer as diffusers' `AutoencoderDC`, reloads it there strictly, and compares before it is published.

In: a `LoadedTokenizer` that holds a DC-AE. Out: a folder with config.json (scaling factor included),
diffusion_pytorch_model.safetensors and README.md, which `AutoencoderDC.from_pretrained(OUT)` and `load_tokenizer` read.
It exists because latent diffusion models are trained and run with that library, where wrong names only warn.

Legend: B batch, C image channels, H/W pixels.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pretrain.export.card import channels_text, compose_card, parameters_text, provenance, table
from pretrain.export.pictures import PIL_MODES, Errors, PictureFile, Side, compare_pictures, pictures_text
from pretrain.export.publish import check_error, load_completely, publish, relative_error, write_tensors
from pretrain.export.tokenizer_pictures import bit_depth_of, our_input, tokenizer_files, unit_array
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.weights.dc_ae import DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS
from pretrain.weights.dc_ae_names import diffusers_config, to_diffusers

if TYPE_CHECKING:
    from pretrain.weights.tokenizer import LoadedTokenizer

TOLERANCE = 1e-5
"""Largest relative error of latents and reconstructions that is published."""
_WITHOUT = {"encoder_out_shortcut": True, "decoder_in_shortcut": True, "decoder_conv_act_fn": "relu"}
"""What an AutoencoderDC that lacks one of these settings does."""


@dataclass(frozen=True)
class DiffusersExport:
    """What was published."""

    folder: Path
    """where it is"""
    scaling_factor: float
    """in config.json: what a diffusion model multiplies the latents with"""
    latent_error: float
    """largest |theirs - ours| / |ours| of a picture's latent, over the pictures that were compared"""
    reconstruction_error: float
    """the same, of its reconstruction by their encoder and decoder"""
    digest: str
    """`weights_digest` of the tokenizer"""
    pictures: Errors
    """of the pictures that were compared from the file on, see `compare_pictures`"""


def export_diffusers(
    tokenizer: LoadedTokenizer, out: Path, *, scaling_factor: float | None = None, tolerance: float = TOLERANCE
) -> DiffusersExport:
    """Exports a tokenizer into the new folder `out`.

    Args:
        tokenizer: what to export; a DC-AE for pixels in [-1, 1].
        out: must not exist; it appears when everything has been compared, and not otherwise.
        scaling_factor: 1 / root mean square of the latents over a data set; None: the one of the folder that the
            tokenizer was read from, else the one of its configuration (1: unscaled).
        tolerance: largest allowed relative error of latents and reconstructions.

    Raises:
        FileExistsError: something is at `out`.
        ImportError: diffusers is not installed.
        ValueError: AutoencoderDC cannot express this tokenizer, or the scaling factor is no positive number.
        ExportError: diffusers does not load it completely, or computes something else.
    """
    refusal = why_not(tokenizer)
    if refusal is not None:
        raise ValueError(f"diffusers' AutoencoderDC cannot express this tokenizer: {refusal}")
    model = tokenizer.model
    assert isinstance(model, DCAE)
    factor, origin = _scaling_factor(tokenizer, model, scaling_factor)
    with publish(out) as partial:
        described = diffusers_config(model.config) | {"scaling_factor": factor}
        _write(partial, described, model)
        theirs = load_strictly(partial, described)
        latent_error, reconstruction_error = compare(model, theirs)
        check_error("latents", latent_error, tolerance)
        check_error("reconstructions", reconstruction_error, tolerance)
        pictures = compare_from_files(tokenizer, theirs)
        exported = DiffusersExport(out, factor, latent_error, reconstruction_error, tokenizer.digest, pictures)
        (partial / "README.md").write_text(_card(tokenizer, model, exported, origin, tolerance))
    return exported


def why_not(tokenizer: LoadedTokenizer) -> str | None:
    """Why diffusers' AutoencoderDC cannot express `tokenizer`, or None."""
    model = tokenizer.model
    if type(model) is not DCAE:
        return f"it is a {type(model).__name__}, and only a DC-AE has a counterpart"
    if set(tokenizer.mean) != {0.5} or set(tokenizer.std) != {0.5}:
        return (
            f"it was trained on pixels normalised with mean {list(tokenizer.mean)} and std {list(tokenizer.std)}; "
            "diffusers' pipelines give pixels in [-1, 1], that is 0.5 and 0.5. ONNX can carry other statistics"
        )
    try:
        described = diffusers_config(model.config)
    except ValueError as error:
        return str(error)
    known = _known_settings()
    lacking = [name for name, value in described.items() if name not in known and value != _WITHOUT.get(name)]
    if lacking:
        import diffusers

        return f"that of diffusers {diffusers.__version__} has no {', '.join(lacking)}: install a newer version"
    return None


def load_strictly(folder: Path, described: dict[str, Any]) -> Any:
    """The `AutoencoderDC` of a folder, on the CPU in evaluation mode.

    Args:
        folder: holds the export.
        described: the settings that were written.

    Raises:
        ExportError: as `load_completely`.
    """
    return load_completely(
        "diffusers",
        _autoencoder_dc(),
        folder,
        described,
        lambda config, name: config.get(name, _WITHOUT.get(name)),
    )


@torch.no_grad()
def compare(model: DCAE, theirs: Any) -> tuple[float, float]:
    """The largest relative errors of (latents, reconstructions) over pictures of two sizes.

    Args:
        model: ours.
        theirs: an `AutoencoderDC`.

    Returns:
        Both errors; infinite where a value is not finite.
    """
    latent_error = reconstruction_error = 0.0
    for images in example_images(model):
        latent = model.eval().encode(images)
        their_latent = theirs.encode(images).latent
        latent_error = max(latent_error, relative_error("latents", their_latent, latent))
        their_images, ours = theirs.decode(their_latent).sample, model.decode(latent)
        reconstruction_error = max(reconstruction_error, relative_error("reconstructions", their_images, ours))
    return latent_error, reconstruction_error


def compare_from_files(tokenizer: LoadedTokenizer, theirs: Any) -> dict[str, dict[str, float]]:
    """Takes pictures through `VaeImageProcessor` and an `AutoencoderDC`, and through ours.

    Returns:
        See `compare_pictures`.

    Raises:
        ExportError: see `compare_pictures`.
    """
    from diffusers.image_processor import VaeImageProcessor

    model = tokenizer.model
    assert isinstance(model, DCAE)
    processor = VaeImageProcessor(vae_scale_factor=model.config.factor)

    def prepare(file: PictureFile) -> Tensor:
        picture = file.pillow() if file.is_jpeg else unit_array(file, bit_depth_of(tokenizer))
        return cast(Tensor, processor.preprocess(picture))

    def outputs(latent: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        return {"latent": latent, "reconstruction": reconstruction}

    def our_outputs(images: Tensor) -> dict[str, Tensor]:
        latent = model.eval().encode(images)
        return outputs(latent, model.decode(latent))

    def their_outputs(images: Tensor) -> dict[str, Tensor]:
        latent = theirs.encode(images).latent
        return outputs(latent, theirs.decode(latent).sample)

    return compare_pictures(
        tokenizer_files(tokenizer),
        Side(lambda file: our_input(tokenizer, file), our_outputs),
        Side(prepare, their_outputs),
        tokenizer.std,
    )


def example_images(model: DCAE) -> list[Tensor]:
    """Pictures for comparisons: seeded noise in [-1, 1].

    Returns:
        [B, C, H, W] of a size for attention's quadratic form, and of one for its linear form (at most stages).
    """
    factor, generator = model.config.factor, torch.Generator().manual_seed(0)
    sizes = [(2, factor, 2 * factor), (1, max(2 * factor, 128), max(3 * factor, 192))]
    return [
        torch.rand(batch, model.config.in_channels, height, width, generator=generator) * 2.0 - 1.0
        for batch, height, width in sizes
    ]


def _autoencoder_dc() -> Any:
    """diffusers' class.

    Raises:
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import AutoencoderDC
    except ImportError as error:
        raise ImportError(
            "exporting to diffusers needs that package: pip install 'tessera-pretrain[export]'"
        ) from error
    return AutoencoderDC


def _known_settings() -> set[str]:
    """The settings that the installed version's AutoencoderDC takes."""
    return set(inspect.signature(_autoencoder_dc().__init__).parameters)


def _scaling_factor(tokenizer: LoadedTokenizer, model: DCAE, given: float | None) -> tuple[float, str]:
    """The factor to write, and where it comes from.

    Raises:
        ValueError: the factor that was given is no positive number.
    """
    if given is not None:
        if not (given > 0.0 and math.isfinite(given)):
            raise ValueError(f"the scaling factor is {given}; expected 1 / RMS of the latents, a positive number")
        return float(given), "given when it was exported"
    if tokenizer.scaling_factor is not None:
        return tokenizer.scaling_factor, f"read from {Path(tokenizer.source).name}"
    if model.config.scaling_factor != 1.0:
        return model.config.scaling_factor, "from the configuration, not measured on this run's latents"
    return 1.0, "latents are not scaled; measure 1 / RMS over the data before training a diffusion model on them"


def _write(folder: Path, described: dict[str, Any], model: DCAE) -> None:
    """Writes config.json and the weights under diffusers' names."""
    import diffusers

    entries = {"_class_name": "AutoencoderDC", "_diffusers_version": diffusers.__version__, **described}
    (folder / DIFFUSERS_CONFIG).write_text(json.dumps(entries, indent=2) + "\n")
    write_tensors(folder / DIFFUSERS_WEIGHTS, to_diffusers(model.state_dict()))


def _opened(tokenizer: LoadedTokenizer) -> str:
    """The expression that is a picture for the processor."""
    bits, channels = bit_depth_of(tokenizer), len(tokenizer.mean)
    if bits == 8 and channels in PIL_MODES:
        return "picture"
    return f"stored[None] / {2**bits - 1}"


def _card(tokenizer: LoadedTokenizer, model: DCAE, exported: DiffusersExport, origin: str, tolerance: float) -> str:
    """The text of README.md; `origin` says where the scaling factor comes from."""
    config, name = model.config, exported.folder.name
    summary = (
        f"A deep compression autoencoder (DC-AE, arXiv 2410.10733): images of {channels_text(config.in_channels)} to "
        f"latents of {config.latent_channels} channels and 1/{config.factor} of their height and width, and back; "
        f"{parameters_text(model)}. Pixels lie in [-1, 1]: stored values on the scale [0, 1], minus 0.5, divided by "
        f"0.5. Height and width are multiples of {config.factor}. Scaling factor: {exported.scaling_factor:g} "
        f"({origin})."
    )
    use = (
        "```python\nfrom diffusers import AutoencoderDC\n\n"
        f'model = AutoencoderDC.from_pretrained("{name}").eval()\n'
        "latents = model.encode(images).latent * model.config.scaling_factor\n"
        "reconstructions = model.decode(latents / model.config.scaling_factor).sample\n```\n\n"
        "A picture becomes such images by\n\n"
        "```py\nfrom diffusers.image_processor import VaeImageProcessor\n\n"
        f"images = VaeImageProcessor(vae_scale_factor={config.factor}).preprocess({_opened(tokenizer)})\n```\n\n"
        f"`VaeImageProcessor` resizes a picture whose sides are no multiples of {config.factor}; our commands repeat "
        "its last row and column."
    )
    sizes = ", ".join(" x ".join(str(side) for side in images.shape[2:]) for images in example_images(model))
    reproduction = (
        "Reloaded with diffusers before publication, every tensor and setting accounted for. Largest relative error "
        f"(fp32, noise of {sizes} pixels) of latents: {exported.latent_error:.3g}, of reconstructions: "
        f"{exported.reconstruction_error:.3g}; allowed: {tolerance:.3g}.\n\n{pictures_text(exported.pictures)}"
    )
    sections = {"Use": use, "Provenance": table(provenance(tokenizer)), "Reproduction": reproduction}
    return compose_card(name, ("diffusers", "autoencoder", "dc-ae"), summary, sections)
