"""What a command does with its stages: show them, hand them to Slurm, or run and measure them and show the results.

A stage runs in this process, in several that are started and watched, or in one that a launcher started.
"""

import ctypes
import gc
import hashlib
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from alignkit import console
from alignkit.errors import (
    SUPERVISED,
    AlignKitError,
    DiskError,
    EnvironmentProblem,
    Problem,
    RecipeError,
    UsageError,
    suggest,
)
from alignkit.launch.placement import Command, place
from alignkit.launch.supervise import kill_all, list_marked
from alignkit.preflight.requirements import list_needs, locate_rows, require_held_out, require_ready
from alignkit.recipe import Recipe, Stage
from alignkit.recipe.methods import FEEDBACK, ROOMS
from alignkit.recipe.schema import EvaluateOptions
from alignkit.recipe.sections import ROWS
from alignkit.recipe.words import method_fields
from alignkit.runs.directory import (
    Result,
    RunDir,
    compare_fingerprints,
    find_damaged_product,
    newest_step,
    open_run,
    set_aside,
)
from alignkit.runs.files import read_json, read_record, write_json, write_text
from alignkit.runs.record import began, record_warnings
from alignkit.runs.signals import is_worker
from alignkit.train.fingerprint import fingerprint_stage, unread

MEASURE = "evaluate"  # the last step of a run, in tables
_FAILURES = (3, 4, 5, 6, 7)  # not finite, disk, memory, a process, the judge
Will = Literal["leave alone", "go on", "run", "run again"]
_STRAY_SECONDS = 45.0


class How(NamedTuple):
    """The options of a command that say what is done with stages, not which they are."""

    dry_run: bool
    force: bool
    as_json: bool
    retries: int
    slurm: bool
    submit: bool


class Entry(NamedTuple):
    """One stage of a run: what will be done with it, and the reason as a person reads it."""

    command: Command
    will: Will
    why: str
    needs: tuple[str, ...] = ()  # stages of the recipe that it takes something from

    @property
    def stage(self) -> Stage:
        return self.command.stage


class Measuring:
    """The models of a run, each with what is asked of it."""

    def __init__(self, requests: Sequence[tuple[str, EvaluateOptions]], *, trust_code: bool) -> None:
        self._requests, self._trust_code = requests, trust_code
        # What was asked last is kept beside the runs; how many rows go through at a time makes no difference.
        self._record = Path(requests[0][0]).expanduser().absolute().parent / "evaluated.json"
        asked = [(source, options.model_dump(mode="json", exclude={"batch_size"})) for source, options in requests]
        self._asked = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()

    @classmethod
    def of(cls, recipe: Recipe, names: Sequence[str], *, trust_code: bool) -> Self | None:
        """Find what to measure of these stages, None where the recipe asks for nothing or none of them has a model."""
        from alignkit.evaluate.options import request_stages

        for doubt in require_held_out(recipe, names):
            console.warn(doubt)
        requests = request_stages(recipe, recipe.evaluate, names) if recipe.evaluates else ()
        return cls(requests, trust_code=trust_code) if requests else None

    def is_done(self) -> bool:
        """Tell whether just this has been measured; a run that was trained anew has lost its eval.json."""
        record = read_record(self._record)
        is_same = record.get("asked") == self._asked
        return is_same and all(read_record(RunDir(Path(source)).evaluation) for source in record["measured"])

    def show(self, board: console.Board, measured: list[dict[str, Any]], *, is_new: bool) -> None:
        """Add what each eval.json holds now to `measured`; nothing is done where nothing has changed."""
        from alignkit.evaluate.run import evaluate_all

        if not is_new and self.is_done():
            console.note("evaluate: already measured, nothing to do (alignkit eval measures again)")
            board.end(MEASURE, state="left alone")
            return
        board.begin(MEASURE)
        self._record.unlink(missing_ok=True)
        for result in evaluate_all(
            self._requests,
            seed=None,
            out=None,
            device="auto",
            trust_code=self._trust_code,
            folder=Path.cwd(),
            skip=True,
        ):
            measured.append(result)
            board.update(MEASURE, len(measured), len(self._requests), str(result["name"]), None)
        done = [source for source, _ in self._requests if RunDir(Path(source)).evaluation.is_file()]
        write_json(self._record, {"asked": self._asked, "measured": done})
        board.end(MEASURE)


