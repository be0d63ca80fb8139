"""Answers that can be checked: against an answer, a pattern, a schema, instructions or tests in the row's columns."""

import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.errors import EnvironmentProblem, RewardError, suggest
from alignkit.feedback.prompts import read_text
from alignkit.recipe import Stage
from alignkit.recipe.schema import RewardSource
from alignkit.rewards import Answers, Workspace, stage_space
from alignkit.rewards.kinds.function import TimeUp
from alignkit.runs.signals import time_limit


def _math(text: str, wanted: Any, seconds: float) -> float:
    import math_verify

    # Its own alarms are off: the time limit around this is the recipe's.
    gold, found = (math_verify.parse(str(it), parsing_timeout=None) for it in (wanted, text))
    return float(math_verify.verify(gold, found, timeout_seconds=None))


def _schema(text: str, wanted: Any, seconds: float) -> float:
    try:
        value = json.loads(_unfence(text))
    except ValueError:
        return 0.0
    if wanted is None:  # any JSON
        return 1.0
    import jsonschema

    schema = json.loads(wanted) if isinstance(wanted, str) else wanted
    return float(jsonschema.validators.validator_for(schema)(schema).is_valid(value))


def _unfence(text: str) -> str:
    """The last fenced block of an answer, or all of it."""
    blocks = re.findall(r"```[\w+-]*\n(.*?)```", text, flags=re.DOTALL)
    return blocks[-1] if blocks else text


@cache
def _read(name: str) -> str:
    """A file beside this one: the program that runs code, or IFEval's instructions (arXiv 2311.07911) by name.
    An instruction is a pattern whose matches, or the parts between them, are counted. Sentences are told by their full
    stops and not by nltk's model; which language a text is in is not told."""
    return Path(__file__).with_name(name).read_text("utf-8")


def _keeps(text: str, check: dict[str, Any], of: dict[str, Any]) -> bool:
    def fill(pattern: str) -> str:
        return re.sub(r"\{([a-z_]+)\}", lambda name: re.escape(str(of[name[1]]).strip()), pattern)

    if check.get("json"):
        return bool(_schema(text, None, 0))
    if "parts" in check:
        found = [part.strip() for part in re.split(check["parts"], text) if part.strip()]
        nth = of[check["nth"]] if "nth" in check else 0
        if nth and not (nth <= len(found) and re.match(fill(check["begins"]), found[nth - 1], re.IGNORECASE)):
            return False
    else:
        found = re.findall(fill(check["count"]), text, re.IGNORECASE | re.MULTILINE)
    wanted = check.get("wanted", check.get("least", 1))
    number = of[wanted] if isinstance(wanted, str) else wanted
    relation = of.get(check["relation"]) if "relation" in check else "equal" if "wanted" in check else "at least"
    return {"less than": len(found) < number, "equal": len(found) == number}.get(relation or "", len(found) >= number)


def _follow(text: str, wanted: Any, seconds: float) -> float:
    """The share of a row's instructions that a text keeps; an empty one keeps none."""
    kept, checks = [], json.loads(_read("instructions.json"))
    for name, given in zip(*wanted, strict=True):
        if name not in checks:
            raise ValueError(f"there is no check of {name}")
        check, of = checks[name], dict(given or {})
        each = [of | {"each": item} for item in of[check["each"]]] if "each" in check else [of]
        kept.append(bool(text.strip()) and all(_keeps(text, check, one) for one in each))
    return sum(kept) / max(len(kept), 1)


_BYTES = 2**30


@cache
def _isolation() -> tuple[str, ...]:
    """What starts a process without network and with processes of its own, where the kernel lets users do so."""
    command = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    able = shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if able and able.returncode == 0 else ()


