"""Repeat two claims of DC-AE (arXiv 2410.10733) in small, on photographs, with runs of the trainer itself.

shortcuts   Residual shortcuts around every change of resolution make high compression trainable. At f16 and f32, with
            latents of equally many values, two models of equally many parameters learn for equally many steps, one with
            the shortcuts and one without; their PSNR on held-out photographs over the steps.
phases      A tokenizer trained at low resolution is worse at high resolution than it has to be. Phase 1 (all of it, at
            low resolution) alone, phase 2 after it (what lies beside the latent, at high resolution), phase 3 after
            that (the head with a discriminator, at low resolution), and, for comparison, phase 1 for as many steps more
            as phases 2 and 3 have together; PSNR and a proxy of LPIPS on held-out photographs at both resolutions.

The loss is L1 (with the game in phase 3), without LPIPS, whose weights would need a download. The proxy is LPIPS'
formula on AlexNet's layers with random weights and equal weightings: it sees structure at several scales, and is no
figure to compare with published LPIPS. A run that is complete in OUT is not repeated; a broken one goes on.

    tessera pack photos.zip data/photos --val-fraction 0.2 --short-side 160
    python tools/learn_tokenizer.py data/photos runs/learn_tokenizer
    python tools/learn_tokenizer.py data/photos runs/learn_tokenizer --experiments phases --first-steps 2000 --json
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from data_pipes.sequential.pictures import SequentialImages
from data_pipes.transforms.image import EvalTransform
from pretrain.config import load_config
from pretrain.losses.perceptual import LPIPS
from pretrain.losses.reconstruction import psnr
from pretrain.models.normalise import Normalise
from pretrain.tracking.journal import read_metrics
from pretrain.train import train
from pretrain.weights.tokenizer import load_tokenizer

EXPERIMENTS = ("shortcuts", "phases")
WIDTHS = (8, 16, 32, 64, 128, 128)
BLOCKS = ("res", "res", "res", "res", "attention", "attention")
NORMS = ("batch", "batch", "batch", "rms", "rms", "rms")
LATENT_VALUES_PER_PIXEL = 1 / 8
"""At every factor: f16 has 32 channels, f32 128."""
MEASURE_BATCH = 16


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    begin_s = time.perf_counter()
    result: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(arguments).items()}}
    if "shortcuts" in arguments.experiments:
        result["shortcuts"] = compare_shortcuts(arguments)
    if "phases" in arguments.experiments:
        result["phases"] = compare_phases(arguments)
    result["minutes"] = round((time.perf_counter() - begin_s) / 60, 1)
    print(json.dumps(result) if arguments.json else describe(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="packed photographs: a folder with train/ and val/")
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--factors", nargs="+", type=int, choices=(8, 16, 32), default=[16, 32], help="of `shortcuts`")
    parser.add_argument("--phase-factor", type=int, choices=(8, 16, 32), default=16, help="of `phases`")
    parser.add_argument("--low", type=int, default=64, help="pixels of a side, low resolution")
    parser.add_argument("--high", type=int, default=128, help="pixels of a side, high resolution and `shortcuts`")
    parser.add_argument("--steps", type=int, default=400, help="of each run of `shortcuts`")
    parser.add_argument("--first-steps", type=int, default=800, help="of phase 1")
    parser.add_argument("--later-steps", type=int, default=200, help="of phase 2, and of phase 3")
    parser.add_argument("--batch", type=int, default=16, help="photographs per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the first phase; the later ones have a quarter")
    parser.add_argument("--gan-weight", type=float, default=0.005, help="of the generator's loss in phase 3")
    parser.add_argument("--points", type=int, default=8, help="validations during a run")
    parser.add_argument("--seed", type=int, default=0, help="of weights and of the order of the data")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    return parser.parse_args()


# -- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One run."""

    name: str
    """Its folder."""
    factor: int
    """Pixels per latent pixel, in each direction."""
    size: int
    """Pixels of the photographs' sides."""
    steps: int
    """Optimizer steps."""
    lr: float
    """Peak learning rate."""
    changes: dict[str, Any]
    """Further keys of the objective."""
    shortcuts: bool = True
    """Whether the model has residual shortcuts."""


def model_of(factor: int, shortcuts: bool) -> dict[str, Any]:
    """`objective.model`: one block per stage but the first, laid out as DC-AE's. Shortcuts have no parameters."""
    stages = factor.bit_length()
    depths = [0] + [1] * (stages - 1)
    return {
        "latent_channels": round(factor**2 * LATENT_VALUES_PER_PIXEL),
        "widths": list(WIDTHS[:stages]),
        "encoder_depths": depths,
        "decoder_depths": depths,
        "blocks": list(BLOCKS[:stages]),
        "decoder_norms": list(NORMS[:stages]),
        "shortcuts": shortcuts,
        "latent_shortcuts": shortcuts,
    }


