"""The rules between the options of critique and label stages, and of whatever judges or generates.

A part of `audit`, which runs these; only what the recipe itself shows is judged. Whether a server answers, a key is set
or a file is there is found out in preflight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from alignkit.console import redact
from alignkit.recipe.nearest import suggest
from alignkit.recipe.schema import BUILTIN_CONSTITUTIONS

if TYPE_CHECKING:
    from alignkit.recipe.audit import Finding, Section

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
LABEL_RULES: list[Callable[[Section, Section], Iterator[Finding]]] = [
    _judges, _constitution, _generator, _answers, _labels,
]  # fmt: skip
