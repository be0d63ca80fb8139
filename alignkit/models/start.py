"""Where weights come from, before any is read: configurations, and what a stage starts from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.quantizers import AutoHfQuantizer

from alignkit.errors import AlignKitError, EnvironmentProblem, ModelError, Problem, first_line
from alignkit.models.files import KNOWN, ModelFiles, find_model_dir, fingerprint_weights, inspect_model_dir, is_builtin
from alignkit.models.hub import explain_hub_errors, fetch_adapter
from alignkit.models.scratch import builtin_config, override_config
from alignkit.recipe.schema import OBJECTIVES
from alignkit.recipe.stage import Stage


def read_config(source: str, *, revision: str | None = None, trust_code: bool = False) -> PreTrainedConfig:
    """Read the config of a builtin name, a directory or a hub id; refuse sizes that cannot be meant."""
    if is_builtin(source):
        return builtin_config(source)
    directory = find_model_dir(source)
    place = str(directory / "config.json") if directory else source
    try:
        with explain_hub_errors(source):
            place_or_id = str(directory or source)
            config = AutoConfig.from_pretrained(place_or_id, revision=revision, trust_remote_code=trust_code)
    except AlignKitError:
        raise
    except Exception as error:  # config classes check and compute as they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        remedy = "; put that right" if directory else ""
        raise ModelError(f"is not the config of a model: {reason}{remedy}", where=place) from error
    require_sizes(config, place)
    if not directory or not (directory / "generation_config.json").exists():
        return config
    place = str(directory / "generation_config.json")
    try:
        settings = GenerationConfig.from_pretrained(str(directory)).to_diff_dict()
    except Exception as error:  # it computes with what stands there
        raise ModelError(f"cannot be read: {error}; mend it or take it away", where=place) from error
    given = {name: settings.get(name) for name in KNOWN["generation_numbers"] if settings.get(name) is not None}
    if wrong := [f"{name} is {v!r}" for name, v in given.items() if not isinstance(v, int | float) or not v >= 0]:
        raise ModelError(f"{', '.join(wrong)}; these are numbers from 0; mend it or take it away", where=place)
    return config


def require_sizes(config: PreTrainedConfig, place: str | None) -> None:
    """Raise ModelError for every size of a config that is no positive whole number or larger than can be meant."""
    text = config.get_text_config()
    problems = []
    for name, limit in KNOWN["largest_sizes"].items():
        value = getattr(text, name, None)
        sizes = value if isinstance(value, list) else [value]
        if any(size is not None and (not isinstance(size, int) or not 1 <= size <= limit) for size in sizes):
            own = text.attribute_map.get(name, name)
            problems.append(Problem(f"{own} is {value!r}; it must be a whole number from 1 to {limit:,}", place))
    if problems:
        raise ModelError(problems)


def require_objective(stage: Stage, config: PreTrainedConfig) -> None:
    """Raise ModelError where the stage learns by another kind of model than the config makes."""
    wants = stage.objective is not None and OBJECTIVES[stage.objective].model == "seq2seq"
    if wants == bool(config.is_encoder_decoder):
        return
    found = f"{stage.start_dir or stage.model.path} ({config.model_type})"
    if wants:
        what = f"objective: seq2seq trains an encoder-decoder model, and {found} is a decoder alone"
        remedy = "take one such as T5, Marian or builtin:rnnsearch, or leave the objective out"
    else:
        what = f"{found} is an encoder-decoder model, which only sft with objective: seq2seq trains"
        remedy = "set that, or take a decoder-only model"
    raise ModelError(f"{what}; {remedy}", where=stage.where(f"{stage.name}.objective"))


def require_packages(config: PreTrainedConfig, source: str) -> None:
    """Raise EnvironmentProblem where the packages or devices that a quantised base needs are not here."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    try:
        AutoHfQuantizer.from_config(stored, pre_quantized=True).validate_environment(device_map=None)
    except (ImportError, RuntimeError) as error:
        what = f"{source} has quantised weights that cannot be used here: {first_line(error)}"
        raise EnvironmentProblem(what) from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"its quantization_config cannot be used: {error}", where=source) from error


def know_classifier(config: PreTrainedConfig) -> None:
    """Let transformers' AutoModelForSequenceClassification build a score head on any causal language model.

    Granite, Cohere, OLMoE and others come without such a class. It is made as transformers makes Llama's: the trunk
    and a linear head, read at the last token that is not padding.
    """
    kind = type(config)
    known: Any = AutoModelForSequenceClassification._model_mapping
    if kind in known:
        return
    causal: Any = AutoModelForCausalLM._model_mapping
    trunks = [c for c in causal[kind].__mro__ if c.__name__.endswith("PreTrainedModel")] if kind in causal else []
    if not trunks or trunks[0] is PreTrainedModel:
        raise ModelError(f"a {config.model_type} model cannot be given a score head: transformers knows no trunk of it")
    name = causal[kind].__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"
    made = type(name, (GenericForSequenceClassification, trunks[0]), {"__module__": trunks[0].__module__})
    AutoModelForSequenceClassification.register(kind, made, exist_ok=True)  # else it passes over its own configs


def is_random(stage: Stage) -> bool:
    """Whether the base of a stage is drawn, not read: builtin, or init: scratch."""
    return is_builtin(stage.model.path) or stage.model.init == "scratch"


@dataclass(frozen=True, slots=True)
class Start:
    """Where the weights of a stage come from."""

    base: str  # builtin name, hub id or directory
    revision: str | None
    adapter: Path | None
    reward: bool
    lineage: list[dict[str, Any]]
    head: dict[str, Any] | None = None  # of a classifier


