"""Options that contradict each other, as far as the recipe shows it: conflicts.tsv, and here what a row cannot say."""

import json
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from alignkit.console import redact
from alignkit.errors import Problem, suggest
from alignkit.recipe.check import show_key
from alignkit.recipe.methods import FEEDBACK
from alignkit.recipe.schema import BUILTIN_CONSTITUTIONS, REWARD_KINDS, VERIFY_KEYS
from alignkit.recipe.sections import Finding, Section, UnreadableError
from alignkit.recipe.words import (
    ADAPTER_TYPES,
    KTO_LOSSES,
    OWN_LOSSES,
    TABLES,
    adapter_fields,
    read_snapshot,
    trl_fields,
)
from alignkit.recipe.yaml import read_scalar

Rule = Callable[[Section], Iterable[Finding]]


def audit_stage(stage: Section) -> list[Problem]:
    """Hold the options of one stage against each other."""
    rules = (find_conflicts, *(() if stage.method in FEEDBACK else _TRAIN_RULES), *_BY_METHOD.get(stage.method, ()))
    return _collect(stage, *(rule(stage) for rule in rules))


def audit_recipe(top: Section, stages: Collection[Section]) -> list[Problem]:
    """Hold the sections that all stages share against each other: model, lora, launch, evaluate."""
    given = {} if "evaluate" in top.broken else top.get("evaluate") or {}
    evaluate = ((f"evaluate.{key}", what) for key, what in evaluation_problems(given))
    return _collect(top, find_conflicts(top), _adapters(top), _scratch(top, stages), _launch(top), evaluate)


def _collect(section: Section, *rules: Iterable[Finding]) -> list[Problem]:
    """Collect what each rule finds before it meets a value that is wrong in itself."""
    found: list[Finding] = []
    for findings in rules:
        with suppress(UnreadableError):
            found.extend(findings)
    return [Problem(f"{show_key(section.say(key))} {what}", section.place(key)) for key, what in found]


def _checkpointing(stage: Section) -> Iterator[Finding]:
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        yield from _check_arguments(key, stage.get(key) or {}, dict.fromkeys(_ARGUMENTS["checkpointing"]), "torch")


def _dpo(stage: Section) -> Iterator[Finding]:
    kto = _find_loss(stage, KTO_LOSSES)
    for key in stage.node.value if kto else ():
        if key in trl_fields("dpo") and key not in trl_fields("kto"):
            yield key, f"has no effect with loss_type: {kto}"


def _adapters(recipe: Section) -> Iterator[Finding]:
    if not recipe.has("lora"):
        return
    lora = recipe.get("lora") or {}
    kind = lora.get("adapter_type", "lora")
    of_lora = {"init_lora_weights", "lora_plus_ratio"} if kind in ("lora", "dora") else set()
    known = {*adapter_fields(kind), "adapter_type"} | of_lora
    for key in lora:
        if key not in known:
            others = [name for name in ADAPTER_TYPES if key in adapter_fields(name)] or ["lora", "dora"]
            yield f"lora.{key}", f"has no effect with adapter_type: {kind}; {' and '.join(others)} read it"


def _scratch(recipe: Section, stages: Collection[Section]) -> Iterator[Finding]:
    if recipe.get("model.init") != "scratch":
        return
    starts = [stage.get("start_from") for stage in stages if stage.method not in FEEDBACK]
    tuned = [start for start in starts if start is not None]
    if len(tuned) == len(starts) and starts:
        yield "model.init", "is scratch, but every stage has start_from, so nothing starts from random weights"
    if not tuned and recipe.get("model.quantization", "none") != "none":
        yield "model.quantization", "has no effect: every stage trains random weights, which are not quantised"
    if not tuned and recipe.has("lora"):
        yield "lora", "has no effect: every stage starts from random weights, and trains all of them"


def _launch(recipe: Section) -> Iterator[Finding]:
    for option in recipe.get("launch.slurm.options") or {}:
        # Those that set variables, start programs or write files would let a recipe run code (--export=LD_PRELOAD=...).
        if option not in (known := TABLES["sbatch options"]):
            hint = suggest(option, known) or "; it may name what asks for resources, not what alignkit sets"
            yield f"launch.slurm.options.{option}", f"is not an sbatch option that a recipe may set{hint}"


class Optimizer(NamedTuple):
    """What `optim_args` may name, the package it needs (name to import, name to install), whether it needs targets."""

    arguments: Sequence[str] = ()
    package: tuple[str, str] | None = None
    targets: bool = False


