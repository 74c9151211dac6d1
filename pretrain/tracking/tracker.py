"""Tracking: what rank 0 logs goes to the run's journal at once, and from there to MLflow by a thread.

In: params, metrics, tags, artifacts and the run's status. Out: `RUN/journal.jsonl`, and the same in MLflow as soon as
its server takes it. No call here waits for a server or raises because of one; what a server did not take by the end
of the run is sent by `tessera sync RUN`. Nothing depends on MLflow's global state (there is no active run), and
MLflow is imported in the thread.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from data_pipes.bounds import bounded
from pretrain.tracking.environment import environment_tags, redact_url
from pretrain.tracking.journal import JOURNAL_NAME, JournalWriter, read_journal
from pretrain.tracking.mlflow_shipper import Destination, LockedError, Shipper, ShippingError, state_path

__all__ = ["SyncResult", "Tracker", "TrackingConfig", "read_journal", "sync"]

URI_VARIABLE = "MLFLOW_TRACKING_URI"
MAX_BACKOFF_S = 60.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackingConfig:
    """Where a run is tracked."""

    uri: str | None = None
    """MLflow tracking URI.

    None: the environment variable MLFLOW_TRACKING_URI, else `<output_dir>/mlflow.db` (sqlite).
    """
    experiment: str = "tessera"
    """Name of the MLflow experiment; created when it does not exist."""
    ship: bool = True
    """Send the journal to MLflow during the run. False: only the journal is written; `tessera sync` sends it later."""
    interval_s: float = bounded(2.0, above=0)
    """Seconds between two looks at the journal for something to send."""
    drain_timeout_s: float = bounded(10.0, least=0)
    """Seconds that the end of a run may take to send what is left."""

    def __post_init__(self) -> None:
        if self.uri is not None:
            check_uri(self.uri)
        if not self.experiment.strip():
            raise ValueError("tracking.experiment is empty; give the MLflow experiment a name")
        if self.interval_s <= 0 or self.drain_timeout_s < 0:
            raise ValueError(
                f"tracking.interval_s must be above 0 and tracking.drain_timeout_s at least 0 seconds, "
                f"found {self.interval_s} and {self.drain_timeout_s}"
            )


def check_uri(uri: str) -> None:
    """Looks whether a tracking URI can be used.

    Raises:
        ValueError: MLflow 3 does not serve it, or it has a password that files would show.
    """
    if urlsplit(uri).scheme in ("", "file") and not uri.startswith("databricks"):
        raise ValueError(
            f"tracking URI {uri!r}: MLflow no longer writes plain folders; "
            "use sqlite:////absolute/path/mlflow.db, or the http(s) address of a server"
        )
    if redact_url(uri) != uri:
        raise ValueError(
            f"tracking URI {redact_url(uri)!r} has a password in it, which the run's config and report would show; "
            f"put the whole URI into the environment variable {URI_VARIABLE} and leave tracking.uri empty "
            "(for http servers also: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
        )


def default_uri(run_dir: Path) -> str:
    """The sqlite file that all runs of one output folder share."""
    return f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"


class Tracker:
    """Logs one run; constructed on rank 0 only. All methods may be called from any thread; none waits for a server."""

    def __init__(self, run_dir: Path, config: TrackingConfig, run_name: str, run_uid: str, resume: bool) -> None:
        """Opens the journal, and starts the thread that sends it.

        Args:
            run_dir: the run's folder.
            config: where the run is tracked.
            run_name: for people.
            run_uid: by which the tracker's run is found again.
            resume: whether the run goes on from a checkpoint, whose step `start` (or `log_resume`) then says. If not,
                points that an earlier start left in the same folder (it died before its first checkpoint) are
                superseded.
        """
        self._run_dir = Path(run_dir)
        self._config = config
        journal = self._run_dir / JOURNAL_NAME
        is_restart = journal.exists() and journal.stat().st_size > 0 and not resume
        self._journal = JournalWriter(journal)
        chosen_uri = config.uri or os.environ.get(URI_VARIABLE)
        uri = chosen_uri or default_uri(self._run_dir)
        destination = Destination(uri, config.experiment, run_name, run_uid)
        identity = {"run_uid": run_uid, "run_name": run_name}
        shown_uri = redact_url(chosen_uri) if chosen_uri else None  # None moves with the folder
        self._journal.append("run", {**identity, "experiment": config.experiment, "tracking_uri": shown_uri})
        self._journal.append("status", {"status": "RUNNING"})
        if is_restart:
            self.log_resume(-1)
        self._finished = False
        self._shipper = Shipper(self._run_dir, destination, state_path(self._run_dir, uri, home_uri=uri))
        self._thread: _ShipperThread | None = None
        if config.ship:
            limit_mlflow()
            self._thread = _ShipperThread(self._shipper, config.interval_s)
            self._thread.start()

    @property
    def mlflow_run_id(self) -> str | None:
        """The id of the MLflow run; None until a server gave one."""
        return self._shipper.state.mlflow_run_id

    def start(self, config: Mapping[str, object], identity: Mapping[str, Any], step: int) -> None:
        """Log what a start of the run begins with: its settings, environment and files, and where it resumes.

        Args:
            config: the resolved configuration as nested plain containers.
            identity: the content of `run.json`.
            step: optimizer steps that the weights have seen; 0 for a fresh run.
        """
        if step > 0:
            self.log_resume(step)
        self.log_params(flatten(config))
        self.set_tags(environment_tags(identity.get("environment", {})))
        for name in ("config.yaml", "run.json"):
            if (self._run_dir / name).is_file():
                self.log_artifact(self._run_dir / name)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log settings, as strings. Nested names use dots: `optim.lr`."""
        self._journal.append("params", {"params": {name: str(value) for name, value in params.items()}})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log values of the moment after `step` optimizer steps; NaN and infinity are kept.

        Costs tens of microseconds.
        """
        if metrics:
            self._journal.append("metrics", {"step": int(step), "metrics": {k: float(v) for k, v in metrics.items()}})

    def log_artifact(self, path: Path, artifact_dir: str = "") -> None:
        """Have a finished file uploaded to the run's artifacts, below `artifact_dir`.

        The file must stay where it is.
        """
        path = Path(path).resolve()
        run_dir = self._run_dir.resolve()
        # Relative where possible, so that a run folder that was moved can still be synced.
        stored = path.relative_to(run_dir) if path.is_relative_to(run_dir) else path
        self._journal.append("artifact", {"path": str(stored), "artifact_dir": artifact_dir})

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags of the run, as strings; the last value of a tag counts."""
        self._journal.append("tags", {"tags": {name: str(value) for name, value in tags.items()}})

    def log_event(self, name: str, fields: Mapping[str, object]) -> None:
        """Note that something happened (a skipped step, a rollback, a save that failed); shown by the report."""
        self._journal.append("event", {"name": name, **fields})

    def log_resume(self, step: int) -> None:
        """Say that training goes on from the checkpoint of `step` (resumed or rolled back); later points are void."""
        self._journal.append("resume", {"step": int(step)})

    def flush_to_disk(self) -> None:
        """Wait until everything logged is on the disk (fsync); called with each checkpoint.

        Raises:
            OSError: the disk refuses it.
        """
        self._journal.flush_to_disk()

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End the run with `status` and send what is left, for at most `drain_timeout_s`; later calls do nothing."""
        if self._finished:
            return
        self._finished = True
        self._journal.append("status", {"status": status})
        try:
            self._journal.flush_to_disk()
            self._journal.close()
        except OSError as error:
            logger.warning("the end of the journal in %s could not be written: %s", self._run_dir, error)
        if self._thread is not None and not self._thread.drain(self._config.drain_timeout_s):
            num_waiting = self._shipper.num_waiting()
            logger.warning(
                "MLflow lacks %d records of this run; `tessera sync %s` sends them", num_waiting, self._run_dir
            )


class NullTracker:
    """What ranks other than the first have in place of a `Tracker`: it keeps nothing."""

    mlflow_run_id: None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keeps nothing."""

    def log_artifact(self, path: Path, artifact_dir: str = "") -> None:
        """Keeps nothing."""

    def log_event(self, name: str, fields: Mapping[str, object]) -> None:
        """Keeps nothing."""

    def log_resume(self, step: int) -> None:
        """Keeps nothing."""

    def flush_to_disk(self) -> None:
        """Has nothing to wait for."""

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Has nothing to send."""


def flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}; lists stay one value."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


class _ShipperThread(threading.Thread):
    """Ships every `interval_s` seconds until drained.

    After a failure it waits longer each time, and it never raises.
    """

    def __init__(self, shipper: Shipper, interval_s: float) -> None:
        super().__init__(name="mlflow-shipper", daemon=True)
        self._shipper = shipper
        self._interval_s = interval_s
        self._deadline: float | None = None  # monotonic s; set once the run has ended
        self._wake = threading.Event()
        self._is_drained = False

    def drain(self, timeout_s: float) -> bool:
        """Send what is left; True when MLflow has everything. After `timeout_s` the thread stops at its next step."""
        self._deadline = time.monotonic() + timeout_s
        self._wake.set()
        self.join(timeout_s)
        return self._is_drained

    def run(self) -> None:
        num_failures = 0
        while True:
            # Read before shipping: a journal that ended while an earlier round was under way needs one more round.
            is_last, is_locked = self._deadline is not None, False
            try:
                self._shipper.ship(thorough=is_last, should_stop=self._is_too_late)
                if num_failures:
                    logger.info("MLflow takes the journal again")
                num_failures, self._is_drained = 0, is_last and not self._is_too_late()
            except LockedError:
                is_locked = True
            except Exception as error:
                num_failures += 1
                if num_failures == 1:
                    self._warn(error)
            if is_last and (not is_locked or self._is_too_late()):
                return
            backoff_s = min(self._interval_s * 2 ** min(num_failures, 16), max(MAX_BACKOFF_S, self._interval_s))
            self._wake.wait(0.1 if is_last else backoff_s)

    def _is_too_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _warn(self, error: Exception) -> None:
        reason = describe_failure(error, self._shipper.destination.uri)
        logger.warning("%s; training goes on, and it is tried again", reason)


def describe_failure(error: Exception, uri: str) -> str:
    """One line without a password about an MLflow that does not take the journal."""
    reason = str(error).replace(uri, redact_url(uri)).strip().split("\n")[0]
    return f"MLflow at {redact_url(uri)} does not take the journal ({type(error).__name__}: {reason[:300]})"


def limit_mlflow() -> None:
    """Make MLflow's client give up early (its own: 120 s, 7 times), not print to stdout, and send no statistics.

    What the user set stays. Called from the main thread before others run, because the C library reads the
    environment without locks.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # else `--json` is no longer one line
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@dataclass(frozen=True)
class SyncResult:
    """What a sync did: where to, which run, and how many journal lines went over."""

    tracking_uri: str
    mlflow_run_id: str
    num_records: int
    deferred_artifacts: tuple[str, ...]
    """Artifacts that the artifact store refused; the next sync tries them again."""


