"""What starts cost: processor time of imports in fresh interpreters, as ratios to `import torch`.

`python tools/bench_imports.py [ROUNDS]`: each round runs every line once, so that other work on the machine meets all
alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

CODES = ("import torch", "import pretrain.train", "import pretrain.config", "import launchers.cli")


def processor_s(code: str) -> float:
    """User and system seconds of a fresh interpreter that runs `code`."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Prints a row per line of code: median seconds, and their ratio to the first line's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {code: [] for code in CODES}
    for _ in range(rounds):
        for code in CODES:
            seconds[code].append(processor_s(code))
    base = statistics.median(seconds[CODES[0]])
    for code, values in seconds.items():
        print(f"{code:24} {statistics.median(values):6.2f} s  x {statistics.median(values) / base:.2f}")


if __name__ == "__main__":
    main()
