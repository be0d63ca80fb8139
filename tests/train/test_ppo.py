"""PPO on real tiny models: what the models say, what is learnt from it, and what a run leaves behind."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PrinterCallback, TrainerCallback

from alignkit.errors import ModelError, NonFiniteError, RunError
from alignkit.launch.run import launch_stage
from alignkit.models.frozen import read_norm, score_ids
from alignkit.models.generation import generate_answers
from alignkit.models.load import load_trained
from alignkit.models.logprobs import Sampling, pad_answers
from alignkit.models.start import builtin_config, builtin_tokenizer
from alignkit.recipe import Stage
from alignkit.recipe.methods import MissingEos, PpoOptions
from alignkit.rewards import Workspace
from alignkit.rewards.kinds import open_reward
from alignkit.runs.directory import RunDir, list_checkpoints, step_of
from alignkit.train import ppo
from alignkit.train.losses import measure_norm
from alignkit.train.ppo.answers import answer_order, cut_answer, finish_scores, prompt_numbers, repetition, sort_steps
from alignkit.train.ppo.rollout import HackingMonitor, judge_first

LORA = "lora: {r: 4, alpha: 8}\n"
BASE = "name: t\nmodel: {path: builtin:tiny-llama%s}\n"
RM = (
    "rm: {data: {path: builtin:preferences, max_rows: 16}, batch_size: 4, max_steps: 2, max_length: 160, "
    "learning_rate: 1e-3, samples: {num: 0}}\n"
)
SHORT = (
    "data: {path: builtin:prompts, max_rows: 16}, batch_size: 4, micro_batch_size: 2, max_new_tokens: 8, "
    "ppo_epochs: 2, max_steps: 4, learning_rate: 3e-3, logging_steps: 1, samples: {num: 1, max_new_tokens: 4}"
)


def recipe(*, lora: bool = False, nf4: bool = False, reward: str = "builtin:true-reward", extra: str = "") -> str:
    head = BASE % (", quantization: nf4" if nf4 else "")
    return f"{head}{LORA if lora else ''}{RM}ppo: {{{SHORT}, reward: {reward}{extra}}}"


def build(stage: Stage, tmp_path: Path, name: str = "built") -> Any:
    run = RunDir(tmp_path / name)
    run.path.mkdir(exist_ok=True)
    built = ppo.build(stage, run)
    built.trainer.remove_callback(PrinterCallback)
    return built


def disturb(trainer: Any, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer._policy_parameters.values():
        parameter.data += (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def plain_logps(model: Any, rollout: Any, row: int, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of one answer's tokens from a forward pass of that answer alone."""
    prompt, answer = rollout.prompt_ids[row], rollout.sampled_ids[row]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].float() / temperature
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def loss_of_halves(trainer: Any, rollout: Any) -> float:
    """The loss of a step over four answers in two micro batches."""
    experience, trainer._step_sums = trainer.experience, defaultdict(float)
    tokens, learnt = (float(mask.sum()) for mask in (experience.mask_RT, experience.learnt_RT))
    given = {"step": 0, "micro": 1, "num_tokens": tokens, "num_learnt": learnt}
    width = experience.mask_RT.size(1)
    halves = [given | {"pieces": trainer.collector.pieces(rollout, rows, width)} for rows in ([0, 3], [1, 2])]
    return sum(float(trainer.compute_loss(trainer.model, inputs)) for inputs in halves)


@pytest.mark.parametrize("kind", ["full", "lora", "nf4"])
def test_roles_agree_at_step_zero_and_are_read_right(kind: str, make_stage: Callable, tmp_path: Path) -> None:
    stage = make_stage(recipe(lora=kind != "full", nf4=kind == "nf4", extra=", temperature: 0.7"), "ppo")
    trainer = build(stage, tmp_path).trainer
    trainer.check_step_zero()  # exactly, or it raises
    collector = trainer.collector
    rollout = collector.sample(range(4), (0, 0))
    assert len(rollout) == 4 and all(1 <= len(ids) <= 8 for ids in rollout.sampled_ids)
    disturb(trainer)
    mask, logps, reference, entropy, values = collector.read(rollout, trainer.model)
    assert values is not None and not values.any()  # a zero head
    policy_moved = (logps - reference)[mask.bool()].abs().mean()
    assert policy_moved > 0.01
    for row, answer in enumerate(rollout.sampled_ids):
        expected = plain_logps(trainer.model, rollout, row, 0.7)
        torch.testing.assert_close(logps[row, : len(answer)], expected, rtol=0, atol=2e-4)
        assert mask[row].sum() == len(answer) and not logps[row, len(answer) :].any()
    with pytest.raises(ModelError, match="policy and reference differ at step 0"):
        trainer.check_step_zero()


