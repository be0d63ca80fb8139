"""Where a stage runs: in this process, in several that are started and watched, or in one that a launcher started."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from alignkit import console
from alignkit.errors import EnvironmentProblem
from alignkit.recipe.schema import FEEDBACK

if TYPE_CHECKING:
    from alignkit.launch.command import Command
    from alignkit.recipe import Stage
    from alignkit.runs.directory import Result

__all__ = ["is_in_process", "launch_stage"]


def launch_stage(stage: Stage, command: Command | None = None, *, force: bool = False, retries: int = 0) -> Result:
    """Train a stage in its run directory and return how it ended; `command` starts it again in other processes.

    Raises what `fit` raises, RunError when another process holds the directory, RankError when a process died or hung.
    """
    from alignkit.launch.command import Command
    from alignkit.launch.local import train_here
    from alignkit.launch.placement import place
    from alignkit.launch.worker import is_worker

    command = command or Command.of(stage, ())
    if stage.method in FEEDBACK:
        _tell_one_process(stage, retries)
    if stage.model.path.startswith("builtin:"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # its matrices are so small that threads only wait for each other
    if is_worker() and stage.method in FEEDBACK:
        raise EnvironmentProblem(
            f"a {stage.method} stage runs in one process, and asks its models in batches; start it without a launcher"
        )
    if is_worker():
        from alignkit.launch.launcher import join

        return join(stage, command, force=force, retries=retries)
    if stage.method in FEEDBACK:
        return train_here(stage, force=force, allow_change=command.allow_change)
    placement = place(stage, command.node_rank)
    if placement.world_size == 1 and placement.strategy != "ddp":
        console.warn(f"launch.strategy {placement.strategy} has no effect with one process; set launch.processes")
    if placement.world_size == 1 and retries == 0:
        return train_here(stage, force=force, allow_change=command.allow_change)
    from alignkit.launch.job import run_job

    return run_job(stage, command, placement, force=force, retries=retries)


def is_in_process(stage: Stage, command: Command, *, retries: int) -> bool:
    """Tell whether `launch_stage` will do the work in this process; raises RecipeError for places that cannot be."""
    from alignkit.launch.placement import place

    return stage.method in FEEDBACK or (retries == 0 and place(stage, command.node_rank).world_size == 1)


def _tell_one_process(stage: Stage, retries: int) -> None:
    """Note that keys of `launch:` have no effect on a stage that makes rows."""
    given = [key for key in ("processes", "nodes", "strategy") if stage.origins.get(f"launch.{key}") != "default"]
    if given:
        console.note(f"{stage.name}: makes rows in one process; launch.{', launch.'.join(given)} is for training")
    if retries:
        console.note(f"{stage.name}: --retries is for training; the same command goes on where this stage stopped")
