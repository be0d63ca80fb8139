"""Base weights: which they are, random or read, full precision or quantised, and their record in a run.

Deliberately knows nothing of LoRA (`adapters`) nor of what a stage does with the model (`load`).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from alignkit.errors import EnvironmentProblem, ModelError
from alignkit.models.configs import know_classifier, read_config, require_packages, require_sizes
from alignkit.models.files import RECORD, find_model_dir, inspect_model_dir, is_builtin
from alignkit.models.hub import explain_hub_errors, quiet_transformers
from alignkit.models.scratch import fit_config_to_tokenizer, override_config, random_model
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


def pick_device(wanted: str = "auto") -> str:
    """Return cuda, mps or cpu: the one asked for, or the best that is there."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


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


def is_random(stage: Stage) -> bool:
    """Say whether the base of a stage is drawn, not read: builtin, or init: scratch."""
    return is_builtin(stage.model.path) or stage.model.init == "scratch"


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
