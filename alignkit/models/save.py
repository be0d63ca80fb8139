"""Final weights on disk: safetensors, tokenizer, template, our record of what they are made of; adapters folded in."""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from alignkit.errors import ModelError
from alignkit.models.adapters import START, TRAINED, attach_frozen
from alignkit.models.files import RECORD, find_adapter
from alignkit.models.hub import quiet_transformers
from alignkit.models.load import Precision, read_base
from alignkit.models.parameters import compare_probes, take_probe
from alignkit.models.start import find_base, require_mergeable

_WRAPPER = "base_model.model."  # what PEFT puts before the base's own names


def save_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, out: Path, *,
    lineage: Sequence[dict[str, Any]] = (), precision: Precision | None = None, stop_ids: Sequence[int] = (),
    state_dict: dict[str, torch.Tensor] | None = None, head: dict[str, Any] | None = None, dtype: str | None = None,
) -> None:  # fmt: skip
    """Write the model to `out`, whole or not at all; what was there before is replaced.
    An adapter is saved without its base and without its frozen copy; a stacked one as one plain adapter of both
    ranks, which loads with plain PEFT and computes the same. `stop_ids` go into the generation config, `state_dict`
    replaces the model's own where a sharded one was gathered, `head` says what a classifier tells apart, and a full
    model is rounded to `dtype`. Call it on one rank."""
    draft = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    with quiet_transformers():
        if isinstance(model, PeftModel) and START in model.peft_config:
            config, state = concatenate_adapters(model, state_dict)
            save_file(state, draft / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(draft)
        elif isinstance(model, PeftModel):
            trained = {"selected_adapters": [TRAINED], "save_embedding_layers": False}
            model.save_pretrained(draft, state_dict=state_dict, **trained)
            (draft / "README.md").unlink(missing_ok=True)  # PEFT's card holds the absolute path of the base
        else:
            use_cache, model.config.use_cache = model.config.use_cache, True  # off in training only
            if dtype is not None:
                rounded: dict[int, torch.Tensor] = {}  # tied weights stay one
                state_dict = {
                    name: rounded.setdefault(tensor.data_ptr(), tensor.to(getattr(torch, dtype)))
                    for name, tensor in (state_dict or model.state_dict()).items()
                }
            model.save_pretrained(draft, state_dict=state_dict)
            model.config.use_cache = use_cache
            if dtype is not None:
                config_file = draft / "config.json"
                stored = json.loads(config_file.read_text("utf-8")) | {"dtype": dtype}
                config_file.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", "utf-8")
                precision = replace(precision, dtype=getattr(torch, dtype)) if precision else None
    tokenizer.save_pretrained(draft)
    eos = sorted({*stop_ids, tokenizer.eos_token_id} - {None})
    # The base's defaults go on, as they are: transformers refuses to save some that it reads.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    generation = copy.deepcopy(getattr(base, "generation_config", None)) or GenerationConfig()
    generation._from_model_config = False  # transformers would make it anew from config.json
    generation.eos_token_id, generation.pad_token_id = eos, tokenizer.pad_token_id
    (draft / "generation_config.json").write_text(generation.to_json_string(use_diff=True), encoding="utf-8")
    record: dict[str, Any] = {"lineage": list(lineage), "pad_token_id": tokenizer.pad_token_id}
    if precision:
        record |= {"dtype": str(precision.dtype).removeprefix("torch."), "quantization": precision.quantization}
        record["double_quantization"] = precision.double_quantization
    record |= {"head": head} if head else {}
    (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    draft.rename(out)


def concatenate_adapters(
    model: PeftModel, weights: dict[str, torch.Tensor] | None = None
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Join both adapters to one that computes what they do stacked: s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2].
    Its scale is 1 and its rank r1 + r2; where only one adapter reaches a layer, that layer has its rank alone.
    `weights` replaces the model's own state where a sharded one was gathered."""
    weights = model.state_dict() if weights is None else weights
    state: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        present = [adapter for adapter in (START, TRAINED) if adapter in layer.lora_A]
        if not present:
            raise ModelError(f"{name} is adapted in a way that cannot be stacked; use adapter: merge")
        down = torch.cat([weights[f"{name}.lora_A.{key}.weight"].float() for key in present], dim=0)
        ups = [weights[f"{name}.lora_B.{key}.weight"].float() * layer.scaling[key] for key in present]
        state[f"{name}.lora_A.weight"] = down.cpu()
        state[f"{name}.lora_B.weight"] = torch.cat(ups, dim=1).cpu().contiguous()
        ranks[name.removeprefix(_WRAPPER)] = down.shape[0]
    trained = get_peft_model_state_dict(model, state_dict=weights, adapter_name=TRAINED, save_embedding_layers=False)
    state |= {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items() if ".lora_" not in name}
    config, lower = copy.deepcopy(model.peft_config[TRAINED]), model.peft_config[START]
    config.r = config.lora_alpha = max(ranks.values())
    config.use_rslora = False
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.target_modules = {*config.target_modules, *lower.target_modules}
    config.base_model_name_or_path = lower.base_model_name_or_path or config.base_model_name_or_path
    config.inference_mode = True
    return config, state


def merge(source: Path, out: Path, *, dtype: torch.dtype | None = None, trust_code: bool = False) -> None:
    """Write adapter plus base as one model; what is read back must compute what the adapter on its base does.
    `source` is a run or an adapter directory. Works on the CPU, in the dtype of training unless given."""
    files = find_adapter(str(source), trust_code=trust_code)
    directory, lineage = files.path, files.record.get("lineage", [])
    require_mergeable(lineage, str(directory))
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out} is not empty; give a directory that does not exist yet", where="--out")
    precision = Precision(dtype or getattr(torch, files.record.get("dtype", "float32")), "cpu")
    settings: Any = {"reward": files.reward, "head": files.head, "trust_code": trust_code}
    base = read_base(find_base(files), precision, revision=files.base_revision, **settings)
    if files.reward and base.config.pad_token_id is None:
        base.config.pad_token_id = files.record.get("pad_token_id")
    vocab_size = base.get_input_embeddings().num_embeddings  # before PEFT wraps them, where it trains some
    adapted = attach_frozen(base, directory, reward=files.reward)
    before = take_probe(adapted, vocab_size=vocab_size, reward=files.reward)
    merged = adapted.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(str(directory if files.has_tokenizer else find_base(files)))
    beside = (directory / "generation_config.json").exists()
    stop_ids = (GenerationConfig.from_pretrained(str(directory)).eos_token_id if beside else None) or []
    stop_ids = [stop_ids] if isinstance(stop_ids, int) else list(stop_ids)
    lineage = [*lineage, {"role": "adapter", "path": str(directory), "action": "merge"}]
    save_model(merged, tokenizer, out, lineage=lineage, precision=precision, stop_ids=stop_ids, head=files.head)
    after = take_probe(read_base(str(out), precision, **settings), vocab_size=vocab_size, reward=files.reward)
    if reason := compare_probes(before, after):
        raise ModelError(f"the merged model is not the adapted one: {reason}", where=str(out))
