"""Where a token lies in an image or a clip: fixed position embeddings, and the two kinds of video autoencoders.

Enters: the grid of tokens, or token ids. Leaves: embeddings to add. A clip's token ids are time-major:
id = step * S + place, places row by row.
Legend: B batch, N tokens of a clip, K selected tokens, T steps in time (of a tubelet each), S places in space, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

POSITION_STD = 0.02
"""Standard deviation of the starting values of learned positions, as in MAE-ST."""


class SinusoidPositions(nn.Module):
    """VideoMAE's (arXiv 2203.12602): one fixed sinusoid over all tokens in order, not trained."""

    table: Tensor
    """float32 [1, N, D]; see `sinusoid_table`."""

    def __init__(self, grid_size: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1, grid_size[0] * grid_size[1] * grid_size[2], width))

    def forward(self, ids: Tensor | None) -> Tensor:
        """The embeddings of tokens.

        Args:
            ids: int64 [B, K]; None is all tokens in order.

        Returns:
            [B, K, D], or [1, N, D] for None.
        """
        return self.table if ids is None else self.table[0][ids]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills the table."""
        self.table.copy_(sinusoid_table(self.table.shape[1], self.table.shape[2]))


class SeparablePositions(nn.Module):
    """MAE-ST's (arXiv 2205.09113): learned, one for the place plus one for the time, and one for the class token."""

    def __init__(self, grid_size: tuple[int, int, int], width: int, sincos: bool = False) -> None:
        """Makes the parameters; `init_weights` gives them values.

        Args:
            grid_size: tokens along time, height and width.
            width: D.
            sincos: start as fixed embeddings are, and learn from there; False starts with N(0, 0.02), as in the paper.
        """
        super().__init__()
        self.sincos_grid = grid_size[1:] if sincos else None
        """Rows and columns of the fixed embedding to start from; None starts at random."""
        self.spatial = nn.Parameter(torch.zeros(1, grid_size[1] * grid_size[2], width))
        self.temporal = nn.Parameter(torch.zeros(1, grid_size[0], width))
        self.cls = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, ids: Tensor | None) -> Tensor:
        """The embeddings of tokens, without the class token's.

        Args:
            ids: int64 [B, K]; None is all tokens in order.

        Returns:
            [B, K, D], or [1, N, D] for None.
        """
        table = (self.temporal[:, :, None] + self.spatial[:, None]).flatten(1, 2)
        return table if ids is None else table[0][ids]

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02) everywhere; then sines and cosines over it, where the positions start so."""
        for parameter in (self.spatial, self.temporal, self.cls):
            nn.init.normal_(parameter, std=POSITION_STD)
        if self.sincos_grid is not None:
            self.spatial.copy_(sincos_position_embedding(self.sincos_grid, self.spatial.shape[2])[:, 1:])
            self.temporal.copy_(sinusoid_table(*self.temporal.shape[1:]))


def sincos_position_embedding(grid_size: tuple[int, int], width: int) -> Tensor:
    """The fixed position embedding of the original MAE (He et al., arXiv 2111.06377), computed in float64.

    Args:
        grid_size: rows and columns.
        width: D, divisible by 4.

    Returns:
        float32 [1, 1 + rows * columns, D] on the CPU: zero for the class token; for a patch the sines, then the cosines
        of its column, then those of its row, at the D/4 frequencies 10000 ** (-i / (D/4)).
    """
    rows, columns = (torch.arange(count, dtype=torch.float64, device="cpu") for count in grid_size)
    exponent = torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4)
    frequency = 1.0 / 10000.0**exponent
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    row_angle, column_angle = row.flatten().outer(frequency), column.flatten().outer(frequency)  # [N, D/4]
    patches = torch.cat((column_angle.sin(), column_angle.cos(), row_angle.sin(), row_angle.cos()), dim=1)
    cls_token = torch.zeros(1, width, dtype=torch.float64, device="cpu")
    return torch.cat((cls_token, patches))[None].float()


def sinusoid_table(num_tokens: int, width: int) -> Tensor:
    """The sinusoid of Vaswani et al. (arXiv 1706.03762, section 3.5) over token ids, computed in float64.

    Returns:
        float32 [1, num_tokens, width] on the CPU: sine at even features, cosine at odd ones, of
        id / 10000 ** (2 * (feature // 2) / width).
    """
    ids = torch.arange(num_tokens, dtype=torch.float64, device="cpu")
    feature = torch.arange(width, dtype=torch.float64, device="cpu")
    angle = ids[:, None] / 10000.0 ** (2 * (feature // 2) / width)
    return torch.where(feature % 2 == 0, angle.sin(), angle.cos())[None].float()
