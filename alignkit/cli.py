"""Every command of alignkit: its options, which room does the work, and how each failure ends.

Deliberately does none of the work, and loads typer and the standard library only: everything else is imported
by the command that needs it, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer.exceptions import TyperException

if TYPE_CHECKING:
    from alignkit.errors import AlignKitError
    from alignkit.recipe import Recipe

RecipeFile = Annotated[
    Path, typer.Option("--recipe", "-r", metavar="FILE", help="The recipe: model, data and stages in YAML.")
]
StageName = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="Which stage, where the recipe has several of a method.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value, such as dpo.beta=0.2. Repeatable."),
]
RunDir = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The run directory, instead of runs/<recipe>/<stage>.")
]
# An empty metavar: typer would show <bool> beside a flag that takes no value.
DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Show every value in force and its origin; do nothing.")
]
Force = Annotated[
    bool, typer.Option("--force", metavar="", help="Start afresh: an existing run is moved aside, never deleted.")
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", metavar="", help="Allow code of models and reward functions: only what you have read."
    ),
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option("--allow-change", metavar="KEY", help="Resume although this setting has changed. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print the result as JSON on stdout.")]

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


def _load_recipe(path: Path, overrides: list[str] | None) -> Recipe:
    from alignkit.recipe import load_recipe

    return load_recipe(path, overrides=overrides or ())


def _stage_command(method: Literal["sft", "rm", "dpo", "ppo"]) -> Callable[..., None]:
    """Return the command of a method; all of them take the same options, declared here once."""

    def command(
        context: typer.Context,
        recipe: RecipeFile,
        stage: StageName = None,
        overrides: Overrides = None,
        out: RunDir = None,
        dry_run: DryRun = False,
        force: Force = False,
        trust_code: TrustCode = False,
        allow_change: AllowChange = None,
        as_json: AsJson = False,
    ) -> None:
        from alignkit import console
        from alignkit.recipe import resolve

        resolved = resolve(_load_recipe(recipe, overrides), stage, method=method, out=out, trust_code=trust_code)
        if dry_run:
            if as_json:
                console.print_json(resolved.to_dict())
            else:
                console.print_stage(resolved.to_dict(), will=_foresee(Path(resolved.run_dir), force=force))
            return
        context.obj["run_dir"] = Path(resolved.run_dir)
        from alignkit.launch import launch_stage

        result = launch_stage(resolved, force=force, allow_change=tuple(allow_change or ()))
        if as_json:
            console.print_json(result.to_dict())
        else:
            console.print_result(result.to_dict())

    return command


def _foresee(run_dir: Path, *, force: bool) -> str:
    """Return in words what a stage command would do in a run directory as it is now."""
    from alignkit.runs.layout import RunDir

    run = RunDir(run_dir.absolute())
    if not run.stage.exists():
        return "train from the start"
    if force:
        return "move the run that is there aside and train from the start"
    if run.is_finished():
        return "nothing: the run is finished (--force starts over)"
    return "go on with the unfinished run"


app.command("sft", help="Train on demonstrations, or pre-train on raw text.")(_stage_command("sft"))
app.command("rm", help="Train a reward model on comparisons.")(_stage_command("rm"))
app.command("dpo", help="Train the policy directly on preferences.")(_stage_command("dpo"))
app.command("ppo", help="Train the policy on sampled answers and a reward, with a critic.")(_stage_command("ppo"))


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Find out, without training, whether a recipe would run: keys, data, model, disk, devices."""
    from alignkit import console

    loaded = _load_recipe(recipe, overrides)
    from alignkit.preflight.check import check_recipe

    report = check_recipe(loaded, trust_code=trust_code)
    if as_json:
        console.print_json(report.to_dict())
    else:
        for table in report.tables():
            console.print_table(*table)
    if error := report.error():
        raise error


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML."""
    from alignkit import console
    from alignkit.recipe import recipe_schema

    console.print_json(recipe_schema())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions and devices, and what works here and what does not."""
    from alignkit import console
    from alignkit.preflight.doctor import examine

    report = examine()
    if as_json:
        console.print_json(report.to_dict())
    else:
        for table in report.tables():
            console.print_table(*table)
    if error := report.error():
        raise error


