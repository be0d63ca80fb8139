"""From answers to comparisons, and from labels to rows of preferences; nobody is asked here.

The preferred answer always stands as chosen, so that a reader who knows nothing of labels learns the right thing too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.data import Rejects, Row, Text
from alignkit.errors import DataError, JudgeError
from alignkit.feedback.constitution import Constitution
from alignkit.feedback.examples import Examples
from alignkit.feedback.inputs import LabelInput
from alignkit.feedback.judge import Judge, Label, Pairing, judge_all, known_labels
from alignkit.feedback.judge_report import describe_labels, find_faults, measure
from alignkit.feedback.prompts import Quoter, conversation, read_text
from alignkit.feedback.replay import PublishedLabels, pair_key
from alignkit.feedback.stage import (
    Prompted,
    Session,
    list_prompts,
    make_answer,
    open_session,
    sample_answers,
    why_useless,
)
from alignkit.feedback.writer import Model, Reply, Sampling, Spending, how_to_go_on, open_model, spent_before
from alignkit.recipe.schema import FeedbackModel, LabelOptions
from alignkit.recipe.stage import Stage
from alignkit.runs.directory import Result


def pair_given(rows: Sequence[Row]) -> list[Pairing]:
    """Return all pairs of the answers that the rows have."""
    return [
        Pairing(row.prompt, first, second, row.place, pair_key(row.prompt, first, second))
        for row in rows
        for first, second in combinations(row.completions, 2)
        if first != second
    ]


def pair_sampled(
    prompts: Sequence[Prompted], replies: Sequence[Sequence[Reply]], rejects: Rejects, control_tokens: Sequence[str]
) -> list[Pairing]:
    """Return all pairs of the answers sampled for each prompt; equal ones and useless ones are left out and counted."""
    pairings = []
    for prompted, own in zip(prompts, replies, strict=True):
        problems = [why_useless(reply, control_tokens) for reply in own]
        for problem in filter(None, problems):
            rejects.add(prompted.place, problem)
        texts = list(dict.fromkeys(reply.text for reply, what in zip(own, problems, strict=True) if what is None))
        if len(texts) < 2 and not any(problems):
            rejects.add(prompted.place, f"all {len(own)} answers are the same")
        for number, (first, second) in enumerate(combinations(texts, 2)):
            answers = make_answer(prompted.prompt, first), make_answer(prompted.prompt, second)
            pairings.append(Pairing(prompted.prompt, *answers, prompted.place, f"{prompted.key} {number}"))
    return pairings


def make_rows(labels: Sequence[Label], mix: Sequence[Row], *, hard: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each comparison that was judged, then those made by people; hard ones have no label and no ties.

    Raises DataError when people compared messages and the judge texts: one stage cannot be trained on both.
    """
    messages = any(not isinstance(label.pairing.prompt, str) for label in labels)
    for label in labels:
        if label.p_first is not None and not (hard and label.is_tie):
            yield _make_row(label.pairing.prompt, label.pairing.first, label.pairing.second, label.p_first, hard=hard)
    for row in mix:
        if labels and not messages and row.conversational:
            raise DataError(
                "mix: holds messages, and the judged comparisons are plain text; convert one", where=row.place
            )
        for better, worse, p_first in split_ranking(row):
            prompt: Text = row.prompt
            if messages and isinstance(prompt, str):
                prompt = conversation(prompt)
                better, worse = (make_answer(prompt, read_text(text).strip()) for text in (better, worse))
            if not (hard and p_first == 0.5):
                yield _make_row(prompt, better, worse, p_first, hard=hard)


def split_ranking(row: Row) -> Iterator[tuple[Text, Text, float]]:
    """Yield the comparisons of a row made by people: better, worse, P(better preferred); equal scores are none."""
    if row.scores is None:
        yield row.completions[0], row.completions[1], 1.0 if row.label is None else row.label
        return
    for (better, above), (worse, below) in combinations(zip(row.completions, row.scores, strict=True), 2):
        if above > below:
            yield better, worse, 1.0


def _make_row(prompt: Text, first: Text, second: Text, p_first: float, *, hard: bool) -> dict[str, Any]:
    chosen, rejected = (first, second) if p_first >= 0.5 else (second, first)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return row if hard else row | {"label": max(p_first, 1.0 - p_first)}


LABELS = "labels.jsonl"  # every comparison with what was said of it; rows.jsonl holds what is trained on
_SECOND_OPINIONS = 32  # comparisons that are also judged by another principle, at most a tenth of them
_TRIES = 64  # draws until another principle has come, unless its weight is next to nothing


