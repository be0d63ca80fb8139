"""Every command of alignkit: its options, and which room does the work.

Deliberately does none of the work, and loads typer, `ending` and the standard library only: everything else is imported
by the command that needs it, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from alignkit.cli.look import chat, check, diff, doctor, merge, preview, report, schema
from alignkit.cli.measure import evaluate
from alignkit.cli.train import rlaif, run, stage_command
from alignkit.ending import SUPERVISED, end, end_usage_error, leave

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from alignkit import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _alignkit(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """From base weights to an aligned, measured language model with one recipe file."""


app.command("sft", help="Train on demonstrations, or pre-train on raw text.")(stage_command("sft"))
app.command("rm", help="Train a reward model on comparisons.")(stage_command("rm"))
app.command("dpo", help="Train the policy directly on preferences.")(stage_command("dpo"))
app.command("ppo", help="Train the policy on sampled answers and a reward, with a critic.")(stage_command("ppo"))
app.command()(rlaif)
app.command()(run)
app.command()(check)
app.command()(preview)
app.command()(schema)
app.command()(doctor)
app.command()(merge)
app.command("eval")(evaluate)
app.command()(chat)
app.command()(diff)
app.command()(report)


def main() -> int:
    """Run the command line and return the exit code; every failure is one message, shown once.

    A user's mistake never shows a traceback: ours goes to `error.log` in the run directory, or to
    `alignkit-error.log` here when there is no run yet. With ALIGNKIT_DEBUG=1 every failure shows its traceback.
    """
    # Imports make many objects and no garbage: looking for some costs a tenth of them. `launch` switches it on again.
    gc.disable()
    # Pydantic would search every installed distribution for plugins; alignkit has none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if SUPERVISED in os.environ:
        from alignkit.launch.worker import attach

        attach()
    place: dict[str, Path] = {}
    try:
        code = app(standalone_mode=False, prog_name="alignkit", obj=place)
    except TyperException as error:
        return end_usage_error(error)
    except typer.Abort:
        return leave(130, ["interrupted"])
    except Exception as error:
        if os.environ.get("ALIGNKIT_DEBUG") == "1":
            import traceback

            traceback.print_exception(error)
        return end(error, place.get("run_dir"))
    if code == 130:  # typer turns KeyboardInterrupt into this code without a word
        return leave(130, ["interrupted"])
    return leave(code if isinstance(code, int) else 0)
