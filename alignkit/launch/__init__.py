"""Where a stage runs: in this process, in several that are started and watched, or in one that a launcher started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit import console
from alignkit.errors import SUPERVISED, EnvironmentProblem
from alignkit.recipe.schema import FEEDBACK

if TYPE_CHECKING:
    from alignkit.launch.placement import Command
    from alignkit.recipe import Stage
    from alignkit.runs.directory import Result

__all__ = ["is_in_process", "launch_stage"]


def launch_stage(stage: Stage, command: Command | None = None, *, force: bool = False, retries: int = 0) -> Result:
    """Train a stage in its run directory and return how it ended; `command` starts it again in other processes.

    Raises what `fit` raises, RunError when another process holds the directory, RankError when a process died or hung,
    RecipeError where `launch:` and who started this process contradict each other.
    """
    from alignkit.launch.local import train_here, train_in
    from alignkit.launch.placement import Command, place
    from alignkit.launch.processes import is_worker

    command = command or Command(stage)
    makes_rows = stage.method in FEEDBACK
    if makes_rows:
        given = [key for key in ("processes", "nodes", "strategy") if stage.origins.get(f"launch.{key}") != "default"]
        if given:
            console.note(f"{stage.name}: makes rows in one process; launch.{', launch.'.join(given)} is for training")
        if retries:
            console.note(f"{stage.name}: --retries is for training; the same command goes on where this stage stopped")
    if stage.model.path.startswith("builtin:"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # its matrices are so small that threads only wait for each other
    if is_worker():
        from alignkit.launch.accelerate import join_launcher

        if makes_rows:
            raise EnvironmentProblem(
                f"a {stage.method} stage runs in one process, and asks its models in batches; start it without a "
                "launcher"
            )
        join_launcher(stage, retries=retries)
        if SUPERVISED in os.environ or os.environ.get("RANK", "0") != "0":  # somebody has checked and locked the run
            return train_in(stage, Path(stage.run_dir), allow_change=command.allow_change)
    elif not makes_rows:
        placement = place(stage, command.node_rank)
        if placement.world_size == 1 and placement.strategy != "ddp":
            console.warn(f"launch.strategy {placement.strategy} has no effect with one process; set launch.processes")
        if placement.world_size > 1 or retries:
            from alignkit.launch.job import Job

            return Job(command, placement).run(force=force, retries=retries)
    return train_here(stage, force=force, allow_change=command.allow_change)


def is_in_process(command: Command, *, retries: int) -> bool:
    """Tell whether `launch_stage` will do the work in this process; raises RecipeError for places that cannot be."""
    from alignkit.launch.placement import place

    stage = command.stage
    return stage.method in FEEDBACK or (retries == 0 and place(stage, command.node_rank).world_size == 1)
