"""What optimizers and learning-rate schedules take, and which packages they need: what Trainer finds out in train().

The schedules' parameters are in the snapshot of transformers, from its signatures; what an optimizer reads of
`optim_args`, and from which package it comes, is transformers' trainer_optimizer.py (5.23).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit.recipe.fields import read_snapshot
from alignkit.recipe.nearest import suggest

if TYPE_CHECKING:
    from alignkit.recipe.audit import Finding, Section


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


def optimizer_problems(stage: Section, recipe: Section) -> Iterator[Finding]:
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


def schedule_problems(stage: Section, recipe: Section) -> Iterator[Finding]:
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


def checkpointing_problems(stage: Section, recipe: Section) -> Iterator[Finding]:
    """Yield what torch's checkpoint function does not take."""
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        for name in stage.get(key) or {}:
            if name not in _CHECKPOINTING:
                yield key, f"names {name}; torch takes {', '.join(_CHECKPOINTING)}{suggest(str(name), _CHECKPOINTING)}"


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