# Optimizers by the beginning of their names, and the kinds of arguments. transformers hands `block_size` of torchao's
# and all of rmsprop_bnb's on as texts, which they cannot use.
_ARGUMENTS: dict[str, Any] = json.loads(Path(__file__).with_name("optimizers.json").read_text("utf-8"))


def find_optimizer(name: str) -> Optimizer:
    """Look an optimizer of transformers up; the longest beginning of its name counts."""
    known = _ARGUMENTS["optimizers"]
    return Optimizer(**known[max((kind for kind in known if name.startswith(kind)), key=len, default="")])


def _optimizer(stage: Section) -> Iterator[Finding]:
    name = stage.get("optim", "adamw_torch_fused")
    optimizer = find_optimizer(name)
    if optimizer.targets and not stage.has("optim_target_modules"):
        yield "optim_target_modules", f"is missing, and optim: {name} needs it; write all-linear, or names of modules"
    elif stage.has("optim_target_modules") and not optimizer.targets:
        yield "optim_target_modules", f"has no effect with optim: {name}; galore and apollo optimizers read it"
    given: dict[str, Any] = {}
    for part in filter(None, (stage.get("optim_args") or "").replace(" ", "").split(",")):
        key, _, value = part.partition("=")
        if not value:
            yield "optim_args", f"holds {part}; write name=value, with commas between"
            return
        read = read_scalar(value)
        given[key] = value.lower() if isinstance(read, bool | None) else read
    yield from _check_arguments("optim_args", given, dict.fromkeys(optimizer.arguments), f"optim: {name}")


def _schedule(stage: Section) -> Iterator[Finding]:
    name, given = stage.get("lr_scheduler_type", "linear"), stage.get("lr_scheduler_kwargs") or {}
    accepted = read_snapshot()["schedulers"][name]
    yield from _check_arguments("lr_scheduler_kwargs", given, accepted, f"lr_scheduler_type: {name}")
    if "min_lr_rate" in accepted and ("min_lr" in given) == ("min_lr_rate" in given):
        what = f"has {'both' if 'min_lr' in given else 'neither'} of min_lr and min_lr_rate; lr_scheduler_type: {name}"
        yield "lr_scheduler_kwargs", f"{what} needs one, such as {{min_lr_rate: 0.1}}"


def _check_arguments(key: str, given: Mapping[str, Any], accepted: Mapping[str, Any], of: str) -> Iterator[Finding]:
    for name in given.keys() - accepted.keys():
        there = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
        yield key, f"names {name}, which {of} does not know; {there}{suggest(name, accepted)}"
    for name in [name for name, default in accepted.items() if default == "required" and name not in given]:
        yield key, f"lacks {name}, which {of} needs, such as {{{name}: 100}}"
    for name in given.keys() & accepted.keys():
        value, words, whole = given[name], _ARGUMENTS["words"].get(name), name in _ARGUMENTS["whole numbers"]
        shown = str(value).lower() if isinstance(value, bool) else value
        if words is not None:
            if shown not in words:
                yield key, f"has {name} {shown}; it must be {' or '.join(words)}"
        elif isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            yield key, f"has {name} {shown}; it must be a {'whole ' if whole else ''}number"


def judge_problems(key: str, source: Any, *, is_judge: bool) -> Iterator[Finding]:
    """Yield what is wrong with a judge or generator; only a judge of a label stage may be a replay."""
    given: Mapping[str, Any] = {"model": source} if isinstance(source, str) else source
    kinds = [kind for kind in ("model", "url", "replay") if given.get(kind) is not None]
    if len(kinds) != 1 or (kinds[0] == "replay" and not is_judge):
        named = "model, url and replay" if is_judge else "model and url"
        yield key, f"needs exactly one of {named}, and has {' and '.join(kinds) or 'none'}"
        return
    (kind,) = kinds
    for name in TABLES["keys of a judge behind a server"] if kind != "url" else ():
        if given.get(name) is not None:
            yield f"{key}.{name}", f"has no effect with {kind}; it is for a server (url)"
    if kind != "model" and given.get("engine") is not None:
        yield f"{key}.engine", f"has no effect with {kind}; it says what runs a model on this machine"
    if kind != "url":
        return
    url, advice = given["url"], ""
    try:
        if urlsplit(url).port == 0 or not re.fullmatch(r"https?://[^/\\\s?#@]+(/[^\s?#]*)?", url):
            raise ValueError(url)
        if url.rstrip("/").endswith(("/chat/completions", "/completions")):
            advice = "give the address that ends in /v1: what comes after it is added (api)"
    except ValueError:  # of urlsplit: a port above 65535
        advice = "write http://HOST:PORT/v1 or https://HOST/v1, without a question mark or a key"
    if advice:
        yield f"{key}.url", f"is {redact(url)}; {advice}"
    if given.get("name") is None:
        yield key, "has a url without name; say which of the server's models is meant"
    if given.get("max_cost") is not None and given.get("price") is None:
        yield f"{key}.max_cost", "needs price: {input, output}, per million tokens"


