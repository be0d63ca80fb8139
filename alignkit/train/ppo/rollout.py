"""From prompts to experience: sample answers, cut and score them, and read what policy, reference and critic say.

Each rank samples, scores and reads its share; all then hold the whole rollout, so that whitening, metrics and the KL
are those of one process.

Legend: R answers of a rollout, B of a batch, T tokens of the longest answer.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LogitsProcessor, LogitsProcessorList

from alignkit import console
from alignkit.data import Row
from alignkit.errors import NonFiniteError
from alignkit.models.chat import Chat
from alignkit.models.generation import plainly
from alignkit.models.logprobs import Sampling, pad_answers
from alignkit.recipe.schema import PpoOptions
from alignkit.rewards.base import Answers
from alignkit.runs.heartbeat import pulse
from alignkit.train import ranks
from alignkit.train.ppo.critic import Critic
from alignkit.train.ppo.math import (
    KlController,
    explained_variance,
    gae,
    group_advantages,
    masked_mean,
    sequence_kl,
    shaped_rewards,
    whiten,
)
from alignkit.train.ppo.roles import Roles

if TYPE_CHECKING:
    from datasets import Dataset as Table

    from alignkit.train.rewards import Rewards


Key = tuple[int, ...]  # which answers these are: the run's seed, what they are for, and their number


def draw_uniforms(key: Key, num_answers: int, num_tokens: int) -> Tensor:
    """Return numbers in [0, 1), float32 (num_answers, num_tokens): one for every token an answer may have."""
    return torch.from_numpy(np.random.default_rng(key).random((num_answers, num_tokens), dtype=np.float32))


class InverseTransform(LogitsProcessor):
    """Choose each token where the cumulative distribution passes the answer's own number; greedy search then takes it.

    A multinomial draw would depend on which other answers are in the batch.
    """

    def __init__(self, uniforms_BT: Tensor, *, temperature: float) -> None:
        self._uniforms_BT, self._temperature, self._step = uniforms_BT, temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores, (B, vocabulary), that are 0 for the token drawn and -inf for all others."""
        cumulative_BV = (scores.float() / self._temperature).softmax(dim=-1).cumsum(dim=-1)
        total_B = cumulative_BV[:, -1]
        wanted_B = self._uniforms_BT[:, self._step].to(scores.device) * total_B
        wanted_B = torch.minimum(wanted_B, total_B.nextafter(torch.zeros_like(total_B)))  # rounding may reach the end
        tokens_B1 = torch.searchsorted(cumulative_BV, wanted_B[:, None], right=True)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B1, 0.0)


@contextmanager
def drawing(model: Any, uniforms_BT: Tensor, *, temperature: float, in_step: bool = False) -> Iterator[None]:
    """Let `model.generate` draw with these numbers, whoever calls it; `in_step`: until all ranks have finished."""
    generate = model.generate
    processors = LogitsProcessorList([InverseTransform(uniforms_BT, temperature=temperature)])

    def drawn(*args: Any, **kwargs: Any) -> Any:
        with plainly(model):
            return generate(*args, logits_processor=processors, synced_gpus=in_step, **kwargs)

    model.generate = drawn
    try:
        yield
    finally:
        del model.generate


def in_batches(
    generate: Callable[[list[list[int]], Tensor], list[list[int]]],
    prompts: Sequence[list[int]],
    uniforms_BT: Tensor,
    *,
    batch_size: int,
) -> list[list[int]]:
    """Return the answers to all prompts, sampled a batch at a time; prompts of like length come together."""
    answers: list[list[int]] = [[]] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        found = generate([prompts[place] for place in places], uniforms_BT[places])
        for place, ids in zip(places, found, strict=True):
            answers[place] = ids
    return answers


def join_columns(rows: Iterable[str]) -> dict[str, list[Any]]:
    """The `columns` of table rows as a reward function gets them: one list a name, None where a row has none."""
    read = [json.loads(text) for text in rows]
    names = dict.fromkeys(name for row in read for name in row)
    return {name: [row.get(name) for row in read] for name in names}


