"""What the decoder of a video autoencoder should predict, from the tokens as they are stored, and back to pixels.

Enters: stored tokens of the predicted places. Leaves: targets, and pictures of predictions. Targets are taken from the
stored integers: only the predicted tokens become floats, and [0, 1] is exact instead of "un-normalised".
Legend: B clips, M predicted tokens, V values of a token per channel, C channels, T frames, H/W pixels.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.losses.clips import channel_statistics
from pretrain.losses.pixels import patch_statistics
from pretrain.models.normalise import Normalise


class ClipTarget:
    """Makes targets float32 [B, M, V * C] of stored tokens [B, M, V, C]."""

    def __init__(self, scale: Normalise, *, per_channel: bool, norm_pixels: bool) -> None:
        """Takes what distinguishes the methods.

        Args:
            scale: what pixels are before they are normalised per token: in [0, 1] (VideoMAE), or as the model sees them
                (MAE-ST).
            per_channel: whether a token is normalised by each channel's statistics (VideoMAE), or by those of all its
                values (MAE-ST).
            norm_pixels: whether tokens are normalised; False leaves the pixels as `scale` makes them.
        """
        self.scale = scale
        self.per_channel = per_channel
        self.norm_pixels = norm_pixels

    def __call__(self, stored: Tensor) -> Tensor:
        """The targets of stored tokens: [B, M, V, C] to float32 [B, M, V * C]."""
        values = self._pixels(stored)
        if self.norm_pixels:
            mean, std = self._statistics(values)
            values = (values - mean) / std
        return values.flatten(2)

    def to_uint8(self, prediction: Tensor, stored: Tensor, data_scale: Normalise) -> dict[str, Tensor]:
        """Views of predictions by name.

        Args:
            prediction: [B, M, V * C].
            stored: the true tokens [B, M, V, C], which "oracle_denormalised" alone reads.
            data_scale: through which normalised predictions are shown in "prediction".

        Returns:
            uint8 [B, M, V, C]: "prediction" and, where tokens are normalised, "oracle_denormalised".
        """
        values = prediction.float().unflatten(2, stored.shape[2:])
        if not self.norm_pixels:
            return {"prediction": _to_uint8(self.scale, values)}
        mean, std = self._statistics(self._pixels(stored))
        return {
            "prediction": _to_uint8(data_scale, values),
            "oracle_denormalised": _to_uint8(self.scale, values * std + mean),
        }

    def _pixels(self, stored: Tensor) -> Tensor:
        """Stored tokens [B, M, V, C] on the target's scale, float32."""
        # `Normalise` reads channels in front of two axes.
        images = stored.flatten(0, 1).transpose(1, 2)[..., None]
        pixels: Tensor = self.scale(images)[..., 0].transpose(1, 2).unflatten(0, stored.shape[:2])
        return pixels

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation that broadcast over [B, M, V, C]."""
        if self.per_channel:
            return channel_statistics(values)
        mean, std = patch_statistics(values.flatten(2))
        return mean[..., None], std[..., None]


def channel_target(channels: int, norm_pixels: bool) -> ClipTarget:
    """VideoMAE's target (arXiv 2203.12602): pixels in [0, 1], as z-scores per channel of a tubelet."""
    return ClipTarget(Normalise((0.0,) * channels, (1.0,) * channels), per_channel=True, norm_pixels=norm_pixels)


def joint_target(mean: tuple[float, ...], std: tuple[float, ...], norm_pixels: bool) -> ClipTarget:
    """MAE-ST's target (arXiv 2205.09113): pixels as the model sees them, normalised over all values of a patch."""
    return ClipTarget(Normalise(mean, std), per_channel=False, norm_pixels=norm_pixels)


def normalise_clips(normalise: Normalise, clips: Tensor) -> Tensor:
    """Normalises stored clips [B, C, T, H, W] to float32 of the same shape.

    It goes over a view of their frames, so that memory of [B, T, H, W, C] (the loader's) is read as it lies.
    """
    frames = normalise(clips.transpose(1, 2).flatten(0, 1))  # [B * T, C, H, W]
    normalised: Tensor = frames.unflatten(0, (len(clips), -1)).transpose(1, 2)
    return normalised


def _to_uint8(scale: Normalise, values: Tensor) -> Tensor:
    """Shows values [B, M, V, C] on a scale as uint8 of the same shape."""
    images = values.flatten(0, 1).transpose(1, 2)[..., None]
    shown: Tensor = scale.to_uint8(images)[..., 0].transpose(1, 2).unflatten(0, values.shape[:2])
    return shown
