"""The label stage: comparisons labelled by a judge (RL-CAI) or by a reward, as rows for an rm or dpo stage.

arXiv 2212.08073, section 4.1: answers are sampled (or given), compared in pairs by a principle each, and written with
the judge's probability as a soft label; comparisons by people can be mixed in. A reward of any kind compares by its
scores instead, as for iterated DPO.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.data import DataReport, Rejects, Row, Text, read_rows
from alignkit.errors import DataError, JudgeError
from alignkit.feedback.cache import key_of
from alignkit.feedback.constitution import Constitution, load_constitution
from alignkit.feedback.examples import Examples, load_examples
from alignkit.feedback.judge import Judge, Label, Pairing, judge_all, known_labels, pair_key
from alignkit.feedback.judge_report import describe_labels, find_faults, mean, measure, read_labelled
from alignkit.feedback.prompts import Quoter, conversation, read_text
from alignkit.feedback.stage import (
    LABELS,
    Prompted,
    Session,
    list_prompts,
    make_answer,
    open_session,
    sample_answers,
    why_useless,
)
from alignkit.feedback.writer import (
    Reply,
    Sampling,
    describe_source,
    how_to_go_on,
    own_model,
    share_of_first,
    speaks_chat,
)
from alignkit.recipe.schema import DataSource, FeedbackModel, LabelOptions
from alignkit.recipe.stage import Stage
from alignkit.rewards.base import Answers
from alignkit.rewards.kinds import fingerprint_rewards, open_rewards
from alignkit.runs.directory import Result, RunDir, list_changes

_SECOND_OPINIONS = 32  # comparisons that are also judged by another principle, at most a tenth of them
_TRIES = 64  # draws until another principle has come, unless its weight is next to nothing


@dataclass
class LabelInput:
    """What a label stage works on, read before a model is opened. Equal facts and the same seed make the same rows."""

    constitution: Constitution | None  # None where a reward compares
    examples: Examples
    generator: FeedbackModel | None  # None where the answers are those of the rows
    rejects: Rejects = field(default_factory=Rejects)
    report: DataReport = field(default_factory=DataReport)
    rows: list[Row] = field(default_factory=list)
    mix: list[Row] = field(default_factory=list)
    check: list[Pairing] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def read_input(stage: Stage) -> LabelInput:
    """Read rows, principles and examples; raises DataError and RecipeError for what cannot be used."""
    options = stage.expect(LabelOptions)
    constitution = load_constitution(options.constitution, needs="comparison") if options.constitution else None
    generator = None if options.answers == "given" else options.generator or own_model(stage)
    found = LabelInput(constitution, load_examples(options.examples), generator)
    mix_report = DataReport()
    found.rows = list(
        read_rows(
            stage, options.data, report=found.report, rejects=found.rejects,
            method="rm" if generator is None else None,
            template=None if generator is None else speaks_chat(generator),
        )
    )  # fmt: skip
    if options.mix:
        found.mix = list(read_rows(stage, options.mix, report=mix_report, rejects=found.rejects, method="rm"))
    if options.check:
        found.check = read_labelled(stage, options.check, found.rejects)
    found.facts = {
        "method": "label",
        "seed": stage.seed,
        "judge": describe_source(options.judge) if options.judge else None,
        **fingerprint_rewards(stage),
        "generator": None if generator is None else describe_source(generator),
        "constitution": constitution.fingerprint if constitution else None,
        "examples": found.examples.fingerprint,
        **{key: getattr(options, key) for key in ("answers", "orders", "cot", "hard", "temperature", "max_new_tokens")},
        "cot_tokens": options.cot_tokens if options.cot else None,
        "bounds": list(options.bounds),
        "data": found.report.fingerprint,
        "mix": mix_report.fingerprint,
        "check": key_of(keys=[pairing.key for pairing in found.check]),
    }
    return found


def find_changes(stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()) -> list[str]:
    """Say how a stage differs from the run that has begun there, "key: before -> now"; reads all of its rows."""
    return list(list_changes(RunDir(run_dir), read_input(stage).facts, allow_change=allow_change).values())


def run(stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()) -> Result:
    """Make the rows of a label stage in its run directory, which the caller has opened and locked.

    Writes rows.jsonl, labels.jsonl, report.json and every answer in feedback.jsonl; what is there already is not asked
    again. Raises JudgeError when the judge gave up or the budget is spent, after writing the rows there are; Stopped
    after a signal; RunError for changed settings.
    """
    with open_session(stage, run_dir) as session:
        given = read_input(stage)
        session.rejects = given.rejects
        if (finished := session.find_finished(given.facts, allow_change)) is not None:
            return finished
        labelling = _Labelling(session, given)
        try:
            labelling.do()
        except JudgeError as error:
            count = labelling.write(complete=False)["rows"]
            raise JudgeError(
                f"{stage.name}: {error}; {count} rows are in rows.jsonl, and nothing that was answered will be asked "
                f"again: {how_to_go_on(error)}"
            ) from None
        return labelling.finish()


class _Labelling:
    """The labels of one stage, from its prompts to the rows."""

    def __init__(self, session: Session, given: LabelInput) -> None:
        """Open the models and say what there is to do."""
        self._session, self._given = session, given
        stage, generator = session.stage, given.generator
        self._options = options = stage.expect(LabelOptions)
        self._labels: list[Label] = []
        self._second_opinions: list[tuple[Label, Label]] = []
        self._accuracy: dict[str, Any] | None = None
        self._pairings: list[Pairing] = []
        self._judging_seconds = 0.0
        self._cut_off: float | None = None
        self._generator = session.open(generator, ("generator",)) if generator else None
        self._judge: Judge | None = None
        what = f"{len(given.rows)} rows"
        if options.judge is None or given.constitution is None:
            self._rewards = open_rewards(stage, options.reward or ())
        elif options.judge.replay is not None:
            self._published = _read_published(stage, options.judge.replay)
        else:
            same = generator is not None and generator.model is not None and generator.model == options.judge.model
            opened = self._generator if same else session.open(options.judge, ("judge", "check"))
            assert opened is not None
            model, self._judge_spending = opened
            self._judge = Judge(
                model, given.constitution, given.examples, Quoter(model.control_tokens), stage.seed,
                orders=options.orders, thinks=options.cot, thoughts=Sampling(options.temperature, options.cot_tokens),
                bounds=options.bounds,
            )  # fmt: skip
        what += f", {len(given.constitution.principles)} principles" if given.constitution else ""
        session.begin(given.facts, given.report, note=what)

    def do(self) -> None:
        """Sample, judge, ask for second opinions, and measure the judge."""
        session, given = self._session, self._given
        self._pairings = pair_given(given.rows) if given.generator is None else self._sample()
        if not self._pairings:
            raise DataError([*session.rejects.first] or "there is nothing to compare", where=session.stage.recipe_path)
        if self._options.reward is not None:
            began = session.seconds
            self._labels = self._compare()
            self._judging_seconds = session.seconds - began
            return
        if self._judge is None:
            values = [self._published.get(pair_key(it.prompt, it.first, it.second)) for it in self._pairings]
            missing = "not among the published labels"
            self._labels = [
                Label(pairing, "published", (value,), [], missing if value is None else None)
                for pairing, value in zip(self._pairings, values, strict=True)
            ]
            return
        if given.check:  # first: a judge that is no good is seen before it is paid for
            self._accuracy = measure(session.asker, self._judge, given.check)
            self._say_accuracy(self._accuracy)
        began = session.seconds
        self._labels = judge_all(session.asker, self._judge, self._pairings)
        self._judging_seconds = session.seconds - began
        if given.constitution is not None and len(given.constitution.principles) > 1:  # how far do principles agree?
            chosen = self._labels[: min(_SECOND_OPINIONS, len(self._labels) // 10)]
            again = judge_all(session.asker, self._judge, [self._turn_over(label) for label in chosen])
            pairs = zip(chosen, again, strict=True)
            self._second_opinions = [(one, other) for one, other in pairs if one.principle != other.principle]

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
            reason = "the judge abstained from all comparisons, or all are ties; report.json says why"
            raise DataError([*session.rejects.first] or reason, where=session.stage.recipe_path)
        agreement = report["order_agreement"]
        metrics = {
            **{key: report[key] for key in ("rows", "comparisons", "abstained", "ties")},
            "mean_confidence": report["mean_confidence"] or 0.0,
            **({"order_agreement": agreement["share"]} if agreement else {}),
            **({"check_accuracy": self._accuracy["accuracy"]} if self._accuracy else {}),
        }
        session.log(count, **{key: value for key, value in metrics.items() if value is not None})
        return session.finish(count, metrics=metrics, tokens=report["tokens"])

    def _sample(self) -> list[Pairing]:
        session, options = self._session, self._options
        assert self._generator is not None and isinstance(options.answers, int)
        model = self._generator[0]
        prompts = list_prompts(self._given.rows, session.rejects, model.control_tokens)
        sampling = Sampling(options.temperature, options.max_new_tokens)
        replies = sample_answers(
            session.asker, model, prompts, sampling, count=options.answers, seed=session.stage.seed, kind="answer"
        )
        self._cut_off = mean([not reply.ended for own in replies for reply in own])
        return pair_sampled(prompts, replies, session.rejects, model.control_tokens)

    def _compare(self) -> list[Label]:
        """Label each pair by the rewards of its answers: P(first) = 1 / (1 + exp(r_second - r_first))."""
        asked = {repr((it.prompt, text)): (it.prompt, text) for it in self._pairings for text in (it.first, it.second)}
        answers = Answers([prompt for prompt, _ in asked.values()], [text for _, text in asked.values()])
        names, totals = [], dict.fromkeys(asked, 0.0)
        for reward, weight in self._rewards:
            names.append(reward.name)
            for key, score in zip(asked, reward.score(answers), strict=True):
                totals[key] += weight * score
        labels = []
        for it in self._pairings:
            p_first = share_of_first((totals[repr((it.prompt, it.first))], totals[repr((it.prompt, it.second))]))
            labels.append(Label(it, " + ".join(names), (p_first,), bounds=self._options.bounds))
        return labels

    def _turn_over(self, label: Label) -> Pairing:
        """Ask again at a turn at which another principle is drawn; at the last one tried where there is none."""
        pairing, seed = label.pairing, self._session.stage.seed
        turns = range(pairing.turn + 1, pairing.turn + _TRIES)
        assert self._given.constitution is not None
        draw = self._given.constitution.draw
        found = (turn for turn in turns if draw(seed=seed, key=pairing.key, turn=turn).name != label.principle)
        return replace(pairing, turn=next(found, turns[-1]))

    def _describe(self, count: int, *, complete: bool) -> dict[str, Any]:
        session, seconds = self._session, self._judging_seconds
        agreeing = [
            (one.p_first > 0.5) == (other.p_first > 0.5)
            for one, other in self._second_opinions
            if one.p_first is not None and other.p_first is not None and not one.is_tie and not other.is_tie
        ]
        judge = self._options.judge
        asked = self._judge is not None and judge is not None and judge.url is not None
        generator = self._generator[1] if self._generator and self._generator[1].requests else None
        return {
            "complete": complete,
            "rows": count,
            "rows_by_people": sum(len(list(split_ranking(row))) for row in self._given.mix),
            **describe_labels(self._labels),
            "agreement_between_principles": {"n": len(agreeing), "share": mean(agreeing)},
            "check": self._accuracy,
            "quoted": self._judge.quote.count if self._judge else 0,
            "left_out": session.rejects.count,
            "cut_off_share": self._cut_off,
            "tokens": session.num_tokens,
            "spent": self._judge_spending.to_dict() if asked else None,
            "spent_on_answers": generator.to_dict() if generator else None,
            "seconds": round(session.seconds, 3),
            "labels_per_second": round(len(self._labels) / seconds, 2) if seconds > 0 else None,
        }

    def _say_accuracy(self, accuracy: Mapping[str, Any]) -> None:
        name, abstained = self._session.stage.name, accuracy["abstained"]
        if accuracy["accuracy"] is None:
            console.warn(f"{name}: the judge abstained from all of `check`")
            return
        by_chance = accuracy["low"] <= 0.5
        (console.warn if by_chance else console.note)(
            f"{name}: on {accuracy['n'] - abstained} comparisons with known answers the judge is "
            f"right in {accuracy['accuracy']:.1%} ({accuracy['low']:.1%} to {accuracy['high']:.1%}), "
            f"ECE {accuracy['ece']:.3f}"
            + (", no better than chance" if by_chance else "")
            + (f"; it abstained from {abstained} more" if abstained else "")
        )


def pair_given(rows: Sequence[Row]) -> list[Pairing]:
    """Pair the answers that the rows have, each with each."""
    return [
        Pairing(row.prompt, first, second, row.place, pair_key(row.prompt, first, second))
        for row in rows
        for first, second in combinations(row.completions, 2)
        if first != second
    ]


def pair_sampled(
    prompts: Sequence[Prompted], replies: Sequence[Sequence[Reply]], rejects: Rejects, control_tokens: Sequence[str]
) -> list[Pairing]:
    """Pair the answers sampled for each prompt; equal ones and useless ones are left out and counted."""
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

    The preferred answer always stands as chosen, so that a reader who knows nothing of labels learns the right thing
    too. Raises DataError when people compared messages and the judge texts: one stage cannot be trained on both.
    """
    messages = any(not isinstance(label.pairing.prompt, str) for label in labels)
    for label in labels:
        if label.p_first is not None and not (hard and label.is_tie):
            yield _make_row(label.pairing.prompt, label.pairing.first, label.pairing.second, label.p_first, hard=hard)
    for row in mix:
        if labels and not messages and row.conversational:
            what = "mix: holds messages, and the judged comparisons are plain text; convert one"
            raise DataError(what, where=row.place)
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


def _read_published(stage: Stage, path: str) -> dict[str, float]:
    """Read P(first preferred) of a file of comparisons that are labelled already, both ways round."""
    published: dict[str, float] = {}
    for row in read_rows(stage, [DataSource(path=path)], report=DataReport(), rejects=Rejects(), method="rm"):
        if row.kind == "pair":
            label, (first, second) = 1.0 if row.label is None else row.label, row.completions
            published[pair_key(row.prompt, first, second)] = label
            published[pair_key(row.prompt, second, first)] = 1.0 - label
    return published
