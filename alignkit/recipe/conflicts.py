"""Keys that contradict others or have no effect beside them: conflicts.tsv, and here what needs more than one key."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.recipe.schema import FEEDBACK, TASKS
from alignkit.recipe.sections import Finding, Section, UnreadableError
from alignkit.recipe.trl_fields import KTO_LOSSES, OWN_LOSSES

# f-DPO's reparameterisation leaves a term that cancels only in the chosen-rejected difference (TRL dpo_trainer.py).
_F_DIVERGENCE = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft",
)  # fmt: skip


class Conflict(NamedTuple):
    """`when` finds what is against given keys; `what` says it: {} is that, {value} the key's, {size} its length."""

    methods: str  # "train" stands for all that train
    keys: str
    when: Callable[[Section], Any]
    what: str
    if_on: bool = False  # only a value that switches something on is refused; false, 0 and no are fine


def _idle(methods: str, keys: str, when: Callable[[Section], Any], why: str, if_on: bool = False) -> Conflict:
    return Conflict(methods, keys, when, f"has no effect {why}", if_on)


def _when(text: str) -> Callable[[Section], bool]:
    """Read the conditions of conflicts.tsv, all of which must hold.

    `key` (switched on), `?key` (given), `key=a|b` (- is not given), `key!=a`; ! in front turns one round.
    """
    parts = [re.fullmatch(r"(!?)(\??)([\w.]+)(?:(!?)=(.*))?", part) for part in text.split()]

    def holds(stage: Section, turned: str, given: str, key: str, unequal: str | None, words: str | None) -> bool:
        value = stage.get(key)
        if words is None:
            return (value is not None if given else bool(value)) != bool(turned)
        word = "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()
        return (word in words.split("|")) != bool(unequal)

    return lambda stage: all(holds(stage, *part.groups()) for part in parts if part)


def _read_table() -> Iterator[Conflict]:
    """Read the rows whose conditions are on single keys."""
    _, *lines = (Path(__file__).parent / "conflicts.tsv").read_text(encoding="utf-8").splitlines()
    for line in lines:
        methods, keys, when, what, if_on = line.split("\t")
        yield Conflict(methods, keys, _when(when), what, bool(if_on))


def find_conflicts(stage: Section) -> Iterator[Finding]:
    """Yield the keys of a stage that a row of the table is against; a value that is wrong has its own message."""
    kinds = {stage.method} if stage.method in FEEDBACK else {stage.method, "train"}
    for row in CONFLICTS:
        given = []
        if kinds & {*row.methods.split()}:  # what a preset says in vain is no mistake
            there = stage.node.value.keys() - (stage.preset if row.what.startswith("has no effect") else ())
            given = [key for key in row.keys.split() if key.split(".")[0] in there]
        try:
            values = {key: stage.get(key) for key in given if key.split(".")[0] not in stage.broken}
            values = {key: value for key, value in values.items() if value is not None}
            found = row.when(stage) if values else None
        except UnreadableError:
            continue
        for key, value in values.items() if found else ():
            if not (row.if_on and value in (False, 0, "no")):
                shown = str(value).lower() if isinstance(value, bool) else value
                size = len(value) if isinstance(value, list) else 1
                yield key, row.what.format(found, value=shown, size=size)


def losses_of(stage: Section) -> list[str]:
    """The losses of a dpo stage."""
    given = stage.get("loss_type") or ["sigmoid"]
    return [given] if isinstance(given, str) else given


def find_kto(stage: Section) -> str | None:
    return next((loss for loss in losses_of(stage) if loss in KTO_LOSSES), None)


def _own_loss(stage: Section) -> str | None:
    return next((loss for loss in losses_of(stage) if loss in OWN_LOSSES), None)


def _task(stage: Section) -> str | None:
    """The objective of a stage that learns labels."""
    return next((name for name in TASKS if name == stage.get("objective")), None)


def _read_top(stage: Section, key: str) -> Any:
    return None if stage.top is None else stage.top.get(key)


def _starts_from_no_adapter(stage: Section) -> bool:
    path = str(_read_top(stage, "model.path"))
    # model.path may be an adapter itself: one on disk, or on the hub, which only the stage can tell.
    return not stage.has("start_from") and "/" not in path and not Path(path, "adapter_config.json").is_file()


