"""A validated recipe, one stage of it with every value in force, and which stages a name on the command line means."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from alignkit.errors import Problem, RecipeError, suggest
from alignkit.recipe import schema
from alignkit.recipe.methods import FEEDBACK, OPTIONS, TASKS, Method, StageOptions, TrainOptions
from alignkit.recipe.schema import DataSource, FeedbackModel, RewardSource
from alignkit.recipe.sections import ROWS, RUNS, Section, find_origins
from alignkit.recipe.words import KTO_LOSSES, TABLES, method_fields


@dataclass(frozen=True)
class Recipe:
    """What one recipe file says. `origins` maps dotted keys to places: {"dpo.beta": "recipes/a.yaml:7"}."""

    name: str
    path: str  # as messages show it: relative to the working directory when it is below it
    runs: str  # the directory that holds NAME/STAGE, likewise
    seed: int
    model: schema.ModelOptions
    lora: schema.LoraOptions | None
    launch: schema.LaunchOptions
    stages: Mapping[str, Section]  # those under `stages:` first and in that order, then as written
    order: tuple[str, ...]  # what `alignkit run` trains: those under `stages:`, all of them where it is omitted
    origins: Mapping[str, str]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # stages of each rlaif section, in order
    sweeps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # variants of each swept stage, by plain name
    evaluate: schema.EvaluateOptions = field(default_factory=schema.EvaluateOptions)
    evaluates: bool = False  # `evaluate:` is written out: `alignkit run` measures at its end

    @property
    def stage_names(self) -> list[str]:
        return list(self.stages)


def check_batch(stage: Stage, num_processes: int) -> Problem | None:
    """Say what is wrong with `batch_size` for so many processes, None when each gets the same number of rows."""
    options = stage.options
    if not isinstance(options, TrainOptions):
        return None
    micro, key = options.micro_batch_size, f"{stage.name}.batch_size"
    divisor = num_processes * (1 if micro == "auto" else micro)
    if options.batch_size % divisor == 0:
        return None
    several = f"{num_processes} processes" if num_processes > 1 else "one process"
    shared = several if micro == "auto" else f"{several} with micro_batch_size {micro}"
    what = f"{key} is {options.batch_size}, which {shared} cannot divide; make it a multiple of {divisor}"
    return Problem(what, stage.where(key))


_Options = TypeVar("_Options", bound=StageOptions)


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe with every value in force.
    `options` are alignkit's own keys, `trainer` TRL's fields: those given, and alignkit's defaults where they differ.
    `origins` maps every dotted key to where its value came from: "recipes/a.yaml:7", "--set" or "default"."""

    recipe_name: str
    recipe_path: str
    name: str
    seed: int
    model: schema.ModelOptions
    lora: schema.LoraOptions | None
    launch: schema.LaunchOptions
    options: StageOptions
    trainer: Mapping[str, Any]
    origins: Mapping[str, str]
    run_dir: str  # runs/<recipe name>/<stage>, or --out
    start_dir: str | None = None  # what start_from names: a run directory, a model or an adapter directory, a hub id
    start_stage: str | None = None  # set when start_from is a stage of this recipe
    # model directories that `reward:` and `gold:` name by a stage of this recipe, each with the stage's name
    reward_stages: Mapping[str, str] = field(default_factory=dict)
    # directories of judges and generators, and files of rows, that a stage of this recipe makes, each with its name
    source_stages: Mapping[str, str] = field(default_factory=dict)
    trust_code: bool = False
    # what tells it from the other variants of a swept stage: {"dpo.beta": 0.05}; the values are in force already
    point: Mapping[str, Any] = field(default_factory=dict)
    evaluate: schema.EvaluateOptions | None = None  # what `evaluate_every` measures

    @property
    def method(self) -> Method:
        return self.options.method

    @property
    def training(self) -> TrainOptions:
        """The options of a stage that trains."""
        return self.expect(TrainOptions)

    def where(self, key: str) -> str:
        """Place of a key for messages: `recipes/a.yaml:7`, or the recipe path when it has no line."""
        origin = self.origins.get(key, "")
        return origin if ":" in origin or origin.startswith("--") else self.recipe_path

    @cached_property
    def objective(self) -> str | None:
        """The name in OBJECTIVES of what an sft stage learns; None for other methods."""
        return getattr(self.options, "objective", None)

    @cached_property
    def task(self) -> str | None:
        """The objective of a stage that learns labels, None for others."""
        return self.objective if self.objective in TASKS else None

    @property
    def scores(self) -> bool:
        """Whether its model ends in a score head instead of words: a reward model or a classifier."""
        return self.method == "rm" or self.task is not None

    @property
    def rewards(self) -> list[tuple[str, RewardSource]]:
        """Every source of a reward with its key, reward or gold; none for methods without a reward."""
        return [(key, source) for key in ("reward", "gold") for source in getattr(self.options, key, None) or ()]

    @property
    def is_unpaired(self) -> bool:
        """Whether a dpo stage learns from single answers, with TRL's KTOTrainer."""
        losses = self.trainer.get("loss_type", [])
        return self.method == "dpo" and bool(set(KTO_LOSSES) & {*([losses] if isinstance(losses, str) else losses)})

    def expect(self, kind: type[_Options]) -> _Options:
        """The options as the given class; a wrong class is a bug, not a user's mistake."""
        if not isinstance(self.options, kind):
            raise TypeError(f"stage {self.name} is a stage of {self.method}, not {kind.__name__}")
        return self.options

    def to_dict(self) -> dict[str, Any]:
        """Plain data for stage.json and --dry-run."""
        values: dict[str, Any] = {"recipe": self.recipe_name, "recipe_path": self.recipe_path, "stage": self.name}
        values |= {"method": self.method, **{one.name: getattr(self, one.name) for one in fields(self)[3:]}}
        if self.evaluate is None:
            del values["evaluate"]
        plain = {key: dict(value) for key, value in values.items() if isinstance(value, Mapping)}
        return values | plain | {key: one.model_dump() for key, one in values.items() if isinstance(one, BaseModel)}

    def fingerprint_values(self) -> dict[str, Any]:
        """List, flat and dotted, every value that can change the weights."""
        kept = {"seed": self.seed, "start": self.start_dir or self.model.path, "method": self.method}
        for prefix, section in (("model", self.model), ("lora", self.lora), (self.name, self.options)):
            if section is not None:
                kept |= {f"{prefix}.{key}": value for key, value in section.model_dump().items()}
        # A field that is written out with TRL's own default is the same setting as one left out.
        if self.launch.mixed_precision != "auto":  # what else launch: says changes where it runs, not what comes out
            kept["launch.mixed_precision"] = self.launch.mixed_precision
        fields = method_fields(self.method)
        written = {key: value for key, value in self.trainer.items() if value != fields.get(key, {}).get("default")}
        kept |= {f"{self.name}.{key}": value for key, value in written.items()}
        made = {**self.reward_stages, **self.source_stages}
        if self.start_dir is not None and self.start_stage is not None:
            made[self.start_dir] = self.start_stage
        # the same wherever the runs lie
        names = {path: f"{RUNS}/{self.recipe_name}/{name}/{Path(path).name}" for path, name in made.items()}
        last = {key: key.split(".")[-1] for key in kept if key.split(".")[-1] not in HARMLESS}
        return {key: _strip(kept[key], names, moves=word in COMPARED_BY_BYTES) for key, word in last.items()}