def run_one(place: dict[str, Path], command: Command, how: How) -> None:
    """Run one stage and show how it ended; its run directory is noted in `place`, for a report of what fails."""
    stage = command.stage
    _refuse_unknown([command])
    if how.slurm or how.submit:
        _use_slurm([command], how)
    elif how.dry_run:
        from alignkit.launch.accelerate import plan_launch

        locate_rows(stage)
        launch = plan_launch(command)
        if how.as_json:
            console.print_json({**stage.to_dict(), "would_start": launch})
            return
        run = RunDir(Path(stage.run_dir))
        will = "run from the start" if stage.method in FEEDBACK else "train from the start"
        if run.stage.exists():
            goes_on = "nothing: the run is finished (--force starts over)" if run.is_finished() else (
                "go on with the unfinished run")  # fmt: skip
            will = f"move the run that is there aside and {will}" if how.force else goes_on
        console.print_text("stage", stage.to_dict(), will)
        console.print_text("launch", launch)
    else:
        place["run_dir"] = Path(stage.run_dir)
        result = launch_stage(stage, command, force=how.force, retries=how.retries)
        if SUPERVISED in os.environ or not console.is_main():
            return  # who started this process, or rank 0, shows it
        show = console.print_json if how.as_json else partial(console.print_text, "result")
        show(result.to_dict())
        if not how.as_json:
            _show_verdicts([stage])


def run_many(
    place: dict[str, Path], commands: Sequence[Command], how: How, *, measure: Measuring | None = None
) -> None:
    """Run stages one after another, measure them where that is asked for, and show how each of them ended."""
    _refuse_unknown(commands)
    if how.slurm or how.submit:
        _use_slurm(commands, how)
        return
    stages = [command.stage for command in commands]
    if how.dry_run:
        check_order(stages, only_listed=True)
        for stage in stages:
            locate_rows(stage)
        entries = plan_run(commands, force=how.force)
        planned: list[dict[str, Any]] = [
            {"stage": entry.stage.name, "method": entry.stage.method, "needs": list(entry.needs), "will": entry.will,
             "why": entry.why, "run_dir": entry.stage.run_dir} for entry in entries]  # fmt: skip
        if measure is not None:
            is_done = all(entry.will == "leave alone" for entry in entries) and measure.is_done()
            will, why = ("leave alone", "measured, nothing has changed") if is_done else ("run", "models to measure")
            planned.append({"stage": MEASURE, "method": None, "needs": [], "will": will, "why": why})
        if not how.as_json:
            console.print_text("plan", planned)
            return
        from alignkit.launch.accelerate import plan_launch

        starts = [{**entry.stage.to_dict(), "would_start": plan_launch(entry.command)} for entry in entries]
        console.print_json([{**start, **row} for start, row in zip([*starts, {}], planned, strict=False)])
        return
    if is_worker():
        what = "`alignkit run` starts the processes of each stage itself (launch.processes)"
        raise EnvironmentProblem(f"{what}; with a launcher of your own, start the stages one by one")
    check_order(stages)
    for number, stage in enumerate(stages):  # the last stage's missing file is found now, not in a day
        require_ready(stage, coming=[before.name for before in stages[:number]])
    entries = plan_run(commands, force=how.force)
    results, measured = list[dict[str, Any]](), list[dict[str, Any]]()
    rows = [(entry.stage.name, str(entry.stage.method), f"{entry.will}: {entry.why}") for entry in entries]
    rows += [(MEASURE, "", "every model, as evaluate: says")] if measure is not None else []
    try:
        with console.Board(rows) as board:

            def before(entry: Entry) -> None:
                place["run_dir"] = Path(entry.stage.run_dir)
                if entry.will != "leave alone":
                    board.begin(entry.stage.name)

            done = run_stages(entries, retries=how.retries, before=before, aside=board.paused)
            for entry, result in zip(entries, done, strict=True):
                results.append(result.to_dict())
                state = "left alone" if entry.will == "leave alone" else "finished"
                board.end(entry.stage.name, state=state, metrics=result.metrics)
            if measure is not None and console.is_main():
                measure.show(board, measured, is_new=any(entry.will != "leave alone" for entry in entries))
    except BaseException as error:
        with suppress(AlignKitError):  # the page shows how far it came; what stopped it is what is said
            run = RunDir(place["run_dir"]) if "run_dir" in place else None
            failed = isinstance(error, AlignKitError) and error.exit_code in _FAILURES  # no mistake, stop, or bug
            if failed and run and console.is_main() and run.stage.is_file() and not run.is_finished():
                write_text(run.error_log, console.redact(f"{error}\n"))
            _write_page(stages)
        raise
    finally:
        if console.is_main() and how.as_json:
            console.print_json({"stages": results, "evaluations": measured})
        elif console.is_main():
            console.print_text("run", [stage.name for stage in stages], results)
            for evaluation in measured:
                from alignkit.evaluate.run import table

                whole = [figure for figure in evaluation["results"] if figure["slice"] is None]
                console.print_table(evaluation["name"], *table(whole))
            _show_verdicts(stages)
    _write_page(stages)


