"""What is logged arrives in a real MLflow exactly once, whatever happens to the process or the server."""

import argparse
import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipes.store.files import exclusive
from launchers.commands import sync as sync_command
from pretrain.tracking import mlflow_batches
from pretrain.tracking.journal import JournalWriter, read_journal, read_metrics
from pretrain.tracking.mlflow_shipper import LOCK_NAME, LockedError, ShippingError, ShipState
from pretrain.tracking.tracker import Tracker, TrackingConfig, check_uri, flatten, sync
from tests.processes import PATIENCE_S, run_to_end, wait_until

# MLflow 3.17 maps its tables with a loader option that SQLAlchemy 2.1 deprecates; nothing here can change that.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracking URI of the developer's own must not receive the tests' runs; MLflow's statistics stay off."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs, and so one sqlite file, for all tests: creating one takes seconds."""
    return tmp_path_factory.mktemp("folder of runs")


@pytest.fixture
def run_dir(output_dir: Path, request: pytest.FixtureRequest) -> Path:
    return output_dir / str(request.node.name)


@pytest.fixture
def client(output_dir: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")


def make_tracker(run_dir: Path, resume: bool = False, **config: Any) -> Tracker:
    """A tracker that leaves the sending to `sync` unless told otherwise."""
    return Tracker(run_dir, TrackingConfig(**{"ship": False, **config}), run_dir.name, f"uid-{run_dir.name}", resume)


def log_steps(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last):
        tracker.log_metrics({"train/loss": 1 / (step + 1), "train/lr": 0.1}, step)


def steps_in(client: Any, run_id: str, name: str = "train/loss") -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


@pytest.fixture
def dead_uri() -> Iterator[str]:
    """An address that refuses connections: the port is bound, and nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_the_thread_ships_a_whole_run(
    run_dir: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = make_tracker(run_dir, ship=True, interval_s=0.05, drain_timeout_s=PATIENCE_S)
    (run_dir / "config.yaml").write_text("name: x\n")
    environment = {"python": "3.12.1", "git": {"revision": "abc", "branch": "main", "dirty": True}}
    tracker.start(
        {"optim": {"lr": 0.1, "betas": [0.9, 0.95]}, "long": "x" * 7000}, {"environment": environment}, step=0
    )
    log_steps(tracker, 0, 1500)
    tracker.log_metrics({"odd/recall@5": 0.5, "odd/nan": math.nan, "odd/inf": math.inf}, step=1500)
    tracker.finish()
    tracker.finish("FAILED")  # a second end changes nothing
    assert tracker.mlflow_run_id is not None
    run = client.get_run(tracker.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == run_dir.name
    assert run.data.params == {"optim.lr": "0.1", "optim.betas": "[0.9, 0.95]", "long": "x" * 6000}
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert run.data.tags["git.dirty"] == "true"
    assert steps_in(client, run.info.run_id) == list(range(1500))
    assert run.data.metrics["odd/recall_at_5"] == 0.5
    assert math.isnan(run.data.metrics["odd/nan"])
    assert run.data.metrics["odd/inf"] > 1e308
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    assert (run_dir.parent / "mlartifacts").is_dir()
    assert list(tmp_path.iterdir()) == [], "MLflow must not write into the working directory"
    assert sync(run_dir).num_records == 0


def test_a_killed_process_loses_nothing(run_dir: Path, client: Any) -> None:
    program = f"""
import os, pathlib, signal
from pretrain.tracking.tracker import Tracker, TrackingConfig
config = TrackingConfig(interval_s=0.01)
tracker = Tracker(pathlib.Path({str(run_dir)!r}), config, "killed", "uid-killed", resume=False)
for step in range(200):
    tracker.log_metrics({{"train/loss": step / 7}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_to_end([sys.executable, "-c", program], cwd=Path(__file__).parents[3])
    assert done.returncode == -signal.SIGKILL
    result = sync(run_dir)
    history = client.get_metric_history(result.mlflow_run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(step, step / 7) for step in range(200)]
    assert client.get_run(result.mlflow_run_id).info.status == "RUNNING"


def test_replaying_and_losing_the_state_duplicate_nothing(run_dir: Path, client: Any) -> None:
    tracker = make_tracker(run_dir)
    log_steps(tracker, 0, 50)
    tracker.set_tags({"note": "a"})
    tracker.finish("KILLED")
    run_id = sync(run_dir).mlflow_run_id
    state_file = run_dir / "mlflow.json"
    state = json.loads(state_file.read_text())
    assert state["offset"] == (run_dir / "journal.jsonl").stat().st_size
    # Killed after sending and before saving the offset; killed after creating the run; a state that power loss tore.
    for content in (json.dumps({**state, "offset": 0}), None, '{"offs'):
        if content is None:
            state_file.unlink()
        else:
            state_file.write_text(content)
        result = sync(run_dir)
        assert (result.mlflow_run_id, result.num_records) == (run_id, len(list(read_journal(run_dir))))
        assert steps_in(client, run_id) == list(range(50))
    experiment = client.get_experiment_by_name("tessera").experiment_id
    found = client.search_runs([experiment], f"tags.`tessera.run_uid` = 'uid-{run_dir.name}'")
    assert [run.info.run_id for run in found] == [run_id]
    assert found[0].info.status == "KILLED"


def test_a_dead_server_costs_no_time_and_loses_nothing(
    run_dir: Path, client: Any, dead_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = make_tracker(run_dir, ship=True, uri=dead_uri, interval_s=0.01, drain_timeout_s=2 * PATIENCE_S)
    costs_s = []
    for step in range(300):
        begin = time.perf_counter()
        tracker.log_metrics({"train/loss": 1.0}, step)
        costs_s.append(time.perf_counter() - begin)
    assert sorted(costs_s)[150] < 0.1  # an attempt to connect, with its repetitions, takes seconds
    wait_until(lambda: bool(caplog.records), "a warning")
    begin = time.perf_counter()
    tracker.finish()
    assert time.perf_counter() - begin < PATIENCE_S  # it does not wait for the whole time to drain
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    warnings = [message for message in warnings if "urllib3" not in message and "Retrying" not in message]
    assert len(warnings) == 2, warnings
    assert "does not take the journal" in warnings[0]
    assert os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] == "true", "stdout belongs to the one line of --json"
    assert f"`tessera sync {run_dir}`" in warnings[1]
    with pytest.raises(ShippingError, match="nothing is lost"):
        sync(run_dir)
    # Another server takes everything; what the run's own server has is remembered apart from it.
    result = sync(run_dir, uri=f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    assert steps_in(client, result.mlflow_run_id) == list(range(300))
    assert not (run_dir / "mlflow.json").exists()


def test_a_store_that_appears_during_the_run_gets_everything(
    run_dir: Path, client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pretrain.tracking.tracker")
    obstacle = tmp_path / "store"
    obstacle.write_text("a file where a folder should be")
    uri = f"sqlite:///{obstacle}/mlflow.db"
    tracker = make_tracker(run_dir, ship=True, uri=uri, interval_s=0.05, drain_timeout_s=PATIENCE_S)
    log_steps(tracker, 0, 30)
    wait_until(lambda: bool(caplog.records), "a warning")
    assert "does not take the journal" in caplog.text
    obstacle.unlink()
    obstacle.mkdir()
    client.search_experiments()  # the shared store exists by now; its copy needs no seconds of set-up
    shutil.copy(run_dir.parent / "mlflow.db", obstacle / "mlflow.db")
    log_steps(tracker, 30, 60)
    tracker.finish()
    assert "takes the journal again" in caplog.text
    from mlflow.tracking import MlflowClient

    assert tracker.mlflow_run_id is not None
    assert steps_in(MlflowClient(uri), tracker.mlflow_run_id) == list(range(60))


def test_a_resumed_run_continues_the_same_mlflow_run(run_dir: Path, client: Any) -> None:
    first = make_tracker(run_dir)
    first.start({"optim": {"lr": 0.1}, "kept": 1}, {}, step=0)
    log_steps(first, 0, 20)
    first.finish("KILLED")
    run_id = sync(run_dir).mlflow_run_id
    second = make_tracker(run_dir, resume=True)
    assert second.mlflow_run_id == run_id
    second.start({"optim": {"lr": 0.2}, "kept": 1}, {}, step=15)
    log_steps(second, 16, 25)
    assert sync(run_dir).mlflow_run_id == run_id
    assert client.get_run(run_id).info.status == "RUNNING"
    second.finish()
    sync(run_dir)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optim.lr": "0.1", "kept": "1"}
    assert run.data.tags["param_changed.optim.lr"] == "0.2"
    assert run.data.tags["tessera.resumed_at_step"] == "15"
    # The journal's curve is clean; MLflow keeps the superseded points beside the new ones.
    assert [point.step for point in read_metrics(run_dir)["train/loss"]] == list(range(25))
    assert steps_in(client, run_id) == sorted([*range(20), *range(16, 25)])


def test_a_start_without_a_checkpoint_supersedes_what_an_earlier_one_logged(run_dir: Path) -> None:
    first = make_tracker(run_dir)
    log_steps(first, 0, 9)
    first.finish("FAILED")
    second = make_tracker(run_dir)
    log_steps(second, 0, 3)
    assert [point.step for point in read_metrics(run_dir)["train/loss"]] == [0, 1, 2]


def test_artifacts_that_vanish_or_are_refused_hold_nothing_up(
    run_dir: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    tracker = make_tracker(run_dir)
    for name in ("gone.png", "kept.png"):
        (run_dir / name).write_bytes(name.encode())
        tracker.log_artifact(run_dir / name, "pictures")
    log_steps(tracker, 0, 3)
    (run_dir / "gone.png").unlink()
    real_log_artifact = MlflowClient.log_artifact

    def refuse(*_: object) -> None:
        raise PermissionError("no access to the bucket")

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    result = sync(run_dir)
    assert result.deferred_artifacts == ("kept.png",)
    assert steps_in(client, result.mlflow_run_id) == [0, 1, 2]
    assert [r["path"] for r in read_journal(run_dir) if r["type"] == "artifact_skipped"] == ["gone.png"]
    monkeypatch.setattr(MlflowClient, "log_artifact", real_log_artifact)
    assert sync(run_dir).deferred_artifacts == ()
    assert [a.path for a in client.list_artifacts(result.mlflow_run_id, "pictures")] == ["pictures/kept.png"]


def test_what_mlflow_refuses_for_good_is_noted_and_the_rest_arrives(
    run_dir: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_batches, "legal_name", lambda name: name)
    tracker = make_tracker(run_dir)
    tracker.log_metrics({"a": 1.0, "b@1": 2.0, "c": 3.0}, step=1)
    result = sync(run_dir)
    assert client.get_run(result.mlflow_run_id).data.metrics == {"a": 1.0, "c": 3.0}
    assert [record["name"] for record in read_journal(run_dir) if record["type"] == "rejected"] == ["b@1"]


def test_a_deleted_run_is_not_recreated(run_dir: Path, client: Any) -> None:
    tracker = make_tracker(run_dir)
    log_steps(tracker, 0, 3)
    run_id = sync(run_dir).mlflow_run_id
    client.delete_run(run_id)
    log_steps(tracker, 3, 6)
    with pytest.raises(ShippingError, match=f"mlflow runs restore --run-id {run_id}"):
        sync(run_dir)
    client.restore_run(run_id)
    sync(run_dir)
    assert steps_in(client, run_id) == list(range(6))


def test_two_processes_never_ship_one_run_at_once(run_dir: Path) -> None:
    tracker = make_tracker(run_dir)
    log_steps(tracker, 0, 3)
    with exclusive(run_dir / LOCK_NAME, 0, LockedError()), pytest.raises(LockedError, match="another process"):
        sync(run_dir, wait_lock_s=0.1)
    assert sync(run_dir).num_records == 5


def test_a_moved_folder_ships_to_the_database_beside_it(
    output_dir: Path, run_dir: Path, client: Any, tmp_path: Path
) -> None:
    tracker = make_tracker(run_dir)
    log_steps(tracker, 0, 3)
    run_id = sync(run_dir).mlflow_run_id
    log_steps(tracker, 3, 6)
    shutil.copytree(run_dir, tmp_path / "moved" / "run")
    shutil.copy(output_dir / "mlflow.db", tmp_path / "moved" / "mlflow.db")
    result = sync(tmp_path / "moved" / "run")
    assert result.mlflow_run_id == run_id
    assert str(tmp_path) in result.tracking_uri
    assert steps_in(client, run_id) == [0, 1, 2], "the database of the old place is left alone"


def test_what_one_server_has_is_not_taken_for_what_another_has(tmp_path: Path) -> None:
    state = ShipState("http://a", "1", "abc", offset=99)
    state.save(tmp_path / "mlflow.json")
    assert ShipState.load(tmp_path / "mlflow.json", "http://a") == state
    assert ShipState.load(tmp_path / "mlflow.json", "http://b") == ShipState("http://b")


def test_sync_command(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    sync_command.add_arguments(parser)
    with pytest.raises(FileNotFoundError, match="no journal"):
        sync_command.run(parser.parse_args([str(run_dir)]))
    log_steps(make_tracker(run_dir), 0, 3)
    answer = sync_command.run(parser.parse_args([str(run_dir)]))
    assert answer["num_records"] == 5
    assert "5 records sent" in capsys.readouterr().err
    with pytest.raises(ValueError, match="plain folders"):
        sync_command.run(parser.parse_args([str(run_dir), "--uri", "mlruns"]))
    (run_dir / "journal.jsonl").write_text("")
    with pytest.raises(ValueError, match="no readable `run` record"):
        sync(run_dir)


def test_config_refuses_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="plain folders"):
        TrackingConfig(uri="file:///somewhere/mlruns")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI") as refused:
        TrackingConfig(uri="postgresql://me:hunter2@db/mlflow")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ValueError, match="experiment is empty"):
        TrackingConfig(experiment=" ")
    with pytest.raises(ValueError, match="interval_s must be above 0"):
        TrackingConfig(interval_s=0)
    for uri in ("databricks", "https://mlflow.example", "sqlite:///relative.db"):
        check_uri(uri)


def test_a_password_in_the_environment_stays_out_of_the_files(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2@db/mlflow")
    make_tracker(run_dir).finish()
    identity = next(read_journal(run_dir))
    assert identity["tracking_uri"] == "postgresql://me:***@db/mlflow"
    assert not any(b"hunter2" in path.read_bytes() for path in run_dir.iterdir())


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300) | st.text(alphabet="./@ab ", max_size=12))
def test_names_are_made_legal(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name

    legal = mlflow_batches.legal_name(name)
    assert len(legal) <= 250
    for validate in (_validate_metric_name, _validate_param_name, _validate_tag_name):
        validate(legal)


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_records_that_are_no_records_are_stepped_over(run_dir: Path, client: Any) -> None:
    tracker = make_tracker(run_dir)
    writer = JournalWriter(run_dir / "journal.jsonl")
    writer.append("metrics", {"step": "x", "metrics": []})
    writer.append("params", {})
    writer.append("invented", {})
    writer.close()
    log_steps(tracker, 0, 2)
    assert steps_in(client, sync(run_dir).mlflow_run_id) == [0, 1]
    assert os.path.getsize(run_dir / "journal.jsonl") == json.loads((run_dir / "mlflow.json").read_text())["offset"]
