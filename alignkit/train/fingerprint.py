"""What decides the weights that a stage ends with, as values that can be compared before anything heavy loads.

A run keeps its fingerprint in stage.json. Without torch: `alignkit run` compares every stage first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.console import Meter
from alignkit.data import DataReport, Rejects, read_rows
from alignkit.data.load import first_rows
from alignkit.models.files import find_model_dir, fingerprint_weights
from alignkit.recipe import Stage
from alignkit.runs.directory import RunDir, list_changes
from alignkit.runs.files import read_json


def fingerprint_stage(stage: Stage) -> dict[str, Any]:
    """Collect all that recipe and model files tell: values in force, weights started from, rewards."""
    directory = find_model_dir(stage.start_dir or stage.model.path)
    weights = fingerprint_weights(directory) if directory else None  # built-in and hub weights are told by their name
    found = {**stage.fingerprint_values(), "start_weights": weights}
    teacher = getattr(stage.options, "teacher", None)
    if teacher is not None and teacher.model and (directory := find_model_dir(teacher.model)):
        found["teacher_weights"] = fingerprint_weights(directory)
    if stage.rewards:
        from alignkit.rewards.kinds import fingerprint_rewards

        found |= fingerprint_rewards(stage)
    return found


def unread(run: RunDir) -> dict[str, Any]:
    """The parts of a run's fingerprint that only reading the data gives again, as the run has them."""
    kept = read_json(run.stage).get("fingerprint", {})
    return {key: kept.get(key) for key in ("data", "template", "ptx_data")}


def find_changes(stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()) -> list[str]:
    """Tell how a stage differs from the run that has begun there, "key: before -> now"; reads all of its rows."""
    run = RunDir(run_dir)
    known = {**fingerprint_stage(stage), **unread(run)}
    if found := list_changes(run, known, allow_change=allow_change):
        return list(found.values())
    return list(list_changes(run, {**known, "data": hash_data(stage)}, allow_change=allow_change).values())


def find_longer(stage: Stage, run: RunDir) -> str | None:
    """Tell which allowed change makes a finished run longer, as "key: before -> now", None when none does."""
    before, now = read_json(run.stage).get("fingerprint") or {}, stage.fingerprint_values()
    for key in sorted(now):
        if key.rpartition(".")[2] in ("num_train_epochs", "max_steps") and before.get(key) != now[key]:
            old = before.get(key)
            if not isinstance(old, int | float) or now[key] > old:
                return f"{key}: {old} -> {now[key]}"
    return None


def hash_data(stage: Stage) -> str:
    """Make the fingerprint that `prepare_tables` finds, by reading the rows again without tokenising them."""
    report, rejects = DataReport(), Rejects()
    sources = [first_rows(stage, report), *([stage.training.eval] if isinstance(stage.training.eval, list) else [])]
    with Meter(f"{stage.name}: rows compared") as meter:
        for group in sources:
            for _ in meter.over(read_rows(stage, group, report=report, rejects=rejects)):
                pass
    return report.fingerprint
