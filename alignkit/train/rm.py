"""Reward models on TRL's RewardTrainer, with what the papers have and it lacks: groups of answers (InstructGPT), soft
labels (Constitutional AI), margins, and normalisation on reference rows (Ziegler, InstructGPT)."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from alignkit.data import DataReport, Rejects, read_rows
from alignkit.errors import DataError
from alignkit.models.files import REWARD_NORM
from alignkit.models.frozen import score_ids
from alignkit.models.heads import pad_groups
from alignkit.models.load import load_reward_model
from alignkit.recipe import Stage
from alignkit.recipe.methods import RmOptions, SftOptions
from alignkit.runs.directory import RunDir
from alignkit.runs.files import write_json
from alignkit.train import ranks
from alignkit.train.fit import fit
from alignkit.train.losses import best_of_loss, kway_loss, measure_norm, pairwise_losses
from alignkit.train.setup import Setup, build_config, collator_for, open_rows
from alignkit.train.trainer import Guarded


class Rm(Guarded, RewardTrainer):
    """TRL's RewardTrainer over groups of answers; a plain pair is a group of two."""

    def __init__(self, *args: Any, loss: str, **kwargs: Any) -> None:
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
            squares_P = (rewards_A[inputs["better"]] + rewards_A[inputs["worse"]]) ** 2  # arXiv 2312.09244
            # Per prompt, as the loss: a mean over all pairs would depend on which prompts share a forward pass.
            mean = kway_loss(squares_P, inputs["pair_prompt"], num_prompts)
            loss = loss + self.args.center_rewards_coefficient * mean
        margins_P = (rewards_A[inputs["better"]] - rewards_A[inputs["worse"]]).detach()
        right_P = (margins_P > 0) == (inputs["label"] >= 0.5)  # a soft label below one half prefers the other answer
        found = {"accuracy": right_P, "margin": margins_P, "mean_reward": rewards_A}
        self.note_metrics(found, num_tokens=inputs["attention_mask"].sum())
        return (loss, outputs) if return_outputs else loss

    def _group_loss(self, rewards_A: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        num_prompts = int(inputs["prompt_of"][-1]) + 1
        if self.loss_name == "best_of":
            scores_BK = pad_groups(rewards_A, inputs["prompt_of"])
            return best_of_loss(scores_BK, torch.zeros(num_prompts, dtype=torch.long, device=rewards_A.device))
        better_P, worse_P = rewards_A[inputs["better"]], rewards_A[inputs["worse"]]
        losses_P = pairwise_losses(better_P, worse_P, label_P=inputs["label"], margin_P=inputs["margin"])
        return kway_loss(losses_P, inputs["pair_prompt"], num_prompts)


def build(stage: Stage, run: RunDir) -> Setup:
    """Load model and rows and make a trainer that has not trained yet."""
    options = stage.expect(RmOptions)
    setup = open_rows(stage, run)
    references = ranks.once(lambda: _encode_references(setup)) if options.normalize != "none" else []
    setup.load(load_reward_model)
    config = build_config(stage, RewardConfig, run.checkpoints, max_length=None)
    collator = collator_for(stage, setup.chat.tokenizer)
    setup.trainer = trainer = Rm(**setup.arguments(config), data_collator=collator, loss=options.loss)
    setup.is_reward = True

    def normalize(model_dir: Path) -> dict[str, float]:
        """Measure the reward on reference rows and write gain and bias beside the model."""
        # Every rank scores, for a sharded model needs all of them; rank 0 writes.
        rewards = score_ids(trainer.model.eval(), references, pad_id=trainer.processing_class.pad_token_id)
        gain, bias = measure_norm(rewards, options.normalize)
        norm = {"gain": gain, "bias": bias, "num_rows": len(rewards)}
        ranks.once(lambda: write_json(model_dir / REWARD_NORM, norm))
        return {f"reward_norm/{key}": value for key, value in norm.items()}

    setup.finish = normalize if references else None
    return setup


def _encode_references(setup: Setup) -> list[list[int]]:
    """Tokens of up to `normalize_rows` reference answers: demonstrations, or the best answer of each row."""
    stage, chat, options = setup.stage, setup.chat, setup.stage.expect(RmOptions)
    as_sft = replace(stage, options=SftOptions(data=options.data, on_bad_row=options.on_bad_row))
    sources, limit = options.normalize_data or options.data, stage.trainer.get("max_length") or math.inf
    kept: list[list[int]] = []
    for row in read_rows(as_sft, sources, report=DataReport(), rejects=Rejects(), template=chat.has_template):
        answer: Any = row.completions[0]
        if row.prompt:
            ids = chat.encode_prompt_completion([row.prompt], [answer])[0].ids
        else:
            ids = chat.encode([answer])[0][-1].ids if row.kind == "messages" else chat.encode_texts([answer])[0]
        if len(ids) <= limit:
            kept.append(ids)
        elif options.normalize_data:
            setup.rejects.add(row.place, f"reference longer than max_length ({len(ids)} tokens)")
        if len(kept) == options.normalize_rows:
            break
    if len(kept) < 2:
        what = f"normalize needs at least 2 reference rows within max_length, and has {len(kept)}"
        raise DataError(what, where=stage.where(f"{stage.name}.normalize"))
    return kept


run = partial(fit, build)
