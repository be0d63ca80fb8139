"""Everything a stage trains with: rows, tokenizer, weights, TRL's config, and the trainer a method builds of them; what
it holds on a device at its highest moment, and what of it a strategy divides among processes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pyarrow.compute as compute
import torch
from torch import Tensor
from transformers import PreTrainedConfig, TrainingArguments

from alignkit import console
from alignkit.data import Rejects, Row
from alignkit.errors import AlignKitError, EnvironmentProblem, RecipeError
from alignkit.models import start
from alignkit.models.chat import Chat, find_tokenizer, load_chat, load_tokenizer
from alignkit.models.files import find_model_dir, inspect_model_dir, is_builtin
from alignkit.models.load import ROUNDS_TO, Loaded, load_policy, load_reference, number_types, pick_device
from alignkit.models.logprobs import pad
from alignkit.recipe import Stage
from alignkit.recipe.methods import PpoOptions, TrainOptions
from alignkit.recipe.schema import LEARNT_TOKENIZERS
from alignkit.recipe.stage import check_batch
from alignkit.recipe.words import OWN_LOSSES
from alignkit.runs.directory import RunDir
from alignkit.runs.files import read_json
from alignkit.train import ranks
from alignkit.train.tables import Tables, learn_vocabulary, share_tables
from alignkit.train.trace import Footprint, Shape, Sizes, compute_types, num_devices, shared_by, trace
from alignkit.train.trainer import Guarded

_Config = TypeVar("_Config", bound=TrainingArguments)
LARGEST_MICRO_BATCH = 8
# Bytes of optimizer state for each byte of a trained weight, by the beginning of `optim`; AdamW keeps two moments.
_STATE = {"sgd": 0.0, "adafactor": 0.01, "lomo": 0.0, "adalomo": 0.01, "lion": 1.0, "adagrad": 1.0, "rmsprop": 1.0}
_STATE_8BIT = 2 * 1.016  # bytes a weight: two moments, in blocks of 256 with a float32 scale
_PASSES = {"sft": "words", "dpo": "words", "rm": "score", "ppo": "answers"}  # others write


@dataclass
class Setup:
    """A stage on its way to a first step: `open_rows` begins it, `load` adds the weights, a method its trainer."""

    stage: Stage
    run: RunDir
    chat: Chat
    rejects: Rejects
    tables: Tables
    loaded: Loaded = field(init=False)
    trainer: Guarded = field(init=False)
    is_reward: bool = False
    pusher: Any = None  # report.publish.Pusher, where the hub gets the model
    finish: Callable[[Path], dict[str, float]] | None = None  # measures and writes beside the model, before it counts
    # rewards of answers to rows, for samples
    score_answers: Callable[[Sequence[Row], Sequence[Sequence[int]]], list[dict[str, Any]]] | None = None
    answer_rows: Callable[[Sequence[Row]], list[dict[str, Any]]] | None = None  # of a classifier, for samples
    head: dict[str, Any] | None = None  # of a classifier, as the record beside its weights keeps it
    ptx_data: str | None = None  # fingerprint of the pre-training rows that ppo mixes in
    record: dict[str, Any] = field(default_factory=dict)  # what the method adds to stage.json
    base_hash: str | None = None  # bytes of what adapters leave alone, before training

    def load(self, load: Callable[..., Loaded] = load_policy) -> Any:
        """Load the weights, rank 0 first, which may have to write them; returns the model."""
        self.loaded = ranks.first(lambda: load(self.stage, run_dir=self.run.path, tokenizer=self.chat.tokenizer))
        return self.loaded.model

    def reference(self, config: TrainingArguments) -> Any:
        """Copy the policy as it is now as the reference; what splits weights wants all of one type."""
        rounds = ROUNDS_TO.get("bf16" if config.bf16 else "fp16" if config.fp16 else "no")
        return load_reference(self.loaded, rounds if self.stage.launch.strategy == "ddp" else None)

    def arguments(self, config: Any) -> dict[str, Any]:
        """What every trainer is made of."""
        return {
            "model": self.loaded.model, "args": config, "train_dataset": self.tables.train,
            "eval_dataset": self.tables.eval, "processing_class": self.chat.tokenizer, "settings": self.stage.training,
        }  # fmt: skip


def open_rows(stage: Stage, run: RunDir) -> Setup:
    """Load the tokenizer and make the token tables of a stage: the head of every `build`."""
    # A template that reads the clock reads when the run began.
    kept = read_json(run.stage).get("clock") if run.stage.exists() else None
    clock = datetime.fromisoformat(ranks.share(kept or datetime.now().isoformat()))
    chat, rejects = load_chat(stage, clock=clock, learnt=ranks.once(lambda: learn_vocabulary(stage))), Rejects()
    tables = share_tables(stage, chat, run.cache, rejects=rejects)
    _fit_micro_batch(stage, tables.train)
    return Setup(stage, run, chat, rejects, tables)


_FITTING: dict[str, int] = {}  # by run directory: what `micro_batch_size: auto` came to on the card of this process


def micro_batch_size(stage: Stage) -> int:
    """Rows per forward pass: the recipe's, or for auto the largest of `micro_batches` that fits on the card."""
    if problem := check_batch(stage, ranks.world_size()):
        raise RecipeError(problem)
    if getattr(stage.options, "batch_tokens", None):
        return 1  # a "row" is a batch of its own
    wanted = stage.training.micro_batch_size
    auto = _FITTING.get(stage.run_dir) or micro_batches(stage, ranks.world_size())[-1]
    micro = auto if wanted == "auto" else wanted
    if stage.is_unpaired and micro == 1:
        what = f"is {stage.training.batch_size}, of which one row fits a forward pass; KTO estimates its KL term "
        what += "across rows: make it a multiple of a number from 2 to 8, or set micro_batch_size"
        raise RecipeError(f"{stage.name}.batch_size {what}", where=stage.where(f"{stage.name}.batch_size"))
    return micro


