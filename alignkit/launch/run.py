"""What a command does with its stages: show them, hand them to Slurm, or run and measure them and show the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from alignkit import console
from alignkit.errors import AlignKitError, Problem, UsageError
from alignkit.evaluate.options import request_stages
from alignkit.launch import launch_stage
from alignkit.launch.accelerate import plan_launch
from alignkit.launch.command import Command
from alignkit.launch.pipeline import WORDS, Entry, check_order, check_stages, plan_run, run_stages
from alignkit.launch.slurm import write_jobs
from alignkit.launch.worker import is_supervised
from alignkit.preflight.requirements import locate_rows, require_held_out
from alignkit.recipe import Recipe, Stage
from alignkit.recipe.nearest import suggest
from alignkit.recipe.schema import FEEDBACK, EvaluateOptions
from alignkit.recipe.trl_fields import method_fields
from alignkit.report.page import write_recipe_report
from alignkit.report.publish import attempt
from alignkit.runs.directory import RunDir
from alignkit.runs.files import read_json, read_record, write_json, write_text

MEASURE = "evaluate"  # the last step of a run, in tables
_RECORD = "evaluated.json"
_FAILURES = (3, 4, 5, 6, 7)  # not finite, disk, memory, a process, the judge


class How(NamedTuple):
    """The options of a command that say what is done with stages, not which they are."""

    dry_run: bool
    force: bool
    as_json: bool
    retries: int
    slurm: bool
    submit: bool


def run_one(place: dict[str, Path], stage: Stage, command: Command, how: How) -> None:
    """Run one stage and show how it ended; its run directory is noted in `place`, for a report of what fails."""
    _refuse_unknown([(stage, command)])
    if how.slurm or how.submit:
        _use_slurm([(stage, command)], how)
        return
    if how.dry_run:
        _show_plan(stage, command, how)
        return
    place["run_dir"] = Path(stage.run_dir)

    result = launch_stage(stage, command, force=how.force, retries=how.retries)
    if is_supervised() or not console.is_main():
        return  # who started this process, or rank 0, shows it
    if how.as_json:
        console.print_json(result.to_dict())
    else:
        console.print_result(result.to_dict())


def run_many(
    place: dict[str, Path], jobs: list[tuple[Stage, Command]], how: How, *, measure: Measuring | None = None
) -> None:
    """Run stages one after another, measure them where that is asked for, and show how each of them ended.

    `place` holds the run directory of the last one, for a report of what fails. With --dry-run it is said instead what
    would be done with each stage, and why.
    """
    _refuse_unknown(jobs)
    if how.slurm or how.submit:
        _use_slurm(jobs, how)
        return
    if how.dry_run:
        check_order([stage for stage, _ in jobs], only_listed=True)
        for stage, _ in jobs:
            locate_rows(stage)
        _show_agenda(plan_run(jobs, force=how.force), measure, as_json=how.as_json)
        return
    check_stages(jobs)
    entries = plan_run(jobs, force=how.force)

    results: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    try:
        with console.Board(_list_rows(entries, measure)) as board:
            _run_entries(place, entries, how, board, results)
            if measure is not None and console.is_main():
                measured += _measure(measure, board, is_new=any(entry.will != "leave" for entry in entries))
    except BaseException as error:
        with suppress(AlignKitError):  # the page shows how far it came; what stopped it is what is said
            _note_failure(place.get("run_dir"), error)
            _write_page(jobs)
        raise
    finally:
        if console.is_main():
            _show_results(jobs, results, measured, how)
    _write_page(jobs)


def _refuse_unknown(jobs: Sequence[tuple[Stage, Command]]) -> None:
    """Refuse an --allow-change that names no setting of any of these stages, now or when their runs began."""
    known = {"start_weights", "reward_weights", "data", "template", "ptx_data"}
    for stage, _ in jobs:
        run = RunDir(Path(stage.run_dir).expanduser().absolute())
        began = read_json(run.stage).get("fingerprint") or {} if run.stage.is_file() else {}
        known |= {*stage.fingerprint_values(), *began, *(f"{stage.name}.{key}" for key in method_fields(stage.method))}
    names = {key.split(".", dot)[-1] for key in known for dot in range(key.count(".") + 1)}
    if unknown := [name for name in jobs[0][1].allow_change if name not in names]:
        what = "is no setting of these stages"
        raise UsageError([Problem(f"{name} {what}{suggest(name, names)}", "--allow-change") for name in unknown])


def _write_page(jobs: Sequence[tuple[Stage, Command]]) -> None:
    """Write the page of the whole recipe and say where it is."""
    if console.is_main():
        stages = [stage for stage, _ in jobs]
        runs = [(stage.name, Path(stage.run_dir)) for stage in stages]
        place = runs[0][1].expanduser().absolute().parent
        if (page := attempt("page", place, lambda: write_recipe_report(stages[0].recipe_name, runs))) is not None:
            console.note(f"report: {page}")


def _note_failure(run_dir: Path | None, error: BaseException) -> None:
    """Keep in an unfinished run why it failed, for its page; not a mistake of the user's, a stop, or a bug."""
    if run_dir is None or not isinstance(error, AlignKitError) or error.exit_code not in _FAILURES:
        return
    run = RunDir(run_dir.expanduser().absolute())
    if console.is_main() and run.stage.is_file() and not run.is_finished():
        write_text(run.error_log, console.redact(f"{error}\n"))


def _run_entries(
    place: dict[str, Path], entries: list[Entry], how: How, board: console.Board, results: list[dict[str, Any]]
) -> None:
    """Run what is to be run, and add how each stage ended to `results` as soon as it has."""

    def before(entry: Entry) -> None:
        place["run_dir"] = Path(entry.stage.run_dir)
        if entry.will != "leave":
            board.begin(entry.stage.name)

    done = run_stages(entries, retries=how.retries, before=before, aside=board.paused)
    for entry, result in zip(entries, done, strict=True):
        results.append(result.to_dict())
        board.end(entry.stage.name, left_alone=entry.will == "leave", metrics=result.metrics)


