"""Tokenizers and backbones as ONNX graphs.

In: a `LoadedTokenizer` or a `Backbone`. Out: a folder, see `pretrain/export/onnx.py`. Graphs take pixels on the scale
[0, 1] and normalise them inside, so that nobody can use the wrong statistics.

Legend: B batch, C channels, T frames, H/W pixels, L latent channels, h/w latent pixels, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from pretrain.evaluation.encoder.views import view_short_side
from pretrain.export.by_hand import source_code
from pretrain.export.card import channels_text, numbers, provenance, table
from pretrain.export.onnx import OPSET, TOLERANCE, Graph, OnnxExport, export_graphs
from pretrain.export.onnx_pictures import compare_backbone, compare_tokenizer
from pretrain.export.pictures import WHOLE_PICTURES, bit_depth_of
from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT

if TYPE_CHECKING:
    from pretrain.weights.backbone import Backbone
    from pretrain.weights.tokenizer import LoadedTokenizer

_PIXELS = "float32 on the scale [0, 1]: stored values / 255, or / 65535 for 16 bit"
"""What a card says of pixels."""


def export_tokenizer_onnx(
    tokenizer: LoadedTokenizer, out: Path, *, size: tuple[int, int] | None = None, tolerance: float = TOLERANCE
) -> OnnxExport:
    """Exports a tokenizer's encoder and decoder into the new folder `out`, for batches of any size.

    encoder.onnx takes float32 pixels [B, C, H, W] in [0, 1], whose sides are multiples of the factor, to unscaled
    latents [B, L, h, w]; decoder.onnx is the way back, and its pixels may leave [0, 1] a little.

    Args:
        tokenizer: what to export.
        out: must not exist; it appears when everything has been compared, and not otherwise.
        size: height and width of the only pictures that the graphs take, multiples of the factor, for models that torch
            cannot trace otherwise (transformers compute their positions for one size); None: all sizes.
        tolerance: largest allowed relative error of latents and reconstructions.

    Raises:
        FileExistsError: something is at `out`.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: `size` is no multiple of the factor.
        ExportError: onnxruntime computes something else.
    """
    config = tokenizer.model.config
    factor, channels = config.factor, config.in_channels
    if size is not None and (min(size) < factor or size[0] % factor or size[1] % factor):
        raise ValueError(f"size is {list(size)}; expected height and width that are multiples of {factor}")
    encoder = TokenizerEncoder(tokenizer.model, tokenizer.mean, tokenizer.std).eval()
    decoder = TokenizerDecoder(tokenizer.model, tokenizer.mean, tokenizer.std).eval()
    # Traced with 42 tokens at the latent, so that linear attention takes its linear form, which serves any size.
    traced = (6, 7) if size is None else (size[0] // factor, size[1] // factor)
    compared = [(2, 1), (6, 8)] if size is None else [traced, traced]
    axes: dict[int, Any] = {0: Dim("batch")}
    latent_axes = dict(axes)
    if size is None:
        rows, columns = Dim("rows"), Dim("columns")
        axes |= {2: factor * rows, 3: factor * columns}
        latent_axes |= {2: rows, 3: columns}
    example = (noise(2, channels, factor * traced[0], factor * traced[1]),)
    example_latent = (noise(2, config.latent_channels, *traced),)
    images = tuple(
        (noise(batch, channels, factor * height, factor * width),)
        for batch, (height, width) in zip((1, 3), compared, strict=True)
    )
    with torch.no_grad():
        latents = tuple((encoder(*inputs),) for inputs in images)
    graphs = [
        Graph("encoder", encoder, example, ("images",), ("latent",), (axes,), images),
        Graph("decoder", decoder, example_latent, ("latent",), ("reconstruction",), (latent_axes,), latents),
    ]
    sections = {"Use": _tokenizer_use(out.name), "Provenance": table(provenance(tokenizer))}
    return export_graphs(
        graphs,
        out,
        _tokenizer_summary(tokenizer, size),
        sections,
        tolerance,
        lambda folder: compare_tokenizer(tokenizer, encoder, decoder, size, folder),
    )


def export_backbone_onnx(backbone: Backbone, out: Path, *, tolerance: float = TOLERANCE) -> OnnxExport:
    """Exports a backbone's features into the new folder `out`, as model.onnx, for batches of any size.

    The graph takes float32 pixels [B, C, H, W] in [0, 1], or clips [B, C, T, H, W] where the backbone is a video
    transformer, to the class token [B, D] (the mean of the tokens where there is none) and the tokens [B, N, D], both
    after the final norm.

    Args:
        backbone: what to export.
        out: must not exist; it appears when everything has been compared, and not otherwise.
        tolerance: largest allowed relative error of the features.

    Raises:
        FileExistsError: something is at `out`.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: onnxruntime computes something else.
    """
    model, shape = backbone.model, backbone.interface.input_shape
    features = BackboneFeatures(model, backbone.mean, backbone.std, len(shape) - 1).eval()
    graph = Graph(
        "model",
        features,
        (noise(2, *shape),),
        ("pixels",),
        feature_names(model),
        ({0: Dim("batch")},),
        ((noise(1, *shape),), (noise(3, *shape),)),
    )
    sections = {
        "Use": _backbone_use(out.name, model),
        "Preprocessing": _backbone_preprocessing(backbone),
        "Provenance": table(provenance(backbone)),
    }
    return export_graphs(
        [graph],
        out,
        _backbone_summary(backbone),
        sections,
        tolerance,
        lambda folder: compare_backbone(backbone, features, feature_names(model), folder),
    )


class Normalised(nn.Module):
    """A model and the statistics of its pixels, shaped for [B, C, H, W] or [B, C, T, H, W]."""

    mean: Tensor
    """buffer [C, 1, 1] or [C, 1, 1, 1]"""
    std: Tensor
    """buffer of the same shape"""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], num_axes: int = 2) -> None:
        """The statistics become buffers, and so constants of the graph.

        Args:
            model: takes normalised pixels, or gives them.
            mean: per channel, on the scale where pixels are in [0, 1].
            std: per channel, on the same scale.
            num_axes: of the pixels, after the channels'.
        """
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(-1, *(1,) * num_axes))


class TokenizerEncoder(Normalised):
    """Pixels in [0, 1] to latents."""

    def forward(self, images: Tensor) -> Tensor:
        """Images, float32 [B, C, H, W], to latents [B, L, h, w]."""
        latent: Tensor = self.model.encode((images - self.mean) / self.std)  # type: ignore[operator]
        return latent


class TokenizerDecoder(Normalised):
    """Latents to pixels in [0, 1]."""

    def forward(self, latent: Tensor) -> Tensor:
        """Latents, float32 [B, L, h, w], to images [B, C, H, W]."""
        decoded: Tensor = self.model.decode(latent)  # type: ignore[operator]
        return decoded * self.std + self.mean


class BackboneFeatures(Normalised):
    """Pixels in [0, 1] to the features after the final norm."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels, float32 [B, C, H, W] or [B, C, T, H, W], to the class token [B, D] and the tokens [B, N, D]."""
        (features,) = self.model.features((pixels - self.mean) / self.std, 1)  # type: ignore[operator]
        return cast(tuple[Tensor, Tensor], features)


