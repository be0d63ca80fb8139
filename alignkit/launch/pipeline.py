"""The stages of a recipe one after another: what is done with each of them, and why, then doing it."""

from __future__ import annotations

import ctypes
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignkit.errors import EnvironmentProblem, Problem, RecipeError
from alignkit.launch import is_in_process, launch_stage
from alignkit.launch.command import Command
from alignkit.launch.worker import is_worker
from alignkit.preflight.requirements import list_needs, require_ready
from alignkit.recipe import Stage
from alignkit.recipe.references import ROWS
from alignkit.recipe.schema import FEEDBACK, ROOMS
from alignkit.report.publish import leave_finished
from alignkit.runs import checkpoints
from alignkit.runs.directory import Result, RunDir, find_damaged_product

Will = Literal["leave", "resume", "start", "again"]
WORDS: dict[Will, str] = {
    "leave": "leave alone", "resume": "go on", "start": "run", "again": "run again",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One stage of a run: what will be done with it, and the reason as a person reads it."""

    stage: Stage
    command: Command
    will: Will
    why: str
    needs: tuple[str, ...] = ()  # stages of the recipe that it takes something from

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for --dry-run."""
        return {
            "stage": self.stage.name,
            "method": self.stage.method,
            "needs": list(self.needs),
            "will": WORDS[self.will],
            "why": self.why,
            "run_dir": self.stage.run_dir,
        }


def plan_run(jobs: Sequence[tuple[Stage, Command]], *, force: bool = False) -> list[Entry]:
    """Decide for each stage, in order.

    A finished one is left alone, an unfinished one goes on; one whose settings, data or starting weights have changed
    runs again, and so does every one that needs a stage run before it. Reads the rows of stages that have begun; raises
    what reading them raises.
    """
    entries: list[Entry] = []
    busy: dict[str, Entry] = {}  # stages that will make something new
    for stage, command in jobs:
        needs = tuple(dict.fromkeys(need.stage for need in list_needs(stage)))
        will, why = _decide(stage, command, [busy[name] for name in needs if name in busy], force=force)
        entry = Entry(stage, command, will, why, needs)
        entries.append(entry)
        if will != "leave":
            busy[stage.name] = entry
    return entries


def _decide(stage: Stage, command: Command, before: Sequence[Entry], *, force: bool) -> tuple[Will, str]:
    run = RunDir(Path(stage.run_dir).expanduser().absolute())
    if not run.stage.exists():
        return "start", "no run yet"
    if force:
        return "again", "--force"
    if before:
        return "again", f"{_join([entry.stage.name for entry in before])} {_verb(before)} before it"
    if run.is_finished() and not _product(stage, run).exists():
        return "again", f"its {_product(stage, run).name} is gone"
    if changes := _room(stage).find_changes(stage, run.path, allow_change=command.allow_change):
        more = f" (and {len(changes) - 2} more)" if len(changes) > 2 else ""
        return "again", f"{'; '.join(changes[:2])}{more}"
    if run.is_finished():
        reason = find_damaged_product(run.path)
        if reason is None and stage.method not in FEEDBACK:
            reason = _room(stage).find_longer(stage, run)
        return ("resume", reason) if reason else ("leave", "finished, nothing has changed")
    newest = checkpoints.newest_step(run.checkpoints)
    return "resume", "not finished" if newest is None else f"stopped; step {newest} is saved"


def _room(stage: Stage) -> Any:
    name = f"{ROOMS[stage.method]}.{stage.method}" if stage.method in FEEDBACK else "train.fingerprint"
    return importlib.import_module(f"alignkit.{name}")


def _product(stage: Stage, run: RunDir) -> Path:
    return run.path / ROWS if stage.method in FEEDBACK else run.model


def _verb(before: Sequence[Entry]) -> str:
    will = {entry.will for entry in before}
    one, several = ("goes on", "go on") if will == {"resume"} else ("runs", "run")
    return one if len(before) == 1 else several


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


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
