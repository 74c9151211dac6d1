"""The `tessera` command: an explicit table of subcommands, exit codes, and one JSON line with `--json`.

Exit codes: 0 done, 1 failed, 2 a mistake in the input (the message says what was found, expected, and what to do).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from data_pipes.errors import UserError

COMMANDS = (
    *("pack", "index", "data", "cache", "train", "eval", "export"),
    *("encode", "decode", "reconstruct", "report", "sync", "fork", "recipes"),
)
"""Each is a module of `launchers/commands` with HELP, EXAMPLES, add_arguments and run."""


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        command: the only subcommand that it gets, which saves importing the others; None, or what is no command: all.
    """
    parser = argparse.ArgumentParser(
        prog="tessera",
        description="Pretrain visual models from WebDataset shards: pack, train, evaluate, export, report.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS if command not in COMMANDS else (command,):
        module = importlib.import_module(f"launchers.commands.{name}")
        subparser = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print one JSON object on one line")
        subparser.set_defaults(run_command=module.run)
    return parser


def parse(given: Sequence[str]) -> argparse.Namespace:
    """Parses a command line; `key=value` overrides may also stand behind options, where argparse alone refuses them."""
    parser = build_parser(given[0] if given else None)
    arguments, rest = parser.parse_known_args(given)
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(overrides) < len(rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the command line without the program's name; None: that of this process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(given)
    try:
        result = arguments.run_command(arguments)
    except (ValueError, OSError, ImportError, UserError) as error:
        print(f"tessera {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tessera {arguments.command}: interrupted", file=sys.stderr)
        return 1
    if arguments.json and result:  # ranks other than 0 have nothing to say
        print(json.dumps(result, default=str), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