@dataclass
class Rollout(Answers):
    """Answers of the policy, one entry per answer; the answers of one prompt stand together.

    `completion_ids` and `completions` are what a reward sees: cut by `truncate`, stop token included where one came.
    `sampled_ids` is everything that was sampled; the KL is taken over all of it.
    """

    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    sampled_ids: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt with everything sampled after it."""
        return [len(prompt) + len(ids) for prompt, ids in zip(self.prompt_ids, self.sampled_ids, strict=True)]

    @property
    def whole_ids(self) -> list[list[int]]:
        """Prompt and answer of each row in one list."""
        return [prompt + answer for prompt, answer in zip(self.prompt_ids, self.completion_ids, strict=True)]


@dataclass(frozen=True)
class Truncation:
    """Cut an answer after the first `token` at or after position `after` (Ziegler 2019: '.' after 16 tokens)."""

    token: int
    after: int


def cut_answer(
    sampled: Sequence[int], *, stop_ids: Sequence[int], truncation: Truncation | None
) -> tuple[list[int], bool]:
    """Return the tokens a reward sees and whether the answer ended by itself.

    Without a truncation token an answer ends with a stop token; with one, only the truncation token counts.
    """
    if truncation is None:
        return list(sampled), bool(sampled) and sampled[-1] in stop_ids
    for position in range(truncation.after, len(sampled)):
        if sampled[position] == truncation.token:
            return list(sampled[: position + 1]), True
    return list(sampled), False


def repetition(answers: Sequence[Sequence[int]]) -> float:
    """Share of the bigrams that occurred before among all answers: 1 - distinct-2 (Li et al., arXiv 1510.03055)."""
    pairs = [pair for answer in answers for pair in zip(answer, answer[1:], strict=False)]
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


@dataclass
class Experience:
    """A rollout with what PPO needs of it; tensors lie on the CPU, in float32."""

    rollout: Rollout
    scores_R: Tensor
    mask_RT: Tensor
    logps_RT: Tensor
    ref_logps_RT: Tensor
    values_RT: Tensor  # zeros without a critic
    advantages_RT: Tensor
    returns_RT: Tensor
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def kl(self) -> float:
        """Mean KL to the reference in nats per sequence."""
        return float(sequence_kl(self.logps_RT, self.ref_logps_RT, self.mask_RT).mean())


def make_experience(
    options: PpoOptions,
    rollout: Rollout,
    scores_R: Tensor,
    *,
    mask_RT: Tensor,
    logps_RT: Tensor,
    ref_logps_RT: Tensor,
    values_RT: Tensor | None,
    kl_coef: float,
) -> Experience:
    """Shape the rewards and estimate the advantages; `scores_R` are normalised and final."""
    rewards_RT = shaped_rewards(scores_R, logps_RT, ref_logps_RT, mask_RT, kl_coef=kl_coef)
    if options.whiten_rewards:
        rewards_RT = whiten(rewards_RT, mask_RT, shift_mean=False)
    metrics: dict[str, float] = {}
    if values_RT is not None:
        advantages_RT, returns_RT = gae(rewards_RT, values_RT, mask_RT, gamma=options.gamma, lam=options.lam)
        metrics["explained_variance"] = explained_variance(values_RT, returns_RT, mask_RT)
        metrics["value"] = float(masked_mean(values_RT, mask_RT))
    else:
        values_RT = returns_RT = torch.zeros_like(rewards_RT)
        advantages_R = group_advantages(rewards_RT.sum(dim=1), options.answers_per_prompt, options.advantage)
        advantages_RT = advantages_R[:, None] * mask_RT
    # The baseline of rloo and the z-score of grpo are their own scale.
    if options.whiten_advantages and options.advantage in ("gae", "reinforce"):
        advantages_RT = whiten(advantages_RT, mask_RT)
    return Experience(rollout, scores_R, mask_RT, logps_RT, ref_logps_RT, values_RT, advantages_RT, returns_RT, metrics)


def finish_scores(
    options: PpoOptions, total_R: Tensor, ended: Sequence[bool], norm: tuple[float, float] | None
) -> Tensor:
    """Return the final score of each answer: normalised, clipped, and with what a missing end costs."""
    scores_R = total_R.float()
    if norm is not None:
        gain, bias = norm
        scores_R = gain * scores_R + bias
    if options.reward_clip is not None:
        scores_R = scores_R.clamp(-options.reward_clip, options.reward_clip)
    if options.missing_eos is not None:
        cut_R = ~torch.tensor(ended, dtype=torch.bool)
        if options.missing_eos.score is not None:
            scores_R = torch.where(cut_R, torch.full_like(scores_R, options.missing_eos.score), scores_R)
        else:
            scores_R = scores_R - cut_R * float(options.missing_eos.penalty or 0.0)
    return scores_R


def measure_norm(options: PpoOptions, rewards_R: Tensor) -> tuple[float, float]:
    """Return gain and bias that give these rewards mean 0, and with gain_and_bias deviation 1 (Ziegler 2019)."""
    gain = 1.0
    if options.reward_normalize == "gain_and_bias":
        gain = 1.0 / max(float(rewards_R.std(correction=0)), 1e-8)
    return gain, -gain * float(rewards_R.mean())


def answer_order(num_answers: int, *, seed: int, rollout: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch goes through a rollout, (R,).

    The first epoch keeps the rollout's own order: its prompts are in random order already, and the first minibatch is
    then computed as its log-probabilities were, so that its ratio is exactly 1.
    """
    if epoch == 0:
        return np.arange(num_answers)
    return np.random.default_rng((seed, rollout, epoch)).permutation(num_answers)


