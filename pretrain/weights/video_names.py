"""Parameter names of video autoencoders elsewhere, and what else differs in how they are stored.

In: a state dict with our names (`encoder.*`, `decoder.*`) or somebody else's. Out: the same tensors under the other
names. It exists so that export and import share one table. Values change in three ways, none of which changes what the
model computes: query, key and value are joined or split; keys have no bias in VideoMAE (a key's bias adds the same to
all scores of a query, which softmax ignores, so ours is dropped or filled with zeros); fixed positions are not stored.

Layouts:
  transformers       `VideoMAEForPreTraining`, versions 4 (q_bias, v_bias) and 5; encoder under `videomae.`
  original VideoMAE  v1 and v2: encoder.*, decoder.*, q_bias and v_bias beside a joint qkv without bias
  original MAE-ST    separate q, k, v with biases; learned positions; decoder_*
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.models.video_mae import VideoMAEConfig
from pretrain.models.video_positions import sinusoid_table
from pretrain.models.video_vit import VideoViTConfig
from pretrain.models.vit import LAYER_NORM_EPS

State = dict[str, Tensor]
CANNOT = "This model cannot become a transformers VideoMAE"
_LEARNED_POSITIONS = (
    "its positions are learned and it has a class token (MAE-ST); there they are a fixed sinusoid, without one"
)
_POSITIONS = ("encoder.positions.table", "decoder.positions.table")
# Theirs -> ours; the longest matching prefix or name decides.
_TRANSFORMERS = {
    "videomae.embeddings.patch_embeddings.projection.": "encoder.patch_embed.proj.",
    "videomae.encoder.layer.": "encoder.blocks.",
    "videomae.layernorm.": "encoder.norm.",
    "encoder_to_decoder.": "decoder.embed.",
    "mask_token": "decoder.mask_token",
    "decoder.decoder_layers.": "decoder.blocks.",
    "decoder.norm.": "decoder.norm.",
    "decoder.head.": "decoder.pred.",
}
_TRANSFORMERS_LAYER = {
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "attention.attention.query.": "attn.q.",
    "attention.attention.key.": "attn.k.",
    "attention.attention.value.": "attn.v.",
    "attention.attention.q_bias": "attn.q.bias",
    "attention.attention.v_bias": "attn.v.bias",
    "attention.output.dense.": "attn.proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}
_ORIGINAL = {
    "encoder.": "encoder.",
    "encoder_to_decoder.": "decoder.embed.",
    "mask_token": "decoder.mask_token",
    "decoder.blocks.": "decoder.blocks.",
    "decoder.norm.": "decoder.norm.",
    "decoder.head.": "decoder.pred.",
}
_ORIGINAL_LAYER = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attn.q_bias": "attn.q.bias",
    "attn.v_bias": "attn.v.bias",
    "attn.qkv.": "attn.qkv.",
    "attn.proj.": "attn.proj.",
    "mlp.": "mlp.",
}
_MAE_ST = {
    "cls_token": "encoder.cls_token",
    "pos_embed_spatial": "encoder.positions.spatial",
    "pos_embed_temporal": "encoder.positions.temporal",
    "pos_embed_class": "encoder.positions.cls",
    "patch_embed.": "encoder.patch_embed.",
    "blocks.": "encoder.blocks.",
    "norm.": "encoder.norm.",
    "mask_token": "decoder.mask_token",
    "decoder_cls_token": "decoder.cls_token",
    "decoder_pos_embed_spatial": "decoder.positions.spatial",
    "decoder_pos_embed_temporal": "decoder.positions.temporal",
    "decoder_pos_embed_class": "decoder.positions.cls",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}
_MAE_ST_LAYER = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attn.": "attn.",
    "mlp.": "mlp.",
}


def transformers_encoder_arguments(config: VideoViTConfig) -> dict[str, Any]:
    """What `transformers.VideoMAEConfig` needs to build this encoder. Raises ValueError for MAE-ST's."""
    if config.family != "video_mae":
        raise ValueError(f"{CANNOT}: {_LEARNED_POSITIONS}")
    return {
        "image_size": side_or_sides(config.image_size),
        "patch_size": side_or_sides(config.patch_size),
        "num_channels": config.in_channels,
        "num_frames": config.num_frames,
        "tubelet_size": config.tubelet_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "layer_norm_eps": LAYER_NORM_EPS,  # the default there is 1e-12
        "qv_bias": True,
        "use_mean_pooling": False,  # True leaves the encoder's norm out
    }