def _refuse_unknown(commands: Sequence[Command]) -> None:
    """Refuse an --allow-change that names no setting of any of these stages, now or when their runs began."""
    if not commands[0].allow_change:
        return
    known = {"start_weights", "reward_weights", "data", "template", "ptx_data"}
    for stage in (command.stage for command in commands):
        run = RunDir(Path(stage.run_dir))
        began = read_json(run.stage).get("fingerprint") or {} if run.stage.is_file() else {}
        known |= {*stage.fingerprint_values(), *began, *(f"{stage.name}.{key}" for key in method_fields(stage.method))}
    names = {key.split(".", dot)[-1] for key in known for dot in range(key.count(".") + 1)}
    if unknown := [name for name in commands[0].allow_change if name not in names]:
        what = "is no setting of these stages"
        raise UsageError([Problem(f"{name} {what}{suggest(name, names)}", "--allow-change") for name in unknown])


def _show_verdicts(stages: Sequence[Stage]) -> None:
    from alignkit.report.publish import attempt
    from alignkit.report.verdict import judge_all

    runs = [Path(stage.run_dir) for stage in stages]
    console.print_text("verdicts", attempt("verdict", runs[0], lambda: judge_all(runs)) or [])


def _write_page(stages: Sequence[Stage]) -> None:
    """Write the page of the whole recipe and say where it is."""
    from alignkit.report.publish import attempt, write_recipe_report

    if console.is_main():
        runs = [(stage.name, Path(stage.run_dir)) for stage in stages]
        place = runs[0][1].expanduser().absolute().parent
        if (page := attempt("page", place, lambda: write_recipe_report(stages[0].recipe_name, runs))) is not None:
            console.note(f"report: {page}")


def plan_run(commands: Sequence[Command], *, force: bool = False) -> list[Entry]:
    """Decide what is done with each stage, in order: a finished one is left alone, an unfinished one goes on; one whose
    settings, data or starting weights have changed runs again, and so does every one that needs it."""
    entries: list[Entry] = []
    busy: dict[str, Will] = {}  # stages that will make something new
    for command in commands:
        needs = tuple(dict.fromkeys(need.stage for need in list_needs(command.stage)))
        will, why = _decide(command, {name: busy[name] for name in needs if name in busy}, force=force)
        entries.append(Entry(command, will, why, needs))
        if will != "leave alone":
            busy[command.stage.name] = will
    return entries


