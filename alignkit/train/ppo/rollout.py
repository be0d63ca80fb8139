"""From prompts to experience: sample answers, cut and score them, and read what policy, reference and critic say.

Each rank samples, scores and reads its share; all then hold the whole rollout, so that whitening, metrics and the KL
are those of one process. Legend: R answers of a rollout, N tokens of a batch, T tokens of the longest answer.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from alignkit import console
from alignkit.data import Row
from alignkit.errors import NonFiniteError
from alignkit.models.chat import Chat
from alignkit.models.logprobs import Batch, Sampling, pad_answers
from alignkit.recipe.methods import PpoOptions
from alignkit.rewards import join_columns
from alignkit.runs.signals import pulse
from alignkit.train import ranks
from alignkit.train.losses import measure_norm
from alignkit.train.ppo import answers as draws
from alignkit.train.ppo import math as maths
from alignkit.train.ppo.answers import Rewards, Rollout, finish_scores
from alignkit.train.ppo.roles import Critic, Roles, read_answers

_WINDOW = 4  # rollouts compared for signs of reward hacking: the first ones with the latest ones
_LARGEST_SCORE = 1e15  # the squares of float32 end at 3e38, those of a gradient of it before
_OTHER_PROMPTS = 2**31  # the seed of prompts that are taken before training lies beyond that of rollouts
_RESAMPLED = 2**32  # and that of prompts that take the place of others
# What answers are sampled for; with the seed and a number it names the random numbers they draw.
TRAINING, NORMALISATION, CHECK, HELD_OUT = range(4)


class KlTooLarge(Exception):
    """KL and step at which it passed `max_kl`; caught by the trainer, which goes back to the last good checkpoint."""


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
    learnt_RT: Tensor  # mask of the tokens that the policy learns from
    weights_RT: Tensor  # of their losses, in a sum that is divided by tokens or answers
    metrics: dict[str, float]


@dataclass
class HackingMonitor:
    """Says once when the reward has risen while length or repetition exploded."""

    start: list[dict[str, float]] = field(default_factory=list)
    latest: list[dict[str, float]] = field(default_factory=list)
    said: bool = False

    def look(self, metrics: dict[str, float]) -> str | None:
        """Take the metrics of a rollout; give the warning when it is due."""
        seen = {name: metrics[name] for name in ("reward", "response_length", "repetition")}
        if len(self.start) < _WINDOW:
            self.start.append(seen)
        self.latest = [*self.latest, seen][-_WINDOW:]
        if self.said or len(self.latest) < _WINDOW:
            return None
        both = self.start, self.latest
        before, now = ({name: sum(row[name] for row in rows) / len(rows) for name in seen} for rows in both)
        signs = []
        if now["response_length"] > 1.5 * before["response_length"]:
            signs.append(f"answers grew from {before['response_length']:.0f} to {now['response_length']:.0f} tokens")
        if now["repetition"] > before["repetition"] + 0.2:
            signs.append(f"repetition rose from {before['repetition']:.2f} to {now['repetition']:.2f}")
        if not signs or now["reward"] <= before["reward"]:
            return None
        self.said = True
        rise = f"the reward rose from {before['reward']:.3g} to {now['reward']:.3g} while {' and '.join(signs)}"
        return f"{rise}: the policy may be exploiting the reward; read samples.jsonl, raise kl_coef or set max_kl"


@dataclass
class Collector:
    """Makes rollouts; `generate` and `autocast` come from the trainer once it exists."""

    options: PpoOptions
    chat: Chat
    prompts: Dataset
    roles: Roles
    critic: Critic | None
    rewards: Rewards
    gold: Rewards | None
    sampling: Sampling
    truncation: tuple[int, int] | None  # a token, and the position from which on it ends an answer
    num_answers: int  # of one rollout
    micro_batch_size: int
    seed: int
    name: str
    norm: tuple[float, float] | None = None
    monitor: HackingMonitor = field(default_factory=HackingMonitor)
    # prompts, random numbers, repeats -> answers and, of an engine that is not the trainer, their log-probabilities
    generate: Callable[[list[list[int]], Tensor, int], tuple[list[list[int]], list[list[float]]]] = field(init=False)
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    piece_tokens: float = math.inf  # tokens of a forward pass, padding included
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # log-probabilities and values with their graphs

    def __post_init__(self) -> None:
        self.kl_coef, self.pad_id = self.options.kl_coef, self.chat.tokenizer.pad_token_id

    def sample(
        self, numbers: Sequence[int], draw: draws.Key, *, table: Dataset | None = None, repeats: int = 1
    ) -> Rollout:
        """Sample `repeats` answers to each of the numbered prompts; `draw` names the random numbers."""
        rows = [(table or self.prompts)[number] for number in numbers for _ in range(repeats)]
        prompt_ids = [list(row["prompt_ids"]) for row in rows]
        uniforms_RT = draws.draw_uniforms((self.seed, *draw), len(rows), self.options.max_new_tokens)
        # The answers of a prompt stay on one rank.
        mine, _ = ranks.share_out(range(len(numbers)))
        places = [place * repeats + turn for place in mine for turn in range(repeats)]
        made = ranks.gather(self.generate([prompt_ids[place] for place in places], uniforms_RT[places], repeats))
        sampled, logps = ([list(one) for part in made for one in part[kind]][: len(rows)] for kind in (0, 1))
        prompts = [json.loads(row["prompt"]) for row in rows]
        rollout = self._as_rollout(prompts, prompt_ids, sampled, [row["columns"] for row in rows])
        rollout.engine_logps = [own[: len(ids)] for own, ids in zip(logps, rollout.sampled_ids, strict=bool(logps))]
        return rollout

    def score_answers(self, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """Reward and gold of given answers, for samples."""
        prompts, columns = [row.prompt for row in rows], [row.columns or "{}" for row in rows]
        rollout = self._as_rollout(prompts, self.chat.encode_prompts(prompts), list(map(list, answers)), columns)
        scores = {"reward": self.rewards(rollout)[0].tolist()}
        if self.gold is not None:
            scores["gold"] = self.gold(rollout)[0].tolist()
        return [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]

    def _as_rollout(
        self, prompts: list[Any], prompt_ids: list[list[int]], sampled: list[list[int]], columns: list[str]
    ) -> Rollout:
        stop_ids = self.sampling.stop_ids
        stops = [draws.cut_at_text(ids, self.options.stop or (), self.chat.tokenizer.decode) for ids in sampled]
        sampled = [ids[:end] for ids, end in zip(sampled, stops, strict=True)]
        cut = (draws.cut_answer(ids, stop_ids=stop_ids, truncation=self.truncation) for ids in sampled)
        kept, ended = zip(*cut, strict=True)
        texts = self.chat.tokenizer.batch_decode(list(kept), skip_special_tokens=True)
        completions: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return Rollout(
            prompts=prompts, prompt_ids=prompt_ids, completion_ids=list(kept), completions=completions,
            ended=[over or end is not None for over, end in zip(ended, stops, strict=True)],
            columns=join_columns(columns), sampled_ids=sampled,
        )  # fmt: skip

    def prepare(self) -> None:
        """Measure the normalisation of the reward on answers of the starting policy, once, before training."""
        if self.options.reward_normalize == "none" or self.norm is not None:
            return
        count, size = self.options.reward_normalize_rows, self.num_answers
        numbers = draws.prompt_numbers(0, count, num_prompts=len(self.prompts), seed=self.seed + _OTHER_PROMPTS)
        rollouts = (self.sample(numbers[at : at + size], (NORMALISATION, at)) for at in range(0, count, size))
        totals = [self.rewards(rollout)[0] for rollout in rollouts]
        self.norm = gain, bias = measure_norm(torch.cat(totals), self.options.reward_normalize)
        if self.critic is not None and self.critic.from_reward:
            self.critic.rescale(gain, bias)
        what = f"reward normalised on {count} answers of the starting policy: {gain:.4g} r {bias:+.4g}"
        console.note(f"{self.name}: {what}")

    def collect(self, number: int, model: Any, *, step: int, keep: bool = False) -> Experience:
        """Make rollout `number` of the run and take its KL into account; raises KlTooLarge beyond `max_kl`."""
        repeats, count = self.options.answers_per_prompt, self.num_answers // self.options.answers_per_prompt
        numbers = draws.prompt_numbers(number * count, count, num_prompts=len(self.prompts), seed=self.seed)
        pulse("sampling answers", step)
        rollout = self.sample(numbers, (TRAINING, number), repeats=repeats)
        pulse("scoring answers", step)
        scored = self.rewards(rollout)
        resampled = self._resample(number, rollout, scored)
        experience = self.examine(rollout, model, scored, keep=keep)
        if self.options.dynamic_sampling:
            experience.metrics["resampled_groups"] = resampled
        kl = experience.metrics["objective/kl"]
        target, horizon = self.options.kl_target, self.options.kl_horizon
        self.kl_coef = maths.adapt_kl_coef(self.kl_coef, kl, len(rollout), target=target, horizon=horizon)
        if self.options.max_kl is not None and kl > self.options.max_kl:
            raise KlTooLarge(kl, step)
        first = judge_first(self.options, rollout.ended, experience.scores_R.tolist()) if number == 0 else None
        for warning in filter(None, (first, self.monitor.look(experience.metrics))):
            console.warn(f"{self.name}: {warning}")
        return experience

    def _resample(self, number: int, rollout: Rollout, scored: tuple[Tensor, dict[str, Tensor]]) -> int:
        """Replace groups whose answers all have one reward by those of other prompts, in place; says how many. Prompts
        and random numbers depend on the rollout's number alone, as a resumed run needs."""
        (total_R, parts), repeats, replaced = scored, self.options.answers_per_prompt, 0
        turns = self.options.dynamic_sampling or 0
        for turn in range(1, turns + 1):
            groups_PG = total_R.view(-1, repeats)
            flat = (groups_PG == groups_PG[:, :1]).all(dim=1).nonzero().flatten().tolist()
            if not flat:
                break
            first, seed = (number * turns + turn - 1) * len(groups_PG), self.seed + _RESAMPLED
            numbers = draws.prompt_numbers(first, len(flat), num_prompts=len(self.prompts), seed=seed)
            others = self.sample(numbers, (TRAINING, number, turn), repeats=repeats)
            other_R, other_parts = self.rewards(others)
            rows = [group * repeats + place for group in flat for place in range(repeats)]
            rollout.replace(rows, others)
            total_R[rows] = other_R
            for name, part_R in parts.items():
                part_R[rows] = other_parts[name]
            replaced += len(flat)
        return replaced

    def examine(
        self, rollout: Rollout, model: Any, scored: tuple[Tensor, dict[str, Tensor]] | None = None, *,
        keep: bool = False,
    ) -> Experience:  # fmt: skip
        """Score a rollout, read what the models say about it, and estimate the advantages; changes no state."""
        options, coef = self.options, self.kl_coef
        total_R, parts = scored or self.rewards(rollout)
        lengths = list(map(len, rollout.sampled_ids))
        scores_R = finish_scores(options, total_R, rollout.ended, self.norm, lengths)
        if abs(score := float(scores_R[top := int(scores_R.abs().argmax())])) > _LARGEST_SCORE:
            what = f"the reward of answer {top} of this rollout is {score:g}, too large for what PPO squares (at most "
            raise NonFiniteError(f"{what}{_LARGEST_SCORE:g}); scale it with `weight:`, or set reward_clip")
        mask_RT, logps_RT, ref_logps_RT, entropy_RT, values_RT = self.read(rollout, model, keep=keep)
        in_reward = coef if options.kl_in == "reward" else 0.0
        rewards_RT = maths.shaped_rewards(scores_R, logps_RT, ref_logps_RT, mask_RT, kl_coef=in_reward)
        if options.whiten_rewards:
            rewards_RT = maths.whiten(rewards_RT, mask_RT, shift_mean=False)
        metrics: dict[str, float] = {}
        if values_RT is not None:
            advantages_RT, returns_RT = maths.gae(rewards_RT, values_RT, mask_RT, gamma=options.gamma, lam=options.lam)
            metrics["explained_variance"] = maths.explained_variance(values_RT, returns_RT, mask_RT)
            metrics["value"] = float(maths.masked_mean(values_RT, mask_RT))
        else:
            values_RT = returns_RT = torch.zeros_like(rewards_RT)
            sums_R, size = rewards_RT.sum(dim=1), options.answers_per_prompt
            advantages_R = maths.group_advantages(sums_R, size, options.advantage, scale=options.scale_rewards)
            advantages_RT = advantages_R[:, None] * mask_RT
            if size > 1:
                groups_PG = total_R.view(-1, size)
                metrics["flat_groups"] = float((groups_PG == groups_PG[:, :1]).all(dim=1).float().mean())
        # The baseline of rloo and the z-score of grpo are their own scale.
        if options.whiten_advantages and options.advantage in ("gae", "reinforce"):
            advantages_RT = maths.whiten(advantages_RT, mask_RT)
        kl = float(maths.sequence_kl(logps_RT, ref_logps_RT, mask_RT).mean())
        metrics |= {
            "reward": float(total_R.mean()), "objective/score": float(scores_R.mean()), "objective/kl": kl,
            "objective/reward": float(scores_R.mean()) - coef * kl, "sqrt_kl": max(kl, 0.0) ** 0.5, "kl_coef": coef,
            "entropy": float(maths.masked_mean(entropy_RT, mask_RT)), "response_length": sum(lengths) / len(rollout),
            "ended_share": sum(rollout.ended) / len(rollout), "repetition": draws.repetition(rollout.completion_ids),
        }  # fmt: skip
        if len(parts) > 1:
            metrics |= {f"reward/{name}": float(part.mean()) for name, part in parts.items()}
        if self.gold is not None:
            metrics["gold"] = float(self.gold(rollout)[0].mean())
        learnt_RT = mask_RT
        if options.overlong is not None and options.overlong.filter:
            learnt_RT = mask_RT * torch.tensor(rollout.ended, dtype=mask_RT.dtype)[:, None]
            metrics["filtered_share"] = 1 - metrics["ended_share"]
        weights_RT = maths.token_weights(learnt_RT, options.loss_normalization, longest=options.max_new_tokens)
        if rollout.engine_logps and options.generation.importance_cap is not None:
            # Truncated importance sampling (Ionides 2008; Yao et al. 2025, "Your efficient RL framework secretly brings
            # you off-policy RL training"): p(trainer) / p(engine), 1 where the engine's is not a number.
            ratio_RT = torch.ones_like(logps_RT)
            for row, own in enumerate(rollout.engine_logps):
                engine_T = torch.tensor([torch.nan if logp is None else logp for logp in own])
                ratio_RT[row, : len(own)] = (logps_RT[row, : len(own)] - engine_T).exp().nan_to_num(1.0)
            ratio_RT = ratio_RT.clamp(max=options.generation.importance_cap)
            weights_RT = weights_RT * ratio_RT
            metrics["engine_ratio"] = float(maths.masked_mean(ratio_RT, mask_RT))
        return Experience(
            rollout, scores_R, mask_RT, logps_RT, ref_logps_RT, values_RT, advantages_RT, returns_RT, learnt_RT,
            weights_RT, metrics,
        )  # fmt: skip

    def read(
        self, rollout: Rollout, model: Any, *, keep: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Read mask, log-probs, the reference's log-probs, entropies and values, each (R, T) on the CPU. `keep`: what
        this rank has read of policy and critic stays in `kept`, a piece at a time, to be trained from."""
        longest = max(map(len, rollout.sampled_ids))
        columns = torch.zeros(5, len(rollout), longest)
        # In the micro batches of the first epoch, so that its first ratio is computed alike on both sides.
        order = draws.sort_steps(np.arange(len(rollout)), rollout.lengths, step_size=self.options.batch_size)
        mine, num_own = ranks.share_out(range(0, len(rollout), self.micro_batch_size))
        for number, start in enumerate(mine):
            for rows, batch in self.pieces(rollout, order[start : start + self.micro_batch_size].tolist(), longest):
                with self.autocast():
                    ref_logps_N = self.roles.reference_logps(batch)
                    with torch.set_grad_enabled(keep):
                        logps_N, entropy_N, hidden_NH = read_answers(model, batch)
                        values_N = self.critic.values(batch, hidden_NH) if self.critic else torch.zeros_like(logps_N)
                if keep:
                    self.kept.append((logps_N, values_N))
                if number >= num_own:
                    continue
                for column, tensor in zip(columns[1:], (logps_N, ref_logps_N, entropy_N, values_N), strict=True):
                    column[rows] = batch.spread(tensor.detach().float()).cpu()
                columns[0, rows] = batch.mask_BT.float().cpu()
        mask_RT, logps_RT, ref_logps_RT, entropy_RT, values_RT = ranks.total(columns)  # 0 where others have read
        return mask_RT, logps_RT, ref_logps_RT, entropy_RT, values_RT if self.critic is not None else None

    def pieces(self, rollout: Rollout, rows: Sequence[int], longest: int) -> list[tuple[list[int], Batch]]:
        """Pad a micro batch for forward passes: whole, or in pieces of `piece_tokens`, the longest answers first. A CPU
        is as fast with a few hundred tokens as with thousands, and they hold less padding and fewer activations."""
        lengths, parts = rollout.lengths, list[list[int]]()
        for row in sorted(rows, key=lambda row: -lengths[row]):
            if not parts or (len(parts[-1]) + 1) * lengths[parts[-1][0]] > self.piece_tokens:
                parts.append([])
            parts[-1].append(row)
        return [
            (part, pad_answers(
                [rollout.prompt_ids[row] for row in part], [rollout.sampled_ids[row] for row in part],
                pad_id=self.pad_id, device=self.roles.policy.device, num_columns=longest, sampling=self.sampling,
            ))
            for part in parts
        ]  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as plain data; floats survive JSON exactly."""
        return {"kl_coef": self.kl_coef, "norm": self.norm, "monitor": asdict(self.monitor)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; a fixed KL coefficient stays the recipe's, where a change may be allowed."""
        if self.options.kl_target is not None:
            self.kl_coef = state["kl_coef"]
        self.norm = None if state["norm"] is None else (state["norm"][0], state["norm"][1])
        self.monitor = HackingMonitor(**state["monitor"])


def judge_first(options: PpoOptions, ended: Sequence[bool], scores: Sequence[float]) -> str | None:
    """Say what is wrong with the first rollout where nothing can be learnt from it; `scores` are final."""
    if not any(ended):
        cut, rule = f"cut off at max_new_tokens ({options.max_new_tokens})", options.missing_eos
        what = f"all {len(ended)} answers of the first rollout are "
        what += "without the token of truncate" if options.truncate else cut
        what += f", and missing_eos gives each the score {rule.score:g}" if rule and rule.score is not None else ""
        return f"{what}; raise max_new_tokens, or start from a model that ends its answers"
    if len(scores) > 1 and len(set(scores)) == 1:
        return f"all {len(scores)} answers of the first rollout have the reward {scores[0]:g}: nothing tells them apart"
    return None
