"""The launcher's variables are read as one set: complete, consistent, or an error that names what is wrong."""

from __future__ import annotations

import socket

import pytest

from pretrain.parallel.launch import Launch, LaunchError
from pretrain.parallel.world import join_world

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_a_whole_set_is_read() -> None:
    assert Launch.from_environment(TORCHRUN) == Launch(5, 8, 1, 4, by_torchrun=True)


def test_deepspeed_calls_the_processes_of_a_node_by_another_name() -> None:
    given = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "4"}
    assert Launch.from_environment(given | {"CROSS_RANK": "1", "CROSS_SIZE": "2"}).ranks_per_node == 4


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "localhost"}, {"WORLD_SIZE": "1"}, {"SLURM_PROCID": "0"}])
def test_one_process_alone(given: dict[str, str]) -> None:
    assert Launch.from_environment(given) == Launch()


@pytest.mark.parametrize("name", list(TORCHRUN))
def test_a_missing_variable_is_named(name: str) -> None:
    given = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(LaunchError, match=rf"and no {name};"):
        Launch.from_environment(given)
    with pytest.raises(LaunchError, match=rf"and no {name};"):
        Launch.from_environment(given | {name: ""})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2 and no RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0"}, "has RANK=0 and no LOCAL_RANK"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "and no RANK"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8 and WORLD_SIZE=8; expected 0 <= RANK < WORLD_SIZE"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 and LOCAL_WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "16"}, "a node to have no more processes"),
        (TORCHRUN | {"RANK": "0"}, "RANK=0, LOCAL_RANK=1"),
        (TORCHRUN | {"WORLD_SIZE": "eight"}, "WORLD_SIZE='eight'; expected an integer"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT=0; expected a port"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        Launch.from_environment(given)


def test_a_port_of_another_program_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        for name, value in (here | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(LaunchError, match=rf"127.0.0.1:{port} .* is in use by another program"):
            join_world("cpu", 30.0)
