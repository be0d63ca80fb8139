"""Keys that have no effect beside other values, as one table; a recipe that sets one is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.recipe.schema import FEEDBACK
from alignkit.recipe.sections import Finding, Section, UnreadableError
from alignkit.recipe.trl_fields import KTO_LOSSES, OWN_LOSSES


class Idle(NamedTuple):
    """`when` finds what takes the effect of the keys away, and `why` says it, with what was found in place of {}."""

    methods: str  # "train" stands for all that train
    keys: str
    when: Callable[[Section], Any]
    why: str
    if_on: bool = False  # only a value that switches something on is refused; false, 0 and no are fine


def find_idle_keys(stage: Section) -> Iterator[Finding]:
    """Yield the keys of a stage that have no effect, and why."""
    kinds = {stage.method} if stage.method in FEEDBACK else {stage.method, "train"}
    for row in IDLE:
        given = [key for key in row.keys.split() if key.split(".")[0] in stage.node.value]
        if not given or not kinds & {*row.methods.split()}:
            continue
        try:
            found = row.when(stage)
        except UnreadableError:
            continue
        for key in given if found else ():
            try:
                value = stage.get(key)
            except UnreadableError:
                continue
            if value is not None and not (row.if_on and value in (False, 0, "no")):
                yield key, f"has no effect {row.why.format(found)}"


def losses_of(stage: Section) -> list[str]:
    """The losses of a dpo stage."""
    given = stage.get("loss_type") or ["sigmoid"]
    return [given] if isinstance(given, str) else given


def _own_loss(stage: Section) -> str | None:
    return next((loss for loss in losses_of(stage) if loss in OWN_LOSSES), None)


def _epochs_are_moot(stage: Section) -> bool:
    return stage.get("max_steps", -1) > 0 and not stage.is_switched_off("num_train_epochs", by="max_steps")


def starts_from_no_adapter(stage: Section) -> bool:
    """Whether a stage cannot start from an adapter."""
    path = str(stage.top.get("model.path", "")) if stage.top else ""
    # model.path may be an adapter itself: one on disk, or on the hub, which only the stage can tell.
    return not stage.has("start_from") and "/" not in path and not Path(path, "adapter_config.json").is_file()


def _counts_otherwise(kind: str) -> Callable[[Section], Any]:
    """The strategy of logging, saving or evaluation, where it counts no steps."""

    def find(stage: Section) -> Any:
        strategy = stage.get(f"{kind}_strategy", "steps")
        return strategy if strategy in ("no", "epoch") and (kind != "eval" or stage.has("eval")) else None

    return find


def _no_critic(stage: Section) -> str | None:
    kind: str = stage.get("advantage", "gae")
    return None if kind == "gae" else kind


def _grouped(stage: Section) -> str | None:
    kind: str = stage.get("advantage", "gae")
    return kind if kind in ("rloo", "grpo") else None


def _lone_answers(stage: Section) -> str | None:
    return None if _grouped(stage) else stage.get("advantage", "gae")


def _has_no_function(stage: Section) -> bool:
    return not any(part.get("function") for key in ("reward", "gold") for part in list_rewards(stage, key))


def list_rewards(stage: Section, key: str) -> list[dict[str, Any]]:
    """List the rewards under `reward:` or `gold:` as mappings, in whatever shape they are given."""
    value = stage.get(key)
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [{"model": item} if isinstance(item, str) else item for item in items]


IDLE = (
    # all that train
    Idle("train",
         "eval_strategy eval_steps eval_on_start eval_delay per_device_eval_batch_size eval_accumulation_steps "
         "eval_packing", lambda stage: not stage.has("eval"),
         "without `eval:`; add eval: 0.05 (a share of the data) or a source", if_on=True),
    Idle("train", "num_train_epochs", _epochs_are_moot, "with max_steps; take one of them out, or set max_steps: -1"),
    Idle("train", "logging_steps", _counts_otherwise("logging"), "with logging_strategy: {}"),
    Idle("train", "save_steps", _counts_otherwise("save"), "with save_strategy: {}"),
    Idle("train", "eval_steps", _counts_otherwise("eval"), "with eval_strategy: {}"),
    Idle("train", "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
         lambda stage: stage.get("gradient_checkpointing") is False and not stage.get("activation_checkpointing"),
         "with gradient_checkpointing: false"),
    Idle("train", "dataloader_prefetch_factor dataloader_persistent_workers",
         lambda stage: not stage.get("dataloader_num_workers"), "without dataloader_num_workers", if_on=True),
    Idle("dpo", "label_smoothing_factor", lambda stage: True,
         "on the loss of dpo; use loss_type: cdpo with label_smoothing", if_on=True),
    Idle("rm", "label_smoothing_factor", lambda stage: True, "on the loss of rm; soft labels are a column", if_on=True),
    Idle("train", "adapter", starts_from_no_adapter,
         "without start_from; it says what happens to the adapter a stage starts from"),
    # sft
    Idle("sft", "completion_only_loss assistant_only_loss", lambda stage: stage.get("objective") == "lm",
         "with objective: lm, which trains on every token; use objective: chat", if_on=True),
    Idle("sft", "packing packing_strategy eval_packing padding_free", lambda stage: stage.get("objective") == "lm",
         "with objective: lm, which packs its text already"),
    Idle("sft", "packing_strategy",
         lambda stage: stage.get("objective") != "lm" and not stage.get("packing") and not stage.get("eval_packing"),
         "without packing: true"),
    Idle("sft", "batching", lambda stage: stage.get("packing") and stage.get("objective") != "lm",
         "with packing: true, which fills every block to the same length"),
    # rm
    Idle("rm", "normalize_data normalize_rows", lambda stage: stage.get("normalize", "none") == "none",
         "without normalize: bias or gain_and_bias"),
    # dpo
    Idle("dpo", "desirable_weight undesirable_weight", lambda stage: not {*losses_of(stage)} & {*KTO_LOSSES},
         "without loss_type: kto"),
    Idle("dpo", "discopop_tau", lambda stage: "discopop" not in losses_of(stage), "without loss_type: discopop"),
    Idle("dpo", "ld_alpha f_divergence_type use_weighting loss_weights router_aux_loss_coef", _own_loss,
         "with loss_type: {}"),
    Idle("dpo", "precompute_ref_log_probs precompute_ref_batch_size",
         lambda stage: (own := _own_loss(stage)) and not OWN_LOSSES[own].has_reference and own,
         "with loss_type: {}, which has no reference"),
    *(
        Idle("dpo", " ".join(own.keys), lambda stage, loss=loss: loss not in losses_of(stage),  # type: ignore[misc]
             f"without loss_type: {loss}")
        for loss, own in OWN_LOSSES.items()
    ),
    Idle("dpo", "f_alpha_divergence_coef", lambda stage: stage.get("f_divergence_type") != "alpha_divergence",
         "without f_divergence_type: alpha_divergence"),
    Idle("dpo", "precompute_ref_batch_size", lambda stage: not stage.get("precompute_ref_log_probs"),
         "without precompute_ref_log_probs: true"),
    # ppo
    Idle("ppo", "reward_timeout", _has_no_function, "without a reward function"),
    Idle("ppo", "reward_normalize_rows", lambda stage: stage.get("reward_normalize", "none") == "none",
         "without reward_normalize: bias or gain_and_bias"),
    Idle("ppo", "kl_horizon", lambda stage: not stage.has("kl_target"),
         "without kl_target, which makes kl_coef adaptive"),
    Idle("ppo", "gamma lam cliprange_value vf_coef value_init critic_learning_rate", _no_critic,
         "with advantage: {}, which has no critic; use advantage: gae"),
    Idle("ppo", "whiten_rewards", _no_critic, "with advantage: {}, which compares whole answers; use gae", if_on=True),
    Idle("ppo", "whiten_advantages", _grouped, "with advantage: {}, which has a baseline and scale of its own",
         if_on=True),
    Idle("ppo", "num_generations", _lone_answers, "with advantage: {}, which takes one answer per prompt"),
    Idle("ppo", "cliprange cliprange_value",
         lambda stage: stage.get("ppo_epochs", 4) * stage.get("minibatches", 1) == 1,
         "with one step per rollout: nothing has moved yet; raise ppo_epochs or minibatches"),
    Idle("ppo", "num_train_epochs", lambda stage: stage.has("total_episodes"),
         "with total_episodes; take one of them out"),
    Idle("ppo", "max_steps", lambda stage: stage.has("total_episodes") and stage.get("max_steps", -1) > 0,
         "with total_episodes; take one of them out"),
    Idle("ppo", "batching", lambda stage: True, "in ppo: a rollout draws its prompts at random, and pads once"),
    Idle("ppo", "generation.mode generation.url generation.gpu_memory_utilization",
         lambda stage: stage.get("generation.engine") != "vllm", "without engine: vllm"),
    Idle("ppo", "generation.batch_size", lambda stage: stage.get("generation.engine") == "vllm",
         "with engine: vllm, which batches by itself"),
    Idle("ppo", "generation.url",
         lambda stage: stage.get("generation.engine") == "vllm" and stage.get("generation.mode") != "server",
         "with mode: colocate; use mode: server"),
    Idle("ppo", "generation.gpu_memory_utilization",
         lambda stage: stage.get("generation.engine") == "vllm" and stage.get("generation.mode") == "server",
         "with mode: server; give it to `trl vllm-serve`"),
    # critique and label
    Idle("critique",
         "rounds critiques examples constitution data helpful start_from generator temperature max_new_tokens "
         "batch_size", lambda stage: stage.has("replay"),
         "with replay, which takes published critiques and revisions; nothing is sampled"),
    Idle("label", "generator max_new_tokens", lambda stage: stage.get("answers") == "given",
         "with answers: given, which samples none"),
    Idle("label", "judge constitution orders cot cot_tokens examples check", lambda stage: stage.has("reward"),
         "with reward:, which compares by itself; take one of them out"),
    Idle("label", "cot_tokens", lambda stage: not stage.get("cot"), "without cot: true"),
    Idle("label", "clamp", lambda stage: stage.get("hard"), "with hard: true, which rounds labels to 0 or 1"),
    Idle("label", "orders cot examples", lambda stage: stage.has("judge.replay"),
         "with judge.replay: the labels are made already"),
)  # fmt: skip
