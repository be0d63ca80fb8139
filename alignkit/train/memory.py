"""What a stage holds on a device at its highest moment, and what of it a strategy divides among processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as compute
import torch
from transformers import PreTrainedConfig

from alignkit.errors import AlignKitError
from alignkit.models import start
from alignkit.models.chat import find_tokenizer, load_tokenizer
from alignkit.models.files import find_model_dir, inspect_model_dir, is_builtin
from alignkit.recipe import Stage
from alignkit.recipe.methods import PpoOptions, TrainOptions
from alignkit.recipe.schema import LEARNT_TOKENIZERS
from alignkit.recipe.words import OWN_LOSSES
from alignkit.train.trace import Footprint, Shape, Sizes, compute_types, num_devices, shared_by, trace

LARGEST_MICRO_BATCH = 8
# Bytes of optimizer state for each byte of a trained weight, by the beginning of `optim`; AdamW keeps two moments.
_STATE = {"sgd": 0.0, "adafactor": 0.01, "lomo": 0.0, "adalomo": 0.01, "lion": 1.0, "adagrad": 1.0, "rmsprop": 1.0}
_STATE_8BIT = 2 * 1.016  # bytes a weight: two moments, in blocks of 256 with a float32 scale
_PASSES = {"sft": "words", "dpo": "words", "rm": "score", "ppo": "answers"}  # others write


@dataclass(frozen=True)
class Prediction:
    """What a device holds at the highest moment of a stage; `saved` are the bytes of a checkpoint."""

    parts: Sizes
    moment: str
    saved: float
    notes: list[str]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def needs(self) -> float:
        """What a device must have: fragments, and what libraries take for themselves, besides."""
        return 1.04 * self.total + 0.8 * 2**30


def group_size(stage: Stage, table: Any = None) -> int:
    """Count the sequences of a row: all ranked answers of a prompt, what a task reads, or two of a pair."""
    columns = [name for name in ("answers_ids", "sequences") if table is not None and name in table.column_names]
    if columns and len(table):
        return int(compute.max(compute.list_value_length(table.data.column(columns[0]))).as_py())
    return 2 if stage.method in ("dpo", "rm") and not stage.is_unpaired else 1


def predict(
    stage: Stage, config: PreTrainedConfig, *, micro: int, tokens: int, device: str, foreign: Mapping[str, float] = {},
    group: int | None = None) -> Prediction:  # fmt: skip
    """Predict the highest moment of training on rows of so many tokens, or of a stage that writes answers, on "cuda" or
    "cpu". A row of ppo is a prompt with its answer; one of other stages is `group` sequences, two where they are pairs.
    `foreign` are bytes of models that are no copy of the policy."""
    options, world = stage.options, num_devices(stage)
    answer = min(getattr(options, "max_new_tokens", None) or 0, tokens - 1)
    kind = "seq2seq" if config.is_encoder_decoder else "score" if stage.scores else _PASSES.get(stage.method, "write")
    if budget := getattr(options, "batch_tokens", None):
        micro = max(budget // tokens, 1)
    sequences = micro * (group or group_size(stage))
    accumulates = isinstance(options, TrainOptions) and options.batch_size // world > micro
    packed = packs_densely(stage) and micro > 1
    found = trace(stage, config, Shape(sequences, tokens, kind, answer, packed, accumulates), device)
    wide = 2 if compute_types(stage, device)[2] else 1
    trained = wide * found.trained["bytes"]
    phases, name = dict(found.phases), str(stage.trainer.get("optim", "adamw_torch_fused")).removeprefix("paged_")
    if "8bit" in name or "4bit" in name:
        state = found.trained["number"] * _STATE_8BIT
    else:
        state = trained * next((share for kind, share in _STATE.items() if name.startswith(kind)), 2.0)
    if isinstance(options, PpoOptions) and options.generation.engine == "transformers":
        written = min(options.generation.batch_size, options.batch_size * options.minibatches // world)
        sampled = trace(stage, config, Shape(written, tokens, "write", answer), device)
        phases |= {f"sampling, {name}": parts for name, parts in sampled.phases.items()}
    held = {"optimizer": state} if isinstance(options, TrainOptions) else {}
    # Copies of the policy in other roles: whole models, or adapters on its base.
    full = stage.lora is None
    copied, losses = wide * found.rest["weights" if full else "adapters"], stage.trainer.get("loss_type") or ()
    bare = any(not OWN_LOSSES[name].has_reference for name in OWN_LOSSES.keys() & losses)
    if stage.method == "ppo" or (stage.method == "dpo" and not bare):
        goes_on = stage.start_dir is not None and getattr(options, "adapter", None) in (None, "continue")
        kept = not stage.trainer.get("precompute_ref_log_probs") if full else goes_on
        alone = full and stage.launch.strategy == "ddp"  # see `load_reference`
        held |= {"reference": copied - found.trained.get("more than autocast reads", 0) * alone} if kept else {}
    scoring, on_base, guessed = _size_rewards(stage, config, found, device)
    held |= scoring
    if isinstance(options, PpoOptions) and options.advantage == "gae":
        begins = options.critic_start  # else a head on the policy
        if (begins != "head") if full else (begins == "reward" and on_base):
            text = config.get_text_config()
            head = 0 if config.tie_word_embeddings or not full else text.vocab_size * text.hidden_size
            # With its gradients and their state, and without the LM head.
            held["critic"] = (copied + trained + state) * (1 - head / found.trained["number"])
    held |= foreign
    divided = {name: _divide({**parts, **held}, stage, found, device, config) for name, parts in phases.items()}
    moment = max(divided, key=lambda name: sum(divided[name].values()))
    shared = shared_by(stage) not in ("none", "ddp")
    notes = [*found.estimated, *guessed, *([f"what {stage.launch.strategy} shards, by formula"] if shared else [])]
    return Prediction(divided[moment], moment, (trained + state) * (1 + ("critic" in held)), notes)


def size_model(source: str, device: str, *, bases: Iterable[str | None] = ()) -> tuple[float, bool]:
    """Bytes of a model that answers or scores, of its files in the numbers it is loaded in, or of a config on the hub;
    without its base, and True, if it is an adapter on one of `bases`. AlignKitError where neither is here."""
    if (directory := find_model_dir(source)) is None:
        return count_weights(start.read_config(source)) * (2 if device == "cuda" else 4), False
    files = inspect_model_dir(directory, trust_code=True)
    width = round(sum(file.stat().st_size for file in directory.glob("*.safetensors")) / files.num_parameters)
    if files.record:  # see `frozen.load_classifier`
        width = min(width, 2) if device == "cuda" else width
    elif device != "cuda":
        width = 4
    base = start.find_base(files) if files.kind == "adapter" else None
    lies = base is not None and any(start.is_same_model(base, one) for one in bases if one is not None)
    return files.num_parameters * width + (size_model(base, device)[0] if base is not None and not lies else 0), lies


def count_weights(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return sum(map(torch.numel, start.choose_family(config).from_config(config).parameters()))


def _size_rewards(
    stage: Stage, config: PreTrainedConfig, found: Footprint, device: str
) -> tuple[Sizes, bool, list[str]]:
    """Size reward models, which every process holds whole whatever the strategy; whether one is an adapter on the
    policy's own base (`hold_reward`); and what is taken to be as large as the policy."""
    sizes, on_base, guessed = Counter[str](), False, list[str]()
    for key, source in stage.rewards:
        if source.model is None or is_builtin(source.model):
            continue
        may_lie = stage.lora is not None and key == "reward" and not on_base
        try:
            bases = (stage.start_dir, stage.model.path) if may_lie else ()
            size, lies = size_model(source.model, device, bases=bases)
        except AlignKitError:  # a stage that has not run, or a model of the hub that is not here
            dtype, _, narrows = compute_types(stage, device)
            is_ours, width = source.model in stage.reward_stages, 2 if device == "cuda" else dtype.itemsize << narrows
            quantized, lies = stage.model.quantization != "none", may_lie and is_ours
            number = count_weights(config) if quantized else found.rest["weights"] / dtype.itemsize
            size = found.rest["adapters"] if lies else number * width
            guessed += [] if is_ours else [f"{source.model} as large as the policy, as its config is not here"]
        on_base |= lies
        sizes[key] += int(size)
    return dict(sizes), on_base, guessed


