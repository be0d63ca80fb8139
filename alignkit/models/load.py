"""Weights of a stage: base, policy, reference, reward model, and what a finished run left; full or quantised.

LoRA is in `adapters`. What is loaded and wrapped is said in the lineage.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from alignkit.errors import EnvironmentProblem, ModelError
from alignkit.models import adapters
from alignkit.models.configs import know_classifier, read_config, require_packages, require_sizes
from alignkit.models.files import RECORD, find_model_dir, inspect_model_dir
from alignkit.models.hub import explain_hub_errors, quiet_transformers
from alignkit.models.scratch import fit_config_to_tokenizer, override_config, random_model
from alignkit.models.start import Start, choose_action, find_base, find_start, is_random
from alignkit.models.tokens import check_vocabulary, load_tokenizer
from alignkit.recipe.stage import Stage

# Kept out of quantization: a head that is read or trained directly. Embeddings are no linear layers.
UNQUANTIZED = ["lm_head", "score"]


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are held: `dtype` for all that is not quantised and for computing."""

    dtype: torch.dtype
    device: str  # "cpu", "cuda", "mps"
    quantization: str = "none"
    double_quantization: bool = True

    @property
    def quantized(self) -> bool:
        return self.quantization != "none"

    def to_record(self) -> dict[str, Any]:
        """Return what alignkit.json keeps of it."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": self.quantization,
            "double_quantization": self.double_quantization,
        }


def pick_device(wanted: str = "auto", *, where: str = "") -> str:
    """Pick cuda, mps or cpu: the one asked for, or the best that is there.

    Raises EnvironmentProblem when the one asked for, at `where` in a recipe, is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, there in available.items() if there)
    if not available[wanted.partition(":")[0]]:
        place = f"{where}: launch.device" if where else "the device asked for"
        raise EnvironmentProblem(
            f"{place} is {wanted}, which torch {torch.__version__} does not see here; use auto or cpu, or run "
            "`alignkit doctor`"
        )
    return wanted


def pick_precision(stage: Stage) -> Precision:
    """Return the precision a stage asks for.

    dtype auto is bfloat16 for a frozen base where the device computes in it, and float32 for weights that are trained
    themselves: bfloat16 rounds away updates smaller than 1/256 of a weight (autocast still computes in bfloat16).
    """
    device = pick_device(stage.launch.device)
    dtype = stage.model.dtype
    if dtype == "auto":
        computes = device == "cuda" and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if computes and stage.lora is not None else "float32"
    if dtype == "float16" and device != "cuda":
        raise EnvironmentProblem(
            f"{stage.where('model.dtype')}: model.dtype float16 needs cuda, this is {device}; use float32 or bfloat16"
        )
    if dtype == "float16" and stage.lora is None:
        dtype = "float32"  # float16 computes through autocast; gradients of float16 weights cannot be unscaled
    return Precision(getattr(torch, dtype), device, stage.model.quantization, stage.model.double_quantization)


def draw_base(stage: Stage, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> PreTrainedModel:
    """Draw the weights of a builtin model or of `init: scratch` from the stage's seed, on the CPU."""
    options = stage.model
    config = read_config(options.path, revision=options.revision, trust_code=stage.trust_code)
    config = override_config(config, options.config, where=stage.where("model.config"))
    require_sizes(config, stage.where("model.config"))
    config = fit_config_to_tokenizer(config, tokenizer, options.config)
    return random_model(config, seed=stage.seed, dtype=dtype, attn_implementation=options.attn_implementation)


def write_base(run_dir: Path, model: PreTrainedModel, record: dict[str, Any]) -> Path:
    """Write base weights to `<run_dir>/base`, whole or not at all, and return that directory.

    Every rank may call it: the content is the same, the first to rename wins, the rest throw theirs away.
    """
    base = run_dir / "base"
    if base.exists():
        return base
    draft = run_dir / f"base.tmp-{os.getpid()}"
    with quiet_transformers():
        model.save_pretrained(draft)
    (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    try:
        draft.rename(base)
    except OSError:  # another rank was faster
        if not base.exists():
            raise
        shutil.rmtree(draft)
    return base


def read_base(
    source: str,
    precision: Precision,
    *,
    reward: bool = False,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_code: bool = False,
) -> PreTrainedModel:
    """Load base weights from a directory or a hub id, in the given precision; safetensors only.

    A reward model without a stored score head gets one (see `score`), flagged as `model.score_is_new`.
    Raises ModelError when weights are missing, which transformers would fill with random ones.
    """
    directory = find_model_dir(source)
    if directory is not None and inspect_model_dir(directory, trust_code=trust_code).kind == "adapter":
        raise ModelError(f"{directory} is an adapter, not base weights")  # AutoModel would load it and wipe it later
    config = read_config(source, revision=revision, trust_code=trust_code)
    require_packages(config, source)
    if reward:
        know_classifier(config)
    family = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    arguments: dict[str, Any] = {"num_labels": 1} if reward else {}
    if attn_implementation:
        arguments["attn_implementation"] = attn_implementation
    if precision.quantized:
        arguments["quantization_config"] = quantization_config(precision)
        arguments["device_map"] = {"": _local_device(precision.device)}
    with explain_hub_errors(source), quiet_transformers():
        model, info = family.from_pretrained(
            str(directory or source),
            revision=revision,
            dtype=precision.dtype,
            use_safetensors=True,
            trust_remote_code=trust_code,
            output_loading_info=True,
            **arguments,
        )
    missing = sorted(info["missing_keys"])
    head = [name for name in missing if name.split(".")[0] == "score"] if reward else []
    if len(missing) > len(head):
        first = next(name for name in missing if name not in head)
        raise ModelError(
            f"{len(missing) - len(head)} tensors are missing, first {first}; the copy is incomplete", where=source
        )
    model.score_is_new = bool(head)
    return keep_four_bit_layout(model)


def keep_four_bit_layout(model: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes from repacking 4-bit weights, which it does on CPUs with AVX512-BF16 in a no-grad forward.

    The repacked codes and constants have no backward: gradients are wrong from then on, and only some shapes can be
    packed at all (bitsandbytes 0.50.2, nn/modules.py, Linear4bit.forward). The layer has no other switch.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def quantization_config(precision: Precision) -> BitsAndBytesConfig:
    """Return the bitsandbytes settings: blocks of 64, bytes as storage, computing in `dtype` (arXiv 2305.14314)."""
    if precision.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNQUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=precision.quantization,
        bnb_4bit_use_double_quant=precision.double_quantization,
        bnb_4bit_compute_dtype=precision.dtype,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=UNQUANTIZED,
    )


def _local_device(device: str) -> str | int:
    return int(os.environ.get("LOCAL_RANK", "0")) if device == "cuda" else device


def prepare_score_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> None:
    """Draw a new head from N(0, 1/sqrt(d + 1)) (Ziegler et al. 2019, arXiv 1909.08593) and set the pad token.

    A head that came with the weights is kept. The score is read at the last token that is not padding, so the
    config must know the pad token.
    """
    model.config.pad_token_id = tokenizer.pad_token_id
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ModelError(f"a {model.config.model_type} model has no scalar score head; it cannot be a reward model")
    if not getattr(model, "score_is_new", False):
        return
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()


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
