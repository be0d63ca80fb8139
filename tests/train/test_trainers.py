"""Every trainer on a real tiny model: losses by hand, step-0 checks, guards, and what a run leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignkit.errors import DataError, ModelError, NonFiniteError, RecipeError, RunError, UsageError
from alignkit.launch.placement import Command
from alignkit.launch.run import launch_stage
from alignkit.recipe import Stage
from alignkit.runs.directory import RunDir

LORA = "lora: {r: 4, alpha: 8}\n"
BASE = "name: t\nmodel: {path: builtin:tiny-llama}\n"
SHORT = "batch_size: 4, max_steps: 4, learning_rate: 1e-3, samples: {num: 2, max_new_tokens: 8}"
PAIRS = "data: {path: builtin:preferences, max_rows: 24}"


def build(stage: Stage, tmp_path: Path) -> object:
    """Build a stage's trainer without training it."""
    import importlib

    run = RunDir(tmp_path / "built")
    run.path.mkdir(exist_ok=True)
    return importlib.import_module(f"alignkit.train.{stage.method}").build(stage, run)


def first_batch(trainer: object) -> dict:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))  # type: ignore[attr-defined]


def completion_logps(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Sum log-probabilities of the completions with a plain softmax over plain logits."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return (logps * batch["completion_mask"][:, 1:]).sum(1)


def disturb(model: torch.nn.Module) -> None:
    """Move the trained parameters, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def moved_logps(trainer: object) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """A batch, and its completions' log-probabilities before the policy moved and after."""
    model = trainer.model.eval()  # type: ignore[attr-defined]
    batch = first_batch(trainer)
    before = completion_logps(model, batch)
    disturb(model)
    return batch, before, completion_logps(model, batch)


@pytest.mark.parametrize("lora", ["", LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ("", lambda m: -torch.nn.functional.logsigmoid(0.1 * m)),
        (
            ", loss_type: cdpo, label_smoothing: 0.2",
            lambda m: -0.8 * torch.nn.functional.logsigmoid(0.1 * m) - 0.2 * torch.nn.functional.logsigmoid(-0.1 * m),
        ),
        (", loss_type: ipo_sum", lambda m: (m - 5.0) ** 2),
    ],
    ids=["sigmoid", "cdpo", "ipo_sum"],
)
def test_dpo_losses_equal_those_computed_from_plain_logits(
    options: str, by_hand: Callable, lora: str, make_stage: Callable, tmp_path: Path
) -> None:
    built = build(make_stage(f"{BASE}{lora}dpo: {{{PAIRS}, {SHORT}, beta: 0.1{options}}}", "dpo"), tmp_path)
    trainer = built.trainer
    batch, before, after = moved_logps(trainer)
    ratios = after - before
    margins = ratios[:4] - ratios[4:]
    assert margins.abs().max() > 0.1
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert loss.item() == pytest.approx(by_hand(margins).mean().item(), rel=1e-4, abs=1e-5)
    measured = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    assert measured["rewards/chosen"] == pytest.approx(0.1 * ratios[:4].mean().item(), abs=1e-4)
    assert measured["rewards/margins"] == pytest.approx(0.1 * margins.mean().item(), abs=1e-4)


@pytest.mark.parametrize("method", ["sft", "dpo", "rm"])
def test_faster_kernels_leave_the_curve_as_it_is(
    method: str, make_stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.trainer import utils

    from alignkit.models import kernels

    data = "data: {path: builtin:instructions, max_rows: 24}" if method == "sft" else PAIRS
    rows: dict[str, list[dict]] = {}
    names = ("_ChunkedLogProbFunction", "_use_triton")
    kernels.use_head()
    before = {name: getattr(utils, name) for name in names}
    from trl.kernels import ChunkedLogProbFunction

    for kind in ("fast", "plain"):
        if kind == "plain":
            monkeypatch.setattr(kernels, "use_head", lambda: None)
            monkeypatch.setattr(kernels, "leave_out_masks", lambda model: None)
            monkeypatch.setattr(utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
            monkeypatch.setattr(utils, "_use_triton", lambda device: False)
        recipe = f"name: {kind}\nmodel: {{path: builtin:tiny-llama}}\n{method}: {{{data}, {SHORT}, logging_steps: 1}}"
        launch_stage(make_stage(recipe, method))
        metrics = (tmp_path / f"runs/{kind}/{method}/metrics.jsonl").read_text().splitlines()
        rows[kind] = [row for row in map(json.loads, metrics) if "loss" in row]
    assert before["_ChunkedLogProbFunction"] is not ChunkedLogProbFunction and len(rows["fast"]) == 4
    for fast, plain in zip(rows["fast"], rows["plain"], strict=True):
        timed = {name for name in fast if "second" in name or "time" in name}
        for name in fast.keys() - timed:
            assert fast[name] == pytest.approx(plain[name], rel=2e-5, abs=1e-5), name


@pytest.mark.parametrize("adapter", ["continue", "stack", "merge"])
def test_a_started_adapter_is_the_reference_and_is_not_wiped(
    adapter: str, make_stage: Callable, tmp_path: Path
) -> None:
    text = (
        f"{BASE}{LORA}sft: {{data: {{path: builtin:instructions, max_rows: 24}}, {SHORT}}}\n"
        f"dpo: {{start_from: sft, {PAIRS}, {SHORT}, adapter: {adapter}}}"
    )
    launch_stage(make_stage(text, "sft"))
    built = build(make_stage(text, "dpo"), tmp_path)
    trainer = built.trainer
    trainer.model.eval()
    batch = first_batch(trainer)
    start = completion_logps(trainer.model, batch)
    with trainer.model.disable_adapter():
        base = completion_logps(trainer.model, batch)
    if adapter != "merge":  # there the base holds the adapter already
        assert (start - base).abs().max() > 1e-3
    disturb(trainer.model)
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(reference, start, rtol=0, atol=2e-4)
    assert (completion_logps(trainer.model, batch) - start).abs().max() > 0.05  # the policy is active again
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all(".default" in name for name in trained)
    if adapter == "stack":  # the one below acts where the loss has no reference, too
        alone = build(make_stage(text, "dpo", "dpo.loss_type=simpo"), tmp_path).trainer
        alone.model.eval()
        torch.testing.assert_close(completion_logps(alone.model, batch), start, rtol=0, atol=2e-4)


def test_soft_labels_train_towards_the_label(make_stage: Callable, write_rows: Callable, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no", "label": 0.25} for n in range(8)]
    write_rows(rows)
    stage = make_stage(f"{BASE}dpo: {{data: ./rows.jsonl, {SHORT}, beta: 0.5}}", "dpo")
    trainer = build(stage, tmp_path).trainer
    batch, before, after = moved_logps(trainer)
    ratios = after - before
    scaled = 0.5 * (ratios[:4] - ratios[4:])
    expected = -0.25 * torch.nn.functional.logsigmoid(scaled) - 0.75 * torch.nn.functional.logsigmoid(-scaled)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected.mean().item(), rel=1e-4)


def test_kway_loss_of_the_trainer_equals_a_loop_over_prompts_and_pairs(make_stage: Callable, tmp_path: Path) -> None:
    stage = make_stage(f"{BASE}rm: {{data: {{path: builtin:ranked, max_rows: 12}}, {SHORT}}}", "rm")
    trainer = build(stage, tmp_path).trainer
    trainer.model.eval()
    rows = [trainer.train_dataset[number] for number in range(3)]
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows))).item()
    means = []
    for row in rows:
        rewards = []
        for ids in row["answers_ids"]:
            tensor = torch.tensor([ids])
            with torch.no_grad():
                rewards.append(trainer.model(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits.item())
        pairs = [
            math.log(1 + math.exp(rewards[worse] - rewards[better]))
            for better in range(len(rewards))
            for worse in range(better + 1, len(rewards))
            if row["scores"][better] != row["scores"][worse]
        ]
        means.append(sum(pairs) / len(pairs))
    assert loss == pytest.approx(sum(means) / 3, rel=1e-5)


def test_a_normalised_reward_has_mean_zero_and_unit_deviation(make_stage: Callable, tmp_path: Path) -> None:
    text = f"{BASE}{LORA}rm: {{data: {{path: builtin:ranked, max_rows: 24}}, {SHORT}, normalize: gain_and_bias}}"
    stage = make_stage(text, "rm")
    launch_stage(stage)
    model_dir = tmp_path / "runs/t/rm/model"
    norm = json.loads((model_dir / "reward_norm.json").read_text())
    from alignkit.models.frozen import score_ids
    from alignkit.models.load import load_trained

    table = build(stage, tmp_path).tables.train
    model = load_trained(model_dir, device="cpu", reward=True)
    raw = score_ids(model, [row["answers_ids"][0] for row in table], pad_id=model.config.pad_token_id)
    normal = norm["gain"] * raw + norm["bias"]
    assert normal.mean().item() == pytest.approx(0, abs=1e-4)
    assert normal.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_a_run_leaves_its_files_and_is_not_trained_twice(
    make_stage: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"{BASE}{LORA}sft: {{data: {{path: builtin:instructions, max_rows: 40}}, eval: 0.2, {SHORT}}}"
    result = launch_stage(make_stage(text, "sft"))
    run = tmp_path / "runs/t/sft"
    assert {path.name for path in run.iterdir()} == {
        ".lock", ".sealed", "recipe.yaml", "stage.json", "metrics.jsonl", "checkpoints", "model", "base", "probe.json",
        "samples.jsonl", "result.json", "preview.json", "report.html", "prompts.u64",
    }  # fmt: skip
    record = json.loads((run / "stage.json").read_text())
    assert record["parameters"]["trainable"] > 0 and record["lineage"][0]["path"] == "builtin:tiny-llama"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(row["when"], row["step"]) for row in samples] == [("before", 0)] * 2 + [("during", 2)] * 2 + [
        ("after", 4)
    ] * 2
    assert result.metrics["eval_loss"] > 0 and result.tokens > 0
    assert not list(run.rglob("*.bin")), "a pickle of the training arguments was kept"
    before = (run / "model/adapter_model.safetensors").stat().st_mtime_ns
    assert launch_stage(make_stage(text, "sft")).to_dict() == result.to_dict()
    assert (run / "model/adapter_model.safetensors").stat().st_mtime_ns == before
    assert "already finished" in capsys.readouterr().err


def test_a_changed_setting_is_refused_by_name_before_anything_loads(make_stage: Callable) -> None:
    text = f"{BASE}{LORA}sft: {{data: {{path: builtin:instructions, max_rows: 24}}, {SHORT}}}"
    launch_stage(make_stage(text, "sft"))
    with pytest.raises(RunError) as error:
        launch_stage(make_stage(text, "sft", "sft.learning_rate=2e-3", "seed=7"))
    assert "sft.learning_rate: 0.001 -> 0.002" in str(error.value)
    assert "seed: 0 -> 7" in str(error.value)


def test_a_start_that_was_changed_after_training_is_refused(make_stage: Callable, tmp_path: Path) -> None:
    text = (
        f"{BASE}{LORA}sft: {{data: {{path: builtin:instructions, max_rows: 24}}, {SHORT}}}\n"
        f"dpo: {{start_from: sft, {PAIRS}, {SHORT}}}"
    )
    launch_stage(make_stage(text, "sft"))
    weights = tmp_path / "runs/t/sft/model/adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="adapter_model.safetensors has other bytes than were saved"):
        launch_stage(make_stage(text, "dpo"))
    result = tmp_path / "runs/t/sft/result.json"  # one of a version that kept no checksums
    result.write_text(json.dumps({**json.loads(result.read_text()), "files": {}}))
    with pytest.raises(ModelError, match="dpo does not start where .* ended"):
        launch_stage(make_stage(text, "dpo"))


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_last_good_checkpoint(
    make_stage: Callable, tmp_path: Path
) -> None:
    text = (
        f"{BASE}sft: {{data: {{path: builtin:instructions, max_rows: 64}}, batch_size: 4, max_steps: 12, "
        "save_steps: 1, learning_rate: 1e22, warmup_steps: 0, max_grad_norm: 0, samples: {num: 0}}"
    )
    with pytest.raises(
        NonFiniteError, match="stopped before the optimizer step, the last good checkpoint is checkpoint-"
    ):
        launch_stage(make_stage(text, "sft"))
    kept = list((tmp_path / "runs/t/sft/checkpoints").glob("checkpoint-*/model.safetensors"))
    assert kept
    assert all(torch.isfinite(tensor).all() for path in kept for tensor in load_file(path).values())
    assert not (tmp_path / "runs/t/sft/model").exists()


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        ("1e39", "step 1: the update has left weights that are not finite"),
        ("1e30", "computes values that are not finite.*Lower learning_rate"),  # of weights that are finite
    ],
)
def test_a_last_update_that_breaks_the_model_is_refused(
    make_stage: Callable, tmp_path: Path, rate: str, said: str
) -> None:
    text = (
        f"{BASE}sft: {{data: {{path: builtin:instructions, max_rows: 64}}, batch_size: 4, max_steps: 1, "
        f"learning_rate: {rate}, warmup_steps: 0, max_grad_norm: 0, samples: {{num: 0}}}}"
    )
    with pytest.raises(NonFiniteError, match=said):
        launch_stage(make_stage(text, "sft"))
    assert rate == "1e30" or not list((tmp_path / "runs/t/sft/checkpoints").glob("checkpoint-*"))
    assert not (tmp_path / "runs/t/sft/model").exists()


