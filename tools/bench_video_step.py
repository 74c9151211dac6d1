"""Time one training step of our video autoencoders, against transformers' VideoMAE and against steps that mask less.

A step is masks, targets, forward, backward and AdamW (the same fused kernel for all) on random clips that already lie
on the device: as stored (uint8) for ours, which normalises them in the step, normalised for transformers. Variants run
interleaved in one process, in rounds that swap the order, and the medians over all rounds are compared, so that a noisy
machine disturbs all alike. On a CPU that others use too, read the processor time (`cpu_s`) with `--threads 1`.

  tessera        the method as published: VideoMAE (tube masks) or MAE-ST (masks in space and time)
  transformers   its `VideoMAEForPreTraining` at equal shapes, with masks from torch's generator
  unmasked       the encoder on all tokens; the decoder as in `tessera` (it sees all tokens at any mask ratio)
  dual           VideoMAE v2: the decoder predicts half of the tokens

    python tools/bench_video_step.py --size base --batch 1
    python tools/bench_video_step.py --size base --batch 1 --variants tessera transformers --precision bf16
    python tools/bench_video_step.py --method mae_st --size large --batch 32 --variants tessera unmasked --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import torch
from bench_step import PEAK_FLOPS, Seconds, Step, interleave, training_step
from torch import Tensor

from data_pipes.batch import Batch
from pretrain.export.transformers_arguments import transformers_arguments
from pretrain.models.video_config import DECODERS, VideoMAEConfig, video_mae_config
from pretrain.models.video_mae import VideoMAEOutput, video_mae_flops
from pretrain.models.video_masking import ClipMask
from pretrain.objectives.clip_mae import ClipMAEObjective
from pretrain.objectives.clip_target import normalise_clips
from pretrain.objectives.mae_config import MAESTConfig, VideoMAEObjectiveConfig, VideoMAEv2Config
from pretrain.objectives.mae_st import mae_st_objective
from pretrain.objectives.video_mae import video_mae_objective
from pretrain.objectives.video_mae_v2 import video_mae_v2_objective

VARIANTS = ("tessera", "transformers", "unmasked", "dual")


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = video_mae_config(arguments.method, arguments.size, arguments.frames, arguments.image_size)
    shape = (arguments.batch, 1, config.encoder.in_channels, *config.encoder.clip_size)
    stored = torch.randint(256, shape, dtype=torch.uint8, device=device)
    steps = {name: make_step(name, config, stored, arguments) for name in arguments.variants}
    times = interleave(steps, arguments.rounds, arguments.steps, device)
    result = summarise(times, config, arguments, device)
    print(json.dumps(result) if arguments.json else describe(result))
    ratio = result["ratios"].get("transformers", {}).get("wall")
    if arguments.require_ratio is not None and (ratio is None or ratio < arguments.require_ratio):
        print(f"The speed-up over transformers is {ratio}, expected {arguments.require_ratio}.", file=sys.stderr)
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="first: the reference")
    parser.add_argument("--method", choices=("video_mae", "mae_st"), default="video_mae", help="of `tessera`")
    parser.add_argument("--size", choices=sorted(DECODERS["video_mae"]), default="base", help="the papers' sizes")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--image-size", type=int, default=224, help="side of a frame, in pixels")
    parser.add_argument("--batch", type=int, default=1, help="clips per step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast, for all")
    parser.add_argument("--steps", type=int, default=1, help="timed steps of each variant per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each times all variants")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--compile", action="store_true", help="compile our blocks one by one, as training does")
    parser.add_argument("--require-ratio", type=float, help="exit 1 if our speed-up over transformers is below this")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    arguments = parser.parse_args()
    if arguments.method == "mae_st" and {"transformers", "dual"} & set(arguments.variants):
        parser.error("mae_st has no counterpart in transformers and no dual masks: --variants tessera unmasked")
    return arguments


def make_step(name: str, config: VideoMAEConfig, stored: Tensor, arguments: argparse.Namespace) -> Step:
    """stored: uint8 [B, 1, C, T, H, W]."""
    if name == "transformers":
        return their_step(config, stored, arguments.precision)
    with stored.device:
        objective = make_objective(name, config)
    if arguments.compile:
        for block in objective.blocks("model"):
            block.compile(fullgraph=True)
    if name == "unmasked":
        objective.players["model"] = Unmasked(objective)
    positions = torch.arange(len(stored), device=stored.device)
    batch = Batch(stored, torch.full_like(positions, -1), positions, [""] * len(stored))

    def loss() -> Tensor:
        positions.add_(len(stored))  # other masks in each step, as in training
        return next(iter(objective.turns(batch, 0))).loss

    return training_step(objective.model.train(), loss, arguments.precision)


def make_objective(name: str, config: VideoMAEConfig) -> ClipMAEObjective:
    """The method's objective with one clip of each video; v2's masks, on the same model, for "dual"."""
    if config.encoder.family == "mae_st":
        return mae_st_objective(MAESTConfig(model=config, repeats=1), 0)
    if name == "dual":
        return video_mae_v2_objective(VideoMAEv2Config(model=config, repeats=1), 0)
    return video_mae_objective(VideoMAEObjectiveConfig(model=config), 0)


class Unmasked(torch.nn.Module):
    """Calls a model's encoder with all tokens, and the rest as ever."""

    def __init__(self, objective: ClipMAEObjective) -> None:
        super().__init__()
        self.model = objective.model

    def forward(self, clips: Tensor, mask: ClipMask, target: Tensor) -> VideoMAEOutput:
        tokens = self.model.encoder(clips)[:, -self.model.config.encoder.num_tokens :]
        seen = tokens.gather(1, mask.keep_ids[..., None].expand(-1, -1, tokens.shape[-1]))
        prediction = self.model.decoder(seen, mask.keep_ids, mask.predict_ids)
        return VideoMAEOutput((prediction.float() - target).square().mean(), prediction)


