"""Exceptions with their exit codes, which foreign ones a user can act on, and the name somebody probably meant."""

import errno
from collections.abc import Iterable
from dataclasses import dataclass

# In the environment of a process that our own supervisor started: the directory where its signs of life go.
SUPERVISED = "ALIGNKIT_LAUNCH_DIR"
# What torch.save and safetensors say when a write comes up short: neither keeps the errno.
DISK_FULL_MESSAGES = ("No space left", "unexpected pos", "PytorchStreamWriter failed", "Disk quota", "File too large")


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
            problems = Problem(problems, where)
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
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
    exit_code = 3  # a loss, gradient or reward is NaN or infinite; nothing was updated with it


class DiskError(AlignKitError):
    exit_code = 4  # a file could not be written; what was complete before is untouched


class OutOfMemoryError(AlignKitError):
    exit_code = 5  # of the device or the host


class RankError(AlignKitError):
    exit_code = 6  # a process of a distributed job died or stopped answering


class JudgeError(AlignKitError):
    exit_code = 7  # unreachable, out of budget, or it refused


class EnvironmentProblem(AlignKitError):
    exit_code = 8  # library versions, devices or extras that this work needs are missing


class Stopped(AlignKitError):
    """A signal asked us to stop and everything was saved; the same command goes on."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # 130 for SIGINT, 143 for SIGTERM, SIGUSR1 and SIGHUP


class Interrupt(KeyboardInterrupt):
    """Raised by a signal's handler, wherever the program is just then; `hearing` raises `stopped` in its place. It is
    no Exception: transformers, which tries things with `except Exception` in every forward pass, would swallow it."""

    def __init__(self, stopped: Stopped) -> None:
        self.stopped = stopped


def explain(error: Exception) -> AlignKitError | None:
    """Turn an exception into one that the user can act on, None for a bug; foreign ones are known by errno or name."""
    if isinstance(error, AlignKitError):
        return error
    is_ours = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    if is_ours or type(error).__name__ == "OutOfMemoryError":  # torch's own, which is not loaded for this
        what = first_line(error) if str(error) else "the host has no memory left"
        advice = "lower micro_batch_size or max_length, or use lora: or model.quantization: nf4"
        return OutOfMemoryError(f"out of memory: {what}\n{advice}")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError(f"{str(error.filename)[:60]}...: file name too long; choose a shorter one")
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):  # pathlib's, without the name
        return UsageError("a path begins with ~ and a user whom this machine has not; write the path out")
    untouched, advice = "what was complete before is untouched", "free some space and run the same command again"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        place = f"{error.filename}: " if error.filename else ""
        advice = advice if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another --out"
        return DiskError(f"{place}{error.strerror}; {untouched}; {advice}")
    if any(message in str(error) for message in DISK_FULL_MESSAGES):
        return DiskError(f"could not write a checkpoint: {first_line(error)}; {untouched}; {advice}")
    return None


def first_line(error: BaseException) -> str:
    """Take the first line that says something, or else the name of the exception."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def find_nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Find the candidate within two edits of the name, else one that is mostly the same text, else None."""
    name, known = name[:80], sorted(candidates)
    near = [(distance, word) for word in known if (distance := count_edits(name.lower(), word.lower())) <= 2]
    # Two edits turn any two-letter word into any other: at least one letter in three must have been right.
    near = [(distance, word) for distance, word in near if 3 * distance <= 2 * max(len(word), 2) and word != name]
    if near:
        return min(near)[1]
    from difflib import get_close_matches  # not before it is needed: every command loads this module

    close = get_close_matches(name, known, n=1, cutoff=0.8)
    return close[0] if close else None


def suggest(name: str, candidates: Iterable[str], *, listed: str = "") -> str:
    """The end of a message: "; did you mean X?", or where none is near all candidates after the words of `listed`."""
    known = list(candidates)
    nearest = find_nearest(name, known)
    return f"; did you mean {nearest}?" if nearest else f"; {listed} {', '.join(known)}" if listed else ""


def count_edits(a: str, b: str) -> int:
    """Count insertions, deletions, replacements and swaps of neighbours that turn a into b; 3 stands for more."""
    if abs(len(a) - len(b)) > 2:
        return 3
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row, above = row, [i, *[0] * len(b)], before
        for j, other in enumerate(b, 1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                row[j] = min(row[j], above[j - 2] + 1)
    return min(row[-1], 3)
