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

from pretrain.export.card import provenance
from pretrain.export.onnx import OPSET, TOLERANCE, Graph, OnnxExport, export_graphs
from pretrain.export.publish import numbers, table
from pretrain.models.vit import ViT

if TYPE_CHECKING:
    from pretrain.weights.backbone import Backbone
    from pretrain.weights.tokenizer import LoadedTokenizer

_PIXELS = "float32 on the scale [0, 1]: stored values / 255, or / 65535 for 16 bit"


def export_tokenizer_onnx(
    tokenizer: LoadedTokenizer, out: Path, *, size: tuple[int, int] | None = None, tolerance: float = TOLERANCE
) -> OnnxExport:
    """Exports a tokenizer's encoder and decoder into the new folder `out`, for batches of any size.

    encoder.onnx: float32 pixels [B, C, H, W] in [0, 1], sides multiples of the factor -> unscaled latents [B, L, h, w].
    decoder.onnx: the way back; its pixels may leave [0, 1] a little.

    Args:
        tokenizer: what to export.
        out: must not exist; it appears when everything has been compared, and not otherwise.
        size: height and width of the only pictures that the graphs take, multiples of the factor, for models that torch
            cannot trace otherwise (transformers compute their positions for one size); None: all sizes.
        tolerance: largest allowed relative error of latents and reconstructions.

    Raises as `export_onnx`, and ValueError for a size that is no multiple of the factor.
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
    return export_graphs(graphs, out, _tokenizer_summary(tokenizer, size), sections, tolerance)


def export_backbone_onnx(backbone: Backbone, out: Path, *, tolerance: float = TOLERANCE) -> OnnxExport:
    """Exports a backbone's features into the new folder `out`, as model.onnx, for batches of any size.

    In: float32 pixels [B, C, H, W] in [0, 1], or clips [B, C, T, H, W] where the backbone is a video transformer. Out:
    the class token [B, D] (the mean of the tokens where there is none) and the tokens [B, N, D], after the final norm.

    Raises as `export_onnx`.
    """
    model = backbone.model
    shape = model.config.in_channels, *_size(backbone)
    graph = Graph(
        "model",
        BackboneFeatures(model, backbone.mean, backbone.std).eval(),
        (noise(2, *shape),),
        ("pixels",),
        feature_names(model),
        ({0: Dim("batch")},),
        ((noise(1, *shape),), (noise(3, *shape),)),
    )
    sections = {"Use": _backbone_use(out.name, model), "Provenance": table(provenance(backbone))}
    return export_graphs([graph], out, _backbone_summary(backbone), sections, tolerance)


class Normalised(nn.Module):
    """A model and the statistics of its pixels, shaped for [B, C, H, W] or [B, C, T, H, W]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], num_axes: int = 2) -> None:
        """num_axes: after the channels'."""
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(-1, *(1,) * num_axes))


class TokenizerEncoder(Normalised):
    """Pixels in [0, 1] to latents."""

    def forward(self, images: Tensor) -> Tensor:
        """images: float32 [B, C, H, W]. Returns [B, L, h, w]."""
        latent: Tensor = self.model.encode((images - self.mean) / self.std)  # type: ignore[operator]
        return latent


class TokenizerDecoder(Normalised):
    """Latents to pixels in [0, 1]."""

    def forward(self, latent: Tensor) -> Tensor:
        """latent: float32 [B, L, h, w]. Returns [B, C, H, W]."""
        decoded: Tensor = self.model.decode(latent)  # type: ignore[operator]
        return decoded * self.std + self.mean


class BackboneFeatures(Normalised):
    """Pixels in [0, 1] to the features after the final norm."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(model, mean, std, 2 if isinstance(model, ViT) else 3)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels: float32 [B, C, H, W] or [B, C, T, H, W]. Returns ([B, D], [B, N, D])."""
        (features,) = self.model.features((pixels - self.mean) / self.std, 1)  # type: ignore[operator]
        return cast(tuple[Tensor, Tensor], features)


def feature_names(model: nn.Module) -> tuple[str, str]:
    """Names of what `BackboneFeatures` gives."""
    if isinstance(model, ViT):
        return "class_token", "patch_tokens"
    return "class_token" if hasattr(model, "cls_token") else "mean_token", "tokens"


def noise(*shape: int) -> Tensor:
    """Float32 in [0, 1), the same numbers for the same shape."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _size(backbone: Backbone) -> tuple[int, ...]:
    """What follows the channels: height and width, or frames, height and width."""
    model = backbone.model
    return model.config.image_size if isinstance(model, ViT) else model.config.clip_size


def _tokenizer_summary(tokenizer: LoadedTokenizer, size: tuple[int, int] | None) -> str:
    config = tokenizer.model.config
    sides = f"multiples of {config.factor}" if size is None else f"{size[0]} and {size[1]}"
    return (
        f"The encoder and the decoder of an image tokenizer ({type(tokenizer.model).__name__}) as ONNX graphs (opset "
        f"{OPSET}): images of {config.in_channels} channel{'s' if config.in_channels > 1 else ''} to latents of "
        f"{config.latent_channels} channels and 1/{config.factor} of their height and width, and back. Pixels are "
        f"{_PIXELS}. The graphs normalise them (mean {numbers(tokenizer.mean)}, std {numbers(tokenizer.std)}). Height "
        f"and width are {sides}: repeat the last row and column of smaller pictures, and crop the result. "
        "Reconstructions may leave [0, 1] a little: clip them. Latents are not scaled."
    )


def _tokenizer_use(name: str) -> str:
    return (
        "```python\nimport onnxruntime\n\n"
        f'encoder = onnxruntime.InferenceSession("{name}/encoder.onnx")\n'
        f'decoder = onnxruntime.InferenceSession("{name}/decoder.onnx")\n'
        '(latent,) = encoder.run(["latent"], {"images": images})\n'
        '(reconstruction,) = decoder.run(["reconstruction"], {"latent": latent})\n```'
    )


def _backbone_summary(backbone: Backbone) -> str:
    model = backbone.model
    pooled, tokens = feature_names(model)
    num_tokens = model.config.num_patches if isinstance(model, ViT) else model.config.num_tokens
    return (
        f"The features of a {type(model).__name__} backbone as an ONNX graph (opset {OPSET}), after the final norm: "
        f"{pooled} [batch, {model.config.width}] and {tokens} [batch, {num_tokens}, {model.config.width}]. Pixels are "
        f"{_PIXELS}. The graph normalises them (mean {numbers(backbone.mean)}, std {numbers(backbone.std)})."
    )


def _backbone_use(name: str, model: nn.Module) -> str:
    pooled, tokens = feature_names(model)
    return (
        "```python\nimport onnxruntime\n\n"
        f'model = onnxruntime.InferenceSession("{name}/model.onnx")\n'
        f'{pooled}, {tokens} = model.run(["{pooled}", "{tokens}"], {{"pixels": pixels}})\n```'
    )
