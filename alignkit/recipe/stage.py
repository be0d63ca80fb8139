"""A validated recipe and its resolved stage: plain data, frozen and serialisable, without YAML, torch or files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from pydantic import BaseModel

from alignkit.errors import Problem
from alignkit.recipe.schema import (
    EvaluateOptions,
    LaunchOptions,
    LoraOptions,
    Method,
    ModelOptions,
    RecipeOptions,
    StageOptions,
    TrainOptions,
)
from alignkit.recipe.trl_fields import KTO_LOSSES, method_fields


@dataclass(frozen=True)
class StageSection:
    """One stage as the recipe gives it: alignkit's options with their defaults, TRL's fields only where given."""

    name: str
    options: StageOptions
    trainer: Mapping[str, Any]
    top: RecipeOptions  # the recipe's top level as this stage reads it: seed, model and lora may be swept
    origins: Mapping[str, str]  # places of what is in force for it: {"model.path": "recipes/a.yaml:3"}
    names: Mapping[str, str] = field(default_factory=dict)  # which run of a swept stage it means by the stage's name
    group: str | None = None  # the rlaif section that it is a step of
    point: Mapping[str, Any] = field(default_factory=dict)  # its values of what is swept: {"dpo.beta": 0.05}


@dataclass(frozen=True)
class Recipe:
    """What one recipe file says. `origins` maps dotted keys to places: {"dpo.beta": "recipes/a.yaml:7"}."""

    name: str
    path: str  # as messages show it: relative to the working directory when it is below it
    seed: int
    model: ModelOptions
    lora: LoraOptions | None
    launch: LaunchOptions
    stages: Mapping[str, StageSection]  # those under `stages:` first and in that order, then as written
    order: tuple[str, ...]  # what `alignkit run` trains: those under `stages:`, all of them where it is omitted
    origins: Mapping[str, str]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # stages of each rlaif section, in order
    sweeps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # variants of each swept stage, by plain name
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    evaluates: bool = False  # `evaluate:` is written out: `alignkit run` measures at its end

    @property
    def stage_names(self) -> list[str]:
        return list(self.stages)


def check_batch(stage: Stage, num_processes: int) -> Problem | None:
    """Say what is wrong with `batch_size` for so many processes, None when each gets the same number of rows."""
    options = stage.options
    if not isinstance(options, TrainOptions):
        return None
    micro = options.micro_batch_size
    divisor = num_processes * (1 if micro == "auto" else micro)
    if options.batch_size % divisor == 0:
        return None
    several = f"{num_processes} processes" if num_processes > 1 else "one process"
    shared = several if micro == "auto" else f"{several} with micro_batch_size {micro}"
    return Problem(
        f"{stage.name}.batch_size is {options.batch_size}, which {shared} cannot divide; "
        f"make it a multiple of {divisor}",
        stage.where(f"{stage.name}.batch_size"),
    )


_Options = TypeVar("_Options", bound=StageOptions)


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe with every value in force.

    `options` are alignkit's own keys, `trainer` the TRL fields in force under TRL's names (given in the recipe,
    or alignkit's defaults where they differ from TRL's). `origins` maps every dotted key to where its value
    came from: "recipes/a.yaml:7", "--set", "default", or "trl" for a default of TRL's config class.
    """

    recipe_name: str
    recipe_path: str
    name: str
    seed: int
    model: ModelOptions
    lora: LoraOptions | None
    launch: LaunchOptions
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

    @property
    def objective(self) -> str | None:
        """The name in OBJECTIVES of what an sft stage learns; None for other methods."""
        return getattr(self.options, "objective", None)

    @property
    def is_unpaired(self) -> bool:
        """Whether a dpo stage learns from single answers, with TRL's KTOTrainer."""
        losses = self.trainer.get("loss_type", [])
        return self.method == "dpo" and bool(set(KTO_LOSSES) & {*([losses] if isinstance(losses, str) else losses)})

    def expect(self, kind: type[_Options]) -> _Options:
        """The options as the given class; a wrong class is a bug, not a user's mistake."""
        if not isinstance(self.options, kind):
            raise TypeError(f"stage {self.name} is a {self.method} stage, not {kind.__name__}")
        return self.options

    def to_dict(self) -> dict[str, Any]:
        """Plain data for stage.json and --dry-run."""
        values: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            values[{"recipe_name": "recipe", "name": "stage"}.get(one.name, one.name)] = (
                value.model_dump()
                if isinstance(value, BaseModel)
                else dict(value)
                if isinstance(value, Mapping)
                else value
            )
            if one.name == "name":
                values["method"] = self.method
        return values

    def fingerprint_values(self) -> dict[str, Any]:
        """List, flat and dotted, every value that can change the weights.

        Two runs with equal values here and equal data, base and template bytes train the same model.
        """
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
        last = {key: key.split(".")[-1] for key in kept}
        return {
            key: _strip(value, moves=last[key] in COMPARED_BY_BYTES)
            for key, value in kept.items()
            if last[key] not in HARMLESS
        }


def _strip(value: Any, *, moves: bool) -> Any:
    """Leave out what changes nothing: how a judge is asked and, where it `moves`, the directory of a file."""
    if isinstance(value, dict):
        return {key: _strip(item, moves=moves) for key, item in value.items() if key not in HARMLESS_OF_A_JUDGE}
    if moves and isinstance(value, str) and value.startswith("/"):
        return value.rstrip("/").rpartition("/")[2]
    return [_strip(item, moves=moves) for item in value] if isinstance(value, list) else value


# Keys of files whose bytes are part of the fingerprint: where they lie does not matter.
COMPARED_BY_BYTES = frozenset({"start", "start_from", "path", "data", "eval", "reward"})


HARMLESS_OF_A_JUDGE = frozenset(
    {
        "concurrency", "requests_per_minute", "timeout", "retries", "max_tokens_total", "max_cost", "price",
        "api_key_env",
    }
)  # fmt: skip


# Keys that say what is watched, kept or shown, never what is trained: a run may resume with these changed.
HARMLESS = frozenset(
    {
        "keep_checkpoints", "samples", "eval_on_start", "eval_strategy", "eval_steps", "eval_delay", "logging_steps",
        "logging_strategy", "logging_first_step", "logging_dir", "report_to", "run_name", "project",
        "trackio_space_id", "save_steps", "save_strategy", "disable_tqdm", "log_level", "log_level_replica",
        "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
        "dataloader_persistent_workers", "per_device_eval_batch_size", "max_truncated",
        "include_num_input_tokens_seen", "gold", "reward_timeout",
    }
)  # fmt: skip