def train_run(plan: Plan, arguments: argparse.Namespace) -> Path:
    """Trains, or continues, one run of the trainer; returns its folder."""
    config = {
        "name": plan.name,
        "output_dir": str(arguments.out),
        "seed": arguments.seed,
        "data": {
            "train": str(arguments.data / "train"),
            "val": str(arguments.data / "val"),
            "crop_scale": [0.5, 1.0],
            "workers": 1,
        },
        "objective": {
            "name": "tokenizer",
            "model": model_of(plan.factor, plan.shortcuts),
            "image_size": [plan.size, plan.size],
            **plan.changes,
        },
        "optim": {
            "base_lr": None,
            "lr": plan.lr,
            "betas": [0.9, 0.99],
            "weight_decay": 0.01,
            "warmup_steps": plan.steps // 20,
            "clip_norm": 1.0,
        },
        "train": {
            "global_batch": arguments.batch,
            "steps": plan.steps,
            "log_every": 20,
            "val_every": max(1, plan.steps // arguments.points),
            "val_samples": 0,
        },
        "tracking": {"ship": False},
    }
    path = arguments.out / f"{plan.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    run = load_config(path)
    summary = train(run, config_path=path)
    if summary["status"] != "finished":
        raise SystemExit(f"{plan.name} was stopped at step {summary['step']}; start the same command to go on.")
    return run.run_dir


def compare_shortcuts(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """PSNR curves at the high resolution, with and without shortcuts."""
    found = []
    for factor in arguments.factors:
        for shortcuts in (True, False):
            name = f"f{factor}-{'with' if shortcuts else 'without'}-shortcuts"
            plan = Plan(name, factor, arguments.high, arguments.steps, arguments.lr, {}, shortcuts)
            run = train_run(plan, arguments)
            model = load_tokenizer(run).model
            curve = {point.step: round(point.value, 2) for point in read_metrics(run)["val/psnr"]}
            found.append(
                {
                    "factor": factor,
                    "shortcuts": shortcuts,
                    "parameters": sum(parameter.numel() for parameter in model.parameters()),
                    "psnr": curve,
                }
            )
    return found


def compare_phases(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Held-out figures after each phase, at both resolutions."""
    factor, low, high, later = arguments.phase_factor, arguments.low, arguments.high, arguments.later_steps
    start = {number: {"init_from": str(arguments.out / f"phase{number}")} for number in (1, 2)}
    game = {
        "adversarial": {"weight": arguments.gan_weight, "warmup_steps": later // 4, "ramp_steps": later // 4},
        "discriminator": {"width": 16, "layers": 2},
    }
    slow = arguments.lr / 4
    plans = {
        "phase 1": Plan("phase1", factor, low, arguments.first_steps, arguments.lr, {}),
        "phases 1 and 2": Plan("phase2", factor, high, later, slow, {**start[1], "trained": ["latent"]}),
        "phases 1, 2 and 3": Plan("phase3", factor, low, later, slow, {**start[2], "trained": ["head"], **game}),
        "phase 1, for longer": Plan("phase1-longer", factor, low, 2 * later, slow, start[1]),
    }
    found = []
    for trained, plan in plans.items():
        run = train_run(plan, arguments)
        found.append({"trained": trained} | {str(side): measure(run, side, arguments) for side in (low, high)})
    return found


# -- figures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(run: Path, side: int, arguments: argparse.Namespace) -> dict[str, float]:
    """PSNR in dB and the proxy of a run's tokenizer: means over the held-out photographs at side x side pixels."""
    tokenizer = load_tokenizer(run)
    model: Any = tokenizer.model
    normalise, proxy = Normalise(tokenizer.mean, tokenizer.std), random_lpips()
    samples = SequentialImages(arguments.data / "val", EvalTransform((side, side)))
    sums = {"psnr": 0.0, "lpips_proxy": 0.0}
    for begin in range(0, len(samples), MEASURE_BATCH):
        indices = range(begin, min(begin + MEASURE_BATCH, len(samples)))
        images = torch.stack([samples[index][0] for index in indices])
        latent = model.encode(normalise(images))
        decoded = normalise.to_uint8(model.decode(latent, (side, side)))
        sums["psnr"] += float(psnr(decoded, images).sum())
        sums["lpips_proxy"] += float(proxy(decoded / 127.5 - 1.0, images / 127.5 - 1.0).sum())
    return {name: total / len(samples) for name, total in sums.items()}


def random_lpips() -> nn.Module:
    """LPIPS' formula on AlexNet's layers with random weights (He et al.'s scale), all channels weighted equally."""
    model = LPIPS("alex")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 4:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / parameter[0].numel()) ** 0.5)
            else:
                parameter.fill_(1.0 / len(parameter) if name.startswith("linear") else 0.0)
    return model


def describe(result: dict[str, Any]) -> str:
    """Markdown tables."""
    lines = []
    if curves := result.get("shortcuts"):
        steps = list(curves[0]["psnr"])
        lines += ["PSNR in dB on held-out photographs", ""]
        lines += ["| factor | shortcuts | parameters | " + " | ".join(f"step {step}" for step in steps) + " |"]
        lines += ["|---" * (3 + len(steps)) + "|"]
        for row in curves:
            values = " | ".join(f"{row['psnr'][step]:.2f}" for step in steps)
            lines.append(
                f"| {row['factor']} | {'yes' if row['shortcuts'] else 'no'} | {row['parameters']:,} | {values} |"
            )
        lines.append("")
    if phases := result.get("phases"):
        sides = [key for key in phases[0] if key != "trained"]
        lines.append("| trained | " + " | ".join(f"PSNR at {s} | LPIPS proxy at {s}" for s in sides) + " |")
        lines.append("|---" * (1 + 2 * len(sides)) + "|")
        for row in phases:
            values = " | ".join(f"{row[side]['psnr']:.2f} | {row[side]['lpips_proxy']:.4f}" for side in sides)
            lines.append(f"| {row['trained']} | {values} |")
        lines.append("")
    return "\n".join([*lines, f"{result['minutes']} minutes"])


if __name__ == "__main__":
    main()
