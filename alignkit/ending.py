"""How a command ends: what is said of a failure, by which process, and with which exit code.

It loads typer and the standard library only, for the sake of `--help`; what explains an error is imported when there
is one.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from typer.exceptions import TyperException

if TYPE_CHECKING:
    from alignkit.errors import AlignKitError

SUPERVISED = "ALIGNKIT_LAUNCH_DIR"  # in the environment of a process that our own supervisor started


def leave(code: int, problems: list[str] | None = None, *, unexpected: bool = False, shared: bool = False) -> int:
    """Say what is left to say and return the exit code; a supervised process writes it down instead."""
    if SUPERVISED in os.environ:
        from alignkit.launch.worker import leave

        return leave(code, problems or (), unexpected=unexpected, shared=shared)
    if problems:
        from alignkit.console import redact, write

        for problem in problems:
            write(redact(problem), stderr=True)
    return code


def _leave_to_others(code: int) -> int:
    """Return the exit code of an error that another process reports, but not before that one has spoken.

    torchrun ends all processes as soon as the first one leaves.
    """
    time.sleep(5)
    return code


def _is_met_by_all(run_dir: Path | None) -> bool:
    """Whether every process of this node meets this error, and its first one reports it."""
    return run_dir is None and os.environ.get("LOCAL_RANK", "0") != "0"


def end_usage_error(error: TyperException) -> int:
    """Report a mistake in the command's own options; return the exit code."""
    message = error.format_message().rstrip(".")
    if near := getattr(error, "possibilities", None):
        message = f"{error.message.rstrip('.')}; did you mean {near[0]}?"
    if SUPERVISED not in os.environ and _is_met_by_all(None):
        return _leave_to_others(error.exit_code)
    if message:  # empty after a bare `alignkit`: typer has shown the help already
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return leave(error.exit_code, [f"error: {message}{hint}"])
    return error.exit_code


def end(error: Exception, run_dir: Path | None) -> int:
    """Report an error, once for all processes, and return the exit code; a bug leaves its traceback in error.log."""
    from alignkit import console

    known = explain(error)
    supervised = SUPERVISED in os.environ
    if known is None:
        log = _write_error_log(error, run_dir)
        rank = os.environ.get("RANK", "0")
        prefix = "" if rank == "0" or supervised else f"rank {rank}: "
        message = console.redact(f"{prefix}unexpected {type(error).__name__}: {_first_line(error)} (traceback: {log})")
        return leave(1, [message if supervised else f"error: {message}"], unexpected=True)
    if supervised:
        return leave(known.exit_code, console.list_problems(known), shared=known.shared)
    agreed = known.exit_code in (130, 143) and not console.is_main()  # all ranks stop together
    if known.shared or agreed or _is_met_by_all(run_dir):
        return _leave_to_others(known.exit_code)
    console.print_error(known)
    return known.exit_code


def explain(error: Exception) -> AlignKitError | None:
    """Return what the user can act on, or None for a bug; foreign exceptions are known by errno or class name."""
    import errno

    from alignkit.errors import AlignKitError, DiskError, OutOfMemoryError, UsageError

    if isinstance(error, AlignKitError):
        return error
    on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    if on_host or type(error).__name__ == "OutOfMemoryError":
        return OutOfMemoryError(
            f"out of memory: {_first_line(error) or 'the host has no memory left'}\n"
            "lower micro_batch_size or max_length, or use lora: or model.quantization: nf4"
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError(f"{str(error.filename)[:60]}...: file name too long; choose a shorter one")
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

    from alignkit.console import printable, redact

    rank = os.environ.get("RANK", "0")
    name = "error.log" if rank == "0" else f"error-rank{rank}.log"
    path = run_dir / name if run_dir is not None and run_dir.is_dir() else Path(f"alignkit-{name}")
    text = f"$ {' '.join(sys.argv)}\n{''.join(traceback.format_exception(error))}"
    try:
        path.write_text(printable(redact(text)), encoding="utf-8")
    except OSError as problem:
        return f"not written, {problem.strerror}; ALIGNKIT_DEBUG=1 shows it"
    return str(path)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
