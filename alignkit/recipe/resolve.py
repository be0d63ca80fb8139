"""One stage of a recipe with every value in force: the only bridge from the recipe to the rest of alignkit.

It fills in defaults and names directories; it creates nothing and loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import RecipeError
from alignkit.recipe.nearest import suggest
from alignkit.recipe.references import RUNS, find_model, find_weights, point
from alignkit.recipe.rules import trains_from_scratch
from alignkit.recipe.schema import FEEDBACK, LaunchOptions, Method, TrainOptions
from alignkit.recipe.stage import Recipe, Stage, StageSection

# learning rate with LoRA, and of all weights
_LEARNING_RATES = {"sft": (2e-4, 2e-5), "rm": (1e-4, 1e-5), "dpo": (5e-6, 5e-7), "ppo": (1e-5, 1e-6)}
_FROM_SCRATCH = 2.5e-4


def choose_defaults(method: str, *, lora: bool, scratch: bool, builtin: bool, evaluates: bool) -> dict[str, Any]:
    """Return alignkit's defaults of TRL fields for a stage; `builtin`: a tiny model that ships with alignkit."""
    with_lora, full = _LEARNING_RATES[method]
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
    if method == "ppo":  # Adam's eps as in lm-human-preferences; prompt and answer are bounded by max_new_tokens
        defaults |= {"adam_epsilon": 1e-5}
        del defaults["max_length"]
        evaluates = False  # rollouts are the evaluation; held-out prompts are for samples
    if builtin:  # recomputing activations only pays where they are large
        defaults["gradient_checkpointing"] = False
    if evaluates:
        defaults |= {"eval_strategy": "steps", "eval_steps": 0.1}
    return defaults


_LISTED = 8  # variants of a swept stage that a message names


def resolve(
    recipe: Recipe,
    stage: str | None = None,
    *,
    method: Method | None = None,
    out: Path | None = None,
    trust_code: bool = False,
) -> Stage:
    """Return a stage by name, or the only stage of a method.

    `out` replaces the run directory runs/<recipe name>/<stage>. Raises RecipeError when there is no such stage, or
    several of the method and no name.
    """
    section = _pick(recipe, stage, method)
    options, top = section.options, section.top
    start = options.start_from
    scratch = trains_from_scratch(top.model.model_dump(), start)
    model = top.model.model_copy(update={"quantization": "none"} if scratch else {})
    model = model.model_copy(update={"path": find_weights(model.path)})
    lora = None if scratch else top.lora
    pointed = point(recipe, options)
    trainer = _fill_trainer(section, lora=lora is not None, scratch=scratch)
    return Stage(
        recipe_name=recipe.name,
        recipe_path=recipe.path,
        name=section.name,
        seed=top.seed,
        model=model,
        lora=lora,
        launch=_launch(recipe.launch, options.method),
        options=pointed.options,
        trainer=trainer,
        origins=_collect_origins(recipe, section, list(trainer)),
        run_dir=str(out) if out else f"{RUNS}/{recipe.name}/{section.name}",
        start_dir=None if start is None else find_model(recipe, start),
        start_stage=start if start in recipe.stages else None,
        reward_stages=pointed.rewards,
        source_stages=pointed.sources,
        trust_code=trust_code,
        point=section.point,
    )


def pick_steps(recipe: Recipe, name: str | None = None) -> list[str]:
    """Return the stages that `alignkit rlaif` runs, in order.

    All of the only rlaif section; with a name, those of a section of that name, or one stage by its name or, short,
    its step (label for rlaif-label). Raises RecipeError when there is no such thing, or too many.
    """
    groups = recipe.groups
    if name in groups:
        return list(groups[str(name)])
    if swept := [stage for stage in (name, *(f"{group}-{name}" for group in groups)) if stage in recipe.sweeps]:
        raise RecipeError(f"--stage {name} {_describe_swept(recipe.sweeps[str(swept[0])])}", where=recipe.path)
    if name is not None:
        single = [stage for stage in recipe.stages.values() if stage.name == name]
        steps = [stage for group in groups for stage in groups[group] if stage == f"{group}-{name}"]
        if single and (single[0].group is not None or single[0].options.method in FEEDBACK):
            return [name]
        if len(steps) == 1:
            return steps
        if single:
            method = single[0].options.method
            raise RecipeError(f"--stage {name} is a {method} stage; run `alignkit {method}`", where=recipe.path)
        if steps:
            raise RecipeError(f"--stage {name} is in several sections: {', '.join(steps)}; name one", where=recipe.path)
        known = [*groups, *(stage for group in groups for stage in groups[group])]
        short = [stage.removeprefix(f"{group}-") for group in groups for stage in groups[group]]
        hint = suggest(name, [*known, *short]) or (f"; there are {', '.join(known)}" if known else "")
        raise RecipeError(f"--stage {name}: the recipe has no such stage of rlaif{hint}", where=recipe.path)
    if not groups:
        single = [stage for stage in recipe.stages.values() if stage.options.method in FEEDBACK]
        if len(single) == 1:
            return [single[0].name]
        several = f": {', '.join(stage.name for stage in single)}; name one with --stage" if single else ""
        raise RecipeError(f"the recipe has no rlaif section{several}", where=recipe.path)
    if len(groups) > 1:
        several = ", ".join(groups)
        raise RecipeError(f"the recipe has several rlaif sections: {several}; name one with --stage", where=recipe.path)
    (stages,) = groups.values()
    return list(stages)


