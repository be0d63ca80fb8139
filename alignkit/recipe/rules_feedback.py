"""Rules between the options of ppo, critique and label stages, and of whatever scores, judges or generates.

Only what the recipe itself shows is judged. Whether a server answers, a key is set or a file is there is found out in
preflight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from alignkit.console import redact
from alignkit.recipe.idle_keys import list_rewards
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


def _judges(stage: Section) -> Iterator[Finding]:
    for key in ("judge", "generator"):
        if stage.has(key):
            yield from judge_problems(key, stage.get(key), is_judge=key == "judge")


def _constitution(stage: Section) -> Iterator[Finding]:
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


def _generator(stage: Section) -> Iterator[Finding]:
    """A model of random weights has nothing to say."""
    scratch = stage.top is not None and stage.top.get("model.init") == "scratch"
    samples = stage.get("answers") != "given" and not stage.has("replay")
    if scratch and samples and not stage.has("start_from") and not stage.has("generator"):
        yield "start_from", "is missing, and model.init is scratch: random weights have no answers; name a stage"


def _principles(stage: Section) -> Iterator[Finding]:
    if not stage.has("constitution") and not stage.has("replay") and not stage.has("reward"):
        yield "constitution", "is missing; give builtin:harmlessness or a file of principles"


def _labels(stage: Section) -> Iterator[Finding]:
    given = stage.get("reward")
    if given is None and not stage.has("judge"):
        yield "judge", "is missing; name a model, {url: ...} or {replay: FILE} that compares, or give reward:"
    if any(isinstance(part, dict) and part.get("judge") for part in (given if isinstance(given, list) else [given])):
        yield "reward", "has a judge, which compares answers itself; name it as judge:"
    clamp = stage.get("clamp")
    if clamp is not None and clamp[0] >= clamp[1]:
        yield "clamp", f"is {clamp}; it must be [low, high], such as [0.4, 0.6]"


def _rewards(stage: Section) -> Iterator[Finding]:
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
            if function is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", function):
                yield key, f"names the function {function!r}; write pkg.module:name"
            if reward.get("weight", 1) == 0:
                yield key, f"gives {_describe(reward)} the weight 0, which has no effect; take it out, or make it gold"


def _describe(reward: dict[str, Any]) -> str:
    given = [f"{key} {reward[key]}" for key in REWARD_KINDS if key != "judge" and reward.get(key) is not None]
    given += ["a judge"] if reward.get("judge") is not None else []
    return " and ".join(given) or "none"


def _kl(stage: Section) -> Iterator[Finding]:
    target, most = stage.get("kl_target"), stage.get("max_kl")
    if target is not None and stage.get("kl_coef", 0.05) == 0:
        yield "kl_coef", "is 0, which kl_target cannot change, for it multiplies; start above 0 (typical: 0.05)"
    if target is not None and most is not None and most <= target:
        yield "max_kl", f"is {most:g}, so the run would stop before it reaches kl_target {target:g}; raise it"


def _critic(stage: Section) -> Iterator[Finding]:
    rewards = list_rewards(stage, "reward")
    # value_init: reward needs one model whose weights a critic can start from.
    models = [reward for reward in rewards if reward.get("model") and not reward["model"].startswith("builtin:")]
    from_reward = stage.get("value_init") == "reward" and stage.get("advantage", "gae") == "gae"
    if from_reward and (len(rewards) != 1 or not models):
        yield "value_init", "is reward, but the reward is not one model; use value_init: policy"


def _groups(stage: Section) -> Iterator[Finding]:
    size, rollout = stage.get("num_generations"), stage.get("batch_size", 16) * stage.get("minibatches", 1)
    if stage.get("advantage") in ("rloo", "grpo") and rollout % (size or 4):
        key = "num_generations" if size is not None else "batch_size"
        what = f"is {stage.get(key, 16)}: a rollout of {rollout} answers does not divide into groups of {size or 4}"
        yield key, f"{what}; make batch_size x minibatches a multiple of num_generations"


def _lengths(stage: Section) -> Iterator[Finding]:
    most, least = stage.get("max_new_tokens", 64), stage.get("min_new_tokens")
    missing, after = stage.get("missing_eos"), stage.get("truncate.after", 16)
    if least is not None and least > most:
        yield "min_new_tokens", f"is {least}, more than max_new_tokens ({most})"
    if missing is not None and sum(missing.get(key) is not None for key in ("penalty", "score")) != 1:
        yield "missing_eos", "needs exactly one of penalty (subtracted) and score (instead)"
    if missing is not None and not stage.has("truncate") and least == most:
        yield "missing_eos", "would hit every answer: with min_new_tokens = max_new_tokens none can end"
    if stage.has("truncate") and after >= most:
        yield "truncate", f"has no effect: after is {after}, and an answer has at most {most} tokens (max_new_tokens)"


def _generation(stage: Section) -> Iterator[Finding]:
    url = stage.get("generation.url")
    if stage.get("generation.engine") != "vllm":
        return
    if stage.get("generation.mode") == "server" and url is None:
        yield "generation", "has mode: server without url; start `trl vllm-serve` and give its address"
    if url is not None and not re.match(r"https?://[^/]", url):
        yield "generation.url", f"is {url!r}; it must start with http:// or https://"


def _strategies(stage: Section) -> Iterator[Finding]:
    for key in ("save_strategy", "logging_strategy"):
        if stage.get(key) == "epoch":
            yield key, "is epoch; PPO counts in steps, of which a rollout takes ppo_epochs x minibatches"


CRITIQUE_RULES = (_judges, _constitution, _generator, _principles)
LABEL_RULES = (_judges, _constitution, _generator, _principles, _labels, _rewards)
PPO_RULES = (_rewards, _kl, _critic, _groups, _lengths, _generation, _strategies)
