"""The critique stage: answers criticised and revised by a constitution, as rows for an sft stage (SL-CAI).

arXiv 2212.08073, section 3: an answer is criticised and rewritten round after round, by a principle drawn each time; a
revision takes the place of the answer before it, so that the next round sees nothing of how it came about. Rows are the
revisions of all rounds, and plain answers to helpful prompts beside them. With `replay:` they come from published
chains and nobody is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.data import DataReport, Rejects, Row, read_rows
from alignkit.data.files import read_published
from alignkit.data.rows import Message
from alignkit.errors import DataError, JudgeError
from alignkit.feedback.cache import seed_of
from alignkit.feedback.constitution import Constitution, Principle, load_constitution
from alignkit.feedback.examples import Examples, load_examples
from alignkit.feedback.prompts import Quoter, Request, ask_critique, ask_revision, conversation
from alignkit.feedback.stage import (
    Prompted,
    Session,
    list_prompts,
    make_row,
    open_session,
    sample_answers,
    why_useless,
)
from alignkit.feedback.writer import (
    Job,
    Model,
    Reply,
    Sampling,
    Spending,
    describe_source,
    fingerprint_file,
    how_to_go_on,
    own_model,
    speaks_chat,
)
from alignkit.recipe.schema import CritiqueOptions, DataSource, FeedbackModel
from alignkit.recipe.stage import Stage
from alignkit.runs.directory import Result, RunDir, list_changes

_SHOWN = 4  # chains whose texts stand in the report
_MANY_CUT = 0.2  # share of texts cut off by max_new_tokens that is worth a warning


@dataclass
class CritiqueInput:
    """What a critique stage works on, read before a model is opened.

    Equal facts and the same seed make the same rows.
    """

    constitution: Constitution
    examples: Examples
    generator: FeedbackModel  # answers, criticises and revises
    rejects: Rejects = field(default_factory=Rejects)
    report: DataReport = field(default_factory=DataReport)
    rows: list[Row] = field(default_factory=list)
    helpful: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def read_input(stage: Stage) -> CritiqueInput:
    """Read prompts, principles and examples; raises DataError and RecipeError for what cannot be used."""
    options = stage.expect(CritiqueOptions)
    constitution = load_constitution(options.constitution or (), needs="critique")
    generator = options.generator or own_model(stage)
    found = CritiqueInput(constitution, load_examples(options.examples), generator)
    template, helpful_report = speaks_chat(generator), DataReport()

    def read(sources: Sequence[DataSource], report: DataReport) -> list[Row]:
        return list(read_rows(stage, sources, report=report, rejects=found.rejects, template=template))

    found.rows = read(options.data, found.report)
    found.helpful = read(options.helpful.data, helpful_report) if options.helpful else []
    found.facts = {
        "method": "critique",
        "seed": stage.seed,
        "generator": describe_source(generator),
        "constitution": constitution.fingerprint,
        "examples": found.examples.fingerprint,
        **{key: getattr(options, key) for key in ("rounds", "critiques", "temperature", "max_new_tokens")},
        "helpful_samples": options.helpful.samples if options.helpful else 0,
        "data": found.report.fingerprint,
        "helpful_data": helpful_report.fingerprint,
    }
    return found


def find_changes(stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()) -> list[str]:
    """Say how a stage differs from the run that has begun there, "key: before -> now"; reads all of its rows."""
    options = stage.expect(CritiqueOptions)
    facts = _replay_facts(options) if options.replay else read_input(stage).facts
    return list(list_changes(RunDir(run_dir), facts, allow_change=allow_change).values())


def run(stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()) -> Result:
    """Make the rows of a critique stage in its run directory, which the caller has opened and locked.

    Writes rows.jsonl, report.json and every text in feedback.jsonl; what is there already is not asked again. Raises
    JudgeError when the generator gave up, Stopped after a signal, RunError for changed settings.
    """
    options = stage.expect(CritiqueOptions)
    with open_session(stage, run_dir) as session:
        if options.replay:
            return _replay(session, options, allow_change)
        given = read_input(stage)
        session.rejects = given.rejects
        if (finished := session.find_finished(given.facts, allow_change)) is not None:
            return finished
        critique = _Critique(session, given)
        try:
            critique.do()
        except JudgeError as error:
            count = critique.write(complete=False)["rows"]
            raise JudgeError(
                f"{stage.name}: {error}; {len(session.store)} texts are kept in feedback.jsonl and will not be asked "
                f"for again, and {count} rows of finished rounds are in rows.jsonl: {how_to_go_on(error)}"
            ) from None
        report = critique.write(complete=True)
        if not report["rows"]:
            raise DataError([*session.rejects.first] or "no revision is left", where=stage.recipe_path)
        metrics = {key: report[key] for key in ("rows", "broken_chains", "cut_off_share")}
        return session.finish(report["rows"], metrics=metrics, tokens=report["tokens"])


@dataclass
class Chain:
    """An answer on its way through the rounds; it ends early when something that can be no text comes back."""

    prompted: Prompted
    answers: list[str]  # the first answer, then the revisions
    principles: list[str] = field(default_factory=list)
    critiques: list[str] = field(default_factory=list)  # empty texts where none are asked for
    critique: str | None = None  # of the round under way
    problem: str | None = None

    @property
    def conversation(self) -> list[Message]:
        """The conversation with the newest answer at its end."""
        return [*conversation(self.prompted.prompt), Message(role="assistant", content=self.answers[-1].strip())]


class _Critique:
    """The texts of one stage, from the first answers to the rows."""

    def __init__(self, session: Session, given: CritiqueInput) -> None:
        """Open the model and say what there is to do."""
        options = session.stage.expect(CritiqueOptions)
        self._session, self._given, self._options = session, given, options
        self._model: Model
        self._spending: Spending
        self._model, self._spending = session.open(given.generator, ("generator",))
        self._quote = Quoter(self._model.control_tokens)
        self._sampling = Sampling(options.temperature, options.max_new_tokens)
        self._prompts = list_prompts(given.rows, session.rejects, self._model.control_tokens)
        self._helpful = (
            list_prompts(given.helpful, session.rejects, self._model.control_tokens) if given.helpful else []
        )
        self._chains: list[Chain] = []
        self._extra: list[tuple[Prompted, str]] = []
        self._replies: list[Reply] = []
        what = f"{len(self._prompts)} prompts, {len(given.constitution.principles)} principles"
        session.begin(given.facts, given.report, note=what)

    def do(self) -> None:
        """Ask for everything, round by round."""
        for prompted, (reply,) in zip(self._prompts, self._sample(self._prompts, 1, "sample"), strict=True):
            self._chains.append(Chain(prompted, [reply.text], problem=self._check(reply)))
        for number in range(self._options.rounds):
            self._revise(number)
            answers = [chain.answers[-1] for chain in self._chains if chain.problem is None]
            mean_chars = _mean([len(text) for text in answers])
            self._session.log(number + 1, chains=len(answers), mean_chars=mean_chars)
        if self._options.helpful and self._helpful:
            found = self._sample(self._helpful, self._options.helpful.samples, "helpful")
            for prompted, replies in zip(self._helpful, found, strict=True):
                for reply in replies:
                    if (problem := self._check(reply)) is not None:
                        self._session.rejects.add(prompted.place, f"helpful: {problem}")
                    else:
                        self._extra.append((prompted, reply.text))

    def write(self, *, complete: bool) -> dict[str, Any]:
        """Write the rows and the report of the rounds that are finished; return the report."""
        session = self._session
        for chain in self._chains:
            if chain.problem is not None:
                session.rejects.add(chain.prompted.place, f"round {len(chain.principles) + 1}: {chain.problem}")
        revisions = [(chain.prompted, answer) for chain in self._chains for answer in chain.answers[1:]]
        count = session.write_rows(make_row(prompted.prompt, answer) for prompted, answer in (*revisions, *self._extra))
        cut = sum(not reply.ended for reply in self._replies) / max(len(self._replies), 1)
        broken = sum(chain.problem is not None for chain in self._chains)
        shown = [
            {
                "prompt": chain.prompted.prompt,
                "answers": chain.answers,
                "principles": chain.principles,
                "critiques": chain.critiques,
            }
            for chain in self._chains
            if chain.principles
        ]
        report = {
            "complete": complete,
            "prompts": len(self._prompts),
            "rows": count,
            "helpful_rows": len(self._extra),
            "broken_chains": broken,
            "left_out": session.rejects.count,
            "cut_off_share": cut,
            "quoted": self._quote.count,
            "principles": dict(Counter(name for chain in self._chains for name in chain.principles)),
            "rounds": _describe_rounds([chain.answers for chain in self._chains if len(chain.answers) > 1]),
            "first_chains": shown[:_SHOWN],
            "tokens": session.num_tokens,
            "spent": self._spending.to_dict() if self._spending.requests else None,
            "seconds": round(session.seconds, 3),
        }
        session.write_report(report)
        if cut > _MANY_CUT:
            console.warn(f"{session.stage.name}: {cut:.0%} of the texts were cut off; raise max_new_tokens")
        if broken:
            console.warn(f"{session.stage.name}: {broken} of {len(self._chains)} chains broke off (rejects.jsonl)")
        return report

    def _sample(self, prompts: Sequence[Prompted], count: int, kind: str) -> list[list[Reply]]:
        replies = sample_answers(
            self._session.asker, self._model, prompts, self._sampling,
            count=count, seed=self._session.stage.seed, kind=kind,
        )  # fmt: skip
        self._replies += [reply for own in replies for reply in own]
        return replies

    def _revise(self, number: int) -> None:
        """Take every chain that goes on through one round."""
        given, quote = self._given, self._quote
        seed = self._session.stage.seed
        going = [chain for chain in self._chains if chain.problem is None]
        drawn = [given.constitution.draw(seed=seed, key=chain.prompted.key, turn=number) for chain in going]
        if self._options.critiques:
            replies = self._ask(going, drawn, number, "critique", lambda chain, principle: ask_critique(
                chain.conversation, principle, given.examples, quote
            ))  # fmt: skip
            for chain, reply in zip(going, replies, strict=True):
                chain.problem = self._check(reply)
                chain.critique = reply.text
            kept = [place for place, chain in enumerate(going) if chain.problem is None]
            going, drawn = [going[place] for place in kept], [drawn[place] for place in kept]
        replies = self._ask(going, drawn, number, "revision", lambda chain, principle: ask_revision(
            chain.conversation, chain.critique, principle, given.examples, quote
        ))  # fmt: skip
        for chain, principle, reply in zip(going, drawn, replies, strict=True):
            chain.problem = self._check(reply)
            if chain.problem is None:
                chain.answers.append(reply.text)
                chain.principles.append(principle.name)
                chain.critiques.append(chain.critique or "")
            chain.critique = None
        self._replies += replies

    def _ask(
        self,
        chains: Sequence[Chain],
        drawn: Sequence[Principle],
        number: int,
        kind: str,
        make: Callable[[Chain, Principle], Request],
    ) -> list[Reply]:
        seed, jobs, about = self._session.stage.seed, [], []
        for chain, principle in zip(chains, drawn, strict=True):
            jobs.append(Job(make(chain, principle), seed_of(seed, kind, number, chain.prompted.key)))
            about.append({"place": chain.prompted.place, "round": number, "principle": principle.name})
        return self._session.asker.write(self._model, jobs, self._sampling, kind=kind, by="generator", about=about)

    def _check(self, reply: Reply) -> str | None:
        return why_useless(reply, self._model.control_tokens)


def _describe_rounds(chains: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Count, for the first answers and each round, texts, their length, and how many were changed."""
    rounds = []
    for number in range(max((len(answers) for answers in chains), default=0)):
        there = [answers for answers in chains if len(answers) > number]
        changed = [answers[number] != answers[number - 1] for answers in there] if number else []
        rounds.append(
            {"round": number, "texts": len(there), "mean_chars": _mean([len(answers[number]) for answers in there])}
            | ({"changed_share": _mean(changed)} if number else {})
        )
    return rounds


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True)
class PublishedChain:
    """A prompt, its first answer, and the revisions with the names of the principles they were made by."""

    prompt: list[Message]
    answers: list[str]
    principles: list[str]


