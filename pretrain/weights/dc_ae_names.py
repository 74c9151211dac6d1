"""Names of DC-AE's weights in diffusers' `AutoencoderDC` and in the official files (efficientvit, DC-Gen), both ways.

In and out: state dicts; nothing is computed, tensors are only renamed, reshaped, split and joined. And the architecture
itself as diffusers describes it, both ways.

  ours       encoder.stages.3.0.attn.qkv.weight [3C, C, 1, 1]; decoder.stages as well; project_in, project_out
  diffusers  encoder.down_blocks.3.0.attn.{to_q,to_k,to_v}.weight [C, C] each, decoder.up_blocks; conv_in, conv_out
  official   encoder.stages.3.op_list.0.context_module.main.qkv.conv.weight [3C, C, 1, 1]

The channels of qkv are interleaved per head, so diffusers' to_q, to_k and to_v are just its thirds: only their joined
product means anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.models.tokenizers.dc_ae_config import HEAD_WIDTH, DCAEConfig
from pretrain.weights.files import State

_LAYERS = (
    ("conv1", "conv1", "main.conv1.conv"),
    ("conv2", "conv2", "main.conv2.conv"),
    ("norm", "norm", "main.conv2.norm"),
    ("attn.qkv", "attn.qkv", "context_module.main.qkv.conv"),
    ("attn.aggregate.0.0", "attn.to_qkv_multiscale.0.proj_in", "context_module.main.aggreg.0.0"),
    ("attn.aggregate.0.1", "attn.to_qkv_multiscale.0.proj_out", "context_module.main.aggreg.0.1"),
    ("attn.proj", "attn.to_out", "context_module.main.proj.conv"),
    ("attn.norm", "attn.norm_out", "context_module.main.proj.norm"),
    ("glu.expand", "conv_out.conv_inverted", "local_module.main.inverted_conv.conv"),
    ("glu.depthwise", "conv_out.conv_depth", "local_module.main.depth_conv.conv"),
    ("glu.contract", "conv_out.conv_point", "local_module.main.point_conv.conv"),
    ("glu.norm", "conv_out.norm", "local_module.main.point_conv.norm"),
    ("conv", "conv", "main.conv.conv"),
)
"""Names of the layers within a block: ours, diffusers', the official ones. Norms and convolutions keep .weight, .bias
and running statistics."""
_OLDER_DEFAULTS = {
    "attention_head_dim": HEAD_WIDTH,
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
}
"""What diffusers' AutoencoderDC did before it had these settings."""
_TO_DIFFUSERS = {ours: theirs for ours, theirs, _ in _LAYERS}
"""Our layers -> diffusers'."""
_FROM_DIFFUSERS = {theirs: ours for ours, theirs, _ in _LAYERS}
"""diffusers' layers -> ours."""
_TO_OFFICIAL = {ours: theirs for ours, _, theirs in _LAYERS}
"""Our layers -> the official ones."""
_FROM_OFFICIAL = {theirs.replace("main.", ""): ours for ours, _, theirs in _LAYERS} | {"conv": "conv"}
"""The official layers -> ours. Official files differ in whether a layer has a residual around it ("main.", which is
taken out first) and in how deep a convolution is wrapped."""
_EDGES_FROM_OFFICIAL = {
    "encoder": {
        "project_in.conv": "project_in.conv",
        "project_in.conv.conv": "project_in.conv",
        "project_out.0.conv": "project_out.conv",
    },
    "decoder": {
        "project_in.conv": "project_in.conv",
        "project_out.0": "project_out.norm",
        "project_out.2.conv": "project_out.conv",
        "project_out.2.conv.conv": "project_out.conv",
    },
}
"""The official layers before the first stage and after the last one -> ours, by part."""


def to_diffusers(state: Mapping[str, Tensor]) -> State:
    """Our state dict under diffusers' names and in its shapes; `AutoencoderDC(**diffusers_config(...))` loads it."""
    result: State = {}
    for name, tensor in state.items():
        part, block, leaf, kind = _split_ours(name)
        if block is not None:
            stages = "down_blocks" if part == "encoder" else "up_blocks"
            prefix = f"{part}.{stages}.{block}"
            if leaf == "attn.qkv":
                for letter, third in zip("qkv", tensor.flatten(1).chunk(3), strict=True):
                    result[f"{prefix}.attn.to_{letter}.weight"] = third
                continue
            result[f"{prefix}.{_TO_DIFFUSERS[leaf]}.{kind}"] = tensor.flatten(1) if leaf == "attn.proj" else tensor
        else:
            result[f"{part}.{_edge_to_diffusers(part, leaf, halves=not _has_first_stage(state, part))}.{kind}"] = tensor
    return result


