"""One stage of a recipe with every value in force, and which stages a name on the command line stands for.

It fills in defaults and names directories; it creates nothing and loads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from alignkit.errors import RecipeError
from alignkit.recipe.nearest import suggest
from alignkit.recipe.references import ROWS, RUNS
from alignkit.recipe.schema import FEEDBACK, DataSource, FeedbackModel, Method, RewardSource, TrainOptions
from alignkit.recipe.stage import Recipe, Stage, StageSection

# learning rate with LoRA, and of all weights
_LEARNING_RATES = {"sft": (2e-4, 2e-5), "rm": (1e-4, 1e-5), "dpo": (5e-6, 5e-7), "ppo": (1e-5, 1e-6)}
_FROM_SCRATCH = 2.5e-4
_LISTED = 8  # runs of a swept stage that a message names


def resolve(
    recipe: Recipe,
    stage: str | None = None,
    *,
    method: Method | None = None,
    out: Path | None = None,
    trust_code: bool = False,
) -> Stage:
    """Resolve a stage by name, or the only stage of a method.

    `out` replaces the run directory runs/<recipe name>/<stage>. Raises RecipeError when there is no such stage, or
    several of the method and no name.
    """
    section = _pick(recipe, stage, method)
    options, top = section.options, section.top
    scratch = top.model.init == "scratch" and options.start_from is None  # trains all weights, and unquantised
    model = top.model.model_copy(
        update={"path": find_weights(top.model.path), **({"quantization": "none"} if scratch else {})}
    )
    lora = None if scratch else top.lora
    launch = recipe.launch
    if options.method in FEEDBACK:  # rows are made in one process, whatever trains beside it
        launch = launch.model_copy(update={"processes": 1, "nodes": 1, "strategy": "ddp", "offload": "none"})
    trainer = dict(section.trainer)
    if isinstance(options, TrainOptions):
        builtin = top.model.path.startswith("builtin:")
        trainer = _fill_trainer(trainer, options, lora=lora is not None, scratch=scratch, builtin=builtin)
    rewards: dict[str, str] = {}
    sources: dict[str, str] = {}

    def find_model(name: str, found: dict[str, str]) -> str:
        """The model directory of a stage or a run, anything else as it is; `found` notes what is a stage's."""
        run = section.names.get(name, name)
        if run not in recipe.stages:
            return find_weights(name)
        directory = f"{RUNS}/{recipe.name}/{run}/model"
        found[directory] = run
        return directory

    def point(part: BaseModel) -> BaseModel:
        """Put the directory or file that a stage makes in the place of its name."""
        if isinstance(part, FeedbackModel | RewardSource) and part.model is not None:
            found = sources if isinstance(part, FeedbackModel) else rewards
            return part.model_copy(update={"model": find_model(part.model, found)})
        if isinstance(part, DataSource):
            run = section.names.get(part.path, part.path)
            if run in recipe.stages and recipe.stages[run].options.method in FEEDBACK:
                path = f"{RUNS}/{recipe.name}/{run}/{ROWS}"
                sources[path] = run
                return part.model_copy(update={"path": path})
        return part

    started: dict[str, str] = {}
    start = None if options.start_from is None else find_model(options.start_from, started)
    named = options.model_copy(update={"start_from": section.names.get(options.start_from or "", options.start_from)})
    origins: dict[str, str] = {}
    for name, part in (("model", top.model), ("lora", top.lora), ("launch", launch), (section.name, options)):
        origins |= {f"{name}.{key}": "default" for key in (type(part).model_fields if part else ())}
    origins |= {f"{section.name}.{key}": "default" for key in trainer}
    return Stage(
        recipe_name=recipe.name,
        recipe_path=recipe.path,
        name=section.name,
        seed=top.seed,
        model=model,
        lora=lora,
        launch=launch,
        options=_replace_parts(named, point),
        trainer=trainer,
        origins={**origins, **section.origins},
        run_dir=str(out) if out else f"{RUNS}/{recipe.name}/{section.name}",
        start_dir=start,
        start_stage=started.get(start or ""),
        reward_stages=rewards,
        source_stages=sources,
        trust_code=trust_code,
        point=section.point,
    )


def find_weights(path: str) -> str:
    """The model/ of a run directory; anything else is a model itself."""
    return os.path.join(path, "model") if os.path.isfile(os.path.join(path, "stage.json")) else path


_Value = TypeVar("_Value")


def _replace_parts(value: _Value, change: Callable[[BaseModel], BaseModel]) -> _Value:
    """Copy a model with `change` done to every model in it, at whatever depth; what nothing changes stays itself."""
    changed: Any = value
    if isinstance(value, BaseModel):
        parts = {key: getattr(value, key) for key in type(value).model_fields}
        new = {key: _replace_parts(part, change) for key, part in parts.items()}
        update = {key: part for key, part in new.items() if part is not parts[key]}
        changed = change(value.model_copy(update=update) if update else value)
    elif isinstance(value, list):
        items = [_replace_parts(item, change) for item in value]
        changed = items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return changed


