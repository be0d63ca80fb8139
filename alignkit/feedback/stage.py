"""What critique and label stages share: run directory, store, models, prompts, and how they begin and end."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.data import DataReport, Rejects, Row, Text, find_control_tokens
from alignkit.data.hashes import prompt_key
from alignkit.data.rows import Message, take_prompt
from alignkit.errors import DataError
from alignkit.feedback.cache import Asker, Store, seed_of
from alignkit.feedback.prompts import ask_answer
from alignkit.feedback.writer import Job, Model, Reply, Sampling, Spending, open_model, spent_before
from alignkit.recipe.schema import FeedbackModel
from alignkit.recipe.stage import Stage
from alignkit.report.publish import leave_finished, show
from alignkit.runs.directory import (
    Result,
    RunDir,
    compare_fingerprints,
    copy_recipe,
    find_damaged_product,
    write_result,
)
from alignkit.runs.files import replacing, write_json
from alignkit.runs.record import JsonLines, git_state, versions
from alignkit.runs.stop import Stop, stop_between_answers

ROWS, STORE, REPORT = "rows.jsonl", "feedback.jsonl", "report.json"
LABELS = "labels.jsonl"  # every comparison with what was said of it; rows.jsonl holds what is trained on


@dataclass
class Session:
    """An open run directory and what is at hand in it."""

    stage: Stage
    run: RunDir
    store: Store
    stop: Stop
    rejects: Rejects = field(default_factory=Rejects)
    began: float = field(default_factory=time.monotonic)

    @property
    def asker(self) -> Asker:
        return Asker(self.stage.name, self.store, self.stop)

    @property
    def num_tokens(self) -> int:
        """Tokens sent and received, earlier sittings included."""
        return sum(record.get("input_tokens", 0) + record.get("output_tokens", 0) for record in self.store.values())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def open(self, source: FeedbackModel, by: Collection[str]) -> tuple[Model, Spending]:
        """Open a model with what the askers in `by` have spent on it already."""
        stage, spending = self.stage, spent_before(source, self.store.values(), by)
        model = open_model(
            source, stop=self.stop, spending=spending, device=stage.launch.device,
            batch_size=stage.options.batch_size, trust_code=stage.trust_code,  # type: ignore[attr-defined]
        )  # fmt: skip
        return model, spending

    def find_finished(self, fingerprint: Mapping[str, Any], allow_change: Sequence[str]) -> Result | None:
        """Return the result of a finished run; raises RunError when its settings were others."""
        for change in compare_fingerprints(self.run, fingerprint, allow_change=allow_change):
            console.warn(f"{self.stage.name}: going on with a changed setting: {change}")
        if not self.run.stage.exists() or not self.run.is_finished():
            return None
        if (damage := find_damaged_product(self.run.path)) is not None:
            console.warn(f"{self.stage.name}: {damage}; it is made again from the answers in {STORE}")
            return None
        return leave_finished(self.run)

    def begin(self, fingerprint: Mapping[str, Any], report: DataReport, *, note: str) -> None:
        """Write stage.json and say what was read."""
        copy_recipe(self.run, Path(self.stage.recipe_path))
        left = f", {self.rejects.count} left out (rejects.jsonl)" if self.rejects.count else ""
        kept = f", {len(self.store)} answers are there already" if len(self.store) else ""
        console.note(f"{self.stage.name}: {note}{left}{kept}")
        record = {
            **self.stage.to_dict(),
            "fingerprint": dict(fingerprint),
            "data": report.to_dict(),
            "versions": versions(),
            "git": git_state(Path(self.stage.recipe_path).resolve().parent),
        }
        write_json(self.run.stage, record)

    def write_rows(self, rows: Iterable[Mapping[str, Any]], name: str = ROWS) -> int:
        """Replace a file of rows in one step; return how many it holds."""
        count = 0
        with replacing(self.run.path / name) as file:
            for count, row in enumerate(rows, 1):  # noqa: B007
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return count

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Replace report.json, and rejects.jsonl where rows were left out."""
        write_json(self.run.path / REPORT, dict(report))
        self.rejects.write(self.run.rejects)

    def log(self, step: int, **facts: float) -> None:
        """Append a line to metrics.jsonl."""
        JsonLines(self.run.metrics).append({"step": step, **facts})

    def finish(self, num_rows: int, *, metrics: Mapping[str, float], tokens: int) -> Result:
        """Write the result; the run is finished."""
        result = Result(
            stage=self.stage.name,
            status="finished",
            step=num_rows,
            model_dir="",
            metrics=dict(metrics),
            tokens=tokens,
            wall_seconds=round(self.seconds, 3),
            tokens_per_second=round(tokens / max(self.seconds, 1e-9), 1),
        )
        write_result(self.run, result.to_dict(), [self.run.path / name for name in (ROWS, LABELS, REPORT)])
        show(self.run)
        return result


