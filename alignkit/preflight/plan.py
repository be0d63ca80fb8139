"""`alignkit plan`: what each stage of a recipe will need of a device, of time and of disk; a config is enough."""

import importlib
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from transformers import PreTrainedConfig, PrinterCallback, TrainerCallback

from alignkit.data import Rejects
from alignkit.errors import AlignKitError, EnvironmentProblem, ModelError, UsageError, suggest
from alignkit.models.chat import load_chat
from alignkit.preflight.check import start_today
from alignkit.preflight.doctor import Table
from alignkit.preflight.requirements import list_feedback_models, locate_rows
from alignkit.recipe import Recipe, Stage, resolve
from alignkit.recipe.methods import FEEDBACK, LabelOptions, PpoOptions, TrainOptions
from alignkit.recipe.schema import LoraOptions
from alignkit.runs.directory import RunDir
from alignkit.runs.record import memory_bytes
from alignkit.train import setup
from alignkit.train.encode import longest_sequence
from alignkit.train.tables import learn_vocabulary, prepare_tables
from alignkit.train.trace import num_devices, one_process, recomputes

_GIB = 2**30
_READ_BYTES = 64 << 20  # rows in larger files are not tokenised for a plan
_WRITTEN = 256  # tokens of an answer in an evaluation that does not say
_PROBED, _WARM_UP = 6, 2  # steps


class Device(NamedTuple):
    """What a stage is planned for: kind is cuda or cpu."""

    name: str
    kind: str
    bytes: float

    @classmethod
    def find(cls, gpu: str | None, size: float | None) -> Self:
        """Find it by name or size, else take what is in this machine; UsageError for a name that nobody knows."""
        known = json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8"))
        plain = {re.sub(r"rtx|[^a-z0-9]", "", name.lower()): name for name in known}
        asked = re.sub(r"nvidia|geforce|rtx|sxm\d*|pcie|hbm\w*", "", (gpu or "").lower())
        name = plain.get(re.sub(r"[^a-z0-9]", "", asked))
        if name is None and (sold := re.fullmatch(r"(.+)[\s-](\d+)\s?gi?b\W*", asked)):  # A100-SXM4-80GB
            name = plain.get(re.sub(r"[^a-z0-9]", "", sold[1]))
            name = name if known.get(name) == int(sold[2]) else None
        if gpu is not None and name is None and size is None:
            what = f"no GPU called {gpu} is known{suggest(gpu, known)}; --memory GIB plans for any other"
            raise UsageError(what, where="--gpu")
        if name is not None and size not in (None, known[name]):
            raise UsageError(f"{name} has {known[name]} GiB and not {size:g}; give one of the two", where="--memory")
        if size := size or known.get(name):
            return cls(name or gpu or f"a GPU of {size:g} GiB", "cuda", size * _GIB)
        if not torch.cuda.is_available():
            return cls("the CPU of this machine", "cpu", memory_bytes())
        found = torch.cuda.get_device_properties(0)
        return cls(found.name, "cuda", found.total_memory)


@dataclass
class Plan:
    """The stages of a recipe on one kind of device; sizes in GiB, of each device at its highest moment."""

    recipe: str
    device: Device
    devices: int
    stages: list[dict[str, Any]] = field(default_factory=list)

    def tables(self) -> list[Table]:
        names = list(dict.fromkeys(name for stage in self.stages for name in stage["parts"]))
        is_tiny = max(sum(stage["parts"].values()) for stage in self.stages) < 0.5
        unit, scale = ("MiB", 1024) if is_tiny else ("GiB", 1)
        held, work, said = list[list[str]](), list[list[str]](), list[list[str]]()
        for each in self.stages:
            sizes = [f"{each['parts'][name] * scale:.2f}" if name in each["parts"] else "" for name in names]
            fits = [f"{each['needs'] * scale:.1f}", "yes" if each["fits"] else "NO", str(each["micro_up_to"] or "-")]
            held.append([each["stage"], str(each["micro"]), f"{each['tokens']:,}", *sizes, *fits])
            counts = [f"{count:,}" if count else "?" for count in (each["steps"], each["total_tokens"])]
            hours = "?" if each["hours"] is None else f"{each['hours']:.3g}"
            work.append([each["stage"], *counts, hours, f"{each['disk'] * scale:.2f}", each["moment"]])
            said += [[each["stage"], note] for note in each["notes"]]
        room = f"{self.devices} x {self.device.name}, {self.device.bytes / _GIB:.0f} GiB"
        title = f"{self.recipe} on {room}: {unit} of each"
        tables = [(title, ["stage", "micro", "tokens", *names, "needs", "fits", "micro up to"], held)]
        tables.append(("", ["stage", "steps", "tokens", "hours", "disk", "highest moment"], work))
        return [*tables, ("", ["stage", "note"], said)] if said else tables

    def to_dict(self) -> dict[str, Any]:
        device = self.device._asdict()
        return asdict(self) | {"device": device, "fits": all(stage["fits"] for stage in self.stages)}


