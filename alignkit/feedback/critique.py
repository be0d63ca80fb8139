"""Chains of critiques and revisions: the supervised half of Constitutional AI (arXiv 2212.08073, section 3.1).

An answer is criticised and rewritten round after round, by a principle drawn each time; a revision takes the place of
the answer before it, so that the next round sees nothing of how it came about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.data import DataReport
from alignkit.data.rows import Message
from alignkit.errors import DataError, JudgeError
from alignkit.feedback.cache import Asker, seed_of
from alignkit.feedback.constitution import Constitution, Principle
from alignkit.feedback.examples import Examples
from alignkit.feedback.inputs import CritiqueInput, replay_facts
from alignkit.feedback.prompts import Quoter, Request, ask_critique, ask_revision, conversation
from alignkit.feedback.replay import read_chains
from alignkit.feedback.stage import Prompted, Session, list_prompts, make_row, open_session, sample_answers, why_useless
from alignkit.feedback.writer import Job, Model, Reply, Sampling, Spending, how_to_go_on, open_model, spent_before
from alignkit.recipe.schema import CritiqueOptions
from alignkit.recipe.stage import Stage
from alignkit.runs.directory import Result


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
    def turns(self) -> list[Message]:
        """The conversation with the newest answer at its end."""
        return [*conversation(self.prompted.prompt), Message(role="assistant", content=self.answers[-1].strip())]


@dataclass(frozen=True)
class Critic:
    """Who criticises and revises, and by what."""

    model: Model
    constitution: Constitution
    examples: Examples
    sampling: Sampling
    quote: Quoter
    seed: int
    critiques: bool


def revise(asker: Asker, critic: Critic, chains: Sequence[Chain], *, turn: int) -> list[Reply]:
    """Take every chain that goes on through one round; return what was written as revisions."""
    going = [chain for chain in chains if chain.problem is None]
    drawn = [critic.constitution.draw(seed=critic.seed, key=chain.prompted.key, turn=turn) for chain in going]
    if critic.critiques:
        replies = _ask(asker, critic, going, drawn, turn, "critique", lambda chain, principle: ask_critique(
            chain.turns, principle, critic.examples, critic.quote
        ))  # fmt: skip
        for chain, reply in zip(going, replies, strict=True):
            chain.problem = why_useless(reply, critic.model.control_tokens)
            chain.critique = reply.text
        kept = [place for place, chain in enumerate(going) if chain.problem is None]
        going, drawn = [going[place] for place in kept], [drawn[place] for place in kept]
    replies = _ask(asker, critic, going, drawn, turn, "revision", lambda chain, principle: ask_revision(
        chain.turns, chain.critique, principle, critic.examples, critic.quote
    ))  # fmt: skip
    for chain, principle, reply in zip(going, drawn, replies, strict=True):
        chain.problem = why_useless(reply, critic.model.control_tokens)
        if chain.problem is None:
            chain.answers.append(reply.text)
            chain.principles.append(principle.name)
            chain.critiques.append(chain.critique or "")
        chain.critique = None
    return replies


def _ask(
    asker: Asker,
    critic: Critic,
    chains: Sequence[Chain],
    drawn: Sequence[Principle],
    turn: int,
    kind: str,
    make: Callable[[Chain, Principle], Request],
) -> list[Reply]:
    jobs = [
        Job(make(chain, principle), seed_of(critic.seed, kind, turn, chain.prompted.key))
        for chain, principle in zip(chains, drawn, strict=True)
    ]
    about: list[dict[str, Any]] = [
        {"place": chain.prompted.place, "round": turn, "principle": principle.name}
        for chain, principle in zip(chains, drawn, strict=True)
    ]
    return asker.write(critic.model, jobs, critic.sampling, kind=kind, by="generator", about=about)


_SHOWN = 4  # chains whose texts stand in the report
_MANY_CUT = 0.2  # share of texts cut off by max_new_tokens that is worth a warning


def run(stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()) -> Result:
    """Make the rows of a critique stage in its run directory, which the caller has opened and locked.

    Writes rows.jsonl, report.json and every text in feedback.jsonl; what is there already is not asked again. Raises
    JudgeError when the generator gave up, Stopped after a signal, RunError for changed settings.
    """
    options = stage.expect(CritiqueOptions)
    with open_session(stage, run_dir) as session:
        return _replay(session, options, allow_change) if options.replay else _make(session, options, allow_change)


def _replay(session: Session, options: CritiqueOptions, allow_change: Sequence[str]) -> Result:
    assert options.replay is not None
    facts = replay_facts(options)
    if (finished := session.find_finished(facts, allow_change)) is not None:
        return finished
    chains = list(read_chains(options.replay))
    if not chains:
        raise DataError("holds no chains", where=", ".join(options.replay))
    session.begin(facts, DataReport(), note=f"{len(chains)} published chains")
    count = session.write_rows(make_row(chain.prompt, text) for chain in chains for _, text in chain.revisions)
    texts = [[chain.answer, *(text for _, text in chain.revisions)] for chain in chains]
    names = Counter(name for chain in chains for name, _ in chain.revisions)
    shown = [
        {"prompt": chain.prompt, "answers": answers, "principles": [name for name, _ in chain.revisions]}
        for chain, answers in list(zip(chains, texts, strict=True))[:_SHOWN]
    ]
    report = {"chains": len(chains), "rows": count, "principles": dict(names), "rounds": _describe_rounds(texts)}
    session.write_report(report | {"first_chains": shown})
    return session.finish(count, metrics={"chains": len(chains), "rows": count}, tokens=0)


def _make(session: Session, options: CritiqueOptions, allow_change: Sequence[str]) -> Result:
    stage = session.stage
    given = CritiqueInput.read(stage)
    session.rejects = given.rejects
    if (finished := session.find_finished(given.facts, allow_change)) is not None:
        return finished
    source = given.generator
    spending = spent_before(source, session.store.values(), ("generator",))
    model = open_model(
        source, stop=session.stop, spending=spending, device=stage.launch.device,
        batch_size=options.batch_size, trust_code=stage.trust_code,
    )  # fmt: skip
    prompts = list_prompts(given.rows, session.rejects, model.control_tokens)
    helpful = list_prompts(given.helpful, session.rejects, model.control_tokens) if given.helpful else []
    session.begin(
        given.facts, given.report, note=f"{len(prompts)} prompts, {len(given.constitution.principles)} principles"
    )
    sampling = Sampling(options.temperature, options.max_new_tokens)
    critic = Critic(
        model, given.constitution, given.examples, sampling, Quoter(model.control_tokens), stage.seed, options.critiques
    )
    work = _Work(session, critic, prompts, helpful, options)
    try:
        work.do()
    except JudgeError as error:
        count = work.write(spending, complete=False)["rows"]
        raise JudgeError(
            f"{stage.name}: {error}; {len(session.store)} texts are kept in feedback.jsonl and will not be asked for "
            f"again, and {count} rows of finished rounds are in rows.jsonl: {how_to_go_on(error)}"
        ) from None
    return work.finish(spending)


class _Work:
    """The texts of one stage, from the first answers to the rows."""

    def __init__(
        self,
        session: Session,
        critic: Critic,
        prompts: Sequence[Prompted],
        helpful: Sequence[Prompted],
        options: CritiqueOptions,
    ) -> None:
        self._session, self._critic, self._options = session, critic, options
        self._prompts, self._helpful = prompts, helpful
        self._chains: list[Chain] = []
        self._extra: list[tuple[Prompted, str]] = []
        self._replies: list[Reply] = []

    def do(self) -> None:
        """Ask for everything, round by round."""
        session, critic, asker = self._session, self._critic, self._session.asker
        seed = session.stage.seed
        for prompted, (reply,) in zip(
            self._prompts,
            sample_answers(asker, critic.model, self._prompts, critic.sampling, count=1, seed=seed, kind="sample"),
            strict=True,
        ):
            self._replies.append(reply)
            self._chains.append(Chain(prompted, [reply.text], problem=self._check(reply)))
        for turn in range(self._options.rounds):
            self._replies += revise(asker, critic, self._chains, turn=turn)
            answers = [chain.answers[-1] for chain in self._chains if chain.problem is None]
            session.log(turn + 1, chains=len(answers), mean_chars=_mean([len(text) for text in answers]))
        self._ask_helpful()

    def finish(self, spending: Spending) -> Result:
        """Write everything; the run is finished."""
        session = self._session
        report = self.write(spending, complete=True)
        if not report["rows"]:
            raise DataError([*session.rejects.first] or "no revision is left", where=session.stage.recipe_path)
        metrics = {key: report[key] for key in ("rows", "broken_chains", "cut_off_share")}
        return session.finish(report["rows"], metrics=metrics, tokens=report["tokens"])

    def write(self, spending: Spending, *, complete: bool) -> dict[str, Any]:
        """Write the rows and the report of the rounds that are finished; return the report."""
        session = self._session
        for chain in self._chains:
            if chain.problem is not None:
                session.rejects.add(chain.prompted.place, f"round {len(chain.principles) + 1}: {chain.problem}")
        count = session.write_rows(self._rows())
        whole = [chain.answers for chain in self._chains if len(chain.answers) > 1]
        cut = sum(not reply.ended for reply in self._replies) / max(len(self._replies), 1)
        broken = sum(chain.problem is not None for chain in self._chains)
        tokens = sum(r.get("input_tokens", 0) + r.get("output_tokens", 0) for r in session.store.values())
        report = {
            "complete": complete,
            "prompts": len(self._prompts),
            "rows": count,
            "helpful_rows": len(self._extra),
            "broken_chains": broken,
            "left_out": session.rejects.count,
            "cut_off_share": cut,
            "quoted": self._critic.quote.count,
            "principles": dict(Counter(name for chain in self._chains for name in chain.principles)),
            "rounds": _describe_rounds(whole),
            "first_chains": [_show(chain) for chain in self._chains if chain.principles][:_SHOWN],
            "tokens": tokens,
            "spent": spending.to_dict() if spending.requests else None,
            "seconds": round(session.seconds, 3),
        }
        session.write_report(report)
        if cut > _MANY_CUT:
            console.warn(f"{session.stage.name}: {cut:.0%} of the texts were cut off; raise max_new_tokens")
        if broken:
            console.warn(f"{session.stage.name}: {broken} of {len(self._chains)} chains broke off (rejects.jsonl)")
        return report

    def _ask_helpful(self) -> None:
        helpful = self._options.helpful
        if helpful is None or not self._helpful:
            return
        session, critic = self._session, self._critic
        answers = sample_answers(
            session.asker, critic.model, self._helpful, critic.sampling,
            count=helpful.samples, seed=session.stage.seed, kind="helpful",
        )  # fmt: skip
        for prompted, replies in zip(self._helpful, answers, strict=True):
            for reply in replies:
                self._replies.append(reply)
                if (problem := self._check(reply)) is not None:
                    session.rejects.add(prompted.place, f"helpful: {problem}")
                else:
                    self._extra.append((prompted, reply.text))

    def _check(self, reply: Reply) -> str | None:
        return why_useless(reply, self._critic.model.control_tokens)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for chain in self._chains:
            for answer in chain.answers[1:]:
                yield make_row(chain.prompted.prompt, answer)
        for prompted, answer in self._extra:
            yield make_row(prompted.prompt, answer)


def _show(chain: Chain) -> dict[str, Any]:
    """Return a chain as the report keeps a few of them."""
    return {
        "prompt": chain.prompted.prompt,
        "answers": chain.answers,
        "principles": chain.principles,
        "critiques": chain.critiques,
    }


def _describe_rounds(chains: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Return, for the first answers and each round, how many texts there are, how long, and how many were changed."""
    rounds = []
    for turn in range(max((len(answers) for answers in chains), default=0)):
        there = [answers for answers in chains if len(answers) > turn]
        changed = [answers[turn] != answers[turn - 1] for answers in there] if turn else []
        rounds.append(
            {"round": turn, "texts": len(there), "mean_chars": _mean([len(answers[turn]) for answers in there])}
            | ({"changed_share": _mean(changed)} if turn else {})
        )
    return rounds


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