def _feedback(stage: Section) -> Iterator[Finding]:
    for key in ("judge", "generator", "teacher"):
        if stage.has(key):
            yield from judge_problems(key, stage.get(key), is_judge=key == "judge")
    yield from _unknown_constitutions(stage.get("constitution"))


def _unknown_constitutions(given: Any) -> Iterator[Finding]:
    known = BUILTIN_CONSTITUTIONS
    for item in [given] if isinstance(given, str) else given or ():
        if item.startswith("builtin:") and item not in known:
            yield "constitution", f"is {item}; it must be a file, {', '.join(known)}{suggest(item, known)}"


def evaluation_problems(given: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with the judge of `evaluate:`, or of the command line's options."""
    judge, constitution = given.get("judge"), given.get("constitution")
    if given.get("num_beams", 1) != 1 and "overlap" not in (given.get("metrics") or ["overlap"]):
        yield "num_beams", "has no effect without the metric overlap, which alone searches with beams"
    if given.get("num_beams", 1) != 1 and (given.get("generation") or {}).get("engine") == "continuous":
        yield "num_beams", "cannot be searched by generation.engine: continuous; use transformers"
    if given.get("temperature", 1) == 0:
        for key in ("samples", "top_p", "top_k"):
            if key in given:
                yield key, "has no effect with temperature 0, which takes the likeliest token each time"
    if judge is None:
        if constitution is not None:
            yield "constitution", "has no effect without a judge: name a language model"
        return
    yield from judge_problems("judge", judge, is_judge=False)
    yield from _unknown_constitutions(constitution)
    named = judge if isinstance(judge, str) else judge.get("model")
    if constitution is None and named is None:
        yield "judge", "is behind a url and judges by principles; add constitution: builtin:helpfulness, or a file"
    if constitution is not None and named is not None and re.fullmatch(r"builtin:.*|[\w.]+:\w+", named):
        yield "constitution", f"has no effect on {named}, a reward, which goes by no principles; take it out"


def _rewards(stage: Section) -> Iterator[Finding]:
    for key in ("reward", "gold"):
        for reward in list_rewards(stage, key):
            function, kinds = reward.get("function"), [kind for kind in REWARD_KINDS if reward.get(kind) is not None]
            named = [f"{kind} {reward[kind]}" for kind in kinds if kind != "judge"]
            shown = " and ".join(named + ["a judge"] * ("judge" in kinds)) or "none"
            if len(kinds) != 1:
                accepted = f"{', '.join(REWARD_KINDS[:-1])} and {REWARD_KINDS[-1]}"
                yield key, f"needs exactly one of {accepted} for each part, and has {shown}"
            if reward.get("judge") is not None:
                yield from judge_problems(f"{key}.judge", reward["judge"], is_judge=False)
                if reward.get("constitution") is None:
                    yield key, "has a judge without a constitution; add constitution: builtin:harmlessness or a file"
            elif reward.get("constitution") is not None:
                yield key, "has a constitution, which only a judge goes by; take it out, or give a judge"
            for name in VERIFY_KEYS if reward.get("verify") is None else ():
                if reward.get(name) is not None:
                    yield f"{key}.{name}", "has no effect without verify"
            if function is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", function):
                yield key, f"names the function {function!r}; write pkg.module:name"
            if reward.get("weight", 1) == 0:
                yield key, f"gives {shown} the weight 0, which has no effect; take it out, or make it gold"


def _groups(stage: Section) -> Iterator[Finding]:
    size, rollout = stage.get("num_generations"), stage.get("batch_size", 16) * stage.get("minibatches", 1)
    if stage.get("advantage") in ("rloo", "grpo") and rollout % (size or 4):
        key = "num_generations" if size is not None else "batch_size"
        what = f"is {stage.get(key, 16)}: a rollout of {rollout} answers does not divide into groups of {size or 4}"
        yield key, f"{what}; make batch_size x minibatches a multiple of num_generations"


_TRAIN_RULES: tuple[Rule, ...] = (_checkpointing, _optimizer, _schedule)
_BY_METHOD: dict[str, tuple[Rule, ...]] = {
    "sft": (_feedback,), "dpo": (_dpo,), "ppo": (_rewards, _groups), "critique": (_feedback,),
    "label": (_feedback, _rewards),
}  # fmt: skip
# f-DPO's reparameterisation leaves a term that cancels only in the chosen-rejected difference (TRL dpo_trainer.py).
_F_DIVERGENCE = TABLES["losses with an f-divergence"]


class Conflict(NamedTuple):
    """`when` finds what is against given keys; `what` says it: {} is that, {value} the key's, {size} its length."""

    methods: str  # "train" stands for all that train, "recipe" is the top level
    keys: str  # +KEY is one that is missing
    when: Callable[[Section], Any]
    what: str
    if_on: bool = False  # only a value that switches something on is refused; false, 0 and no are fine


_CONDITION = re.compile(r"(!?)(\??)([\w.]+)(?::([\w-]+))?(?:(!=|<=|>=|==|<|>|=|~|%|\^|@)(.*))?")
_COMPARED = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "%": operator.mod,
}  # fmt: skip


