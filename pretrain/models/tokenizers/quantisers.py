"""Bottlenecks with a codebook, of the package vector-quantize-pytorch: SimVQ (arXiv 2411.02038), FSQ (2309.15505).

Enters: an encoder's feature map. Leaves: the codes' values for the decoder, the loss that trains a codebook, and how
often each code occurred. Both are set up without random numbers in training, so that a resume is equal to the bit.
Legend: B batch, L latent channels, h/w latent pixels, K codes, G groups of channels that are quantised on their own.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.losses.reconstruction import at_least_float32
from pretrain.models.precision import without_autocast
from pretrain.models.tokenizers.bottlenecks import Bottleneck, Latent
from pretrain.models.tokenizers.config import QuantiserConfig


class Quantiser(Bottleneck):
    """A bottleneck that also maps to and from the numbers of its codes."""

    @abstractmethod
    def to_codes(self, encoded: Tensor) -> Tensor:
        """The codes of an encoder's output: [B, L, h, w] to int64 [B, G, h, w], in [0, K)."""

    @abstractmethod
    def from_codes(self, codes: Tensor) -> Tensor:
        """What `forward` gives for codes: int64 [B, G, h, w] to float32 [B, L, h, w]."""


class SimVQ(Quantiser):
    """Nearest code of an implicit codebook `frozen gaussian @ trained matrix`; G is 1."""

    def __init__(self, config: QuantiserConfig, latent_channels: int) -> None:
        super().__init__()
        self.num_codes = config.num_codes
        self.codebook = _vector_quantize_pytorch().SimVQ(
            latent_channels,
            config.num_codes,
            codebook_transform=CodebookTransform(latent_channels),
            channel_first=True,
            rotation_trick=config.rotation_trick,
            input_to_quantize_commit_loss_weight=config.commitment_share,
            commitment_weight=config.commitment_weight,
        )

    def forward(self, encoded: Tensor, noise: Tensor | None) -> Latent:
        with without_autocast(encoded.device):
            values, codes, commitment = self.codebook(at_least_float32(encoded))
        return Latent(values.to(encoded.dtype), None, commitment, count_codes(codes, self.num_codes))

    def to_codes(self, encoded: Tensor) -> Tensor:
        with without_autocast(encoded.device):
            codes: Tensor = self.codebook(at_least_float32(encoded))[1]
        return codes[:, None]

    def from_codes(self, codes: Tensor) -> Tensor:
        with without_autocast(codes.device):
            values: Tensor = self.codebook.indices_to_codes(codes[:, 0])
        return values

    @torch.no_grad()
    def init_weights(self) -> None:
        """The codebook N(0, 1 / L), the matrix as torch initialises a linear layer."""
        frozen = self.codebook.frozen_codebook
        nn.init.normal_(frozen, std=frozen.shape[1] ** -0.5)
        self.codebook.code_transform.reset_parameters()


class CodebookTransform(nn.Linear):
    """A square matrix, applied in float32 even where a strategy hands out its weights in bfloat16: the nearest of
    thousands of codes is a matter of small differences."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        return F.linear(at_least_float32(codes), at_least_float32(self.weight))


class FSQ(Quantiser):
    """Each channel bounded and rounded to one of its levels; consecutive channels form a code. Has no weights."""

    def __init__(self, config: QuantiserConfig, latent_channels: int) -> None:
        super().__init__()
        self.levels, self.num_codes = config.levels, config.codebook_size
        # Of the package's forward pass only the rounding is used: its tables of codes cannot be made on meta.
        self.grid = _vector_quantize_pytorch().FSQ(list(config.levels), return_indices=False)
        # Made part of the state dict, which is how a sharded model gets what it is not built with.
        for name in ("_levels", "_basis"):
            self.grid.register_buffer(name, getattr(self.grid, name), persistent=True)

    def forward(self, encoded: Tensor, noise: Tensor | None) -> Latent:
        values = self._round(encoded)
        codes = self.grid.codes_to_indices(values.detach())
        return Latent(self._to_map(values).to(encoded.dtype), code_counts=count_codes(codes, self.num_codes))

    def to_codes(self, encoded: Tensor) -> Tensor:
        codes: Tensor = self.grid.codes_to_indices(self._round(encoded))  # [B, h, w, G]
        return codes.permute(0, 3, 1, 2).long()

    def from_codes(self, codes: Tensor) -> Tensor:
        return self._to_map(self.grid._indices_to_codes(codes.permute(0, 2, 3, 1)).float())

    @torch.no_grad()
    def init_weights(self) -> None:
        """The grid's two constants."""
        levels = torch.tensor(self.levels)
        self.grid._levels.copy_(levels)
        self.grid._basis.copy_(torch.cat([levels.new_ones(1), levels.cumprod(0)[:-1]]))

    def _round(self, encoded: Tensor) -> Tensor:
        """Rounds [B, L, h, w] to [B, h, w, G, levels], with the gradient of the bound and not of the rounding."""
        with without_autocast(encoded.device):
            places = at_least_float32(encoded).permute(0, 2, 3, 1).unflatten(3, (-1, len(self.levels)))
            rounded: Tensor = self.grid.quantize(places)
        return rounded

    @staticmethod
    def _to_map(values: Tensor) -> Tensor:
        """Puts values [B, h, w, G, levels] back into a map [B, L, h, w]."""
        return values.flatten(3).permute(0, 3, 1, 2)


def build_quantiser(config: QuantiserConfig, latent_channels: int) -> Quantiser:
    """The bottleneck of a configuration."""
    return SimVQ(config, latent_channels) if config.kind == "sim_vq" else FSQ(config, latent_channels)


def _vector_quantize_pytorch() -> Any:
    """The package, imported where it is needed, as that takes seconds.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise ImportError(
            "a quantised latent needs vector-quantize-pytorch, which is not installed: pip install "
            "'tessera-pretrain[quantised]'"
        ) from error
    return vector_quantize_pytorch


def count_codes(codes: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs: integers of any shape to float32 [num_codes]. Sums of ones are exact in any order."""
    flat = codes.flatten().long()
    counts = torch.zeros(num_codes, device=codes.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))


def code_metrics(counts: Tensor) -> dict[str, Tensor]:
    """How well a batch uses its codebook.

    Args:
        counts: float32 [K] of one batch; see `count_codes`.

    Returns:
        "code_usage", the share of the codes that occur, and "code_perplexity": as many equally frequent codes would be
        as hard to guess. 0-d each; neither exceeds what the batch's number of places allows.
    """
    share = counts / counts.sum()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {"code_usage": (counts > 0).float().mean(), "code_perplexity": entropy.exp()}
