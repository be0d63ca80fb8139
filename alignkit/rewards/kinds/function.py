"""A Python function as a reward: found by its import path, called under a time limit, its answer checked."""

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import NonFiniteError, RewardError, suggest
from alignkit.recipe import Stage
from alignkit.recipe.schema import RewardSource
from alignkit.recipe.yaml import shorten
from alignkit.rewards import Answers, Workspace, stage_space
from alignkit.runs.signals import time_limit

_IMPORT_SECONDS = 120.0
_NAMES = ("prompts", "completions")


class TimeUp(BaseException):
    """The time is over; no `except Exception` of other code catches it."""


class FunctionReward:
    """A Python function of prompts, answers and the rows' columns that it has parameters for."""

    def __init__(self, source: RewardSource, space: Workspace) -> None:
        """Import `pkg.module:name` from sys.path or the recipe's directory."""
        self.path, self.where, self._once = str(source.function), space.where, space.once
        if not space.trust_code:
            what = "is code, which a recipe cannot allow; read it, and give --trust-code on the command line"
            raise self._error(what)
        self.name = self.path.rpartition(":")[2]
        options = space.stage.options if space.stage else None
        self.seconds = float(getattr(options, "reward_timeout", 60.0))
        self._function = _import(self.path, space.folder, self.where)
        self._names: list[str] = []  # what it is given by name; empty: prompts and answers come first
        self._accepted: dict[str, bool] | None = None  # the columns it takes and whether it needs them; None: any
        with contextlib.suppress(TypeError, ValueError):  # what is built in has no signature
            parameters = list(inspect.signature(self._function).parameters.values())
            kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            takes = {item.name: item.default is item.empty for item in parameters if item.kind in kinds}
            takes_all = any(item.kind is item.VAR_KEYWORD for item in parameters)
            first = [item.name for item in parameters[:2] if item.kind is not item.KEYWORD_ONLY]
            if "completions" in takes and first[1:] != ["completions"]:  # written for TRL, which calls by name
                self._names = [name for name in _NAMES if takes_all or name in takes]
            own = self._names or first
            self._accepted = None if takes_all else {name: takes[name] for name in takes if name not in own}

    def score(self, answers: Answers) -> list[float]:
        """Call it, once for all processes: a function may look at the answers together, or count its calls."""
        if not answers.prompts:
            return []
        found: list[float] = self._once(lambda: self(answers.prompts, answers.completions, answers.columns))
        return found

    @staticmethod
    def check(source: RewardSource, stage: Stage, key: str, coming: Collection[str] | None = None) -> str:
        if coming is None or not stage.trust_code:  # else it is loaded when the stage starts
            FunctionReward(source, stage_space(stage, key))
        return f"function {source.function}"

    @staticmethod
    def fingerprint(source: RewardSource, stage: Stage) -> str | None:
        """Hash the file the function is in; None where it has no file, or code is not allowed."""
        if not stage.trust_code:
            return None
        folder = str(Path(stage.recipe_path).resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)
        try:  # which runs the packages that it lies in
            with contextlib.redirect_stdout(sys.stderr):
                spec = importlib.util.find_spec(str(source.function).partition(":")[0])
        except (Exception, SystemExit):
            return None  # opening it says what is wrong
        file = Path(spec.origin or "") if spec is not None else Path()
        return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() if file.is_file() else None

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[float]:
        """Call the function: one finite number per answer; raises RewardError or NonFiniteError for anything else."""
        wanted = columns if self._accepted is None else self._accepted
        missing = [name for name, needed in (self._accepted or {}).items() if needed and name not in columns]
        if missing:
            there = ", ".join(columns) or "no other columns"
            raise self._error(f"needs the column {missing[0]}{suggest(missing[0], columns)}; the rows have {there}")
        given = {name: list(column) for name, column in columns.items() if name in wanted}
        both = list(prompts), list(completions)
        first = () if self._names else both
        given |= {name: held for name, held in zip(_NAMES, both, strict=True) if name in self._names}
        arguments = copy.deepcopy((first, given))  # it may change what it gets
        try:
            # Standard output is for results.
            with contextlib.redirect_stdout(sys.stderr), time_limit(self.seconds, TimeUp()):
                returned = self._function(*arguments[0], **arguments[1])
        except TimeUp:
            what = f"did not return within {self.seconds:g} s for {len(completions)} answers"
            raise self._error(f"{what}; make it faster, or raise reward_timeout") from None
        except (Exception, SystemExit) as error:
            raise self._error(f"raised {_describe(error)}") from error
        return self._read(returned, prompts, len(completions))

    def _read(self, returned: Any, prompts: Sequence[Any], count: int) -> list[float]:
        if hasattr(returned, "tolist"):  # an array or a tensor
            returned = returned.tolist()
        if not isinstance(returned, (list, tuple)):
            raise self._error(f"returned {type(returned).__name__}; it must return a list of {count} numbers")
        if len(returned) != count:
            raise self._error(f"returned {len(returned)} rewards for {count} answers")
        rewards = []
        for number, value in enumerate(returned):
            if getattr(value, "size", None) == 1 or hasattr(value, "numel"):  # a number of numpy's, or a tensor
                value = value.tolist()
            which = f"for answer {number} ({shorten(repr(prompts[number]), 80)})"
            if not isinstance(value, (int, float)):
                raise self._error(f"returned {shorten(repr(value), 80)} {which}; it must be a number")
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                what = f"returned an integer of {value.bit_length()} bits {which}"
                raise self._error(f"{what}; it must be a number a float can hold")
            if not math.isfinite(value):
                raise NonFiniteError(str(self._error(f"returned {float(value)} {which}; a reward must be finite")))
            rewards.append(float(value))
        return rewards

    def _error(self, what: str) -> RewardError:
        return RewardError(f"the reward function {self.path} {what}", where=self.where)


def is_function(source: str) -> bool:
    """Tell `pkg.module:name` from a path or a hub id."""
    return re.fullmatch(r"(?!builtin:)[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", source) is not None


def _import(path: str, folder: Path, where: str | None) -> Callable[..., Any]:
    module_name, _, name = path.partition(":")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: it must not hide a library
    cause: BaseException | None = None
    try:
        with contextlib.redirect_stdout(sys.stderr), time_limit(_IMPORT_SECONDS, TimeUp()):
            module = importlib.import_module(module_name)
        if callable(function := getattr(module, name, None)):
            return function
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        hint = suggest(name, known) or (f"; it has {', '.join(known[:8])}" if known else "")
        state = "is not a function" if hasattr(module, name) else "is not there"
        what = f": {name} {state} in {module_name}{hint}"
    except TimeUp:
        what = f" cannot be imported: {module_name} takes longer than {_IMPORT_SECONDS:g} s"
    except ModuleNotFoundError as error:
        own = error.name is not None and f"{module_name}.".startswith(f"{error.name}.")
        what = f"there is no module {error.name}" if own else f"{module_name} imports {error.name}, which is not there"
        what, cause = f": {what}, on sys.path or in {folder}", error
        if module_name.endswith(".py"):
            what += f"; a module is named without .py: {module_name[:-3]}:{name}"
    except (Exception, SystemExit) as error:
        what, cause = f": importing {module_name} raised {_describe(error)}", error
    raise RewardError(f"the reward function {path}{what}", where=where) from cause


def _describe(error: BaseException) -> str:
    """Say what was raised and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    place = f" at {outside[-1].filename}:{outside[-1].lineno}" if outside else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {shorten(text, 80)}' if text else ''}{place}"


KIND = FunctionReward
