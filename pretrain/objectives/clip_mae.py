"""Masked autoencoding of video clips: what one step computes, whatever the method.

Enters: batches of stored (uint8) clips, several of each video, with the videos' global sample positions. Leaves: the
loss on hidden tokens, and pictures. The methods (mae_st, video_mae, video_mae_v2) hand in their masks and their target.
Legend: B videos, R repeats (clips of a video), N tokens of a clip, M predicted tokens, V values of a token per channel,
C channels, T frames, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.losses.clips import from_tubelets, predicted_frames, tubelets
from pretrain.models.normalise import Normalise
from pretrain.models.statistics import shown_channels
from pretrain.models.video_mae import VideoMAE, VideoMAEOutput, video_mae_flops
from pretrain.models.video_masking import ClipMask
from pretrain.models.video_vit import VideoViT
from pretrain.objectives.base import Turn
from pretrain.objectives.clip_target import ClipTarget, normalise_clips
from pretrain.objectives.mae_config import ClipMAEConfig
from pretrain.objectives.masked_autoencoder import VALIDATION_SEED, MaskedAutoencoderObjective

if TYPE_CHECKING:
    from data_pipes.batch import Batch

GREY = 128
"""What hidden tokens are shown as, of 255."""
SHOWN_FRAMES = 4
"""At most this many frames of a clip in a picture."""

MakeMasks = Callable[[Tensor, int, int], ClipMask]
"""Makes the masks of [B * R] clips of (positions int64 [B], repeats R, seed)."""


class ClipMAEObjective(MaskedAutoencoderObjective):
    """One player, "model": a `VideoMAE`, called as `players["model"](clips, mask, target) -> VideoMAEOutput`."""

    def __init__(
        self,
        config: ClipMAEConfig,
        seed: int,
        *,
        make_masks: MakeMasks,
        target: ClipTarget,
        num_kept: int,
        num_predicted: int,
    ) -> None:
        """Builds the autoencoder on the current default device.

        Args:
            config: the autoencoder, and the statistics of its videos.
            seed: of the training masks, together with each video's position and a clip's repeat number.
            make_masks: the method's masks.
            target: what the method predicts.
            num_kept: tokens of a clip that the encoder sees.
            num_predicted: tokens of a clip that the decoder predicts.
        """
        super().__init__(VideoMAE(config.model), Normalise(config.mean, config.std), seed)
        self.config = config
        self.make_masks = make_masks
        self.target = target
        self._flops_per_clip = video_mae_flops(config.model, num_kept, num_predicted)
        encoder = config.model.encoder
        self._frames = predicted_frames(encoder.num_frames, config.model.num_predicted_frames)

    def turns(self, batch: Batch, step: int) -> Iterator[Turn]:
        if batch.images.shape[1] != self.repeats:
            raise ValueError(
                f"The batch has {batch.images.shape[1]} clips of each video and objective.repeats is "
                f"{self.repeats}; set objective.repeats and data.video.repeats to the same number."
            )
        output, _ = self._forward(batch.images, batch.positions, self.seed)
        yield Turn(output.loss, "model", {"loss": output.loss.detach()})

    @torch.no_grad()
    def validate(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"loss": self._forward(batch.images, batch.positions, VALIDATION_SEED)[0].loss}

    @torch.no_grad()
    def films(self, batch: Batch) -> dict[str, Tensor]:
        """The first clip of each video and what the model makes of it, in the frames that the method predicts.

        "input" is these frames, "masked" has the hidden tokens in grey. "prediction" has the model's output in the
        hidden tokens that it predicts, grey in those that it does not (VideoMAE v2), and the frames themselves
        elsewhere. With `norm_pixels` the model predicts each token's contrast and not its brightness, so this honest
        view is grey on average where tokens were hidden. "oracle_denormalised" (only with `norm_pixels`) is the same
        with each token's true mean and deviation put back, which the model was not given.

        Args:
            batch: of stored clips.

        Returns:
            Views by name, uint8 [B, T, 1 or 3, H, W] on the CPU, where T are the predicted frames.
        """
        clips = batch.images[:, :1]
        output, mask = self._forward(clips, batch.positions, VALIDATION_SEED)
        values = self._values(clips.flatten(0, 1))  # [B, N, V, C], stored
        shown = self.target.to_uint8(output.prediction, self._gather(values, mask.predict_ids), self.normalise)
        masked = values.masked_fill(mask.hidden(values.shape[1])[..., None, None], GREY)
        views = {"input": values, "masked": masked}
        for name, predicted in shown.items():
            ids = mask.predict_ids[..., None, None].expand_as(predicted)
            seen = masked.gather(1, ids)
            views[name] = masked.scatter(1, ids, torch.where(mask.counted[..., None, None], predicted, seen))
        return {name: self._film(view) for name, view in views.items()}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The views of `films` with up to four frames of each clip side by side: uint8 [B, 1 or 3, H, frames * W]."""
        films = self.films(batch)
        frames = predicted_frames(len(self._frames), min(SHOWN_FRAMES, len(self._frames)))
        return {name: film[:, frames].permute(0, 2, 3, 1, 4).flatten(3) for name, film in films.items()}

    def flops_per_sample(self) -> float:
        """Model FLOPs of forward and backward for one video, with all its clips."""
        return self.repeats * self._flops_per_clip

    def build_backbone(self) -> VideoViT:
        with torch.device("cpu"):
            return VideoViT(self.config.model.encoder)

    @property
    def num_frames(self) -> int:
        """Frames of a clip that `turns` expects."""
        return self.config.model.encoder.num_frames

    @property
    def repeats(self) -> int:
        """R, clips of each video that `turns` expects."""
        return self.config.repeats

    def _forward(self, images: Tensor, positions: Tensor, seed: int) -> tuple[VideoMAEOutput, ClipMask]:
        """Predicts the hidden tokens of each clip.

        Args:
            images: uint8 [B, R, C, T, H, W] as stored. The repeats become clips of their own: [B * R, C, T, H, W].
            positions: int64 [B], global sample positions of the videos.
            seed: of the masks.

        Returns:
            What the model gives for the [B * R] clips, and their masks.

        Raises:
            ValueError: the clips do not have the configured shape.
        """
        expected = (self.in_channels, self.num_frames, *self.image_size)
        if images.ndim != 6 or images.shape[2:] != expected:
            raise ValueError(
                f"The clips have shape {list(images.shape)}; expected [videos, repeats, "
                f"{', '.join(map(str, expected))}] (channels, frames, height, width). Make data.video and the model's "
                "encoder agree."
            )
        clips, mask = images.flatten(0, 1), self.make_masks(positions, images.shape[1], seed)
        target = self.target(self._gather(self._values(clips), mask.predict_ids))
        output: VideoMAEOutput = self.players["model"](normalise_clips(self.normalise, clips), mask, target)
        return output, mask

    def _values(self, clips: Tensor) -> Tensor:
        """Cuts the predicted frames of stored clips [B * R, C, T, H, W] into stored tokens [B * R, N, V, C]."""
        if len(self._frames) < clips.shape[2]:  # slices: a list as an index would be copied to a GPU in every step
            clips = torch.stack([clips[:, :, frame] for frame in self._frames], dim=2)
        return tubelets(clips, self.config.model.target_size)

    @staticmethod
    def _gather(values: Tensor, ids: Tensor) -> Tensor:
        """The tokens [B * R, N, V, C] with the given ids [B * R, M]: [B * R, M, V, C]."""
        return values.gather(1, ids[..., None, None].expand(-1, -1, *values.shape[2:]))

    def _film(self, values: Tensor) -> Tensor:
        """Puts tokens uint8 [B, N, V, C] together to clips [B, T, 1 or 3, H, W] on the CPU."""
        clips = from_tubelets(values, self.config.model.encoder.grid_size, self.config.model.target_size)
        return clips[:, : shown_channels(self.in_channels)].transpose(1, 2).cpu()
