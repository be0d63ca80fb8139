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
from alignkit.models.files import ModelFiles, find_model_dir, fingerprint_weights, inspect_model_dir, is_builtin
from alignkit.models.hub import fetch_adapter
from alignkit.models.score import prepare_score_head
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


@dataclass(frozen=True, slots=True)
class _Start:
    """Where the weights of a stage come from."""

    base: str  # builtin name, hub id or directory
    revision: str | None
    adapter: Path | None
    reward: bool
    lineage: list[dict[str, Any]]


def load_policy(stage: Stage, *, run_dir: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Loaded:
    """Load the causal language model a stage trains: full, or a PeftModel with the trainable adapter `default`.

    Random and merged bases of adapters are written to `<run_dir>/base`, so that the adapter loads anywhere with
    plain PEFT. Raises ModelError, or EnvironmentProblem when the hub cannot be reached.
    """
    tokenizer = tokenizer or load_tokenizer(stage)
    start = _find_start(stage)
    if start.reward:
        raise ModelError(
            f"{stage.start_dir or stage.model.path} is a reward model; {stage.method} needs a policy to start from",
            where=stage.where(f"{stage.name}.start_from"),
        )
    loaded = _load(stage, start, run_dir, tokenizer, reward=False)
    if stage.method == "dpo":
        loaded.reference = _make_reference(loaded.model, start, stage)
    return loaded


def load_reward_model(stage: Stage, *, run_dir: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Loaded:
    """Load the sequence classifier with one label that an rm stage trains; its score head is always trainable.

    From a policy it gets a new head drawn from the stage's seed; from a reward model it keeps the head.
    """
    tokenizer = tokenizer or load_tokenizer(stage)
    return _load(stage, _find_start(stage), run_dir, tokenizer, reward=True)


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


def find_base(files: ModelFiles) -> str:
    """Return where the base of an adapter is: as written, or `base/` beside it when the run was moved."""
    assert files.base is not None
    if is_builtin(files.base):
        raise ModelError(f"{files.path} names {files.base} as its base, which has no files; train it again")
    if Path(files.base).is_dir():
        return files.base
    beside = files.path.parent / "base"
    if Path(files.base).name == "base" and beside.is_dir():
        return str(beside)
    try:
        find_model_dir(files.base)
    except ModelError as error:
        raise ModelError(
            f"its base {files.base} is gone; put it back or edit base_model_name_or_path", where=str(files.path)
        ) from error
    return files.base  # a hub id


def _find_start(stage: Stage) -> _Start:
    """Say what the stage starts from, adapters apart from their base, everything inspected before it is opened."""
    source = stage.start_dir or stage.model.path
    revision = None if stage.start_dir else stage.model.revision
    directory = find_model_dir(source)
    if directory is None and not is_builtin(source):
        directory = fetch_adapter(source, revision)
    if not stage.start_dir and is_random(stage):
        entry = {"role": "base", "path": source, "seed": stage.seed, "config": stage.model.config}
        return _Start(source, revision, None, False, [entry])
    if stage.model.config and not stage.start_dir:
        raise ModelError(
            "model.config changes only random weights; set model.init: scratch or leave it out",
            where=stage.where("model.config"),
        )
    if directory is None:
        return _Start(source, revision, None, False, [{"role": "base", "path": source, "revision": revision}])
    files = inspect_model_dir(directory, trust_code=stage.trust_code)
    if files.kind == "full":
        lineage = [*files.record.get("lineage", []), {"role": "model", "path": str(directory)}]
        return _Start(str(directory), None, None, files.reward, lineage)
    base = find_base(files)
    if stage.start_dir:
        _check_same_base(files, base, stage)
    lineage = files.record.get("lineage") or [{"role": "base", "path": base}]
    return _Start(base, files.base_revision, directory, files.reward, lineage)


def _load(stage: Stage, start: _Start, run_dir: Path, tokenizer: PreTrainedTokenizerFast, *, reward: bool) -> Loaded:
    precision = pick_precision(stage)
    if precision.quantized and stage.lora is None:
        raise ModelError(
            "quantised weights cannot be trained in full; add lora:", where=stage.where("model.quantization")
        )
    action = _choose_action(stage, start)
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
        adapters.cast_adapters(wrapped, precision.dtype)
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


def _choose_action(stage: Stage, start: _Start) -> str:
    """Return new, continue, merge or stack; refuse what would lose the adapter or have no effect."""
    where = stage.where(f"{stage.name}.adapter")
    wanted = stage.options.adapter
    if start.adapter is None:
        if wanted is not None:
            raise ModelError(f"adapter: {wanted} has no effect: the stage does not start from an adapter", where=where)
        return "new"
    if stage.lora is None and wanted != "merge":
        raise ModelError(
            f"{start.adapter} is an adapter but there is no lora: section; add lora: to train it on, or adapter: merge "
            "to fold it into the base and train that in full",
            where=where,
        )
    return wanted or "continue"


def _merge_base(stage: Stage, start: _Start, precision: Precision, run_dir: Path) -> Path:
    """Fold the start adapter into its unquantised base and write the result to `<run_dir>/base`."""
    if (run_dir / "base").exists():
        return run_dir.resolve() / "base"  # a resumed run: it is written whole or not at all
    assert start.adapter is not None
    full = Precision(precision.dtype, "cpu")
    model = read_base(start.base, full, reward=start.reward, revision=start.revision, trust_code=stage.trust_code)
    merged = adapters.attach_frozen(model, start.adapter, reward=start.reward).merge_and_unload()
    entry = {"role": "adapter", "path": str(start.adapter), "action": "merge"}
    return write_base(run_dir.resolve(), merged, {"lineage": [*start.lineage, entry]})


def _make_reference(model: Model, start: _Start, stage: Stage) -> Reference:
    if not isinstance(model, PeftModel):
        return "model"
    if start.adapter is None or stage.options.adapter == "merge":
        return "adapter_off"
    if stage.options.adapter == "stack":
        return "base_adapter"
    adapters.add_reference_adapter(model)
    return "ref_adapter"


def _check_same_base(files: ModelFiles, base: str, stage: Stage) -> None:
    """Raise ModelError unless the adapter was trained on the model the recipe names.

    They are the same by name, by what alignkit recorded, or by the bytes of the weights when one was copied.
    """
    wanted = stage.model.path
    recorded = [*files.record.get("lineage", []), *_record_of(base).get("lineage", [])]
    same_name = [entry for entry in recorded if _canonical(entry.get("path", "")) == _canonical(wanted)]
    drawn_alike = all(entry.get("config", {}) == stage.model.config for entry in same_name if "seed" in entry)
    if (same_name and drawn_alike) or _canonical(base) == _canonical(wanted):
        return
    local, other = find_model_dir(base), None if is_builtin(wanted) else find_model_dir(wanted)
    if local and other and fingerprint_weights(local) == fingerprint_weights(other):
        return
    roots = [entry["path"] for entry in recorded[:1]] or [base]
    config = f" with model.config {same_name[0].get('config')}" if same_name else ""
    raise ModelError(
        f"the adapter in {files.path} was trained on {roots[0]}{config}, not on model.path {wanted}; set model.path "
        "(and model.config) to its base, or start from another stage",
        where=stage.where(f"{stage.name}.start_from"),
    )


def _record_of(base: str) -> dict[str, Any]:
    directory = find_model_dir(base)
    return inspect_model_dir(directory, trust_code=True).record if directory else {}


def _canonical(path: str) -> str:
    local = Path(path).expanduser()
    return str(local.resolve()) if path and not is_builtin(path) and local.exists() else path
