"""The run of a critique or label stage: its begin and end, prompts and rows, and the models it asks."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from alignkit import console
from alignkit.data import DataReport, Rejects, Row, Text, find_control_tokens
from alignkit.data.rows import Message, prompt_key, take_prompt
from alignkit.errors import DataError, JudgeError, UsageError
from alignkit.feedback.cache import Asker, Store, seed_of
from alignkit.feedback.prompts import ask_answer
from alignkit.feedback.writer import BudgetSpent, Job, Model, Reply, Sampling, Spending
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
from alignkit.runs.signals import Stop, stop_between_answers

ROWS, STORE, REPORT = "rows.jsonl", "feedback.jsonl", "report.json"
LABELS = "labels.jsonl"  # every comparison with what was said of it; rows.jsonl holds what is trained on


@dataclass
class Session:
    """An open run directory and what is at hand in it."""

    stage: Stage
    run: RunDir
    store: Store
    stop: Stop
    asker: Asker
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def open(self, source: FeedbackModel, by: Collection[str]) -> Model:
        """Open a model with what the askers in `by` have spent on it already."""
        size: int = self.stage.options.batch_size  # type: ignore[attr-defined]
        device, trust_code = self.stage.launch.device, self.stage.trust_code
        return open_model(source, self.store, by, stop=self.stop, device=device, batch_size=size, trust_code=trust_code)

    def write_rows(self, rows: Iterable[Mapping[str, Any]], name: str = ROWS) -> int:
        """Replace a file of rows in one step; return how many it holds."""
        with replacing(self.run.path / name) as file:
            return sum(bool(file.write(json.dumps(row, ensure_ascii=False) + "\n")) for row in rows)

    def log(self, step: int, **facts: float) -> None:
        JsonLines(self.run.metrics).append({"step": step, **facts})


class Work(Protocol):
    """The work of one stage, its rows read already; equal facts and the same seed make the same rows."""

    facts: dict[str, Any]  # its fingerprint
    report: DataReport
    rejects: Rejects
    nothing: str  # said when no row comes of it

    def open(self, session: Session) -> str:
        """Open the models; say what there is to do."""

    def do(self) -> None:
        """Ask for everything."""

    def write(self, *, complete: bool) -> dict[str, Any]:
        """Write the rows of what has been answered; return the report, which has at least `rows`."""

    def measure(self, report: Mapping[str, Any]) -> dict[str, float]:
        """Choose the figures of the result."""


def run_work(stage: Stage, run_dir: Path, read: Callable[[Stage], Work], *, allow_change: Sequence[str]) -> Result:
    """Make the rows of a stage in its run directory, which the caller has opened and locked: rows.jsonl, report.json,
    and every answer in feedback.jsonl; none is asked for twice. Raises JudgeError when a model gave up or a budget is
    spent, after writing the rows there are; Stopped after a signal; RunError for changed settings."""
    run = RunDir(run_dir.absolute())
    with stop_between_answers() as stop:
        store = Store(run.path / STORE)
        try:
            work, session = read(stage), Session(stage, run, store, stop, Asker(stage.name, store, stop))
            for change in compare_fingerprints(run, work.facts, allow_change=allow_change):
                console.warn(f"{stage.name}: going on with a changed setting: {change}")
            if run.stage.exists() and run.is_finished():
                if (damage := find_damaged_product(run.path)) is None:
                    return leave_finished(run)
                console.warn(f"{stage.name}: {damage}; it is made again from the answers in {STORE}")
            note, left_out = work.open(session), work.rejects.count
            copy_recipe(run, Path(stage.recipe_path))
            left = f", {left_out} left out (rejects.jsonl)" if left_out else ""
            kept = f", {len(store)} answers are there already" if len(store) else ""
            console.note(f"{stage.name}: {note}{left}{kept}")
            record = {"fingerprint": dict(work.facts), "data": work.report.to_dict(), "versions": versions(),
                      "git": git_state(Path(stage.recipe_path).resolve().parent)}  # fmt: skip
            write_json(run.stage, stage.to_dict() | record)
            try:
                work.do()
            except JudgeError as error:
                report = _write(session, work, complete=False)
                higher = ", with a higher limit" if isinstance(error, BudgetSpent) else ""
                raise JudgeError(
                    f"{stage.name}: {error}; {report['rows']} rows are in {ROWS}, and the {len(store)} answers in "
                    f"{STORE} will not be asked for again: run the same command to go on{higher}"
                ) from None
            report = _write(session, work, complete=True)
            if not report["rows"]:
                raise DataError([*work.rejects.first] or work.nothing, where=stage.recipe_path)
            seconds, tokens = session.seconds, report["tokens"]
            result = Result(
                stage=stage.name, status="finished", step=report["rows"], model_dir="", metrics=work.measure(report),
                tokens=tokens, wall_seconds=round(seconds, 3), tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
            )  # fmt: skip
            write_result(run, result.to_dict(), [run.path / name for name in (ROWS, LABELS, REPORT)])
            show(run)
            return result
        finally:
            store.close()
            if not len(store):
                (run.path / STORE).unlink(missing_ok=True)  # leave nothing of a stage that was refused


def _write(session: Session, work: Work, *, complete: bool) -> dict[str, Any]:
    """Write rows and report.json, and rejects.jsonl where rows were left out."""
    report = {"complete": complete, **work.write(complete=complete), "left_out": work.rejects.count}
    # Sent and received, earlier sittings included.
    counts = (each.get("input_tokens", 0) + each.get("output_tokens", 0) for each in session.store.values())
    report |= {"tokens": sum(counts), "seconds": round(session.seconds, 3)}
    write_json(session.run.path / REPORT, report)
    work.rejects.write(session.run.rejects)
    return report


@dataclass(frozen=True)
class Prompted:
    """A prompt with what tells it from all others of the stage, however often its text occurs."""

    prompt: Text
    place: str
    key: str


def list_prompts(rows: Iterable[Row], rejects: Rejects, control_tokens: Sequence[str]) -> list[Prompted]:
    """List the prompts of rows but those with a control token, which would act as one; raises DataError for none."""
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
    session: Session, model: Model, prompts: Sequence[Prompted], sampling: Sampling, *, count: int, kind: str
) -> list[list[Reply]]:
    jobs, about = [], []
    for prompted in prompts:
        request = ask_answer(prompted.prompt)
        for number in range(count):
            jobs.append(Job(request, seed_of(session.stage.seed, kind, number, prompted.key)))
            about.append({"place": prompted.place, "number": number})
    replies = session.asker.write(model, jobs, sampling, kind=kind, by="generator", about=about)
    return [replies[start : start + count] for start in range(0, len(replies), count)]


def why_useless(reply: Reply, control_tokens: Sequence[str]) -> str | None:
    """Say why an answer can be no row, None when it can: an empty one teaches nothing, a control token would act."""
    if reply.problem is None and not reply.text.strip():
        return "the answer is empty"
    tokens = find_control_tokens(Row("text", "", (reply.text,)), control_tokens)
    return reply.problem or (f"the answer holds the control token {tokens[0]}" if tokens else None)


def make_answer(prompt: Text, answer: str) -> Text:
    """Write an answer in the form of its prompt; in a transcript it stands one space after its label."""
    if not isinstance(prompt, str):
        return [Message(role="assistant", content=answer)]
    return f" {answer}" if prompt.startswith("\n\nHuman:") else answer


# The models that a recipe names to write or judge.


def open_model(
    source: FeedbackModel, store: Store, by: Collection[str], *, stop: Stop, device: str, batch_size: int,
    trust_code: bool,
) -> Model:  # fmt: skip
    """Open the model a source names, with what the askers in `by` have spent on it already."""
    if source.url is not None:
        from alignkit.feedback.server import Endpoint

        answered = (record for record in store.values() if record.get("by") in by)
        return Endpoint(source, spending=Spending(source, answered), stop=stop.event)
    assert source.model is not None
    from alignkit.feedback.local import LocalModel, VllmModel

    if source.engine == "vllm":
        return VllmModel(source.model, stop=stop.event, trust_code=trust_code)
    settings: dict[str, Any] = {"batch_size": batch_size, "continuous": source.engine == "continuous"}
    return LocalModel(source.model, device=device, trust_code=trust_code, stop=stop.event, **settings)


def own_model(stage: Stage) -> FeedbackModel:
    """The model a stage starts from, as a source."""
    return FeedbackModel(model=stage.start_dir or stage.model.path)


def speaks_chat(source: FeedbackModel) -> bool:
    """Tell whether a source is asked in turns of a chat: a server's chat API, or a model with a chat template."""
    if source.model is None:
        return source.api == "chat"
    from alignkit.models.frozen import load_tokenizer_of

    return load_tokenizer_of(source.model).chat_template is not None


def describe_source(source: FeedbackModel) -> dict[str, Any]:
    """Describe what decides a source's answers, for the run's fingerprint: not how fast or how often it is asked."""
    if source.model is not None:
        from alignkit.models.frozen import fingerprint_causal

        return {"model": fingerprint_causal(source.model), "engine": source.engine}
    if source.url is not None:
        return source.model_dump(include={"url", "name", "api", "logprobs"})
    return {"replay": fingerprint_file(str(source.replay))}


def fingerprint_file(path: str) -> str:
    """Hash the bytes of a file; raises UsageError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=path) from None


def describe_model(model: FeedbackModel, stage: Stage) -> str:
    """Say in words what answers or judges; of an address only its host."""
    if model.url is not None:
        return f"{model.name} at {urlsplit(model.url).netloc}"
    if model.replay is not None:
        return f"the labels of {model.replay}"
    return stage.source_stages.get(str(model.model), str(model.model))
