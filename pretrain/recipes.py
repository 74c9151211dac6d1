"""The recipes that are shipped: found by name wherever the package is installed.

Enters: a name such as `mae/vit_base`. Leaves: the YAML file that it stands for. In a checkout they lie in `configs/`,
in a wheel in the package `tessera_recipes`.
"""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path


def recipes_folder() -> Path:
    """Where the recipes lie."""
    checkout = Path(__file__).resolve().parent.parent / "configs"
    if checkout.is_dir():
        return checkout
    found = importlib.util.find_spec("tessera_recipes")
    places = list(found.submodule_search_locations or []) if found is not None else []
    return Path(places[0]) if places else checkout


def recipe_names() -> list[str]:
    """The names of all recipes and suites, sorted; the phases of a pipeline included."""
    folder = recipes_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def summary_of(name: str) -> str:
    """What a recipe is, in one line: the first comment of its file."""
    first = find_recipe(name).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def find_recipe(name: str | Path) -> Path:
    """The file that a path or a recipe's name stands for; where there is neither, the path itself.

    Args:
        name: a file, which comes first, or a recipe: `mae/vit_base`, with or without `configs/` and `.yaml`.
    """
    path = Path(name)
    if path.is_file() or path.is_absolute():
        return path
    plain = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    recipe = recipes_folder() / f"{plain}.yaml"
    return recipe if recipe.is_file() and ".." not in path.parts else path


def no_such_recipe(name: str | Path) -> str:
    """What to say where neither a file nor a recipe has this name."""
    plain = Path(name).as_posix().removeprefix("configs/").removesuffix(".yaml")
    close = difflib.get_close_matches(plain, recipe_names(), n=1, cutoff=0.5)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return (
        f"no configuration file at {name}, and no recipe of that name{meant}; `tessera recipes` lists the shipped ones"
    )
