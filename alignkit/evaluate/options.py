"""Options of an evaluation: those of the command line laid over the recipe's `evaluate:`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alignkit import console
from alignkit.console import redact
from alignkit.errors import Problem, UsageError, suggest
from alignkit.recipe import Recipe, resolve
from alignkit.recipe.methods import FEEDBACK
from alignkit.recipe.rules import evaluation_problems
from alignkit.recipe.schema import EVALUATED, EvaluateOptions, FeedbackModel

_NEEDED = {"judge": "against", "constitution": "against", "shots": "tasks"}  # options that only serve another one


def combine(base: EvaluateOptions, given: Mapping[str, Any]) -> EvaluateOptions:
    """Lay every option that was given (not None, not empty) over `base`; raises UsageError naming bad ones."""
    changes = {key: value for key, value in given.items() if value not in (None, [], ())}
    try:
        options = EvaluateOptions.model_validate({**base.model_dump(exclude_unset=True), **changes})
    except ValidationError as error:
        wrong = []
        for item in error.errors():
            value, expected, what = item["input"], item.get("ctx", {}).get("expected"), item["msg"]
            found = f"is {value!r}: {what[:1].lower()}{what[1:]}"
            if expected and isinstance(value, str):
                accepted = [word.strip("' ") for word in str(expected).replace(" or ", ", ").split(",")]
                found = f"is {value}; it must be one of {', '.join(accepted)}{suggest(value, accepted)}"
            wrong.append(Problem(found, _flag(item["loc"][0])))
        raise UsageError(wrong) from None
    problems = []
    if changes.keys() & {"judge", "constitution", "temperature", "samples", "top_p", "top_k"}:
        for key, what in evaluation_problems(options.model_dump(exclude_unset=True)):
            problems.append(Problem(redact(what), _flag(key)))  # an address may hold a password
    for key, needed in _NEEDED.items():
        if key in changes and not getattr(options, needed):
            problems.append(Problem(f"has no effect without {_flag(needed)}", _flag(key)))
    if problems:
        raise UsageError(problems)
    return options


def judge_source(judge: str | None, name: str | None) -> dict[str, Any] | None:
    """Read --judge and --judge-name; raises UsageError for a name without an address."""
    is_url = judge is not None and "://" in judge
    if name is not None and not is_url:
        raise UsageError("has no effect without a url as --judge: it is the model's name there", where="--judge-name")
    if judge is None:
        return None
    return {"model": judge} if not is_url else {"url": judge, "name": name} if name else {"url": judge}


def sources(paths: Sequence[str], split: str | None) -> list[dict[str, Any]]:
    """Read --data; builtin and hub data are read from the split test unless told otherwise."""
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
    """List the run directory of each stage that trains, with the options in which stages are run directories.
    The name of a swept stage means the run with the values of the stage that is measured; where there is not just one,
    the option is left out for that stage, with a word. Raises UsageError as `name_runs` does."""
    stages = {name: resolve(recipe, name) for name in recipe.order}
    found = []
    for name in names or list(stages):
        stage, chosen = stages[name], options
        if stage.method in FEEDBACK:
            continue
        runs = {other: made.run_dir for other, made in stages.items()}
        for plain, variants in recipe.sweeps.items():
            kin = [other.run_dir for other in (stages[variant] for variant in variants if variant in stages)
                   if all(stage.point.get(key, value) == value for key, value in other.point.items())]  # fmt: skip
            if len(kin) == 1:
                runs.setdefault(plain, kin[0])
                continue
            for key in EVALUATED:
                if _named(options, key) == plain:
                    console.note(f"{name}: evaluate.{key} is left out, no one run of {plain} has its values")
                    chosen = chosen.model_copy(update={key: None})
        found.append((stage.run_dir, name_runs(chosen, runs)))
    return found


def _named(options: EvaluateOptions, key: str) -> str | None:
    value = getattr(options, key)
    return value.model if isinstance(value, FeedbackModel) else value


def name_runs(options: EvaluateOptions, runs: Mapping[str, str], *, strict: bool = True) -> EvaluateOptions:
    """Replace stage names in the options by run directories; `strict` refuses a single word that is nothing there."""
    named: dict[str, Any] = {}
    problems = []
    for key in EVALUATED:
        value = _named(options, key)
        if value is not None and value in runs:
            named[key] = runs[value]
        elif strict and runs and value and not set(value) & {"/", ":"} and not Path(value).exists():
            hint = suggest(value, runs) or f"; the recipe's stages are {', '.join(runs)}"
            problems.append(Problem(f"{value} is neither a stage nor a path that exists{hint}", _flag(key)))
    if problems:
        raise UsageError(problems)
    if "judge" in named and options.judge is not None:
        named["judge"] = FeedbackModel(model=named["judge"], engine=options.judge.engine)
    return options.model_copy(update=named)


def _flag(key: int | str) -> str:
    return "--" + {"metrics": "metric", "tasks": "task"}.get(str(key), str(key)).replace("_", "-")
