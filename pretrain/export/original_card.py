"""The model card (README.md) of an export in the authors' layout.

In: what was exported and how closely it was read back. Out: Markdown. It says what a state dict cannot: the arguments
with which the authors' code builds the same network, and how its pixels are normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from pretrain.export.card import compose_card, numbers, parameters_text, provenance, table
from pretrain.models.config import MAEConfig, ViTConfig
from pretrain.models.mae import MAE
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.models.tokenizers.dc_ae_config import DCAEConfig
from pretrain.models.video_config import VideoMAEConfig
from pretrain.models.video_mae import VideoMAE
from pretrain.models.vit import ViT

if TYPE_CHECKING:
    from pretrain.weights.backbone import Backbone
    from pretrain.weights.tokenizer import LoadedTokenizer

_PAPERS = {
    "mae": "masked autoencoder (MAE, arXiv 2111.06377)",
    "video_mae": "video masked autoencoder (VideoMAE, arXiv 2203.12602 and 2303.16727)",
    "mae_st": "spatiotemporal masked autoencoder (MAE-ST, arXiv 2205.09113)",
    "dc_ae": "deep compression autoencoder (DC-AE, arXiv 2410.10733)",
}
"""What a layout's model is, by the layout's name."""
_MAE_REPOSITORY = "facebookresearch/mae"
"""Where MAE's code is on GitHub."""
_NORM = "partial(nn.LayerNorm, eps=1e-6)"
"""The norm of all transformers here, as an expression."""


def original_card(
    source: Backbone | LoadedTokenizer,
    name: str,
    model: nn.Module,
    layout: str,
    errors: Mapping[str, float],
    tolerance: float,
) -> str:
    """The README.md of an exported folder.

    Args:
        source: what was exported.
        name: of the folder.
        model: its network.
        layout: whose names and file it has.
        errors: what was measured, relative, by kind of output.
        tolerance: the relative errors that were allowed.
    """
    encoder_only = ", the encoder alone" if isinstance(model, ViT) else ""
    summary = (
        f"A {_PAPERS[layout]}{encoder_only} in its authors' layout, {parameters_text(model)}. "
        f"Pixels lie in [0, 1] and are then normalised with mean {numbers(source.mean)} and std {numbers(source.std)}."
    )
    measured = ", ".join(f"{what} {error:.3g}" for what, error in errors.items())
    sections = {
        "Use": f"```python\n{original_code(model)}\n```",
        "Provenance": table(provenance(source)),
        "Reproduction": (
            "Read back from this layout before publication, every tensor accounted for. Relative errors on fixed "
            f"random inputs, in fp32: {measured}; allowed: {tolerance:.3g}."
        ),
    }
    return compose_card(name, (layout.replace("_", "-"),), summary, sections)


def original_code(model: nn.Module) -> str:
    """Lines of Python that build the network with the authors' code and load model.pth strictly."""
    entry = "model"
    if isinstance(model, DCAE):
        (comment, imports, call), entry = _dc_ae(model.config), "state_dict"
    elif isinstance(model, VideoMAE):
        comment, imports, call = _video_mae(model) if model.config.encoder.family == "video_mae" else _mae_st(model)
    elif isinstance(model, MAE):
        comment, imports, call = _mae(model)
    else:
        assert isinstance(model, ViT)
        arguments = _encoder_arguments(model.config) | {"qkv_bias": "True", "num_classes": "0"}
        comment, imports, call = _MAE_REPOSITORY, "import models_vit", _call("models_vit.VisionTransformer", arguments)
    return (
        f"# in github.com/{comment}\n"
        f"from functools import partial\n\nimport torch\nfrom torch import nn\n\n{imports}\n\n"
        f"model = {call}\n"
        f'model.load_state_dict(torch.load("model.pth", map_location="cpu", weights_only=True)["{entry}"])'
    )


def _call(name: str, arguments: Mapping[str, str], indent: str = "") -> str:
    """A call over several lines; the arguments are expressions."""
    lines = "".join(f"{indent}    {key}={value},\n" for key, value in arguments.items())
    return f"{name}(\n{lines}{indent})"


def _encoder_arguments(config: ViTConfig) -> dict[str, str]:
    """As timm's and MAE's classes have them."""
    return {
        "img_size": str(config.image_size[0]),
        "patch_size": str(config.patch_size[0]),
        "in_chans": str(config.in_channels),
        "embed_dim": str(config.width),
        "depth": str(config.depth),
        "num_heads": str(config.heads),
        "mlp_ratio": str(config.mlp_ratio),
        "norm_layer": _NORM,
    }


