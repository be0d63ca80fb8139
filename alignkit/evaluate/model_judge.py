"""A language model as the judge of a win rate: the feedback room's questions, by a constitution, in both orders.

Prompts, verdicts, retries and budgets are the feedback room's own; here is only what an evaluation adds: where the
verdicts are kept, and which comparisons need nobody's opinion. It computes no figure.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from alignkit.data import Text
from alignkit.errors import JudgeError, RunError, UsageError
from alignkit.evaluate.policy import Shelf, collect_memory
from alignkit.evaluate.rewards import read_text
from alignkit.feedback.cache import Desk, Store
from alignkit.feedback.constitution import load_constitution
from alignkit.feedback.examples import Examples
from alignkit.feedback.judge import Judge, Label, Pairing, judge_all
from alignkit.feedback.judge_report import describe_labels, find_faults
from alignkit.feedback.prompts import Quoter
from alignkit.feedback.replay import pair_key
from alignkit.feedback.server import find_key, require_client
from alignkit.feedback.writer import Model, Spending, open_model, spent_before
from alignkit.models.classifier import name_source
from alignkit.recipe.schema import FeedbackModel
from alignkit.runs.files import disk_failures
from alignkit.runs.stop import Stop, catch_signals

_TIE = (0.5,)


class ModelJudge:
    """Compares answers by a principle drawn for each pair; what it said once is never asked again."""

    def __init__(
        self, source: FeedbackModel, constitution: str | Sequence[str], shelf: Shelf, *, seed: int, store: Path | None
    ) -> None:
        """Read the constitution; no weights are loaded and nothing is asked yet.

        `store` is where verdicts are kept; without one they last as long as the object, which a server is not asked
        for. Raises RecipeError for a constitution, UsageError or EnvironmentProblem for a server that cannot be used.
        """
        self._principles = load_constitution(constitution, needs="comparison")
        self._source, self._shelf, self._seed = source, shelf, seed
        self._model: Model | None = None
        self._labels: list[Label] = []
        self._spending = Spending(source)
        if source.url is not None:
            _require_server(source, store)
            self.name = f"{source.name} at {urlsplit(source.url).netloc}"
        else:
            self.name = name_source(str(source.model))
        files = [constitution] if isinstance(constitution, str) else constitution
        self.settings = {"constitution": ", ".join(Path(file).name for file in files)}
        if store is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="alignkit-judged-")
            store = Path(self._temporary.name) / "judged.jsonl"
        self._path = store

    def release(self) -> None:
        """Let go of the weights."""
        self._model = None
        collect_memory()

    def compare(
        self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]
    ) -> list[tuple[float | None, ...]]:
        """Return P(first is better) as asked with it first and with it second; None where the judge abstains.

        Two answers that are the same tie, and an empty one loses, without a question. Raises JudgeError when the judge
        gave up, the budget is spent, or it abstains from everything; Stopped after a signal. What was answered is kept.
        """
        known = [_decide_alone(first, second) for first, second in zip(firsts, seconds, strict=True)]
        asked = [place for place, outcome in enumerate(known) if outcome is None]
        pairings = [_pair(prompts[place], firsts[place], seconds[place], place) for place in asked]
        self._labels = self._judge(pairings) if pairings else []
        if self._labels and all(label.p_first is None for label in self._labels):
            count, first = len(self._labels), self._labels[0].problem
            raise JudgeError(f"the judge {self.name} abstains from all {count} comparisons: {first}")
        for fault in find_faults(describe_labels(self._labels)):
            self._shelf.warn(f"{self.name}: {fault}")
        labels = iter(self._labels)
        return [next(labels).orders if outcome is None else outcome for outcome in known]

    def describe(self) -> dict[str, Any]:
        """Return what there is to say of the judge after `compare`: order consistency, bias, principles, spending."""
        return {**describe_labels(self._labels), "spent": self._spending.to_dict() if self._source.url else None}

    def _judge(self, pairings: Sequence[Pairing]) -> list[Label]:
        with catch_signals() as stop, _open_store(self._path) as store:
            self._shelf.take(self)
            self._spending = spent_before(self._source, store.values(), (self.name,))
            self._model = self._open(stop)
            judge = Judge(self._model, self._principles, Examples(), Quoter(self._model.control_tokens), self._seed)
            return judge_all(Desk("win_rate", store, stop), judge, pairings, by=self.name)

    def _open(self, stop: Stop) -> Model:
        return open_model(
            self._source, stop=stop, spending=self._spending, device=self._shelf.device,
            batch_size=self._shelf.batch_size, trust_code=self._shelf.trust_code,
        )  # fmt: skip


def _decide_alone(first: Text, second: Text) -> tuple[float, ...] | None:
    """Return what needs no judge, None for all else."""
    one, other = read_text(first).strip(), read_text(second).strip()
    if one == other:
        return _TIE
    return None if one and other else (float(bool(one)),)


def _pair(prompt: Text, first: Text, second: Text, place: int) -> Pairing:
    """Return the question; whichever run is measured against the other, it is by the same principle."""
    return Pairing(prompt, first, second, f"prompt {place}", pair_key(prompt, *sorted((first, second), key=read_text)))


@contextmanager
def _open_store(path: Path) -> Iterator[Store]:
    """Open the verdicts for this process alone; raises RunError when another evaluation has them open."""
    with disk_failures(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            what = "another evaluation is asking a judge; wait for it, or give this one its own --out FILE elsewhere"
            raise RunError(what, where=str(path)) from None
        store = Store(path)
        try:
            yield store
        finally:
            store.close()
    finally:
        os.close(held)


def _require_server(source: FeedbackModel, store: Path | None) -> None:
    require_client()
    find_key(source)
    if store is None:
        raise UsageError("a judge behind a url is asked once: give --out FILE, beside which its verdicts are kept")
