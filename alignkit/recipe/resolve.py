"""One stage of a recipe with every value in force: the only bridge from the recipe to the rest of alignkit.

It fills in defaults and names directories; it creates nothing and loads nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from alignkit.errors import RecipeError
from alignkit.recipe.audit import trains_from_scratch
from alignkit.recipe.defaults import choose_defaults
from alignkit.recipe.nearest import suggest
from alignkit.recipe.recipe import Recipe, StageSection
from alignkit.recipe.schema import Method, PpoOptions, RewardSource, StageOptions
from alignkit.recipe.stage import Stage

RUNS = "runs"


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
    options = section.options
    start = options.start_from
    scratch = trains_from_scratch(recipe.model.model_dump(), start)
    model = recipe.model.model_copy(update={"quantization": "none"} if scratch else {})
    model = model.model_copy(update={"path": _find_weights(model.path)})
    lora = None if scratch else recipe.lora
    given = dict(section.trainer)
    defaults = choose_defaults(
        options.method,
        lora=lora is not None,
        scratch=scratch,
        builtin=recipe.model.path.startswith("builtin:"),
        evaluates=options.eval is not None,
    )
    if given.get("eval_strategy", "steps") != "steps":
        defaults.pop("eval_steps", None)
    for kind in ("logging", "save"):
        if given.get(f"{kind}_strategy", "steps") != "steps":
            defaults.pop(f"{kind}_steps")
    stage_dirs = _find_rewards(recipe, options)
    if isinstance(options, PpoOptions):
        options = _point_rewards(options, {name: directory for directory, name in stage_dirs.items()})
    return Stage(
        recipe_name=recipe.name,
        recipe_path=recipe.path,
        name=section.name,
        seed=recipe.seed,
        model=model,
        lora=lora,
        launch=recipe.launch,
        options=options,
        trainer={**defaults, **given},
        origins=_collect_origins(recipe, section, [*defaults, *given]),
        run_dir=str(out) if out else f"{RUNS}/{recipe.name}/{section.name}",
        start_dir=_find_start(recipe, start),
        start_stage=start if start in recipe.stages else None,
        reward_stages=stage_dirs,
        trust_code=trust_code,
    )


def _pick(recipe: Recipe, stage: str | None, method: Method | None) -> StageSection:
    names = ", ".join(recipe.stages)
    if stage is not None:
        if stage not in recipe.stages:
            hint = suggest(stage, recipe.stages) or f"; there are {names}"
            raise RecipeError(f"--stage {stage}: the recipe has no such stage{hint}", where=recipe.path)
        section = recipe.stages[stage]
        if method and section.options.method != method:
            found = section.options.method
            raise RecipeError(f"--stage {stage} is a {found} stage; run `alignkit {found}`", where=recipe.path)
        return section
    fitting = [section for section in recipe.stages.values() if method in (None, section.options.method)]
    kind = f"{method} stage" if method else "stage"
    if not fitting:
        raise RecipeError(f"the recipe has no {kind}; its stages are {names}", where=recipe.path)
    if len(fitting) > 1:
        several = ", ".join(section.name for section in fitting)
        raise RecipeError(f"the recipe has several {kind}s: {several}; name one with --stage", where=recipe.path)
    return fitting[0]


def _find_start(recipe: Recipe, start: str | None) -> str | None:
    """Return the directory or hub id a stage starts from, None for model.path."""
    if start is None:
        return None
    return f"{RUNS}/{recipe.name}/{start}/model" if start in recipe.stages else _find_weights(start)


def _find_rewards(recipe: Recipe, options: StageOptions) -> dict[str, str]:
    """Return the model directories of the recipe's stages that `reward:` and `gold:` name, each with its stage."""
    rewards = [*options.reward, *(options.gold or ())] if isinstance(options, PpoOptions) else []
    named = [reward.model for reward in rewards if reward.model in recipe.stages]
    return {f"{RUNS}/{recipe.name}/{name}/model": name for name in named if name}


def _point_rewards(options: PpoOptions, directories: dict[str, str]) -> PpoOptions:
    """Return the options with every reward model as the directory or hub id it is loaded from."""

    def point(rewards: list[RewardSource] | None) -> list[RewardSource] | None:
        return rewards and [
            reward.model_copy(update={"model": directories.get(reward.model) or _find_weights(reward.model)})
            if reward.model
            else reward
            for reward in rewards
        ]

    return options.model_copy(update={"reward": point(options.reward), "gold": point(options.gold)})


def _find_weights(path: str) -> str:
    """Return the model/ of a run directory; anything else is a model itself."""
    return os.path.join(path, "model") if os.path.isfile(os.path.join(path, "stage.json")) else path


def _collect_origins(recipe: Recipe, section: StageSection, trainer: list[str]) -> dict[str, str]:
    """Return the place of every value in force, "default" where the recipe gives none."""
    origins = {}
    for name, options in (("model", recipe.model), ("lora", recipe.lora), ("launch", recipe.launch)):
        for key in type(options).model_fields if options else ():
            origins[f"{name}.{key}"] = "default"
    for key in (*type(section.options).model_fields, *trainer):
        origins[f"{section.name}.{key}"] = "default"
    kept = ("name", "seed", "model", "lora", "launch", section.name)
    return origins | {key: place for key, place in recipe.origins.items() if key.split(".")[0] in kept}
