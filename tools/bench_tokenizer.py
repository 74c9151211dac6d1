"""Time one training step of our DC-AE: against diffusers' `AutoencoderDC`, or the phases against full training.

A step is forward, L1 loss, backward through encoder and decoder, and AdamW (the same fused kernel for all). Variants
run interleaved in one process, in rounds that swap the order, and the medians over all rounds are compared, so that a
noisy machine disturbs all alike. On a CPU that others use too, read the processor time (`cpu_s`) with `--threads 1`.

Without --phases: both models have the same shapes, weights and images; theirs runs as it is shipped.
With --phases: the objective's own turns, without LPIPS, on stored images.
  full           phase 1: everything is trained
  latent         phase 2: the two convolutions beside the latent; latent+stage: and the stages beside those
  head           phase 3 without its discriminator: the convolution to pixels; head+stage: and the stage beside it
  head+gan       phase 3 with it: the generator's loss, and a step of the discriminator, whose width shrinks with the
                 autoencoder's first
Their memory is that of one eager step beside the weights, in bytes of tensors: what the forward pass keeps
(`kept_mb`), AdamW's moments (`optimizer_mb`), and the highest sum of both and of everything else (`peak_mb`).

    python tools/bench_tokenizer.py --widths 32 64 128 128 256 256 --image-size 128 --threads 1
    python tools/bench_tokenizer.py --widths 32 64 128 128 256 256 --image-size 128 --threads 1 --precision bf16
    python tools/bench_tokenizer.py --widths 32 64 128 128 256 256 --image-size 128 --threads 1 --phases
    python tools/bench_tokenizer.py --preset f32c32 --batch 16 --precision bf16 --device cuda --compile --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from bench_step import Seconds, Step, interleave, training_step
from torch import Tensor, nn

from data_pipes.batch import Batch
from pretrain.losses.config import AdversarialConfig
from pretrain.memory.simulate import LiveBytes
from pretrain.metrics import peak_flops
from pretrain.models.tokenizers.autoencoder import AutoencoderOutput
from pretrain.models.tokenizers.config import DiscriminatorConfig
from pretrain.models.tokenizers.dc_ae import DCAE, dc_ae_flops
from pretrain.models.tokenizers.dc_ae_config import DCAE_PRESETS, DCAEConfig, dc_ae_config
from pretrain.objectives.tokenizer import TokenizerObjective
from pretrain.objectives.tokenizer_config import TRAINED_PARTS, TokenizerConfig
from pretrain.weights.dc_ae_names import diffusers_config, to_diffusers

PHASES = ("full", "latent", "latent+stage", "head", "head+stage", "head+gan")
GAN_WEIGHT = 0.5


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    changes = {"widths": tuple(arguments.widths)} if arguments.widths else {}
    config = dc_ae_config(arguments.preset, **changes)
    shape = (arguments.batch, config.in_channels, arguments.image_size, arguments.image_size)
    stored = torch.randint(256, shape, dtype=torch.uint8, device=device)
    if arguments.phases:
        objectives = {phase: make_objective(phase, config, arguments.image_size, device) for phase in PHASES}
        memory = {phase: step_memory(objective, stored, arguments) for phase, objective in objectives.items()}
        steps = {phase: phase_step(objective, stored, arguments) for phase, objective in objectives.items()}
        flops = {phase: objective.flops_per_sample() for phase, objective in objectives.items()}
    else:
        memory = {}
        steps = both_steps(config, stored, arguments)
        flops = dict.fromkeys(steps, dc_ae_flops(config, shape[2:], TRAINED_PARTS["all"]))
    times = interleave(steps, arguments.rounds, arguments.steps, device)
    result = summarise(times, flops, memory, arguments, device)
    print(json.dumps(result) if arguments.json else describe(result))
    ratio = result["ratios"].get("diffusers", {}).get("wall")
    if arguments.require_ratio is not None and (ratio is None or ratio < arguments.require_ratio):
        print(f"The speed-up over diffusers is {ratio}, expected {arguments.require_ratio}.", file=sys.stderr)
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(DCAE_PRESETS), default="f32c32", help="depths, blocks and widths")
    parser.add_argument("--widths", nargs="+", type=int, help="other channels per stage; the depths stay the preset's")
    parser.add_argument("--image-size", type=int, default=256, help="side of the images, in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images per step")
    parser.add_argument("--phases", action="store_true", help="time the phases against full training")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast, for all")
    parser.add_argument("--steps", type=int, default=1, help="timed steps of each variant per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each times all variants")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--compile", action="store_true", help="compile our blocks one by one, as training does")
    parser.add_argument("--compile-both", action="store_true", help="with --compile: compile their blocks too")
    parser.add_argument("--require-ratio", type=float, help="exit 1 if our speed-up over diffusers is below this")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    return parser.parse_args()


# -- against diffusers -----------------------------------------------------------------------------------------------


def both_steps(config: DCAEConfig, stored: Tensor, arguments: argparse.Namespace) -> dict[str, Step]:
    """A step of ours and one of theirs, which start with the same weights."""
    from diffusers import AutoencoderDC

    with stored.device:
        ours, theirs = DCAE(config).train(), AutoencoderDC(**diffusers_config(config)).train()
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    compile_blocks(ours.blocks() if arguments.compile else [])
    if arguments.compile and arguments.compile_both:
        stages = (*theirs.encoder.down_blocks, *theirs.decoder.up_blocks)
        compile_blocks([block for stage in stages for block in stage.children()])
    images = stored / 127.5 - 1.0

    def our_loss() -> Tensor:
        output: AutoencoderOutput = ours(images)
        return (output.reconstruction.float() - images).abs().mean()

    def their_loss() -> Tensor:
        decoded: Tensor = theirs.decode(theirs.encode(images).latent).sample
        return (decoded.float() - images).abs().mean()

    losses: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "tessera": (ours, our_loss),
        "diffusers": (theirs, their_loss),
    }
    return {name: training_step(model, loss, arguments.precision) for name, (model, loss) in losses.items()}


def compile_blocks(blocks: list[nn.Module]) -> None:
    for block in blocks:
        block.compile(fullgraph=True)


# -- phases ----------------------------------------------------------------------------------------------------------


def make_objective(phase: str, config: DCAEConfig, side: int, device: torch.device) -> TokenizerObjective:
    """What a phase trains, on the device."""
    part = phase.removesuffix("+gan").replace("full", "all")
    judge = DiscriminatorConfig(width=max(1, 64 * config.widths[0] // DCAE_PRESETS["f32c32"].widths[0]))
    game = AdversarialConfig(weight=GAN_WEIGHT if phase.endswith("+gan") else 0.0)
    with device:
        chosen = TokenizerConfig(config, (side, side), (part,), adversarial=game, discriminator=judge)
        objective = TokenizerObjective(chosen, seed=0)
    for player in objective.players.values():
        player.train()
    return objective


class PhaseStep:
    """All turns of an objective on one batch, each followed by its player's optimizer."""

    def __init__(self, objective: TokenizerObjective, stored: Tensor, precision: str) -> None:
        """stored: uint8 [B, C, H, W]."""
        positions = torch.arange(len(stored), device=stored.device)
        self.objective = objective
        self.batch = Batch(stored, torch.full_like(positions, -1), positions, [""] * len(stored))
        self.precision = precision
        self.optimizers = {
            name: torch.optim.AdamW([p for p in player.parameters() if p.requires_grad], lr=1e-4, fused=True)
            for name, player in objective.players.items()
        }

    def __call__(self, after_forward: Callable[[], None] = lambda: None) -> Tensor:
        """Returns the autoencoder's loss. after_forward: called before each turn's backward pass."""
        losses: dict[str, Tensor] = {}
        turns = self.objective.turns(self.batch, 0)
        while True:
            autocast: AbstractContextManager[object] = (
                torch.autocast(self.batch.images.device.type, torch.bfloat16)
                if self.precision == "bf16"
                else nullcontext()
            )
            with autocast:
                turn = next(turns, None)
            if turn is None:
                return losses["autoencoder"]
            after_forward()
            turn.loss.backward()
            self.optimizers[turn.player].step()
            self.optimizers[turn.player].zero_grad()
            losses[turn.player] = turn.loss.detach()


