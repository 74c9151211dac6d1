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
from typing import Literal

import torch
from torch import Tensor

from pretrain.models.positions import sinusoid_table
from pretrain.models.video_config import VideoMAEConfig
from pretrain.weights.files import State

LEARNED_POSITIONS = (
    "its positions are learned and it has a class token (MAE-ST); there they are a fixed sinusoid, without one"
)
"""The reason for which a VideoMAE's layout cannot hold a MAE-ST."""
_FIXED_POSITIONS = ("encoder.positions.table", "decoder.positions.table")
"""Our buffers with VideoMAE's sinusoids, which no file of theirs stores."""
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
"""transformers' names -> ours; the longest matching prefix or name decides."""
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
"""The same within a numbered block; those that end with q_bias and v_bias are of version 4."""
_ORIGINAL = {
    "encoder.": "encoder.",
    "encoder_to_decoder.": "decoder.embed.",
    "mask_token": "decoder.mask_token",
    "decoder.blocks.": "decoder.blocks.",
    "decoder.norm.": "decoder.norm.",
    "decoder.head.": "decoder.pred.",
}
"""The original VideoMAE's names -> ours."""
_ORIGINAL_LAYER = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attn.q_bias": "attn.q.bias",
    "attn.v_bias": "attn.v.bias",
    "attn.qkv.": "attn.qkv.",
    "attn.proj.": "attn.proj.",
    "mlp.": "mlp.",
}
"""The same within a numbered block."""
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
"""The original MAE-ST's names -> ours."""
_MAE_ST_LAYER = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attn.": "attn.",
    "mlp.": "mlp.",
}
"""The same within a numbered block."""


def to_transformers(state: Mapping[str, Tensor], major: Literal[4, 5] = 5) -> State:
    """Our VideoMAE (or its encoder alone) under the names of a major version of transformers.

    Files have the names of 4 (q_bias, v_bias): 5 renames them when it loads, and 4 does not know those of 5.

    Args:
        state: under our names.
        major: the version.
    Raises:
        ValueError: it is a MAE-ST.
    """
    _refuse_learned_positions(state, "transformers' VideoMAE")
    stored = {name: tensor for name, tensor in state.items() if name not in _FIXED_POSITIONS}
    split = {n: t for n, t in _split_attention(stored).items() if not n.endswith("attn.k.bias")}
    layer = {theirs: ours for theirs, ours in _TRANSFORMERS_LAYER.items() if major == 4 or not theirs.endswith("_bias")}
    return {_rename(name, _inverse(_TRANSFORMERS), _inverse(layer)): tensor for name, tensor in split.items()}


def from_transformers(state: Mapping[str, Tensor], config: VideoMAEConfig) -> State:
    """A `VideoMAEForPreTraining` or `VideoMAEModel` of transformers 4 or 5 under our names.

    A classifier's head is dropped, and its `fc_norm` is taken for the encoder's norm where that is missing.

    Args:
        state: under transformers' names.
        config: of our model, for the fixed positions, which are filled in.
    Raises:
        ValueError: a tensor that no such model has.
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
    """Our VideoMAE, or its encoder alone, under the names of the original's pretraining files (v1 and v2).

    Raises:
        ValueError: it is a MAE-ST.
    """
    _refuse_learned_positions(state, "the original VideoMAE")
    result: State = {}
    for name, tensor in state.items():
        if name in _FIXED_POSITIONS:
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

    Args:
        state: under the original's names.
        config: of our model, for the fixed positions, which are filled in.
    Raises:
        ValueError: a tensor that no such model has.
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
    """Our MAE-ST, or its encoder alone, under the original's names.

    Raises:
        ValueError: it is a VideoMAE.
    """
    if "encoder.positions.spatial" not in state:
        raise ValueError("This model has no learned positions: it is a VideoMAE, which MAE-ST's layout cannot hold.")
    return {
        _rename(name, _inverse(_MAE_ST), _inverse(_MAE_ST_LAYER)): tensor
        for name, tensor in _split_attention(state).items()
    }


def from_mae_st(state: Mapping[str, Tensor]) -> State:
    """The original MAE-ST's tensors (unwrapped from `model_state` or the like) under our names.

    A classifier's head is dropped.

    Raises:
        ValueError: a tensor that no such model has.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    return _join_attention({_rename(name, _MAE_ST, _MAE_ST_LAYER): tensor for name, tensor in kept.items()})


def _rename(name: str, roots: Mapping[str, str], layers: Mapping[str, str]) -> str:
    """One name in another layout.

    Args:
        name: the name.
        roots: its beginnings -> the other layout's; the longest that matches is replaced.
        layers: the same for what follows a numbered block.
    Raises:
        ValueError: no beginning matches.
    """
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
    """The longest key of the table that is `name`, or with which it begins where the key ends with a dot.

    Raises:
        ValueError: there is none.
    """
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
    """The same with VideoMAE's fixed positions, for the parts (encoder, decoder) that are there."""
    widths = {"encoder": config.encoder.width, "decoder": config.decoder_width}
    for part, width in widths.items():
        if any(name.startswith(f"{part}.") for name in state):
            state[f"{part}.positions.table"] = sinusoid_table(config.encoder.num_tokens, width)
    return state


def _refuse_learned_positions(state: Mapping[str, Tensor], target: str) -> None:
    """Checks that a state dict is that of a VideoMAE.

    Raises:
        ValueError: it is a MAE-ST's; the message says that it cannot become `target`.
    """
    if "encoder.positions.spatial" in state or "encoder.cls_token" in state:
        raise ValueError(f"This model cannot become {target}: {LEARNED_POSITIONS}.")
