"""What the launcher told this process: the variables of torchrun, accelerate and DeepSpeed, read as one set.

Enters: the environment. Leaves: a `Launch`, or an error that names the variable. One variable alone means nothing: a
`WORLD_SIZE` that a scheduler or notebook left behind would make one process train on a part of each batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""Variables that hold an integer."""
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
"""Variables that say where the processes meet."""
_COMMAND = "torchrun --nproc-per-node N -m pretrain CONFIG"
"""How several processes are started."""


class LaunchError(ValueError):
    """The launcher's variables do not fit together; the message names them and says what to do."""


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process."""

    rank: int = 0
    """Number of this process over all nodes, from 0."""
    size: int = 1
    """Number of processes over all nodes."""
    local_rank: int = 0
    """Number of this process on its node, from 0."""
    ranks_per_node: int = 1
    """Number of processes on this node."""
    by_torchrun: bool = False
    """Whether there was a launcher: then there is a process group, even of one process."""

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None) -> Launch:
        """The launcher's variables; without them one process alone.

        Understood are torchrun, `accelerate launch`, DeepSpeed's launcher (which calls LOCAL_WORLD_SIZE LOCAL_SIZE),
        and whoever sets the same variables.

        Args:
            environment: of the process; None: this one's.

        Raises:
            LaunchError: some variables are missing, are no numbers, or contradict each other, or srun started several
                tasks without them.
        """
        given = dict(os.environ if environment is None else environment)
        if "LOCAL_SIZE" in given:
            given.setdefault("LOCAL_WORLD_SIZE", given["LOCAL_SIZE"])
        present = [name for name in _NUMBERS if name in given]
        if not present or (present == ["WORLD_SIZE"] and given["WORLD_SIZE"] == "1"):
            _check_srun(given)
            return Launch()
        missing = [name for name in (*_NUMBERS, *_MEETING) if not given.get(name)]
        if missing:
            shown = ", ".join(f"{name}={given[name]}" for name in present)
            raise LaunchError(
                f"the environment has {shown} and no {', '.join(missing)}; a launcher sets all of them. Start several "
                f"processes by `{_COMMAND}`, or one process after `unset {' '.join(present)}`"
            )
        numbers = {name: _number(name, given[name]) for name in (*_NUMBERS, "MASTER_PORT")}
        rank, local_rank, size, per_node, port = numbers.values()
        _check(0 <= rank < size, f"RANK={rank} and WORLD_SIZE={size}", "0 <= RANK < WORLD_SIZE")
        _check(
            0 <= local_rank < per_node,
            f"LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={per_node}",
            "0 <= LOCAL_RANK < LOCAL_WORLD_SIZE",
        )
        _check(
            per_node <= size and local_rank <= rank,
            f"RANK={rank}, LOCAL_RANK={local_rank}, WORLD_SIZE={size} and LOCAL_WORLD_SIZE={per_node}",
            "a node to have no more processes than there are in all",
        )
        _check(0 < port < 65536, f"MASTER_PORT={port}", "a port, 1 to 65535")
        return Launch(rank, size, local_rank, per_node, by_torchrun=True)


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise LaunchError(f"the environment has {name}={text!r}; expected an integer, as a launcher sets it") from error


def _check(holds: bool, found: str, expected: str) -> None:
    if not holds:
        raise LaunchError(f"the environment has {found}; expected {expected}. Start the processes by `{_COMMAND}`")


def _check_srun(given: Mapping[str, str]) -> None:
    """Refuses tasks of one `srun` that know nothing of each other: each would be a whole run.

    Raises:
        LaunchError: there are several.
    """
    tasks = given.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" in given and tasks != "1":
        raise LaunchError(
            f"srun started {tasks} tasks (SLURM_STEP_NUM_TASKS) without a launcher, and each would train alone. "
            "Start one launcher per node: srun --ntasks-per-node=1 torchrun --nnodes $SLURM_NNODES --nproc-per-node "
            "GPUS --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID --rdzv-endpoint FIRST_NODE:29500 -m pretrain CONFIG"
        )
