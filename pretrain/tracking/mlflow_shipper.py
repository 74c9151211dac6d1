"""The shipper: replays a run's journal into MLflow, from where it stopped, as often as needed, with the same result.

In: `RUN/journal.jsonl` and `RUN/mlflow.json` ({mlflow_run_id, experiment_id, tracking_uri, offset,
deferred_artifacts}: how many bytes of the journal that server already has). Out: one MLflow run with the journal's
params, metrics, tags, artifacts and status. Every point is sent with the journal's own time, and MLflow stores an
equal (key, time, step, value) once, so a replay after a crash adds nothing. Everything here may block or raise; the
caller (the tracker's thread, `tessera sync`) decides what that means. MLflow is imported on first use, because that
takes seconds, and so does the first use of a new sqlite file.

What MLflow cannot hold as it is:
- A metric point that a resume superseded stays in MLflow beside the new one, which has the later time; MLflow has no
  way to delete a point. The tag `tessera.resumed_at_step` says where that begins; the journal's own readers and the
  report leave such points out.
- A param never changes in MLflow. When a resumed run has another value, it goes to the tag `param_changed.<name>`.
- Names, lengths and infinities: see pretrain/tracking/mlflow_batches.py.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from data_pipes.errors import UserError
from data_pipes.store.files import exclusive, write_atomically
from pretrain.tracking.environment import redact_url
from pretrain.tracking.journal import JOURNAL_NAME, JournalWriter, now_ms, read_lines
from pretrain.tracking.mlflow_batches import (
    ENTITIES_PER_CALL,
    METRICS_PER_CALL,
    NAME_LENGTH,
    TAG_LENGTH,
    Batch,
    read_batch,
)

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

RUN_UID_TAG = "tessera.run_uid"
STATE_NAME = "mlflow.json"
LOCK_NAME = "mlflow.lock"
DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")

logger = logging.getLogger(__name__)


class ShippingError(UserError, RuntimeError):
    """MLflow could not take the journal now; nothing is lost, the same call may simply be repeated later."""


class LockedError(ShippingError):
    """Another process is shipping this run at this moment."""


@dataclass(frozen=True)
class Destination:
    """Where a run's journal goes, and the uid by which its MLflow run is found again."""

    uri: str
    experiment: str
    run_name: str
    run_uid: str


@dataclass
class ShipState:
    """What one tracking server has of one journal; the content of `mlflow.json`."""

    tracking_uri: str  # without its password
    experiment_id: str | None = None
    mlflow_run_id: str | None = None
    offset: int = 0  # bytes of the journal that the server has
    deferred_artifacts: list[list[str]] = field(default_factory=list)  # [path, artifact_dir] that were refused so far

    @classmethod
    def load(cls, path: Path, tracking_uri: str) -> "ShipState":
        """The saved state, or a fresh one when there is none, it is unreadable, or it belongs to another server.

        A fresh state is always correct: the run is found again by its uid, and the replay starts at the journal's
        first line.
        """
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            state = cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})
        except (OSError, ValueError, TypeError):
            return cls(tracking_uri)
        return state if state.tracking_uri == tracking_uri else cls(tracking_uri)

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self)).encode())


def state_path(run_dir: Path, uri: str, home_uri: str) -> Path:
    """`mlflow.json` for the run's own server; a file of its own for any other that `tessera sync --uri` names."""
    if redact_url(uri) == redact_url(home_uri):
        return run_dir / STATE_NAME
    return run_dir / f"mlflow-{hashlib.sha256(redact_url(uri).encode()).hexdigest()[:8]}.json"