def test_nf4_training_leaves_the_base_byte_identical_at_4_127_bits(make_stage: Callable, tmp_path: Path) -> None:
    text = (
        "name: t\nmodel: {path: builtin:tiny-llama, quantization: nf4, "
        "config: {hidden_size: 512, intermediate_size: 512}}\n"
        f"{LORA}sft: {{data: {{path: builtin:instructions, max_rows: 24}}, {SHORT}}}"
    )
    launch_stage(make_stage(text, "sft"))  # compares the base's bytes itself, and raises when they differ
    facts = json.loads((tmp_path / "runs/t/sft/stage.json").read_text())["parameters"]
    assert facts["bits_per_quantized_parameter"] == pytest.approx(4.127, abs=0.02)


LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "cdpo", "ipo_sum", "dpop", "simpo", "cpo", "orpo", "kto",
    "apo_zero_unpaired",
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_every_preference_loss_trains_and_changes_the_policy(loss: str, make_stage: Callable, tmp_path: Path) -> None:
    smoothing = ", label_smoothing: 0.1" if loss in ("exo_pair", "robust", "cdpo") else ""
    short = "batch_size: 4, max_steps: 2, learning_rate: 1e-2, warmup_steps: 0, samples: {num: 0}"
    result = launch_stage(make_stage(f"{BASE}{LORA}dpo: {{{PAIRS}, {short}, loss_type: {loss}{smoothing}}}", "dpo"))
    assert math.isfinite(result.metrics["loss"])
    tensors = load_file(tmp_path / "runs/t/dpo/model/adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in tensors.items() if "lora_B" in name)


def test_all_losses_are_tried() -> None:
    from alignkit.recipe.words import KTO_LOSSES, OWN_LOSSES, trl_fields

    assert {*trl_fields("dpo")["loss_type"]["items"]["enum"], *OWN_LOSSES, *KTO_LOSSES} == set(LOSSES)


@pytest.mark.parametrize("lora", ["", LORA], ids=["full", "lora"])
def test_a_loss_without_a_reference_holds_none_and_equals_its_formula(
    lora: str, make_stage: Callable, tmp_path: Path
) -> None:
    text = f"{BASE}{lora}dpo: {{{PAIRS}, {SHORT}, loss_type: simpo, beta: 2.0, simpo_gamma: 0.3}}"
    trainer = build(make_stage(text, "dpo"), tmp_path).trainer  # type: ignore[attr-defined]
    assert trainer.ref_model is None
    assert "ref" not in getattr(trainer.model, "peft_config", {})
    trainer.model.eval()
    batch = first_batch(trainer)
    means = completion_logps(trainer.model, batch) / batch["completion_mask"][:, 1:].sum(1)
    expected = -torch.nn.functional.logsigmoid(2.0 * (means[:4] - means[4:]) - 0.3).mean()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", ["apo_zero", "apo_down", "rpo", "mpo", "simpo-sft"])
def test_losses_of_trl_and_their_mixes_are_those_of_their_papers(
    loss: str, make_stage: Callable, tmp_path: Path
) -> None:
    """APO (arXiv 2408.06266), eq. 3 and 4; RPO (2404.19733), eq. 2, by tokens of the batch; MPO (2411.10442), eq. 4.

    BCO's reward shift, a running mean in its paper (2404.04656), is 0 in TRL.
    """
    mixes = {"rpo": "[sigmoid, sft], loss_weights: [1.0, 0.7]",
             "simpo-sft": "[simpo, sft], loss_weights: [0.5, 0.7], simpo_gamma: 0.3",
             "mpo": "[sigmoid, bco_pair, sft], loss_weights: [0.8, 0.2, 1.0]"}  # fmt: skip
    text = f"{BASE}dpo: {{{PAIRS}, {SHORT}, beta: 0.1, loss_type: {mixes.get(loss, loss)}}}"
    trainer = build(make_stage(text, "dpo"), tmp_path).trainer  # type: ignore[attr-defined]
    batch, before, after = moved_logps(trainer)
    chosen, rejected = (0.1 * (after - before)).chunk(2)
    sigmoid = torch.nn.functional.logsigmoid
    nll = -after[:4].sum() / batch["completion_mask"][:4, 1:].sum()
    means = after / batch["completion_mask"][:, 1:].sum(1)
    expected = {
        "apo_zero": (1 - chosen.sigmoid() + rejected.sigmoid()).mean(),
        "apo_down": (chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()).mean(),
        "rpo": -sigmoid(chosen - rejected).mean() + 0.7 * nll,
        "simpo-sft": -0.5 * sigmoid(0.1 * (means[:4] - means[4:]) - 0.3).mean() + 0.7 * nll,
        "mpo": -0.8 * sigmoid(chosen - rejected).mean() + nll
        - 0.2 * (sigmoid(chosen) + sigmoid(-rejected)).mean(),
    }[loss]  # fmt: skip
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_keys_of_a_loss_need_it(make_stage: Callable) -> None:
    with pytest.raises(RecipeError, match="simpo_gamma has no effect without loss_type: simpo"):
        make_stage(f"{BASE}dpo: {{{PAIRS}, {SHORT}, simpo_gamma: 0.3}}", "dpo")
    with pytest.raises(RecipeError, match="precompute_ref_log_probs has no effect with loss_type: orpo"):
        make_stage(f"{BASE}dpo: {{{PAIRS}, {SHORT}, loss_type: orpo, precompute_ref_log_probs: true}}", "dpo")


def test_single_answers_need_a_loss_for_single_answers(make_stage: Callable) -> None:
    stage = make_stage(f"{BASE}dpo: {{data: {{path: builtin:unpaired, max_rows: 8}}, {SHORT}}}", "dpo")
    with pytest.raises(DataError, match="set loss_type: kto"):
        launch_stage(stage)


def test_precomputed_reference_log_probabilities_give_the_same_training(make_stage: Callable, tmp_path: Path) -> None:
    text = f"{BASE}{LORA}dpo: {{{PAIRS}, {SHORT}, precompute_ref_log_probs: CHOICE}}"
    losses = []
    for choice in ("true", "false"):
        stage = make_stage(text.replace("CHOICE", choice).replace("name: t", f"name: {choice}x"), "dpo")
        losses.append(launch_stage(stage).metrics["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_packing_puts_whole_conversations_together_and_keeps_their_masks(make_stage: Callable, tmp_path: Path) -> None:
    text = f"{BASE}sft: {{data: {{path: builtin:instructions, max_rows: 40}}, packing: true, max_length: 256, {SHORT}}}"
    built = build(make_stage(text, "sft"), tmp_path)
    rows, plain = built.trainer.train_dataset, built.tables.train
    assert len(rows) < len(plain) / 2
    assert max(len(ids) for ids in rows["input_ids"]) <= 256
    learnt = [sum(label != -100 for labels in table["labels"] for label in labels) for table in (rows, plain)]
    assert learnt[0] == learnt[1]
    result = launch_stage(make_stage(text, "sft"))
    assert math.isfinite(result.metrics["loss"])


def test_packed_rows_give_the_loss_of_rows_alone(make_stage: Callable, tmp_path: Path) -> None:
    data = "data: {path: builtin:instructions, max_rows: 4}"
    short = "batch_size: 4, micro_batch_size: 4, max_steps: 1, learning_rate: 1e-3, samples: {num: 0}"
    losses = []
    for packing in ("false", "true"):
        text = f"{BASE}sft: {{{data}, packing: {packing}, max_length: 512, {short}}}".replace(
            "name: t", f"name: {packing}x"
        )
        losses.append(launch_stage(make_stage(text, "sft")).metrics["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_an_allowed_change_of_the_learning_rate_has_its_effect(make_stage: Callable, tmp_path: Path) -> None:
    text = (
        f"{BASE}{LORA}sft: {{data: {{path: builtin:instructions, max_rows: 64}}, batch_size: 4, "
        "max_steps: MAX, save_steps: 2, learning_rate: RATE, lr_scheduler_type: constant, warmup_steps: 0, "
        "samples: {num: 0}, logging_steps: 1}"
    )
    launch_stage(make_stage(text.replace("MAX", "4").replace("RATE", "1e-3"), "sft"))
    run = tmp_path / "runs/t/sft"
    (run / "result.json").unlink()
    changed = make_stage(text.replace("MAX", "8").replace("RATE", "5e-4"), "sft")
    launch_stage(changed, Command(changed, (), allow_change=("learning_rate", "max_steps")))
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rates = {row["step"]: row["learning_rate"] for row in rows if "loss" in row}
    assert [rates[step] for step in (4, 5, 8)] == [1e-3, 5e-4, 5e-4]


def test_a_finished_run_whose_data_changed_is_not_called_finished(
    make_stage: Callable, write_rows: Callable, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{number}", "completion": "yes"} for number in range(8)]
    write_rows(rows)
    text = f"{BASE}sft: {{data: ./rows.jsonl, {SHORT}}}"
    launch_stage(make_stage(text, "sft"))
    write_rows([*rows, {"prompt": "9", "completion": "no"}])
    with pytest.raises(RunError, match="data: "):
        launch_stage(make_stage(text, "sft"))


def test_margins_raise_the_loss_expected_at_step_zero(make_stage: Callable, write_rows: Callable) -> None:
    write_rows([{"prompt": f"{n}", "chosen": "yes", "rejected": "no", "margin": 9.0} for n in range(8)])
    result = launch_stage(make_stage(f"{BASE}rm: {{data: ./rows.jsonl, {SHORT}}}", "rm"))
    assert result.metrics["loss"] > 3


def test_soft_labels_are_refused_by_losses_that_cannot_read_them(make_stage: Callable, write_rows: Callable) -> None:
    write_rows([{"prompt": f"{n}", "chosen": "yes", "rejected": "no", "label": 0.7} for n in range(8)])
    with pytest.raises(DataError, match="rows.jsonl:1: has the soft label 0.7"):
        launch_stage(make_stage(f"{BASE}dpo: {{data: ./rows.jsonl, {SHORT}, loss_type: ipo}}", "dpo"))
    with pytest.raises(DataError, match="rows.jsonl:1: has a soft label"):
        launch_stage(make_stage(f"{BASE}rm: {{data: ./rows.jsonl, {SHORT}, loss: best_of}}", "rm"))


def test_a_refused_stage_leaves_nothing_behind(make_stage: Callable, write_rows: Callable, tmp_path: Path) -> None:
    write_rows([{"prompt": "<|im_start|>", "completion": "x"}])
    with pytest.raises(DataError, match="1 rows hold control tokens"):
        launch_stage(make_stage(f"{BASE}sft: {{data: ./rows.jsonl, {SHORT}}}", "sft"))
    assert not (tmp_path / "runs/t/sft").exists()


AUTOCAST = """
import torch
from accelerate import Accelerator
from alignkit.models.start import builtin_config
from alignkit.models.parameters import compare_probes, take_probe
from alignkit.models.start import random_model

def probe(model):
    return take_probe(model, vocab_size=512, reward=False)

model = random_model(builtin_config("builtin:tiny-gpt2"), seed=0, dtype=torch.float32)
before = probe(model)
accelerator = Accelerator(cpu=True, mixed_precision="bf16")
wrapped = accelerator.prepare(model)
print(compare_probes(before, probe(wrapped)) is None)
print(compare_probes(before, probe(accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False))) is None)
"""


def test_a_probe_is_taken_without_the_autocast_wrapper_of_training(run_code: Callable) -> None:
    """Under bfloat16 autocast the wrapped model rounds; what is compared after saving must not."""
    assert run_code(AUTOCAST).stdout == "False\nTrue\n"


@pytest.mark.parametrize(
    "losses", ["[sigmoid, bco_pair, sft], loss_weights: [1.0, 0.5, 0.5], precompute_ref_log_probs: true",
               "[simpo, sft], loss_weights: [1.0, 0.5]"])  # fmt: skip
def test_a_loss_with_an_sft_part_does_not_depend_on_micro_batches(
    losses: str, make_stage: Callable, tmp_path: Path
) -> None:
    text = (
        f"{BASE}dpo: {{data: {{path: builtin:preferences, max_rows: 8}}, batch_size: 8, max_steps: 1, "
        f"samples: {{num: 0}}, logging_steps: 1, loss_type: {losses}}}"
    )
    found, held_out = [], []
    for size in (8, 2, 1):
        trainer = build(make_stage(text, "dpo", f"dpo.micro_batch_size={size}"), tmp_path).trainer
        trainer.eval_dataset = trainer.train_dataset
        held_out.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        found.append(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
    assert held_out == pytest.approx([found[0]] * 3, rel=1e-5)


def test_a_whole_number_is_a_float_where_trl_wants_one(make_stage: Callable, tmp_path: Path) -> None:
    """Configs of mixtures of experts refuse an int for router_aux_loss_coef, which TRL copies into them."""
    from trl import SFTConfig

    from alignkit.train.setup import build_config

    stage = make_stage(f"{BASE}sft: {{data: builtin:reviews, router_aux_loss_coef: 0, logging_steps: 1}}", "sft")
    config = build_config(stage, SFTConfig, tmp_path)
    assert type(config.router_aux_loss_coef) is float and type(config.logging_steps) is int


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        # The last step of a warm-up of 3 is 3/4 of the way; from step 3 on the rates are upstream's.
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0 * 4 / 5, 1.0 * 3 / 5, 1.0 * 2 / 5, 1.0 / 5]),
        ("constant_with_warmup", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine_warmup_with_min_lr", None),  # begins above 0 already: as upstream has it
    ],
)
def test_no_step_is_taken_at_a_rate_of_zero(schedule: str, wanted: list[float] | None, tmp_path: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    from alignkit.train.trainer import Guarded

    kwargs = {"min_lr_rate": 0.1, "warmup_lr_rate": 0.1} if wanted is None else None
    args = TrainingArguments(
        str(tmp_path), lr_scheduler_type=schedule, warmup_steps=3, lr_scheduler_kwargs=kwargs, use_cpu=True
    )
    rates: dict[type, list[float]] = {Guarded: [], Trainer: []}
    for kind, found in rates.items():
        trainer = object.__new__(kind)
        trainer.args, trainer.lr_scheduler = args, None
        trainer.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        trainer.create_scheduler(8)
        for _ in range(8):
            found.append(trainer.optimizer.param_groups[0]["lr"])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
    assert rates[Guarded] == pytest.approx(wanted or rates[Trainer])
    assert min(rates[Guarded]) > 0 and rates[Guarded][3:] == rates[Trainer][3:]


def test_evaluation_takes_no_more_than_its_share_of_training(
    make_stage: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 6 steps of 4 rows with 5 held out: a share of 1 lets 24 x 3 / 5 = 14 evaluations be, of 0.3 four, 0.2 two."""
    evaluated = {}
    for share in ("1.0", "0.3", "0.2", "null"):
        stage = make_stage(
            f"{BASE}sft: {{data: {{path: builtin:instructions, max_rows: 32}}, eval: 0.25, max_steps: 6, "
            f"batch_size: 4, eval_steps: 1, logging_steps: 9, eval_share: {share}, samples: {{num: 0}}}}",
            "sft", f"name=s{share}",
        )  # fmt: skip
        launch_stage(stage, Command(stage, ()))
        rows = map(json.loads, Path(stage.run_dir, "metrics.jsonl").read_text().splitlines())
        evaluated[share] = [row["step"] for row in rows if "eval_loss" in row]
        assert stage.fingerprint_values().get("sft.eval_share") is None
    assert evaluated == {"1.0": [0, 1, 2, 3, 4, 5, 6], "0.3": [0, 2, 4, 6], "0.2": [0, 6], "null": list(range(7))}
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluating")]
    assert said[0].startswith("evaluating every 2 steps instead of 1: 5 held-out rows beside 6 steps of 4 rows")
    assert said[1].startswith("evaluating at the start and the end only: ") and len(said) == 2


def test_metrics_of_evaluate_are_measured_while_training_and_can_be_kept_by(
    make_stage: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        f"{BASE}evaluate: {{max_rows: 5, max_new_tokens: 4}}\n"
        "sft: {data: {path: builtin:instructions, max_rows: 32}, eval: 0.25, max_steps: 6, batch_size: 4, "
        "learning_rate: 0.01, eval_steps: 2, logging_steps: 1, samples: {num: 0}, eval_share: null, MORE}"
    )
    rows, results = {}, {}
    for name, more in {"plain": "save_steps: 9", "measured": "evaluate_every: 3, keep_best: -perplexity"}.items():
        stage = make_stage(text.replace("MORE", more), "sft", f"name={name}")
        results[name] = launch_stage(stage, Command(stage, ())).metrics
        rows[name] = list(map(json.loads, Path(stage.run_dir, "metrics.jsonl").read_text().splitlines()))
    losses = {name: [row["loss"] for row in found if "loss" in row] for name, found in rows.items()}
    assert losses["measured"] == losses["plain"] and len(losses["plain"]) == 6  # nothing of training is moved
    measured = {row["step"]: row for row in rows["measured"] if "eval_perplexity" in row}
    assert list(measured) == [0, 3, 6]
    assert [row["step"] for row in rows["measured"] if "eval_loss" in row] == [0, 2, 3, 4, 6]
    for row in measured.values():  # of the same rows
        assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]), rel=1e-3)
        assert 0 < row["eval_response_length"] <= 4 and -1 <= row["eval_true_reward"] <= 1
    best = min((3, 6), key=lambda step: measured[step]["eval_perplexity"])
    assert results["measured"].get("kept_step", 6) == best
    assert f"step {best} of 6, whose perplexity was the best" in capsys.readouterr().err
    # 5 rows, each read and answered: 25 a measurement, of which half of 0.8 x 72 lets one be
    stage = make_stage(text.replace("MORE", "evaluate_every: 1").replace("null", "0.8"), "sft", "name=bound")
    launch_stage(stage, Command(stage, ()))
    assert "25 rows read and answered beside 6 steps of 4 rows would" in capsys.readouterr().err
    found = list(map(json.loads, Path(stage.run_dir, "metrics.jsonl").read_text().splitlines()))
    assert [row["step"] for row in found if "eval_perplexity" in row] == [0, 6]
    with pytest.raises(RecipeError, match="evaluate_every has no effect without `eval:`"):
        make_stage(f"{BASE}sft: {{data: builtin:instructions, evaluate_every: 2}}", "sft")


def test_a_metric_to_be_kept_by_has_a_sign_and_is_measured(make_stage: Callable) -> None:
    text = f"{BASE}dpo: {{data: builtin:preferences, eval: 0.1, max_steps: 2, batch_size: 2, keep_best: NAME}}"
    signs = {"loss": "-loss", "rewards/accuracies": "+rewards/accuracies", "-eval_rewards/chosen": "-rewards/chosen"}
    for given, wanted in signs.items():
        assert make_stage(text.replace("NAME", given), "dpo").training.keep_best == wanted
    with pytest.raises(RecipeError, match=r"keep_best is rewards/chosen; write \+NAME where"):
        make_stage(text.replace("NAME", "rewards/chosen"), "dpo")
    with pytest.raises(RecipeError, match="patience has no effect without keep_best"):
        make_stage(text.replace("keep_best: NAME", "patience: 2"), "dpo")
    stage = make_stage(text.replace("NAME", "accuracy"), "dpo")
    with pytest.raises(RecipeError, match="keep_best is accuracy, which is not measured .*; there are .*loss.*margins"):
        launch_stage(stage, Command(stage, ()))