def _decide(command: Command, before: dict[str, Will], *, force: bool) -> tuple[Will, str]:
    stage = command.stage
    run = RunDir(Path(stage.run_dir))
    makes_rows = stage.method in FEEDBACK
    product = run.path / ROWS if makes_rows else run.model
    if not run.stage.exists():
        return "run", "no run yet"
    if force:
        return "run again", "--force"
    if before:
        *names, last = before
        one, several = ("goes on", "go on") if {*before.values()} == {"go on"} else ("runs", "run")
        said = f"{', '.join(names)} and {last} {several}" if names else f"{last} {one}"
        return "run again", f"{said} before it"
    if run.is_finished() and not product.exists():
        return "run again", f"its {product.name} is gone"
    module = f"{ROOMS[stage.method]}.{stage.method}" if makes_rows else "train.fingerprint"
    room = importlib.import_module(f"alignkit.{module}")
    if changes := room.find_changes(stage, run.path, allow_change=command.allow_change):
        more = f" (and {len(changes) - 2} more)" if len(changes) > 2 else ""
        return "run again", f"{'; '.join(changes[:2])}{more}"
    if run.is_finished():
        reason = find_damaged_product(run.path) or (None if makes_rows else room.find_longer(stage, run))
        return ("go on", reason) if reason else ("leave alone", "finished, nothing has changed")
    newest = newest_step(run.checkpoints)
    return "go on", "not finished" if newest is None else f"stopped; step {newest} is saved"


def check_order(stages: Sequence[Stage], *, only_listed: bool = False) -> None:
    """Refuse a stage that needs one not run before it; with `only_listed` another command may run those not listed."""
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


def run_stages(
    entries: Sequence[Entry], *, retries: int = 0, before: Callable[[Entry], None] = lambda entry: None,
    aside: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[Result]:  # fmt: skip
    """Do with the stages what was decided, and yield how each ended; `aside` is entered while one's processes write."""
    from alignkit.report.publish import leave_finished

    for entry in entries:
        before(entry)
        if entry.will == "leave alone":
            yield leave_finished(RunDir(Path(entry.stage.run_dir)))
            continue
        stage, node_rank = entry.stage, entry.command.node_rank
        is_here = stage.method in FEEDBACK or (retries == 0 and place(stage, node_rank).world_size == 1)
        with nullcontext() if is_here else aside():
            result = launch_stage(stage, entry.command, force=entry.will == "run again", retries=retries)
        yield result
        let_go()


def let_go() -> None:
    """Forget the stage that ended in this process, and give its memory back: each stage reports its own peak."""
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
        with suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # a kernel without it
            Path("/proc/self/clear_refs").write_text("5")


def _use_slurm(commands: Sequence[Command], how: How) -> None:
    """Write stages as batch jobs, submit them on request, and show them; refuse what a job would not honour."""
    from alignkit.launch.job import write_jobs

    if how.retries:
        raise UsageError("--retries: a Slurm job requeues itself; set launch.slurm.max_requeues")
    if commands[0].node_rank is not None:
        raise UsageError("--node-rank: Slurm tells each node which one it is; take it away")
    jobs = write_jobs(commands, submit=how.submit, dry_run=how.dry_run, force=how.force)
    if how.as_json:
        return console.print_json({"jobs": jobs})
    return console.print_text("jobs", jobs, how.dry_run)


def launch_stage(stage: Stage, command: Command | None = None, *, force: bool = False, retries: int = 0) -> Result:
    """Train a stage in its run directory and return how it ended; `command` starts it again in other processes."""
    command = command or Command(stage)
    makes_rows = stage.method in FEEDBACK
    if makes_rows:
        if given := [key for key in ("processes", "nodes", "strategy") if stage.origins[f"launch.{key}"] != "default"]:
            console.note(f"{stage.name}: makes rows in one process; launch.{', launch.'.join(given)} is for training")
        if retries:
            console.note(f"{stage.name}: --retries is for training; the same command goes on where this stage stopped")
    if stage.model.path.startswith("builtin:"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # its matrices are so small that threads only wait for each other
    if is_worker():
        from alignkit.launch.accelerate import join_launcher

        if makes_rows:
            raise EnvironmentProblem(f"a {stage.method} stage runs in one process; start it without a launcher")
        join_launcher(stage, retries=retries)
        if SUPERVISED in os.environ or os.environ.get("RANK", "0") != "0":  # somebody has checked and locked the run
            return _train(stage, command)
    elif not makes_rows:
        placement = place(stage, command.node_rank)
        if placement.world_size == 1 and placement.strategy != "ddp":
            console.warn(f"launch.strategy {placement.strategy} has no effect with one process; set launch.processes")
        if placement.world_size > 1 or retries:
            from alignkit.launch.job import Job

            return Job(command, placement, hold_run).run(force=force, retries=retries)
    require_ready(stage)
    with hold_run(command, force=force):
        return _train(stage, command)


def _train(stage: Stage, command: Command) -> Result:
    """Train in this process, in a run directory that somebody holds for it."""
    began[:] = [time.monotonic()]
    run = RunDir(Path(stage.run_dir))
    method = importlib.import_module(f"alignkit.{ROOMS.get(stage.method, 'train')}.{stage.method}")
    gc.enable()
    gc.freeze()  # what the libraries made stays for good: never look through it again
    # TensorBoard, unless the user says where, would make a directory of this host's name inside the checkpoints.
    given = "TENSORBOARD_LOGGING_DIR" in os.environ
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.path / "tensorboard"))
    try:
        with record_warnings(run.warnings):
            result: Result = method.run(stage, run.path, allow_change=command.allow_change)
    finally:
        if not given:
            del os.environ["TENSORBOARD_LOGGING_DIR"]
    return result