@one_process()
def plan_recipe(
    recipe: Recipe, device: Device, *, devices: int | None = None, tokens: int | None = None, rate: float | None = None,
    probes: bool = False, trust_code: bool = False) -> Plan:  # fmt: skip
    """Plan every stage of a recipe, and its evaluation; raises the first mistake in it. `tokens` is the longest row
    where rows are not here, `rate` tokens a second of all devices; `probes` measures it, on this machine's device."""
    if probes and device != Device.find(None, None):
        what = f"measures this machine, which is not {device.name}; leave --gpu and --memory out, or give "
        raise UsageError(f"{what}--tokens-per-second", where="--probe")
    stages = [resolve(recipe, name, trust_code=trust_code) for name in recipe.stage_names]
    if devices is not None:
        spread = {"processes": devices, "nodes": 1}
        stages = [stage if stage.method in FEEDBACK else _change(stage, launch=spread) for stage in stages]
    plan = Plan(recipe.path, device, devices or max(map(num_devices, stages)))
    longest = max((int(stage.trainer.get("max_length") or 0) for stage in stages), default=0) or 1024
    for stage in stages:
        plan.stages.append(planned := _plan_stage(stage, device, tokens=tokens, longest=longest))
        if probes and isinstance(stage.options, TrainOptions):
            rate = _probe(stage) if planned["fits"] else None
            said = f"{rate:,.0f} tokens a second in steps {_WARM_UP + 1} to {_PROBED} here" if rate else "not probed"
            planned["notes"].append(f"{said}, in one process" if rate and plan.devices > 1 else said)
        planned["hours"] = planned["total_tokens"] / rate / 3600 if rate and planned["total_tokens"] else None
    if recipe.evaluates:
        options, last = recipe.evaluate, stages[-1]
        new = options.max_new_tokens or _WRITTEN
        writes = LabelOptions(data=last.options.data, max_new_tokens=new, batch_size=options.batch_size)
        evaluates, length = replace(last, name="evaluate", options=writes, trainer={}), plan.stages[-1]["tokens"] + new
        plan.stages.append(_plan_stage(evaluates, device, tokens=length, longest=longest))
    return plan


def _change(stage: Stage, *, trainer: Any = (), lora: LoraOptions | None = None, **parts: dict[str, Any]) -> Stage:
    """Copy a stage with other values of TRL's fields, or of its options, model or launch."""
    changed = {name: getattr(stage, name).model_copy(update=update) for name, update in parts.items()}
    return replace(stage, trainer={**stage.trainer, **dict(trainer)}, lora=lora or stage.lora, **changed)


