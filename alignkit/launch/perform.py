"""What a command does with resolved stages: shows them, hands them to Slurm, or runs them and says how they ended.

It reads no recipe and knows no options of the command line by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from alignkit import console
from alignkit.errors import UsageError
from alignkit.launch import launch_stage
from alignkit.launch.command import Command
from alignkit.launch.pipeline import run_stages
from alignkit.launch.plan import plan_launch
from alignkit.launch.slurm import write_jobs
from alignkit.launch.worker import is_supervised
from alignkit.recipe import Stage
from alignkit.recipe.schema import FEEDBACK
from alignkit.runs.layout import RunDir
from alignkit.runs.report import write_recipe_report


class How(NamedTuple):
    """The options of a command that say what is done with stages, not which they are."""

    dry_run: bool
    force: bool
    as_json: bool
    retries: int
    slurm: bool
    submit: bool


def _only_show(jobs: list[tuple[Stage, Command]], how: How) -> bool:
    """Write batch jobs or plans where those are asked for; tell whether that was all."""
    if how.slurm or how.submit:
        _use_slurm(jobs, how.submit, dry_run=how.dry_run, force=how.force, retries=how.retries, as_json=how.as_json)
    elif how.dry_run:
        _show_plans(jobs, force=how.force, as_json=how.as_json)
    return how.slurm or how.submit or how.dry_run


def run_one(place: dict[str, Path], stage: Stage, command: Command, how: How) -> None:
    """Run one stage and show how it ended; its run directory is noted in `place`, for a report of what fails."""
    if _only_show([(stage, command)], how):
        return

    place["run_dir"] = Path(stage.run_dir)

    result = launch_stage(stage, command, force=how.force, retries=how.retries)
    if is_supervised() or not console.is_main():
        return  # who started this process, or rank 0, shows it
    if how.as_json:
        console.print_json(result.to_dict())
    else:
        console.print_result(result.to_dict())


def run_many(place: dict[str, Path], jobs: list[tuple[Stage, Command]], how: How) -> None:
    """Run stages one after another and show how each of them ended; `place` holds the run directory of the last."""
    if _only_show(jobs, how):
        return

    results = []
    try:
        before = lambda stage: place.update(run_dir=Path(stage.run_dir))  # noqa: E731
        for result in run_stages(jobs, force=how.force, retries=how.retries, before=before):
            results.append(result.to_dict())
    finally:
        if not console.is_main():
            pass  # another node speaks
        elif how.as_json:
            console.print_json({"stages": results})
        else:
            console.print_run([stage.name for stage, _ in jobs], results)
    if console.is_main():
        stages = [stage for stage, _ in jobs]
        page = write_recipe_report(stages[0].recipe_name, [(stage.name, Path(stage.run_dir)) for stage in stages])
        console.note(f"report: {page}")


def _show_plans(jobs: list[tuple[Stage, Command]], *, force: bool, as_json: bool) -> None:
    """Write what each command would do; as JSON one object, or a list of them for several."""

    plans = [(stage, plan_launch(stage, command).to_dict()) for stage, command in jobs]
    if as_json:
        shown = [{**stage.to_dict(), "would_start": launch} for stage, launch in plans]
        console.print_json(shown[0] if len(shown) == 1 else shown)
        return
    for stage, launch in plans:
        console.print_stage(stage.to_dict(), will=_foresee(stage, force=force))
        console.print_launch(launch)


def _use_slurm(
    jobs: list[tuple[Stage, Command]], submit: bool, *, dry_run: bool, force: bool, retries: int, as_json: bool
) -> None:
    """Write stages as batch jobs, submit them on request, and show them; refuse what a job would not honour."""

    if retries:
        raise UsageError("--retries: a Slurm job requeues itself; set launch.slurm.max_requeues")
    if any(command.node_rank is not None for _, command in jobs):
        raise UsageError("--node-rank: Slurm tells each node which one it is; take it away")

    written = [job.to_dict() for job in write_jobs(jobs, submit=submit, dry_run=dry_run, force=force)]
    if as_json:
        console.print_json({"jobs": written})
    else:
        console.print_jobs(written, scripts=dry_run)


def _foresee(stage: Stage, *, force: bool) -> str:
    """Return in words what a stage command would do in a run directory as it is now."""
    run = RunDir(Path(stage.run_dir).expanduser().absolute())
    begin = "run from the start" if stage.method in FEEDBACK else "train from the start"
    if not run.stage.exists():
        return begin
    if force:
        return f"move the run that is there aside and {begin}"
    if run.is_finished():
        return "nothing: the run is finished (--force starts over)"
    return "go on with the unfinished run"
