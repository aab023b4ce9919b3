"""The command line: thin functions from options to calls."""

import sys

import typer
from rich.text import Text

from defensivekv.cli.ask import ask
from defensivekv.cli.bench import bench
from defensivekv.cli.compress import compress
from defensivekv.cli.contexts import app as contexts
from defensivekv.cli.demo import demo
from defensivekv.cli.evaluate import evaluate
from defensivekv.cli.lm_eval import lm_eval
from defensivekv.cli.policies import list_policies
from defensivekv.cli.profile import profile
from defensivekv.cli.serve import serve
from defensivekv.console import make_console
from defensivekv.errors import DefensiveKVError

app = typer.Typer(
    help="Evict the part of the KV cache that does not matter, and really give the memory back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(ask)
app.command()(compress)
app.add_typer(contexts, name="contexts")
app.command()(evaluate)
app.command()(bench)
app.command()(lm_eval)
app.command("policies")(list_policies)
app.command()(profile)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def main() -> None:
    """Runs the command line; errors that were raised on purpose become one line and exit status 2."""
    try:
        app()
    except DefensiveKVError as error:
        make_console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {error}"))
        sys.exit(2)