def _measure(measure: Measuring, board: console.Board, *, is_new: bool) -> list[dict[str, Any]]:
    """Return the new content of each eval.json; nothing is done where nothing has changed."""
    if not is_new and measure.is_done():
        console.note("evaluate: already measured, nothing to do (alignkit eval measures again)")
        board.end(MEASURE, left_alone=True)
        return []
    board.begin(MEASURE)
    measured = []
    for result in measure.run():
        measured.append(result)
        board.update(MEASURE, len(measured), len(measure.requests), str(result["name"]), None)
    board.end(MEASURE)
    return measured


def _list_rows(entries: Sequence[Entry], measure: Measuring | None) -> list[tuple[str, str, str]]:
    rows = [(entry.stage.name, entry.stage.method, f"{WORDS[entry.will]}: {entry.why}") for entry in entries]
    return rows + ([(MEASURE, "", "every model, as evaluate: says")] if measure is not None else [])


def _show_results(
    jobs: list[tuple[Stage, Command]], results: list[dict[str, Any]], measured: list[dict[str, Any]], how: How
) -> None:
    if how.as_json:
        console.print_json({"stages": results, "evaluations": measured})
        return
    console.print_run([stage.name for stage, _ in jobs], results)
    for evaluation in measured:
        from alignkit.evaluate.results import table  # which loads numpy

        whole = [figure for figure in evaluation["results"] if figure["slice"] is None]
        console.print_table(evaluation["name"], *table(whole))


def _show_agenda(entries: Sequence[Entry], measure: Measuring | None, *, as_json: bool) -> None:
    """Write what would be done with each stage and with the models, and why."""
    rows = [entry.to_dict() for entry in entries]
    if as_json:
        starts = [plan_launch(entry.stage, entry.command).to_dict() for entry in entries]
        rows = [
            {**entry.stage.to_dict(), **row, "would_start": start}
            for entry, row, start in zip(entries, rows, starts, strict=True)
        ]
    if measure is not None:
        done = not any(entry.will != "leave" for entry in entries) and measure.is_done()
        will, why = ("leave alone", "measured, nothing has changed") if done else ("run", "models to measure")
        rows.append({"stage": MEASURE, "method": None, "needs": [], "will": will, "why": why})
    if as_json:
        console.print_json(rows)
    else:
        console.print_agenda(rows)


def _show_plan(stage: Stage, command: Command, how: How) -> None:
    """Write what the command of one stage would do, and every value in force."""
    locate_rows(stage)
    launch = plan_launch(stage, command).to_dict()
    if how.as_json:
        console.print_json({**stage.to_dict(), "would_start": launch})
        return
    console.print_stage(stage.to_dict(), will=_foresee(stage, force=how.force))
    console.print_launch(launch)


def _use_slurm(jobs: list[tuple[Stage, Command]], how: How) -> None:
    """Write stages as batch jobs, submit them on request, and show them; refuse what a job would not honour."""
    if how.retries:
        raise UsageError("--retries: a Slurm job requeues itself; set launch.slurm.max_requeues")
    if any(command.node_rank is not None for _, command in jobs):
        raise UsageError("--node-rank: Slurm tells each node which one it is; take it away")
    written = [job.to_dict() for job in write_jobs(jobs, submit=how.submit, dry_run=how.dry_run, force=how.force)]
    if how.as_json:
        console.print_json({"jobs": written})
    else:
        console.print_jobs(written, scripts=how.dry_run)


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


@dataclass(frozen=True)
class Measuring:
    """The models of a run, each with what is asked of it."""

    requests: tuple[tuple[str, EvaluateOptions], ...]
    trust_code: bool

    @classmethod
    def of(cls, recipe: Recipe, names: Sequence[str], *, trust_code: bool) -> Measuring | None:
        """Return what to measure of these stages, None where the recipe asks for nothing or none of them has a model.

        Raises UsageError for a name that is neither a stage nor a path, and where no stage has rows to measure on.
        """
        for doubt in require_held_out(recipe, names):
            console.warn(doubt)
        requests = tuple(request_stages(recipe, recipe.evaluate, names)) if recipe.evaluates else ()
        return cls(requests, trust_code) if requests else None

    @property
    def _record(self) -> Path:
        """What was asked last, beside the runs of the recipe."""
        return Path(self.requests[0][0]).expanduser().absolute().parent / _RECORD

    def is_done(self) -> bool:
        """Tell whether just this has been measured; a run that was trained anew has lost its eval.json."""
        record = read_record(self._record)
        if record.get("asked") != self._asked:
            return False
        return all(read_record(_figures(source)) for source in record["measured"])

    def run(self) -> Iterator[dict[str, Any]]:
        """Measure one model after another and yield what its eval.json holds now."""
        from alignkit.evaluate.run import evaluate_all

        self._record.unlink(missing_ok=True)
        yield from evaluate_all(
            self.requests, seed=None, out=None, device="auto", trust_code=self.trust_code,
            folder=Path.cwd(), skip=True,
        )  # fmt: skip
        measured = [source for source, _ in self.requests if _figures(source).is_file()]
        write_json(self._record, {"asked": self._asked, "measured": measured})

    @property
    def _asked(self) -> str:
        """Return what tells one request from another; not how many rows go through at a time."""
        asked = [(source, options.model_dump(mode="json", exclude={"batch_size"})) for source, options in self.requests]
        return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


def _figures(source: str) -> Path:
    return RunDir(Path(source).expanduser().absolute()).evaluation
