"""The label stage: comparisons labelled by a judge (RL-CAI) or by a reward, as rows for an rm or dpo stage.

arXiv 2212.08073, section 4.1: answers, sampled or given, are compared in pairs by a principle each, the judge's
probability being a soft label; comparisons by people can be mixed in. A reward of any kind compares by scores, as for
iterated DPO.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.data import DataReport, Rejects, Row, Text, read_rows
from alignkit.errors import DataError, JudgeError
from alignkit.feedback import judge as judging
from alignkit.feedback import stage as work
from alignkit.feedback.cache import Store, key_of
from alignkit.feedback.constitution import load_constitution, load_examples
from alignkit.feedback.prompts import Quoter, conversation, read_text
from alignkit.feedback.writer import Model, Sampling, share_of_first
from alignkit.recipe.methods import LabelOptions
from alignkit.recipe.schema import DataSource
from alignkit.recipe.stage import Stage
from alignkit.rewards import Answers, Reward, join_columns, stage_space
from alignkit.rewards.kinds import fingerprint_rewards, open_reward
from alignkit.runs.directory import Result, RunDir, list_changes

_SECOND_OPINIONS = 32  # comparisons that are also judged by another principle, at most a tenth of them
_TRIES = 64  # draws until another principle has come, unless its weight is next to nothing


def run(stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()) -> Result:
    """Make the rows of a label stage, and labels.jsonl; see `run_work`."""
    return work.run_work(stage, run_dir, _Labelling, allow_change=allow_change)


def find_changes(stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()) -> list[str]:
    """Say how a stage differs from the run that has begun there, "key: before -> now"; reads all of its rows."""
    return list(list_changes(RunDir(run_dir), _Labelling(stage).facts, allow_change=allow_change).values())


class _Labelling:
    """The labels of one stage, from its prompts to the rows."""

    nothing = "the judge abstained from all comparisons, or all are ties; report.json says why"

    def __init__(self, stage: Stage) -> None:
        """Read rows, principles and examples; raises DataError and RecipeError for what cannot be used."""
        self._stage, self._options = stage, stage.expect(LabelOptions)
        options, mix_report = self._options, DataReport()
        principles = options.constitution
        self._constitution = load_constitution(principles, needs="comparison") if principles else None
        self._examples = load_examples(options.examples)
        given = options.answers == "given"
        self._source = None if given else options.generator or work.own_model(stage)
        self.report, self.rejects = DataReport(), Rejects()
        template = work.speaks_chat(self._source) if self._source else None
        reading: dict[str, Any] = {"method": "rm"} if given else {"template": template}
        self._rows = list(read_rows(stage, options.data, report=self.report, rejects=self.rejects, **reading))
        mix = options.mix and read_rows(stage, options.mix, report=mix_report, rejects=self.rejects, method="rm")
        self._mix = list(mix or ())
        self._check = judging.read_labelled(stage, options.check, self.rejects) if options.check else []
        keys = ("answers", "best_of", "orders", "cot", "hard")
        self.facts = {
            "method": "label", "seed": stage.seed,
            "judge": work.describe_source(options.judge) if options.judge else None, **fingerprint_rewards(stage),
            "generator": work.describe_source(self._source) if self._source else None,
            "constitution": self._constitution.fingerprint if self._constitution else None,
            "examples": self._examples.fingerprint,
            **{key: getattr(options, key) for key in keys}, **Sampling.of(options).settings,
            "cot_tokens": options.cot_tokens if options.cot else None, "bounds": list(options.bounds),
            "data": self.report.fingerprint, "mix": mix_report.fingerprint,
            "check": key_of(keys=[pairing.key for pairing in self._check]),
        }  # fmt: skip
        self._labels: list[judging.Label] = []
        self._pairings: list[judging.Pairing] = []
        self._agreeing: list[bool] = []  # whether a second principle prefers the same answer
        self._accuracy: dict[str, Any] | None = None
        self._cut_off: float | None = None
        self._seconds = 0.0  # of judging

    def open(self, session: work.Session) -> str:
        """Open generator and judge, the rewards, or the published labels."""
        options, self._session = self._options, session
        self._generator = session.open(self._source, ("generator",)) if self._source else None
        self._judge: judging.Judge | None = None
        self._rewards: list[tuple[Reward, float]] = []
        self._published: dict[str, float] = {}
        what = f"{len(self._rows)} rows"
        if options.judge is None or self._constitution is None:
            space = replace(stage_space(self._stage, "reward"), cache=Store())
            self._rewards = [(open_reward(source, space), source.weight) for source in options.reward or ()]
            return what
        if options.judge.replay is not None:
            self._published = _read_published(self._stage, options.judge.replay)
        else:
            shares = self._source is not None and self._source.model and self._source.model == options.judge.model
            model: Model = (self._generator if shares else None) or session.open(options.judge, ("judge", "check"))
            self._judge = judging.Judge(
                model, self._constitution, self._examples, Quoter(model.control_tokens), self._stage.seed,
                orders=options.orders, thinks=options.cot, bounds=options.bounds,
                thoughts=Sampling.of(options, max_new_tokens=options.cot_tokens),
            )  # fmt: skip
        return f"{what}, {len(self._constitution.principles)} principles"

    def do(self) -> None:
        """Sample and judge; ask for second opinions, and measure the judge."""
        session = self._session
        self._pairings = self._sample() if self._generator else [
            judging.Pairing(row.prompt, first, second, row.place, judging.pair_key(row.prompt, first, second))
            for row in self._rows
            for first, second in combinations(row.completions, 2)
            if first != second
        ]  # fmt: skip
        if not self._pairings:
            raise DataError([*self.rejects.first] or "there is nothing to compare", where=self._stage.recipe_path)
        if self._judge is not None and self._check:  # first: a judge that is no good is seen before it is paid for
            judge = replace(self._judge, orders="both", bounds=(0.0, 1.0))
            checked = judging.judge_all(session.asker, judge, self._check, by="check")
            found = self._accuracy = judging.describe_accuracy(checked)
            abstained, is_good, said = found["abstained"], False, "the judge abstained from all of `check`"
            if found["accuracy"] is not None:
                is_good = found["low"] > 0.5
                said = f"on {found['n'] - abstained} comparisons with known answers the judge is right in "
                said += f"{found['accuracy']:.1%} ({found['low']:.1%} to {found['high']:.1%}), ECE {found['ece']:.3f}"
                said += "" if is_good else ", no better than chance"
                said += f"; it abstained from {abstained} more" if abstained else ""
            (console.note if is_good else console.warn)(f"{self._stage.name}: {said}")
        began = session.seconds
        if self._rewards:
            self._labels = self._compare(self._rewards)
        elif self._judge is None:
            for it in self._pairings:
                value = self._published.get(judging.pair_key(it.prompt, it.first, it.second))
                problem = "not among the published labels" if value is None else None
                self._labels.append(judging.Label(it, "published", (value,), problem=problem))
        else:
            self._labels = judging.judge_all(session.asker, self._judge, self._pairings)
        self._seconds = session.seconds - began
        if self._judge is not None:
            self._ask_again(self._judge)

    def write(self, *, complete: bool) -> dict[str, Any]:
        """Write the rows and labels of what has been judged."""
        session, judge = self._session, self._judge
        if not complete and judge is not None and not self._labels:
            self._labels = judging.judge_all(session.asker, judge, self._pairings, ask=False)
        best, rows = self._options.best_of, make_rows(self._labels, self._mix, hard=self._options.hard)
        count = session.write_rows(pick_best(self._labels) if best else rows)
        session.write_rows((label.to_dict() for label in self._labels), work.LABELS)
        models = {"spent": judge.model if judge else None, "spent_on_answers": self._generator}
        report = {
            "rows": count, "rows_by_people": sum(len(list(split_ranking(row))) for row in self._mix),
            **judging.describe_labels(self._labels),
            "agreement_between_principles": {"n": len(self._agreeing), "share": judging.mean(self._agreeing)},
            "check": self._accuracy, "quoted": judge.quote.count if judge else 0, "cut_off_share": self._cut_off,
            **{key: model.spending.to_dict() if model and model.spending else None for key, model in models.items()},
            "labels_per_second": round(len(self._labels) / self._seconds, 2) if self._seconds > 0 else None,
        }  # fmt: skip
        for fault in judging.find_faults(report):
            console.warn(f"{self._stage.name}: {fault}")
        return report

    def measure(self, report: Mapping[str, Any]) -> dict[str, float]:
        found = {key: report[key] for key in ("rows", "comparisons", "abstained", "ties")}
        found["mean_confidence"] = report["mean_confidence"] or 0.0
        if report["order_agreement"]:
            found["order_agreement"] = report["order_agreement"]["share"]
        if self._accuracy and self._accuracy["accuracy"] is not None:
            found["check_accuracy"] = self._accuracy["accuracy"]
        self._session.log(report["rows"], **found)
        if self._options.on_weak_judge == "stop" and (weakness := judging.find_weakness(report)):
            advice = "name another judge, or take its labels all the same with on_weak_judge: warn"
            raise JudgeError(f"{self._stage.name}: {weakness}; {advice}")
        return found

    def _sample(self) -> list[judging.Pairing]:
        options, model = self._options, self._generator
        assert model is not None and isinstance(options.answers, int)
        prompts = work.list_prompts(self._rows, self.rejects, model.control_tokens)
        sampling = Sampling.of(options)
        replies = work.sample_answers(self._session, model, prompts, sampling, count=options.answers, kind="answer")
        self._cut_off = judging.mean([not reply.ended for own in replies for reply in own])
        pairings = []  # equal answers and useless ones are left out and counted
        for prompted, own in zip(prompts, replies, strict=True):
            problems = [work.why_useless(reply, model.control_tokens) for reply in own]
            for problem in filter(None, problems):
                self.rejects.add(prompted.place, problem)
            texts = list(dict.fromkeys(reply.text for reply, what in zip(own, problems, strict=True) if what is None))
            if len(texts) < 2 and not any(problems):
                self.rejects.add(prompted.place, f"all {len(own)} answers are the same")
            for number, (first, second) in enumerate(combinations(texts, 2)):
                answers = work.make_answer(prompted.prompt, first), work.make_answer(prompted.prompt, second)
                pairings.append(judging.Pairing(prompted.prompt, *answers, prompted.place, f"{prompted.key} {number}"))
        return pairings

    def _compare(self, rewards: Sequence[tuple[Reward, float]]) -> list[judging.Label]:
        """Label each pair by the rewards of its answers: P(first) = 1 / (1 + exp(r_second - r_first))."""
        by_place = {row.place: row.columns for row in self._rows}
        asked = {
            repr((it.prompt, text)): (it.prompt, text, by_place[it.place])
            for it in self._pairings
            for text in (it.first, it.second)
        }
        prompts, texts, columns = zip(*asked.values(), strict=True)
        answers, totals = Answers(prompts, texts, columns=join_columns(columns)), dict.fromkeys(asked, 0.0)
        for reward, weight in rewards:
            for key, score in zip(asked, reward.score(answers), strict=True):
                totals[key] += weight * score
        name = " + ".join(reward.name for reward, _ in rewards)
        labels = []
        for it in self._pairings:
            p_first = share_of_first((totals[repr((it.prompt, it.first))], totals[repr((it.prompt, it.second))]))
            labels.append(judging.Label(it, name, (p_first,), bounds=self._options.bounds))
        return labels

    def _ask_again(self, judge: judging.Judge) -> None:
        """Have some pairs judged by another principle, to see how far principles agree."""
        if len(judge.constitution.principles) < 2:
            return
        chosen, again = self._labels[: min(_SECOND_OPINIONS, len(self._labels) // 10)], []
        for label in chosen:  # at a turn at which another principle is drawn, at the last one tried where none is
            pairing, draw = label.pairing, judge.constitution.draw
            for turn in range(pairing.turn + 1, pairing.turn + _TRIES):
                if draw(seed=judge.seed, key=pairing.key, turn=turn).name != label.principle:
                    break
            again.append(replace(pairing, turn=turn))
        for one, other in zip(chosen, judging.judge_all(self._session.asker, judge, again), strict=True):
            if one.principle == other.principle or one.is_tie or other.is_tie:
                continue
            if one.p_first is not None and other.p_first is not None:
                self._agreeing.append((one.p_first > 0.5) == (other.p_first > 0.5))


def make_rows(labels: Sequence[judging.Label], mix: Sequence[Row], *, hard: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each comparison that was judged, then those made by people; hard ones have no label and no ties.
    The preferred answer always stands as chosen, so that a reader who knows nothing of labels learns the right thing
    too. Raises DataError when people compared messages and the judge texts: one stage cannot be trained on both."""
    messages = any(not isinstance(label.pairing.prompt, str) for label in labels)

    def make(prompt: Text, first: Text, second: Text, p_first: float) -> Iterator[dict[str, Any]]:
        chosen, rejected = (first, second) if p_first >= 0.5 else (second, first)
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if not (hard and p_first == 0.5):
            yield row if hard else row | {"label": max(p_first, 1.0 - p_first)}

    for label in labels:
        if label.p_first is not None and not (hard and label.is_tie):
            yield from make(label.pairing.prompt, label.pairing.first, label.pairing.second, label.p_first)
    for row in mix:
        if labels and not messages and row.conversational:
            what = "mix: holds messages, and the judged comparisons are plain text; convert one"
            raise DataError(what, where=row.place)
        for better, worse, p_first in split_ranking(row):
            prompt: Text = row.prompt
            if messages and isinstance(prompt, str):
                prompt = conversation(prompt)
                better, worse = (work.make_answer(prompt, read_text(text).strip()) for text in (better, worse))
            yield from make(prompt, better, worse, p_first)


