"""Every command, and how one ends. Before it runs only typer, `errors` and the standard library are loaded."""

import atexit
import gc
import logging
import os
import re
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

import alignkit.cli.look as look
from alignkit.cli.train import rlaif, run, stage_command
from alignkit.errors import SUPERVISED, explain, first_line

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from alignkit import __version__
        from alignkit.runs.record import find_commit

        typer.echo(f"{__version__} ({find_commit() or 'commit unknown'})")
        raise typer.Exit


@app.callback()
def _alignkit(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """From base weights to an aligned, measured language model with one recipe file."""


app.command("sft", help="Train on demonstrations, or pre-train on raw text.")(stage_command("sft"))
app.command("rm", help="Train a reward model on comparisons.")(stage_command("rm"))
app.command("dpo", help="Train the policy directly on preferences.")(stage_command("dpo"))
app.command("ppo", help="Train the policy on sampled answers and a reward, with a critic.")(stage_command("ppo"))
for function in (look.init, look.migrate, rlaif, run, look.plan, look.check, look.preview, look.schema, look.doctor,
                 look.merge, look.evaluate, look.chat, look.compare, look.diff, look.report):  # fmt: skip
    app.command("eval" if function is look.evaluate else None)(function)


_OF_A_RECIPE = ("sft", "rm", "dpo", "ppo", "rlaif", "run", "plan", "check", "preview", "eval")


class _Later:
    """Hides bitsandbytes from `peft.helpers`, which imports it, and 0.6 s of compilers with it, for a function that
    nothing here calls. What quantises imports it afterwards. It can go when that import is inside of the function."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        asks = sys.modules.get("peft.helpers") if name == "bitsandbytes" else None
        if asks is not None and "PeftModel" not in vars(asks):  # its own imports are not done
            sys.meta_path.remove(_Later)
            raise ModuleNotFoundError(name)


def quiet_libraries() -> None:
    """Switch off pings, bars and chatter of the libraries before they load; what the user has set stays."""
    for name, value in (
        ("HF_HUB_DISABLE_TELEMETRY", "1"),  # TRL pings once per trainer; alignkit sends nothing anywhere by itself
        ("TOKENIZERS_PARALLELISM", "true"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TQDM_DISABLE", "1"),
        ("TRL_EXPERIMENTAL_SILENCE", "1"),
        ("BITSANDBYTES_NOWELCOME", "1"),
    ):
        os.environ.setdefault(name, value)
    if os.environ.get("ALIGNKIT_DEBUG") != "1":
        warnings.simplefilter("ignore")  # upstream deprecations are ours to mend, not the user's
        # It warns of kernels that it could download, and once for each int8 matrix product.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def main() -> int:
    """Run the command line and return the exit code; every failure is one message, shown once. A bug's traceback goes
    to `error.log` in the run directory, or to `alignkit-error.log` here; ALIGNKIT_DEBUG=1 shows that of any failure."""
    # Imports make many objects and no garbage: looking for some costs a tenth of them. `launch` switches it on again.
    gc.disable()
    atexit.register(gc.freeze)  # the collection at exit would walk all of torch: seconds after the last word
    # Pydantic would search every installed distribution for plugins; alignkit has none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    quiet_libraries()
    sys.meta_path.insert(0, _Later)
    if SUPERVISED in os.environ:
        from alignkit.runs.signals import attach

        attach()
    place: dict[str, Path] = {}
    arguments = sys.argv[1:]
    is_recipe = re.compile(r"(?!eval )\w+ builtin:.*|.*\.ya?ml").fullmatch  # builtin: is a model for eval
    if len(arguments) > 1 and arguments[0] in _OF_A_RECIPE and is_recipe(" ".join(arguments[:2])):
        arguments.insert(1, "--recipe")  # `alignkit sft mine.yaml`
    try:
        command = typer.main.get_command(app)
        for each in (command, *getattr(command, "commands", {}).values()):
            # typer would show <bool> beside flags, which take no value
            for option in each.get_params(typer.Context(each, help_option_names=["-h", "--help"])):
                if getattr(option, "is_flag", False):
                    option.metavar = ""
        code = command(arguments, standalone_mode=False, prog_name="alignkit", obj=place)
    except TyperException as error:  # a mistake in the command's own options
        message = error.format_message().rstrip(".")
        if near := getattr(error, "possibilities", None):
            message = f"{error.message.rstrip('.')}; did you mean {near[0]}?"
        if SUPERVISED not in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_WAIT_SECONDS)
        elif message:  # empty after a bare `alignkit`: typer has shown the help already
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context is not None else ""
            return _leave(error.exit_code, [f"error: {message}{hint}"])
        return error.exit_code
    except typer.Abort:
        return _leave(130, ["interrupted"])
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
            return 1  # typer's word for a reader that has gone
        if os.environ.get("ALIGNKIT_DEBUG") == "1":
            traceback.print_exception(error)
        if isinstance(error, SystemExit):  # of code that a recipe names: with its code 0 nothing would look done
            what = f"code that alignkit called ended the process, SystemExit: {error.code}"
            error = RuntimeError(what).with_traceback(error.__traceback__)
        return end(error, place.get("run_dir"))
    # typer turns KeyboardInterrupt into 130 without a word
    return _leave(code if isinstance(code, int) else 0, ["interrupted"] if code == 130 else None)


def end(error: Exception, run_dir: Path | None) -> int:
    """Report an error, once for all processes, and return the exit code; a bug leaves its traceback in error.log."""
    from alignkit import console

    known = explain(error)
    supervised = SUPERVISED in os.environ
    if known is None:
        rank = os.environ.get("RANK", "0")
        name = "error.log" if rank == "0" else f"error-rank{rank}.log"
        path = run_dir / name if run_dir is not None and run_dir.is_dir() else Path(f"alignkit-{name}")
        text, log = f"$ {' '.join(sys.argv)}\n{''.join(traceback.format_exception(error))}", str(path)
        try:
            path.write_text(console.printable(console.redact(text)), encoding="utf-8")
        except OSError as problem:
            log = f"not written, {problem.strerror}; ALIGNKIT_DEBUG=1 shows it"
        prefix = "" if rank == "0" or supervised else f"rank {rank}: "
        message = console.redact(f"{prefix}unexpected {type(error).__name__}: {first_line(error)} (traceback: {log})")
        return _leave(1, [message if supervised else f"error: {message}"], unexpected=True)
    if supervised:
        return _leave(known.exit_code, console.list_problems(known), shared=known.shared)
    agreed = known.exit_code in (130, 143) and not console.is_main()  # all ranks stop together
    # What every process of a node meets before there is a run is reported by one of them.
    if not known.shared and not agreed and (run_dir is not None or os.environ.get("LOCAL_RANK", "0") == "0"):
        console.print_error(known)
    else:
        time.sleep(_WAIT_SECONDS)
    return known.exit_code


_WAIT_SECONDS = 5  # before leaving with what another process reports: torchrun ends all as soon as the first one leaves


def _leave(code: int, problems: list[str] | None = None, *, unexpected: bool = False, shared: bool = False) -> int:
    """Say what is left to say and return the exit code; a supervised process writes it down instead."""
    if SUPERVISED in os.environ:
        from alignkit.runs.signals import leave

        return leave(code, problems or (), unexpected=unexpected, shared=shared)
    if problems:
        from alignkit.console import redact, write

        write(redact("\n".join(problems)), stderr=True)
    return code
