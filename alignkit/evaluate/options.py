"""Options of an evaluation: those of the command line laid over the recipe's `evaluate:`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alignkit import console
from alignkit.console import redact
from alignkit.errors import Problem, UsageError
from alignkit.recipe import Recipe, Stage, resolve
from alignkit.recipe.nearest import suggest
from alignkit.recipe.rules_feedback import evaluation_problems
from alignkit.recipe.schema import EVALUATED, FEEDBACK, EvaluateOptions, FeedbackModel

_NEEDED = {"judge": "against", "constitution": "against", "shots": "tasks"}  # options that only serve another one


def combine(base: EvaluateOptions, given: Mapping[str, Any]) -> EvaluateOptions:
    """Return `base` with every option that was given (not None, not empty); raises UsageError naming bad ones."""
    changes = {key: value for key, value in given.items() if value not in (None, [], ())}
    try:
        options = EvaluateOptions.model_validate({**base.model_dump(exclude_unset=True), **changes})
    except ValidationError as error:
        raise UsageError([Problem(_describe(item), _flag(item["loc"])) for item in error.errors()]) from None
    if problems := list(_find_problems(options, changes)):
        raise UsageError(problems)
    return options


def _find_problems(options: EvaluateOptions, changes: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with options that are right in themselves."""
    if changes.keys() & {"judge", "constitution"}:
        for key, what in evaluation_problems(options.model_dump(exclude_unset=True)):
            yield Problem(redact(what), _flag((key,)))  # an address may hold a password
    for key, needed in _NEEDED.items():
        if key in changes and not getattr(options, needed):
            yield Problem(f"has no effect without {_flag((needed,))}", _flag((key,)))


def judge_source(judge: str | None, name: str | None) -> dict[str, Any] | None:
    """Read --judge and --judge-name; raises UsageError for a name without an address."""
    is_url = judge is not None and "://" in judge
    if name is not None and not is_url:
        raise UsageError("has no effect without a url as --judge: it is the model's name there", where="--judge-name")
    if judge is None:
        return None
    return {"url": judge, **({"name": name} if name else {})} if is_url else {"model": judge}


def sources(paths: Sequence[str], split: str | None) -> list[dict[str, Any]]:
    """Return data sources for --data; builtin and hub data are read from the split test unless told otherwise."""
    found = []
    for path in paths:
        is_local = Path(path).expanduser().exists()
        if is_local and split is not None:
            raise UsageError(f"--split has no effect on {path}, which is a file or a directory")
        found.append({"path": str(Path(path).expanduser())} if is_local else {"path": path, "split": split or "test"})
    return found


def request_stages(
    recipe: Recipe, options: EvaluateOptions, names: Sequence[str] | None = None
) -> list[tuple[str, EvaluateOptions]]:
    """Return the run directory of each stage that trains, with the options in which stages are run directories.

    The name of a swept stage means the run with the values of the stage that is measured; where there is not just one,
    the option is left out for that stage, with a word. Raises UsageError as `name_runs` does.
    """
    stages = {name: resolve(recipe, name) for name in recipe.order}
    runs = {name: stage.run_dir for name, stage in stages.items()}
    found = []
    for name in names or list(stages):
        stage = stages[name]
        if stage.method in FEEDBACK:
            continue
        near = {plain: _find_kin(stage, [stages[made] for made in recipe.sweeps[plain] if made in stages])
                for plain in recipe.sweeps}  # fmt: skip
        chosen = options
        for key in EVALUATED:
            value = _named(options, key)
            if value in near and near[value] is None:
                console.note(f"{name}: evaluate.{key} is left out, no one run of {value} has its values")
                chosen = chosen.model_copy(update={key: None})
        known = {**{plain: run_dir for plain, run_dir in near.items() if run_dir is not None}, **runs}
        found.append((stage.run_dir, name_runs(chosen, known)))
    return found


def _find_kin(stage: Stage, variants: Sequence[Stage]) -> str | None:
    same = [
        variant.run_dir
        for variant in variants
        if all(stage.point.get(key, value) == value for key, value in variant.point.items())
    ]
    return same[0] if len(same) == 1 else None


def _named(options: EvaluateOptions, key: str) -> str | None:
    value = getattr(options, key)
    return value.model if isinstance(value, FeedbackModel) else value


def name_runs(options: EvaluateOptions, runs: Mapping[str, str], *, strict: bool = True) -> EvaluateOptions:
    """Return the options with every stage name as its run directory.

    With `strict`, raises UsageError for a single word that is neither a stage of the recipe nor something that exists;
    else it may be a hub id.
    """
    named: dict[str, Any] = {}
    problems = []
    judge = options.judge
    for key in EVALUATED:
        value = _named(options, key)
        if value is not None and value in runs:
            named[key] = runs[value]
        elif strict and runs and value and not set(value) & {"/", ":"} and not Path(value).exists():
            hint = suggest(value, runs) or f"; the recipe's stages are {', '.join(runs)}"
            problems.append(Problem(f"{value} is neither a stage nor a path that exists{hint}", _flag((key,))))
    if problems:
        raise UsageError(problems)
    if "judge" in named:
        named["judge"] = FeedbackModel(model=named["judge"], engine=judge.engine if judge else "transformers")
    return options.model_copy(update=named)


def _flag(place: tuple[int | str, ...]) -> str:
    singular = {"metrics": "metric", "tasks": "task"}
    name = str(place[0])
    return f"--{singular.get(name, name).replace('_', '-')}"


def _describe(item: Mapping[str, Any]) -> str:
    value, expected = item.get("input"), item.get("ctx", {}).get("expected")
    if expected and isinstance(value, str):
        accepted = [word.strip("' ") for word in str(expected).replace(" or ", ", ").split(",")]
        return f"is {value}; it must be one of {', '.join(accepted)}{suggest(value, accepted)}"
    return f"is {value!r}: {str(item['msg'])[:1].lower()}{str(item['msg'])[1:]}"
