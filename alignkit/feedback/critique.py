"""The critique stage: answers criticised and revised by a constitution, as rows for an sft stage (SL-CAI).

arXiv 2212.08073, section 3: an answer is criticised and rewritten round after round, by a principle drawn each time;
the next round sees nothing of how a revision came about. Rows are the revisions of all rounds, and plain answers to
helpful prompts. With `replay:` they come from published chains and nobody is asked.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.data import DataReport, Rejects, Text, read_rows
from alignkit.data.load import read_published
from alignkit.data.rows import Message
from alignkit.errors import DataError
from alignkit.feedback import stage as work
from alignkit.feedback.cache import seed_of
from alignkit.feedback.constitution import Principle, load_constitution, load_examples
from alignkit.feedback.prompts import Quoter, Request, ask_critique, ask_revision, conversation
from alignkit.feedback.writer import Job, Model, Reply, Sampling
from alignkit.recipe.methods import CritiqueOptions
from alignkit.recipe.stage import Stage
from alignkit.runs.directory import Result, RunDir, list_changes

_SHOWN = 4  # chains whose texts stand in the report
_MANY_CUT = 0.2  # share of texts cut off by max_new_tokens that is worth a warning


def run(stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()) -> Result:
    """Make the rows of a critique stage; see `run_work`."""
    return work.run_work(stage, run_dir, _read, allow_change=allow_change)


def find_changes(stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()) -> list[str]:
    """Say how a stage differs from the run that has begun there, "key: before -> now"; reads all of its rows."""
    return list(list_changes(RunDir(run_dir), _read(stage).facts, allow_change=allow_change).values())


def _read(stage: Stage) -> work.Work:
    return _Replay(stage) if stage.expect(CritiqueOptions).replay else _Critique(stage)


@dataclass
class Chain:
    """An answer on its way through the rounds; it ends early when something that can be no text comes back."""

    prompt: Text
    answers: list[str]  # the first answer, then the revisions
    place: str = ""
    key: str = ""
    problem: str | None = None
    principles: list[str] = field(default_factory=list)
    critiques: list[str] = field(default_factory=list)  # empty texts where none are asked for

    @property
    def conversation(self) -> list[Message]:
        """The conversation with the newest answer at its end."""
        return [*conversation(self.prompt), Message(role="assistant", content=self.answers[-1].strip())]


class _Critique:
    """Chains of one stage, from the first answers to the rows."""

    nothing = "no revision is left"

    def __init__(self, stage: Stage) -> None:
        """Read prompts, principles and examples; raises DataError and RecipeError for what cannot be used."""
        self._options = options = stage.expect(CritiqueOptions)
        self._constitution = load_constitution(options.constitution or (), needs="critique")
        self._examples = load_examples(options.examples)
        self._generator = options.generator or work.own_model(stage)
        self.report, self.rejects, helpful_report = DataReport(), Rejects(), DataReport()
        reading: dict[str, Any] = {"rejects": self.rejects, "template": work.speaks_chat(self._generator)}
        self._rows = list(read_rows(stage, options.data, report=self.report, **reading))
        helpful = read_rows(stage, options.helpful.data, report=helpful_report, **reading) if options.helpful else ()
        self._helpful_rows = list(helpful)
        self.facts = {
            "method": "critique", "seed": stage.seed, "generator": work.describe_source(self._generator),
            "constitution": self._constitution.fingerprint, "examples": self._examples.fingerprint,
            "rounds": options.rounds, "critiques": options.critiques, **Sampling.of(options).settings,
            "helpful_samples": options.helpful.samples if options.helpful else 0, "data": self.report.fingerprint,
            "helpful_data": helpful_report.fingerprint,
        }  # fmt: skip
        self._chains: list[Chain] = []
        self._extra: list[dict[str, Any]] = []  # rows of helpful answers
        self._replies: list[Reply] = []

    def open(self, session: work.Session) -> str:
        self._session = session
        self._model: Model = session.open(self._generator, ("generator",))
        self._quote = Quoter(self._model.control_tokens)
        self._sampling = Sampling.of(self._options)
        tokens, rows = self._model.control_tokens, self._helpful_rows
        self._prompts = work.list_prompts(self._rows, self.rejects, tokens)
        self._helpful = work.list_prompts(rows, self.rejects, tokens) if rows else []
        return f"{len(self._prompts)} prompts, {len(self._constitution.principles)} principles"

    def do(self) -> None:
        """Ask for everything, round by round."""
        for prompted, (reply,) in zip(self._prompts, self._sample(self._prompts, 1, "sample"), strict=True):
            problem = self._check(reply)
            self._chains.append(Chain(prompted.prompt, [reply.text], prompted.place, prompted.key, problem))
        for number in range(self._options.rounds):
            self._revise(number)
            lengths = [len(chain.answers[-1]) for chain in self._chains if chain.problem is None]
            self._session.log(number + 1, chains=len(lengths), mean_chars=_mean(lengths))
        samples = self._options.helpful.samples if self._options.helpful else 0
        found = self._sample(self._helpful, samples, "helpful") if self._helpful else []
        for prompted, own in zip(self._helpful, found, strict=True):
            for reply in own:
                if problem := self._check(reply):
                    self.rejects.add(prompted.place, f"helpful: {problem}")
                else:
                    self._extra.append(_make_row(prompted.prompt, reply.text))

    def write(self, *, complete: bool) -> dict[str, Any]:
        name = self._session.stage.name
        broken = [chain for chain in self._chains if chain.problem is not None]
        for chain in broken:
            self.rejects.add(chain.place, f"round {len(chain.principles) + 1}: {chain.problem}")
        cut = _mean([not reply.ended for reply in self._replies])
        if cut > _MANY_CUT:
            console.warn(f"{name}: {cut:.0%} of the texts were cut off; raise max_new_tokens")
        if broken:
            console.warn(f"{name}: {len(broken)} of {len(self._chains)} chains broke off (rejects.jsonl)")
        return {
            "prompts": len(self._prompts), "rows": self._session.write_rows([*_list_rows(self._chains), *self._extra]),
            "helpful_rows": len(self._extra), "broken_chains": len(broken), "cut_off_share": cut,
            "quoted": self._quote.count, **_describe_chains(self._chains),
            "spent": self._model.spending.to_dict() if self._model.spending else None,
        }  # fmt: skip

    def measure(self, report: Mapping[str, Any]) -> dict[str, float]:
        return {key: report[key] for key in ("rows", "broken_chains", "cut_off_share")}

    def _sample(self, prompts: Sequence[work.Prompted], count: int, kind: str) -> list[list[Reply]]:
        replies = work.sample_answers(self._session, self._model, prompts, self._sampling, count=count, kind=kind)
        self._replies += [reply for own in replies for reply in own]
        return replies

    def _revise(self, number: int) -> None:
        draw, seed, examples, quote = self._constitution.draw, self._session.stage.seed, self._examples, self._quote
        going = [(chain, draw(seed=seed, key=chain.key, turn=number)) for chain in self._chains if not chain.problem]
        said: dict[str, str] = {}  # critiques by the keys of their chains
        if self._options.critiques:
            requests = [ask_critique(chain.conversation, by, examples, quote) for chain, by in going]
            for (chain, _), reply in zip(going, self._ask(going, requests, number, "critique"), strict=True):
                chain.problem, said[chain.key] = self._check(reply), reply.text
            going = [(chain, principle) for chain, principle in going if not chain.problem]
        requests = [ask_revision(each.conversation, said.get(each.key), by, examples, quote) for each, by in going]
        for (chain, principle), reply in zip(going, self._ask(going, requests, number, "revision"), strict=True):
            self._replies.append(reply)
            chain.problem = self._check(reply)
            if chain.problem is None:
                chain.answers.append(reply.text)
                chain.principles.append(principle.name)
                chain.critiques.append(said.get(chain.key, ""))

    def _ask(
        self, going: Sequence[tuple[Chain, Principle]], requests: Sequence[Request], number: int, kind: str
    ) -> list[Reply]:
        jobs, about = [], []
        for (chain, principle), request in zip(going, requests, strict=True):
            jobs.append(Job(request, seed_of(self._session.stage.seed, kind, number, chain.key)))
            about.append({"place": chain.place, "round": number, "principle": principle.name})
        return self._session.asker.write(self._model, jobs, self._sampling, kind=kind, by="generator", about=about)

    def _check(self, reply: Reply) -> str | None:
        return work.why_useless(reply, self._model.control_tokens)


class _Replay:
    """Published chains, `samples_*_SLMADISON.jsonl` of the Constitutional AI paper, as rows."""

    def __init__(self, stage: Stage) -> None:
        self._options = options = stage.expect(CritiqueOptions)
        self.nothing = f"{', '.join(options.replay or ())} holds no chains"
        self.report, self.rejects = DataReport(), Rejects()
        self.facts = {"method": "critique", "replay": [work.fingerprint_file(path) for path in options.replay or ()]}

    def open(self, session: work.Session) -> str:
        """Read the chains; rows that hold none are rejected with on_bad_row: skip, else refused: DataError."""
        self._session = session
        what = "published chain {rl_prompt, initial_response, cst: [{cst_key, critique, revision}]}"
        skip = self._options.on_bad_row == "skip"
        self._chains = [
            chain
            for path in self._options.replay or ()
            for _, chain in read_published(Path(path), _read_chain, what, skip=skip, rejects=self.rejects)
        ]
        if not self._chains:
            raise DataError("holds no chains", where=", ".join(self._options.replay or ()))
        return f"{len(self._chains)} published chains"

    def do(self) -> None:
        """Nobody is asked."""

    def write(self, *, complete: bool) -> dict[str, Any]:
        count = self._session.write_rows(_list_rows(self._chains))
        return {"chains": len(self._chains), "rows": count, **_describe_chains(self._chains)}

    def measure(self, report: Mapping[str, Any]) -> dict[str, float]:
        return {key: report[key] for key in ("chains", "rows")}


def _read_chain(data: Any) -> Chain:
    if not data["cst"]:
        raise ValueError("no revisions")
    answers = [data["initial_response"][0]["sample"], *(step["revision"]["sample"] for step in data["cst"])]
    names = [str(step["cst_key"]) for step in data["cst"]]
    return Chain(conversation(data["rl_prompt"]), [answer.strip() for answer in answers], principles=names)


def _describe_chains(chains: Sequence[Chain]) -> dict[str, Any]:
    """Describe principles, the first answers and each round: texts, their length, and how many were changed."""
    revised, rounds = [chain for chain in chains if chain.principles], list[dict[str, Any]]()
    for number in range(max((len(chain.answers) for chain in revised), default=0)):
        there = [chain.answers for chain in revised if len(chain.answers) > number]
        lengths = [len(answers[number]) for answers in there]
        rounds.append({"round": number, "texts": len(there), "mean_chars": _mean(lengths)})
        if number:
            rounds[-1]["changed_share"] = _mean([answers[number] != answers[number - 1] for answers in there])
    keys = ("prompt", "answers", "principles", "critiques")
    return {
        "principles": dict(Counter(name for chain in revised for name in chain.principles)),
        "rounds": rounds,
        "first_chains": [{key: getattr(chain, key) for key in keys} for chain in revised[:_SHOWN]],
    }


def _list_rows(chains: Sequence[Chain]) -> list[dict[str, Any]]:
    return [_make_row(chain.prompt, answer) for chain in chains for answer in chain.answers[1:]]


def _make_row(prompt: Text, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": work.make_answer(prompt, answer)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