def complete_fingerprint(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Add the keys that a fingerprint of an older alignkit lacks, with their defaults: they change nothing."""
    options = OPTIONS.get(str(now.get("method")), TrainOptions)
    stage = next((key.removesuffix("method") for key in now if key.endswith(".method")), None)
    if stage is None:  # rows that were made: their keys have no prefix
        fields = {key: field.default for key, field in options.model_fields.items() if not field.is_required()}
        return {key: fields[key] for key in now.keys() & fields.keys()} | dict(before)
    done = dict(before)
    for prefix, model in (("model.", schema.ModelOptions), ("lora.", schema.LoraOptions), (stage, options)):
        given = {key.removeprefix(prefix): value for key, value in before.items() if key.startswith(prefix)}
        given = {key: value for key, value in given.items() if key in model.model_fields}
        with suppress(ValidationError):  # a key that is no more: each one is told
            made = model.model_validate(given).model_dump(mode="json") if given else {}
            done |= {prefix + key: _strip(made[key], {}, moves=False) for key in made if prefix + key in now}
    return done


def _strip(value: Any, names: Mapping[str, str], *, moves: bool) -> Any:
    """Leave out what changes nothing: how a judge is asked and, where it `moves`, the directory of a file."""
    if isinstance(value, str):
        value = names.get(value, value)
        return value.rstrip("/").rpartition("/")[2] if moves and value.startswith("/") else value
    if isinstance(value, dict):
        return {key: _strip(item, names, moves=moves) for key, item in value.items() if key not in HARMLESS_OF_A_JUDGE}
    return [_strip(item, names, moves=moves) for item in value] if isinstance(value, list) else value


# Keys of files whose bytes are part of the fingerprint (where they lie does not matter), keys that say what is watched,
# kept or shown and never what is trained (a run may resume with these changed), and those of how a judge is asked.
COMPARED_BY_BYTES, HARMLESS, HARMLESS_OF_A_JUDGE = (
    frozenset(TABLES[name]) for name in ("compared by bytes", "harmless", "harmless of a judge")
)


# Learning rate with LoRA, and of all weights.
_LEARNING_RATES = {"sft": (2e-4, 2e-5), "rm": (1e-4, 1e-5), "dpo": (5e-6, 5e-7), "ppo": (1e-5, 1e-6)}
_FROM_SCRATCH = 2.5e-4
_LISTED = 8  # runs of a swept stage that a message names


def resolve(
    recipe: Recipe, stage: str | None = None, *, method: Method | None = None, out: Path | None = None,
    trust_code: bool = False,
) -> Stage:  # fmt: skip
    """Resolve a stage by name, or the only one of a method (else RecipeError); `out` replaces its run directory."""
    section = _pick(recipe, stage, method)
    assert section.top is not None
    options, top = section.options, section.top.options
    scratch = top.model.init == "scratch" and options.start_from is None  # trains all weights, and unquantised
    quantization = "none" if scratch else top.model.quantization
    model = top.model.model_copy(update={"path": find_weights(top.model.path), "quantization": quantization})
    lora, launch, trainer = None if scratch else top.lora, recipe.launch, section.trainer
    if options.method in FEEDBACK:  # rows are made in one process, whatever trains beside it
        launch = launch.model_copy(update={"processes": 1, "nodes": 1, "strategy": "ddp", "offload": "none"})
    if isinstance(options, TrainOptions):
        builtin = top.model.path.startswith("builtin:")
        trainer = _fill_trainer(trainer, options, lora=lora is not None, scratch=scratch, builtin=builtin)
    rewards: dict[str, str] = {}
    sources: dict[str, str] = {}

    def find_made(name: str, found: dict[str, str], file: str = "model") -> str:
        """What a stage makes, the model of a run, anything else as it is; `found` notes what is a stage's."""
        run = section.names.get(name, name)
        if run not in recipe.stages or (file == ROWS and recipe.stages[run].options.method not in FEEDBACK):
            return name if file == ROWS else find_weights(name)
        path = f"{recipe.runs}/{recipe.name}/{run}/{file}"
        found[path] = run
        return path

    def point(part: BaseModel) -> BaseModel:
        """Put the directory or file that a stage makes in the place of its name."""
        if isinstance(part, FeedbackModel | RewardSource) and part.model is not None:
            found = sources if isinstance(part, FeedbackModel) else rewards
            return part.model_copy(update={"model": find_made(part.model, found)})
        if isinstance(part, DataSource):
            return part.model_copy(update={"path": find_made(part.path, sources, ROWS)})
        return part

    started: dict[str, str] = {}
    start = None if options.start_from is None else find_made(options.start_from, started)
    named = options.model_copy(update={"start_from": section.names.get(options.start_from or "", options.start_from)})
    origins: dict[str, str] = {}
    for name, part in (("model", top.model), ("lora", top.lora), ("launch", launch), (section.run, options)):
        origins |= {f"{name}.{key}": "default" for key in (type(part).model_fields if part else ())}
    origins |= {f"{section.run}.{key}": "default" for key in trainer}
    given = section.top.node.value
    shared = {key: given[key] for key in ("name", "seed", "model", "lora", "launch") if key in given}
    return Stage(
        recipe_name=recipe.name, recipe_path=recipe.path, name=section.run, seed=top.seed, model=model, lora=lora,
        launch=launch, options=_replace_parts(named, point), trainer=trainer,
        origins=origins | find_origins({**shared, section.run: section.node}),
        run_dir=str(out) if out else f"{recipe.runs}/{recipe.name}/{section.run}", start_dir=start,
        start_stage=started.get(start or ""), reward_stages=rewards, source_stages=sources, trust_code=trust_code,
        point=section.point, evaluate=recipe.evaluate if getattr(options, "evaluate_every", None) else None,
    )  # fmt: skip


def find_weights(path: str) -> str:
    """The model/ of a run directory; anything else is a model itself."""
    return os.path.join(path, "model") if os.path.isfile(os.path.join(path, "stage.json")) else path


def _replace_parts(value: Any, change: Callable[[BaseModel], BaseModel]) -> Any:
    """Copy a model with `change` done to every model in it, at whatever depth; which fields were given is kept."""
    if isinstance(value, list):
        return [_replace_parts(item, change) for item in value]
    if not isinstance(value, BaseModel):
        return value
    parts = {key: _replace_parts(getattr(value, key), change) for key in type(value).model_fields}
    return change(type(value).model_construct(value.model_fields_set, **parts))


def _fill_trainer(
    given: dict[str, Any], options: TrainOptions, *, lora: bool, scratch: bool, builtin: bool
) -> dict[str, Any]:
    """Complete the TRL fields with alignkit's defaults; `builtin`: for a tiny model that ships with alignkit."""
    with_lora, full = _LEARNING_RATES[options.method]
    defaults: dict[str, Any] = {  # warmup_steps is a share of all steps
        "learning_rate": _FROM_SCRATCH if scratch else with_lora if lora else full, "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03, "max_grad_norm": 1.0, "max_length": 1024, "num_train_epochs": 1.0, "logging_steps": 10,
        "save_steps": 100,
    }  # fmt: skip
    if builtin:  # recomputing activations only pays where they are large
        defaults["gradient_checkpointing"] = False
    if options.method == "ppo":  # Adam's eps as in lm-human-preferences; prompt and answer: max_new_tokens bounds them
        defaults["adam_epsilon"] = 1e-5
        del defaults["max_length"]
    elif options.eval is not None:  # the rollouts of ppo are its evaluation; held-out prompts are for samples
        defaults |= {"eval_strategy": "steps", "eval_steps": 0.1, "eval_on_start": given.get("eval_strategy") != "no"}
    for kind in ("logging", "save", "eval"):
        if given.get(f"{kind}_strategy", "steps") != "steps":
            defaults.pop(f"{kind}_steps", None)
    return {**defaults, **given}


def find_section(recipe: Recipe, name: str, *, said: str | None = None) -> Section:
    """Find the stage of a name, which messages call `said`; raises RecipeError when there is none, or several."""
    said = f"--stage {said or name}"
    if runs := recipe.sweeps.get(name):
        listed = ", ".join(runs[:_LISTED]) + (f", ... ({len(runs)} in all)" if len(runs) > _LISTED else "")
        raise RecipeError(f"{said} is swept, so there are several; name one of them: {listed}", where=recipe.path)
    if name not in recipe.stages:
        hint = suggest(name, recipe.stages) or f"; there are {', '.join(recipe.stages)}"
        raise RecipeError(f"{said}: the recipe has no such stage{hint}", where=recipe.path)
    return recipe.stages[name]


def _pick(recipe: Recipe, stage: str | None, method: Method | None) -> Section:
    if stage is not None:
        return _require_method(recipe, find_section(recipe, stage), (method,) if method else ())
    fitting = [section for section in recipe.stages.values() if method in (None, section.options.method)]
    # A stage of its own goes before those that an rlaif section stands for: they have names to be called by.
    fitting = [section for section in fitting if section.group is None] or fitting
    if len(fitting) != 1:
        kind, names = f"{method} stage" if method else "stage", ", ".join(section.run for section in fitting)
        none = f"no {kind}; its stages are {', '.join(recipe.stages)}"
        found = f"several {kind}s: {names}; name one with --stage" if fitting else none
        raise RecipeError(f"the recipe has {found}", where=recipe.path)
    return fitting[0]


def _require_method(recipe: Recipe, section: Section, methods: Sequence[str]) -> Section:
    if methods and (method := section.options.method) not in methods:
        raise RecipeError(f"--stage {section.run} is a stage of {method}; run `alignkit {method}`", where=recipe.path)
    return section


def pick_steps(recipe: Recipe, name: str | None = None) -> list[str]:
    """List the stages that `alignkit rlaif` runs, in order; RecipeError for none, or too many.
    All of the only rlaif section; with a name, those of that section, or one stage by its name or step (label)."""
    if name is None:
        single = [run for run, stage in recipe.stages.items() if stage.options.method in FEEDBACK]
        several = [*recipe.groups] or single
        if len(several) != 1:
            found = f"the recipe has {'several rlaif sections' if recipe.groups else 'no rlaif section'}"
            named = f": {', '.join(several)}; name one with --stage" if several else ""
            raise RecipeError(found + named, where=recipe.path)
        return list(recipe.groups.get(several[0], single))
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
    return [_require_method(recipe, section, FEEDBACK if section.group is None else ()).run]


def pick_span(recipe: Recipe, first: str | None = None, last: str | None = None) -> list[str]:
    """List the stages that `alignkit run` looks at, in order, from `first` to `last`; RecipeError for other names.
    An rlaif section and a swept stage stand for their first stage in `first`, for their last in `last`."""
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
