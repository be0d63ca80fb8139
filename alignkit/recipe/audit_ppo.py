"""The rules between the options of a ppo stage: what contradicts, and what would have no effect.

A part of `audit`, which runs these; only what the recipe itself shows is judged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from alignkit.recipe.audit_feedback import judge_problems

if TYPE_CHECKING:
    from alignkit.recipe.audit import Finding, Section

_CRITIC = ("gamma", "lam", "cliprange_value", "vf_coef", "value_init", "critic_learning_rate")
_FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def list_rewards(stage: Section, key: str) -> list[dict[str, Any]]:
    """Return the rewards under `reward:` or `gold:` as mappings, in whatever shape they are given."""
    value = stage.get(key)
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [{"model": item} if isinstance(item, str) else item for item in items]


def _rewards(stage: Section, recipe: Section) -> Iterator[Finding]:
    for key in ("reward", "gold"):
        for reward in list_rewards(stage, key):
            function = reward.get("function")
            if sum(reward.get(name) is not None for name in ("model", "function", "judge")) != 1:
                yield key, f"needs exactly one of model, function and judge for each part, and has {_describe(reward)}"
            if reward.get("judge") is not None:
                yield from judge_problems(f"{key}.judge", reward["judge"], is_judge=False)
                if reward.get("constitution") is None:
                    yield key, "has a judge without a constitution; add constitution: builtin:harmlessness or a file"
            elif reward.get("constitution") is not None:
                yield key, "has a constitution, which only a judge goes by; take it out, or give a judge"
            if function is not None and not re.fullmatch(_FUNCTION, function):
                yield key, f"names the function {function!r}; write pkg.module:name"
            if reward.get("weight", 1) == 0:
                yield key, f"gives {_describe(reward)} the weight 0, which has no effect; take it out, or make it gold"


def _describe(reward: dict[str, Any]) -> str:
    given = [f"{key} {reward[key]}" for key in ("model", "function") if reward.get(key) is not None]
    given += ["a judge"] if reward.get("judge") is not None else []
    return " and ".join(given) or "none"


def _functions(stage: Section, recipe: Section) -> Iterator[Finding]:
    given = [*list_rewards(stage, "reward"), *list_rewards(stage, "gold")]
    if stage.has("reward_timeout") and not any(reward.get("function") for reward in given):
        yield "reward_timeout", "has no effect without a reward function"


def _normalisation(stage: Section, recipe: Section) -> Iterator[Finding]:
    if stage.has("reward_normalize_rows") and stage.get("reward_normalize", "none") == "none":
        yield "reward_normalize_rows", "has no effect without reward_normalize: bias or gain_and_bias"


def _kl(stage: Section, recipe: Section) -> Iterator[Finding]:
    target, most = stage.get("kl_target"), stage.get("max_kl")
    if target is None and stage.has("kl_horizon"):
        yield "kl_horizon", "has no effect without kl_target, which makes kl_coef adaptive"
    if target is not None and stage.get("kl_coef", 0.05) == 0:
        yield "kl_coef", "is 0, which kl_target cannot change, for it multiplies; start above 0 (typical: 0.05)"
    if target is not None and most is not None and most <= target:
        yield "max_kl", f"is {most:g}, so the run would stop before it reaches kl_target {target:g}; raise it"


def _critic(stage: Section, recipe: Section) -> Iterator[Finding]:
    kind = stage.get("advantage", "gae")
    if kind != "gae":
        for key in _CRITIC:
            if stage.has(key):
                yield key, f"has no effect with advantage: {kind}, which has no critic; use advantage: gae"
        if stage.get("whiten_rewards"):
            yield "whiten_rewards", f"has no effect with advantage: {kind}, which compares whole answers; use gae"
        return
    rewards = list_rewards(stage, "reward")
    # value_init: reward needs one model whose weights a critic can start from.
    models = [reward for reward in rewards if reward.get("model") and not reward["model"].startswith("builtin:")]
    if stage.get("value_init") == "reward" and (len(rewards) != 1 or not models):
        yield "value_init", "is reward, but the reward is not one model; use value_init: policy"


def _groups(stage: Section, recipe: Section) -> Iterator[Finding]:
    kind, size = stage.get("advantage", "gae"), stage.get("num_generations")
    if kind not in ("rloo", "grpo"):
        if size is not None:
            yield "num_generations", f"has no effect with advantage: {kind}, which takes one answer per prompt"
        return
    rollout = stage.get("batch_size", 16) * stage.get("minibatches", 1)
    if rollout % (size or 4):
        key = "num_generations" if size is not None else "batch_size"
        what = f"is {stage.get(key, 16)}: a rollout of {rollout} answers does not divide into groups of {size or 4}"
        yield key, f"{what}; make batch_size x minibatches a multiple of num_generations"


def _clipping(stage: Section, recipe: Section) -> Iterator[Finding]:
    if stage.get("ppo_epochs", 4) * stage.get("minibatches", 1) > 1:
        return
    for key in ("cliprange", "cliprange_value"):
        if stage.has(key):
            yield key, "has no effect with one step per rollout: nothing has moved yet; raise ppo_epochs or minibatches"


def _lengths(stage: Section, recipe: Section) -> Iterator[Finding]:
    most, least = stage.get("max_new_tokens", 64), stage.get("min_new_tokens")
    missing, truncate = stage.get("missing_eos"), stage.get("truncate")
    if least is not None and least > most:
        yield "min_new_tokens", f"is {least}, more than max_new_tokens ({most})"
    if missing is not None and sum(missing.get(key) is not None for key in ("penalty", "score")) != 1:
        yield "missing_eos", "needs exactly one of penalty (subtracted) and score (instead)"
    if missing is not None and truncate is None and least == most:
        yield "missing_eos", "would hit every answer: with min_new_tokens = max_new_tokens none can end"
    if truncate is not None and truncate.get("after", 16) >= most:
        after = truncate.get("after", 16)
        yield "truncate", f"has no effect: after is {after}, and an answer has at most {most} tokens (max_new_tokens)"


def _duration(stage: Section, recipe: Section) -> Iterator[Finding]:
    if not stage.has("total_episodes"):
        return
    if stage.get("max_steps", -1) > 0:
        yield "max_steps", "has no effect with total_episodes; take one of them out"
    if stage.has("num_train_epochs"):
        yield "num_train_epochs", "has no effect with total_episodes; take one of them out"


def _generation(stage: Section, recipe: Section) -> Iterator[Finding]:
    given = stage.get("generation") or {}
    engine, mode, url = given.get("engine", "transformers"), given.get("mode", "colocate"), given.get("url")
    if engine != "vllm":
        for key in ("mode", "url", "gpu_memory_utilization"):
            if given.get(key) is not None:
                yield f"generation.{key}", "has no effect without engine: vllm"
        return
    if given.get("batch_size") is not None:
        yield "generation.batch_size", "has no effect with engine: vllm, which batches by itself"
    if mode == "server" and url is None:
        yield "generation", "has mode: server without url; start `trl vllm-serve` and give its address"
    if mode == "colocate" and url is not None:
        yield "generation.url", "has no effect with mode: colocate; use mode: server"
    if mode == "server" and given.get("gpu_memory_utilization") is not None:
        yield "generation.gpu_memory_utilization", "has no effect with mode: server; give it to `trl vllm-serve`"
    if url is not None and not re.match(r"https?://[^/]", url):
        yield "generation.url", f"is {url!r}; it must start with http:// or https://"


def _stream(stage: Section, recipe: Section) -> Iterator[Finding]:
    """A run is one stream of rollouts: no epochs to count by, no batches to group."""
    if stage.has("batching"):
        yield "batching", "has no effect: a rollout draws its prompts at random, and pads once"
    for key in ("save_strategy", "logging_strategy"):
        if stage.get(key) == "epoch":
            yield key, "is epoch; PPO counts in steps, of which a rollout takes ppo_epochs x minibatches"
    kind = stage.get("advantage", "gae")
    if kind in ("rloo", "grpo") and stage.get("whiten_advantages"):
        yield "whiten_advantages", f"has no effect with advantage: {kind}, which has a baseline and scale of its own"


PPO_RULES: list[Callable[[Section, Section], Iterator[Finding]]] = [
    _rewards, _functions, _normalisation, _kl, _critic, _groups, _clipping, _lengths, _duration, _generation, _stream,
]  # fmt: skip