class Shipper:
    """Ships one run's journal to one destination.

    Used from one thread at a time; other processes are kept out by a lock file.
    """

    def __init__(self, run_dir: Path, destination: Destination, state_path: Path) -> None:
        self.run_dir = run_dir
        self.destination = destination
        self.state_path = state_path
        self.state = ShipState.load(state_path, redact_url(destination.uri))
        self._client: MlflowClient | None = None

    def ship(
        self, wait_lock_s: float = 0.0, thorough: bool = False, should_stop: Callable[[], bool] = lambda: False
    ) -> int:
        """Send what MLflow does not have yet, until the journal's end or `should_stop`.

        Args:
            wait_lock_s: seconds to wait for another process that ships.
            thorough: also make sure that the run still exists, and try the artifacts again that were refused before.
            should_stop: asked between two batches.

        Returns:
            The number of journal lines that went over.

        Raises:
            LockedError: another process still ships after `wait_lock_s`.
            ShippingError: the run was deleted on the server.
            Exception: whatever MLflow raises; what was sent before is remembered.
        """
        journal, num_sent = self.run_dir / JOURNAL_NAME, 0
        lock = self.run_dir / LOCK_NAME
        busy = LockedError(
            f"another process is sending this run to MLflow (it holds {lock}); try again when it is done"
        )
        # Where there are no locks, two shippers at once only send some points twice, which MLflow merges.
        with exclusive(lock, wait_lock_s, busy):
            self.state = ShipState.load(self.state_path, redact_url(self.destination.uri))
            size_bytes = journal.stat().st_size
            if self.state.offset > size_bytes:  # the journal was cut, by power loss or by hand
                self.state.offset = 0
            if self.state.offset == size_bytes and not thorough:
                return 0
            if thorough:
                self._client = None
            try:
                client = self._connect()
                if thorough:
                    self._send_artifacts(client, self._take_deferred())
                while not should_stop():
                    batch = read_batch(journal, self.state.offset)
                    if batch.num_records == 0:
                        break
                    self._send(client, batch)
                    self.state.offset = batch.end
                    self.state.save(self.state_path)
                    num_sent += batch.num_records
            except Exception:
                self._client = None  # the next call makes sure of the server and the run anew
                raise
        return num_sent

    def num_waiting(self) -> int:
        """Journal lines that the server does not have yet."""
        return sum(1 for _ in read_lines(self.run_dir / JOURNAL_NAME, self.state.offset))

    def _connect(self) -> "MlflowClient":
        """A client whose run exists and is active; finds or creates the run on first use."""
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        if self._client is not None and self.state.mlflow_run_id is not None:
            return self._client
        for name in ("mlflow.store.db.utils", "alembic"):  # they announce a new database amid the progress bars
            logging.getLogger(name).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=self.destination.uri)
        if self.state.mlflow_run_id is not None:
            try:
                run = client.get_run(self.state.mlflow_run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                # Another server under the same address, or the run was purged: start over.
                self.state = ShipState(self.state.tracking_uri)
            else:
                self._refuse_deleted(run.info.lifecycle_stage)
        if self.state.mlflow_run_id is None:
            self._find_or_create_run(client)
        self._client = client
        return client

    def _refuse_deleted(self, lifecycle_stage: str) -> None:
        if lifecycle_stage != "active":
            run_id = self.state.mlflow_run_id
            raise ShippingError(
                f"the MLflow run {run_id} was deleted on the server; "
                f"`mlflow runs restore --run-id {run_id}` brings it back"
            )

    def _find_or_create_run(self, client: "MlflowClient") -> None:
        """Set the state's run id. Creation includes the uid tag, so a crash right after it leads to no second run."""
        experiment_id = self._experiment_id(client)
        same_uid = f"tags.`{RUN_UID_TAG}` = '{self.destination.run_uid}'"
        found = client.search_runs([experiment_id], same_uid, max_results=1)
        if found:
            run_id = found[0].info.run_id
        else:
            tags = {RUN_UID_TAG: self.destination.run_uid}
            times_ms = (record["time_ms"] for record, _ in read_lines(self.run_dir / JOURNAL_NAME) if record)
            name, start_ms = self.destination.run_name, next(times_ms, now_ms())
            run_id = client.create_run(experiment_id, start_time=start_ms, tags=tags, run_name=name).info.run_id
        self.state = ShipState(self.state.tracking_uri, experiment_id, run_id)
        self.state.save(self.state_path)

    def _experiment_id(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException

        name = self.destination.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            # With a database, MLflow would put artifacts below the working directory of whoever logs first.
            is_database = urlsplit(self.destination.uri).scheme.split("+")[0] in DATABASE_SCHEMES
            location = (self.run_dir.resolve().parent / "mlartifacts").as_uri() if is_database else None
            try:
                return str(client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = client.get_experiment_by_name(name)  # another run created it in the meantime
        if experiment is None or experiment.lifecycle_stage != "active":
            raise ShippingError(
                f"the MLflow experiment {name!r} was deleted on the server; restore it, or set tracking.experiment"
            )
        return str(experiment.experiment_id)

    def _send(self, client: "MlflowClient", batch: Batch) -> None:
        from mlflow.entities import Metric, Param, RunTag

        self._log_entities(client, "metrics", [Metric(*metric) for metric in batch.metrics], METRICS_PER_CALL)
        if batch.params:
            new_params, changed = self._split_params(client, batch.params)
            self._log_entities(client, "params", [Param(*param) for param in new_params.items()], ENTITIES_PER_CALL)
            batch.tags |= changed
        self._log_entities(client, "tags", [RunTag(*tag) for tag in batch.tags.items()], ENTITIES_PER_CALL)
        self._send_artifacts(client, batch.artifacts)
        if batch.status is not None:
            status, time_ms = batch.status
            if status == "RUNNING":
                client.update_run(self.state.mlflow_run_id, status=status)
            else:
                client.set_terminated(self.state.mlflow_run_id, status=status, end_time=time_ms)

    def _log_entities(self, client: "MlflowClient", kind: str, entities: list[Any], per_call: int) -> None:
        """Log one kind of entity; what MLflow refuses for good is noted in the journal and left out."""
        from mlflow.exceptions import MlflowException

        for first in range(0, len(entities), per_call):
            part = entities[first : first + per_call]
            try:
                client.log_batch(self.state.mlflow_run_id, **{kind: part})
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                self._refuse_deleted(client.get_run(self.state.mlflow_run_id).info.lifecycle_stage)
                if len(part) == 1:
                    self._note("rejected", {"kind": kind, "name": part[0].key, "reason": str(error)})
                else:  # find the one that is refused: every other one must arrive
                    self._log_entities(client, kind, part, per_call=1)

    def _split_params(
        self, client: "MlflowClient", params: list[tuple[str, str]]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """(params that MLflow does not have yet, tags for those whose value differs from the one it has)."""
        run = client.get_run(self.state.mlflow_run_id)
        known, new, changed = dict(run.data.params), {}, {}
        for name, value in params:
            tag = f"param_changed.{name}"[:NAME_LENGTH]
            if name not in known:
                known[name] = new[name] = value
            elif known[name] != value or tag in changed or tag in run.data.tags:
                changed[tag] = value[:TAG_LENGTH]
        return new, changed

    def _take_deferred(self) -> list[list[str]]:
        deferred, self.state.deferred_artifacts = self.state.deferred_artifacts, []
        return deferred

    def _send_artifacts(self, client: "MlflowClient", artifacts: list[list[str]]) -> None:
        """Upload files. One that vanished is noted in the journal and left out.

        One that only the artifact store refuses waits for a `thorough` call, so that it never holds up the metrics.
        """
        for path, artifact_dir in artifacts:
            local = self.run_dir / path
            if not local.exists():
                self._note("artifact_skipped", {"path": path, "reason": "the file is gone"})
                continue
            try:
                client.log_artifact(self.state.mlflow_run_id, str(local), artifact_dir or None)
            except Exception:
                client.get_run(self.state.mlflow_run_id)  # raises when the server is away: all is sent again later
                if [path, artifact_dir] not in self.state.deferred_artifacts:
                    self.state.deferred_artifacts.append([path, artifact_dir])
                logger.warning("MLflow's artifact store refused %s; it is tried again later", local, exc_info=True)
        if artifacts:
            self.state.save(self.state_path)

    def _note(self, record_type: str, fields: dict[str, object]) -> None:
        """Add a record to the journal, from whichever process ships."""
        writer = JournalWriter(self.run_dir / JOURNAL_NAME)
        writer.append(record_type, fields)
        writer.close()
