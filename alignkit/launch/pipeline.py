"""The stages of a recipe one after another, each as its own command would run it.

What is done with each of them is decided in `agenda`; the first failure ends the line.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from alignkit.errors import EnvironmentProblem, Problem, RecipeError
from alignkit.launch import is_in_process, launch_stage
from alignkit.launch.agenda import Entry
from alignkit.launch.command import Command
from alignkit.launch.worker import is_worker
from alignkit.preflight.requirements import list_needs, require_ready
from alignkit.recipe import Stage
from alignkit.report.publish import leave_finished
from alignkit.runs.directory import Result, RunDir


def check_stages(jobs: Sequence[tuple[Stage, Command]]) -> None:
    """Refuse, before anything is trained, what can be refused of any stage.

    Raises RecipeError when a stage comes before one that it needs, EnvironmentProblem under a launcher, and what
    `require_ready` finds wrong with any of them.
    """
    if is_worker():
        raise EnvironmentProblem(
            "`alignkit run` starts the processes of each stage itself (launch.processes); with a launcher of your own, "
            "start the stages one by one"
        )
    stages = [stage for stage, _ in jobs]
    check_order(stages)
    names = [stage.name for stage in stages]
    for number, stage in enumerate(stages):  # the last stage's missing file is found now, not in a day
        require_ready(stage, coming=names[:number])


def run_stages(
    entries: Sequence[Entry],
    *,
    retries: int = 0,
    before: Callable[[Entry], None] = lambda entry: None,
    aside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Result]:
    """Do with the stages what was decided, and yield how each one ended; `before` is told which one is next.

    `aside` is entered while processes of a stage's own write to the terminal.

    Raises what `launch_stage` raises for the first stage that fails.
    """
    for entry in entries:
        stage = entry.stage
        before(entry)
        if entry.will == "leave":
            yield leave_finished(RunDir(Path(stage.run_dir).expanduser().absolute()))
            continue
        with nullcontext() if is_in_process(stage, entry.command, retries=retries) else aside():
            result = launch_stage(stage, entry.command, force=entry.will == "again", retries=retries)
        yield result
        _let_go()


def check_order(stages: Sequence[Stage], *, only_listed: bool = False) -> None:
    """Raise RecipeError when a stage needs one that has not been run and is not run before it.

    With `only_listed` a stage that is not among these may still be run by another command.
    """
    names = [stage.name for stage in stages]
    problems = []
    for number, stage in enumerate(stages):
        for need in list_needs(stage):
            if need.stage in names[:number] or need.is_made() or (only_listed and need.stage not in names):
                continue
            how = "put it first" if need.stage in names else f"run --stage {need.stage} first, or add it to `stages:`"
            verb = "starts from" if need.key == "start_from" else "needs"
            what = f"{stage.name} {verb} {need.stage}, which neither has been run nor is run before it; {how}"
            problems.append(Problem(what, stage.where(f"{stage.name}.{need.key}")))
    if problems:
        raise RecipeError(problems)


def _let_go() -> None:
    """Forget the stage that ended in this process: accelerate's global state, and everything that is held in cycles."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    gc.unfreeze()  # `launch_stage` freezes what it finds: without this the next stage would freeze this one's models
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        _give_memory_back()


def _give_memory_back() -> None:
    """Return freed memory to Linux, and let its record of the peak begin anew: each stage reports its own."""
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # a kernel without it
        Path("/proc/self/clear_refs").write_text("5")