def test_one_base_holds_four_roles_that_equal_models_of_their_own(make_stage: Callable, tmp_path: Path) -> None:
    text = recipe(lora=True, nf4=True, reward="rm")
    launch_stage(make_stage(text, "rm"))
    built = build(make_stage(text, "ppo"), tmp_path)
    trainer = built.trainer
    assert [part["what"] for part in built.record["roles"]].count("base") == 1
    assert built.record["roles"][0]["roles"] == ("policy", "reference", "reward", "critic")
    rollout = trainer.collector.sample(range(4), (0, 0))
    alone = load_trained(tmp_path / "runs/t/rm", device="cpu", reward=True)
    with torch.no_grad():
        expected = torch.stack([alone(input_ids=torch.tensor([ids])).logits[0, 0] for ids in rollout.whole_ids])
    found = trainer.roles.score_ids(rollout.whole_ids, pad_id=0, batch_size=3)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)
    # The critic starts as the reward model: its value of the last token is the reward of everything before it.
    *_, values = trainer.collector.read(rollout, trainer.model)
    shorter = [prompt + answer[:-1] for prompt, answer in zip(rollout.prompt_ids, rollout.sampled_ids, strict=True)]
    before_last = torch.stack([values[row, len(answer) - 1] for row, answer in enumerate(rollout.sampled_ids)])
    torch.testing.assert_close(before_last, trainer.roles.score_ids(shorter, pad_id=0, batch_size=3), rtol=0, atol=1e-4)
    trained = {name.split(".lora_")[1].split(".")[1] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {"default", "critic"}
    # Where pad and eos are one token, transformers reads the score before the end of an answer, and so do we.
    eos = trainer.processing_class.eos_token_id
    closed = [[*ids, eos, eos] for ids in rollout.whole_ids]
    alone.get_base_model().config.pad_token_id = eos
    with torch.no_grad():
        expected = torch.stack([alone(input_ids=torch.tensor([ids])).logits[0, 0] for ids in closed])
    found = trainer.roles.score_ids(closed, pad_id=eos, batch_size=3)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_critic_starts_at_the_scores_that_ppo_gives(lora: bool, make_stage: Callable, tmp_path: Path) -> None:
    extra = ", missing_eos: null, reward_normalize: gain_and_bias, reward_normalize_rows: 8"
    text = recipe(lora=lora, reward="{model: rm, weight: 2}", extra=extra)
    launch_stage(make_stage(text, "rm", "rm.normalize=gain_and_bias"))
    trainer = build(make_stage(text, "ppo"), tmp_path).trainer
    collector = trainer.collector
    collector.prepare()
    rollout = collector.sample(range(4), (0, 0))
    *_, values = collector.read(rollout, trainer.model)
    # The value of an answer's last token is the score of all before it, had the answer been cut there.
    rollout.completion_ids = [ids[:-1] for ids in rollout.sampled_ids]
    rollout.ended = [False] * 4
    scores = finish_scores(trainer.options, collector.rewards(rollout)[0], rollout.ended, collector.norm)
    last = torch.stack([values[row, len(ids) - 1] for row, ids in enumerate(rollout.sampled_ids)])
    torch.testing.assert_close(last, scores, rtol=1e-4, atol=1e-4)
    # What is saved says the same, as a reward model does: a head without a bias, and reward_norm.json beside it.
    trainer.critic.save(tmp_path / "critic", trainer.processing_class)
    again, (gain, bias) = (
        load_trained(tmp_path / "critic", device="cpu", reward=True),
        read_norm(str(tmp_path / "critic")),
    )
    found = gain * score_ids(again, rollout.whole_ids, pad_id=trainer.processing_class.pad_token_id) + bias
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)
    # A policy that speaks another template does not change how the reward model is asked.
    other = build(make_stage(text, "ppo", "model.chat_template=zephyr"), tmp_path, "other").trainer.collector
    answers = other.sample(range(4), (0, 0))
    alone = open_reward("runs/t/rm", Workspace(device="cpu")).score(answers)
    torch.testing.assert_close(other.rewards(answers)[0], 2 * torch.tensor(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["policy", "head"])
def test_losses_equal_those_computed_from_plain_logits(start: str, make_stage: Callable, tmp_path: Path) -> None:
    trainer = build(make_stage(recipe(extra=f", reward_clip: 0.5, value_init: {start}"), "ppo"), tmp_path).trainer
    assert trainer.critic.shares_hidden == (start == "head")
    collector = trainer.collector
    rollout = collector.sample(range(4), (0, 0))
    trainer.experience = collector.examine(rollout, trainer.model)
    experience = trainer.experience
    experience.advantages_RT = torch.randn(experience.mask_RT.shape) * experience.mask_RT
    experience.returns_RT = torch.randn(experience.mask_RT.shape) * experience.mask_RT
    disturb(trainer)
    with torch.no_grad():
        trainer.critic.head.weight.normal_()
    tokens = float(experience.mask_RT.sum())
    total = loss_of_halves(trainer, rollout)
    policy_sum = value_sum = 0.0
    for row, answer in enumerate(rollout.sampled_ids):
        new = plain_logps(trainer.model, rollout, row)
        ids = torch.tensor([rollout.prompt_ids[row] + answer])
        with torch.no_grad():
            trunk = (trainer.critic.model or trainer.model).base_model
            hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state[0]
            value = trainer.critic.head(hidden)[len(rollout.prompt_ids[row]) - 1 : -1, 0]
        for t in range(len(answer)):
            ratio = float((new[t] - experience.logps_RT[row, t]).exp())
            advantage = float(experience.advantages_RT[row, t])
            policy_sum += max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
            old, target, now = (
                float(experience.values_RT[row, t]),
                float(experience.returns_RT[row, t]),
                float(value[t]),
            )
            near = min(max(now, old - 0.2), old + 0.2)
            value_sum += 0.5 * max((now - target) ** 2, (near - target) ** 2)
    assert total == pytest.approx(policy_sum / tokens + 0.1 * value_sum / tokens, rel=1e-4, abs=1e-5)
    assert trainer._step_sums["policy_loss"] == pytest.approx(policy_sum / tokens, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_micro_batches_change_nothing(lora: bool, make_stage: Callable, tmp_path: Path) -> None:
    extra = (
        ", ptx: {data: {path: builtin:reviews, max_rows: 30}, coef: 0.5, batch_size: 3}, minibatches: 2, "
        "missing_eos: {penalty: 1}"
    )
    weights = []
    for size in (4, 1):
        stage = make_stage(
            recipe(lora=lora, extra=extra), "ppo", f"ppo.micro_batch_size={size}", "ppo.adam_epsilon=1e-3"
        )
        trainer = build(stage, tmp_path, f"run{size}").trainer
        trainer.train()
        weights.append([p.detach().clone() for p in trainer._policy_parameters.values()])
    for whole, small in zip(*weights, strict=True):
        torch.testing.assert_close(whole, small, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ["full", "adapter", "head"])
def test_pieces_of_a_micro_batch_and_graphs_of_the_read_change_nothing(
    kind: str, make_stage: Callable, tmp_path: Path
) -> None:
    text = recipe(
        lora=kind != "full", reward="rm" if kind == "adapter" else "builtin:true-reward", extra=", gamma: 0.9"
    )
    text = text.replace("micro_batch_size: 2", "micro_batch_size: 4, adam_epsilon: 1e-3, missing_eos: {penalty: 1}")
    launch_stage(make_stage(text, "rm")) if kind == "adapter" else None
    found = []
    for number, (tokens, keep) in enumerate([(float("inf"), False), (64, False), (64, True)]):
        trainer = build(make_stage(text, "ppo"), tmp_path, f"run{number}").trainer
        collector = trainer.collector
        assert trainer._keeps_graphs == (kind != "full") and collector.piece_tokens == (512 if kind == "full" else 256)
        collector.piece_tokens, trainer._keeps_graphs = tokens, keep
        rollout = collector.sample(range(4), (0, 0))
        pieces = collector.pieces(rollout, range(4), 8)
        assert sorted(row for rows, _ in pieces for row in rows) == [0, 1, 2, 3]
        assert (len(pieces) > 1) == (tokens == 64) and all(batch.input_ids_BL.numel() <= tokens for _, batch in pieces)
        logps = collector.read(rollout, trainer.model)[1]
        trainer.check_step_zero()
        trainer.train()
        assert not collector.kept
        weights = [p.detach().clone() for p in [*trainer._policy_parameters.values(), *trainer.critic.parameters()]]
        logged = [{k: v for k, v in row.items() if "loss" in k or "norm" in k} for row in trainer.state.log_history[:4]]
        found.append((logps, weights, logged))
    (whole, whole_weights, _), (pieced, weights, logged), (_, kept_weights, kept_logged) = found
    torch.testing.assert_close(whole, pieced, rtol=0, atol=1e-6)
    assert logged == kept_logged and len({row["loss"] for row in logged}) == 4
    for one, two, three in zip(whole_weights, weights, kept_weights, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-6)
        assert torch.equal(two, three)


@pytest.mark.parametrize("kind", ["full", "adapter", "head"])
def test_recomputed_activations_and_dropout_in_the_config_change_nothing(
    kind: str, make_stage: Callable, tmp_path: Path
) -> None:
    text = recipe(lora=kind != "full", reward="rm" if kind == "adapter" else "builtin:true-reward")
    text = text.replace("max_steps: 4", "max_steps: 2, adam_epsilon: 1e-3, missing_eos: {penalty: 1}")
    launch_stage(make_stage(text, "rm")) if kind == "adapter" else None
    weights = []
    for overrides in (["ppo.gradient_checkpointing=false"], ["ppo.gradient_checkpointing=true"]):
        if kind != "adapter":  # whose base is there already
            overrides.append("model.config={attention_dropout: 0.5}")
        trainer = build(make_stage(text, "ppo", *overrides), tmp_path, f"run{len(weights)}").trainer
        trainer.check_step_zero()
        trainer.train()
        found = [*trainer._policy_parameters.values(), *trainer.critic.parameters()]
        weights.append([p.detach().clone() for p in found])
    for stored, recomputed in zip(*weights, strict=True):
        torch.testing.assert_close(stored, recomputed, rtol=0, atol=1e-6)


def test_a_full_run_leaves_a_policy_and_a_critic_that_plain_transformers_load(
    make_stage: Callable, tmp_path: Path
) -> None:
    result = launch_stage(make_stage(recipe(extra=", gold: builtin:true-reward, save_steps: 1"), "ppo"))
    run = tmp_path / "runs/t/ppo"
    policy = AutoModelForCausalLM.from_pretrained(run / "model")
    critic = AutoModelForSequenceClassification.from_pretrained(run / "model/critic")
    assert critic.config.num_labels == 1 and policy.config.use_cache
    newest = list_checkpoints(run / "checkpoints")[0]
    saved = load_file(newest / "critic.safetensors")
    for name, parameter in critic.named_parameters():
        assert torch.equal(parameter, saved[name])
    # Checkpoints lie between rollouts: every second step here, though save_steps is 1.
    assert [step_of(path) for path in list_checkpoints(run / "checkpoints")] == [4, 2]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = {
        "reward", "gold", "objective/kl", "sqrt_kl", "kl_coef", "entropy", "policy_loss", "value_loss", "clip_fraction",
        "value_clip_fraction", "explained_variance", "response_length", "ended_share", "repetition", "learning_rate",
        "episodes",
    }  # fmt: skip
    assert wanted <= rows[0].keys() and rows[0]["objective/kl"] == 0 and rows[-1]["episodes"] == 8
    assert result.step == 4 and "objective/kl" in result.metrics
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {row["when"] for row in samples} == {"before", "during", "after"} and "reward" in samples[0]
    assert json.loads((run / "stage.json").read_text())["roles"][0]["what"] == "model"


def test_held_out_prompts_are_answered_after_a_run_in_bfloat16(make_stage: Callable, tmp_path: Path) -> None:
    text = recipe(extra=", eval: 0.25").replace("builtin:tiny-llama", "builtin:tiny-llama, dtype: bfloat16")
    assert "bfloat16" in text
    assert "eval_reward" in launch_stage(make_stage(text, "ppo")).metrics


@pytest.mark.parametrize("nf4", [False, True], ids=["lora", "nf4"])
def test_an_adapter_run_leaves_adapters_that_plain_peft_loads(nf4: bool, make_stage: Callable, tmp_path: Path) -> None:
    text = recipe(lora=True, nf4=nf4, reward="rm")
    launch_stage(make_stage(text, "rm"))
    launch_stage(make_stage(text, "ppo"))  # which compares the base's bytes before and after
    run = tmp_path / "runs/t/ppo"
    base = json.loads((run / "model/adapter_config.json").read_text())["base_model_name_or_path"]
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "model")
    assert any(parameter.abs().max() > 0 for name, parameter in policy.named_parameters() if "lora_B" in name)
    trunk = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    critic = PeftModel.from_pretrained(trunk, run / "model/critic")
    saved = load_file(list_checkpoints(run / "checkpoints")[0] / "critic.safetensors")
    assert torch.equal(critic.base_model.model.score.modules_to_save["default"].weight, saved["head.weight"])
    ours = {name.replace(".critic.", "."): tensor for name, tensor in saved.items() if ".lora_" in name}
    for name, parameter in critic.named_parameters():
        if ".lora_" in name:
            assert torch.equal(parameter, ours[name.replace(".default.", ".")].float())


@pytest.mark.parametrize("extra", ["advantage: rloo, num_generations: 2", "advantage: grpo", "advantage: reinforce"])
def test_estimators_without_a_critic_train(extra: str, make_stage: Callable, tmp_path: Path) -> None:
    trainer = build(make_stage(recipe(lora=True, extra=f", {extra}"), "ppo"), tmp_path).trainer
    before = [p.detach().clone() for p in trainer._policy_parameters.values()]
    trainer.collector.rewards = _prefer_long
    trainer.train()
    assert trainer.critic is None
    assert any((p - q).abs().max() > 0 for p, q in zip(trainer._policy_parameters.values(), before, strict=True))
    rollout = trainer.experience.rollout
    repeats = trainer.options.answers_per_prompt
    assert all(rollout.prompt_ids[i] == rollout.prompt_ids[i // repeats * repeats] for i in range(len(rollout)))


def _prefer_long(rollout: Any) -> Any:
    total = torch.tensor([sum(ids) / 1000 for ids in rollout.sampled_ids])
    return total, {"sum": total}


def test_the_average_of_the_weights_is_what_is_saved(make_stage: Callable, tmp_path: Path) -> None:
    trainer = build(make_stage(recipe(lora=True, extra=", ema: 0.6"), "ppo"), tmp_path).trainer
    trainer.collector.rewards = _prefer_long
    name, parameter = next((n, p) for n, p in trainer._policy_parameters.items() if "lora_B" in n)
    average = parameter.detach().clone()

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            average.mul_(0.6).add_(0.4 * parameter.detach())

    trainer.add_callback(Watch())
    trainer.train()
    assert not torch.equal(average, parameter)
    trainer.ready_final()
    torch.testing.assert_close(parameter.detach(), average, rtol=1e-5, atol=1e-7)


def test_a_kl_beyond_bounds_goes_back_to_the_last_checkpoint_within_them(
    make_stage: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = recipe(lora=True, extra=", max_kl: 0.001, save_steps: 2, keep_checkpoints: 4").replace("3e-3", "1e-4")
    text = text.replace("max_steps: 4", "max_steps: 40").replace("builtin:true-reward", "{function: 'long:score'}")
    (tmp_path / "long.py").write_text(
        "def score(prompts, completions, **_):\n    return [len(c[0]['content']) for c in completions]\n"
    )
    from dataclasses import replace

    result = launch_stage(replace(make_stage(text, "ppo"), trust_code=True))
    said = " ".join(capsys.readouterr().err.split())
    assert "above max_kl 0.001" in said and f"checkpoint-{result.step}" in said
    kept = {
        step_of(path): path for path in list_checkpoints(tmp_path / "runs/t/ppo/checkpoints")
    }
    assert 0 < result.step < max(kept)  # the newest is the one whose KL was too large
    good, final = (
        load_file(p / "adapter_model.safetensors") for p in (kept[result.step], tmp_path / "runs/t/ppo/model")
    )
    assert all(torch.equal(good[name], final[name]) for name in final)
    text = text.replace("save_steps: 2", "save_steps: 100").replace("1e-4", "1e-2")
    with pytest.raises(RunError, match="no earlier checkpoint was saved"):
        launch_stage(replace(make_stage(text, "ppo"), trust_code=True), force=True)


def test_ptx_adds_the_gradient_of_the_language_model(make_stage: Callable, tmp_path: Path) -> None:
    extra = ", ptx: {data: {path: builtin:reviews, max_rows: 40}, coef: 2.0, batch_size: 3}, temperature: 0.5"
    trainer = build(make_stage(recipe(extra=extra), "ppo"), tmp_path).trainer
    trainer._step_sums = defaultdict(float)
    for micro in range(2):
        trainer._train_ptx(trainer.model, 5, micro)
    found = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    seed = trainer.args.seed + 7919
    blocks = [
        trainer.ptx[number]["input_ids"] for number in prompt_numbers(15, 3, num_prompts=len(trainer.ptx), seed=seed)
    ]
    losses = [
        torch.nn.functional.cross_entropy(
            trainer.model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum"
        )
        for ids in blocks
    ]
    loss = sum(losses) / sum(len(ids) - 1 for ids in blocks)
    (2.0 * loss).backward()
    assert trainer._step_sums["ptx_loss"] == pytest.approx(float(loss), rel=1e-4)
    for ours, parameter in zip(found, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-5)


def test_ptx_blocks_fit_the_context_of_the_model(make_stage: Callable, tmp_path: Path) -> None:
    text = recipe(extra=", ptx: {data: {path: builtin:reviews, max_rows: 40}, coef: 1.0}")
    text = text.replace("builtin:tiny-llama}", "builtin:tiny-llama, config: {max_position_embeddings: 128}}")
    trainer = build(make_stage(text, "ppo"), tmp_path).trainer
    *blocks, tail = (len(row["input_ids"]) for row in trainer.ptx)
    assert {*blocks} == {128} and 2 <= tail <= 128


def test_where_an_answer_cannot_end_its_log_probabilities_know_it(make_stage: Callable, tmp_path: Path) -> None:
    trainer = build(make_stage(recipe(lora=True, extra=", min_new_tokens: 3"), "ppo"), tmp_path).trainer
    stop_ids = trainer.collector.sampling.stop_ids
    rollout = trainer.collector.sample(range(4), (0, 0))
    assert all(len(ids) >= 3 and not set(ids[:2]) & set(stop_ids) for ids in rollout.sampled_ids)
    _, logps, *_ = trainer.collector.read(rollout, trainer.model)
    prompt, answer = rollout.prompt_ids[0], rollout.sampled_ids[0]
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    logits = logits[len(prompt) - 1 : -1].clone()
    logits[:3, list(stop_ids)] = -torch.inf
    expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    torch.testing.assert_close(logps[0, : len(answer)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("preset", "extra"), [
    ("grpo", ""), ("dapo", ", minibatches: 1, overlong: {filter: true, buffer: 0.5, penalty: 2}"), ("drgrpo", ""),
    ("gspo", ", minibatches: 1"), ("rloo", ""),
])  # fmt: skip
def test_the_loss_of_a_preset_is_that_of_its_paper(
    preset: str, extra: str, make_stage: Callable, tmp_path: Path
) -> None:
    extra = f", preset: {preset}, num_generations: 2{extra}"
    trainer = build(make_stage(recipe(extra=extra).replace("ppo_epochs: 2, ", ""), "ppo"), tmp_path).trainer
    collector, options = trainer.collector, trainer.options
    rollout = collector.sample(range(2), (0, 0), repeats=2)
    raw = torch.tensor([1.0, 0.0, 0.0, 3.0])
    trainer.experience = experience = collector.examine(rollout, trainer.model, (raw.clone(), {}))
    disturb(trainer, 0.02)
    tokens = float(experience.mask_RT.sum())
    total = loss_of_halves(trainer, rollout)
    lengths = [len(ids) for ids in rollout.sampled_ids]
    scores = raw.tolist()
    if preset == "dapo":  # the last 4 of 8 tokens cost up to 2; what is cut off is not learnt
        scores = [score - 2 * max(0, n - 4) / 4 for score, n in zip(scores, lengths, strict=True)]
    learnt = [preset != "dapo" or ended for ended in rollout.ended]
    expected = 0.0
    for row, n in enumerate(lengths):
        mine, other = scores[row], scores[row ^ 1]
        gap = (mine - other) / 2
        advantage = {"rloo": mine - other, "drgrpo": gap}.get(preset, gap / (abs(gap) * 2**0.5 + 1e-4))
        new, old = plain_logps(trainer.model, rollout, row).double(), experience.logps_RT[row, :n].double()
        ratios = (new - old).exp()
        if preset == "gspo":
            ratios = (new - old).mean().exp().expand(n)
        low, high = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}.get(preset, (0.2, 0.2))
        losses = torch.maximum(-advantage * ratios, -advantage * ratios.clamp(1 - low, 1 + high))
        if preset == "grpo":  # the reference is the policy before it was disturbed
            losses = losses + 0.04 * ((old - new).exp() - (old - new) - 1)
        kept = sum(n for n, ok in zip(lengths, learnt, strict=True) if ok)
        divisor = {"grpo": 4 * n, "gspo": 4 * n, "drgrpo": 4 * 8, "dapo": max(kept, 1)}.get(preset, tokens)
        expected += learnt[row] * float(losses.sum()) / divisor
    assert (options.minibatches, options.ppo_epochs) == (1, 1)
    assert total == pytest.approx(expected, rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("sampled", ["top_p: 0.7", "top_k: 5", "top_p: 0.9, top_k: 20, min_new_tokens: 3"])
def test_log_probabilities_are_of_the_tokens_that_could_be_drawn(
    sampled: str, make_stage: Callable, tmp_path: Path
) -> None:
    trainer = build(make_stage(recipe(extra=f", temperature: 0.8, {sampled}"), "ppo"), tmp_path).trainer
    trainer.check_step_zero()
    collector, options = trainer.collector, trainer.options
    rollout = collector.sample(range(4), (0, 0))
    _, logps, reference, *_ = collector.read(rollout, trainer.model)
    assert torch.equal(logps, reference)
    for row, answer in enumerate(rollout.sampled_ids):
        prompt = rollout.prompt_ids[row]
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].float() / 0.8
        for at, token in enumerate(answer):
            scores = logits[len(prompt) - 1 + at].clone()
            if at < (options.min_new_tokens or 0):
                scores[list(collector.sampling.stop_ids)] = -torch.inf
            order = scores.argsort(descending=True)[: options.top_k or None]
            p = scores[order].softmax(-1)
            kept = order[: int((p.cumsum(-1) < options.top_p - 1e-6).sum()) + 1] if options.top_p < 1 else order
            assert token in kept
            assert float(logps[row, at]) == pytest.approx(float(scores[token] - scores[kept].logsumexp(-1)), abs=2e-4)
    inputs = {"step": 0, "micro": 0, "num_tokens": 9.0, "num_learnt": 9.0,
              "pieces": collector.pieces(rollout, range(4), logps.size(1))}  # fmt: skip
    trainer._step_sums = defaultdict(float)
    trainer.experience = collector.examine(rollout, trainer.model)
    trainer.experience.advantages_RT += 1
    trainer.compute_loss(trainer.model, inputs).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trainer._policy_parameters.values())


def test_answers_are_sampled_in_batches_of_like_prompts_and_keep_their_order(
    make_stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def watch(model: Any, prompts: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        asked.append([len(ids) for ids in prompts])
        return generate_answers(model, prompts, *args, **kwargs)

    monkeypatch.setattr("alignkit.train.ppo.trainer.generate_answers", watch)
    found = []
    for size, engine in ((8, "transformers"), (2, "transformers"), (3, "continuous")):
        extra = f", min_new_tokens: 2, temperature: 0.8, generation: {{batch_size: {size}, engine: {engine}}}"
        trainer = build(make_stage(recipe(lora=True, extra=extra), "ppo"), tmp_path, f"by{size}").trainer
        disturb(trainer)  # the adapters act
        found.append(trainer.collector.sample(range(4), (0, 0), repeats=2))
        assert trainer.model.training
    assert found[0].sampled_ids == found[1].sampled_ids == found[2].sampled_ids
    assert found[0].prompt_ids == found[1].prompt_ids
    assert list(map(len, asked)) == [8, 2, 2, 2, 2, 8] and all(
        sorted(sizes) == sizes for sizes in (asked[0], sum(asked[1:5], []))
    )
    assert all(len(ids) > 1 for ids in found[0].sampled_ids)


def test_groups_without_spread_are_sampled_again_and_alike_in_a_resumed_run(
    make_stage: Callable, tmp_path: Path
) -> None:
    extra = ", preset: dapo, num_generations: 2, minibatches: 1, dynamic_sampling: 3, stop: e"
    stage = make_stage(recipe(extra=extra).replace("ppo_epochs: 2, ", ""), "ppo")
    trainer = build(stage, tmp_path).trainer
    collector, seen = trainer.collector, []
    chosen = collector.prompts[3]["prompt_ids"]

    def score(rollout: Any) -> Any:
        seen.append([tuple(ids) for ids in rollout.prompt_ids])
        spread = torch.arange(len(rollout)) % 2
        known = torch.tensor([ids == chosen for ids in rollout.prompt_ids])
        total = torch.where(known, torch.zeros(len(rollout)), spread.float())
        return total, {"a": total.clone(), "b": 0 * total}

    collector.rewards = score
    first = next(n for n in range(8) if tuple(chosen) in {
        tuple(collector.prompts[m]["prompt_ids"]) for m in prompt_numbers(2 * n, 2, num_prompts=16, seed=stage.seed)
    })  # fmt: skip
    experience = collector.collect(first, trainer.model, step=0)
    assert [len(prompts) for prompts in seen] == [4, 2]  # one group of the first rollout had no spread
    assert chosen not in experience.rollout.prompt_ids and experience.metrics["resampled_groups"] == 1
    assert experience.metrics["flat_groups"] == 0 and experience.metrics["reward"] == 0.5
    again = collector.collect(first, trainer.model, step=0)
    assert again.rollout.sampled_ids == experience.rollout.sampled_ids
    for ids, text, ended in zip(
        experience.rollout.sampled_ids, experience.rollout.completions, experience.rollout.ended, strict=True
    ):
        text = text[0]["content"]
        assert ended == ("e" in text or ids[-1] in collector.sampling.stop_ids)
        assert "e" not in collector.chat.tokenizer.decode(ids[:-1])
    chosen = None  # every group has a spread, or none has: the tries are bounded
    collector.rewards = lambda rollout: (torch.zeros(len(rollout)), {})
    assert collector.collect(0, trainer.model, step=0).metrics["resampled_groups"] == 3 * 2


def test_tokens_of_another_engine_weigh_what_the_trainer_gives_them(make_stage: Callable, tmp_path: Path) -> None:
    trainer = build(make_stage(recipe(), "ppo"), tmp_path).trainer
    collector = trainer.collector
    rollout = collector.sample(range(4), (0, 0))
    plain = collector.examine(rollout, trainer.model)
    rollout.engine_logps = [
        row[: len(ids)].tolist() for row, ids in zip(plain.logps_RT, rollout.sampled_ids, strict=True)
    ]
    rollout.engine_logps[0][0] += np.log(4.0)  # the engine found it four times as likely
    rollout.engine_logps[1][0] -= np.log(8.0)  # and an eighth: the weight is capped
    rollout.engine_logps[2][0] = None  # vLLM's word for a number that is none
    weights = collector.examine(rollout, trainer.model).weights_RT
    expected = plain.weights_RT.clone()
    expected[0, 0], expected[1, 0] = 0.25, 2.0
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)


# ---- arithmetic without models ----


def options(**values: Any) -> PpoOptions:
    return PpoOptions(data=[{"path": "x"}], reward=["builtin:true-reward"], **values)


def test_scores_are_normalised_then_clipped_then_charged_for_a_missing_end() -> None:
    raw, ended = torch.tensor([1.0, 5.0, -3.0]), [True, True, False]
    penalised = finish_scores(options(missing_eos=MissingEos(penalty=1.5), reward_clip=2.0), raw, ended, (0.5, 0.25))
    assert penalised.tolist() == [0.75, 2.0, -1.25 - 1.5]
    replaced = finish_scores(options(missing_eos=MissingEos(score=-1.0)), raw, ended, None)
    assert replaced.tolist() == [1.0, 5.0, -1.0]
    gain, bias = measure_norm(raw, "gain_and_bias")
    normalised = gain * raw + bias
    assert float(normalised.mean()) == pytest.approx(0, abs=1e-6)
    assert float(normalised.std(correction=0)) == pytest.approx(1, rel=1e-6)
    assert measure_norm(raw, "bias") == (1.0, -1.0)


def test_rewards_too_large_to_be_squared_are_named_unless_they_are_clipped(
    make_stage: Callable, tmp_path: Path
) -> None:
    trainer = build(make_stage(recipe(), "ppo"), tmp_path).trainer
    rollout = trainer.collector.sample(range(4), (0, 0))
    huge = torch.tensor([1.0, -1e38, 2.0, 3.0])
    with pytest.raises(NonFiniteError, match="the reward of answer 1 of this rollout is -1e.38.*set reward_clip"):
        trainer.collector.examine(rollout, trainer.model, (huge, {}))
    trainer.collector.options = trainer.collector.options.model_copy(update={"reward_clip": 5.0})
    assert trainer.collector.examine(rollout, trainer.model, (huge, {})).advantages_RT.isfinite().all()


def test_answers_are_cut_after_the_first_truncation_token_that_counts() -> None:
    rule = (7, 2)
    assert cut_answer([1, 7, 3, 7, 4], stop_ids=[9], truncation=rule) == ([1, 7, 3, 7], True)
    assert cut_answer([1, 7, 3, 9], stop_ids=[9], truncation=rule) == ([1, 7, 3, 9], False)
    assert cut_answer([1, 9], stop_ids=[9], truncation=None) == ([1, 9], True)
    assert cut_answer([1, 2], stop_ids=[9], truncation=None) == ([1, 2], False)
    assert repetition([[1, 2, 1, 2], [1, 2]]) == pytest.approx(1 - 2 / 4)


def test_every_prompt_is_read_once_before_any_is_read_twice() -> None:
    numbers = [n for first in range(0, 12, 4) for n in prompt_numbers(first, 4, num_prompts=6, seed=3)]
    assert sorted(numbers[:6]) == sorted(numbers[6:]) == list(range(6)) and numbers[:6] != numbers[6:]
    assert sort_steps(np.array([0, 3, 2, 1]), [5, 6, 6, 9], step_size=2).tolist() == [3, 0, 2, 1]
    assert answer_order(5, seed=0, rollout=1, epoch=0).tolist() == [0, 1, 2, 3, 4]
    assert sorted(answer_order(50, seed=0, rollout=1, epoch=1)) == list(range(50))
    assert (
        answer_order(50, seed=0, rollout=1, epoch=1).tolist() != answer_order(50, seed=0, rollout=2, epoch=1).tolist()
    )


def test_padding_marks_the_position_before_every_answer_token() -> None:
    batch = pad_answers([[1, 2], [3]], [[4], [5, 6, 7]], pad_id=0, num_columns=4, sampling=Sampling(min_new_tokens=2))
    assert batch.input_ids_BL.tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert batch.attention_mask_BL.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.targets_N.tolist() == [4, 5, 6, 7]
    assert list(zip(batch.rows_N.tolist(), batch.columns_N.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 1), (1, 2)]
    assert batch.early_N is not None and batch.early_N.tolist() == [True, True, True, False]
    assert batch.spread(torch.arange(1.0, 5.0)).tolist() == [[1, 0, 0, 0], [2, 3, 4, 0]]


def test_a_reward_that_rises_with_repetition_is_flagged_once() -> None:
    monitor = HackingMonitor()
    fine = {"reward": 0.0, "response_length": 20.0, "repetition": 0.1}
    odd = {"reward": 2.0, "response_length": 21.0, "repetition": 0.9}
    said = [monitor.look(metrics) for metrics in [fine] * 5 + [odd] * 6]
    assert sum(text is not None for text in said) == 1
    assert "repetition rose from 0.10 to" in next(text for text in said if text)
    assert HackingMonitor(**json.loads(json.dumps(asdict(monitor)))) == monitor
    assert not any(HackingMonitor().look({**fine, "reward": float(n)}) for n in range(12))


@pytest.mark.parametrize(
    ("ended", "scores", "extra", "expected"),
    [
        (
            [False, False],
            [-1.0, -1.0],
            {"missing_eos": MissingEos(score=-1)},
            "all 2 answers.*max_new_tokens.*score -1",
        ),
        (
            [False, False],
            [0.0, 1.0],
            {},
            "all 2 answers of the first rollout are cut off at max_new_tokens .64.; raise",
        ),
        ([True, False], [2.0, 2.0], {}, "all 2 answers of the first rollout have the reward 2: nothing tells"),
        ([True, False], [2.0, 3.0], {}, None),
    ],
)
def test_a_first_rollout_that_teaches_nothing_is_named(
    ended: list[bool], scores: list[float], extra: dict[str, Any], expected: str | None
) -> None:
    options = PpoOptions(reward=[{"model": "builtin:true-reward"}], data=["builtin:prompts"], **extra)
    found = judge_first(options, ended, scores)
    assert (found is None) if expected is None else (found is not None and re.search(expected, found))


def test_models_of_their_own_are_all_accounted_for(make_stage: Callable, tmp_path: Path) -> None:
    text = recipe(reward="rm")
    launch_stage(make_stage(text, "rm"))
    built = build(make_stage(text, "ppo"), tmp_path)
    assert [part["roles"] for part in built.record["roles"]] == [("policy",), ("reference",), ("critic",), ("reward",)]
    # value_init: reward, the default here: the critic starts with the reward model's values.
    collector = built.trainer.collector
    rollout = collector.sample(range(4), (0, 0))
    *_, values = collector.read(rollout, built.trainer.model)
    alone = load_trained(tmp_path / "runs/t/rm", device="cpu", reward=True)
    for row, (prompt, answer) in enumerate(zip(rollout.prompt_ids, rollout.sampled_ids, strict=True)):
        with torch.no_grad():
            expected = alone(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0, 0]
        torch.testing.assert_close(values[row, len(answer) - 1], expected, rtol=0, atol=1e-4)


def test_the_critic_of_a_classifier_with_two_labels_starts_from_their_log_odds(
    make_stage: Callable, tmp_path: Path
) -> None:
    config = builtin_config("builtin:tiny-llama")
    config.num_labels, config.pad_token_id = 2, 509
    torch.manual_seed(0)
    two = AutoModelForSequenceClassification.from_config(config).eval()
    two.save_pretrained(tmp_path / "two")
    builtin_tokenizer().save_pretrained(tmp_path / "two")
    trainer = build(make_stage(recipe(reward="./two", extra=", chat: false"), "ppo"), tmp_path).trainer
    rollout = trainer.collector.sample(range(2), (0, 0))
    *_, values = trainer.collector.read(rollout, trainer.model)
    for row, (prompt, answer) in enumerate(zip(rollout.prompt_ids, rollout.sampled_ids, strict=True)):
        with torch.no_grad():
            lost, won = two(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0]
        torch.testing.assert_close(values[row, len(answer) - 1], won - lost, rtol=0, atol=1e-4)
    trainer.critic.save(tmp_path / "critic", builtin_tokenizer())
    assert json.loads((tmp_path / "critic/config.json").read_text()).get("num_labels", 1) == 1
    assert load_file(tmp_path / "critic/model.safetensors")["score.weight"].shape[0] == 1


ROUNDED = """
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit.models.logprobs import pad_answers
from alignkit.recipe import load_recipe, resolve
from alignkit.runs.directory import RunDir
from alignkit.train import ppo
from alignkit.train.ppo.roles import read_answers

CASTS = Counter()


class Count(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            CASTS[args[0].data_ptr() if args[0].data_ptr() in WEIGHTS else None] += 1
        return func(*args, **(kwargs or {}))


run = RunDir(Path("run").absolute())
run.path.mkdir()
trainer = ppo.build(resolve(load_recipe(Path("recipe.yaml")), "ppo"), run).trainer
trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
reference = trainer.roles.reference
print(sorted({str(p.dtype) for p in reference.parameters()}), reference.lm_head.weight.dtype)
WEIGHTS = {p.data_ptr() for p in trainer.model.parameters()}
prompts, found = [[5, 6, 7], [8, 9]], []
uniforms = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
autocast = trainer.accelerator.autocast
for context in (autocast, nullcontext):
    CASTS.clear()
    trainer.accelerator.autocast = context
    with Count():
        found.append(trainer._sample(prompts, uniforms, 1)[0])
    del CASTS[None]
    print(max(CASTS.values()), min(CASTS.values()))
print(found[0] == found[1], max(map(len, found[0])))
batch = pad_answers(prompts, found[0], pad_id=0)
with autocast(), torch.no_grad():
    print(torch.equal(trainer.roles.reference_logps(batch), read_answers(trainer.model, batch)[0]))
"""


def test_autocast_rounds_each_weight_once_for_all_tokens_and_the_reference_is_held_rounded(
    run_code: Callable, tmp_path: Path
) -> None:
    """With the same answers, and log-probabilities equal to the last bit."""
    text = recipe(extra=", min_new_tokens: 8").replace("rm:", "launch: {mixed_precision: bf16, device: cpu}\nrm:")
    (tmp_path / "recipe.yaml").write_text(text)
    done = run_code(ROUNDED)
    types, once, anew, answers, equal = done.stdout.splitlines()[-5:]
    assert types == "['torch.bfloat16', 'torch.float32'] torch.float32", done.stderr
    assert (once, anew) == ("1 1", "8 8")  # of 8 tokens
    assert (answers, equal) == ("True 8", "True")