def transformers_arguments(config: VideoMAEConfig, norm_pixels: bool) -> dict[str, Any]:
    """What `transformers.VideoMAEConfig` needs to build this model, decoder and target included.

    One thing it cannot say: the norm after its decoder has an eps of 1e-5, ours and the original's 1e-6.
    Raises ValueError, with the reason, for a model that transformers does not have.
    """
    encoder = config.encoder
    arguments = transformers_encoder_arguments(encoder)
    reasons = {
        "it predicts a part of the frames; there all are predicted": (
            config.num_predicted_frames != encoder.num_frames
        ),
        f"its patches are {encoder.patch_size[0]} x {encoder.patch_size[1]}; there the decoder's are square": (
            len(set(encoder.patch_size)) != 1
        ),
        f"it predicts raw pixels of {encoder.in_channels} channels; there these must be 3": (
            encoder.in_channels != 3 and not norm_pixels
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{CANNOT}: {reason}")
    return arguments | {
        "decoder_hidden_size": config.decoder_width,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_heads,
        "decoder_intermediate_size": int(config.decoder_width * encoder.mlp_ratio),
        "norm_pix_loss": norm_pixels,
    }


def side_or_sides(pair: tuple[int, int]) -> int | list[int]:
    """As transformers' configurations have sizes: one number for a square."""
    return pair[0] if pair[0] == pair[1] else list(pair)


def to_transformers(state: Mapping[str, Tensor], major: Literal[4, 5] = 5) -> State:
    """Our VideoMAE (or its encoder alone) under the names of a major version of transformers.

    Files have the names of 4 (q_bias, v_bias): 5 renames them when it loads, and 4 does not know those of 5.
    Raises ValueError for MAE-ST's.
    """
    _refuse_learned_positions(state, "transformers' VideoMAE")
    stored = {name: tensor for name, tensor in state.items() if name not in _POSITIONS}
    split = {n: t for n, t in _split_attention(stored).items() if not n.endswith("attn.k.bias")}
    layer = {theirs: ours for theirs, ours in _TRANSFORMERS_LAYER.items() if major == 4 or not theirs.endswith("_bias")}
    return {_rename(name, _inverse(_TRANSFORMERS), _inverse(layer)): tensor for name, tensor in split.items()}


def from_transformers(state: Mapping[str, Tensor], config: VideoMAEConfig) -> State:
    """A `VideoMAEForPreTraining` or `VideoMAEModel` of transformers 4 or 5 under our names, positions filled in.

    A classifier's head is dropped, and its `fc_norm` is taken for the encoder's norm where that is missing.
    """
    renamed: State = {}
    has_norm = any(name.removeprefix("videomae.").startswith("layernorm.") for name in state)
    for name, tensor in state.items():
        if name.startswith(("embeddings.", "encoder.layer.", "layernorm.")):
            name = f"videomae.{name}"  # the bare encoder
        if name.startswith("fc_norm.") and not has_norm:
            name = name.replace("fc_norm.", "videomae.layernorm.")
        if not name.startswith(("classifier.", "fc_norm.")):
            renamed[_rename(name, _TRANSFORMERS, _TRANSFORMERS_LAYER)] = tensor
    return _with_positions(_join_attention(renamed), config)


def to_original_video_mae(state: Mapping[str, Tensor]) -> State:
    """Our VideoMAE under the names of the original's pretraining files. Raises ValueError for MAE-ST's."""
    _refuse_learned_positions(state, "the original VideoMAE")
    result: State = {}
    for name, tensor in state.items():
        if name in _POSITIONS:
            continue
        if name.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            prefix = _rename(name.removesuffix("qkv.bias"), _inverse(_ORIGINAL), {"attn.": "attn."})
            result |= {f"{prefix}q_bias": query, f"{prefix}v_bias": value}
        else:
            result[_rename(name, _inverse(_ORIGINAL), _inverse(_ORIGINAL_LAYER))] = tensor
    return result


def from_original_video_mae(state: Mapping[str, Tensor], config: VideoMAEConfig) -> State:
    """The original VideoMAE's or v2's tensors (unwrapped from `model` or `module`) under our names.

    Pretraining files have `encoder.`; fine-tuned ones do not, and their `fc_norm` is taken for the encoder's norm.
    """
    renamed: State = {}
    is_whole = any(name.startswith("encoder.") for name in state)
    for name, tensor in state.items():
        if not is_whole:
            if name.startswith("head."):
                continue
            name = f"encoder.{name.replace('fc_norm.', 'norm.')}"
        if name not in ("pos_embed", "encoder.pos_embed"):
            renamed[_rename(name, _ORIGINAL, _ORIGINAL_LAYER)] = tensor
    return _with_positions(_join_attention(renamed), config)


def to_mae_st(state: Mapping[str, Tensor]) -> State:
    """Our MAE-ST under the original's names. Raises ValueError for VideoMAE's."""
    if "encoder.positions.spatial" not in state:
        raise ValueError("This model has no learned positions: it is a VideoMAE, which MAE-ST's layout cannot hold.")
    return {
        _rename(name, _inverse(_MAE_ST), _inverse(_MAE_ST_LAYER)): tensor
        for name, tensor in _split_attention(state).items()
    }


def from_mae_st(state: Mapping[str, Tensor]) -> State:
    """The original MAE-ST's tensors (unwrapped from `model_state` or the like) under our names.

    A classifier's head is dropped.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    return _join_attention({_rename(name, _MAE_ST, _MAE_ST_LAYER): tensor for name, tensor in kept.items()})


def _rename(name: str, roots: Mapping[str, str], layers: Mapping[str, str]) -> str:
    """Replace the longest matching prefix by `roots`, and inside numbered blocks what follows by `layers`."""
    root = _longest(name, roots)
    renamed = roots[root] + name.removeprefix(root)
    if root.endswith(("blocks.", "layer.", "layers.")) or re.match(r"(encoder|decoder)\.blocks\.\d", renamed):
        match = re.fullmatch(r"(.*?\.\d+\.)(.*)", renamed)
        if match is None:
            raise ValueError(f"The tensor {name!r} is not in a numbered block.")
        layer = _longest(match[2], layers)
        renamed = match[1] + layers[layer] + match[2].removeprefix(layer)
    return renamed


def _longest(name: str, table: Mapping[str, str]) -> str:
    matching = [prefix for prefix in table if name == prefix or (prefix.endswith(".") and name.startswith(prefix))]
    if not matching:
        raise ValueError(
            f"The tensor {name!r} is none of a video autoencoder; expected names such as {next(iter(table))!r}."
        )
    return max(matching, key=len)


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in table.items()}


def _split_attention(state: Mapping[str, Tensor]) -> State:
    """`attn.qkv.*` as `attn.{q,k,v}.*`."""
    result: State = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            parts = tensor.chunk(3)
            result |= {name.replace(".qkv.", f".{letter}."): part for letter, part in zip("qkv", parts, strict=True)}
        else:
            result[name] = tensor
    return result


def _join_attention(state: Mapping[str, Tensor]) -> State:
    """`attn.{q,k,v}.*` as `attn.qkv.*`; the biases that VideoMAE has not are zero."""
    result = {name: tensor for name, tensor in state.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    prefixes = {match[1] for name in state if (match := re.match(r"(.*\.attn\.)", name))}
    for prefix in sorted(prefixes):
        if f"{prefix}q.weight" in state:
            result[f"{prefix}qkv.weight"] = torch.cat([state[f"{prefix}{letter}.weight"] for letter in "qkv"])
        if f"{prefix}qkv.bias" not in result:
            weight = result[f"{prefix}qkv.weight"]
            zero = weight.new_zeros(len(weight) // 3)
            result[f"{prefix}qkv.bias"] = torch.cat([state.get(f"{prefix}{letter}.bias", zero) for letter in "qkv"])
    return result


def _with_positions(state: State, config: VideoMAEConfig) -> State:
    """With the fixed tables, for the parts that are there."""
    widths = {"encoder": config.encoder.width, "decoder": config.decoder_width}
    for part, width in widths.items():
        if any(name.startswith(f"{part}.") for name in state):
            state[f"{part}.positions.table"] = sinusoid_table(config.encoder.num_tokens, width)
    return state


def _refuse_learned_positions(state: Mapping[str, Tensor], target: str) -> None:
    if "encoder.positions.spatial" in state or "encoder.cls_token" in state:
        raise ValueError(f"This model cannot become {target}: {_LEARNED_POSITIONS}.")