def _run_code(text: str, wanted: Any, seconds: float) -> float:
    """Run the answer's code and the row's tests in a process with limits; 1 when it comes to the end of both.
    It gets no environment, an empty directory, no network where the kernel allows it, and bounded time, memory, files.
    """
    tests = "\n".join(wanted) if isinstance(wanted, list) else str(wanted)
    limits = {"RLIMIT_CPU": int(seconds) + 1, "RLIMIT_AS": _BYTES, "RLIMIT_FSIZE": 2**20, "RLIMIT_NOFILE": 64,
              "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}  # fmt: skip
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*_isolation(), sys.executable, "-I", "-c", _read("sandbox.txt")], cwd=folder, start_new_session=True,
            env={"PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(json.dumps([limits, _unfence(text), tests, word]), timeout=seconds)
        except subprocess.TimeoutExpired:
            return 0.0
        finally:
            with suppress(ProcessLookupError):  # what it has started dies with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return float(said == word)


class Verifier(NamedTuple):
    """A way to check an answer: (answer, value of the row's column, seconds) -> reward."""

    column: str
    score: Callable[[str, Any, float], float]
    package: str | None = None  # beside alignkit's own


VERIFIERS = {
    "math": Verifier("answer", _math, "math_verify"),
    "exact": Verifier("answer", lambda text, wanted, seconds: float(text.split() == str(wanted).split())),
    "regex": Verifier("pattern", lambda text, wanted, seconds: float(re.search(str(wanted), text) is not None)),
    "json_schema": Verifier("schema", _schema, "jsonschema"),
    "ifeval": Verifier("instruction_id_list", _follow),
    "code": Verifier("tests", _run_code),
}


class VerifyReward:
    """1 for an answer that is right and 0 for one that is not; ifeval: the share of the instructions that it keeps."""

    def __init__(self, source: RewardSource, space: Workspace) -> None:
        self.name, self._source, self._space = str(source.verify), source, space
        self._verifier = VERIFIERS[self.name]
        try:
            re.compile(source.extract or "")
        except re.error as error:
            what = f"extract is {source.extract!r}, which is no regular expression: {error}"
            raise RewardError(what, where=space.where) from error
        if self.name == "code" and not space.trust_code:
            what = "verify: code runs what a model writes, which a recipe cannot allow"
            raise RewardError(f"{what}; give --trust-code on the command line", where=space.where)
        package = self._verifier.package
        if package and importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            what = f"verify: {self.name} needs {name}; pip install 'alignkit[verify]'"
            raise EnvironmentProblem(what if space.where is None else f"{space.where}: {what}")

    def score(self, answers: Answers) -> list[float]:
        """Check each answer, each rank a part; one that takes too long is wrong."""
        column = self._source.column or self._verifier.column
        names = [column, "kwargs"] if self.name == "ifeval" else [column]
        for name in names if answers.prompts else ():
            if name not in answers.columns or None in answers.columns[name]:
                there = f"{', '.join(answers.columns) or 'no other columns'}{suggest(name, answers.columns)}"
                what = f"verify: {self.name} needs the column {name} in every row; the rows have {there}"
                raise RewardError(what, where=self._space.where)
        values = zip(*(answers.columns[name] for name in names), strict=True)
        wanted = [one if self.name == "ifeval" else one[0] for one in values]
        items = list(zip(map(read_text, answers.completions), wanted, strict=True))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # code has processes of its own; all else has one alarm
            each = pool.map if self.name == "code" else map
            return self._space.split(items, lambda part: list(each(lambda item: self._score(*item), part)))

    def _score(self, text: str, wanted: Any) -> float:
        if self._source.extract is not None:
            found = list(re.finditer(self._source.extract, text))
            if not found:
                return 0.0
            text = found[-1].group(1 if found[-1].re.groups else 0) or ""
        try:
            with time_limit(self._source.timeout + (1 if self.name == "code" else 0), TimeUp()):
                return self._verifier.score(text, wanted, self._source.timeout)
        except TimeUp:
            return 0.0
        except Exception as error:  # a pattern, schema or instruction of the row that is none
            what = f"verify: {self.name}: {wanted!r:.80} of a row cannot be used: {type(error).__name__}: {error}"
            raise RewardError(what, where=self._space.where) from error

    @staticmethod
    def check(source: RewardSource, stage: Stage, key: str, coming: Collection[str] | None = None) -> str:
        VerifyReward(source, stage_space(stage, key))
        return f"verified: {source.verify}"

    @staticmethod
    def fingerprint(source: RewardSource, stage: Stage) -> None:
        return None


KIND = VerifyReward
