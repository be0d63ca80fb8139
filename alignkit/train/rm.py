"""Reward models on TRL's RewardTrainer, with what the papers have and it lacks.

All answers of a prompt are one batch element (InstructGPT), labels may be soft (Constitutional AI) or a margin may be
asked for, and the reward can be normalised on reference rows (Ziegler, InstructGPT). No sampling happens here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from alignkit.data import DataReport, Rejects, read_rows
from alignkit.errors import DataError
from alignkit.models.chat import Chat
from alignkit.models.classifier import score_ids
from alignkit.models.files import REWARD_NORM
from alignkit.models.load import load_reward_model
from alignkit.models.logprobs import pad
from alignkit.recipe import Stage
from alignkit.recipe.schema import RmOptions, SftOptions
from alignkit.runs.directory import Result, RunDir
from alignkit.runs.files import write_json
from alignkit.train import ranks
from alignkit.train.arguments import build_config
from alignkit.train.built import Built
from alignkit.train.fit import fit, watch_for
from alignkit.train.guarded import Guarded
from alignkit.train.losses import best_of_loss, kway_loss, pairwise_losses
from alignkit.train.tables import open_chat, share_tables


@dataclass
class GroupCollator:
    """Flatten the answers of B prompts into A rows, and list their pairs by row number.

    Returns input_ids, attention_mask (A, T) right-padded; better, worse, pair_prompt (P,) long; label, margin (P,)
    float; prompt_of (A,) long. Ties make no pair.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        answers = [ids for row in rows for ids in row["answers_ids"]]
        input_ids, attention_mask = pad(answers, self.pad_token_id, multiple_of=self.pad_to_multiple_of or 1)
        pairs: list[tuple[int, int, int, float, float]] = []
        prompt_of: list[int] = []
        for prompt, row in enumerate(rows):
            first, scores = len(prompt_of), row["scores"]
            prompt_of += [prompt] * len(scores)
            for better in range(len(scores)):
                for worse in range(better + 1, len(scores)):
                    if scores[better] != scores[worse]:
                        pairs.append((first + better, first + worse, prompt, row["label"], row["margin"]))
        columns = list(zip(*pairs, strict=True))
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "better": torch.tensor(columns[0]),
            "worse": torch.tensor(columns[1]),
            "pair_prompt": torch.tensor(columns[2]),
            "label": torch.tensor(columns[3], dtype=torch.float),
            "margin": torch.tensor(columns[4], dtype=torch.float),
            "prompt_of": torch.tensor(prompt_of),
        }


