"""The models of a stage: the policy, its reference, a reward model, and what a finished run left.

Deliberately decides only what is loaded and wrapped, and says so in the lineage; training and saving are elsewhere.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignkit.errors import ModelError
from alignkit.models import adapters
from alignkit.models.bases import (
    Precision,
    draw_base,
    is_random,
    pick_device,
    pick_precision,
    read_base,
    write_base,
)
from alignkit.models.files import find_model_dir, inspect_model_dir
from alignkit.models.score import prepare_score_head
from alignkit.models.start import Start, choose_action, find_base, find_start
from alignkit.models.tokens import check_vocabulary, load_tokenizer
from alignkit.recipe.stage import Stage

Model: TypeAlias = PreTrainedModel | PeftModel
# How the reference of DPO is had: the adapter switched off, the frozen copy `ref`, the frozen lower adapter `start`
# alone, or a second model.
Reference = Literal["adapter_off", "ref_adapter", "base_adapter", "model"]


@dataclass
class Loaded:
    """A model to train and what it is made of."""

    model: Model
    reference: Reference | None  # None where the method has no reference
    lineage: list[dict[str, Any]]  # base first; each entry has `role` and `path`
    precision: Precision


def load_policy(stage: Stage, *, run_dir: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Loaded:
    """Load the causal language model a stage trains: full, or a PeftModel with the trainable adapter `default`.

    Random and merged bases of adapters are written to `<run_dir>/base`, so that the adapter loads anywhere with
    plain PEFT. Raises ModelError, or EnvironmentProblem when the hub cannot be reached.
    """
    tokenizer = tokenizer or load_tokenizer(stage)
    start = find_start(stage)
    if start.reward:
        raise ModelError(
            f"{stage.start_dir or stage.model.path} is a reward model; {stage.method} needs a policy to start from",
            where=stage.where(f"{stage.name}.start_from"),
        )
    loaded = _load(stage, start, run_dir, tokenizer, reward=False)
    if stage.method in ("dpo", "ppo"):
        loaded.reference = _make_reference(loaded.model, start, stage)
    return loaded


def load_reward_model(stage: Stage, *, run_dir: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Loaded:
    """Load the sequence classifier with one label that an rm stage trains; its score head is always trainable.

    From a policy it gets a new head drawn from the stage's seed; from a reward model it keeps the head.
    """
    tokenizer = tokenizer or load_tokenizer(stage)
    return _load(stage, find_start(stage), run_dir, tokenizer, reward=True)


def load_reference(stage: Stage, loaded: Loaded) -> PreTrainedModel | None:
    """Return the frozen second model of full fine-tuning, None where adapters give the reference.

    A copy of the policy as it is now: call it before training and before a checkpoint is read.
    """
    if loaded.reference != "model":
        return None
    return copy.deepcopy(loaded.model).requires_grad_(False).eval()


def load_trained(
    model_dir: Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    reward: bool = False,
    quantization: str | None = None,
    trust_code: bool = False,
) -> Model:
    """Load what a stage saved, as a user would, frozen and in eval mode.

    Precision is what it was trained with unless given; `model_dir` is `model/` of a run, a run, or any model.
    """
    directory = find_model_dir(str(model_dir)) or model_dir
    files = inspect_model_dir(directory, trust_code=trust_code)
    if files.reward != reward:
        has, wanted = ("a reward model", "a policy") if files.reward else ("a policy", "a reward model")
        raise ModelError(f"{directory} is {has}, not {wanted}")
    record = files.record
    precision = Precision(
        dtype or getattr(torch, record.get("dtype") or files.config.get("dtype") or "float32"),
        pick_device(device),
        quantization or record.get("quantization", "none"),
        record.get("double_quantization", True),
    )
    source = find_base(files) if files.kind == "adapter" else str(directory)
    model = read_base(source, precision, reward=reward, revision=files.base_revision, trust_code=trust_code)
    if reward and model.config.pad_token_id is None:
        model.config.pad_token_id = record.get("pad_token_id")
    if not precision.quantized:
        model = model.to(precision.device)
    if files.kind == "adapter":
        return adapters.attach_frozen(model, directory, reward=reward)
    return model.requires_grad_(False).eval()


def _load(stage: Stage, start: Start, run_dir: Path, tokenizer: PreTrainedTokenizerFast, *, reward: bool) -> Loaded:
    precision = pick_precision(stage)
    if precision.quantized and stage.lora is None:
        raise ModelError(
            "quantised weights cannot be trained in full; add lora:", where=stage.where("model.quantization")
        )
    action = choose_action(stage, start)
    lineage = list(start.lineage)
    base, revision = start.base, start.revision
    if action == "merge":
        assert start.adapter is not None
        lineage.append({"role": "adapter", "path": str(start.adapter), "action": "merge"})
        base, revision = str(_merge_base(stage, start, precision, run_dir)), None
    model = _open_base(stage, base, revision, precision, tokenizer, run_dir, lineage, reward=reward)
    check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, model=base)
    if reward:
        prepare_score_head(model, tokenizer, seed=stage.seed)
    model.config.use_cache = False  # a cache is of no use in training, and packed rows would leak through it
    if not reward and getattr(model, "loss_type", "") is None:
        model.loss_type = "ForCausalLM"  # GPT-2's class name does not tell transformers, which warns at every start
    if stage.lora is None:
        return Loaded(model, None, lineage, precision)
    model.requires_grad_(False)
    if action in ("continue", "stack"):
        assert start.adapter is not None
        lineage.append({"role": "adapter", "path": str(start.adapter), "action": action})
        wrap = adapters.continue_adapter if action == "continue" else adapters.stack_adapter
        wrapped = wrap(model, start.adapter, stage, reward=reward)
    else:
        wrapped = adapters.add_new_adapter(model, stage, reward=reward)
    if precision.quantized:
        # Gradients of float16 weights cannot be unscaled: there the adapters are float32.
        adapters.cast_adapters(wrapped, torch.float32 if precision.dtype == torch.float16 else precision.dtype)
    return Loaded(wrapped, None, lineage, precision)


def _open_base(
    stage: Stage,
    base: str,
    revision: str | None,
    precision: Precision,
    tokenizer: PreTrainedTokenizerFast,
    run_dir: Path,
    lineage: list[dict[str, Any]],
    *,
    reward: bool,
) -> PreTrainedModel:
    """Read base weights, or draw them; drawn ones go through `<run_dir>/base` where adapter or head need files."""
    if is_random(stage) and base == stage.model.path:
        written = run_dir.resolve() / "base"
        if stage.lora is None and not reward:
            return draw_base(stage, tokenizer, precision.dtype)
        if not written.exists():
            drawn = draw_base(stage, tokenizer, torch.float32 if precision.quantized else precision.dtype)
            write_base(run_dir.resolve(), drawn, {"lineage": lineage})
        base, revision = str(written), None
    return read_base(
        base,
        precision,
        reward=reward,
        revision=revision,
        attn_implementation=stage.model.attn_implementation,
        trust_code=stage.trust_code,
    )


def _merge_base(stage: Stage, start: Start, precision: Precision, run_dir: Path) -> Path:
    """Fold the start adapter into its unquantised base and write the result to `<run_dir>/base`."""
    if (run_dir / "base").exists():
        return run_dir.resolve() / "base"  # a resumed run: it is written whole or not at all
    assert start.adapter is not None
    full = Precision(precision.dtype, "cpu")
    model = read_base(start.base, full, reward=start.reward, revision=start.revision, trust_code=stage.trust_code)
    merged = adapters.attach_frozen(model, start.adapter, reward=start.reward).merge_and_unload()
    entry = {"role": "adapter", "path": str(start.adapter), "action": "merge"}
    return write_base(run_dir.resolve(), merged, {"lineage": [*start.lineage, entry]})


def _make_reference(model: Model, start: Start, stage: Stage) -> Reference:
    if not isinstance(model, PeftModel):
        return "model"
    if start.adapter is None or stage.training.adapter == "merge":
        return "adapter_off"
    if stage.training.adapter == "stack":
        return "base_adapter"
    adapters.add_reference_adapter(model)
    return "ref_adapter"
