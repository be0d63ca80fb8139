"""The model of a stage without its weights: what config, adapter and `lora:` make of it, before anything is read.

Built on torch's meta device, so that the names, shapes and counts are those of training and cost no memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from alignkit.errors import AlignKitError, ModelError, first_line
from alignkit.models import adapters
from alignkit.models.configs import know_classifier, read_config, require_packages
from alignkit.models.files import find_model_dir, is_builtin, read_shapes
from alignkit.models.load import UNQUANTIZED, draw_base
from alignkit.models.start import Start, choose_action, find_start, is_random
from alignkit.models.tokens import load_tokenizer
from alignkit.recipe.schema import PpoOptions
from alignkit.recipe.stage import Stage


@dataclass
class Skeleton:
    """What is known of a model before it is loaded."""

    num_trained: int
    four_bit_share: float  # of all weights: what bitsandbytes would quantise
    doubts: list[str]
    notes: list[str]  # settings that are not used, which may be right


def build_skeleton(stage: Stage, tokenizer: PreTrainedTokenizerFast | None = None) -> Skeleton:
    """Build the stage's model on the meta device and look at it.

    Raises ModelError for a config that makes no model or other shapes than are stored, an adapter that does not fit,
    and `lora:` names that match nothing; EnvironmentProblem where a package for the base's quantisation is missing.
    """
    start = find_start(stage)
    action = choose_action(stage, start)
    base = _build_base(stage, start, tokenizer)
    total = sum(weight.numel() for weight in base.parameters())
    linear = sum(
        module.weight.numel()
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.split(".")[-1] not in UNQUANTIZED
    )
    doubts = []
    if stage.model.quantization != "none" and linear < total / 2:
        doubts.append(
            f"model.quantization {stage.model.quantization} holds {linear / total:.1%} of the weights; bitsandbytes "
            f"quantises linear layers, and the rest ({_list_experts(base) or 'embeddings and head'}) stays as it is"
        )
    if stage.lora is not None:
        wrapped = _adapt(base, stage, start, action)
        doubts += _find_unadapted(wrapped, total)
        base = wrapped
    num_trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    return Skeleton(num_trained, linear / total, doubts, _list_unused(stage, start))


def _list_unused(stage: Stage, start: Start) -> list[str]:
    """Say what the recipe and the base set that this stage does not use."""
    notes = []
    is_off = stage.method != "sft" and stage.trainer.get("disable_dropout") is not False
    if stage.lora is not None and stage.lora.dropout and is_off:
        notes.append(f"lora.dropout {stage.lora.dropout}: {stage.method} switches dropout off (disable_dropout)")
    directory = find_model_dir(start.base)
    if stage.method != "rm" and directory and (directory / "generation_config.json").exists():
        settings = GenerationConfig.from_pretrained(str(directory)).to_diff_dict()
        others = (
            "_token_id",
            "_version",
            "_from_model_config",
            "use_cache",
            "output_attentions",
            "output_hidden_states",
        )
        if names := [name for name in settings if not name.endswith(others)]:
            notes.append(f"the base's generation_config.json ({', '.join(names)}): the saved model keeps it")
    return notes


def _build_base(stage: Stage, start: Start, tokenizer: PreTrainedTokenizerFast | None) -> nn.Module:
    reward = stage.method == "rm"
    if is_random(stage) and start.base == stage.model.path:
        with torch.device("meta"):
            model = draw_base(stage, tokenizer or load_tokenizer(stage), torch.float32)
        num_bytes = 4 * sum(weight.numel() for weight in model.parameters())
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if num_bytes > memory:
            raise ModelError(
                f"the model has {num_bytes // 4:,} parameters, {num_bytes / 2**30:,.0f} GiB to be drawn; this machine "
                f"has {memory / 2**30:,.0f} GiB",
                where=None if is_builtin(start.base) else start.base,
            )
        config = model.config
        if not reward:
            return model
    else:
        config = read_config(start.base, revision=start.revision, trust_code=stage.trust_code)
    require_packages(config, start.base)
    if getattr(config, "quantization_config", None) and stage.lora is None:
        raise ModelError("quantised weights cannot be trained in full; add lora:", where=start.base)
    needs_critic = isinstance(stage.options, PpoOptions) and stage.options.advantage == "gae"
    if reward or needs_critic:
        know_classifier(config)
    family = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    if reward:
        config.num_labels = 1
    try:
        with torch.device("meta"):
            model = family.from_config(config, trust_remote_code=stage.trust_code)
    except Exception as error:  # whatever a strange config provokes; nothing but this build is in here
        raise ModelError(f"does not make a model: {first_line(error)}", where=_config_file(start.base)) from error
    _compare_shapes(model, start.base)
    return model


def _compare_shapes(model: nn.Module, source: str) -> None:
    """Raise ModelError where the config promises other shapes than the weights beside it have."""
    directory = None if is_builtin(source) else find_model_dir(source)
    if directory is None or getattr(model.config, "quantization_config", None):
        return
    stored = {name: shape for file in sorted(directory.glob("*.safetensors")) for name, shape in _shapes(file).items()}
    wrong = [
        (name, list(weight.shape), stored[name])
        for name, weight in model.named_parameters()
        if name in stored and list(weight.shape) != stored[name]
    ]
    if wrong:
        name, wanted, found = wrong[0]
        raise ModelError(
            f"promises other shapes than the weights have: {name} would be {wanted} and is {found}; "
            f"{len(wrong)} tensors differ; put the config back that belongs to them",
            where=_config_file(source),
        )


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        return read_shapes(file)
    except ValueError as error:
        raise ModelError(f"{error}; copy or save the file again", where=str(file)) from error


def _adapt(base: nn.Module, stage: Stage, start: Start, action: str) -> PeftModel:
    reward = stage.method == "rm"
    try:
        with torch.device("meta"):
            base.requires_grad_(False)
            if action in ("continue", "stack"):
                assert start.adapter is not None
                wrap = adapters.continue_adapter if action == "continue" else adapters.stack_adapter
                return wrap(base, start.adapter, stage, reward=reward)
            return adapters.add_new_adapter(base, stage, reward=reward)
    except AlignKitError:
        raise
    except Exception as error:  # whatever a strange adapter_config.json provokes
        place = str(start.adapter) if start.adapter else stage.where("lora")
        raise ModelError(f"does not fit the model: {first_line(error)}", where=place) from error


def _find_unadapted(model: PeftModel, total: int) -> list[str]:
    """Say which experts, which are parameters and not layers, no adapter reaches."""
    adapted = {(id(m.get_base_layer()), m.parameter_name) for m in model.modules() if isinstance(m, ParamWrapper)}
    left: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and (id(module), name) not in adapted:
                left[name] = left.get(name, 0) + weight.numel()
    if not left:
        return []
    share = sum(left.values()) / total
    return [f"no adapter reaches the experts' {', '.join(sorted(left))}, {share:.1%} of the weights"]


def _list_experts(model: nn.Module) -> str:
    names = sorted({name.split(".")[-1] for name, weight in model.named_parameters() if weight.ndim == 3})
    return f"the experts' {', '.join(names)}" if names else ""


def _config_file(source: str) -> str:
    directory = None if is_builtin(source) else find_model_dir(source)
    return str(directory / "config.json") if directory else source