def _when(text: str) -> Callable[[Section], bool]:
    """Read the conditions of conflicts.tsv, all of which must hold.
    `key` (switched on), `?key` (given), `key=a|b` (- is not given), `key!=a`, `key~a|b` (a list that has one of them),
    `key<1` and `key<other` as numbers (% is what is left), `key^REGEX` (it begins so), `key@other` (the command line or
    a file above did not switch it off by the other); `key:1` takes 1 where it is not given, ! in front turns one round,
    and `top.key` is of the top level."""
    parts = [found.groups() for part in text.split() if (found := _CONDITION.fullmatch(part))]

    def holds(stage: Section, turned: str, given: str, key: str, default: str, sign: str, other: str) -> bool:
        value = _value_of(stage, key, default)
        if sign in _COMPARED:
            right, _, unsaid = other.partition(":")
            number = float(other) if re.fullmatch(r"-?[\d.]+", other) else _value_of(stage, right, unsaid or None)
            found = bool(_COMPARED[sign](value, number))
        elif sign == "^":
            found = value is not None and re.match(other, str(value)) is not None
        elif sign == "@":
            found = not stage.is_switched_off(key, by=other)
        elif sign == "~":
            found = bool({*(value if isinstance(value, list) else [value])} & {*other.split("|")})
        elif sign:
            found = (_say(value) in other.split("|")) != (sign == "!=")
        else:
            found = value is not None if given else bool(value)
        return found != bool(turned)

    return lambda stage: all(holds(stage, *part) for part in parts)


def _value_of(stage: Section, key: str, default: str | None) -> Any:
    """A value as given, else the default of the table: a number or a word."""
    section, _, below = key.partition("top.")
    place = stage if section or not below else stage.top
    return place and place.get(below or key, read_scalar(default) if default is not None else None)


def _say(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_say, value))
    word = "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return word.lower() if isinstance(value, bool) else word


def find_conflicts(stage: Section) -> Iterator[Finding]:
    """Yield the keys of a stage, or of the top level, that a row of the table is against, and those that it misses."""
    kinds = {"recipe"} if stage.top is None else {stage.method} | ({"train"} if stage.method not in FEEDBACK else set())
    for row in CONFLICTS:
        given, missing = list[str](), list[str]()
        if kinds & {*row.methods.split()}:  # what a preset says in vain is no mistake
            there = stage.node.value.keys() - (stage.preset if row.what.startswith("has no effect") else ())
            given = [key for key in row.keys.split() if key.split(".")[0] in there]
            missing = [key[1:] for key in row.keys.split() if key[0] == "+"]
        try:
            values = {key: stage.get(key) for key in given if key.split(".")[0] not in stage.broken}
            values = {key: value for key, value in values.items() if value is not None}
            values |= {key: None for key in missing if not stage.has(key)}
            found = row.when(stage) if values else None
        except UnreadableError:
            continue
        for key, value in values.items() if found else ():
            if not (row.if_on and value in (False, 0, "no")):
                shown = str(value).lower() if isinstance(value, bool) else value
                size = len(value) if isinstance(value, list) else 1
                # {key} is the value of another, {key:1} takes 1 where that is not given
                named = r"\{(?!value|size)([\w.]+)(?::([\w-]+))?\}"
                what = re.sub(named, lambda other: _say(_value_of(stage, other[1], other[2])), row.what)
                yield key, what.format(found, value=shown, size=size)


def losses_of(stage: Section) -> list[str]:
    """The losses of a dpo stage."""
    given = stage.get("loss_type") or ["sigmoid"]
    return [given] if isinstance(given, str) else given


def _find_loss(stage: Section, among: Collection[str]) -> str | None:
    return next((loss for loss in losses_of(stage) if loss in among), None)


def _own_loss(stage: Section) -> str | None:
    return _find_loss(stage, OWN_LOSSES)