def their_step(config: VideoMAEConfig, stored: Tensor, precision: str) -> Step:
    """One step of transformers' model with the same shapes, and SDPA attention (its default)."""
    from transformers import VideoMAEConfig as TheirConfig
    from transformers import VideoMAEForPreTraining

    objective = make_objective("tessera", config)
    with stored.device:
        model = VideoMAEForPreTraining(TheirConfig(**transformers_arguments(config, norm_pixels=True))).train()
    clips = normalise_clips(objective.normalise, stored.flatten(0, 1)).transpose(1, 2).contiguous()
    steps, places = config.encoder.grid_size[0], config.encoder.tokens_per_step
    num_hidden = int(0.9 * places)

    def loss() -> Tensor:
        hidden = torch.rand(len(clips), places, device=clips.device).argsort(1) < num_hidden
        output = model(clips, bool_masked_pos=hidden.repeat(1, steps))
        value: Tensor = output.loss
        return value

    return training_step(model, loss, precision)


def summarise(
    times: dict[str, list[Seconds]], config: VideoMAEConfig, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Medians, clips/s and each variant's time divided by that of the first; MFU of `tessera` in bf16."""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    medians = {
        name: {
            "median_s": statistics.median(step.wall for step in steps),
            "cpu_s": statistics.median(step.cpu for step in steps),
        }
        for name, steps in times.items()
    }
    first = arguments.variants[0]
    settings = ("method", "size", "frames", "image_size", "batch", "precision", "compile", "rounds", "steps")
    result: dict[str, Any] = {
        "device": device_name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{name: getattr(arguments, name) for name in settings},
        "variants": {
            name: {**median, "clips_per_s": arguments.batch / median["median_s"]} for name, median in medians.items()
        },
        "ratios": {
            name: {
                "wall": median["median_s"] / medians[first]["median_s"],
                "cpu": median["cpu_s"] / medians[first]["cpu_s"],
            }
            for name, median in medians.items()
            if name != first
        },
    }
    peak_flops = next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)
    if peak_flops is not None and arguments.precision == "bf16" and "tessera" in medians:
        kept = make_objective_config(config).num_kept
        flops = video_mae_flops(config, kept, config.encoder.num_tokens - kept) * arguments.batch
        result["variants"]["tessera"]["mfu"] = flops / medians["tessera"]["median_s"] / peak_flops
    return result


def make_objective_config(config: VideoMAEConfig) -> MAESTConfig | VideoMAEObjectiveConfig:
    """Of `tessera`."""
    return (MAESTConfig if config.encoder.family == "mae_st" else VideoMAEObjectiveConfig)(model=config)


def describe(result: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = [
        "{method} {size}, {batch} x {frames} x {image_size}^2, {precision}, {device}, {threads} threads, "
        "compile {compile}".format(**result)
    ]
    for name, figures in result["variants"].items():
        mfu = f", MFU {100 * figures['mfu']:.1f}%" if "mfu" in figures else ""
        ratio = result["ratios"].get(name)
        times = f", {ratio['wall']:.2f} x the first ({ratio['cpu']:.2f} in processor time)" if ratio else ""
        lines.append(
            f"{name:>14}: {figures['median_s']:8.3f} s (processor {figures['cpu_s']:.3f}), "
            f"{figures['clips_per_s']:.2f} clips/s{mfu}{times}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
