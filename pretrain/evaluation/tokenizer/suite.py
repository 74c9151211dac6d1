"""A suite of evaluations of a tokenizer from one YAML: each picture is encoded and decoded once for all tasks.

In: a loaded tokenizer and a `TokenizerSuiteConfig`. Out: one result record per task, of `results.make_record`: which
protocol with which settings, crop, resize and rounding on how many pictures gave which figures, and which weights (by
digest) they are about.

Over several processes each one takes every N-th picture, without padding: no picture is counted twice, and the
processes meet only at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from data_pipes.bounds import bounded
from data_pipes.sequential.pictures import SequentialImages
from pretrain.evaluation.encoder.features import extract
from pretrain.evaluation.encoder.linear import evaluate_linear
from pretrain.evaluation.encoder.subject import Report
from pretrain.evaluation.outcome import Outcome
from pretrain.evaluation.results import make_record
from pretrain.evaluation.settings import named_protocol, typed_settings
from pretrain.evaluation.tokenizer.data import TokenizerView, labelled_train, open_view
from pretrain.evaluation.tokenizer.latent_metrics import LatentProbeConfig, PooledLatents
from pretrain.evaluation.tokenizer.protocols import PROTOCOLS, Measured, TokenizerProtocol
from pretrain.evaluation.tokenizer.reconstruction_metrics import ReconstructionMeter
from pretrain.latents.coder import PictureCoder, Precision
from pretrain.models.normalise import Normalise
from pretrain.weights.tokenizer import LoadedTokenizer


@dataclass(frozen=True)
class TokenizerTaskConfig:
    """One task of a suite."""

    protocol: str = MISSING
    """a key of PROTOCOLS, an entry point of `tessera.protocols`, or an import path"""
    settings: dict[str, Any] = field(default_factory=dict)
    """fields of that protocol's config; the others keep their defaults"""


@dataclass(frozen=True)
class TokenizerSuiteConfig:
    """What is evaluated on which pictures."""

    test: str | None = None
    """data set of the pictures; null = the run's `data.val`"""
    train: str | None = None
    """labelled data set that the latents' probe is trained on; null = the run's `data.train`"""
    size: tuple[int, int] | None = bounded(None, least=1)
    """(height, width) of the centre crop in pixels; null = the run's image_size"""
    short_side: int | None = bounded(None, least=1)
    """of the resized picture before the crop (bicubic, antialias); null = the crop's longer side"""
    num_samples: int | None = bounded(None, least=1)
    """first so many pictures of the test set; null = all. The probe takes all"""
    batch_size: int = bounded(32, least=1)
    """pictures per process and forward pass"""
    workers: int = bounded(0, least=0)
    """decoding processes per process; 0 decodes in the process itself"""
    precision: Precision = "fp32"
    """of the tokenizer's forward pass"""
    channels: tuple[int, ...] = bounded((), least=0)
    """the 3 channels that LPIPS and Inception see as red, green and blue; empty: the first 3, or 1 three times"""
    skip: tuple[str, ...] = ()
    """names of tasks to leave out, e.g. those whose networks cannot be had"""
    tasks: dict[str, TokenizerTaskConfig] = field(default_factory=dict)
    """name -> task"""

    def __post_init__(self) -> None:
        unknown = [name for name in self.skip if name not in self.tasks]
        if unknown:
            raise ValueError(f"skip names {unknown[0]!r}; the suite's tasks are {', '.join(self.tasks)}")
        if len(set(self.skip)) == len(self.tasks):
            raise ValueError("no task is left: add for example tasks.psnr.protocol: psnr_uint8")
        if self.batch_size < 1 or self.workers < 0 or (self.num_samples or 1) < 1 or len(self.channels) not in (0, 3):
            raise ValueError(
                f"batch_size={self.batch_size}, workers={self.workers}, num_samples={self.num_samples}, "
                f"channels={list(self.channels)}: expected at least 1, 0 and 1, and 3 channels or none"
            )
        for name in self.tasks:
            self.task_settings(name)

    def task_settings(self, name: str) -> Any:
        """The settings of a task, as an instance of its protocol's dataclass.

        Raises:
            ValueError: as `settings.named_protocol` and `settings.typed_settings`.
        """
        return typed_settings(self.protocol(name).config, self.tasks[name].settings, f"tasks.{name}.settings")

    def protocol(self, name: str) -> TokenizerProtocol:
        """The protocol of a task.

        Raises:
            ValueError: as `settings.named_protocol`.
        """
        return named_protocol(
            name, self.tasks[name].protocol, PROTOCOLS, TokenizerProtocol, kinds="protocols of tokenizers"
        )