def _starts_from_no_adapter(stage: Section) -> bool:
    path = str(_value_of(stage, "top.model.path", None))
    # model.path may be an adapter itself: one on disk, or on the hub, which only the stage can tell.
    return not stage.has("start_from") and "/" not in path and not Path(path, "adapter_config.json").is_file()


def _has_separator(stage: Section) -> bool:
    given = [stage.get(key) for key in ("data", "eval") if stage.get("objective") == "seq2seq"]
    sources = [source for each in given for source in (each if isinstance(each, list) else [each])]
    return any(isinstance(source, dict) and "separator" in source for source in sources)


def _has_no_weights(stage: Section) -> bool:
    """Whether a critic is to start from a reward that is not one model."""
    models = [str(reward.get("model") or "builtin:") for reward in list_rewards(stage, "reward")]
    has_critic = stage.get("advantage", "gae") == "gae" and stage.get("value_init") == "reward"
    return has_critic and (len(models) != 1 or models[0].startswith("builtin:"))


def list_rewards(stage: Section, key: str) -> list[dict[str, Any]]:
    """List the rewards under `reward:` or `gold:` as mappings, in whatever shape they are given."""
    value = stage.get(key)
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [{"model": item} if isinstance(item, str) else item for item in items]


_, *_ROWS = (line.split("\t") for line in Path(__file__).with_name("conflicts.tsv").read_text("utf-8").splitlines())
CONFLICTS = (
    *(Conflict(methods, keys, _when(when), what, bool(if_on)) for methods, keys, when, what, if_on in _ROWS),
    # all that train
    Conflict("train", "adapter", _starts_from_no_adapter,
             "has no effect without start_from; it says what happens to the adapter a stage starts from"),
    Conflict("train", "adapter",
             lambda stage: stage.get("adapter") == "stack" and _value_of(stage, "top.lora", None) is None
             and not _starts_from_no_adapter(stage), "is stack, which puts a new adapter on top; add a lora: section"),
    # sft
    Conflict("sft", "data eval", _has_separator,
             "has a separator, which nothing reads with objective: seq2seq; take it out"),
    # dpo
    Conflict("dpo", "loss_type", lambda stage: len(losses_of(stage)) > 1 and _find_loss(stage, KTO_LOSSES),
             "mixes {} with others; it is computed on single answers and must stand alone"),
    Conflict("dpo", "loss_type", lambda stage: len({*losses_of(stage)} - {"sft"}) > 1 and _own_loss(stage),
             "mixes {} with others; only sft may stand beside it"),
    Conflict("dpo", "loss_weights",
             lambda stage: len(stage.get("loss_weights")) != len(losses_of(stage)) and len(losses_of(stage)),
             "has {size} weights for {} losses in loss_type"),
    Conflict("dpo", "f_divergence_type",
             lambda stage: stage.get("f_divergence_type") != "reverse_kl"
             and ", ".join(sorted({*losses_of(stage)} - {*_F_DIVERGENCE, *KTO_LOSSES})),
             "is {value}, which {} cannot use; use reverse_kl"),
    Conflict("dpo", "ld_alpha f_divergence_type use_weighting router_aux_loss_coef", _own_loss,
             "has no effect with loss_type: {}"),
    Conflict("dpo", "loss_weights", lambda stage: len(losses_of(stage)) == 1 and _own_loss(stage),
             "has no effect with loss_type: {}"),
    Conflict("dpo", "precompute_ref_log_probs precompute_ref_batch_size",
             lambda stage: (own := _own_loss(stage)) and not OWN_LOSSES[own].has_reference and own,
             "has no effect with loss_type: {}, which has no reference"),
    *(
        Conflict("dpo", " ".join(own.keys), lambda stage, loss=loss: loss not in losses_of(stage),  # type: ignore[misc]
                 f"has no effect without loss_type: {loss}")
        for loss, own in OWN_LOSSES.items()
    ),
    # ppo
    Conflict("ppo", "reward_timeout",
             lambda stage: not any(
                 part.get("function") for key in ("reward", "gold") for part in list_rewards(stage, key)),
             "has no effect without a reward function"),
    Conflict("ppo", "value_init", _has_no_weights,
             "is reward, but the reward is not one model; use value_init: policy"),
    # label
    Conflict("label", "reward", lambda stage: any(part.get("judge") for part in list_rewards(stage, "reward")),
             "has a judge, which compares answers itself; name it as judge:"),
    Conflict("label", "clamp", lambda stage: stage.get("clamp")[0] >= stage.get("clamp")[1],
             "is {value}; it must be [low, high], such as [0.4, 0.6]"),
)  # fmt: skip