@contextmanager
def open_session(stage: Stage, run_dir: Path) -> Iterator[Session]:
    """Open the store of a run directory that the caller has locked, with stop signals heard while it is open."""
    run = RunDir(run_dir.absolute())
    with stop_between_answers() as stop:
        store = Store(run.path / STORE)
        try:
            yield Session(stage, run, store, stop)
        finally:
            store.close()
            if not len(store):
                (run.path / STORE).unlink(missing_ok=True)  # leave nothing of a stage that was refused


@dataclass(frozen=True)
class Prompted:
    """A prompt with what tells it from all others of the stage, however often its text occurs."""

    prompt: Text
    place: str
    key: str


def list_prompts(rows: Iterable[Row], rejects: Rejects, control_tokens: Sequence[str]) -> list[Prompted]:
    """Return the prompts of rows; one with a control token in its text is left out, for it would act as one.

    Raises DataError when none is left.
    """
    found: list[Prompted] = []
    seen: Counter[str] = Counter()
    for row in rows:
        try:
            bare = row if row.kind == "prompt" else take_prompt(row)
        except ValueError as error:
            rejects.add(row.place, str(error))
            continue
        if tokens := find_control_tokens(bare, control_tokens):
            rejects.add(row.place, f"prompt: holds the control token {tokens[0]}")
            continue
        digest = hashlib.blake2b(prompt_key(bare), digest_size=16).hexdigest()
        seen[digest] += 1
        found.append(Prompted(bare.prompt, row.place, f"{digest} {seen[digest]}"))
    if not found:
        raise DataError([*rejects.first] or "there are no prompts")
    return found


def sample_answers(
    asker: Asker, model: Model, prompts: Sequence[Prompted], sampling: Sampling, *, count: int, seed: int, kind: str
) -> list[list[Reply]]:
    """Return `count` answers to each prompt."""
    jobs, about = [], []
    for prompted in prompts:
        request = ask_answer(prompted.prompt)
        for number in range(count):
            jobs.append(Job(request, seed_of(seed, kind, number, prompted.key)))
            about.append({"place": prompted.place, "number": number})
    replies = asker.write(model, jobs, sampling, kind=kind, by="generator", about=about)
    return [replies[start : start + count] for start in range(0, len(replies), count)]


def why_useless(reply: Reply, control_tokens: Sequence[str]) -> str | None:
    """Return why an answer can be no row, None when it can: an empty one teaches nothing, a control token would act."""
    if reply.problem is not None:
        return reply.problem
    if not reply.text.strip():
        return "the answer is empty"
    if tokens := find_control_tokens(Row("text", "", (reply.text,)), control_tokens):
        return f"the answer holds the control token {tokens[0]}"
    return None


def make_row(prompt: Text, answer: str) -> dict[str, Any]:
    """Return a row for an sft stage."""
    return {"prompt": prompt, "completion": make_answer(prompt, answer)}


def make_answer(prompt: Text, answer: str) -> Text:
    """Return an answer in the form of its prompt; in a transcript it stands one space after its label."""
    if not isinstance(prompt, str):
        return [Message(role="assistant", content=answer)]
    return f" {answer}" if prompt.startswith("\n\nHuman:") else answer