def sync(run_dir: Path, uri: str | None = None, wait_lock_s: float = 60.0) -> SyncResult:
    """Send what MLflow does not have yet of a run's journal; it may be repeated, and may run beside the training.

    Args:
        run_dir: the run's folder.
        uri: another tracking server than the run's own; it then gets the whole journal.
        wait_lock_s: seconds to wait for another process that sends this run.

    Raises:
        FileNotFoundError: there is no journal.
        ValueError: the journal does not say which run it is of.
        ShippingError: another process sends this run for longer than that, or MLflow does not take it; nothing is lost,
            try again later.
    """
    run_dir = Path(run_dir)
    journal = run_dir / JOURNAL_NAME
    if not journal.is_file():
        raise FileNotFoundError(f"no journal in {run_dir}: expected {journal}; give the folder of a training run")
    identity = None
    for record in read_journal(run_dir):
        if record["type"] == "run":
            identity = record
    if identity is None:
        raise ValueError(
            f"{journal} has no readable `run` record, so it does not say which run it is of; nothing was sent"
        )
    home_uri = identity["tracking_uri"] or default_uri(run_dir)
    from_environment = os.environ.get(URI_VARIABLE, "")
    if uri is None:  # the journal has no password: where the environment has the same URI with one, that is meant
        uri = from_environment if redact_url(from_environment) == home_uri else home_uri
    limit_mlflow()
    destination = Destination(uri, identity["experiment"], identity["run_name"], identity["run_uid"])
    shipper = Shipper(run_dir, destination, state_path(run_dir, uri, home_uri))
    try:
        num_records = shipper.ship(wait_lock_s=wait_lock_s, thorough=True)
    except ShippingError:
        raise
    except Exception as error:
        reason = describe_failure(error, uri)
        raise ShippingError(f"{reason}; nothing is lost, run `tessera sync {run_dir}` again later") from error
    assert shipper.state.mlflow_run_id is not None
    deferred = tuple(path for path, _ in shipper.state.deferred_artifacts)
    return SyncResult(redact_url(uri), shipper.state.mlflow_run_id, num_records, deferred)