def _replay_facts(options: CritiqueOptions) -> dict[str, Any]:
    return {"method": "critique", "replay": [fingerprint_file(path) for path in options.replay or ()]}


def _replay(session: Session, options: CritiqueOptions, allow_change: Sequence[str]) -> Result:
    facts = _replay_facts(options)
    if (finished := session.find_finished(facts, allow_change)) is not None:
        return finished
    chains = list(read_chains(options.replay or (), skip=options.on_bad_row == "skip", rejects=session.rejects))
    if not chains:
        raise DataError("holds no chains", where=", ".join(options.replay or ()))
    session.begin(facts, DataReport(), note=f"{len(chains)} published chains")
    count = session.write_rows(make_row(chain.prompt, text) for chain in chains for text in chain.answers[1:])
    shown = [
        {"prompt": chain.prompt, "answers": chain.answers, "principles": chain.principles} for chain in chains[:_SHOWN]
    ]
    report = {
        "chains": len(chains),
        "rows": count,
        "principles": dict(Counter(name for chain in chains for name in chain.principles)),
        "rounds": _describe_rounds([chain.answers for chain in chains]),
    }
    session.write_report(report | {"first_chains": shown})
    return session.finish(count, metrics={"chains": len(chains), "rows": count}, tokens=0)


def read_chains(paths: Sequence[str], *, skip: bool, rejects: Rejects) -> Iterator[PublishedChain]:
    """Yield the chains of published files, `samples_*_SLMADISON.jsonl` of the Constitutional AI paper.

    Rows that hold none are rejected with `skip`, else refused: DataError.
    """
    what = "published chain {rl_prompt, initial_response, cst: [{cst_key, critique, revision}]}"
    for path in paths:
        for _, chain in read_published(Path(path), _read_chain, what, skip=skip, rejects=rejects):
            yield chain


def _read_chain(data: Any) -> PublishedChain:
    if not data["cst"]:
        raise ValueError("no revisions")
    answers = [data["initial_response"][0]["sample"], *(step["revision"]["sample"] for step in data["cst"])]
    names = [str(step["cst_key"]) for step in data["cst"]]
    return PublishedChain(conversation(data["rl_prompt"]), [answer.strip() for answer in answers], names)
