"""Options that contradict each other: an error, with the reason and the alternative.

Only what the recipe itself shows is judged: rows, model and devices have their own checks. A rule that reads a value
which is itself wrong is skipped: that value has its own message. Keys without effect are in `idle_keys`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from alignkit.errors import Problem
from alignkit.recipe.check import show_key
from alignkit.recipe.idle_keys import find_idle_keys, losses_of, starts_from_no_adapter
from alignkit.recipe.nearest import suggest
from alignkit.recipe.rules_feedback import CRITIQUE_RULES, LABEL_RULES, PPO_RULES, evaluation_problems
from alignkit.recipe.schema import FEEDBACK, SLURM_OPTIONS
from alignkit.recipe.sections import Finding, Section, UnreadableError
from alignkit.recipe.trl_fields import KTO_LOSSES, OWN_LOSSES, read_snapshot, trl_fields

_SMOOTHED = ("cdpo", "robust", "exo_pair", "aot", "aot_unpaired")
# f-DPO's reparameterisation leaves a term that cancels only in the chosen-rejected difference (TRL dpo_trainer.py).
_F_DIVERGENCE = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft",
)  # fmt: skip

Rule = Callable[[Section], Iterable[Finding]]


def audit_stage(stage: Section) -> list[Problem]:
    """Hold the options of one stage against each other."""
    rules = (find_idle_keys, *(() if stage.method in FEEDBACK else _TRAIN_RULES), *_BY_METHOD[stage.method])
    found = [finding for rule in rules for finding in _run(rule, stage)]
    return [Problem(f"{stage.say(key)} {what}", stage.place(key)) for key, what in found]


def audit_recipe(top: Section, stages: Collection[Section]) -> list[Problem]:
    """Hold the sections that all stages share against each other: model, lora, launch, evaluate."""
    found = []
    for rule in (_quantization, _scratch, _launch, _evaluate):
        found += _run(lambda top, rule=rule: rule(top, stages), top)  # type: ignore[misc]
    return [Problem(f"{show_key(key)} {what}", top.place(key)) for key, what in found]


def _run(rule: Rule, section: Section) -> list[Finding]:
    """Collect what a rule finds before it meets a value that is wrong in itself."""
    found: list[Finding] = []
    with suppress(UnreadableError):
        found.extend(rule(section))
    return found


# Rules for every method that trains


def _batch(stage: Section) -> Iterator[Finding]:
    batch, micro = stage.get("batch_size", 16), stage.get("micro_batch_size", "auto")
    if micro != "auto" and batch % micro:
        yield "micro_batch_size", f"is {micro}, which does not divide batch_size {batch}"


def _step_counts(stage: Section) -> Iterator[Finding]:
    for key in ("logging_steps", "save_steps", "eval_steps", "warmup_steps"):
        value = stage.get(key)
        if value is not None and value >= 1 and value != int(value):
            yield key, f"is {value}; it must be a whole number of steps, or a share of all steps below 1"
    if stage.get("max_steps") == 0:
        yield "max_steps", "is 0; it must be at least 1, or -1 to train num_train_epochs"


def _checkpointing(stage: Section) -> Iterator[Finding]:
    wanted = stage.top.get("launch.activation_checkpointing") if stage.top else None
    given = stage.get("gradient_checkpointing")
    if None not in (wanted, given) and wanted != given:
        what = f"is {str(given).lower()}, but launch.activation_checkpointing is {str(wanted).lower()}; keep one"
        yield "gradient_checkpointing", what
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        for name in stage.get(key) or {}:
            if name not in _CHECKPOINTING:
                yield key, f"names {name}; torch takes {', '.join(_CHECKPOINTING)}{suggest(str(name), _CHECKPOINTING)}"


def _adapter(stage: Section) -> Iterator[Finding]:
    lora = stage.top is not None and stage.top.has("lora")
    if stage.get("adapter") == "stack" and not lora and not starts_from_no_adapter(stage):
        yield "adapter", "is stack, which puts a new adapter on top; add a lora: section"


# sft, rm


def _sft_packing(stage: Section) -> Iterator[Finding]:
    packing, bounded = stage.get("packing"), stage.get("max_length", 1024) is not None
    if stage.get("objective", "chat") == "lm":
        return
    if packing and not bounded:
        yield "packing", "needs max_length, the size of a block"
    if stage.get("padding_free") and not packing and bounded:
        yield "padding_free", "does not enforce max_length; use packing: true, or set max_length: null"


def _sft_streaming(stage: Section) -> Iterator[Finding]:
    if not stage.get("streaming", False):
        return
    if stage.get("max_steps", -1) <= 0:
        yield "streaming", "needs max_steps: the number of rows is not known"
    if isinstance(stage.get("eval"), float):
        yield "eval", "is a share, which streaming cannot hold out; name a source of held-out rows"
    for key, off in (("dedupe", False), ("packing", False), ("batching", None), ("on_bad_row", "error")):
        if stage.get(key, off) != off:
            yield key, f"is {show_key(str(stage.get(key)).lower())}, which streaming cannot do; take one of the two out"


def _rm_loss(stage: Section) -> Iterator[Finding]:
    if stage.get("loss") == "best_of" and stage.get("grouping") == "pairs":
        yield "grouping", "is pairs, but loss: best_of compares all answers of a prompt; use grouping: kway"


# dpo


def _dpo_kto(stage: Section) -> Iterator[Finding]:
    losses = losses_of(stage)
    kto = next((loss for loss in losses if loss in KTO_LOSSES), None)
    if kto is None:
        return
    if len(losses) > 1:
        yield "loss_type", f"mixes {kto} with others; it is computed on single answers and must stand alone"
    if stage.get("batching") == "grouped":
        yield "batching", "is grouped; KTO pairs each prompt with its neighbour's answer, so rows are only shuffled"
    for key in stage.node.value:
        if key in trl_fields("dpo") and key not in trl_fields("kto"):
            yield key, f"has no effect with loss_type: {kto}"
    for key in ("micro_batch_size", "batch_size"):
        if stage.get(key) == 1:
            yield key, "is 1; KTO estimates its KL term across a batch and needs at least 2"
            return


def _dpo_smoothing(stage: Section) -> Iterator[Finding]:
    losses, smoothing = losses_of(stage), stage.get("label_smoothing", 0.0)
    if smoothing and not set(losses) & {*_SMOOTHED, *KTO_LOSSES}:
        instead = "; use loss_type: cdpo" if "sigmoid" in losses else f"; only {', '.join(_SMOOTHED)} read it"
        yield "label_smoothing", f"has no effect with loss_type {', '.join(losses)}{instead}"
    key = "label_smoothing" if stage.has("label_smoothing") else "loss_type"
    given = stage.get(key)
    for loss, fits, needed in (
        ("cdpo", 0 < smoothing < 0.5, "between 0 and 0.5: the share of flipped labels"),
        ("robust", smoothing < 0.5, "below 0.5"),
        ("exo_pair", smoothing != 0, "above 0 (typical: 0.001)"),
    ):
        if loss in losses and not fits:
            shown = ", ".join(given) if isinstance(given, list) else given
            yield key, f"is {shown}; {loss} needs label_smoothing {needed}"


def _dpo_losses(stage: Section) -> Iterator[Finding]:
    losses, weights = losses_of(stage), stage.get("loss_weights")
    if weights is not None and len(weights) != len(losses):
        yield "loss_weights", f"has {len(weights)} weights for {len(losses)} losses in loss_type"
    own = next((loss for loss in losses if loss in OWN_LOSSES), None)
    if own and len(losses) > 1:
        yield "loss_type", f"mixes {own} with others; it must stand alone"
    if stage.get("use_weighting") and set(losses) & {"aot", "aot_unpaired"}:
        yield "use_weighting", "does not work with aot and aot_unpaired, which sort the rows of a batch"
    divergence = stage.get("f_divergence_type", "reverse_kl")
    refused = sorted(set(losses) - {*_F_DIVERGENCE, *KTO_LOSSES})
    if divergence != "reverse_kl" and refused:
        yield "f_divergence_type", f"is {divergence}, which {', '.join(refused)} cannot use; use reverse_kl"


def _dpo_reference(stage: Section) -> Iterator[Finding]:
    if stage.get("padding_free"):
        yield "padding_free", "is accepted and then switched off by TRL's DPOTrainer; use batching: grouped"
    if stage.get("precompute_ref_log_probs") and stage.get("adapter") == "stack":
        yield "adapter", "is stack, which does not work with precompute_ref_log_probs; use continue or merge"


# The sections that all stages share


def _quantization(recipe: Section, stages: Collection[Section]) -> Iterator[Finding]:
    quantization, targets = recipe.get("model.quantization", "none"), recipe.get("lora.target_modules", [])
    if quantization != "none" and not recipe.has("lora"):
        yield "model.quantization", f"is {quantization}, and quantised weights cannot be trained; add a lora: section"
    switched_off = recipe.is_switched_off("model.double_quantization", by="model.quantization")
    if quantization not in ("nf4", "fp4") and recipe.has("model.double_quantization") and not switched_off:
        yield "model.double_quantization", "has no effect without quantization: nf4 or fp4"
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        yield "lora.target_modules", "names lm_head, whose adapter would never be trained; use all-linear"


def _scratch(recipe: Section, stages: Collection[Section]) -> Iterator[Finding]:
    model = recipe.get("model", {})
    builtin = str(model.get("path", "")).startswith("builtin:")
    if model.get("init", "pretrained") != "scratch":
        if model.get("config") and not builtin:
            yield "model.config", "has no effect without init: scratch; pretrained weights fix the shape"
        return
    starts = [stage.get("start_from") for stage in stages if stage.method not in FEEDBACK]
    tuned = [start for start in starts if start is not None]
    if len(tuned) == len(starts) and starts:
        yield "model.init", "is scratch, but every stage has start_from, so nothing starts from random weights"
    if not tuned and model.get("quantization", "none") != "none":
        yield "model.quantization", "has no effect: every stage trains random weights, which are not quantised"
    if not tuned and recipe.has("lora"):
        yield "lora", "has no effect: every stage starts from random weights, and trains all of them"


def _evaluate(recipe: Section, stages: Collection[Section]) -> Iterator[Finding]:
    for key, what in evaluation_problems(recipe.get("evaluate") or {}):
        yield f"evaluate.{key}", what


_OFFLOADS = {"ddp": (), "fsdp": ("all",), "zero2": ("optimizer",), "zero3": ("optimizer", "all")}


def _launch(recipe: Section, stages: Collection[Section]) -> Iterator[Finding]:
    launch = recipe.get("launch") or {}
    strategy, offload = launch.get("strategy", "ddp"), launch.get("offload", "none")
    if offload != "none" and offload not in _OFFLOADS.get(strategy, ()):
        able = [f"{name} ({' or '.join(words)})" for name, words in _OFFLOADS.items() if words]
        yield "launch.offload", f"is {offload}, which {strategy} does not do; {', '.join(able)} do"
    switched_off = recipe.is_switched_off("launch.main_address", by="launch.nodes")
    if launch.get("main_address") is not None and launch.get("nodes", 1) == 1 and not switched_off:
        yield "launch.main_address", "has no effect with one node; set launch.nodes"
    quantization = (recipe.get("model") or {}).get("quantization", "none")
    if quantization != "none" and strategy in ("fsdp", "zero3"):
        yield (
            "launch.strategy",
            f"is {strategy}, which cannot shard {quantization} weights; ddp holds the quantised base on every device, "
            "zero2 shards the rest",
        )
    ppo = [stage.name for stage in stages if stage.method == "ppo"]
    if strategy in ("zero2", "zero3") and ppo:
        yield (
            "launch.strategy",
            f"is {strategy}, which ppo ({ppo[0]}) does not run under; fsdp shards its models, and with ddp and lora: "
            "its four roles share one base on every device",
        )
    if launch.get("device") == "mps" and (launch.get("processes", 1) != 1 or launch.get("nodes", 1) != 1):
        yield "launch.device", "is mps, which runs one process; set launch.processes: 1"
    for option in (launch.get("slurm") or {}).get("options") or {}:
        if option not in SLURM_OPTIONS:
            hint = suggest(option, SLURM_OPTIONS) or "; it may name what asks for resources, not what alignkit sets"
            yield f"launch.slurm.options.{option}", f"is not an sbatch option that a recipe may set{hint}"


class Optimizer(NamedTuple):
    """What `optim_args` may name, the package it needs (name to import, name to install), whether it needs targets."""

    arguments: tuple[str, ...] = ()
    package: tuple[str, str] | None = None
    targets: bool = False


_LOW_RANK = ("rank", "update_proj_gap", "scale", "proj_type")
_KINDS = {  # by the beginning of the name; the longest that fits counts
    "adagrad": Optimizer(("lr_decay", "weight_decay", "eps")),
    "adalomo": Optimizer(package=("lomo_optim", "lomo-optim")),
    "adamw_anyprecision": Optimizer(
        ("use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype"),
        ("torchdistx", "torchdistx"),
    ),
    # block_size stays a text on its way to torchao, which cannot use it.
    "adamw_torch_4bit": Optimizer(("bf16_stochastic_round",), ("torchao", "torchao")),
    "adamw_torch_8bit": Optimizer(("bf16_stochastic_round",), ("torchao", "torchao")),
    "adamw_torch_npu": Optimizer(package=("torch_npu", "torch-npu")),
    "adamw_torch_xla": Optimizer(package=("torch_xla", "torch-xla")),
    "ademamix": Optimizer(("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")),
    "apollo": Optimizer((*_LOW_RANK, "proj", "scale_type"), ("apollo_torch", "apollo-torch"), targets=True),
    "galore": Optimizer(_LOW_RANK, ("galore_torch", "galore-torch"), targets=True),
    "grokadamw": Optimizer(
        ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"), ("grokadamw", "grokadamw")
    ),
    "lomo": Optimizer(package=("lomo_optim", "lomo-optim")),
    "paged_ademamix": Optimizer(("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")),
    "rmsprop": Optimizer(("momentum", "alpha", "eps", "weight_decay", "centered")),
    "rmsprop_bnb": Optimizer(),  # they would be handed on as texts, and bitsandbytes takes numbers
    "schedule_free": Optimizer(("weight_lr_power", "r"), ("schedulefree", "schedulefree")),
    "sgd": Optimizer(("momentum", "dampening", "weight_decay", "nesterov")),
    "stable_adamw": Optimizer(("max_lr", "decouple_lr", "kahan_sum"), ("optimi", "torch-optimi")),
}  # fmt: skip
_WORDS = {  # arguments that are no number
    "use_kahan_summation": ("true", "false"), "nesterov": ("true", "false"), "centered": ("true", "false"),
    "bf16_stochastic_round": ("true", "false"), "decouple_lr": ("true",), "kahan_sum": ("true",),
    "momentum_dtype": ("float32", "bfloat16", "float16"), "variance_dtype": ("float32", "bfloat16", "float16"),
    "compensation_buffer_dtype": ("float32", "bfloat16", "float16"), "proj": ("random", "svd"),
    "scale_type": ("channel", "tensor"), "proj_type": ("std", "reverse_std", "right", "left", "full"),
    "warmup_type": ("linear", "cosine", "1-sqrt"), "decay_type": ("linear", "cosine", "1-sqrt"),
    "mode": ("min", "max"), "threshold_mode": ("rel", "abs"),
}  # fmt: skip
_WHOLE = ("rank", "update_proj_gap", "t_alpha", "t_beta3", "num_decay_steps", "num_stable_steps", "patience",
          "cooldown", "timescale", "window", "warmup", "reset_start")  # fmt: skip
_CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")


def find_optimizer(name: str) -> Optimizer:
    """Look an optimizer of transformers up."""
    fitting = [kind for kind in _KINDS if name.startswith(kind)]
    return _KINDS[max(fitting, key=len)] if fitting else Optimizer()


def _optimizer(stage: Section) -> Iterator[Finding]:
    """Yield what is wrong with `optim_args` and `optim_target_modules`."""
    name = stage.get("optim", "adamw_torch_fused")
    optimizer = find_optimizer(name)
    if optimizer.targets and not stage.has("optim_target_modules"):
        yield "optim_target_modules", f"is missing, and optim: {name} needs it; write all-linear, or names of modules"
    elif stage.has("optim_target_modules") and not optimizer.targets:
        yield "optim_target_modules", f"has no effect with optim: {name}; galore and apollo optimizers read it"
    given: dict[str, Any] = {}
    for part in (stage.get("optim_args") or "").replace(" ", "").split(","):
        key, equals, value = part.partition("=")
        if part and (not equals or not value):
            yield "optim_args", f"holds {part}; write name=value, with commas between"
            return
        given |= {key: _read(value)} if part else {}
    accepted = dict.fromkeys(optimizer.arguments)
    yield from _check_arguments("optim_args", given, accepted, f"optim: {name}")


def _schedule(stage: Section) -> Iterator[Finding]:
    """Yield what is wrong with `lr_scheduler_kwargs`, and with a schedule that has not what it goes by."""
    name, given = stage.get("lr_scheduler_type", "linear"), stage.get("lr_scheduler_kwargs") or {}
    accepted = read_snapshot()["schedulers"][name]
    yield from _check_arguments("lr_scheduler_kwargs", given, accepted, f"lr_scheduler_type: {name}")
    rates = [key for key in ("min_lr", "min_lr_rate") if key in given]
    if "min_lr_rate" in accepted and len(rates) != 1:
        found = "both" if rates else "neither"
        what = f"has {found} of min_lr and min_lr_rate; lr_scheduler_type: {name} needs one"
        yield "lr_scheduler_kwargs", f"{what}, such as {{min_lr_rate: 0.1}}"
    if name in ("reduce_lr_on_plateau", "greedy"):
        if stage.method == "ppo":
            yield "lr_scheduler_type", f"is {name}, which goes by an evaluation's loss, and ppo has none"
        elif not stage.has("eval") or stage.get("eval_strategy", "steps") == "no":
            yield "lr_scheduler_type", f"is {name}, which goes by an evaluation's loss; add eval: 0.05, or a source"


def _check_arguments(key: str, given: Mapping[str, Any], accepted: Mapping[str, Any], of: str) -> Iterator[Finding]:
    for name in given.keys() - accepted.keys():
        there = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
        yield key, f"names {name}, which {of} does not know; {there}{suggest(name, accepted)}"
    for name in [name for name, default in accepted.items() if default == "required" and name not in given]:
        yield key, f"lacks {name}, which {of} needs, such as {{{name}: 100}}"
    for name in given.keys() & accepted.keys():
        value, words = given[name], _WORDS.get(name)
        shown = str(value).lower() if isinstance(value, bool) else value
        if words is not None:
            if shown not in words:
                yield key, f"has {name} {shown}; it must be {' or '.join(words)}"
        elif isinstance(value, bool) or not isinstance(value, int if name in _WHOLE else int | float):
            yield key, f"has {name} {shown}; it must be a {'whole ' if name in _WHOLE else ''}number"


def _read(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.lower()


_TRAIN_RULES: tuple[Rule, ...] = (_batch, _step_counts, _checkpointing, _adapter, _optimizer, _schedule)
_BY_METHOD: dict[str, tuple[Rule, ...]] = {
    "sft": (_sft_packing, _sft_streaming),
    "rm": (_rm_loss,),
    "dpo": (_dpo_kto, _dpo_smoothing, _dpo_losses, _dpo_reference),
    "ppo": PPO_RULES,
    "critique": CRITIQUE_RULES,
    "label": LABEL_RULES,
}
