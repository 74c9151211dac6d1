"""One rank of a run under test: `python -m pretrain` that also writes down which samples it trained on, and can pause.

usage: python -m tests.faults.worker CONFIG [key=value ...]      (under torchrun, or forked by the process server)

TESSERA_TEST_RECORD is a folder: gets `<rank>-<pid>.jsonl` with the positions and keys of every micro-batch that the
loop took. TESSERA_TEST_PAUSE is `phase:step:rank:seconds`, a list of them with commas: that rank makes the file
`paused-<phase>-<step>` in the record folder when it is about to begin the phase, then waits there for so long, or until
there is a file `go-on-<phase>-<step>`, so that a signal can be sent in the phase. The second of two pauses at the same
place is for the second time that the process comes there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from data_pipes.batch import Batch
from data_pipes.loader import Loader
from pretrain.__main__ import main as pretrain_main
from pretrain.watchdog.watchdog import Watchdog


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    folder = Path(os.environ["TESSERA_TEST_RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    _record_samples(folder / f"{os.environ.get('RANK', '0')}-{os.getpid()}.jsonl")
    _pause(folder, os.environ.get("TESSERA_TEST_PAUSE", ""))
    return pretrain_main(arguments)


def _record_samples(path: Path) -> None:
    batches = Loader.batches

    def recorded(self: Loader, position: int) -> Iterator[Batch]:
        with path.open("a") as file:
            for batch in batches(self, position):
                file.write(json.dumps([batch.positions.tolist(), batch.keys]) + "\n")
                file.flush()
                yield batch

    Loader.batches = recorded  # type: ignore[method-assign]


def _pause(folder: Path, wanted: str) -> None:
    rank = os.environ.get("RANK", "0")
    pauses: dict[tuple[str, int], list[float]] = {}
    for pause in filter(None, wanted.split(",")):
        phase, step, who, seconds = pause.split(":")
        if who == rank:
            pauses.setdefault((phase, int(step)), []).append(float(seconds))
    if not pauses:
        return
    beat = Watchdog.beat

    def pausing(self: Watchdog, phase: str, step: int) -> None:
        beat(self, phase, step)
        waiting = pauses.get((phase, step))
        if waiting:
            deadline = time.monotonic() + waiting.pop(0)
            (folder / f"paused-{phase}-{step}").touch()
            go_on = folder / f"go-on-{phase}-{step}"
            while time.monotonic() < deadline and not go_on.exists():  # a loop in Python, not one wait in native code
                time.sleep(0.01)

    Watchdog.beat = pausing  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