def sort_steps(rows: np.ndarray, lengths: Sequence[int], *, step_size: int) -> np.ndarray:
    """Sort the answers of each optimizer step by length, longest first: micro batches then hold little padding.

    A step's loss is a sum over its tokens, so that the order inside a step changes no more than rounding.
    """
    sizes = np.asarray(lengths)
    parts = [rows[start : start + step_size] for start in range(0, len(rows), step_size)]
    return np.concatenate([part[np.argsort(-sizes[part], kind="stable")] for part in parts])


def prompt_numbers(first: int, count: int, *, num_prompts: int, seed: int) -> list[int]:
    """Return places `first` to `first + count` of the endless stream of prompts: one shuffled pass after the other."""
    numbers: list[int] = []
    order: dict[int, np.ndarray] = {}
    for place in range(first, first + count):
        turn, offset = divmod(place, num_prompts)
        if turn not in order:
            order[turn] = np.random.default_rng((seed, turn)).permutation(num_prompts)
        numbers.append(int(order[turn][offset]))
    return numbers


_WINDOW = 4  # rollouts compared: the first ones with the latest ones
_LONGER = 1.5  # times the length at the start
_MORE_REPETITION = 0.2


class KlTooLarge(Exception):
    """The KL passed `max_kl`; caught by the trainer, which goes back to the last good checkpoint."""

    def __init__(self, kl: float, step: int) -> None:
        super().__init__(f"KL {kl:.3g} at step {step}")
        self.kl, self.step = kl, step


