"""What people and trackers learn of a run: the progress line, the journal, metrics, alarms.

Enters: the results of steps, events, what validation found. Leaves: a line for people, and on rank 0 records of the
journal (from there MLflow). It holds the sums between two log points, and is what the loop speaks to, on every rank
alike; only rank 0 shows and keeps something.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from data_pipes.batch import BatchPlan
from data_pipes.loader import Loader
from data_pipes.loading.unindexed_loader import UnindexedLoader
from pretrain.checkpoint.folder import Folder
from pretrain.config import RunConfig
from pretrain.data_meter import DataMeter
from pretrain.metrics import Interval, StepResult, peak_flops
from pretrain.objectives.base import Objective
from pretrain.parallel.world import World
from pretrain.preflight import TrainingData
from pretrain.progress import ProgressLine
from pretrain.run_state import RunState
from pretrain.tracking.tracker import NullTracker, Tracker
from pretrain.validation import Preview

_SUMMARY = ("train/loss", "val/loss", "throughput/samples_per_s")
"""Metrics that a run's summary names."""


class RunLog:
    """A context manager: inside, the progress line is shown; an error marks the tracked run as failed."""

    def __init__(
        self,
        config: RunConfig,
        plan: BatchPlan,
        data: TrainingData,
        world: World,
        objective: Objective,
        loader: Loader | UnindexedLoader,
        bf16: bool,
        total: int,
    ) -> None:
        """Begins the first interval.

        Args:
            config: of the run.
            plan: how a step's samples are divided.
            data: what is trained on.
            world: the processes.
            objective: prepared.
            loader: of the training data; its counters are read at each log point.
            bf16: whether forward passes compute in bf16, for MFU.
            total: the run's length in samples.
        """
        self.config, self.plan, self.data, self.world = config, plan, data, world
        self.objective, self.loader, self.total = objective, loader, total
        self.peak = peak_flops(world.device, bf16=bf16)
        self.latest: dict[str, float] = {}
        """The metrics of the newest log point and validation, by name."""
        self._tracker: Tracker | NullTracker = NullTracker()
        self._interval = Interval(world, objective.flops_per_sample(), self.peak)
        self._first_step, self._begin_s = 0, time.perf_counter()
        self._data_meter = DataMeter(world, loader.source_names)
        self._progress = ProgressLine(config.name, enabled=world.is_main)

    def start(self, identity: Mapping[str, Any], state: RunState, *, resumed_from: Folder | None) -> None:
        """Opens the journal on rank 0, writes who the run is, and says how it begins.

        Args:
            identity: the content of `run.json`.
            state: where the run goes on.
            resumed_from: the checkpoint that the state came from; None: the run begins.
        """
        config, plan = self.config, self.plan
        self._first_step, self._begin_s = state.step, time.perf_counter()
        if self.world.is_main:
            resume = resumed_from is not None
            self._tracker = Tracker(config.run_dir, config.tracking, config.name, identity["run_uid"], resume)
            self._tracker.start(config.as_dict(), identity, step=state.step)
        self._progress.total_steps = state.step + state.steps_left(self.total, plan.global_batch)
        for notice in identity.get("notices", ()):
            self.say(notice)
        if resumed_from is not None:
            self.say(f"resumed from {resumed_from} at sample {state.position:,} of {self.total:,}")
            if not state.steps_left(self.total, plan.global_batch):
                key = "steps" if config.train.steps is not None else "epochs"
                self.say(
                    f"the run has reached its end, step {state.step} of train.{key}={getattr(config.train, key)}; to "
                    f"train on, start it with a larger train.{key} (the schedule then follows the new length)"
                )
        if self.data.collection is None:
            self.say("data.unindexed: the shards are read from front to back, so resume is approximate")
        if plan.micro_batch != (config.train.micro_batch or plan.micro_batch):
            self.say(
                f"train.micro_batch is {config.train.micro_batch}; with {self.world.size} processes the global batch "
                f"of {plan.global_batch} is reached by {plan.accumulate} x {plan.micro_batch}"
            )

    def __enter__(self) -> RunLog:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        if error is not None:
            self._tracker.finish("FAILED")

    @property
    def mlflow_run_id(self) -> str | None:
        """Of the tracked run, on rank 0, once a server gave one."""
        return self._tracker.mlflow_run_id

    def say(self, message: str) -> None:
        """A sentence for people."""
        self._progress.say(message)

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Something that happened, for the journal; the report shows it."""
        self._tracker.log_event(name, fields)

    def saves(self, events: Iterable[dict[str, Any]]) -> None:
        """What happened to checkpoints, as `Saver.take_events` gives it."""
        for event in events:
            self.event(f"checkpoint_{event.pop('event')}", event)

    def add(self, result: StepResult) -> None:
        """Takes in one optimizer step; waits for nothing."""
        self._interval.add(result, self.plan.global_batch)

    def point(self, state: RunState, lrs: Mapping[str, float], more: Mapping[str, float]) -> None:
        """A log point: the metrics of the interval since the last one, over all ranks. A collective.

        Args:
            state: of the run.
            lrs: each player's learning rate in the newest step.
            more: metrics of others, by their full names.
        """
        interval, backbone = self._interval, self.objective.backbone_player
        seconds = time.perf_counter() - interval.begin_s
        wanted_shares = self.loader.wanted_shares(state.position - 1)
        counted = self.loader.counters.take()
        metrics = self._data_meter.report(
            counted, self.loader.bad.by_cause, interval.waits_s, seconds, wanted_shares
        ) | interval.report(self.loader.bad.num_bad)
        metrics |= {"data/position": state.position}
        metrics |= {f"train/lr{'' if player == backbone else f'_{player}'}": lr for player, lr in lrs.items()}
        if self.data.num_samples:
            metrics["train/epoch"] = state.position / self.data.num_samples
        if self.objective.num_frames is not None:  # samples are videos
            metrics["throughput/clips_per_s"] = metrics["throughput/samples_per_s"] * self.objective.repeats
        metrics |= {**more, "guard/rollbacks": state.rollbacks}
        for alarm in self.objective.alarms(metrics, state.step):
            self.say(alarm)
            self.event("alarm", {"step": state.step, "what": alarm})
        left_s = state.steps_left(self.total, self.plan.global_batch) * metrics["throughput/step_ms"] / 1e3
        self._progress.update(state.step, metrics, left_s)
        self._tracker.log_metrics(metrics, state.step)
        self.latest = metrics

    def validation(self, found: Preview | None, step: int) -> None:
        """What validation found after `step` optimizer steps; its time does not count as training time.

        Args:
            found: of `Validator.look`; None: nothing, because the run is stopping.
            step: optimizer steps done.
        """
        if found is None:
            return
        self._tracker.log_metrics(found.metrics, step)
        for path in found.files:
            self._tracker.log_artifact(path, path.parent.name)
        self.latest |= found.metrics
        self._interval.restart()

    def went_back(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`: later points are void, and a new interval begins."""
        self._tracker.log_resume(step)
        self._interval.restart()

    def flush_to_disk(self) -> None:
        """Waits until the journal is on the disk; called before each save."""
        self._tracker.flush_to_disk()

    def finish(self, status: Literal["FINISHED", "KILLED"]) -> None:
        """Ends the tracked run and sends what is left."""
        self._tracker.finish(status)

    def summary(self, status: str, state: RunState, checkpoint: Path | Folder) -> dict[str, Any]:
        """What people ask for first when a run has ended.

        Args:
            status: finished or stopped.
            state: of the run.
            checkpoint: its newest.
        """
        return {
            "run": str(self.config.run_dir),
            "status": status,
            "step": state.step,
            "samples": state.position,
            "steps_this_start": state.step - self._first_step,
            "seconds": round(time.perf_counter() - self._begin_s, 2),
            "checkpoint": str(checkpoint),
            "mfu_of": self.peak.source,
            **{name: self.latest[name] for name in _SUMMARY if name in self.latest},
        }