def feature_names(model: nn.Module) -> tuple[str, str]:
    """The names of what `BackboneFeatures` gives, in that order."""
    if isinstance(model, ViT):
        return "class_token", "patch_tokens"
    if not isinstance(model, VideoViT):
        return "summary", "tokens"
    return "class_token" if hasattr(model, "cls_token") else "mean_token", "tokens"


def noise(*shape: int) -> Tensor:
    """Random numbers, float32 in [0, 1), the same for the same shape."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _tokenizer_summary(tokenizer: LoadedTokenizer, size: tuple[int, int] | None) -> str:
    """The first paragraph of a tokenizer's card."""
    config = tokenizer.model.config
    sides = f"multiples of {config.factor}" if size is None else f"{size[0]} and {size[1]}"
    return (
        f"The encoder and the decoder of an image tokenizer ({type(tokenizer.model).__name__}) as ONNX graphs (opset "
        f"{OPSET}): images of {channels_text(config.in_channels)} to latents of {config.latent_channels} channels and "
        f"1/{config.factor} of their height and width, and back. Pixels are {_PIXELS}. The graphs normalise them (mean "
        f"{numbers(tokenizer.mean)}, std {numbers(tokenizer.std)}). Height and width are {sides}: repeat the last row "
        "and column of smaller pictures, and crop the result. Reconstructions may leave [0, 1] a little: clip them. "
        "Latents are not scaled."
    )


def _tokenizer_use(name: str) -> str:
    """The code of a tokenizer's card, for an export called `name`."""
    return (
        "```python\nimport onnxruntime\n\n"
        f'encoder = onnxruntime.InferenceSession("{name}/encoder.onnx")\n'
        f'decoder = onnxruntime.InferenceSession("{name}/decoder.onnx")\n'
        '(latent,) = encoder.run(["latent"], {"images": images})\n'
        '(reconstruction,) = decoder.run(["reconstruction"], {"latent": latent})\n```'
    )


def _backbone_summary(backbone: Backbone) -> str:
    """The first paragraph of a backbone's card."""
    model = backbone.model
    pooled, tokens = feature_names(model)
    width, num_tokens = backbone.interface.width, backbone.interface.num_tokens
    return (
        f"The features of a {type(model).__name__} backbone as an ONNX graph (opset {OPSET}), after the final norm: "
        f"{pooled} [batch, {width}] and {tokens} [batch, {num_tokens}, {width}]. Pixels are "
        f"{_PIXELS}. The graph normalises them (mean {numbers(backbone.mean)}, std {numbers(backbone.std)})."
    )


def _backbone_preprocessing(backbone: Backbone) -> str:
    """The code that makes the graph's pixels of a picture or of frames, as our evaluation does."""
    size, full_scale = backbone.interface.image_size, 2 ** bit_depth_of(backbone) - 1
    if backbone.interface.num_frames is None:
        call = (
            "pixels = preprocess(np.asarray(picture), "
            f"{size!r}, {view_short_side(size)}, full_scale={full_scale})[None]"
        )
        more = WHOLE_PICTURES
    else:
        call = (
            f"clip = [preprocess(frame, {size!r}, None, Image.Resampling.BILINEAR) for frame in frames]\n"
            "pixels = np.stack(clip, axis=1)[None]"
        )
        more = "Frames are uint8 [H, W, channels]."
    return (
        "A graph brings no preprocessing. This is our evaluation's, and what the graph was compared through:\n\n"
        f"```py\n{source_code()}\n\n{call}\n```\n\n{more}"
    )


def _backbone_use(name: str, model: nn.Module) -> str:
    """The code of a backbone's card, for an export called `name`."""
    pooled, tokens = feature_names(model)
    return (
        "```python\nimport onnxruntime\n\n"
        f'model = onnxruntime.InferenceSession("{name}/model.onnx")\n'
        f'{pooled}, {tokens} = model.run(["{pooled}", "{tokens}"], {{"pixels": pixels}})\n```'
    )