def _fit_micro_batch(stage: Stage, table: Any) -> None:
    """Find the largest micro batch that fits beside what others hold on the card, on that of the rank with the least.
    Its rows are as long as the longest. Tiny models that alignkit brings are not looked at: they fit."""
    sizes = micro_batches(stage, ranks.world_size())
    on_card = pick_device(stage.launch.device) == "cuda" and not is_builtin(stage.model.path)
    if stage.training.micro_batch_size != "auto" or len(sizes) == 1 or not on_card:
        return
    config, free = read_shape(stage), torch.cuda.mem_get_info()[0]
    group = group_size(stage, table)
    tokens = max(table["length"]) + getattr(stage.options, "max_new_tokens", 0)
    try:
        needs = {size: predict_memory(stage, config, micro=size, tokens=tokens, device="cuda", group=group).needs
                 for size in sizes}  # fmt: skip
    except EnvironmentProblem as error:
        return console.warn(f"{stage.name}: micro_batch_size auto is {sizes[-1]}, whatever fits: {error}")
    fitting = max((size for size in sizes if needs[size] <= free), default=sizes[0])
    _FITTING[stage.run_dir] = micro = -ranks.largest(-fitting)
    if micro < sizes[-1]:
        size = f"{needs[micro] / 2**30:.1f} GiB predicted, {free / 2**30:.1f} free"
        console.note(f"{stage.name}: micro_batch_size {micro}, the largest that fits ({size})")