@contextmanager
def hold_run(command: Command, *, force: bool, check: Callable[[], None] = lambda: None) -> Iterator[RunDir]:
    """Have a run directory for one command alone: locked, and with nobody in it whose supervisor was killed; `check` is
    called while those are waited for. Raises RunError for a run with other settings, unless `force` moves it aside."""
    stage = command.stage
    run, lock = open_run(Path(stage.run_dir), force=False)
    try:
        # Processes of an earlier command that was killed save and end by themselves; then the rest is killed.
        deadline, told = time.monotonic() + _STRAY_SECONDS, False
        while strays := list_marked(run.launch):
            if not told:
                console.note(f"waiting for {len(strays)} processes of an earlier command in {run.path} to end")
                told = True
            if time.monotonic() > deadline:
                kill_all([stray.pid for stray in strays], run.launch)
                break
            check()
            time.sleep(0.2)
        if force:
            lock = set_aside(run, lock)
    except BaseException:
        lock.close()
        raise
    what = "the run directory was moved or deleted meanwhile; move it back, and the same command goes on from there"
    gone = DiskError(f"{run.path}: {what}")
    try:
        if run.stage.is_file() and stage.method not in ROOMS:
            known = {**fingerprint_stage(stage), **unread(run)}
            compare_fingerprints(run, known, allow_change=command.allow_change)
        yield run
        if not lock.is_current():
            raise gone
    except Exception as error:
        if error is gone or lock.is_current():
            raise
        raise gone from error  # whatever else went wrong began there
    finally:
        # While it is ours: another command may lock it as soon as we let go. A stage refused before it began leaves
        # nothing behind.
        if lock.is_current() and {entry.name for entry in run.path.iterdir()} <= {".lock", "cache", "warnings.jsonl"}:
            shutil.rmtree(run.path, ignore_errors=True)
        lock.close()
