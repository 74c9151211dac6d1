"""What a run ran on: versions, hardware and the revision of the code, for the journal, MLflow and the report.

In: this process. Out: a plain dictionary that JSON can hold. Environment variables are never read into it, and
secrets on the command line are cut out, because the record is made to be passed around.
"""

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = (
    "tessera-pretrain", "torch", "torchvision", "timm", "numpy", "webdataset", "accelerate", "mlflow", "safetensors",
    "omegaconf", "deepspeed", "transformers", "diffusers", "triton", "pillow", "simplejpeg",
)  # fmt: skip
GIT_TIMEOUT_S = 10.0


def environment() -> dict[str, Any]:
    """Versions, hardware, git revision and command line of this process.

    Keys: python, platform, hostname, packages {name: version}, torch {version, cuda, cudnn, nccl}, cpu {model, count},
    memory_bytes, gpus [names], git {revision, branch, dirty} or None, command [argv].
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "command": [redact_argument(argument) for argument in sys.argv],
        "packages": package_versions(),
        "torch": _torch_build(),
        "cpu": {"model": _cpu_model(), "count": _num_usable_cpus()},
        "memory_bytes": _memory_bytes(),
        "gpus": _gpu_names(),
        "git": git_revision(Path(__file__).resolve().parent),
    }


def environment_tags(environment: Mapping[str, Any]) -> dict[str, str]:
    """The environment as flat MLflow tags `env.*`, plus the tags by which MLflow's own pages show the git revision."""
    if not environment:
        return {}
    cpu = environment.get("cpu") or {}
    tags = {
        "env.python": str(environment.get("python")),
        "env.platform": str(environment.get("platform")),
        "env.hostname": str(environment.get("hostname")),
        "env.cpu": f"{cpu.get('model', '?')}, {cpu.get('count', '?')} usable",
        "env.gpus": ", ".join(environment.get("gpus", [])) or "none",
        "mlflow.source.name": " ".join(environment.get("command", [])),
        "mlflow.source.type": "LOCAL",
    }
    tags |= {f"env.package.{name}": version for name, version in environment.get("packages", {}).items()}
    tags |= {f"env.torch.{name}": str(value) for name, value in environment.get("torch", {}).items() if value}
    git = environment.get("git")
    if git:
        tags["mlflow.source.git.commit"] = git["revision"]
        tags["mlflow.source.git.branch"] = git["branch"]
        tags["git.dirty"] = str(git["dirty"]).lower()
    return tags


def package_versions() -> dict[str, str]:
    """Versions of the installed packages among those that decide a run's numbers."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Revision, branch and dirty flag of the repository that tracks `folder`; None without git, or when none tracks it.

    That a repository merely surrounds the folder is not enough: a package installed in the `.venv` of somebody's
    project is no part of that project's history. Dirty means: a tracked file differs from the revision.
    """
    if not _git(folder, "ls-files", "--", "."):
        return None
    revision, branch = _git(folder, "rev-parse", "HEAD"), _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if not revision or changes is None:
        return None
    return {"revision": revision, "branch": branch or "", "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None when it fails; never takes the repository's index lock."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def redact_url(text: str) -> str:
    """`text` with the password of every URL in it replaced: `scheme://user:secret@host` -> `scheme://user:***@host`."""
    # Greedy up to the last @ before the path: a password may itself contain an @.
    return re.sub(r"(?<=://)([^\s/:@]*):[^\s/]*@", r"\1:***@", text)


def redact_argument(argument: str) -> str:
    """A command-line argument without passwords in URLs and without the values of keys such as `access_token=`."""
    names = r"password|passwd|secret|api_?key|(?:access|auth|hf)_token"
    return redact_url(re.sub(rf"(?i)((?:{names})\s*=).+", r"\1***", argument))


def _torch_build() -> dict[str, Any]:
    import torch

    nccl = None
    if torch.cuda.is_available() and torch.distributed.is_available() and torch.distributed.is_nccl_available():
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {"version": torch.__version__, "cuda": torch.version.cuda, "cudnn": cudnn, "nccl": nccl}


def _gpu_names() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _num_usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
