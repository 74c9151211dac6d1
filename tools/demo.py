"""`make demo`: packaged pictures to an evaluated, exported, reported masked autoencoder, by a user's own commands.

Prints each command with its time on standard error, and one JSON line with the results on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where data, run and export go")
    parser.add_argument("--keep", action="store_true", help="continue the demo that is in the folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of configs/demo/digits.yaml")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    folder: Path = arguments.folder / "demo"
    if not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)
    started_s = time.perf_counter()
    run_dir, data, export = folder / "demo_digits", folder / "data", folder / "timm"
    tessera = str(BIN / "tessera")
    step([tessera, "pack", "digits", str(data), "--val-fraction", "0.2", "--json"])
    overrides = [f"data.train={data}/train", f"data.val={data}/val", f"output_dir={folder}", *arguments.overrides]
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "pretrain"]
    trained = step([*torchrun, "configs/demo/digits.yaml", *overrides, "--json"])
    suite = ["--suite", "configs/eval/demo.yaml", "--untrained", "--json"]
    evaluated = step([tessera, "eval", str(run_dir), *suite])
    exported = step([tessera, "export", trained["checkpoint"], str(export), "--to", "timm", "--json"])
    report = step([tessera, "report", str(run_dir), "--json"])
    tracked = step([tessera, "sync", str(run_dir), "--json"])
    seconds = round(time.perf_counter() - started_s, 1)
    print(
        f"\nThe report: {report['report']}\nMLflow:     mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db",
        file=sys.stderr,
    )
    result = {
        "seconds": seconds,
        "trained": evaluated["trained"],
        "untrained": evaluated["untrained"],
        "train": trained,
        "export": exported,
        "report": report["report"],
        "mlflow_run_id": tracked.get("mlflow_run_id"),
    }
    print(json.dumps(result), flush=True)
    return 0


def step(command: list[str]) -> dict[str, Any]:
    """Runs one command, shown as a user would type it; returns the JSON object that it prints last."""
    shown = shlex.join([Path(command[0]).name, *command[1:]])
    print(f"\n$ {shown}", file=sys.stderr, flush=True)
    begin_s = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"the demo stopped: `{shown}` ended with exit code {done.returncode}")
    print(f"  ({time.perf_counter() - begin_s:.1f} s)", file=sys.stderr, flush=True)
    parsed: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return parsed


if __name__ == "__main__":
    sys.exit(main())