@app.command()
def merge(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A finished run, or an adapter directory.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the merged model goes.")],
) -> None:
    """Write an adapter and its base as one model directory."""
    from alignkit import console
    from alignkit.launch import prepare_environment

    prepare_environment()
    from alignkit.models.merge import merge as merge_adapter

    merge_adapter(source, out)
    console.print_json({"merged": str(source), "model": str(out)})


def main() -> int:
    """Run the command line and return the exit code; every failure is one message, shown once.

    A user's mistake never shows a traceback: ours goes to `error.log` in the run directory, or to
    `alignkit-error.log` here when there is no run yet. With ALIGNKIT_DEBUG=1 every failure shows its traceback.
    """
    place: dict[str, Path] = {}
    # Imports make many objects and no garbage: looking for some costs a tenth of them. `launch` switches it on again.
    gc.disable()
    # Pydantic would search every installed distribution for plugins; alignkit has none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        code = app(standalone_mode=False, prog_name="alignkit", obj=place)
    except TyperException as error:
        return _end_usage_error(error)
    except typer.Abort:
        return 130
    except Exception as error:
        if os.environ.get("ALIGNKIT_DEBUG") == "1":
            raise
        return _end(error, place.get("run_dir"))
    if code == 130:  # typer turns KeyboardInterrupt into this code without a word
        typer.echo("interrupted", err=True)
    return code if isinstance(code, int) else 0


def _end_usage_error(error: TyperException) -> int:
    message = error.format_message().rstrip(".")
    if near := getattr(error, "possibilities", None):
        message = f"{error.message.rstrip('.')}; did you mean {near[0]}?"
    if message:  # empty after a bare `alignkit`: typer has shown the help already
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        typer.echo(f"error: {message}{hint}", err=True)
    return error.exit_code


def _end(error: Exception, run_dir: Path | None) -> int:
    from alignkit import console

    known = _explain(error)
    if known is None:
        from alignkit.runs.record import redact

        log = _write_error_log(error, run_dir)
        message = redact(f"unexpected {type(error).__name__}: {_first_line(error)}")
        typer.echo(f"error: {message} (traceback: {log})", err=True)
        return 1
    console.print_error(known)
    return known.exit_code


def _explain(error: Exception) -> AlignKitError | None:
    """Return what the user can act on, or None for a bug; foreign exceptions are known by errno or class name."""
    import errno

    from alignkit.errors import AlignKitError, DiskError, OutOfMemoryError

    if isinstance(error, AlignKitError):
        return error
    on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    if on_host or type(error).__name__ == "OutOfMemoryError":
        return OutOfMemoryError(
            f"out of memory: {_first_line(error) or 'the host has no memory left'}\n"
            "lower micro_batch_size or max_length, or use lora: or model.quantization: nf4"
        )
    full = {errno.ENOSPC, errno.EDQUOT}
    if isinstance(error, OSError) and error.errno in full | {errno.EROFS, errno.EACCES}:
        place = f"{error.filename}: " if error.filename else ""
        advice = "free some space and run the same command again" if error.errno in full else "choose another --out"
        return DiskError(f"{place}{error.strerror}; what was complete before is untouched; {advice}")
    # torch and safetensors report a full disk in words of their own, without an errno.
    if any(sign in str(error) for sign in ("os error 28", "PytorchStreamWriter failed", "unexpected pos")):
        return DiskError(
            f"could not write a checkpoint: {_first_line(error)}; what was complete before is untouched; "
            "free some space and run the same command again"
        )
    return None


def _write_error_log(error: Exception, run_dir: Path | None) -> str:
    """Write the traceback of an error and return where it is, or why it could not be written."""
    import traceback

    from alignkit.runs.record import redact

    rank = os.environ.get("RANK", "0")
    name = "error.log" if rank == "0" else f"error-rank{rank}.log"
    path = run_dir / name if run_dir is not None and run_dir.is_dir() else Path(f"alignkit-{name}")
    text = f"$ {' '.join(sys.argv)}\n{''.join(traceback.format_exception(error))}"
    try:
        path.write_text(redact(text), encoding="utf-8")
    except OSError as problem:
        return f"not written, {problem.strerror}; ALIGNKIT_DEBUG=1 shows it"
    return str(path)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
