"""One evaluation: which groups of metrics a model and its rows allow, and each of them measured.

It decides what is asked of which model; what a figure is stands in the file of the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.errors import EnvironmentProblem, JudgeError, UsageError
from alignkit.evaluate.context import Material, as_completion
from alignkit.evaluate.intervals import Figure, make_figure, mean_of_groups, place_figures, share
from alignkit.evaluate.judges import Judge, make_judge
from alignkit.evaluate.metrics.best_of import measure_best_of, measure_best_of_kl
from alignkit.evaluate.metrics.frontier import measure_optimum
from alignkit.evaluate.metrics.kl import measure_kl
from alignkit.evaluate.metrics.overlap import measure_bleu, measure_rouge
from alignkit.evaluate.metrics.pairs import measure_accuracy, measure_calibration, measure_length_baselines
from alignkit.evaluate.metrics.perplexity import measure_perplexity
from alignkit.evaluate.metrics.tasks import PREFIX, Item, measure_few_shot, measure_harness, read_task
from alignkit.evaluate.metrics.win_rate import measure_win_rate
from alignkit.evaluate.policy import Policy
from alignkit.evaluate.rewards import ModelReward, Reward, TrueReward, read_text
from alignkit.evaluate.target import find_subject, split_answer

_BUILTIN = "builtin:"


class Evaluation:
    """The groups of metrics of one model, each measured once."""

    def __init__(self, material: Material, *, judged: Path | None = None, lenient: bool = False) -> None:
        """Prepare to measure; `judged` is where the verdicts of a language model are kept.

        With `lenient` a group that was asked for and cannot be measured is left out with a warning.
        """
        self._material, self._judged, self._lenient = material, judged, lenient
        self._judge: Judge | None = None
        self._rival: Policy | None = None
        self._items: dict[str, list[Item]] = {}
        self.failure: JudgeError | None = None  # why there is no win rate
        self.subject, self.options, self.shelf = material.subject, material.options, material.shelf
        self._seed, self._folder, self._rows = material.seed, material.folder, material.rows
        self._groups: dict[str, Callable[[], list[Figure]]] = {
            "perplexity": self._perplexity,
            "pairs": self._pairs,
            "answers": self._answers,
            "kl": self._kl,
            "overlap": self._overlap,
            "win_rate": self._win_rate,
            "best_of": self._best_of,
            "frontier": self._frontier,
            "tasks": self._tasks,
        }

    def run(self) -> list[Figure]:
        """Measure every group; raises UsageError for a group that was asked for and cannot be measured.

        A judge that gives up takes nothing from the other groups: `failure` tells.
        """
        figures, chosen = [], self._choose()
        self._prepare(chosen)
        for name in chosen:
            console.note(f"{self.subject.name}: measuring {name}")
            try:
                figures += self._groups[name]()
            except EnvironmentProblem as problem:
                if self.options.metrics is not None or name != "overlap":
                    raise
                self.shelf.warn(str(problem))
            except JudgeError as failure:
                self.failure = failure
        return figures

    def _prepare(self, chosen: Sequence[str]) -> None:
        """Find out what is wrong with the judge, the other model and the tasks before anything is measured."""
        if "win_rate" in chosen:
            against = str(self.options.against)
            if find_subject(against, trust_code=self.shelf.trust_code).reward:
                raise UsageError(f"--against: {against} is a reward model, which says nothing")
            self._rival, self._judge = Policy(against, self.shelf), self._make_judge()
        for task in self.options.tasks if "tasks" in chosen else ():
            if not task.startswith(PREFIX):
                self._items[task] = read_task(Path(task).expanduser(), max_rows=self.options.max_rows)

    def _choose(self) -> list[str]:
        possible = {name: self._why_not(name) for name in self._groups}
        if self.options.metrics is None:
            needs_key = {
                "win_rate": self.options.against,
                "best_of": self.options.best_of,
                "frontier": self.options.frontier,
            }
            for name, given in needs_key.items():
                if given and (reason := possible[name]):
                    raise UsageError(f"{name} cannot be measured: {reason}")
            chosen = [name for name, reason in possible.items() if reason is None]
            if not chosen:
                raise UsageError(f"nothing can be measured: {'; '.join(str(why) for why in possible.values())}")
            return chosen
        problems = [f"{name}: {possible[name]}" for name in self.options.metrics if possible[name]]
        if problems and not self._lenient:
            raise UsageError(f"--metric {'; '.join(problems)}")
        for problem in problems:
            self.shelf.warn(f"not measured: {problem}")
        return [name for name in dict.fromkeys(self.options.metrics) if possible[name] is None]

    def _why_not(self, name: str) -> str | None:
        """Return why a group cannot be measured, or None."""
        options = self.options
        if name == "tasks":
            return self._policy_only() or (None if options.tasks else "no task is named (--task)")
        if not self._rows:
            return "there are no rows (--data)"
        if name == "pairs":
            if not self._material.pairs:
                return "the rows hold no pairs of answers"
            if not self.subject.reward and self._material.reference_source is None:
                return "an implicit reward needs a reference (--reference)"
            return None
        if reason := self._policy_only():
            return reason
        checks: dict[str, tuple[bool, str]] = {
            "perplexity": (any(row.completions for row in self._rows), "the rows hold no text to predict"),
            "answers": (bool(self._material.prompts), "the rows hold no prompts"),
            "kl": (bool(self._material.prompts) and self._material.reference_source is not None,
                   "it needs prompts and a reference (--reference)"),
            "overlap": (bool(self._material.referenced), "the rows hold no single right answer to compare with"),
            "win_rate": (bool(self._material.prompts) and options.against is not None,
                         "it needs prompts and another model (--against)"),
            "frontier": (bool(self._material.prompts) and bool(options.frontier) and self._material.reward is not None,
                         "it needs prompts, evaluate.frontier in the recipe and a reward (--reward)"),
            "best_of": (bool(self._material.prompts) and bool(options.best_of) and self._material.reward is not None,
                        "it needs prompts, numbers (--best-of) and a reward (--reward)"),
        }  # fmt: skip
        possible, reason = checks[name]
        return None if possible else reason

    def _policy_only(self) -> str | None:
        return f"{self.subject.name} is a reward model, which says nothing" if self.subject.reward else None

    def _place(self, figures: Sequence[Figure], **settings: Any) -> list[Figure]:
        return place_figures(figures, data=self._material.label, rows=len(self._rows), seed=self._seed, **settings)

    @property
    def _sampling(self) -> dict[str, Any]:
        return {"temperature": self.options.temperature, "max_new_tokens": self.options.max_new_tokens}

    def _perplexity(self) -> list[Figure]:
        whole = [row for row in self._rows if row.kind in ("text", "messages")]
        answered = [(prompt, answer) for row in self._rows if row.kind not in ("text", "messages")
                    for prompt, answer in [split_answer(row) or ("", None)] if answer is not None]  # fmt: skip
        likelihoods = self._material.policy.score_documents(whole) + self._material.policy.score_completions(
            [prompt for prompt, _ in answered], [answer for _, answer in answered]
        )
        if short := sum(not (item.tokens and item.num_bytes) for item in likelihoods):
            why = "no text of theirs has a token before it to be predicted from, or the model cannot read them whole"
            self.shelf.warn(f"perplexity leaves out {short} of {len(likelihoods)} texts: {why}")
        return self._place(measure_perplexity(likelihoods, resamples=self.options.resamples))

    def _pairs(self) -> list[Figure]:
        pairs, resamples = self._material.pairs, self.options.resamples
        prompts = [pair.prompt for pair in pairs for _ in range(2)]
        completions = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
        settings: dict[str, Any] = {}
        if self.subject.reward:
            metric = "reward_accuracy"
            rewards = ModelReward(self.subject.source, self.shelf).score_fitting(prompts, completions)
        else:
            metric, beta = "implicit_reward_accuracy", self.subject.beta
            ours = self._material.policy.score_completions(prompts, completions)
            theirs = self._material.reference.score_completions(prompts, completions)
            both = zip(ours, theirs, strict=True)
            rewards = [beta * (a.logp - b.logp) if a.tokens and b.tokens else None for a, b in both]
            settings = {"reference": self._material.reference_source, "beta": beta}
        sides = list(zip(rewards[::2], rewards[1::2], strict=True))
        kept = [(pair, a - b) for pair, (a, b) in zip(pairs, sides, strict=True) if a is not None and b is not None]
        if len(kept) < len(pairs):
            self.shelf.warn(f"{len(pairs) - len(kept)} of {len(pairs)} pairs are too long for {self.subject.name}")
        pairs, margins = [pair for pair, _ in kept], [margin for _, margin in kept]
        measured = [
            *measure_accuracy(metric, pairs, margins, resamples=resamples),
            *measure_calibration(margins, [pair.group for pair in pairs], resamples=resamples),
        ]
        lengths = measure_length_baselines(pairs, resamples=resamples)
        return [*self._place(measured, **settings), *self._place(lengths)]

    def _answers(self) -> list[Figure]:
        answers = [group[: self.options.samples] for group in self._material.sampled]
        resamples = self.options.resamples
        tokens = [[float(len(answer.ids)) for answer in group] for group in answers]
        lengths = mean_of_groups(tokens, resamples=resamples)
        ended = share([[float(answer.ended) for answer in group] for group in answers], resamples=resamples)
        figures = [
            make_figure("response_length", lengths, unit="tokens"),
            make_figure("ended_share", ended, unit="share"),
        ]
        rewards: list[Reward] = [TrueReward()] if self._material.is_toy else []
        if self._material.reward is not None and self._material.reward.name not in [reward.name for reward in rewards]:
            rewards.append(self._material.reward)
        for reward in rewards:
            found = mean_of_groups(self._material.score(reward, answers), resamples=resamples)
            name = reward.name if isinstance(reward, TrueReward) else f"reward/{reward.name}"
            figures.append(make_figure(name, found, better="higher"))
        return self._place(figures, samples=self.options.samples, **self._sampling)

    def _kl(self) -> list[Figure]:
        answers = [group[: self.options.samples] for group in self._material.sampled]
        temperature = self.options.temperature
        ours = self._material.policy.score_answers(self._material.prompts, answers, temperature=temperature)
        theirs = self._material.reference.score_answers(self._material.prompts, answers, temperature=temperature)
        figures = measure_kl(ours, theirs, resamples=self.options.resamples)
        reference = {"reference": self._material.reference_source, "samples": self.options.samples}
        return self._place(figures, **reference, **self._sampling)

    def _overlap(self) -> list[Figure]:
        limit = self.options.max_new_tokens
        prompts = [prompt for prompt, _ in self._material.referenced]
        answers = [group[0].text for group in self._material.policy.answer(prompts, max_new_tokens=limit)]
        references = [read_text(answer) for _, answer in self._material.referenced]
        figures = [
            *measure_rouge(answers, references, resamples=self.options.resamples),
            *measure_bleu(answers, references, resamples=self.options.resamples),
        ]
        return self._place(figures, temperature=0.0, max_new_tokens=limit)

    def _win_rate(self) -> list[Figure]:
        against, rival, judge = self.options.against, self._rival, self._judge
        assert rival is not None and judge is not None
        ours = [group[0].text for group in self._material.sampled]
        theirs = [group[0].text for group in self._material.sample(rival, 1)]
        prompts = self._material.prompts
        figures = measure_win_rate(
            judge,
            prompts,
            [as_completion(prompt, text) for prompt, text in zip(prompts, ours, strict=True)],
            [as_completion(prompt, text) for prompt, text in zip(prompts, theirs, strict=True)],
            resamples=self.options.resamples,
        )
        return self._place(figures, against=against, judge=judge.name, **judge.settings, **self._sampling)

    def _make_judge(self) -> Judge:
        reward, store = self._material.reward, self._judged
        return make_judge(self.options, self.shelf, reward=reward, folder=self._folder, seed=self._seed, store=store)

    def _best_of(self) -> list[Figure]:
        reward = self._material.reward
        assert reward is not None
        scores = self._material.score(reward, self._material.sampled)
        watched = {}
        if self._material.is_toy and not isinstance(reward, TrueReward):
            watched["true_reward"] = self._material.score(TrueReward(), self._material.sampled)
        figures = measure_best_of(self.options.best_of, scores, watched, resamples=self.options.resamples)
        return self._place(figures, reward=reward.name, answers=max(self.options.best_of), **self._sampling)

    def _frontier(self) -> list[Figure]:
        frontier, reward, resamples = self.options.frontier, self._material.reward, self.options.resamples
        assert frontier is not None and reward is not None
        number = max([frontier.answers, *frontier.best_of])
        answers = self._material.sample(self._material.policy, number)
        scores = self._material.score(reward, answers)
        figures, warnings = measure_optimum(frontier.betas, scores, resamples=resamples)
        for message in warnings:
            self.shelf.warn(message)
        figures += measure_best_of(frontier.best_of, scores, {}, resamples=resamples)
        figures += measure_best_of_kl(frontier.best_of, scores, resamples=resamples)
        return self._place(figures, reward=reward.name, answers=number, **self._sampling)

    def _tasks(self) -> list[Figure]:
        options, figures = self.options, []
        for task in options.tasks:
            if task.startswith(PREFIX):
                found = measure_harness(
                    self._material.policy,
                    task.removeprefix(PREFIX),
                    shots=options.shots,
                    max_rows=options.max_rows,
                    batch_size=options.batch_size,
                    seed=self._seed,
                )
            else:
                found = measure_few_shot(
                    self._material.policy, self._items[task], shots=options.shots, seed=self._seed,
                    resamples=options.resamples,
                )  # fmt: skip
            figures += place_figures(found, data=task, max_rows=options.max_rows, seed=self._seed)
        return figures
