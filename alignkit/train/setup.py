"""Everything a stage trains with: rows, tokenizer, weights, TRL's config, and the trainer a method builds of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import TrainingArguments

from alignkit import console
from alignkit.data import Rejects, Row
from alignkit.errors import EnvironmentProblem, RecipeError
from alignkit.models.chat import Chat, load_chat
from alignkit.models.files import is_builtin
from alignkit.models.load import ROUNDS_TO, Loaded, load_policy, load_reference, number_types, pick_device
from alignkit.models.logprobs import pad
from alignkit.recipe import Stage
from alignkit.recipe.stage import check_batch
from alignkit.runs.directory import RunDir
from alignkit.runs.files import read_json
from alignkit.train import memory, ranks
from alignkit.train.tables import Tables, learn_vocabulary, share_tables

if TYPE_CHECKING:
    from alignkit.train.trainer import Guarded

_Config = TypeVar("_Config", bound=TrainingArguments)


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
    auto = _FITTING.get(stage.run_dir) or memory.micro_batches(stage, ranks.world_size())[-1]
    micro = auto if wanted == "auto" else wanted
    if stage.is_unpaired and micro == 1:
        what = f"is {stage.training.batch_size}, of which one row fits a forward pass; KTO estimates its KL term "
        what += "across rows: make it a multiple of a number from 2 to 8, or set micro_batch_size"
        raise RecipeError(f"{stage.name}.batch_size {what}", where=stage.where(f"{stage.name}.batch_size"))
    return micro


def _fit_micro_batch(stage: Stage, table: Any) -> None:
    """Find the largest micro batch that fits beside what others hold on the card, on that of the rank with the least.
    Its rows are as long as the longest. Tiny models that alignkit brings are not looked at: they fit."""
    sizes = memory.micro_batches(stage, ranks.world_size())
    on_card = pick_device(stage.launch.device) == "cuda" and not is_builtin(stage.model.path)
    if stage.training.micro_batch_size != "auto" or len(sizes) == 1 or not on_card:
        return
    config, free = memory.read_shape(stage), torch.cuda.mem_get_info()[0]
    group = memory.group_size(stage, table)
    tokens = max(table["length"]) + getattr(stage.options, "max_new_tokens", 0)
    try:
        needs = {size: memory.predict(stage, config, micro=size, tokens=tokens, device="cuda", group=group).needs
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
        held_out = _FITTING.get(stage.run_dir, memory.LARGEST_MICRO_BATCH)
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
    # A launcher that has FSDP recompute activations must not find transformers doing it too; `shards.set_up` sees to
    # it later.
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
