"""What a start imports: it is paid by every rank, command and test, so that it must not grow back unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = {"data_pipes", "launchers", "pretrain"}
CONFIGURATION = {"attr", "cachetools", "cython_runtime", "fsspec", "numpy", "omegaconf", "yaml"}
"""The packages that reading a configuration may import, beside the standard library."""
TRAINING = CONFIGURATION | {"PIL", "psutil", "rich", "safetensors", "simplejpeg"}
"""The packages that `import pretrain.train` may import, beside torch and what torch imports itself."""
NOT_OF_TORCH = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.onnx",
    "torch.utils.tensorboard",
)
"""Parts of torch that take longer to import than it is worth at a start; they are imported where they are used."""
SCRIPT = """
import json, sys
torch_only = set()
if {with_torch}:
    import torch
    torch_only = set(sys.modules)
{code}
names = set(sys.modules)
print(json.dumps(sorted(names - torch_only)))
"""


def imported(root: Path, code: str, *, with_torch: bool = False) -> set[str]:
    """The modules that a fresh interpreter has imported after `code`, without those that torch imports on its own."""
    script = SCRIPT.format(code=code, with_torch=with_torch)
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    """The top-level packages, without Python's own, compiled parts of others, and this project's."""
    tops = {name.partition(".")[0] for name in modules}
    return {name for name in tops if name not in sys.stdlib_module_names and not name.startswith("_")} - PROJECT


def test_training_imports_what_the_list_says(root: Path) -> None:
    found = imported(root, "import pretrain.train", with_torch=True)
    assert packages(found) <= TRAINING
    assert not [name for name in NOT_OF_TORCH if name in found]


def test_a_configuration_is_read_without_torch(root: Path) -> None:
    found = imported(root, "import pretrain.config, pretrain.phases")
    assert packages(found) <= CONFIGURATION


def command(words: str) -> str:
    """Code that runs a command line and expects that it ends with exit code 0 or 2."""
    return (
        f"from launchers.cli import main\ntry:\n    code = main({words.split()!r})\n"
        "except SystemExit as end:\n    code = end.code\nassert code in (0, 2, None), code"
    )


@pytest.mark.parametrize(
    "words",
    [
        "train no_such_file.yaml",
        "train configs/demo/digits.yaml train.stepz=1",
        "train configs/demo/digits.yaml objective.model.encoder.width=7",
        "train configs/dcae/tiny/pipeline.yaml data.train=x phase2.optim.lr=fast",
        "report no_such_folder",
        "sync no_such_folder",
        "cache status no_such_folder",
        "data stats no_such_folder",
        "index no_such_folder",
        "pack no_such_folder out",
    ],
)
def test_mistakes_are_found_without_torch(root: Path, words: str) -> None:
    assert "torch" not in packages(imported(root, command(words)))


@pytest.mark.parametrize(
    "name",
    [
        *("", "train", "eval", "export", "encode", "decode", "reconstruct", "report", "sync", "pack", "index"),
        *("data", "data stats", "data verify", "data peek", "cache", "cache status"),
    ],
)
def test_help_imports_next_to_nothing(root: Path, name: str) -> None:
    assert packages(imported(root, command(f"{name} --help"))) <= {"rich", "markdown_it", "mdurl", "pygments"}
