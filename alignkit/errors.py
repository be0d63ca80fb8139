"""The exception tree and its exit codes; everything a user can be told in one message.

Deliberately imports nothing beyond the standard library, so that every room can raise from here.

    AlignKitError                1  (never raised itself)
    ├── UsageError               2  a mistake in what was given; carries every problem found
    │   ├── RecipeError             the recipe file
    │   ├── DataError               rows, files, columns
    │   ├── ModelError              weights, adapters, tokenizers, templates
    │   ├── RewardError             reward functions, and reward models that do not fit
    │   └── RunError                the run directory: in use, changed settings, damaged checkpoints
    ├── NonFiniteError           3  loss, gradient or reward is NaN or infinite
    ├── DiskError                4  no room, or not writable
    ├── OutOfMemoryError         5
    ├── RankError                6  a process of the job died or hung
    ├── JudgeError               7
    ├── EnvironmentProblem       8  versions, devices, missing extras
    └── Stopped                130  interrupted, or 143 terminated; everything was saved
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where it is, and what to do about it."""

    what: str
    where: str | None = None  # "recipes/a.yaml:7", "data.jsonl:734", "--set", "model/"

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class AlignKitError(Exception):
    """A condition the user can act on; its text is the whole message."""

    exit_code = 1
    shared = False  # whether this is a copy of an error that another process of the job has and reports


class UsageError(AlignKitError):
    """One or more problems in what the user gave; all are reported together."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Iterable[Problem], *, where: str | None = None) -> None:
        if isinstance(problems, str):
            problems = [Problem(problems, where)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(UsageError):
    """The recipe file, a fragment it extends, or a --set value."""


class DataError(UsageError):
    """Data files, rows and columns."""


class ModelError(UsageError):
    """Weights, adapters, tokenizers and chat templates."""


class RewardError(UsageError):
    """A reward function, or a reward model that cannot score the answers."""


class RunError(UsageError):
    """The run directory: in use, started with other settings, or its checkpoints are damaged."""


class NonFiniteError(AlignKitError):
    """A loss, gradient or reward is NaN or infinite; nothing was updated with it."""

    exit_code = 3


class DiskError(AlignKitError):
    """A file could not be written; what was complete before is untouched."""

    exit_code = 4


class OutOfMemoryError(AlignKitError):
    """The device or the host ran out of memory."""

    exit_code = 5


class RankError(AlignKitError):
    """A process of a distributed job died or stopped answering."""

    exit_code = 6


class JudgeError(AlignKitError):
    """The judge gave up: unreachable, out of budget, or refused."""

    exit_code = 7


class EnvironmentProblem(AlignKitError):
    """Library versions, devices or extras that this work needs are missing."""

    exit_code = 8


class Stopped(AlignKitError):
    """A signal asked us to stop and everything was saved; the same command goes on."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # 130 for SIGINT, 143 for SIGTERM, SIGUSR1 and SIGHUP