def evaluate_tokenizer(
    tokenizer: LoadedTokenizer, suite: TokenizerSuiteConfig, accelerator: Any, *, report: Report | None = None
) -> list[dict[str, Any]]:
    """Evaluates a tokenizer on every task of the suite that is not skipped.

    Args:
        tokenizer: on the CPU; it is moved to the accelerator's device.
        suite: what to evaluate.
        accelerator: of `features.make_accelerator`; all its processes call this.
        report: called now and then, see `Report`.

    Returns:
        One record per task, of `results.make_record`, on the main process; an empty list on the others.

    Raises:
        ValueError: data sets that are missing, unlabelled, or labelled with other classes; settings that do not apply;
            weights of metrics that cannot be had.
    """
    say = report or (lambda what, done, total: None)
    view = open_view(tokenizer, test=suite.test, train=suite.train, size=suite.size, short_side=suite.short_side)
    settings = {name: suite.task_settings(name) for name in suite.tasks if name not in suite.skip}
    probes = {name: settings[name] for name in settings if suite.protocol(name).make is None}
    train = labelled_train(view) if probes else None
    show = _rgb(suite.channels, tokenizer.model.config.in_channels)
    measured = Measured(tokenizer, view.transform.size, show, accelerator.device)
    makers = {name: suite.protocol(name).make for name in settings}
    meters = {name: make(settings[name], measured) for name, make in makers.items() if make is not None}
    records, started_s = {}, time.perf_counter()
    num_samples = len(view.test) if suite.num_samples is None else min(suite.num_samples, len(view.test))
    if meters:
        _measure(tokenizer, suite, view, num_samples, meters.values(), accelerator, say)
    pass_s = time.perf_counter() - started_s
    for name, meter in meters.items():
        metrics = meter.finish(lambda value: _gather(value, accelerator))
        outcome = Outcome(metrics, {"by": "nothing was chosen"}, num_train=0, num_test=num_samples)
        records[name] = _record(tokenizer, suite, view, name, outcome, meter.details, pass_s)
    for name, config in probes.items():
        assert train is not None
        started_s = time.perf_counter()
        found = _probe(tokenizer, suite, view, train, config, accelerator, say)
        if found is not None:
            seconds = time.perf_counter() - started_s
            details: dict[str, object] = {"train_fingerprint": train.manifest.fingerprint}
            records[name] = _record(tokenizer, suite, view, name, found, details, seconds)
    return [records[name] for name in settings] if accelerator.is_main_process else []


def _rgb(channels: tuple[int, ...], in_channels: int) -> Callable[[Tensor], Tensor]:
    """What shows pictures [B, C, H, W] as red, green and blue [B, 3, H, W].

    Args:
        channels: the 3 to show; empty: the first 3, or the first one three times.
        in_channels: C.

    Raises:
        ValueError: a channel that is not there.
    """
    shown = channels or ((0, 1, 2) if in_channels >= 3 else (0, 0, 0))
    if max(shown) >= in_channels:
        raise ValueError(f"channels is {list(shown)} and the pictures have {in_channels} channels, from 0")
    return lambda pictures: pictures[:, list(shown)]


def _measure(
    tokenizer: LoadedTokenizer,
    suite: TokenizerSuiteConfig,
    view: TokenizerView,
    num_samples: int,
    meters: Iterable[ReconstructionMeter],
    accelerator: Any,
    say: Report,
) -> None:
    """Encodes and decodes this process's share of the pictures, and shows all of it to the meters.

    Raises:
        RuntimeError: the processes together have not seen every picture once (a defect, never the user's).
    """
    coder = PictureCoder(tokenizer, accelerator.device, precision=suite.precision)
    own = range(accelerator.process_index, num_samples, accelerator.num_processes)
    loader = DataLoader(Subset(view.test, own), batch_size=suite.batch_size, num_workers=suite.workers)
    done = 0
    for stored, _ in loader:
        pictures = coder.to_uint8(stored)
        latents = coder.encode(stored)
        reconstructions = coder.decode(latents, view.transform.size)
        for meter in meters:
            meter.update(pictures, reconstructions, latents)
        done += len(stored)
        say(f"{tokenizer.label}: reconstructions", min(done * accelerator.num_processes, num_samples), num_samples)
    counts = _gather(done, accelerator)
    if sum(counts) != num_samples:
        raise RuntimeError(f"{sum(counts)} of {num_samples} pictures were measured: no figure is computed from this")


def _gather(value: Any, accelerator: Any) -> list[Any]:
    """Every process's value, in the order of the processes."""
    from accelerate.utils import gather_object

    gathered: list[Any] = gather_object([value]) if accelerator.num_processes > 1 else [value]
    return gathered


def _probe(
    tokenizer: LoadedTokenizer,
    suite: TokenizerSuiteConfig,
    view: TokenizerView,
    train: SequentialImages,
    config: LatentProbeConfig,
    accelerator: Any,
    say: Report,
) -> Outcome | None:
    """The linear probe on pooled latents; None off the main process. All processes call this."""
    sides = [
        extract(
            PooledLatents(tokenizer.model, config.grid),
            dataset,
            accelerator,
            normalise=Normalise(tokenizer.mean, tokenizer.std),
            num_blocks=1,
            batch_size=suite.batch_size,
            workers=suite.workers,
            progress=lambda done, total, name=name: say(f"{tokenizer.label}: {name} latents", done, total),  # type: ignore[misc]
        )
        for name, dataset in (("train", train), ("test", view.test))
    ]
    if sides[0] is None or sides[1] is None:
        return None
    num_classes = len(train.manifest.classes)
    return evaluate_linear(sides[0], sides[1], config.linear(), num_classes=num_classes, device=accelerator.device)


def _record(
    tokenizer: LoadedTokenizer,
    suite: TokenizerSuiteConfig,
    view: TokenizerView,
    name: str,
    outcome: Outcome,
    details: Mapping[str, object],
    seconds: float,
) -> dict[str, Any]:
    """The result of one task."""
    return make_record(
        tokenizer,
        name,
        suite.tasks[name].protocol,
        suite.task_settings(name),
        outcome,
        data={"test_fingerprint": view.test.manifest.fingerprint},
        view=view.described(),
        precision={"precision": suite.precision},
        seconds={"protocol": seconds},
        details=details,
    )