def packs_densely(stage: Stage) -> bool:
    """Whether the rows of a forward pass are one sequence, kept apart by a dense mask for want of another kernel."""
    packs = stage.trainer.get("packing") and stage.trainer.get("packing_strategy", "bfd") != "wrapped"
    dense = (stage.model.attn_implementation or "sdpa") in ("sdpa", "eager")
    return bool(packs or stage.trainer.get("padding_free")) and dense


def micro_batches(stage: Stage, world: int) -> list[int]:
    """What `micro_batch_size: auto` may be: divisors of a device's share, up to 8; 1 where rows are packed densely. KTO
    takes 8 over all processes: its KL term is of the rows that all have in one forward pass, however many they are."""
    limit = max(LARGEST_MICRO_BATCH // world, 2) if stage.is_unpaired else LARGEST_MICRO_BATCH
    if packs_densely(stage) or getattr(stage.options, "batch_tokens", None):
        return [1]  # a mask that grows with the square of the rows; a "row" that is a batch of its own
    return [size for size in range(1, limit + 1) if stage.training.batch_size // world % size == 0]


def read_shape(stage: Stage) -> PreTrainedConfig:
    """Read the config of the model that a stage starts from: the hub's, or that of a directory without weights."""
    source, revision = stage.start_dir or stage.model.path, stage.model.revision
    directory = find_model_dir(source)
    if directory is None or any(directory.glob("*.safetensors")):
        found = start.find_start(stage)
        source, revision = found.base, found.revision
    config = start.read_config(source, revision=revision, trust_code=stage.trust_code)
    if start.is_random(stage) and not stage.start_dir:
        config = start.override_config(config, stage.model.config, where=stage.where("model.config"))
        if "vocab_size" not in stage.model.config and find_tokenizer(stage)[0] not in LEARNT_TOKENIZERS:
            config.vocab_size = len(load_tokenizer(stage))
    if isinstance(stage.options, TrainOptions):
        start.require_objective(stage, config)
    return config


def _divide(parts: Sizes, stage: Stage, found: Footprint, device: str, config: PreTrainedConfig) -> Sizes:
    """Divide what a strategy shards among the processes, and add what it holds besides."""
    strategy, weights, text, sharded = shared_by(stage), found.rest["weights"], config.get_text_config(), set[str]()
    dtype, _, narrows = compute_types(stage, device)
    if strategy in ("zero2", "zero3"):  # a float32 copy of what is trained, and a place for its gradients
        parts = {**parts, "optimizer": parts["optimizer"] + 4 * found.trained["number"]}
        parts |= {"gradients": found.trained["bytes"]} if strategy == "zero3" or parts.get("gradients") else {}
        parts |= {"reference": parts["reference"] / 2} if narrows and "reference" in parts else {}
    if strategy in ("fsdp", "zero2", "zero3"):
        sharded |= {"gradients", "optimizer"}
    if strategy in ("fsdp", "zero3"):
        sharded |= {"weights", "adapters", "reference"}
    if strategy == "fsdp":
        sharded |= {"critic"}  # DeepSpeed has the policy alone
        parts |= {name: 2 * parts[name] for name in ("weights", "gradients") if narrows and name in parts}
        # The head or a layer whole, as it arrives and in place; a layer with its gradient, twice as well.
        table = float(text.vocab_size * text.hidden_size * dtype.itemsize)
        layer = (weights - table * (1 if config.tie_word_embeddings or stage.scores else 2)) / found.num_layers
        parts = {**parts, "whole layers": 2 * max(table, layer * (2 if stage.lora is None else 1))}
    elif strategy == "zero3":  # stage3_max_live_parameters, and as many that will be read again soon
        parts = {**parts, "whole layers": min(weights, 1e9 * dtype.itemsize)}
    elif strategy == "ddp":
        parts = {**parts, "buckets": found.trained["bytes"]}  # gradients once more, as they are sent
    away = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "weights", "gradients")}
    return {name: size / num_devices(stage) if name in sharded else size for name, size in parts.items()
            if name not in away[stage.launch.offload]}  # fmt: skip