def run(stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()) -> Result:
    """Make the rows of a label stage in its run directory, which the caller has opened and locked.

    Writes rows.jsonl, labels.jsonl, report.json and every answer in feedback.jsonl; what is there already is not asked
    again. Raises JudgeError when the judge gave up or the budget is spent, after writing the rows there are; Stopped
    after a signal; RunError for changed settings.
    """
    with open_session(stage, run_dir) as session:
        given = LabelInput.read(stage)
        session.rejects = given.rejects
        if (finished := session.find_finished(given.facts, allow_change)) is not None:
            return finished
        work = _Work(session, given)
        work.prepare()
        try:
            work.do()
        except JudgeError as error:
            count = work.write(complete=False)["rows"]
            raise JudgeError(
                f"{stage.name}: {error}; {count} rows are in rows.jsonl, and nothing that was answered will be asked "
                f"again: {how_to_go_on(error)}"
            ) from None
        return work.finish()


class _Work:
    """The labels of one stage, from its prompts to the rows."""

    def __init__(self, session: Session, given: LabelInput) -> None:
        self._session, self._given, self._options = session, given, given.options
        self._labels: list[Label] = []
        self._second_opinions: list[tuple[Label, Label]] = []
        self._accuracy: dict[str, Any] | None = None
        self._pairings: list[Pairing] = []
        self._judging_seconds = 0.0
        self._cut_off: float | None = None
        self._judge_spending: Spending | None = None

    def prepare(self) -> None:
        """Open the models and say what there is to do."""
        given, options, stage = self._given, self._options, self._session.stage
        generator = given.generator
        self._generator = self._open(generator, ("generator",)) if generator else None
        if options.judge.replay is not None:
            self._published: PublishedLabels | None = PublishedLabels(stage, options.judge.replay)
            self._judge: Judge | None = None
        else:
            self._published = None
            same = generator is not None and generator.model is not None and generator.model == options.judge.model
            opened = self._generator if same else self._open(options.judge, ("judge", "check"))
            assert opened is not None
            self._judge = _make_judge(opened[0], given.constitution, given.examples, options, stage.seed)
            self._judge_spending = opened[1]
        what = f"{len(given.rows)} rows, {len(given.constitution.principles)} principles"
        self._session.begin(given.facts, given.report, note=what)

    def do(self) -> None:
        """Sample, judge, ask for second opinions, and measure the judge."""
        session, asker = self._session, self._session.asker
        self._pairings = pair_given(self._given.rows) if self._given.is_given else self._pair_sampled()
        if not self._pairings:
            raise DataError([*session.rejects.first] or "there is nothing to compare", where=session.stage.recipe_path)
        began = session.seconds
        if self._published is not None:
            self._labels = [_replay(self._published, pairing) for pairing in self._pairings]
            return
        assert self._judge is not None
        if self._given.check:  # first: a judge that is no good is seen before it is paid for
            self._accuracy = measure(asker, self._judge, self._given.check)
            self._say_accuracy(self._accuracy)
            began = session.seconds
        self._labels = judge_all(asker, self._judge, self._pairings)
        self._judging_seconds = session.seconds - began
        self._ask_again()

    def write(self, *, complete: bool) -> dict[str, Any]:
        """Write the rows and the report of what has been judged; return the report."""
        session = self._session
        if not complete and self._judge is not None and not self._labels:
            self._labels = known_labels(session.asker, self._judge, self._pairings)
        count = session.write_rows(make_rows(self._labels, self._given.mix, hard=self._options.hard))
        session.write_rows((label.to_dict() for label in self._labels), LABELS)
        report = self._describe(count, complete=complete)
        session.write_report(report)
        for fault in find_faults(report):
            console.warn(f"{session.stage.name}: {fault}")
        return report

    def finish(self) -> Result:
        """Write everything; the run is finished."""
        session = self._session
        report = self.write(complete=True)
        count = report["rows"]
        if not count:
            first = session.rejects.first
            reason = "the judge abstained from all comparisons, or all are ties; report.json says why"
            raise DataError([*first] or reason, where=session.stage.recipe_path)
        agreement = report["order_agreement"]
        metrics = {
            "rows": count,
            "comparisons": report["comparisons"],
            "abstained": report["abstained"],
            "ties": report["ties"],
            "mean_confidence": report["mean_confidence"] or 0.0,
            **({"order_agreement": agreement["share"]} if agreement else {}),
            **({"check_accuracy": self._accuracy["accuracy"]} if self._accuracy else {}),
        }
        session.log(count, **{key: value for key, value in metrics.items() if value is not None})
        return session.finish(count, metrics=metrics, tokens=report["tokens"])

    def _open(self, source: FeedbackModel, by: tuple[str, ...]) -> tuple[Model, Spending]:
        session, stage = self._session, self._session.stage
        spending = spent_before(source, session.store.values(), by)
        model = open_model(
            source, stop=session.stop, spending=spending, device=stage.launch.device,
            batch_size=self._options.batch_size, trust_code=stage.trust_code,
        )  # fmt: skip
        return model, spending

    def _pair_sampled(self) -> list[Pairing]:
        session, options = self._session, self._options
        assert self._generator is not None and isinstance(options.answers, int)
        model = self._generator[0]
        prompts = list_prompts(self._given.rows, session.rejects, model.control_tokens)
        sampling = Sampling(options.temperature, options.max_new_tokens)
        replies = sample_answers(
            session.asker, model, prompts, sampling, count=options.answers, seed=session.stage.seed, kind="answer"
        )
        self._cut_off = _share([not reply.ended for own in replies for reply in own])
        return pair_sampled(prompts, replies, session.rejects, model.control_tokens)

    def _ask_again(self) -> None:
        """Judge some comparisons by a second principle as well: how far do principles agree?"""
        assert self._judge is not None
        if len(self._given.constitution.principles) < 2:
            return
        chosen = self._labels[: min(_SECOND_OPINIONS, len(self._labels) // 10)]
        others = [replace(label.pairing, turn=self._find_other(label)) for label in chosen]
        again = judge_all(self._session.asker, self._judge, others)
        pairs = zip(chosen, again, strict=True)
        self._second_opinions = [(one, other) for one, other in pairs if one.principle != other.principle]

    def _find_other(self, label: Label) -> int:
        """Return a turn at which another principle is drawn; the last one tried where there is none."""
        pairing, seed = label.pairing, self._session.stage.seed
        turns = range(pairing.turn + 1, pairing.turn + _TRIES)
        draw = self._given.constitution.draw
        found = (turn for turn in turns if draw(seed=seed, key=pairing.key, turn=turn).name != label.principle)
        return next(found, turns[-1])

    def _describe(self, count: int, *, complete: bool) -> dict[str, Any]:
        session, options = self._session, self._options
        records = list(session.store.values())
        seconds = self._judging_seconds
        agreeing = [
            (one.p_first > 0.5) == (other.p_first > 0.5)
            for one, other in self._second_opinions
            if one.p_first is not None and other.p_first is not None and not one.is_tie and not other.is_tie
        ]
        quoted = self._judge.quote.count if self._judge else 0
        return {
            "complete": complete,
            "rows": count,
            "rows_by_people": sum(len(list(split_ranking(row))) for row in self._given.mix),
            **describe_labels(self._labels),
            "agreement_between_principles": {"n": len(agreeing), "share": _share(agreeing)},
            "check": self._accuracy,
            "quoted": quoted,
            "left_out": session.rejects.count,
            "cut_off_share": self._cut_off,
            "tokens": sum(record.get("input_tokens", 0) + record.get("output_tokens", 0) for record in records),
            "spent": self._judge_spending.to_dict() if self._judge_spending and options.judge.url else None,
            "spent_on_answers": self._generator[1].to_dict()
            if self._generator and self._generator[1].requests
            else None,
            "seconds": round(session.seconds, 3),
            "labels_per_second": round(len(self._labels) / seconds, 2) if seconds > 0 else None,
        }

    def _say_accuracy(self, accuracy: Mapping[str, Any]) -> None:
        if accuracy["accuracy"] is None:
            console.warn(f"{self._session.stage.name}: the judge abstained from all of `check`")
            return
        abstained = accuracy["abstained"]
        line = (
            f"{self._session.stage.name}: on {accuracy['n'] - abstained} comparisons with known answers the judge is "
            f"right in {accuracy['accuracy']:.1%} ({accuracy['low']:.1%} to {accuracy['high']:.1%}), "
            f"ECE {accuracy['ece']:.3f}"
        )
        say = console.warn if accuracy["low"] <= 0.5 else console.note
        chance = ", no better than chance" if accuracy["low"] <= 0.5 else ""
        say(line + chance + (f"; it abstained from {abstained} more" if abstained else ""))


def _make_judge(
    model: Model, constitution: Constitution, examples: Examples, options: LabelOptions, seed: int
) -> Judge:
    return Judge(
        model=model,
        constitution=constitution,
        examples=examples,
        quote=Quoter(model.control_tokens),
        seed=seed,
        orders=options.orders,
        thinks=options.cot,
        thoughts=Sampling(options.temperature, options.cot_tokens),
        bounds=options.bounds,
    )


def _replay(published: PublishedLabels, pairing: Pairing) -> Label:
    value = published.find(pairing.prompt, pairing.first, pairing.second)
    problem = "not among the published labels" if value is None else None
    return Label(pairing, "published", (value,), [], problem)


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
