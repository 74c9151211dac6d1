"""The environment is complete, can be written as JSON, and holds no secret."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.tracking.environment import environment, environment_tags, git_revision, redact_argument, redact_url


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_environment_names_what_decides_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hunter2")
    monkeypatch.setattr(
        sys, "argv", ["tessera", "tracking.uri=https://me:hunter2@host/x", "hf_token=hunter2", "train.steps=5"]
    )
    found = environment()
    assert "hunter2" not in json.dumps(found)
    assert found["command"] == ["tessera", "tracking.uri=https://me:***@host/x", "hf_token=***", "train.steps=5"]
    assert (
        found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"] == torch.__version__
    )
    assert found["torch"]["version"] == torch.__version__
    assert found["cpu"]["count"] >= 1
    assert found["memory_bytes"] > 2**28
    tags = environment_tags(found)
    assert tags["env.python"] == found["python"]
    assert all(isinstance(value, str) for value in tags.values())
    assert environment_tags({}) == {}


def test_git_revision_tells_dirty_from_clean_and_ours_from_around_us(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    assert git_revision(package) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-q", "-m", "zero")
    assert git_revision(package) is None, "a repository around the package that does not track it says nothing about it"
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-q", "-m", "one")
    revision = git(tmp_path, "rev-parse", "HEAD").strip()
    assert git_revision(package) == {"revision": revision, "branch": "main", "dirty": False}
    (tmp_path / "untracked").write_text("")
    assert git_revision(package) == {"revision": revision, "branch": "main", "dirty": False}
    (package / "a.py").write_text("2\n")
    assert git_revision(package) == {"revision": revision, "branch": "main", "dirty": True}
    tags = environment_tags({"git": git_revision(package)})
    assert (tags["mlflow.source.git.commit"], tags["git.dirty"]) == (revision, "true")


def test_without_git_there_is_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(Path(__file__).parent) is None


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("postgresql://me:p@ss:w@db:5432/x", "postgresql://me:***@db:5432/x"),
        ("https://host:8080/path?a=b@c", "https://host:8080/path?a=b@c"),
        ("a=s3://bucket/key b=http://u:p@h", "a=s3://bucket/key b=http://u:***@h"),
        ("sqlite:////runs/a b.db", "sqlite:////runs/a b.db"),
    ],
)
def test_redact_url(text: str, redacted: str) -> None:
    assert redact_url(text) == redacted


def test_redact_argument_leaves_settings_that_only_sound_secret() -> None:
    assert redact_argument("objective.num_tokens=4") == "objective.num_tokens=4"
    assert redact_argument("db.password=x y") == "db.password=***"