def _decoder_arguments(config: MAEConfig | VideoMAEConfig) -> dict[str, str]:
    """As all three autoencoders have them."""
    return {
        "decoder_embed_dim": str(config.decoder_width),
        "decoder_depth": str(config.decoder_depth),
        "decoder_num_heads": str(config.decoder_heads),
    }


def _mae(model: MAE) -> tuple[str, str, str]:
    config = model.config
    arguments = _encoder_arguments(config.encoder) | _decoder_arguments(config)
    arguments["norm_pix_loss"] = str(config.norm_pixels)
    return _MAE_REPOSITORY, "import models_mae", _call("models_mae.MaskedAutoencoderViT", arguments)


def _mae_st(model: VideoMAE) -> tuple[str, str, str]:
    config, encoder = model.config, model.config.encoder
    arguments = {
        "img_size": str(encoder.image_size[0]),
        "patch_size": str(encoder.patch_size[0]),
        "in_chans": str(encoder.in_channels),
        "embed_dim": str(encoder.width),
        "depth": str(encoder.depth),
        "num_heads": str(encoder.heads),
        "mlp_ratio": str(encoder.mlp_ratio),
        "norm_layer": _NORM,
        "num_frames": str(encoder.num_frames),
        "t_patch_size": str(encoder.tubelet_size),
        "pred_t_dim": str(config.num_predicted_frames),
        "sep_pos_embed": "True",
        "cls_embed": "True",
    } | _decoder_arguments(config)
    call = _call("models_mae.MaskedAutoencoderViT", arguments)
    return "facebookresearch/mae_st", "from mae_st import models_mae", call


def _video_mae(model: VideoMAE) -> tuple[str, str, str]:
    config, encoder = model.config, model.config.encoder
    height, width = encoder.image_size
    arguments = {
        "img_size": str(height if height == width else (height, width)),
        "patch_size": str(encoder.patch_size[0]),
        "encoder_in_chans": str(encoder.in_channels),
        "encoder_embed_dim": str(encoder.width),
        "encoder_depth": str(encoder.depth),
        "encoder_num_heads": str(encoder.heads),
        "decoder_num_classes": str(config.target_values),
        "mlp_ratio": str(encoder.mlp_ratio),
        "qkv_bias": "True",
        "norm_layer": _NORM,
        "tubelet_size": str(encoder.tubelet_size),
        "all_frames": str(encoder.num_frames),
    } | _decoder_arguments(config)
    comment = "OpenGVLab/VideoMAEv2; MCG-NJU/VideoMAE has no all_frames, there are 16 of them there"
    call = _call("modeling_pretrain.PretrainVisionTransformer", arguments)
    return comment, "from models import modeling_pretrain", call


def _dc_ae(config: DCAEConfig) -> tuple[str, str, str]:
    kinds = {"res": "ResBlock", "attention": "EViT_GLU", "multiscale": "EViTS5_GLU"}
    is_batch, shuffle = [norm == "batch" for norm in config.decoder_norms], config.resampling == "shuffle"
    both: dict[str, Any] = {
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "block_type": [kinds[block] for block in config.blocks],
        "width_list": list(config.widths),
    }
    encoder = both | {
        "depth_list": list(config.encoder_depths),
        "downsample_block_type": "ConvPixelUnshuffle" if shuffle else "Conv",
        "downsample_shortcut": "averaging" if config.shortcuts else None,
        "out_shortcut": "averaging" if config.latent_shortcuts else None,
        "double_latent": config.gaussian,
    }
    decoder = both | {
        "depth_list": list(config.decoder_depths),
        "norm": ["bn2d" if batch else "trms2d" for batch in is_batch],
        "act": ["relu" if batch else "silu" for batch in is_batch],
        "upsample_block_type": "ConvPixelShuffle" if shuffle else "InterpolateConv",
        "upsample_shortcut": "duplicating" if config.shortcuts else None,
        "in_shortcut": "duplicating" if config.latent_shortcuts else None,
        "out_act": config.output_act,
    }
    halves = {
        name: _call(f"dc_ae.{name.title()}Config", {key: repr(value) for key, value in half.items()}, "        ")
        for name, half in (("encoder", encoder), ("decoder", decoder))
    }
    whole = {"in_channels": str(config.in_channels), "latent_channels": str(config.latent_channels), **halves}
    whole["scaling_factor"] = str(config.scaling_factor)
    call = _call("dc_ae.DCAE", {"cfg": _call("dc_ae.DCAEConfig", whole, "    ")})
    return "mit-han-lab/efficientvit", "from efficientvit.models.efficientvit import dc_ae", call
