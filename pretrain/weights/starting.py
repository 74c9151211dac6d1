"""Where a run's starting weights come from: the seed, an earlier run, or somebody else's file.

Enters: an objective on the CPU, and what `objective.init_from` names. Leaves: the same objective with weights. Why it
exists: phases of a training chain, fine-tuning on one's own pictures and published weights all begin here, and a file
that fits half is an error with names rather than a model that is half random.
"""

from __future__ import annotations

from torch import Tensor, nn

from data_pipes.store.urls import local_path
from pretrain.checkpoint.dcp import read_tensors
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import checkpoint_of, find_damage, list_checkpoints
from pretrain.models.mae import MAE
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.models.video_mae import VideoMAE
from pretrain.objectives.base import Objective
from pretrain.weights.files import shapes_of
from pretrain.weights.finding import named_file


def initialize(objective: Objective, seed: int, init_from: str | None) -> None:
    """Fills all players with their starting values from `seed`, then with what `init_from` holds.

    From a checkpoint of the same model every player that is in it is taken over, by its moving average where it has
    one.

    Args:
        objective: on the CPU, with materialised parameters.
        seed: of the run.
        init_from: a run (its newest complete checkpoint) or a checkpoint, also in an object store; an exported folder
            or a weights file of this machine. None: only the seed counts.
    Raises:
        ValueError: there is nothing, or names or shapes do not fit.
    """
    objective.start(seed)
    if init_from is None:
        return
    checkpoint = checkpoint_at(init_from)
    if checkpoint is not None and _load_players(objective, checkpoint):
        return
    _load_other_layout(objective.players[objective.backbone_player], init_from)


def checkpoint_at(where: str) -> Folder | None:
    """The checkpoint that a path or URL names, or the newest complete one of the run that it names.

    Args:
        where: `objective.init_from`.
    Returns:
        None where it is neither, but a weights file or an exported folder.
    Raises:
        ValueError: there is nothing at all, or a damaged checkpoint.
    """
    if named_file(where) is not None:
        return None
    folder = open_folder(where)
    if not folder.exists():
        raise ValueError(
            f"objective.init_from is {where}, and nothing is there; give a run, a checkpoint or a weights file"
        )
    checkpoint = checkpoint_of(folder)
    if checkpoint is None:
        if "run.json" in folder.files() or list_checkpoints(folder):
            raise ValueError(f"objective.init_from is {where}, which holds no complete checkpoint")
        return None
    damage = find_damage(checkpoint, hashes=False)
    if damage is not None:
        raise ValueError(f"objective.init_from: {checkpoint} is damaged ({damage}); use another checkpoint of the run")
    return checkpoint


def _load_players(objective: Objective, checkpoint: Folder) -> bool:
    """Loads every player that the checkpoint holds.

    Returns:
        False where its main player is another model; nothing is loaded then.
    """
    found = {player: _saved_weights(checkpoint, player) for player in objective.players}
    main = objective.backbone_player
    if not _fits(found[main], objective.players[main]):
        return False
    for player, module in objective.players.items():
        if _fits(found[player], module):
            module.load_state_dict(found[player])
    return True


def _saved_weights(checkpoint: Folder, player: str) -> dict[str, Tensor]:
    """A player's weights: the moving average where there is one; empty where the checkpoint has no such player."""
    return read_tensors(checkpoint, f"ema.{player}.") or read_tensors(checkpoint, f"model.{player}.")


def _fits(state: dict[str, Tensor], module: nn.Module) -> bool:
    """Whether names and shapes are those of the module."""
    return shapes_of(state) == shapes_of(module.state_dict())


def _load_other_layout(module: nn.Module, where: str) -> None:
    """Loads the layouts of others, and of our own models of another kind or size, from a path of this machine."""
    path = local_path(where)
    if isinstance(module, MAE):
        from pretrain.weights.image import load_initial_weights

        load_initial_weights(path, module)
    elif isinstance(module, VideoMAE):
        from pretrain.weights.video import load_video_weights

        load_video_weights(path, module)
    elif isinstance(module, DCAE):
        from pretrain.weights.dc_ae import load_dc_ae_weights

        load_dc_ae_weights(path, module)
    else:
        raise ValueError(
            f"objective.init_from is {where}, which does not fit the model ({type(module).__name__}); for this model "
            "only checkpoints of the same configuration can be taken over"
        )