def find_start(stage: Stage) -> Start:
    """Say what the stage starts from, adapters apart from their base, everything inspected before it is opened."""
    source = stage.start_dir or stage.model.path
    revision = None if stage.start_dir else stage.model.revision
    directory = find_model_dir(source)
    if directory is None and not is_builtin(source):
        directory = fetch_adapter(source, revision)
    if not stage.start_dir and is_random(stage):
        entry = {"role": "base", "path": source, "seed": stage.seed, "config": stage.model.config}
        return Start(source, revision, None, False, [entry])
    if stage.model.config and not stage.start_dir:
        what = "model.config changes only random weights; set model.init: scratch or leave it out"
        raise ModelError(what, where=stage.where("model.config"))
    if directory is None:
        return Start(source, revision, None, False, [{"role": "base", "path": source, "revision": revision}])
    files = inspect_model_dir(directory, trust_code=stage.trust_code)
    if files.kind == "full":
        lineage = [*files.record.get("lineage", []), {"role": "model", "path": str(directory)}]
        return Start(str(directory), None, None, files.reward, lineage, files.head)
    base = find_base(files)
    if stage.start_dir:
        _check_same_base(files, base, stage)
    lineage = files.record.get("lineage") or [{"role": "base", "path": base}]
    return Start(base, files.base_revision, directory, files.reward, lineage, files.head)


def choose_action(stage: Stage, start: Start) -> str:
    """Choose new, continue, merge or stack; refuse what would lose the adapter or have no effect."""
    where = stage.where(f"{stage.name}.adapter")
    wanted = stage.training.adapter
    if start.adapter is None:
        if wanted is not None:
            raise ModelError(f"adapter: {wanted} has no effect: the stage does not start from an adapter", where=where)
        return "new"
    if stage.lora is None and wanted != "merge":
        what = f"{start.adapter} is an adapter but there is no lora: section; add lora: to train it on, or adapter: "
        raise ModelError(f"{what}merge to fold it into the base and train that in full", where=where)
    if wanted == "merge":
        require_mergeable(start.lineage, where)
    return wanted or "continue"


def require_mergeable(lineage: list[dict[str, Any]], where: str) -> None:
    """Raise ModelError for an adapter that began as what its 4-bit base has lost: full weights have lost nothing."""
    if any(entry.get("init") == "loftq" for entry in lineage):
        raise ModelError("an adapter of init_lora_weights: loftq cannot be merged into full weights", where=where)


def context_length(stage: Stage, *, rotary: bool = True) -> int | None:
    """The positions of the model a stage starts from; None where its config names no limit.

    With `rotary` False also of a model that computes them: it reads longer texts, if not as it has learnt to.
    """
    start = find_start(stage)
    config = read_config(start.base, revision=start.revision, trust_code=stage.trust_code)
    if is_random(stage) and start.base == stage.model.path:
        config = override_config(config, stage.model.config, where=stage.where("model.config"))
    text = config.get_text_config()
    if not rotary and getattr(text, "rope_parameters", None):
        return None
    positions = getattr(text, "max_position_embeddings", None)
    return int(positions) if positions else None


def find_base(files: ModelFiles) -> str:
    """Find where the base of an adapter is: as written, or `base/` beside it when the run was moved."""
    assert files.base is not None
    if is_builtin(files.base):
        raise ModelError(f"{files.path} names {files.base} as its base, which has no files; train it again")
    if Path(files.base).is_dir():
        return files.base
    beside = files.path.parent / "base"
    if Path(files.base).name == "base" and beside.is_dir():
        return str(beside)
    try:
        find_model_dir(files.base)
    except ModelError as error:
        what = f"its base {files.base} is gone; put it back or edit base_model_name_or_path"
        raise ModelError(what, where=str(files.path)) from error
    return files.base  # a hub id


def is_same_model(one: str, other: str) -> bool:
    """Tell by name, place or weights whether two names mean one model."""
    here, there = (None if is_builtin(name) else find_model_dir(name) for name in (one, other))
    if one == other or here is None or there is None:
        return one == other
    return here.resolve() == there.resolve() or fingerprint_weights(here) == fingerprint_weights(there)


def _check_same_base(files: ModelFiles, base: str, stage: Stage) -> None:
    """Refuse an adapter of another model than the recipe's: told by name, by our record, or by the weights' bytes."""

    def canonical(path: str) -> str:
        local = Path(path).expanduser()
        return str(local.resolve()) if path and not is_builtin(path) and local.exists() else path

    wanted = stage.model.path
    local = find_model_dir(base)
    of_base = inspect_model_dir(local, trust_code=True).record if local else {}
    recorded = [*files.record.get("lineage", []), *of_base.get("lineage", [])]
    same_name = [entry for entry in recorded if canonical(entry.get("path", "")) == canonical(wanted)]
    drawn_alike = all(entry.get("config", {}) == stage.model.config for entry in same_name if "seed" in entry)
    if (same_name and drawn_alike) or is_same_model(base, wanted):
        return
    roots = [entry["path"] for entry in recorded[:1]] or [base]
    config = f" with model.config {same_name[0].get('config')}" if same_name else ""
    what = f"the adapter in {files.path} was trained on {roots[0]}{config}, not on model.path {wanted}; set model.path "
    where = stage.where(f"{stage.name}.start_from")
    raise ModelError(f"{what}(and model.config) to its base, or start from another stage", where=where)