def _fill_trainer(
    given: dict[str, Any], options: TrainOptions, *, lora: bool, scratch: bool, builtin: bool
) -> dict[str, Any]:
    """Complete the TRL fields with alignkit's defaults where those differ from TRL's.

    `builtin`: a tiny model that ships with alignkit.
    """
    with_lora, full = _LEARNING_RATES[options.method]
    defaults: dict[str, Any] = {
        "learning_rate": _FROM_SCRATCH if scratch else with_lora if lora else full,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # a share of all steps
        "max_grad_norm": 1.0,
        "max_length": 1024,
        "num_train_epochs": 1.0,
        "logging_steps": 10,
        "save_steps": 100,
    }
    if builtin:  # recomputing activations only pays where they are large
        defaults["gradient_checkpointing"] = False
    if options.method == "ppo":  # Adam's eps as in lm-human-preferences; prompt and answer: max_new_tokens bounds them
        defaults["adam_epsilon"] = 1e-5
        del defaults["max_length"]
    elif options.eval is not None:  # the rollouts of ppo are its evaluation; held-out prompts are for samples
        defaults |= {"eval_strategy": "steps", "eval_steps": 0.1}
    for kind in ("logging", "save", "eval"):
        if given.get(f"{kind}_strategy", "steps") != "steps":
            defaults.pop(f"{kind}_steps", None)
    return {**defaults, **given}


# What a name on the command line stands for


def find_section(recipe: Recipe, name: str, *, said: str | None = None) -> StageSection:
    """Find the stage of a name, which messages call `said`; raises RecipeError when there is none, or several."""
    said = f"--stage {said or name}"
    if name in recipe.sweeps:
        runs = recipe.sweeps[name]
        more = f", ... ({len(runs)} in all)" if len(runs) > _LISTED else ""
        listed = f"{', '.join(runs[:_LISTED])}{more}"
        raise RecipeError(f"{said} is swept, so there are several; name one of them: {listed}", where=recipe.path)
    if name not in recipe.stages:
        hint = suggest(name, recipe.stages) or f"; there are {', '.join(recipe.stages)}"
        raise RecipeError(f"{said}: the recipe has no such stage{hint}", where=recipe.path)
    return recipe.stages[name]


def _pick(recipe: Recipe, stage: str | None, method: Method | None) -> StageSection:
    if stage is not None:
        section = find_section(recipe, stage)
        if method and section.options.method != method:
            _refuse_method(recipe, section)
        return section
    fitting = [section for section in recipe.stages.values() if method in (None, section.options.method)]
    # A stage of its own goes before those that an rlaif section stands for: they have names to be called by.
    fitting = [section for section in fitting if section.group is None] or fitting
    kind = f"{method} stage" if method else "stage"
    if not fitting:
        names = ", ".join(recipe.stages)
        raise RecipeError(f"the recipe has no {kind}; its stages are {names}", where=recipe.path)
    if len(fitting) > 1:
        several = ", ".join(section.name for section in fitting)
        raise RecipeError(f"the recipe has several {kind}s: {several}; name one with --stage", where=recipe.path)
    return fitting[0]


def _refuse_method(recipe: Recipe, section: StageSection) -> None:
    method = section.options.method
    raise RecipeError(f"--stage {section.name} is a {method} stage; run `alignkit {method}`", where=recipe.path)


def pick_steps(recipe: Recipe, name: str | None = None) -> list[str]:
    """List the stages that `alignkit rlaif` runs, in order.

    All of the only rlaif section; with a name, those of a section of that name, or one stage by its name or, short,
    its step (label for rlaif-label). Raises RecipeError when there is no such thing, or too many.
    """
    if name is None:
        sections = [*recipe.groups]
        single = [stage.name for stage in recipe.stages.values() if stage.options.method in FEEDBACK]
        if len(sections) > 1 or (not sections and len(single) != 1):
            found = f"the recipe has {'several rlaif sections' if sections else 'no rlaif section'}"
            several = f": {', '.join(sections or single)}; name one with --stage" if sections or single else ""
            raise RecipeError(found + several, where=recipe.path)
        return list(recipe.groups[sections[0]]) if sections else single
    if name in recipe.groups:
        return list(recipe.groups[name])
    steps = [step for group in recipe.groups if (step := f"{group}-{name}") in {*recipe.stages, *recipe.sweeps}]
    if len(steps) > 1:
        raise RecipeError(f"--stage {name} is in several sections: {', '.join(steps)}; name one", where=recipe.path)
    if not steps and name not in {*recipe.stages, *recipe.sweeps}:
        known = [step for group, made in recipe.groups.items() for step in (group, *made)]
        short = [step.removeprefix(f"{group}-") for group, made in recipe.groups.items() for step in made]
        hint = suggest(name, [*known, *short]) or (f"; there are {', '.join(known)}" if known else "")
        raise RecipeError(f"--stage {name}: the recipe has no such stage of rlaif{hint}", where=recipe.path)
    section = find_section(recipe, steps[0] if steps else name, said=name)
    if section.group is None and section.options.method not in FEEDBACK:
        _refuse_method(recipe, section)
    return [section.name]


def pick_span(recipe: Recipe, first: str | None = None, last: str | None = None) -> list[str]:
    """List the stages that `alignkit run` looks at, in order: all of them, or those from `first` to `last`.

    An rlaif section and a swept stage stand for their first stage in `first`, for their last in `last`. Raises
    RecipeError for names that are not under `stages:`, and when the last comes before the first.
    """
    order = list(recipe.order)
    several = {**recipe.groups, **recipe.sweeps}
    start, end = 0, len(order)
    for flag, name in (("--from", first), ("--until", last)):
        if name is None:
            continue
        places = [order.index(stage) for stage in several.get(name, (name,)) if stage in order]
        if not places:
            hint = suggest(name, [*several, *order]) or f"; there are {', '.join(order)}"
            what = "is not among the stages that are run" if name in recipe.stages else "is not a stage"
            raise RecipeError(f"{flag} {name} {what}{hint}", where=recipe.path)
        start, end = (min(places), end) if flag == "--from" else (start, max(places) + 1)
    if start >= end:
        raise RecipeError(f"--until {last} comes before --from {first}", where=recipe.path)
    return order[start:end]