def phase_step(objective: TokenizerObjective, stored: Tensor, arguments: argparse.Namespace) -> Step:
    """A timed step; blocks are compiled here, after the memory was measured."""
    compile_blocks(objective.blocks("autoencoder") if arguments.compile else [])
    return PhaseStep(objective, stored, arguments.precision)


def step_memory(objective: TokenizerObjective, stored: Tensor, arguments: argparse.Namespace) -> dict[str, float]:
    """Of a second step, whose optimizers have their moments already; in MB."""
    step = PhaseStep(objective, stored, arguments.precision)
    step()
    states = [state for optimizer in step.optimizers.values() for state in optimizer.state.values()]
    moments = sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))
    kept = [0]
    with LiveBytes() as live:
        known = [t for player in objective.players.values() for t in (*player.parameters(), *player.buffers())]
        live.ignore([stored, step.batch.positions, *known])
        live.ignore([t for state in states for t in state.values() if isinstance(t, Tensor)])
        step(lambda: kept.append(live.now))
    return {"kept_mb": max(kept) / 1e6, "optimizer_mb": moments / 1e6, "peak_mb": (live.peak + moments) / 1e6}


# -- figures ---------------------------------------------------------------------------------------------------------


def summarise(
    times: dict[str, list[Seconds]],
    flops: dict[str, float],
    memory: dict[str, dict[str, float]],
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Medians, images/s, MFU by the autoencoder's model FLOPs, and each variant's time divided by that of the first."""
    peak = peak_flops(device, bf16=arguments.precision == "bf16")
    variants: dict[str, dict[str, float]] = {}
    for name, steps in times.items():
        median_s = statistics.median(step.wall for step in steps)
        variants[name] = {
            "median_s": median_s,
            "cpu_s": statistics.median(step.cpu for step in steps),
            "images_per_s": arguments.batch / median_s,
            "gflops_per_image": flops[name] / 1e9,
            "mfu": flops[name] * arguments.batch / median_s / peak.flops_per_s,
            **memory.get(name, {}),
        }
    first, *others = variants
    settings = ("preset", "widths", "image_size", "batch", "precision", "compile", "compile_both", "rounds", "steps")
    sources = {"wall": "median_s", "cpu": "cpu_s", "flops": "gflops_per_image"}
    sources |= {"kept": "kept_mb", "peak": "peak_mb"} if memory else {}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "mfu_of": peak.source,
        **{name: getattr(arguments, name) for name in settings},
        "variants": variants,
        "ratios": {
            name: {short: variants[name][key] / variants[first][key] for short, key in sources.items()}
            for name in others
        },
    }


def describe(result: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = [
        "{preset}, widths {widths}, {batch} x {image_size}^2, {precision}, {device}, {threads} threads, compile "
        "{compile}".format(**{**result, "widths": result["widths"] or "of the preset"})
    ]
    for name, figures in result["variants"].items():
        line = f"{name:>14}: {figures['median_s'] * 1e3:9.1f} ms (processor {figures['cpu_s'] * 1e3:9.1f})"
        if "kept_mb" in figures:
            line += ", {kept_mb:8.1f} MB kept, {optimizer_mb:7.1f} MB of moments, {peak_mb:8.1f} MB peak".format(
                **figures
            )
        else:
            line += f", {figures['images_per_s']:8.2f} images/s, MFU {100 * figures['mfu']:.1f}%"
        if ratio := result["ratios"].get(name):
            line += f"; of the first {ratio['wall']:.3f} (processor {ratio['cpu']:.3f}, FLOPs {ratio['flops']:.2f})"
        lines.append(line)
    return "\n".join([*lines, f"MFU: {result['mfu_of']}"])


if __name__ == "__main__":
    main()