class Rm(Guarded, RewardTrainer):
    """TRL's RewardTrainer over groups of answers; a plain pair is a group of two."""

    def __init__(self, *args: Any, loss: str = "pairwise", **kwargs: Any) -> None:
        self.loss_name = loss
        super().__init__(*args, **kwargs)

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        pairs, answers = (torch.tensor(len(inputs[name])) for name in ("better", "prompt_of"))
        return {"accuracy": pairs, "margin": pairs, "mean_reward": answers}

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        rewards_A = outputs.logits.squeeze(-1).float()
        loss = self._group_loss(rewards_A, inputs)
        if self.args.center_rewards_coefficient is not None:
            num_prompts = int(inputs["prompt_of"][-1]) + 1
            squares_P = _pair_sums(rewards_A, inputs) ** 2
            # Per prompt, as the loss: a mean over all pairs would depend on which prompts share a forward pass.
            loss = loss + self.args.center_rewards_coefficient * kway_loss(
                squares_P, inputs["pair_prompt"], num_prompts
            )
        self._record(rewards_A.detach(), inputs)
        return (loss, outputs) if return_outputs else loss

    def _group_loss(self, rewards_A: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        num_prompts = int(inputs["prompt_of"][-1]) + 1
        if self.loss_name == "best_of":
            answers_B = torch.bincount(inputs["prompt_of"], minlength=num_prompts)
            place_A = torch.arange(len(rewards_A), device=rewards_A.device)
            place_A = place_A - (answers_B.cumsum(0) - answers_B)[inputs["prompt_of"]]
            scores_BK = rewards_A.new_full((num_prompts, int(answers_B.max())), -math.inf)
            scores_BK = scores_BK.index_put((inputs["prompt_of"], place_A), rewards_A)
            return best_of_loss(scores_BK, torch.zeros(num_prompts, dtype=torch.long, device=rewards_A.device))
        losses_P = pairwise_losses(
            rewards_A[inputs["better"]],
            rewards_A[inputs["worse"]],
            label_P=inputs["label"],
            margin_P=inputs["margin"],
        )
        return kway_loss(losses_P, inputs["pair_prompt"], num_prompts)

    def _record(self, rewards_A: Tensor, inputs: dict[str, Tensor]) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        if mode == "train":
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens
        metrics["num_tokens"] = [self._total_train_tokens]
        margins_P = rewards_A[inputs["better"]] - rewards_A[inputs["worse"]]
        # A soft label below one half prefers the other answer.
        right_P = ((margins_P > 0) == (inputs["label"] >= 0.5)).float()
        for name, values in (("accuracy", right_P), ("margin", margins_P), ("mean_reward", rewards_A)):
            sums = self.accelerator.gather(torch.stack([values.sum(), values.new_tensor(len(values))]))
            total, count = sums.view(-1, 2).sum(dim=0).tolist()
            metrics[name].append(total / count)


def _pair_sums(rewards_A: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Return the sum of the two rewards of every pair: TRL's centring term, arXiv 2312.09244."""
    return rewards_A[inputs["better"]] + rewards_A[inputs["worse"]]


def build(stage: Stage, run: RunDir) -> Built:
    """Load model and rows and return a trainer that has not trained yet."""
    options = stage.expect(RmOptions)
    chat = open_chat(stage, run)
    tokenizer = chat.tokenizer
    rejects = Rejects()
    tables = share_tables(stage, chat, run.cache, rejects=rejects)
    references = ranks.once(lambda: _encode_references(stage, chat, rejects))
    loaded = ranks.first(lambda: load_reward_model(stage, run_dir=run.path, tokenizer=tokenizer))
    config = build_config(stage, RewardConfig, run.checkpoints, max_length=None)
    trainer = Rm(
        model=loaded.model,
        args=config,
        data_collator=GroupCollator(tokenizer.pad_token_id, config.pad_to_multiple_of),
        train_dataset=tables.train,
        eval_dataset=tables.eval,
        processing_class=tokenizer,
        watch=watch_for(stage),
        loss=options.loss,
    )

    def finish(model_dir: Path) -> dict[str, float]:
        return _normalize(stage, trainer, references, model_dir)

    return Built(trainer, tables, chat, loaded, rejects, is_reward=True, finish=finish)


def _normalize(stage: Stage, trainer: Rm, references: Sequence[Sequence[int]], model_dir: Path) -> dict[str, float]:
    """Measure the reward on reference rows and write gain and bias beside the model.

    The normalised reward is gain * r + bias: mean 0 (and standard deviation 1 with gain_and_bias). Sources: Ziegler
    2019 section 2.1 and `train_reward.normalize` of its code; InstructGPT section 3.5 shifts by the demonstrations.
    """
    options = stage.expect(RmOptions)
    if options.normalize == "none":
        return {}
    # Every rank scores, for a sharded model needs all of them; rank 0 writes.
    rewards = score_ids(trainer.model.eval(), references, pad_id=trainer.processing_class.pad_token_id)
    gain = 1.0 / max(rewards.std(correction=0).item(), 1e-8) if options.normalize == "gain_and_bias" else 1.0
    norm = {"gain": gain, "bias": -gain * rewards.mean().item(), "num_rows": len(rewards)}
    ranks.once(lambda: write_json(model_dir / REWARD_NORM, norm))
    return {f"reward_norm/{key}": value for key, value in norm.items()}


def _encode_references(stage: Stage, chat: Chat, rejects: Rejects) -> list[list[int]]:
    """Return the tokens of up to `normalize_rows` reference answers: demonstrations, or the best answer of each row.

    Read before training, so that a source that cannot be used costs no run. Raises DataError when fewer than two fit.
    """
    options = stage.expect(RmOptions)
    if options.normalize == "none":
        return []
    as_sft = replace(stage, options=SftOptions(data=options.data, on_bad_row=options.on_bad_row))
    rows = read_rows(
        as_sft,
        options.normalize_data or options.data,
        report=DataReport(),
        rejects=Rejects(),
        template=chat.has_template,
    )
    limit = stage.trainer.get("max_length") or math.inf
    kept: list[list[int]] = []
    for row in rows:
        if row.kind == "messages":
            ids = chat.encode([row.completions[0]])[0][-1].ids  # type: ignore[list-item]
        elif row.prompt:
            ids = chat.encode_prompt_completion([row.prompt], [row.completions[0]])[0].ids
        else:
            ids = chat.encode_texts([row.completions[0]])[0]  # type: ignore[list-item]
        if len(ids) <= limit:
            kept.append(ids)
        elif options.normalize_data:
            rejects.add(row.place, f"reference longer than max_length ({len(ids)} tokens)")
        if len(kept) == options.normalize_rows:
            break
    if len(kept) < 2:
        raise DataError(
            f"normalize needs at least 2 reference rows within max_length, and has {len(kept)}",
            where=stage.where(f"{stage.name}.normalize"),
        )
    return kept


def run(stage: Stage, run_dir: Path, *, allow_change: tuple[str, ...] = ()) -> Result:
    """Train the stage in its run directory, going on where an earlier sitting stopped."""
    return fit(stage, run_dir, build, allow_change=allow_change)