def pick_span(recipe: Recipe, first: str | None = None, last: str | None = None) -> list[str]:
    """Return the stages that `alignkit run` looks at, in order: all of them, or those from `first` to `last`.

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


def _describe_swept(variants: Sequence[str]) -> str:
    """Say, after its name, that a stage is swept and what its variants are called."""
    more = f", ... ({len(variants)} in all)" if len(variants) > _LISTED else ""
    return f"is swept, so there are several; name one of them: {', '.join(variants[:_LISTED])}{more}"


def _launch(launch: LaunchOptions, method: Method) -> LaunchOptions:
    """Return where a stage runs: one that makes rows takes one process, whatever trains beside it."""
    if method not in FEEDBACK:
        return launch
    return launch.model_copy(update={"processes": 1, "nodes": 1, "strategy": "ddp", "offload": "none"})


def _fill_trainer(section: StageSection, *, lora: bool, scratch: bool) -> dict[str, Any]:
    """Return the TRL fields in force: as given, else alignkit's defaults where those differ from TRL's."""
    given, options = dict(section.trainer), section.options
    if not isinstance(options, TrainOptions):
        return {}
    defaults = choose_defaults(
        options.method,
        lora=lora,
        scratch=scratch,
        builtin=section.top.model.path.startswith("builtin:"),
        evaluates=options.eval is not None,
    )
    if given.get("eval_strategy", "steps") != "steps":
        defaults.pop("eval_steps", None)
    for kind in ("logging", "save"):
        if given.get(f"{kind}_strategy", "steps") != "steps":
            defaults.pop(f"{kind}_steps")
    return {**defaults, **given}


def _pick(recipe: Recipe, stage: str | None, method: Method | None) -> StageSection:
    names = ", ".join(recipe.stages)
    if stage is not None:
        if stage in recipe.sweeps:
            raise RecipeError(f"--stage {stage} {_describe_swept(recipe.sweeps[stage])}", where=recipe.path)
        if stage not in recipe.stages:
            hint = suggest(stage, recipe.stages) or f"; there are {names}"
            raise RecipeError(f"--stage {stage}: the recipe has no such stage{hint}", where=recipe.path)
        section = recipe.stages[stage]
        if method and section.options.method != method:
            found = section.options.method
            raise RecipeError(f"--stage {stage} is a {found} stage; run `alignkit {found}`", where=recipe.path)
        return section
    fitting = [section for section in recipe.stages.values() if method in (None, section.options.method)]
    # A stage of its own goes before those that an rlaif section stands for: they have names to be called by.
    fitting = [section for section in fitting if section.group is None] or fitting
    kind = f"{method} stage" if method else "stage"
    if not fitting:
        raise RecipeError(f"the recipe has no {kind}; its stages are {names}", where=recipe.path)
    if len(fitting) > 1:
        several = ", ".join(section.name for section in fitting)
        raise RecipeError(f"the recipe has several {kind}s: {several}; name one with --stage", where=recipe.path)
    return fitting[0]


def _collect_origins(recipe: Recipe, section: StageSection, trainer: list[str]) -> dict[str, str]:
    """Return the place of every value in force, "default" where the recipe gives none."""
    origins = {}
    for name, options in (("model", section.top.model), ("lora", section.top.lora), ("launch", recipe.launch)):
        for key in type(options).model_fields if options else ():
            origins[f"{name}.{key}"] = "default"
    for key in (*type(section.options).model_fields, *trainer):
        origins[f"{section.name}.{key}"] = "default"
    for name in ("name", "launch", section.name):
        origins |= recipe.origins_below.get(name, {})
    return {**origins, **section.origins}