def _plan_stage(stage: Stage, device: Device, *, tokens: int | None, longest: int) -> dict[str, Any]:
    options, notes, rows = stage.options, list[str](), None
    today, _ = start_today(stage)
    config = setup.read_shape(today)
    if tokens is None:
        rows = _read_rows(today, notes)
        answer = getattr(options, "max_new_tokens", None) or 0
        tokens = rows[1] if rows else int(stage.trainer.get("max_length") or longest + answer)
        if rows is None:
            notes.append(f"the longest row{' with its answer' if answer else ''} taken as {tokens:,} tokens (--tokens)")
    fit = _Fit(stage, config, device, {"tokens": tokens, "group": rows[3] if rows else None})
    largest = fit.largest(stage)
    wanted = getattr(options, "micro_batch_size", None)
    micro = getattr(options, "batch_size", 1) if wanted is None else wanted
    if wanted == "auto":  # what training would take
        sizes = setup.micro_batches(stage, num_devices(stage))
        micro = max((size for size in sizes if size <= (largest or 1) or device.kind == "cpu"), default=sizes[0])
    found = fit.predict(stage, micro)
    advice = [fit.advise()] if found.needs > device.bytes else []
    notes = [*advice, *notes, *fit.notes, *(f"estimated: {note}" for note in found.notes)]
    plan: dict[str, Any] = {
        "stage": stage.name, "method": stage.method, "micro": micro, "tokens": tokens,
        "parts": {name: size / _GIB for name, size in found.parts.items() if size > found.total / 1e4},
        "moment": found.moment, "needs": found.needs / _GIB, "fits": found.needs <= device.bytes,
        "micro_up_to": largest, "steps": None, "total_tokens": None, "hours": None, "disk": 0.0, "notes": notes,
    }  # fmt: skip
    if isinstance(options, TrainOptions):
        # Rotation comes after the new checkpoint is sealed, so for a moment there is one more than is kept.
        whole = found.parts.get("weights", 0.0) if stage.lora is None else 0.0
        plan["disk"] = (found.saved * (options.keep_checkpoints + 1) + whole) / _GIB
        plan["steps"], plan["total_tokens"] = _count_work(stage, rows, tokens)
    return plan


