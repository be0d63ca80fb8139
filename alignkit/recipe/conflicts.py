"""Keys that contradict others or have no effect beside them: conflicts.tsv, and here what needs more than one key."""

import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.recipe.schema import FEEDBACK
from alignkit.recipe.sections import Finding, Section, UnreadableError
from alignkit.recipe.trl_fields import KTO_LOSSES, OWN_LOSSES
from alignkit.recipe.yaml import read_scalar

# f-DPO's reparameterisation leaves a term that cancels only in the chosen-rejected difference (TRL dpo_trainer.py).
_F_DIVERGENCE = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft",
)  # fmt: skip


class Conflict(NamedTuple):
    """`when` finds what is against given keys; `what` says it: {} is that, {value} the key's, {size} its length."""

    methods: str  # "train" stands for all that train, "recipe" is the top level
    keys: str  # +KEY is one that is missing
    when: Callable[[Section], Any]
    what: str
    if_on: bool = False  # only a value that switches something on is refused; false, 0 and no are fine


def _idle(methods: str, keys: str, when: Callable[[Section], Any], why: str, if_on: bool = False) -> Conflict:
    return Conflict(methods, keys, when, f"has no effect {why}", if_on)


_CONDITION = re.compile(r"(!?)(\??)([\w.]+)(?::([\w-]+))?(?:(!=|<=|>=|==|<|>|=|~|%)(.*))?")
_COMPARED = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "%": operator.mod,
}  # fmt: skip


def _when(text: str) -> Callable[[Section], bool]:
    """Read the conditions of conflicts.tsv, all of which must hold.

    `key` (switched on), `?key` (given), `key=a|b` (- is not given), `key!=a`, `key~a|b` (a list that has one of them),
    `key<1` and `key<other` as numbers (% is what is left); `key:1` takes 1 where it is not given, ! in front turns one
    round, and `top.key` is of the top level.
    """
    parts = [found.groups() for part in text.split() if (found := _CONDITION.fullmatch(part))]

    def holds(stage: Section, turned: str, given: str, key: str, default: str, sign: str, other: str) -> bool:
        value = _read(stage, key, default)
        if sign in _COMPARED:
            right = _CONDITION.fullmatch(other)
            assert right is not None
            number = float(other) if re.fullmatch(r"-?[\d.]+", other) else _read(stage, right[3], right[4])
            found = bool(_COMPARED[sign](value, number))
        elif sign == "~":
            found = bool({*(value if isinstance(value, list) else [value])} & {*other.split("|")})
        elif sign:
            found = (_say(value) in other.split("|")) != (sign == "!=")
        else:
            found = value is not None if given else bool(value)
        return found != bool(turned)

    return lambda stage: all(holds(stage, *part) for part in parts)


def _read(stage: Section, key: str, default: str | None) -> Any:
    """A value as given, else the default of the table: a number or a word."""
    section, _, below = key.partition("top.")
    place = stage if section or not below else stage.top
    return place and place.get(below or key, read_scalar(default) if default is not None else None)


def _say(value: Any) -> str:
    word = "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return word.lower() if isinstance(value, bool) else word


def _fill(what: str, stage: Section) -> str:
    """Put values into a message of the table: {key}, or {key:1} where 1 is what it is when not given."""
    return re.sub(r"\{(?!value|size)([\w.]+)(?::([\w-]+))?\}", lambda f: _say(_read(stage, f[1], f[2])), what)


def _read_table() -> Iterator[Conflict]:
    """Read the rows whose conditions are on single keys."""
    _, *lines = (Path(__file__).parent / "conflicts.tsv").read_text(encoding="utf-8").splitlines()
    for line in lines:
        methods, keys, when, what, if_on = line.split("\t")
        yield Conflict(methods, keys, _when(when), what, bool(if_on))


def find_conflicts(stage: Section) -> Iterator[Finding]:
    """Yield the keys of a stage, or of the top level, that a row of the table is against, and those that it misses.

    A value that is wrong has its own message.
    """
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
                yield key, _fill(row.what, stage).format(found, value=shown, size=size)


def losses_of(stage: Section) -> list[str]:
    """The losses of a dpo stage."""
    given = stage.get("loss_type") or ["sigmoid"]
    return [given] if isinstance(given, str) else given


def find_kto(stage: Section) -> str | None:
    return next((loss for loss in losses_of(stage) if loss in KTO_LOSSES), None)


def _own_loss(stage: Section) -> str | None:
    return next((loss for loss in losses_of(stage) if loss in OWN_LOSSES), None)


def _read_top(stage: Section, key: str) -> Any:
    return None if stage.top is None else stage.top.get(key)