def from_diffusers(state: Mapping[str, Tensor]) -> State:
    """The inverse of `to_diffusers`.

    Raises:
        ValueError: a name that no DC-AE has there.
    """
    result: State = {}
    edges = {"conv_in": "project_in.conv", "conv_out": "project_out.conv", "norm_out": "project_out.norm"}
    for name, tensor in state.items():
        part, path, kind = _split_theirs(name)
        match = re.fullmatch(r"(?:down|up)_blocks\.(\d+\.\d+)\.(.+)", path)
        if match is None:
            edge = _look_up(edges, path.removesuffix(".conv"), name)
            result[f"{part}.{edge}.{kind}"] = tensor
            continue
        prefix, leaf = f"{part}.stages.{match[1]}", match[2]
        if leaf == "attn.to_q":
            thirds = [_look_up(state, name.replace("to_q", f"to_{letter}"), name) for letter in "qkv"]
            result[f"{prefix}.attn.qkv.weight"] = torch.cat(thirds)[:, :, None, None]
        elif leaf not in ("attn.to_k", "attn.to_v"):
            ours = _look_up(_FROM_DIFFUSERS, leaf, name)
            result[f"{prefix}.{ours}.{kind}"] = tensor[:, :, None, None] if ours == "attn.proj" else tensor
    return result


def to_official(state: Mapping[str, Tensor], config: DCAEConfig) -> State:
    """Our state dict under the names of the authors' files.

    Args:
        state: of a DC-AE, under our names.
        config: its architecture: names depend on shortcuts, on resampling and on whether there is a first stage.
    """
    result: State = {}
    for name, tensor in state.items():
        part, block, leaf, kind = _split_ours(name)
        if block is not None:
            stage, number = block.split(".")
            prefix, path = f"{part}.stages.{stage}.op_list.{number}", _TO_OFFICIAL[leaf]
            if leaf == "conv":  # between stages; a strided convolution is no module with a convolution inside
                path = "main.conv" if part == "encoder" and config.resampling == "interpolate" else path
                path = path if config.shortcuts else path.removeprefix("main.")
            result[f"{prefix}.{path}.{kind}"] = tensor
        else:
            result[f"{part}.{_edge_to_official(part, leaf, config)}.{kind}"] = tensor
    return result


def from_official(state: Mapping[str, Tensor]) -> State:
    """Tensors of the authors' files (after their "state_dict" is unwrapped) under our names.

    Raises:
        ValueError: a name that no DC-AE has there.
    """
    result: State = {}
    for name, tensor in state.items():
        part, path, kind = _split_theirs(name.replace("main.", "").replace("op_list.", ""))
        match = re.fullmatch(r"stages\.(\d+\.\d+)\.(.+)", path)
        if match is not None:
            result[f"{part}.stages.{match[1]}.{_look_up(_FROM_OFFICIAL, match[2], name)}.{kind}"] = tensor
        else:
            result[f"{part}.{_look_up(_EDGES_FROM_OFFICIAL[part], path, name)}.{kind}"] = tensor
    return result


def diffusers_config(config: DCAEConfig) -> dict[str, Any]:
    """Arguments of diffusers' `AutoencoderDC` for the same architecture.

    Raises:
        ValueError: it cannot express a gaussian latent, or changes of resolution without shortcuts.
    """
    if config.gaussian or not config.shortcuts:
        raise ValueError(
            f"gaussian is {config.gaussian} and shortcuts is {config.shortcuts}: diffusers' AutoencoderDC has "
            "deterministic latents and residual shortcuts only. Keep this model in its own format."
        )
    kinds = tuple("ResBlock" if block == "res" else "EfficientViTBlock" for block in config.blocks)
    scales = tuple((5,) if block == "multiscale" else () for block in config.blocks)
    shuffle = config.resampling == "shuffle"
    return {
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "encoder_block_types": kinds,
        "decoder_block_types": kinds,
        "encoder_block_out_channels": config.widths,
        "decoder_block_out_channels": config.widths,
        "encoder_layers_per_block": config.encoder_depths,
        "decoder_layers_per_block": config.decoder_depths,
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "upsample_block_type": "pixel_shuffle" if shuffle else "interpolate",
        "downsample_block_type": "pixel_unshuffle" if shuffle else "conv",
        "decoder_norm_types": tuple(f"{norm}_norm" for norm in config.decoder_norms),
        "decoder_act_fns": tuple("relu" if norm == "batch" else "silu" for norm in config.decoder_norms),
        "encoder_out_shortcut": config.latent_shortcuts,
        "decoder_in_shortcut": config.latent_shortcuts,
        "decoder_conv_act_fn": config.output_act,
        "scaling_factor": config.scaling_factor,
    }


