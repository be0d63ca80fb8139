"""Whether constitutions, judges and generators are there and may be used, before anything is asked or loaded.

Looks at files and the environment only: no request is sent, and no key is ever shown.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from alignkit.errors import EnvironmentProblem, ModelError, Problem, RecipeError, UsageError
from alignkit.feedback.constitution import load_constitution
from alignkit.feedback.examples import load_examples
from alignkit.feedback.server import find_key
from alignkit.feedback.writer import describe_model
from alignkit.models.files import find_model_dir, inspect_model_dir
from alignkit.recipe import Recipe, Stage
from alignkit.recipe.nearest import suggest
from alignkit.recipe.schema import CritiqueOptions, FeedbackModel, LabelOptions, PpoOptions


def list_feedback_models(stage: Stage) -> Iterator[tuple[str, FeedbackModel]]:
    """Yield every judge and generator of a stage with its key."""
    options = stage.options
    for key in ("judge", "generator"):
        model = getattr(options, key, None)
        if model is not None:
            yield key, model
    if isinstance(options, PpoOptions):
        for key, rewards in (("reward", options.reward), ("gold", options.gold or [])):
            yield from ((f"{key}.judge", reward.judge) for reward in rewards if reward.judge is not None)


def require_feedback(stage: Stage, *, coming: Collection[str] = ()) -> None:
    """Raise what would stop a stage because of what it asks for feedback, all problems at once.

    `coming` are stages that run before it. Raises UsageError, else EnvironmentProblem for what is not installed.
    """
    problems: list[Problem] = []
    missing: list[str] = []
    for check in _list_checks(stage, coming):
        try:
            check()
        except UsageError as error:
            problems += error.problems
        except EnvironmentProblem as error:
            missing.append(str(error))
    if problems:
        raise RecipeError(problems)
    if missing:
        raise EnvironmentProblem("\n".join(dict.fromkeys(missing)))


def describe_feedback(stage: Stage) -> dict[str, str]:
    """Return what a stage asks for feedback, in words; raises RecipeError for a constitution that is none."""
    options = stage.options
    facts = {key: describe_model(model, stage) for key, model in list_feedback_models(stage)}
    if isinstance(options, CritiqueOptions | LabelOptions) and options.constitution is not None:
        part: Literal["critique", "comparison"] = "critique" if isinstance(options, CritiqueOptions) else "comparison"
        principles = load_constitution(options.constitution, needs=part).principles
        facts["principles"] = str(len(principles))
    if isinstance(options, CritiqueOptions) and options.replay:
        facts["replay"] = ", ".join(options.replay)
    return facts


def describe_evaluation(recipe: Recipe) -> dict[str, str]:
    """Return in words who judges the win rates of `evaluate:`, and by how many principles; nothing without those.

    Raises RecipeError for a constitution that is none and for a key that nobody has set.
    """
    judge, constitution = recipe.evaluate.judge, recipe.evaluate.constitution
    if judge is None or constitution is None:
        return {}
    if judge.url is not None:
        find_key(judge, key="evaluate.judge", where=recipe.origins.get("evaluate.judge.api_key_env"))
    principles = load_constitution(constitution, needs="comparison").principles
    who = judge.model or f"{judge.name} at {urlsplit(judge.url or '').netloc}"
    return {"judge": who, "principles": str(len(principles))}


def _list_checks(stage: Stage, coming: Collection[str]) -> Iterator[Callable[[], object]]:
    options = stage.options
    if isinstance(options, CritiqueOptions):
        yield from _check_texts(stage, "", options.constitution, "critique", options.examples)
        yield from (partial(_require_file, stage, "replay", path) for path in options.replay or ())
    elif isinstance(options, LabelOptions):
        yield from _check_texts(stage, "", options.constitution, "comparison", options.examples)
    elif isinstance(options, PpoOptions):
        for reward in (*options.reward, *(options.gold or ())):
            if reward.judge is not None:
                yield from _check_texts(stage, "reward.", reward.constitution, "comparison", "none")
    for key, model in list_feedback_models(stage):
        if model.url is not None:
            yield partial(_require_server, stage, key, model)
        elif model.replay is not None:
            yield partial(_require_file, stage, f"{key}.replay", model.replay)
        elif model.model is not None and stage.source_stages.get(model.model) not in coming:
            yield partial(_require_model, stage, key, model)


def _check_texts(
    stage: Stage,
    prefix: str,
    constitution: str | list[str] | None,
    part: Literal["critique", "comparison"],
    examples: str | list[str],
) -> Iterator[Callable[[], object]]:
    for key, given, load in (
        ("constitution", constitution, partial(load_constitution, needs=part)),
        ("examples", examples, load_examples),
    ):
        values = [] if given is None else [given] if isinstance(given, str) else given
        files = [value for value in values if value not in ("none", "builtin") and not value.startswith("builtin:")]
        missing = [file for file in files if not Path(file).is_file()]
        yield from (partial(_require_file, stage, f"{prefix}{key}", file) for file in missing)
        if values and not missing:
            yield partial(load, values)


def _require_file(stage: Stage, key: str, path: str) -> None:
    if not Path(path).is_file():
        folder = Path(path).parent
        near = [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
        hint = suggest(Path(path).name, near)
        raise RecipeError(f"{stage.name}.{key}: {path} is not there{hint}", where=stage.where(f"{stage.name}.{key}"))


def _require_server(stage: Stage, key: str, model: FeedbackModel) -> None:
    """Raise for a key that nobody has set, and a client that is not installed."""
    name = f"{stage.name}.{key}"
    find_key(model, key=name, where=stage.where(f"{name}.api_key_env"))
    if importlib.util.find_spec("openai") is None:
        raise EnvironmentProblem("a judge or generator with url needs the openai client: pip install 'alignkit[judge]'")


def _require_model(stage: Stage, key: str, model: FeedbackModel) -> None:
    where = stage.where(f"{stage.name}.{key}")
    if model.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise EnvironmentProblem(f"{where}: {key}.engine is vllm, which is not installed here; use transformers or url")
    source = str(model.model)
    if source in stage.source_stages and not Path(source).is_dir():
        return  # `lineage` says it
    try:
        directory = find_model_dir(source)
        files = inspect_model_dir(directory, trust_code=stage.trust_code) if directory else None
    except ModelError as error:
        problems = [Problem(f"{stage.name}.{key}: {problem}", where) for problem in error.problems]
        raise ModelError(problems) from error
    if files is not None and files.reward:
        raise ModelError(
            f"{stage.name}.{key} is {source}, a reward model, which cannot write or choose; name a language model",
            where=where,
        )
