"""From prompts to experience: sample, cut, score, and read what policy, reference and critic say.

It holds what changes between rollouts (KL coefficient, reward normalisation, monitor), which is the same after a
resume. Each rank samples, scores and reads its share; all of them then hold the whole rollout, so that whitening,
metrics and the KL are those of one process. It trains nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from alignkit import console
from alignkit.data import Row
from alignkit.models.chat import Chat
from alignkit.recipe.schema import PpoOptions
from alignkit.runs.heartbeat import pulse
from alignkit.train import ranks
from alignkit.train.critic import Critic
from alignkit.train.draws import Key, draw_uniforms
from alignkit.train.experience import (
    Experience,
    finish_scores,
    make_experience,
    measure_norm,
    prompt_numbers,
    sort_steps,
)
from alignkit.train.monitors import HackingMonitor, KlTooLarge, judge_first, require_finite_scores
from alignkit.train.ppo_math import KlController, masked_mean
from alignkit.train.prompts import join_columns
from alignkit.train.readout import Sampling, pad_answers
from alignkit.train.roles import Roles
from alignkit.train.rollout import Rollout, Truncation, cut_answer, repetition

if TYPE_CHECKING:
    from datasets import Dataset as Table

    from alignkit.train.rewards import Rewards

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