def config_from_diffusers(described: Mapping[str, Any]) -> DCAEConfig:
    """The inverse of `diffusers_config`, for what a folder's config.json holds.

    Raises:
        ValueError: an architecture that ours cannot express, or entries that are missing; the message names them.
    """
    entries: dict[str, Any] = {**_OLDER_DEFAULTS, **described}
    missing = sorted(name for name in diffusers_config(DCAEConfig()).keys() - entries.keys())
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; expected the configuration of an AutoencoderDC")
    num_stages = len(entries["encoder_block_out_channels"])
    per_stage = {
        name: (value,) * num_stages if isinstance(value := entries[name], str) else tuple(value)
        for name in ("encoder_block_types", "decoder_norm_types")
    }
    scales = entries["encoder_qkv_multiscales"]
    config = DCAEConfig(
        in_channels=entries["in_channels"],
        latent_channels=entries["latent_channels"],
        widths=entries["encoder_block_out_channels"],
        encoder_depths=entries["encoder_layers_per_block"],
        decoder_depths=entries["decoder_layers_per_block"],
        blocks=tuple(
            "res" if kind == "ResBlock" else "multiscale" if scale else "attention"
            for kind, scale in zip(per_stage["encoder_block_types"], scales, strict=True)
        ),
        decoder_norms=tuple(norm.removesuffix("_norm") for norm in per_stage["decoder_norm_types"]),
        output_act=entries["decoder_conv_act_fn"],
        resampling="shuffle" if entries["downsample_block_type"] == "pixel_unshuffle" else "interpolate",
        latent_shortcuts=entries["encoder_out_shortcut"],
        scaling_factor=entries["scaling_factor"],
    )
    _check_expressed(entries, config)
    return config


def _check_expressed(entries: Mapping[str, Any], config: DCAEConfig) -> None:
    """Checks that nothing was lost: ours has one setting for two of theirs.

    Args:
        entries: diffusers' settings.
        config: what was made of them.
    Raises:
        ValueError: `config` says something else than `entries`.
    """
    num_stages = len(config.widths)
    has_attention = [block != "res" for block in config.blocks]
    for name, ours in (diffusers_config(config) | {"attention_head_dim": HEAD_WIDTH}).items():
        theirs = entries[name]
        if isinstance(ours, tuple):
            theirs = (theirs,) * num_stages if isinstance(theirs, str) else theirs
            theirs = tuple(tuple(value) if isinstance(value, list) else value for value in theirs)
        if name.endswith("multiscales"):  # read by attention alone
            theirs = tuple(scale if has else () for scale, has in zip(theirs, has_attention, strict=True))
        if theirs != ours:
            raise ValueError(f"{name} is {entries[name]!r}; what can be expressed beside the other entries is {ours!r}")


def _look_up(table: Mapping[str, Any], key: str, name: str) -> Any:
    """table[key].

    Raises:
        ValueError: there is no such key, so the tensor `name` is none of a DC-AE.
    """
    if key not in table:
        raise ValueError(f"the tensor {name!r} is none of a DC-AE")
    return table[key]


def _split_theirs(name: str) -> tuple[str, str, str]:
    """(part, path of the layer, kind of tensor) of somebody else's name."""
    match = re.fullmatch(r"(encoder|decoder)\.(.+)\.(\w+)", name)
    if match is None:
        raise ValueError(f"the tensor {name!r} is none of a DC-AE")
    return match[1], match[2], match[3]


def _split_ours(name: str) -> tuple[str, str | None, str, str]:
    """(part, "stage.block" or None at the edges, layer, kind of tensor) of one of our names."""
    part, rest = name.split(".", 1)
    path, kind = rest.rsplit(".", 1)
    match = re.fullmatch(r"stages\.(\d+\.\d+)\.(.+)", path)
    return (part, match[1], match[2], kind) if match else (part, None, path, kind)


def _has_first_stage(state: Mapping[str, Tensor], part: str) -> bool:
    """Whether the encoder or decoder has blocks at full resolution."""
    return any(name.startswith(f"{part}.stages.0.") for name in state)


def _edge_to_diffusers(part: str, leaf: str, *, halves: bool) -> str:
    """diffusers' name of a layer outside of the stages.

    Args:
        part: "encoder" or "decoder".
        leaf: our name.
        halves: whether the convolution next to the pixels changes the resolution, so that diffusers wraps it once more.
    """
    if leaf == "project_out.norm":
        return "norm_out"
    edge = "conv_in" if leaf == "project_in.conv" else "conv_out"
    at_pixels = (part == "encoder") == (edge == "conv_in")
    return f"{edge}.conv" if at_pixels and halves else edge


def _edge_to_official(part: str, leaf: str, config: DCAEConfig) -> str:
    """The official name of a layer outside of the stages."""
    main = "main." if config.latent_shortcuts else ""
    if part == "encoder" and leaf == "project_out.conv":
        return f"project_out.{main}op_list.0.conv"
    if part == "decoder" and leaf == "project_in.conv":
        return f"project_in.{main}conv"
    if part == "encoder":
        strided = config.resampling == "interpolate"
        return "project_in.conv" if config.encoder_depths[0] or strided else "project_in.conv.conv"
    if leaf == "project_out.norm":
        return "project_out.op_list.0"
    return "project_out.op_list.2.conv" if config.decoder_depths[0] else "project_out.op_list.2.conv.conv"
