"""Batches by a budget of tokens: which rows come together, the mean of a step, and how a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from alignkit.errors import UsageError
from alignkit.recipe import Stage
from alignkit.runs.directory import RunDir
from alignkit.train.sft import build
from alignkit.train.tables import token_batches

ROWS = [{"text": "word " * number} for number in (1, 2, 3, 3, 9, 12, 20, 40, 41, 60)]
RECIPE = (
    "name: t\nmodel: {path: builtin:tiny-llama}\nsft: {data: rows.jsonl, max_length: 96, batch_tokens: 128, "
    "batch_size: 2, num_train_epochs: 3, save_steps: 2, learning_rate: 0.01, samples: {num: 0}}\n"
)


def test_every_row_is_in_one_batch_that_fits() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=2500)
    batches = token_batches(lengths, num_tokens=128, seed=1)
    assert sorted(np.concatenate(batches)) == list(range(2500))
    assert all(len(rows) * lengths[rows].max() <= 128 for rows in batches)
    assert [len(rows) for rows in token_batches([10, 3, 3, 3, 3], num_tokens=10, seed=0)] == [1, 3, 1]
    other = token_batches(lengths, num_tokens=128, seed=2)
    assert [rows.tolist() for rows in batches] != [rows.tolist() for rows in other]


def test_loss_of_a_step_is_the_mean_over_its_tokens(make_stage: Callable, write_rows: Callable, tmp_path: Path) -> None:
    write_rows(ROWS)
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    trainer = build(make_stage(RECIPE, "sft"), run).trainer
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    assert len(batches) == 2 and {len(batch["input_ids"]) for batch in batches} != {1}
    with torch.no_grad():
        trainer.model.eval()
        loss = sum(float(trainer.compute_loss(trainer.model, dict(one), num_items_in_batch=count)) for one in batches)
        sums = [0.0, 0]
        for batch in batches:
            logps = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
            kept = batch["labels"][:, 1:] != -100
            sums[0] -= float(logps[:, :-1][kept].gather(1, batch["labels"][:, 1:][kept][:, None]).sum())
            sums[1] += int(kept.sum())
    assert loss == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_a_stopped_run_goes_on_to_the_same_weights(
    make_stage: Callable[..., Stage], write_rows: Callable[..., Path], resume_exactly: Callable
) -> None:
    write_rows(ROWS)
    resume_exactly(make_stage(RECIPE, "sft"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("batch_tokens: 512", "sft.batch_tokens is 512, less than max_length 1024"),
        ("batch_tokens: 2048, micro_batch_size: 2", "sft.micro_batch_size has no effect with batch_tokens"),
        ("batch_tokens: 2048, packing: true", "sft.batch_tokens has no effect with packing: true"),
        ("batch_tokens: 2048, objective: lm", "sft.batch_tokens has no effect with this objective"),
    ],
)
def test_what_a_recipe_may_not_say(keys: str, said: str, make_stage: Callable[..., Stage]) -> None:
    with pytest.raises(UsageError) as error:
        make_stage(f"model: {{path: builtin:tiny-llama}}\nsft: {{data: builtin:reviews, {keys}}}\n", "sft")
    assert said in str(error.value)
