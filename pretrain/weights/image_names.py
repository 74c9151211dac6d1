"""Parameter names of image models elsewhere, and ours.

In: a state dict with somebody else's names or with ours (`encoder.*`, `decoder.*`). Out: the same tensors under the
other names; nothing is computed.

Layouts:
  original MAE  cls_token, pos_embed, patch_embed.proj.*, blocks.i.*, norm.*; full files add mask_token and decoder_*
  timm          the same encoder; `head.*` is dropped, `fc_norm.*` of average-pooled models is our norm
  Tessera       encoder.<the above>, decoder.{embed,mask_token,pos_embed,blocks,norm,pred}
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pretrain.weights.files import State, WeightsError

_DECODER_NAMES = {
    "decoder_embed.": "decoder.embed.",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}
"""How names begin in the original MAE's decoder, and in ours."""


def canonical_names(state: Mapping[str, Tensor]) -> State:
    """The tensors of any of the layouts under our names.

    Classification heads and an encoder-only file's mask token are dropped.

    Raises:
        WeightsError: two tensors would get the same name.
    """
    has_decoder = any(name.startswith(("decoder_", "decoder.")) for name in state)
    has_norm = any(name in state for name in ("norm.weight", "encoder.norm.weight"))
    result: State = {}
    for name, tensor in state.items():
        canonical = _canonical_name(name, has_decoder=has_decoder, has_norm=has_norm)
        if canonical is None:
            continue
        if canonical in result:
            raise WeightsError(f"two tensors of the file both mean {canonical!r}, one of them {name!r}")
        result[canonical] = tensor
    return result


def to_original_mae(state: Mapping[str, Tensor]) -> State:
    """Our MAE, or its encoder alone, under the names of the original's files."""
    theirs = {ours: name for name, ours in _DECODER_NAMES.items()} | {"decoder.mask_token": "mask_token"}
    result: State = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in theirs if name.startswith(prefix)), None)
        renamed = name.removeprefix("encoder.") if prefix is None else theirs[prefix] + name.removeprefix(prefix)
        result[renamed] = tensor
    return result


def _canonical_name(name: str, *, has_decoder: bool, has_norm: bool) -> str | None:
    """Our name of one tensor; None: it is dropped.

    Args:
        name: theirs.
        has_decoder: whether the file holds a decoder, to which a mask token belongs.
        has_norm: whether the file holds the encoder's norm, so that `fc_norm` is another one.
    """
    if name.startswith(("encoder.", "decoder.")):
        return name
    for theirs, ours in _DECODER_NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if name == "mask_token":
        return "decoder.mask_token" if has_decoder else None
    if name.startswith(("head.", "head_drop.")):
        return None
    if name.startswith("fc_norm.") and not has_norm:
        return f"encoder.{name.removeprefix('fc_')}"
    return f"encoder.{name}"
