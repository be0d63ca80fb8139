"""Chains of critiques and revisions: the supervised half of Constitutional AI (arXiv 2212.08073, section 3.1).

An answer is criticised and rewritten round after round, by a principle drawn each time; a revision takes the place of
the answer before it, so that the next round sees nothing of how it came about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignkit.data.rows import Message
from alignkit.feedback.asking import Job, Model, Reply, Sampling
from alignkit.feedback.constitution import Constitution
from alignkit.feedback.desk import Desk, seed_of
from alignkit.feedback.examples import Examples
from alignkit.feedback.principles import Principle
from alignkit.feedback.prompted import Prompted, why_useless
from alignkit.feedback.prompts import Request, ask_critique, ask_revision, conversation
from alignkit.feedback.quoting import Quoter


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


def revise(desk: Desk, critic: Critic, chains: Sequence[Chain], *, turn: int) -> list[Reply]:
    """Take every chain that goes on through one round; return what was written as revisions."""
    going = [chain for chain in chains if chain.problem is None]
    drawn = [critic.constitution.draw(seed=critic.seed, key=chain.prompted.key, turn=turn) for chain in going]
    if critic.critiques:
        replies = _ask(desk, critic, going, drawn, turn, "critique", lambda chain, principle: ask_critique(
            chain.turns, principle, critic.examples, critic.quote
        ))  # fmt: skip
        for chain, reply in zip(going, replies, strict=True):
            chain.problem = why_useless(reply, critic.model.control_tokens)
            chain.critique = reply.text
        kept = [place for place, chain in enumerate(going) if chain.problem is None]
        going, drawn = [going[place] for place in kept], [drawn[place] for place in kept]
    replies = _ask(desk, critic, going, drawn, turn, "revision", lambda chain, principle: ask_revision(
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
    desk: Desk,
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
    return desk.write(critic.model, jobs, critic.sampling, kind=kind, by="generator", about=about)