def _starts_from_no_adapter(stage: Section) -> bool:
    path = str(_read_top(stage, "model.path"))
    # model.path may be an adapter itself: one on disk, or on the hub, which only the stage can tell.
    return not stage.has("start_from") and "/" not in path and not Path(path, "adapter_config.json").is_file()


def _has_separator(stage: Section) -> bool:
    given = [stage.get(key) for key in ("data", "eval") if stage.get("objective") == "seq2seq"]
    sources = [source for each in given for source in (each if isinstance(each, list) else [each])]
    return any(isinstance(source, dict) and "separator" in source for source in sources)


def _no_critic(stage: Section) -> str | None:
    kind: str = stage.get("advantage", "gae")
    return None if kind == "gae" else kind


def _has_no_weights(stage: Section) -> bool:
    """Whether a critic is to start from a reward that is not one model."""
    rewards = list_rewards(stage, "reward")
    models = [reward for reward in rewards if reward.get("model") and not reward["model"].startswith("builtin:")]
    return stage.get("value_init") == "reward" and not _no_critic(stage) and (len(rewards) != 1 or not models)


def list_rewards(stage: Section, key: str) -> list[dict[str, Any]]:
    """List the rewards under `reward:` or `gold:` as mappings, in whatever shape they are given."""
    value = stage.get(key)
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [{"model": item} if isinstance(item, str) else item for item in items]


CONFLICTS = (
    *_read_table(),
    # all that train
    _idle("train", "num_train_epochs",
          lambda stage: stage.get("max_steps", -1) > 0
          and not stage.is_switched_off("num_train_epochs", by="max_steps"),
          "with max_steps; take one of them out, or set max_steps: -1"),
    _idle("train", "adapter", _starts_from_no_adapter,
          "without start_from; it says what happens to the adapter a stage starts from"),
    Conflict("train", "gradient_checkpointing",
             lambda stage: (wanted := _read_top(stage, "launch.activation_checkpointing")) is not None
             and wanted != stage.get("gradient_checkpointing") and str(wanted).lower(),
             "is {value}, but launch.activation_checkpointing is {}; keep one"),
    Conflict("train", "adapter",
             lambda stage: stage.get("adapter") == "stack" and _read_top(stage, "lora") is None
             and not _starts_from_no_adapter(stage), "is stack, which puts a new adapter on top; add a lora: section"),
    # sft
    Conflict("sft", "data eval", _has_separator,
             "has a separator, which nothing reads with objective: seq2seq; take it out"),
    Conflict("sft", "eval", lambda stage: stage.get("streaming") and isinstance(stage.get("eval"), float),
             "is a share, which streaming cannot hold out; name a source of held-out rows"),
    # dpo
    Conflict("dpo", "loss_type", lambda stage: len(losses_of(stage)) > 1 and find_kto(stage),
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
    _idle("dpo", "ld_alpha f_divergence_type use_weighting router_aux_loss_coef", _own_loss, "with loss_type: {}"),
    _idle("dpo", "loss_weights", lambda stage: len(losses_of(stage)) == 1 and _own_loss(stage), "with loss_type: {}"),
    _idle("dpo", "precompute_ref_log_probs precompute_ref_batch_size",
          lambda stage: (own := _own_loss(stage)) and not OWN_LOSSES[own].has_reference and own,
          "with loss_type: {}, which has no reference"),
    *(
        _idle("dpo", " ".join(own.keys), lambda stage, loss=loss: loss not in losses_of(stage),  # type: ignore[misc]
             f"without loss_type: {loss}")
        for loss, own in OWN_LOSSES.items()
    ),
    # ppo
    _idle("ppo", "reward_timeout",
          lambda stage: not any(
              part.get("function") for part in (*list_rewards(stage, "reward"), *list_rewards(stage, "gold"))),
          "without a reward function"),
    Conflict("ppo", "value_init", _has_no_weights,
             "is reward, but the reward is not one model; use value_init: policy"),
    Conflict("ppo", "generation.url",
             lambda stage: stage.get("generation.engine") == "vllm"
             and not re.match(r"https?://[^/]", stage.get("generation.url") or "http://x"),
             "is {value!r}; it must start with http:// or https://"),
    # critique and label
    Conflict("label", "reward", lambda stage: any(part.get("judge") for part in list_rewards(stage, "reward")),
             "has a judge, which compares answers itself; name it as judge:"),
    Conflict("label", "clamp", lambda stage: stage.get("clamp")[0] >= stage.get("clamp")[1],
             "is {value}; it must be [low, high], such as [0.4, 0.6]"),
)  # fmt: skip
