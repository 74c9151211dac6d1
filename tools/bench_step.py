"""Time one training step of our masked autoencoder against transformers' `ViTMAEForPreTraining` at equal shapes.

A step is mask noise, forward, backward and AdamW (the same fused kernel for both) on random images that already lie on
the device. The two run interleaved in one process, in rounds that swap the order, and the medians over all rounds are
compared, so that a noisy machine disturbs both alike. On a CPU that others use too, read the processor time (`cpu_s`)
with `--threads 1`: the turns of other processes do not lengthen it.

    python tools/bench_step.py --size base --batch 8 --precision fp32
    python tools/bench_step.py --size large --batch 256 --precision bf16 --device cuda --compile --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.models.config import VIT_SIZES, MAEConfig, vit_config
from pretrain.models.mae import MAE, MAEOutput, mae_flops
from pretrain.models.masking import position_noise

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 peak by a part of the device's name, in FLOP/s."""

Step = Callable[[], Tensor]


class Seconds(NamedTuple):
    """How long one step took."""

    wall: float
    cpu: float
    """Processor time of all this process's threads; where the device is a GPU, of the host alone."""


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = MAEConfig(vit_config(arguments.size, arguments.image_size))
    images = torch.randn(arguments.batch, 3, *config.encoder.image_size, device=device)
    steps = {
        "tessera": our_step(config, images, arguments.precision, arguments.compile),
        "transformers": their_step(config, images, arguments.precision, arguments.compile and arguments.compile_both),
    }
    times = interleave(steps, arguments.rounds, arguments.steps, device)
    result = summarise(times, config, arguments, device)
    print(json.dumps(result) if arguments.json else describe(result))
    if arguments.require_ratio is not None and result["speedup"] < arguments.require_ratio:
        print(f"The speed-up is {result['speedup']:.3f}, below {arguments.require_ratio}.", file=sys.stderr)
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(VIT_SIZES), default="base", help="encoder (decoder 512 wide, 8 deep)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast, for both")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each model per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each times both models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--compile", action="store_true", help="compile our blocks one by one, as training does")
    parser.add_argument("--compile-both", action="store_true", help="with --compile: compile their layers too")
    parser.add_argument("--require-ratio", type=float, help="exit 1 if our speed-up is below this")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    return parser.parse_args()


def our_step(config: MAEConfig, images: Tensor, precision: str, compile_blocks: bool) -> Step:
    """One step of ours; the masks of successive steps differ, as in training."""
    with images.device:
        model = MAE(config).train()
    if compile_blocks:
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.compile(fullgraph=True)
    positions = torch.arange(len(images), device=images.device)

    def loss() -> Tensor:
        positions.add_(len(images))
        output: MAEOutput = model(images, position_noise(positions, config.encoder.num_patches, 0))
        return output.loss

    return training_step(model, loss, precision)


