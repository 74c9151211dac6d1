"""`tessera sync`: what MLflow does not have yet of a run's journal -> MLflow."""

import argparse
from pathlib import Path

HELP = "Send what MLflow does not have yet of a run's journal; safe to repeat, and safe beside a running training."
EXAMPLES = """\
tessera sync runs/digits                               to the tracking server that the run was configured with
tessera sync runs/digits --uri http://mlflow.lan:5000  the whole run to another server
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and --uri."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run, <output_dir>/<name>")
    parser.add_argument("--uri", help="another MLflow tracking URI than the run's own; it gets the whole journal")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Sends the rest of the journal.

    Raises:
        FileNotFoundError: there is no folder RUN.
        ValueError: RUN is no run, or the URI is none.
        ShippingError: MLflow cannot be reached, or does not take the journal.
    """
    from rich.console import Console

    from pretrain.tracking.tracker import check_uri, sync

    if arguments.uri is not None:
        check_uri(arguments.uri)
    result = sync(arguments.run, arguments.uri)
    console = Console(stderr=True)
    line = f"{result.num_records:,} records sent to {result.tracking_uri}, run {result.mlflow_run_id}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    for path in result.deferred_artifacts:
        line = f"the artifact store refused {path}; the next sync tries it again"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return {
        "tracking_uri": result.tracking_uri,
        "mlflow_run_id": result.mlflow_run_id,
        "num_records": result.num_records,
        "deferred_artifacts": list(result.deferred_artifacts),
    }
