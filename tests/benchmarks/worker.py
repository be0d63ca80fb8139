"""One measurement in a process of its own; prints one JSON object. `throughput` and `preparation` start it.

    python worker.py sft|dpo|rm ours|ours-shuffled|trl|bare|profile MODEL ROWS BATCH [lora] [bf16]
    python worker.py prepare ours|trl MODEL ROWS

All trainers take one epoch over the same rows in float32 on the CPU, so that they see the same tokens, and only
the loop is timed: no start, no saving, no logging.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

RECIPE = """\
name: bench
model: {{path: {model}, dtype: {dtype}}}
launch: {{device: cpu}}
{method}:
  data: {{path: {rows}/train.jsonl}}
  num_train_epochs: 1
  batch_size: {batch}
  micro_batch_size: {batch}
  batching: {batching}
  learning_rate: 1e-4
  max_length: {positions}
  warmup_steps: 0
  lr_scheduler_type: linear
  logging_strategy: "no"
  save_strategy: "no"
  gradient_checkpointing: false
{lora}"""
LORA = "lora: {r: 8, alpha: 16, target_modules: [q_proj, v_proj]}\n"


def open_stage(
    method: str, model: Path, rows: Path, out: Path, *, batch: int, batching: str, words: Sequence[str] = ()
) -> Any:
    """Resolve the recipe of a measurement, and make its run directory."""
    from alignkit.recipe import load_recipe, resolve
    from alignkit.runs.directory import RunDir

    recipe = out / "recipe.yaml"
    given = {"method": method, "model": model, "rows": rows, "batch": batch, "batching": batching}
    given |= {"positions": positions_of(model), "dtype": "bfloat16" if "bf16" in words else "float32"}
    recipe.write_text(RECIPE.format(**given, lora=LORA if "lora" in words else ""), encoding="utf-8")
    run = RunDir(out / "run")
    run.path.mkdir()
    run.checkpoints.mkdir()
    return resolve(load_recipe(recipe), method), run


def positions_of(model: Path) -> int:
    """The most tokens that the model reads, to which no row is cut."""
    return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"])


def build_ours(stage: Any, run: Any) -> Any:
    """Make alignkit's own trainer."""
    return import_module(f"alignkit.train.{stage.method}").build(stage, run).trainer


def build_trl(method: str, model: Path, rows: Path, out: Path, *, batch: int, words: Sequence[str]) -> Any:
    """Make TRL's trainer for the batches of `ours-shuffled`.

    They are shuffled rows padded per batch, as TRL's default is; another shuffle would pad by chance more or less.
    """
    import trl
    from datasets import load_dataset

    from alignkit.train.tables import shuffled_order

    name = {"sft": "SFT", "dpo": "DPO", "rm": "Reward"}[method]
    data = load_dataset(str(rows), split="train")
    data = data.select(shuffled_order(len(data), seed=0, epoch=0))
    config = getattr(trl, f"{name}Config")(
        output_dir=str(out),
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        learning_rate=1e-4,
        max_length=positions_of(model),
        logging_strategy="no",
        save_strategy="no",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16="bf16" in words,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        model_init_kwargs={"dtype": "bfloat16" if "bf16" in words else "float32"},
    )
    extra = {}
    if "lora" in words:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    return getattr(trl, f"{name}Trainer")(str(model), args=config, train_dataset=data, **extra)