def their_step(config: MAEConfig, images: Tensor, precision: str, compile_layers: bool) -> Step:
    """One step of transformers' model with the same shapes, its own noise, and SDPA attention (its default)."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    encoder = config.encoder
    with images.device:
        model = ViTMAEForPreTraining(
            ViTMAEConfig(
                image_size=encoder.image_size[0],
                patch_size=encoder.patch_size[0],
                num_channels=encoder.in_channels,
                hidden_size=encoder.width,
                num_hidden_layers=encoder.depth,
                num_attention_heads=encoder.heads,
                intermediate_size=int(encoder.width * encoder.mlp_ratio),
                decoder_hidden_size=config.decoder_width,
                decoder_num_hidden_layers=config.decoder_depth,
                decoder_num_attention_heads=config.decoder_heads,
                decoder_intermediate_size=int(config.decoder_width * encoder.mlp_ratio),
                mask_ratio=config.mask_ratio,
                norm_pix_loss=config.norm_pixels,
                layer_norm_eps=1e-6,
            )
        ).train()
    if compile_layers:
        for layer in (*model.vit.layers, *model.decoder.decoder_layers):
            layer.compile(fullgraph=True)
    return training_step(model, lambda: model(images).loss, precision)


def training_step(model: nn.Module, loss: Callable[[], Tensor], precision: str) -> Step:
    """Forward, backward and AdamW with the settings of the paper."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    device_type = parameters[0].device.type

    def step() -> Tensor:
        optimizer.zero_grad()
        autocast: AbstractContextManager[object] = (
            torch.autocast(device_type, torch.bfloat16) if precision == "bf16" else nullcontext()
        )
        with autocast:
            value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def interleave(
    steps: dict[str, Step], rounds: int, steps_per_round: int, device: torch.device
) -> dict[str, list[Seconds]]:
    """Times of each step by model. Untimed steps come first (allocation, compilation), on a GPU in every round."""
    times: dict[str, list[Seconds]] = {name: [] for name in steps}
    for name in steps:
        for _ in range(3 if device.type == "cuda" else 1):
            steps[name]()
    for round_index in range(rounds):
        for name in list(steps) if round_index % 2 == 0 else reversed(list(steps)):
            if device.type == "cuda":
                steps[name]()
            for _ in range(steps_per_round):
                synchronise(device)
                start, start_cpu = time.perf_counter(), time.process_time()
                value = steps[name]()
                synchronise(device)
                times[name].append(Seconds(time.perf_counter() - start, time.process_time() - start_cpu))
            if not value.isfinite():
                raise RuntimeError(f"The loss of {name} is {value.item()}: its times mean nothing.")
    return times


def synchronise(device: torch.device) -> None:
    """Wait for the device's queue; the CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarise(
    times: dict[str, list[Seconds]], config: MAEConfig, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Medians, images/s and, where the device's peak is known, MFU in bf16; both models count the same model FLOPs."""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak_flops = next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)
    models: dict[str, dict[str, float]] = {}
    for name, steps in times.items():
        median_s = statistics.median(step.wall for step in steps)
        flops_per_s = mae_flops(config) * arguments.batch / median_s
        models[name] = {
            "median_s": median_s,
            "fastest_s": min(step.wall for step in steps),
            "cpu_s": statistics.median(step.cpu for step in steps),
            "images_per_s": arguments.batch / median_s,
            "tflops_per_s": flops_per_s / 1e12,
        }
        if peak_flops is not None and arguments.precision == "bf16":
            models[name]["mfu"] = flops_per_s / peak_flops
    settings = ("size", "image_size", "batch", "precision", "compile", "compile_both", "rounds", "steps")
    return {
        "device": device_name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{name: getattr(arguments, name) for name in settings},
        "gflops_per_image": mae_flops(config) / 1e9,
        **models,
        "speedup": models["transformers"]["median_s"] / models["tessera"]["median_s"],
        "speedup_fastest": models["transformers"]["fastest_s"] / models["tessera"]["fastest_s"],
        "speedup_cpu_time": models["transformers"]["cpu_s"] / models["tessera"]["cpu_s"],
    }


def describe(result: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = ["{size}/{image_size}, batch {batch}, {precision}, {device}, compile {compile}".format(**result)]
    for name in ("tessera", "transformers"):
        figures = result[name]
        mfu = f", MFU {100 * figures['mfu']:.1f}%" if "mfu" in figures else ""
        lines.append(
            f"{name:>14}: {figures['median_s'] * 1e3:9.1f} ms (fastest {figures['fastest_s'] * 1e3:.1f}, "
            f"processor {figures['cpu_s'] * 1e3:.1f}), {figures['images_per_s']:8.1f} images/s, "
            f"{figures['tflops_per_s']:.3f} TFLOP/s{mfu}"
        )
    lines.append(
        f"{'speed-up':>14}: {result['speedup']:.3f} (medians), {result['speedup_fastest']:.3f} (fastest), "
        f"{result['speedup_cpu_time']:.3f} (processor time)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
