"""What `alignkit run` does with each stage, and why: decided for all of them before any is started.

It compares what a stage would be trained on with what its run was trained on; it changes nothing and loads no model.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignkit.launch.command import Command
from alignkit.preflight.requirements import list_needs
from alignkit.recipe import Stage
from alignkit.recipe.references import ROWS
from alignkit.recipe.schema import FEEDBACK, ROOMS
from alignkit.runs import checkpoints
from alignkit.runs.directory import RunDir, find_damaged_product

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