class _Fit:
    """What variants of one stage need on a device."""

    def __init__(self, stage: Stage, config: PreTrainedConfig, device: Device, row: dict[str, Any]) -> None:
        self._stage, self._config, self._device, self._row = stage, config, device, row
        self.notes: list[str] = []
        self._foreign: Counter[str] = Counter()  # bytes of judges, generators and teachers
        for role, source in ((key, model.model) for key, model in list_feedback_models(stage)):
            if not source or source.startswith("builtin:") or source in stage.source_stages:
                continue
            try:
                self._foreign[role] += int(setup.size_model(source, device.kind)[0])
            except AlignKitError:
                self._foreign[role] += setup.count_weights(config) * (2 if device.kind == "cuda" else 4)
                self.notes.append(f"{source} taken as large as the policy, as its config is not here")

    def predict(self, stage: Stage, micro: int) -> setup.Prediction:
        kind, foreign = self._device.kind, self._foreign
        return setup.predict_memory(stage, self._config, micro=micro, device=kind, foreign=foreign, **self._row)

    def largest(self, stage: Stage) -> int | None:
        """The largest micro batch up to 256 that fits, by halves, the largest first; None where not one row does."""
        trains = isinstance(stage.options, TrainOptions)
        share = stage.training.batch_size // num_devices(stage) if trains else 256
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if share % size == 0]
        low, high, middle = -1, len(sizes), len(sizes) - 1  # fits, does not
        while high - low > 1:
            fits = self.predict(stage, sizes[middle]).needs <= self._device.bytes
            low, high = (middle, high) if fits else (low, middle)
            middle = (low + high) // 2
        return None if low < 0 else sizes[low]

    def advise(self) -> str:
        """Say the cheapest change that makes the stage fit, with the keys to write: one where one is enough."""
        changes, trains = list(self._list_changes()), isinstance(self._stage.options, TrainOptions)
        key = f"{self._stage.name}.{'micro_batch_size' if trains else 'batch_size'}"
        for chosen in ([], *([each] for each in changes), *(changes[:count] for count in range(2, len(changes) + 1))):
            stage = self._stage
            for _, change in chosen:
                stage = change(stage)
            if micro := self.largest(stage):
                keys = ", ".join([*(said for said, _ in chosen), f"{key}: {micro}"])
                return f"does not fit; it does with {keys} ({self.predict(stage, micro).needs / _GIB:.1f} GiB)"
        return "does not fit, whatever is recomputed, quantised or shared: take shorter rows or a smaller model"

    def _list_changes(self) -> Iterator[tuple[str, Callable[[Stage], Stage]]]:
        stage, trains = self._stage, isinstance(self._stage.options, TrainOptions)
        fields = {"gradient_checkpointing": trains and not recomputes(stage)}
        fields["precompute_ref_log_probs"] = stage.method == "dpo" and stage.lora is None
        for name in (name for name, helps in fields.items() if helps and not stage.trainer.get(name)):
            yield f"{stage.name}.{name}: true", partial(_change, trainer={name: True})
        if stage.lora is None and stage.model.init != "scratch":
            yield "lora: {}", partial(_change, lora=LoraOptions())
        if stage.model.quantization == "none" and stage.model.init != "scratch":
            yield "model.quantization: nf4", partial(_change, model={"quantization": "nf4"})
        for number in (2, 4, 8, 16, 32, 64) if trains else ():
            if number > num_devices(stage) and stage.training.batch_size % number == 0:
                launch = {"processes": min(number, 8), "nodes": -(-number // 8), "strategy": "fsdp"}
                said = ", ".join(f"launch.{key}: {value}" for key, value in launch.items() if value != 1)
                yield said, partial(_change, launch=launch)


def _read_rows(stage: Stage, notes: list[str]) -> tuple[int, int, int, int] | None:
    """Count rows, tokens of the longest sequence and of all, and sequences of the largest row; None where the rows are
    not here, or in large files."""
    if not isinstance(stage.options, TrainOptions):
        return None
    _, located = locate_rows(stage)
    size = sum(path.stat().st_size for place in located for path in place.files)
    if not located or any(place.origin == "hub" for place in located) or size > _READ_BYTES:
        return None
    try:
        chat = load_chat(stage, learnt=learn_vocabulary(stage))
        with tempfile.TemporaryDirectory(prefix="alignkit-plan-") as directory:
            tables = prepare_tables(stage, chat, Path(directory), rejects=Rejects())
    except (EnvironmentProblem, ModelError) as error:  # no tokenizer beside the config, for one
        notes.append(f"rows not read: {str(error).splitlines()[0]}")
        return None
    lengths, limit = tables.lengths, longest_sequence(stage)
    longest = lengths.longest_tokens
    if isinstance(stage.options, PpoOptions):
        longest += stage.options.max_new_tokens
    elif limit:
        packs = stage.trainer.get("packing") or stage.objective == "lm"
        longest = limit if packs else min(longest, limit)
    return len(tables.train), longest, lengths.num_tokens, setup.group_size(stage, tables.train)


def _count_work(stage: Stage, rows: tuple[int, ...] | None, tokens: int) -> tuple[int | None, int | None]:
    """Count optimizer steps and the tokens they read: of the rows where they are known, else at most."""
    options, steps = stage.training, int(stage.trainer.get("max_steps") or -1)
    epochs = float(stage.trainer.get("num_train_epochs") or 1)
    if isinstance(options, PpoOptions):
        answers, passes = options.batch_size * options.minibatches, options.ppo_epochs * options.minibatches
        episodes = options.total_episodes or (round(epochs * rows[0] * options.answers_per_prompt) if rows else 0)
        rollouts = -(-steps // passes) if steps > 0 and not options.total_episodes else -(-episodes // answers)
        return rollouts * passes or None, rollouts * answers * tokens or None
    if rows is not None:
        steps = steps if steps > 0 else max(1, round(-(-rows[0] // options.batch_size) * epochs))
        return steps, round(steps * options.batch_size * rows[2] / rows[0])
    return (steps, steps * options.batch_size * tokens * setup.group_size(stage)) if steps > 0 else (None, None)


def _probe(stage: Stage) -> float:
    """Train a few steps here, and give tokens a second over the last of them."""
    quiet = {"max_steps": _PROBED, "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
    short = _change(start_today(stage)[0], trainer={**quiet, "report_to": "none"}, options={"eval": None})
    marks: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="alignkit-probe-") as directory:
        run = RunDir(Path(directory, "run"))
        run.checkpoints.mkdir(parents=True)
        trainer = importlib.import_module(f"alignkit.train.{stage.method}").build(short, run).trainer

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                marks.append((time.perf_counter(), float(trainer._total_train_tokens)))

        trainer.add_callback(Clock())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    (began, before), (ended, after) = marks[_WARM_UP - 1], marks[-1]
    return (after - before) / (ended - began)
