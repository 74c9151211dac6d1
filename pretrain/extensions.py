"""What a configuration names and this package does not bring: objectives, protocols and export targets of others.

Enters: an import path (`my_package.my_module:Name`) or the name of an entry point. Leaves: the object, or an error that
says what was looked for. It exists so that whoever writes one needs no copy of the package.

Naming something here runs its code. The working directory is searched first, as `python -m` does, so that `tessera
train` and the ranks that `torchrun -m pretrain` starts find the same file; with `python -P` it is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

OBJECTIVES_GROUP = "tessera.objectives"
"""Entry points that are classes of `pretrain.objectives.base.Objective`."""
PROTOCOLS_GROUP = "tessera.protocols"
"""Entry points that are a `Protocol` of encoders or a `TokenizerProtocol`."""
EXPORTERS_GROUP = "tessera.exporters"
"""Entry points that are functions of `pretrain.export.targets.Exporter`'s signature."""


class ExtensionError(ValueError):
    """Something of others that cannot be used; the message names it, and says what was looked for."""


def find_extension(name: str, group: str, where: str, *, apart_from: Path | None = None) -> Any | None:
    """The object that an import path or an entry point names.

    Args:
        name: `package.module:attribute`, or what an installed distribution registers in `group`.
        group: of entry points.
        where: the name's place for messages, e.g. "objective.name".
        apart_from: a folder that somebody else may have written; code that lies in it is refused.

    Returns:
        None: there is no such entry point, and the name is no import path.

    Raises:
        ExtensionError: the module cannot be imported, or has no such attribute.
    """
    if ":" in name:
        return _imported(name, f"{where} is {name!r}", apart_from)
    for entry in entry_points(group=group, name=name):
        path = f"{entry.module}:{entry.attr}"
        return _imported(path, f"{where} is {name!r}, in group {group} the entry point {path!r}", None)
    return None


def extension_names(group: str) -> list[str]:
    """The names that installed distributions register in a group of entry points."""
    return sorted({entry.name for entry in entry_points(group=group)})


def _imported(path: str, what: str, apart_from: Path | None) -> Any:
    """The object at an import path; `what` begins every message."""
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", path):
        raise ExtensionError(f"{what}; expected package.module:Name")
    module_name, _, attribute = path.partition(":")
    found: Any = _import_module(module_name, what, apart_from)
    for name in attribute.split("."):
        if not hasattr(found, name):
            place = getattr(found, "__file__", None) or module_name
            raise ExtensionError(f"{what}: {place} was imported, and there is no {attribute!r} in it")
        found = getattr(found, name)
    return found


def _import_module(name: str, what: str, apart_from: Path | None) -> Any:
    """Imports a module, each package on the way first, and none of them from within `apart_from`."""
    _search_working_directory()
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        prefix = ".".join(parts[:end])
        if prefix not in sys.modules:
            _check_place(prefix, name, what, apart_from)
        try:
            importlib.import_module(prefix)
        except Exception as error:  # whatever somebody's module raises is that module's mistake
            raise ExtensionError(f"{what}: importing {prefix} failed with {type(error).__name__}: {error}") from error
    return sys.modules[name]


def _check_place(prefix: str, name: str, what: str, apart_from: Path | None) -> None:
    """Looks where a module lies, before any of its code runs."""
    importlib.invalidate_caches()  # a file may be younger than the last look into its folder
    try:
        spec = importlib.util.find_spec(prefix)
    except ModuleNotFoundError:  # its parent is a module and no package
        spec = None
    if spec is None:
        raise ExtensionError(
            f"{what}: no module {prefix!r} was found; looked for {name.replace('.', '/')}.py or the package "
            f"{name.replace('.', '/')}/ in the working directory {Path.cwd()} and on Python's path (PYTHONPATH, "
            "installed distributions)"
        )
    if apart_from is None or spec.origin is None:
        return
    if Path(spec.origin).resolve().is_relative_to(apart_from.resolve()):
        raise ExtensionError(
            f"{what}: {spec.origin} lies within {apart_from}, and code that comes with a run is never run; if you "
            "trust it, put it elsewhere on Python's path"
        )


def _search_working_directory() -> None:
    """Puts the working directory first on Python's path, where it is not there yet."""
    here = os.getcwd()
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.insert(0, here)