def build_config(stage: Stage, config_class: type[_Config], checkpoints: Path, **fixed: Any) -> _Config:
    """Fill TRL's config for a stage; `fixed` are values the method itself decides."""
    device = pick_device(stage.launch.device, where=stage.where("launch.device"))
    micro, held_out = micro_batch_size(stage), stage.training.micro_batch_size
    if held_out == "auto":
        held_out = _FITTING.get(stage.run_dir, LARGEST_MICRO_BATCH)
    _, precision = number_types(stage, half=device == "cuda" and torch.cuda.is_bf16_supported())
    types = {field.name: str(field.type) for field in fields(config_class)}
    # A whole number for a float field: TRL copies router_aux_loss_coef into configs that refuse an int. Counts of steps
    # stay what they are: they are shares below 1 only.
    given = {
        key: float(value) if type(value) is int and "float" in types[key] and not key.endswith("_steps") else value
        for key, value in stage.trainer.items()
        if key in types and key != "eval_on_start"
    }
    values: dict[str, Any] = {
        # A loss that is not finite must be seen, not averaged away; the guard stops before the optimizer step.
        "logging_nan_inf_filter": False,
        # Upstream rotates before we have sealed the new checkpoint, and by mtime; we rotate ourselves, by step.
        "save_total_limit": None,
        "save_strategy": "steps",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        # On CPU there is nothing to pin or to overlap, and a worker would only fight for the cores.
        "dataloader_pin_memory": device == "cuda",
        "remove_unused_columns": False,
        "logging_first_step": True,
        "eval_on_start": False,  # `Recorder` does it: upstream would again when a run goes on
        # Every trained parameter takes part in every step; looking for others costs a walk over the graph each time.
        "ddp_find_unused_parameters": False,
        "ddp_timeout": int(stage.launch.timeout_seconds),
        **given,
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": micro,
        # Held-out rows per forward pass do not depend on the number of processes.
        "per_device_eval_batch_size": int(stage.trainer.get("per_device_eval_batch_size") or held_out),
        "gradient_accumulation_steps": stage.training.batch_size // ranks.world_size() // micro,
        "seed": stage.seed,
        "use_cpu": device == "cpu",
        "ddp_backend": "gloo" if device == "cpu" and ranks.world_size() > 1 else None,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
    }
    # A launcher that has FSDP recompute activations must not find transformers doing it too; `set_up_shards` sees to it
    # later.
    by_fsdp = ranks.uses_fsdp() and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true"
    recompute = False if by_fsdp else stage.launch.activation_checkpointing
    if recompute is not None:
        values |= {"gradient_checkpointing": recompute, "activation_checkpointing": recompute}
    return config_class(**(values | fixed))


_Rows: TypeAlias = Sequence[dict[str, Any]]


