"""What the command line asks of an evaluation, laid over what the recipe's `evaluate:` says.

Pure: it names no run that is not given, and reads nothing but whether a path exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alignkit.errors import Problem, UsageError
from alignkit.recipe.nearest import suggest
from alignkit.recipe.schema import EVALUATED, EvaluateOptions


def combine(base: EvaluateOptions, given: Mapping[str, Any]) -> EvaluateOptions:
    """Return `base` with every option that was given (not None, not empty); raises UsageError naming bad ones."""
    changes = {key: value for key, value in given.items() if value not in (None, [], ())}
    try:
        return EvaluateOptions.model_validate({**base.model_dump(), **changes})
    except ValidationError as error:
        raise UsageError([Problem(_describe(item), _flag(item["loc"])) for item in error.errors()]) from None


def sources(paths: Sequence[str], split: str | None) -> list[dict[str, Any]]:
    """Return data sources for --data; builtin and hub data are read from the split test unless told otherwise."""
    found = []
    for path in paths:
        is_local = Path(path).expanduser().exists()
        if is_local and split is not None:
            raise UsageError(f"--split has no effect on {path}, which is a file or a directory")
        found.append({"path": str(Path(path).expanduser())} if is_local else {"path": path, "split": split or "test"})
    return found


def name_runs(options: EvaluateOptions, runs: Mapping[str, str]) -> EvaluateOptions:
    """Return the options with every stage name as its run directory.

    Raises UsageError for a single word that is neither a stage of the recipe nor something that exists.
    """
    named, problems = {}, []
    for key in EVALUATED:
        value = getattr(options, key)
        if value in runs:
            named[key] = runs[value]
        elif runs and value and not set(value) & {"/", ":"} and not Path(value).exists():
            hint = suggest(value, runs) or f"; the recipe's stages are {', '.join(runs)}"
            problems.append(Problem(f"{value} is neither a stage nor a path that exists{hint}", _flag((key,))))
    if problems:
        raise UsageError(problems)
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
