"""`tessera recipes`: the recipes and suites that are shipped, and a copy of one."""

from __future__ import annotations

import argparse

HELP = "List the shipped recipes and suites, each with one line, or show one to copy it."
EXAMPLES = """\
tessera recipes                                         all of them
tessera recipes show mae/vit_base > my_recipe.yaml      a copy to change
tessera train mae/vit_base data.train=/shards/train     a recipe is found by its name
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`show NAME`, or nothing."""
    parser.add_argument("action", nargs="?", choices=("list", "show"), default="list", help="default: list")
    parser.add_argument("name", nargs="?", help="of the recipe to show, as the list has it")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Prints the list, or the recipe's file.

    Raises:
        ValueError: there is no recipe of that name.
    """
    from pretrain.recipes import find_recipe, no_such_recipe, recipe_names, summary_of

    if (arguments.action == "show") != (arguments.name is not None):
        raise ValueError("give the recipe's name with `show`: tessera recipes show NAME")
    if arguments.name is not None:
        if arguments.name not in recipe_names():
            raise ValueError(no_such_recipe(arguments.name))
        text = find_recipe(arguments.name).read_text(encoding="utf-8")
        if not arguments.json:
            print(text, end="")
        return {"name": arguments.name, "text": text}
    listed = {name: summary_of(name) for name in recipe_names()}
    if not arguments.json:
        width = max(len(name) for name in listed)
        for name, summary in listed.items():
            print(f"{name:{width}}  {summary}")
    return {"recipes": listed}