def collate_tasks(
    rows: _Rows, *, pad_id: int, multiple_of: int, numbers: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Flatten the sequences of B rows into S, right-padded: input_ids, attention_mask (S, T), and labels, the tokens
    that are learnt; row_of (S,); where labels have `numbers`, label (B,)."""
    input_ids, mask = pad([ids for row in rows for ids in row["sequences"]], pad_id, multiple_of=multiple_of)
    row_of = torch.tensor([number for number, row in enumerate(rows) for _ in row["sequences"]])
    batch = {"input_ids": input_ids, "attention_mask": mask, "row_of": row_of}
    batch["labels"] = input_ids.masked_fill(mask == 0, -100)
    return batch if numbers is None else {**batch, "label": torch.tensor([numbers[row["label"]] for row in rows])}


def collate_groups(rows: _Rows, *, pad_id: int, multiple_of: int) -> dict[str, Tensor]:
    """Flatten the answers of B prompts into A rows, and list their pairs by row number.
    Returns input_ids, attention_mask (A, T) right-padded; better, worse, pair_prompt (P,) long; label, margin (P,)
    float; prompt_of (A,) long. Ties make no pair."""
    input_ids, mask = pad([ids for row in rows for ids in row["answers_ids"]], pad_id, multiple_of=multiple_of)
    pairs: list[tuple[int, int, int, float, float]] = []
    prompt_of: list[int] = []
    for prompt, row in enumerate(rows):
        first, scores = len(prompt_of), row["scores"]
        prompt_of += [prompt] * len(scores)
        pairs += [
            (first + better, first + worse, prompt, float(row["label"]), float(row["margin"]))
            for better, worse in combinations(range(len(scores)), 2)
            if scores[better] != scores[worse]
        ]
    columns = zip(("better", "worse", "pair_prompt", "label", "margin"), zip(*pairs, strict=True), strict=True)
    batch = {"input_ids": input_ids, "attention_mask": mask, "prompt_of": torch.tensor(prompt_of)}
    return batch | {name: torch.tensor(values) for name, values in columns}


def collate_targets(rows: _Rows, *, pad_id: int, multiple_of: int) -> dict[str, Tensor]:
    """Pad sources and targets on the right: input_ids, attention_mask (B, S); labels, decoder_attention_mask (B, T)."""
    input_ids, mask = pad([row["source_ids"] for row in rows], pad_id, multiple_of=multiple_of)
    labels, target_mask = pad([row["target_ids"] for row in rows], -100, multiple_of=multiple_of)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "decoder_attention_mask": target_mask}


def collate_taught(rows: _Rows, *, pad_id: int, multiple_of: int) -> dict[str, Tensor]:
    """Pad a student's rows on the right, and its teacher's where they differ: their columns begin with teacher_."""
    batch = {}
    for side in ("", "teacher_") if "teacher_input_ids" in rows[0] else ("",):
        for name, filler in (("labels", -100), ("input_ids", pad_id)):
            batch[f"{side}{name}"], mask = pad([row[f"{side}{name}"] for row in rows], filler, multiple_of=multiple_of)
        batch[f"{side}attention_mask"] = mask
    return batch


def collator_for(stage: Stage, tokenizer: Any, numbers: Mapping[str, int] | None = None) -> Callable[..., Any]:
    """The collator of a stage's token rows, which are cut to max_length already; `numbers` are those of labels."""
    multiple = stage.trainer.get("pad_to_multiple_of")
    mine = {"pad_id": tokenizer.pad_token_id, "multiple_of": multiple or 1}
    upstream = {"pad_token_id": tokenizer.pad_token_id, "pad_to_multiple_of": multiple}
    if stage.method == "ppo":
        return list
    if stage.task is not None:
        return partial(collate_tasks, **mine, numbers=numbers)
    own = {"seq2seq": collate_targets, "distill": collate_taught, "rm": collate_groups}
    if collate := own.get(stage.objective or stage.method):
        return partial(collate, **mine)
    if stage.is_unpaired:
        from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

        return DataCollatorForUnpairedPreference(**upstream)
    if stage.method == "dpo":
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        inner = DataCollatorForPreference(**upstream)  # beside its tokens, each pair's P(chosen preferred), (B,)
        return lambda rows: {**inner(rows), "label": torch.tensor([float(row.get("label", 1.0)) for row in rows])}
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    packs = stage.trainer.get("packing") and stage.trainer.get("packing_strategy", "bfd") != "wrapped"
    padding_free = bool(packs or stage.trainer.get("padding_free"))
    return DataCollatorForLanguageModeling(**upstream, padding_free=padding_free)


def training_rows(stage: Stage, table: Any, tokenizer: Any, *, num_rows: int) -> tuple[Any, Callable[..., Any]]:
    """The first rows of a token table as the stage's trainer reads them, packed if it packs, and its collator."""
    packs = stage.method == "sft" and bool(stage.trainer.get("packing"))
    table = table.select(range(min(len(table), 1000 if packs else num_rows)))
    if packs:
        from trl.data_utils import pack_dataset

        strategy = stage.trainer.get("packing_strategy", "bfd")
        table = pack_dataset(table.select_columns(["input_ids", "labels"]), stage.trainer["max_length"], strategy)
    return table, collator_for(stage, tokenizer)


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


def predict_memory(
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