def train_bare(stage: Any, run: Any, *, batch: int) -> Clock:
    """Train in a plain PyTorch loop over ready tensors, the very batches of `ours-shuffled`."""
    import copy

    import torch
    from torch.nn.functional import cross_entropy, logsigmoid
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from alignkit.train.setup import collator_for, open_rows
    from alignkit.train.tables import shuffled_order

    setup = open_rows(stage, run)
    table, collate = setup.tables.train, collator_for(stage, setup.chat.tokenizer)
    order = shuffled_order(len(table), seed=0, epoch=0)
    starts = range(0, len(order), batch)
    batches = [collate([table[int(number)] for number in order[start : start + batch]]) for start in starts]
    kind, more = (AutoModelForSequenceClassification, {"num_labels": 1}) if stage.method == "rm" else (
        AutoModelForCausalLM, {})  # fmt: skip
    network = kind.from_pretrained(stage.model.path, dtype=torch.float32, **more).train()
    reference = copy.deepcopy(network).eval() if stage.method == "dpo" else None

    def answer_logps(model: Any, inputs: dict[str, Any]) -> Any:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        nll = cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten(), reduction="none")
        return -(nll.view(len(logits), -1) * inputs["completion_mask"][:, 1:]).sum(dim=1)

    def loss_of(inputs: dict[str, Any]) -> Any:
        if stage.method == "sft":
            return network(**inputs, use_cache=False).loss
        if stage.method == "rm":
            given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
            rewards = network(**given, use_cache=False).logits.squeeze(-1)
            return -logsigmoid(rewards[inputs["better"]] - rewards[inputs["worse"]]).mean()
        with torch.no_grad():
            ref_chosen, ref_rejected = answer_logps(reference, inputs).chunk(2)
        chosen, rejected = answer_logps(network, inputs).chunk(2)
        return -logsigmoid(0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    clock = Clock()
    clock.start()
    for inputs in batches:
        loss = loss_of(inputs)
        clock.loss += float(loss) / len(batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    clock.stop()
    return clock


class Clock:
    """Processor and wall time of a loop, and its mean loss: equal batches give an equal one."""

    seconds = wall_seconds = loss = 0.0
    _began = 0.0, 0.0

    def start(self) -> None:
        self._began = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        self.seconds, self.wall_seconds = time.process_time() - self._began[0], time.perf_counter() - self._began[1]


def count_tokens(method: str, rows: Path) -> int:
    """Return the tokens of all rows, padding not counted: characters and an eos, the tokenizer being byte-level."""

    def size(text: Any) -> int:  # of a turn: its characters
        return len(text if isinstance(text, str) else text[0]["content"])

    lines = map(json.loads, (rows / "train.jsonl").read_text(encoding="utf-8").splitlines())
    answers = ("completion",) if method == "sft" else ("chosen", "rejected")
    return sum(size(row["prompt"]) + size(row[answer]) + 1 for row in lines for answer in answers)


def start_clock() -> float:
    """Leave what the libraries made out of what is looked through for cycles, as alignkit does before it trains."""
    gc.collect()
    gc.freeze()
    return time.process_time()


def prepare_ours(model: Path, rows: Path, out: Path) -> float:
    """Read, check and tokenise with alignkit and return the processor's seconds, but those of loading libraries."""
    import datasets  # noqa: F401

    from alignkit.data import Rejects
    from alignkit.models.chat import Chat, load_tokenizer
    from alignkit.train.tables import prepare_tables

    stage, _ = open_stage("sft", model, rows, out, batch=8, batching="grouped")
    began = start_clock()
    prepare_tables(stage, Chat(load_tokenizer(stage)), out / "cache", rejects=Rejects())
    return time.process_time() - began


def prepare_trl(model: Path, rows: Path, out: Path) -> float:
    """Load and tokenise with TRL and return the processor's seconds; the model is loaded before the clock starts."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    config = SFTConfig(
        output_dir=str(out), max_length=512, use_cpu=True, bf16=False, report_to="none",
        assistant_only_loss=tokenizer.chat_template is not None,
    )  # fmt: skip
    began = start_clock()
    data = load_dataset(str(rows), split="train")
    SFTTrainer(network, args=config, train_dataset=data, processing_class=tokenizer)
    return time.process_time() - began


def train(trainer: Any) -> Clock:
    """Train, and time the loop between the callbacks at its two ends."""
    from transformers import TrainerCallback

    clock = Clock()

    class Ends(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

    trainer.add_callback(Ends())
    clock.loss = trainer.train().training_loss
    return clock


def profile(trainer: Any) -> dict[str, float]:
    """Train, and give each part's share of the processor time; what one part calls is counted where it is called."""
    from torch.optim import AdamW
    from trl.trainer import utils

    spent: dict[str, float] = defaultdict(float)
    inner: list[float] = []  # what the parts within each running one have taken

    def watch(owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            began = time.process_time()
            inner.append(0.0)
            try:
                return function(*arguments, **keywords)
            finally:
                seconds = time.process_time() - began
                spent[part] += seconds - inner.pop()
                if inner:
                    inner[-1] += seconds

        setattr(owner, name, staticmethod(timed) if isinstance(owner, type) and name == "apply" else timed)

    watch(trainer.model.base_model, "forward", "forward of the model")
    if getattr(trainer, "ref_model", None) is not None:
        watch(trainer.ref_model.base_model, "forward", "forward of the reference")
    watch(utils._ChunkedLogProbFunction, "apply", "forward of the LM head")
    watch(trainer.accelerator, "backward", "backward")
    watch(trainer.accelerator, "clip_grad_norm_", "clipping")
    watch(AdamW, "step", "optimizer")
    clock = train(trainer)
    spent["all else"] = clock.seconds - sum(spent.values())
    shares = {f"share of {part}": seconds / clock.seconds for part, seconds in spent.items()}
    return shares | {"seconds_per_step": clock.seconds / trainer.state.global_step}


def main() -> None:
    task, who, model, rows, *rest = sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    paths = Path(model), Path(rows)
    with tempfile.TemporaryDirectory(prefix="alignkit-bench-") as directory:
        out = Path(directory)
        os.environ["HF_DATASETS_CACHE"] = str(out / "hf-cache")
        if task == "prepare":
            seconds = (prepare_ours if who == "ours" else prepare_trl)(*paths, out)
            with (paths[1] / "train.jsonl").open("rb") as file:
                amount = sum(1 for _ in file)
            found = {"seconds": seconds, "per_second": amount / seconds}
        else:
            kind = {"batch": int(rest[0]), "words": rest[1:]}
            if who == "profile":
                stage, run = open_stage(task, *paths, out, **kind, batching="shuffled")
                print(json.dumps(profile(build_ours(stage, run))))
                return
            if who == "trl":
                clock = train(build_trl(task, *paths, out, **kind))
            else:
                batching = "grouped" if who == "ours" else "shuffled"
                stage, run = open_stage(task, *paths, out, **kind, batching=batching)
                clock = train_bare(stage, run, batch=kind["batch"]) if who == "bare" else train(build_ours(stage, run))
            found = {name: value for name, value in vars(clock).items() if name != "_began"}
            found |= {"per_second": count_tokens(task, paths[1]) / clock.seconds}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps(found | {"peak_bytes": peak}))


if __name__ == "__main__":
    main()
