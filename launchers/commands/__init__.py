"""One file per `tessera` subcommand: `add_arguments(parser)` and `run(arguments)`."""