@dataclass
class HackingMonitor:
    """Says once when the reward has risen while length or repetition exploded."""

    start: list[dict[str, float]] = field(default_factory=list)
    latest: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    said: bool = False

    def look(self, metrics: dict[str, float]) -> str | None:
        """Take the metrics of a rollout; return the warning when it is due."""
        seen = {name: metrics[name] for name in ("reward", "response_length", "repetition")}
        if len(self.start) < _WINDOW:
            self.start.append(seen)
        self.latest.append(seen)
        if self.said or len(self.latest) < _WINDOW:
            return None
        before, now = _mean(self.start), _mean(list(self.latest))
        if now["reward"] <= before["reward"]:
            return None
        signs = []
        if now["response_length"] > _LONGER * before["response_length"]:
            signs.append(f"answers grew from {before['response_length']:.0f} to {now['response_length']:.0f} tokens")
        if now["repetition"] > before["repetition"] + _MORE_REPETITION:
            signs.append(f"repetition rose from {before['repetition']:.2f} to {now['repetition']:.2f}")
        if not signs:
            return None
        self.said = True
        return (
            f"the reward rose from {before['reward']:.3g} to {now['reward']:.3g} while {' and '.join(signs)}: the "
            "policy may be exploiting the reward; read samples.jsonl, raise kl_coef or set max_kl"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {"start": self.start, "latest": list(self.latest), "said": self.said}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `to_dict` gave."""
        self.start, self.said = list(state["start"]), bool(state["said"])
        self.latest = deque(state["latest"], maxlen=_WINDOW)


def judge_first(options: PpoOptions, ended: Sequence[bool], scores: Sequence[float]) -> str | None:
    """Return what is wrong with the first rollout where nothing can be learnt from it; `scores` are final."""
    if not any(ended):
        end = (
            "without the token of truncate"
            if options.truncate
            else f"cut off at max_new_tokens ({options.max_new_tokens})"
        )
        rule = options.missing_eos
        replaced = f", and missing_eos gives each the score {rule.score:g}" if rule and rule.score is not None else ""
        return (
            f"all {len(ended)} answers of the first rollout are {end}{replaced}; raise max_new_tokens, or start from a "
            "model that ends its answers"
        )
    if len(scores) > 1 and len(set(scores)) == 1:
        return f"all {len(scores)} answers of the first rollout have the reward {scores[0]:g}: nothing tells them apart"
    return None


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def require_finite_scores(scores: list[float], *, step: int) -> None:
    """Raise NonFiniteError naming the first answer whose reward is not a number."""
    for number, score in enumerate(scores):
        if score != score or score in (float("inf"), float("-inf")):
            raise NonFiniteError(
                f"step {step}: the reward of answer {number} is {score}; stopped before the optimizer step. Look at "
                "the reward on that answer (samples.jsonl has others)"
            )


_OTHER_PROMPTS = 2**31  # the seed of prompts that are taken before training lies beyond that of rollouts
Generate = Callable[[list[list[int]], Tensor, int], list[list[int]]]
# What answers are sampled for; with the seed and a number it names the random numbers they draw.
TRAINING, NORMALISATION, CHECK, HELD_OUT = range(4)


@dataclass
class Collector:
    """Makes rollouts; `generate` and `autocast` come from the trainer once it exists."""

    options: PpoOptions
    chat: Chat
    prompts: Table
    roles: Roles
    critic: Critic | None
    rewards: Rewards
    gold: Rewards | None
    sampling: Sampling
    truncation: Truncation | None
    num_answers: int  # of one rollout
    micro_batch_size: int
    seed: int
    name: str
    controller: KlController = field(init=False)
    norm: tuple[float, float] | None = None
    monitor: HackingMonitor = field(default_factory=HackingMonitor)
    generate: Generate = field(init=False)
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        options = self.options
        self.controller = KlController(options.kl_coef, options.kl_target, options.kl_horizon)

    # ---- sampling ----

    def sample(self, numbers: Sequence[int], draw: Key, *, table: Table | None = None, repeats: int = 1) -> Rollout:
        """Sample `repeats` answers to each of the numbered prompts; `draw` names the random numbers."""
        rows = [(table or self.prompts)[number] for number in numbers for _ in range(repeats)]
        prompt_ids = [list(row["prompt_ids"]) for row in rows]
        uniforms_RT = draw_uniforms((self.seed, *draw), len(rows), self.options.max_new_tokens)
        # The answers of a prompt stay on one rank.
        mine, _ = ranks.share_out(range(len(numbers)))
        places = [place * repeats + turn for place in mine for turn in range(repeats)]
        answers = self.generate([prompt_ids[place] for place in places], uniforms_RT[places], repeats)
        sampled = [list(ids) for part in ranks.gather(answers) for ids in part][: len(rows)]
        prompts = [json.loads(row["prompt"]) for row in rows]
        return self._as_rollout(prompts, prompt_ids, sampled, join_columns(row["columns"] for row in rows))

    def score_answers(self, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """Return reward and gold of given answers, for samples."""
        prompts = [row.prompt for row in rows]
        rollout = self._as_rollout(
            prompts,
            self.chat.encode_prompts(prompts),
            [list(ids) for ids in answers],
            join_columns(row.columns or "{}" for row in rows),
        )
        found = [{"reward": float(score)} for score in self.rewards(rollout).total_B]
        if self.gold is not None:
            for row, score in zip(found, self.gold(rollout).total_B, strict=True):
                row["gold"] = float(score)
        return found

    def _as_rollout(
        self, prompts: list[Any], prompt_ids: list[list[int]], sampled: list[list[int]], columns: dict[str, list[Any]]
    ) -> Rollout:
        stop_ids = self.sampling.stop_ids
        cut = [cut_answer(ids, stop_ids=stop_ids, truncation=self.truncation) for ids in sampled]
        texts = self.chat.tokenizer.batch_decode([ids for ids, _ in cut], skip_special_tokens=True)
        return Rollout(
            prompts=prompts,
            prompt_ids=prompt_ids,
            completion_ids=[ids for ids, _ in cut],
            completions=[
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, texts, strict=True)
            ],
            ended=[ended for _, ended in cut],
            columns=columns,
            sampled_ids=sampled,
        )

    def prepare(self) -> None:
        """Measure the normalisation of the reward on answers of the starting policy, once, before training."""
        if self.options.reward_normalize == "none" or self.norm is not None:
            return
        count = self.options.reward_normalize_rows
        numbers = prompt_numbers(0, count, num_prompts=len(self.prompts), seed=self.seed + _OTHER_PROMPTS)
        totals: list[Tensor] = []
        for start in range(0, count, self.num_answers):
            rollout = self.sample(numbers[start : start + self.num_answers], (NORMALISATION, start))
            totals.append(self.rewards(rollout).total_B.cpu())
        self.norm = measure_norm(self.options, torch.cat(totals))
        if self.critic is not None and self.critic.from_reward:
            self.critic.rescale(*self.norm)
        gain, bias = self.norm
        console.note(
            f"{self.name}: reward normalised on {count} answers of the starting policy: {gain:.4g} r {bias:+.4g}"
        )

    # ---- one rollout ----

    def collect(self, number: int, model: Any, *, step: int) -> Experience:
        """Make rollout `number` of the run and take its KL into account.

        Raises KlTooLarge beyond `max_kl`, NonFiniteError for rewards that are no numbers.
        """
        repeats = self.options.answers_per_prompt
        count = self.num_answers // repeats
        numbers = prompt_numbers(number * count, count, num_prompts=len(self.prompts), seed=self.seed)
        pulse("sampling answers", step)
        rollout = self.sample(numbers, (TRAINING, number), repeats=repeats)
        pulse("scoring answers", step)
        experience = self.examine(rollout, model, step=step)
        kl = experience.kl
        self.controller.update(kl, len(rollout))
        if self.options.max_kl is not None and kl > self.options.max_kl:
            raise KlTooLarge(kl, step)
        first = judge_first(self.options, rollout.ended, experience.scores_R.tolist()) if number == 0 else None
        for warning in filter(None, (first, self.monitor.look(experience.metrics))):
            console.warn(f"{self.name}: {warning}")
        return experience

    def examine(self, rollout: Rollout, model: Any, *, step: int) -> Experience:
        """Score a rollout and read what the models say about it; changes no state."""
        scored = self.rewards(rollout)
        total_R = scored.total_B.detach().float().cpu()
        require_finite_scores(total_R.tolist(), step=step)
        scores_R = finish_scores(self.options, total_R, rollout.ended, self.norm)
        mask_RT, logps_RT, ref_logps_RT, entropy_RT, values_RT = self.read(rollout, model)
        experience = make_experience(
            self.options,
            rollout,
            scores_R,
            mask_RT=mask_RT,
            logps_RT=logps_RT,
            ref_logps_RT=ref_logps_RT,
            values_RT=values_RT,
            kl_coef=self.controller.coef,
        )
        kl = experience.kl
        experience.metrics |= {
            "reward": float(total_R.mean()),
            "objective/score": float(scores_R.mean()),
            "objective/kl": kl,
            "objective/reward": float(scores_R.mean()) - self.controller.coef * kl,
            "sqrt_kl": max(kl, 0.0) ** 0.5,
            "kl_coef": self.controller.coef,
            "entropy": float(masked_mean(entropy_RT, mask_RT)),
            "response_length": sum(map(len, rollout.sampled_ids)) / len(rollout),
            "ended_share": sum(rollout.ended) / len(rollout),
            "repetition": repetition(rollout.completion_ids),
        }
        if len(scored.parts) > 1:
            experience.metrics |= {f"reward/{name}": float(part.float().mean()) for name, part in scored.parts.items()}
        if self.gold is not None:
            experience.metrics["gold"] = float(self.gold(rollout).total_B.float().mean())
        return experience

    @torch.no_grad()
    def read(self, rollout: Rollout, model: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return mask, log-probs, the reference's log-probs, entropies and values, each (R, T) on the CPU."""
        longest = max(map(len, rollout.sampled_ids))
        columns = torch.zeros(5, len(rollout), longest)
        # In the micro batches of the first epoch, so that its first ratio is computed alike on both sides.
        order = sort_steps(np.arange(len(rollout)), rollout.lengths, step_size=self.options.batch_size)
        mine, num_own = ranks.share_out(range(0, len(rollout), self.micro_batch_size))
        for number, start in enumerate(mine):
            rows = order[start : start + self.micro_batch_size]
            batch = self.batch(rollout, rows.tolist(), longest)
            with self.autocast():
                logps_N, entropy_N, hidden_NH = self.roles.policy_logps(model, batch)
                ref_logps_N = self.roles.reference_logps(batch)
                values_N = torch.zeros_like(logps_N)
                if self.critic is not None:
                    values_N = self.critic.values(batch, hidden_NH)
            if number >= num_own:
                continue
            for column, tensor in zip(columns[1:], (logps_N, ref_logps_N, entropy_N, values_N), strict=True):
                column[rows] = batch.spread(tensor.float()).cpu()
            columns[0, rows] = batch.mask_BT.float().cpu()
        mask_RT, logps_RT, ref_logps_RT, entropy_RT, values_RT = ranks.total(columns)  # 0 where others have read
        return mask_RT, logps_RT, ref_logps_RT, entropy_RT, values_RT if self.critic is not None else None

    def batch(self, rollout: Rollout, rows: Sequence[int], longest: int) -> Any:
        """Return answers of a rollout padded for a forward pass."""
        return pad_answers(
            [rollout.prompt_ids[row] for row in rows],
            [rollout.sampled_ids[row] for row in rows],
            pad_id=self.chat.tokenizer.pad_token_id,
            device=self.roles.policy.device,
            num_columns=longest,
            sampling=self.sampling,
        )

    # ---- checkpoints ----

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must know, as plain data; floats survive JSON exactly."""
        return {"kl_coef": self.controller.coef, "norm": self.norm, "monitor": self.monitor.to_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; a fixed KL coefficient stays the recipe's, where a change may be allowed."""
        if self.options.kl_target is not None:
            self.controller.coef = state["kl_coef"]
        self.norm = None if state["norm"] is None else (state["norm"][0], state["norm"][1])
        self.monitor.restore(state["monitor"])


class Turns(Dataset[dict[str, int]]):
    """The micro batches of a run by number; what is in them is sampled when their rollout comes."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"turn": number}


def never_called(**_: Any) -> list[float]:
    """Stand where GRPOTrainer wants a reward function: rewards are computed by the collector."""
    raise AssertionError("alignkit computes rewards itself")