def pick_best(labels: Sequence[judging.Label]) -> Iterator[dict[str, Any]]:
    """Yield each prompt with the answer of the highest mean probability to be preferred; none where all are equal."""
    found: dict[str, tuple[Text, dict[str, tuple[Text, list[float]]]]] = {}
    for label in labels:
        it, p_first = label.pairing, label.p_first
        if p_first is not None:
            _, answers = found.setdefault(it.place, (it.prompt, {}))
            for text, p in ((it.first, p_first), (it.second, 1 - p_first)):
                answers.setdefault(repr(text), (text, []))[1].append(p)
    for prompt, answers in found.values():
        best, text = max(((sum(p) / len(p), text) for text, p in answers.values()), key=lambda pair: pair[0])
        if best > 0.5:
            yield {"prompt": prompt, "completion": text}


def split_ranking(row: Row) -> Iterator[tuple[Text, Text, float]]:
    """Yield the comparisons of a row made by people: better, worse, P(better preferred); equal scores are none."""
    if row.scores is None:
        yield row.completions[0], row.completions[1], 1.0 if row.label is None else row.label
        return
    for (better, above), (worse, below) in combinations(zip(row.completions, row.scores, strict=True), 2):
        if above > below:
            yield better, worse, 1.0


def _read_published(stage: Stage, path: str) -> dict[str, float]:
    """Read P(first preferred) of a file of comparisons that are labelled already, both ways round."""
    published: dict[str, float] = {}
    for row in read_rows(stage, [DataSource(path=path)], report=DataReport(), rejects=Rejects(), method="rm"):
        if row.kind == "pair":
            label, (first, second) = 1.0 if row.label is None else row.label, row.completions
            published[judging.pair_key(row.prompt, first, second)] = label
            published[judging.pair_key(row.prompt, second, first)] = 1.0 - label
    return published
