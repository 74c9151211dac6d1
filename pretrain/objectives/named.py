"""Finds the objective that a configuration names: one of the table, or somebody's own.

Enters: `objective.name`. Leaves: the dataclass of its keys and what makes it, or an error that says what is wrong with
the class. It exists so that nothing else has to know which objectives there are.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.extensions import OBJECTIVES_GROUP, ExtensionError, extension_names, find_extension
from pretrain.objectives.table import OBJECTIVES

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective


def find_objective(name: str, *, apart_from: Path | None = None) -> tuple[type[Any], Callable[[Any, int], Objective]]:
    """The dataclass of an objective's configuration, and what makes the objective as `make(config, seed)`.

    Args:
        name: `objective.name`.
        apart_from: see `find_extension`.

    Raises:
        KeyError: there is no objective of this name.
        ExtensionError: its module or class cannot be found, or it is no objective.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    found = find_extension(name, OBJECTIVES_GROUP, "objective.name", apart_from=apart_from)
    if found is None:
        raise KeyError(name)
    from pretrain.objectives.base import Objective

    what = f"objective.name is {name!r}, which is"
    if not inspect.isclass(found) or not issubclass(found, Objective):
        kind = f"the class {found.__name__}" if inspect.isclass(found) else f"a {type(found).__name__}"
        raise ExtensionError(f"{what} {kind}; expected a subclass of pretrain.objectives.base.Objective")
    if inspect.isabstract(found):
        raise ExtensionError(f"{what} an Objective without {', '.join(sorted(found.__abstractmethods__))}: define them")
    config_class = getattr(found, "config_class", None)
    if not inspect.isclass(config_class) or not dataclasses.is_dataclass(config_class):
        raise ExtensionError(
            f"{what} an Objective whose config_class is {config_class!r}; expected the dataclass of the keys under "
            "`objective`"
        )
    if "name" in {field.name for field in dataclasses.fields(config_class)}:
        raise ExtensionError(f"{what} an Objective whose config_class has a field `name`; that key names the objective")
    return config_class, found


def known_objectives() -> list[str]:
    """The names that a configuration can give, besides import paths."""
    return [*OBJECTIVES, *(name for name in extension_names(OBJECTIVES_GROUP) if name not in OBJECTIVES)]


def check_backbone(objective: Objective, name: str) -> None:
    """Looks whether what an objective trains can be loaded again for evaluation and export.

    Args:
        objective: on the meta device.
        name: `objective.name`, for messages.

    Raises:
        ExtensionError: it does not say what its backbone is, or weights and backbone do not fit each other.
    """
    what = f"the objective {name}"
    missing = [known for known in ("players", "backbone_player", "backbone_prefix") if not hasattr(objective, known)]
    if missing:
        raise ExtensionError(f"{what} does not set {', '.join(missing)}; see pretrain/objectives/base.py")
    player, prefix = objective.backbone_player, objective.backbone_prefix
    if player not in objective.players:
        raise ExtensionError(f"{what} names {player!r} as backbone_player; its players are {list(objective.players)}")
    saved = {
        name.removeprefix(prefix): tensor.shape
        for name, tensor in objective.players[player].state_dict().items()
        if name.startswith(prefix)
    }
    wanted = {name: tensor.shape for name, tensor in objective.build_backbone().state_dict().items()}
    apart = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if apart:
        raise ExtensionError(
            f"{what}: the weights of player {player!r} below {prefix!r} do not fit what build_backbone() gives, so "
            f"that no checkpoint could be evaluated; {len(apart)} names or shapes differ, the first is {apart[0]!r}"
        )
