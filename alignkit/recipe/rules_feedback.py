"""Rules between the options of ppo, critique and label stages, and of whatever scores, judges or generates.

Only what the recipe itself shows is judged. Whether a server answers, a key is set or a file is there is found out in
preflight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from alignkit.console import redact
from alignkit.recipe.nearest import suggest
from alignkit.recipe.schema import BUILTIN_CONSTITUTIONS, REWARD_KINDS
from alignkit.recipe.sections import Finding, Section

_KINDS = ("model", "url", "replay")
_SERVER = (
    "name", "api", "logprobs", "api_key_env", "concurrency", "requests_per_minute", "timeout", "retries",
    "max_tokens_total", "max_cost", "price",
)  # fmt: skip


def judge_problems(key: str, source: Any, *, is_judge: bool) -> Iterator[Finding]:
    """Yield what is wrong with a judge or generator; only a judge of a label stage may be a replay."""
    given: Mapping[str, Any] = {"model": source} if isinstance(source, str) else source
    kinds = [kind for kind in _KINDS if given.get(kind) is not None]
    accepted = _KINDS if is_judge else _KINDS[:2]
    if len(kinds) != 1 or kinds[0] not in accepted:
        found = " and ".join(kinds) or "none"
        named = " and ".join(accepted) if len(accepted) == 2 else "model, url and replay"
        yield key, f"needs exactly one of {named}, and has {found}"
        return
    (kind,) = kinds
    for name in _SERVER if kind != "url" else ():
        if given.get(name) is not None:
            yield f"{key}.{name}", f"has no effect with {kind}; it is for a server (url)"
    if kind != "model" and given.get("engine") is not None:
        yield f"{key}.engine", f"has no effect with {kind}; it says what runs a model on this machine"
    if kind == "url":
        yield from _server_problems(key, given)


def _server_problems(key: str, given: Mapping[str, Any]) -> Iterator[Finding]:
    url, variable = given["url"], given.get("api_key_env")
    shown = redact(url)
    if not _is_address(url):
        advice = "write http://HOST:PORT/v1 or https://HOST/v1, without a question mark or a key"
        yield f"{key}.url", f"is {shown}; {advice}"
    elif url.rstrip("/").endswith(("/chat/completions", "/completions")):
        yield f"{key}.url", f"is {shown}; give the address that ends in /v1: what comes after it is added (api)"
    if given.get("name") is None:
        yield key, "has a url without name; say which of the server's models is meant"
    if variable is not None and not variable.endswith(("_API_KEY", "_TOKEN")):
        yield f"{key}.api_key_env", f"is {variable}; only variables that end in _API_KEY or _TOKEN are sent to a server"
    if given.get("max_cost") is not None and given.get("price") is None:
        yield f"{key}.max_cost", "needs price: {input, output}, per million tokens"


def _is_address(url: str) -> bool:
    """Tell whether a client can use an address as it is, without a question mark or a key in it."""
    try:
        has_port = urlsplit(url).port != 0  # raises for one above 65535
    except ValueError:
        return False
    return has_port and re.fullmatch(r"https?://[^/\\\s?#@]+(/[^\s?#]*)?", url) is not None


def _judges(stage: Section, recipe: Section) -> Iterator[Finding]:
    for key in ("judge", "generator"):
        if stage.has(key):
            yield from judge_problems(key, stage.get(key), is_judge=key == "judge")


def _constitution(stage: Section, recipe: Section) -> Iterator[Finding]:
    yield from _unknown_constitutions(stage.get("constitution"))


def _unknown_constitutions(given: Any) -> Iterator[Finding]:
    for item in [given] if isinstance(given, str) else given or ():
        if item.startswith("builtin:") and item not in BUILTIN_CONSTITUTIONS:
            known = ", ".join(BUILTIN_CONSTITUTIONS)
            yield "constitution", f"is {item}; it must be a file, {known}{suggest(item, BUILTIN_CONSTITUTIONS)}"


def evaluation_problems(given: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with the judge of `evaluate:`, or of the command line's options."""
    judge, constitution = given.get("judge"), given.get("constitution")
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


def audited_evaluation(recipe: Section) -> Iterator[Finding]:
    """Yield what is wrong with the judge of `evaluate:` in a recipe."""
    for key, problem in evaluation_problems(recipe.get("evaluate") or {}):
        yield f"evaluate.{key}", problem


