"""Classifiers by supervised fine-tuning on labels, with language modelling as auxiliary loss (GPT-1, section 3.2)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from alignkit.data import Row
from alignkit.errors import DataError
from alignkit.models.heads import encode_tasks, predict, row_logits, task_losses
from alignkit.models.load import load_policy
from alignkit.recipe import Stage
from alignkit.recipe.schema import SftOptions
from alignkit.runs.directory import RunDir
from alignkit.train.encode import longest_sequence, name_label
from alignkit.train.setup import Setup, TaskCollator, build_config, open_rows
from alignkit.train.tables import Tables
from alignkit.train.trainer import Guarded


class Classifier(Guarded, SFTTrainer):
    """TRL's SFTTrainer with the losses of GPT-1."""

    def __init__(self, *args: Any, objective: str, lm_coef: float, **kwargs: Any) -> None:
        self.objective, self.lm_coef = objective, lm_coef
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over rows, whatever number of tokens they have

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        learnt = {"labels": inputs["labels"]} if self.lm_coef else {}
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, **learnt
        )
        logits_BC = row_logits(self.objective, outputs.logits.float(), inputs["row_of"])
        losses = task_losses(
            logits_BC, inputs["label"], outputs.loss if learnt else None, inputs["row_of"], self.lm_coef
        )
        right_B = (logits_BC.argmax(dim=-1) == inputs["label"]).float()
        mode = "train" if self.model.training else "eval"
        metrics, gather = self._metrics[mode], self.accelerator.gather_for_metrics
        if mode == "train":
            self._total_train_tokens += gather(inputs["attention_mask"].sum()).sum().item()
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["accuracy"].append(gather(right_B.mean()).mean().item())
        for name, value in zip(("task_loss", "lm_loss"), losses[1:], strict=True) if learnt else ():
            metrics[name].append(gather(value.detach()).mean().item())
        return (losses[0], outputs) if return_outputs else losses[0]


def list_labels(stage: Stage, tables: Tables) -> list[str]:
    """List the labels of a stage in the order of their numbers; none of a choice.

    Raises DataError where the training rows have one label alone, or the held-out ones have one that they have not.
    """
    if stage.task == "multiple_choice":
        return []
    known = stage.expect(SftOptions).labels
    found = set(tables.train.unique("label"))
    if len(found) < 2:
        what = f"all rows have the label {found.pop()}; a classifier needs rows of two labels or more"
        raise DataError(what, where=stage.where(f"{stage.name}.data"))
    strange = set(tables.eval.unique("label")) - found if tables.eval is not None and known is None else set()
    if strange:
        what = f"held-out rows have labels that no training row has: {', '.join(sorted(strange))}"
        raise DataError(f"{what}; mend them, or set {stage.name}.labels", where=stage.where(f"{stage.name}.eval"))
    return known or sorted(found, key=lambda name: (int(name) if name.isdecimal() else -1, name))


def build(stage: Stage, run: RunDir) -> Setup:
    """Load model and rows and make a trainer that has not trained yet."""
    options, task = stage.expect(SftOptions), str(stage.task)
    setup = open_rows(stage, run)
    labels = list_labels(stage, setup.tables)
    setup.load(partial(load_policy, reward=True, labels=labels))
    setup.head = {"objective": task, "labels": labels, "num_tokens": len(setup.chat.tokenizer)}
    tables = [table for table in (setup.tables.train, setup.tables.eval) if table is not None]
    numbers = {name: number for number, name in enumerate(labels)}
    if not labels:
        numbers = {name: int(name) for table in tables for name in table.unique("label")}
    padding = {"pad_token_id": setup.chat.tokenizer.pad_token_id}
    collator = TaskCollator(**padding, pad_to_multiple_of=stage.trainer.get("pad_to_multiple_of"), numbers=numbers)
    config = build_config(
        stage, SFTConfig, run.checkpoints, assistant_only_loss=False, completion_only_loss=False, max_length=None
    )
    setup.trainer = Classifier(
        **setup.arguments(config), data_collator=collator, objective=task, lm_coef=options.lm_coef
    )
    setup.record["labels"], setup.is_reward = labels, True
    setup.answer_rows = partial(_predict, setup)
    return setup


def _predict(setup: Setup, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Say of rows what they are taken for, how surely, and what they are."""
    stage, head = setup.stage, setup.head
    assert head is not None and stage.task is not None
    texts = [(str(row.prompt), list(map(str, row.completions))) for row in rows]
    sequences = encode_tasks(setup.chat, stage.task, texts, longest_sequence(stage))
    found = predict(setup.trainer.model, sequences, stage.task, pad_id=setup.chat.tokenizer.pad_token_id)
    fields = []
    for row, (prompt, given), shares in zip(rows, texts, found, strict=True):
        best = int(torch.tensor(shares).argmax())
        if stage.task == "multiple_choice":
            answer, reference = given[best], given[int(row.answer)]
        else:
            prompt, answer, reference = "\n".join(given), head["labels"][best], name_label(stage, row)
        fields.append({"prompt": prompt, "answer": answer, "reference": reference, "probability": shares[best]})
    return fields