def _counts_otherwise(kind: str) -> Callable[[Section], Any]:
    """The strategy of logging, saving or evaluation, where it counts no steps."""

    def find(stage: Section) -> Any:
        strategy = stage.get(f"{kind}_strategy", "steps")
        return strategy if strategy in ("no", "epoch") and (kind != "eval" or stage.has("eval")) else None

    return find


def _is_bounded(stage: Section) -> bool:
    return stage.get("max_length", 1024) is not None


def _has_separator(stage: Section) -> bool:
    given = [stage.get(key) for key in ("data", "eval") if stage.get("objective") == "seq2seq"]
    sources = [source for each in given for source in (each if isinstance(each, list) else [each])]
    return any(isinstance(source, dict) and "separator" in source for source in sources)


def _most_tokens(stage: Section) -> int:
    most: int = stage.get("max_new_tokens", 64)
    return most


def _no_critic(stage: Section) -> str | None:
    kind: str = stage.get("advantage", "gae")
    return None if kind == "gae" else kind


def _grouped(stage: Section) -> str | None:
    kind: str = stage.get("advantage", "gae")
    return kind if kind in ("rloo", "grpo") else None


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
    _idle("train", "logging_steps", _counts_otherwise("logging"), "with logging_strategy: {}"),
    _idle("train", "save_steps", _counts_otherwise("save"), "with save_strategy: {}"),
    _idle("train", "eval_steps", _counts_otherwise("eval"), "with eval_strategy: {}"),
    _idle("train", "adapter", _starts_from_no_adapter,
          "without start_from; it says what happens to the adapter a stage starts from"),
    Conflict("train", "micro_batch_size",
             lambda stage: stage.get("micro_batch_size") != "auto"
             and stage.get("batch_size", 16) % stage.get("micro_batch_size") and stage.get("batch_size", 16),
             "is {value}, which does not divide batch_size {}"),
    *(
        Conflict("train", key, lambda stage, key=key: stage.get(key) >= 1 and stage.get(key) != int(stage.get(key)),  # type: ignore[misc]
                 "is {value}; it must be a whole number of steps, or a share of all steps below 1")
        for key in ("logging_steps", "save_steps", "eval_steps", "warmup_steps")
    ),
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
    _idle("sft", "lm_coef labels", lambda stage: not _task(stage),
          f"without an objective that learns labels: {', '.join(TASKS)}"),
    _idle("sft", "chat completion_only_loss assistant_only_loss packing packing_strategy eval_packing padding_free "
          "streaming loss_type label_smoothing_factor router_aux_loss_coef", _task,
          "with objective: {}, which reads texts and labels", if_on=True),
    Conflict("sft", "packing",
             lambda stage: stage.get("objective") != "lm" and stage.get("packing") and not _is_bounded(stage),
             "needs max_length, the size of a block"),
    Conflict("sft", "padding_free",
             lambda stage: stage.get("objective") != "lm" and stage.get("padding_free") and not stage.get("packing")
             and _is_bounded(stage), "does not enforce max_length; use packing: true, or set max_length: null"),
    Conflict("sft", "streaming", lambda stage: stage.get("streaming") and stage.get("max_steps", -1) <= 0,
             "needs max_steps: the number of rows is not known"),
    Conflict("sft", "eval", lambda stage: stage.get("streaming") and isinstance(stage.get("eval"), float),
             "is a share, which streaming cannot hold out; name a source of held-out rows"),
    # rm
    # dpo
    Conflict("dpo", "loss_type", lambda stage: len(losses_of(stage)) > 1 and find_kto(stage),
             "mixes {} with others; it is computed on single answers and must stand alone"),
    Conflict("dpo", "loss_type", lambda stage: len(losses_of(stage)) > 1 and _own_loss(stage),
             "mixes {} with others; it must stand alone"),
    Conflict("dpo", "loss_weights",
             lambda stage: len(stage.get("loss_weights")) != len(losses_of(stage)) and len(losses_of(stage)),
             "has {size} weights for {} losses in loss_type"),
    Conflict("dpo", "batching", lambda stage: find_kto(stage) and stage.get("batching") == "grouped",
             "is grouped; KTO pairs each prompt with its neighbour's answer, so rows are only shuffled"),
    Conflict("dpo", "use_weighting", lambda stage: {*losses_of(stage)} & {"aot", "aot_unpaired"},
             "does not work with aot and aot_unpaired, which sort the rows of a batch", if_on=True),
    Conflict("dpo", "f_divergence_type",
             lambda stage: stage.get("f_divergence_type") != "reverse_kl"
             and ", ".join(sorted({*losses_of(stage)} - {*_F_DIVERGENCE, *KTO_LOSSES})),
             "is {value}, which {} cannot use; use reverse_kl"),
    _idle("dpo", "desirable_weight undesirable_weight", lambda stage: not {*losses_of(stage)} & {*KTO_LOSSES},
          "without loss_type: kto"),
    _idle("dpo", "discopop_tau", lambda stage: "discopop" not in losses_of(stage), "without loss_type: discopop"),
    _idle("dpo", "ld_alpha f_divergence_type use_weighting loss_weights router_aux_loss_coef", _own_loss,
          "with loss_type: {}"),
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
    _idle("ppo", "gamma lam cliprange_value vf_coef value_init critic_learning_rate", _no_critic,
          "with advantage: {}, which has no critic; use advantage: gae"),
    _idle("ppo", "whiten_rewards", _no_critic, "with advantage: {}, which compares whole answers; use gae", if_on=True),
    _idle("ppo", "whiten_advantages", _grouped, "with advantage: {}, which has a baseline and scale of its own",
          if_on=True),
    _idle("ppo", "num_generations", lambda stage: not _grouped(stage) and stage.get("advantage", "gae"),
          "with advantage: {}, which takes one answer per prompt"),
    _idle("ppo", "dynamic_sampling", lambda stage: not _grouped(stage) and stage.get("advantage", "gae"),
          "with advantage: {}, which has no groups"),
    Conflict("ppo", "importance",
             lambda stage: stage.get("importance") == "sequence" and not _no_critic(stage),
             "is sequence, one ratio for a whole answer, and advantage: gae has one advantage per token; use grpo, "
             "rloo or reinforce"),
    Conflict("ppo", "overlong", lambda stage: not stage.has("overlong.buffer") and not stage.get("overlong.filter"),
             "needs buffer (a lower reward near max_new_tokens) or filter: true"),
    _idle("ppo", "cliprange cliprange_high cliprange_value",
          lambda stage: stage.get("ppo_epochs", 4) * stage.get("minibatches", 1) == 1,
          "with one step per rollout: nothing has moved yet; raise ppo_epochs or minibatches"),
    _idle("ppo", "max_steps", lambda stage: stage.has("total_episodes") and stage.get("max_steps", -1) > 0,
          "with total_episodes; take one of them out"),
    Conflict("ppo", "max_kl",
             lambda stage: stage.get("max_kl") <= (stage.get("kl_target") or 0) and stage.get("kl_target"),
             "is {value:g}, so the run would stop before it reaches kl_target {:g}; raise it"),
    Conflict("ppo", "value_init", _has_no_weights,
             "is reward, but the reward is not one model; use value_init: policy"),
    Conflict("ppo", "min_new_tokens",
             lambda stage: stage.get("min_new_tokens") > _most_tokens(stage) and _most_tokens(stage),
             "is {value}, more than max_new_tokens ({})"),
    Conflict("ppo", "missing_eos", lambda stage: stage.has("missing_eos.penalty") == stage.has("missing_eos.score"),
             "needs exactly one of penalty (subtracted) and score (instead)"),
    Conflict("ppo", "missing_eos",
             lambda stage: not stage.has("truncate") and stage.get("min_new_tokens") == _most_tokens(stage),
             "would hit every answer: with min_new_tokens = max_new_tokens none can end"),
    Conflict("ppo", "truncate",
             lambda stage: stage.get("truncate.after", 16) >= _most_tokens(stage)
             and f"{stage.get('truncate.after', 16)}, and an answer has at most {_most_tokens(stage)}",
             "has no effect: after is {} tokens (max_new_tokens)"),
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