def _generator(stage: Section, recipe: Section) -> Iterator[Finding]:
    """A model of random weights has nothing to say."""
    model = recipe.get("model") or {}
    if model.get("init") != "scratch" or stage.has("start_from") or stage.has("generator"):
        return
    if (stage.method == "critique" and not stage.has("replay")) or (
        stage.method == "label" and stage.get("answers", 2) != "given"
    ):
        yield "start_from", "is missing, and model.init is scratch: random weights have no answers; name a stage"


def _replay(stage: Section, recipe: Section) -> Iterator[Finding]:
    if not stage.has("replay"):
        if not stage.has("constitution"):
            yield "constitution", "is missing; give builtin:harmlessness or a file of principles"
        return
    for key in (
        "rounds", "critiques", "examples", "constitution", "data", "helpful", "start_from", "generator", "temperature",
        "max_new_tokens", "batch_size",
    ):  # fmt: skip
        if stage.has(key):
            yield key, "has no effect with replay, which takes published critiques and revisions; nothing is sampled"


def _answers(stage: Section, recipe: Section) -> Iterator[Finding]:
    if stage.get("answers", 2) == "given":
        for key in ("generator", "max_new_tokens"):
            if stage.has(key):
                yield key, "has no effect with answers: given, which samples none"


def _label_reward(stage: Section, recipe: Section) -> Iterator[Finding]:
    if not stage.has("reward"):
        if not stage.has("constitution"):
            yield "constitution", "is missing; give builtin:harmlessness or a file of principles"
        if not stage.has("judge"):
            yield "judge", "is missing; name a model, {url: ...} or {replay: FILE} that compares, or give reward:"
        return
    for key in ("judge", "constitution", "orders", "cot", "cot_tokens", "examples", "check"):
        if stage.has(key):
            yield key, "has no effect with reward:, which compares by itself; take one of them out"
    given = stage.get("reward")
    if any(isinstance(part, dict) and part.get("judge") for part in (given if isinstance(given, list) else [given])):
        yield "reward", "has a judge, which compares answers itself; name it as judge:"


def _labels(stage: Section, recipe: Section) -> Iterator[Finding]:
    cot, clamp = stage.get("cot", False), stage.get("clamp")
    if not cot and stage.has("cot_tokens"):
        yield "cot_tokens", "has no effect without cot: true"
    if clamp is not None and clamp[0] >= clamp[1]:
        yield "clamp", f"is {clamp}; it must be [low, high], such as [0.4, 0.6]"
    if stage.get("hard", False) and clamp is not None:
        yield "clamp", "has no effect with hard: true, which rounds labels to 0 or 1"
    judge = stage.get("judge")
    if isinstance(judge, dict) and judge.get("replay") is not None:
        for key in ("orders", "cot", "examples"):
            if stage.has(key):
                yield key, "has no effect with judge.replay: the labels are made already"


CRITIQUE_RULES: list[Callable[[Section, Section], Iterator[Finding]]] = [_judges, _constitution, _generator, _replay]


_CRITIC = ("gamma", "lam", "cliprange_value", "vf_coef", "value_init", "critic_learning_rate")
_FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def list_rewards(stage: Section, key: str) -> list[dict[str, Any]]:
    """Return the rewards under `reward:` or `gold:` as mappings, in whatever shape they are given."""
    value = stage.get(key)
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [{"model": item} if isinstance(item, str) else item for item in items]


def reward_problems(stage: Section, recipe: Section) -> Iterator[Finding]:
    for key in ("reward", "gold"):
        for reward in list_rewards(stage, key):
            function = reward.get("function")
            if sum(reward.get(kind) is not None for kind in REWARD_KINDS) != 1:
                kinds = f"{', '.join(REWARD_KINDS[:-1])} and {REWARD_KINDS[-1]}"
                yield key, f"needs exactly one of {kinds} for each part, and has {_describe(reward)}"
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
    given = [f"{key} {reward[key]}" for key in REWARD_KINDS if key != "judge" and reward.get(key) is not None]
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
    reward_problems, _functions, _normalisation, _kl, _critic, _groups, _clipping, _lengths, _duration, _generation,
    _stream,
]  # fmt: skip
LABEL_RULES: list[Callable[[Section, Section], Iterator[Finding]]] = [
    _judges, _constitution, _generator, _answers, _label_reward, reward_problems, _labels,
]  # fmt: skip
