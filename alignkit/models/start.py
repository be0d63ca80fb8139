"""Where weights come from, before any is read: configurations, what a stage starts from, and what is made of nothing.

Made are the embedded tiny models with their tokenizer, tokenizers learnt from rows, and random weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.quantizers import AutoHfQuantizer

from alignkit.errors import AlignKitError, EnvironmentProblem, ModelError, Problem, first_line, suggest
from alignkit.models.files import (
    BUILTIN_PREFIX,
    KNOWN,
    ModelFiles,
    find_model_dir,
    fingerprint_weights,
    inspect_model_dir,
    is_builtin,
    require_available,
)
from alignkit.models.hub import explain_hub_errors, fetch_adapter
from alignkit.models.rnnsearch import RnnSearchConfig
from alignkit.recipe.methods import OBJECTIVES
from alignkit.recipe.stage import Stage
from alignkit.runs.directory import require_whole

END_OF_TEXT, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
_MERGES = Path(__file__).with_name("tiny_merges.txt")
_POSITIONS = 512
_START_TOKENS = ["<pad>", "</s>", "<unk>"]


def read_config(source: str, *, revision: str | None = None, trust_code: bool = False) -> PreTrainedConfig:
    """Read the config of a builtin name, a directory or a hub id; refuse sizes that cannot be meant."""
    if is_builtin(source):
        return builtin_config(source)
    require_available(source)
    directory = find_model_dir(source)
    place, name = str(directory / "config.json") if directory else source, str(directory or source)
    try:
        with explain_hub_errors(source):
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_code)
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
    what = f"objective: seq2seq trains an encoder-decoder model, and {found} is a decoder alone; take one such as T5, "
    what += "Marian or builtin:rnnsearch, or leave the objective out"
    if not wants:
        what = f"{found} is an encoder-decoder model, which only sft with objective: seq2seq trains; set that, or take "
        what += "a decoder-only model"
    raise ModelError(what, where=stage.where(f"{stage.name}.objective"))


def require_packages(config: PreTrainedConfig, source: str) -> None:
    """Raise EnvironmentProblem where the packages or devices that a quantised base needs are not here."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    try:
        AutoHfQuantizer.from_config(stored, pre_quantized=True).validate_environment(device_map=None)
    except (ImportError, RuntimeError) as error:
        said = first_line(error)
        raise EnvironmentProblem(f"{source} has quantised weights that cannot be used here: {said}") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"its quantization_config cannot be used: {error}", where=source) from error


def know_classifier(config: PreTrainedConfig) -> None:
    """Let transformers' AutoModelForSequenceClassification build a score head on any causal language model.
    Granite, Cohere, OLMoE and others come without such a class. It is made as transformers makes Llama's: the trunk
    and a linear head, read at the last token that is not padding."""
    kind, causal = type(config), AutoModelForCausalLM._model_mapping
    if kind in AutoModelForSequenceClassification._model_mapping:
        return
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
    source, revision = stage.start_dir or stage.model.path, None if stage.start_dir else stage.model.revision
    require_available(source)
    directory = find_model_dir(source) or (None if is_builtin(source) else fetch_adapter(source, revision))
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
    where, wanted = stage.where(f"{stage.name}.adapter"), stage.training.adapter
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
    """The positions of a stage's model, None without a limit; `rotary` False also where they are computed on and on."""
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
    """Find where the base of an adapter is: as written, or where it went when its run, or a whole recipe's, was moved.
    Raises ModelError when it is gone, RunError when a run made it and its bytes have changed since."""
    assert files.base is not None
    if is_builtin(files.base):
        raise ModelError(f"{files.path} names {files.base} as its base, which has no files; train it again")
    written, run_dir = Path(files.base), files.path.absolute().parent
    beside = (run_dir / "base", run_dir.parent / written.parent.name / "base") if written.name == "base" else ()
    for place in (written, *beside):
        if place.is_dir():
            if place.absolute().parent != run_dir:  # else it was verified with the adapter
                require_whole(place)
            return files.base if place is written else str(place)
    try:
        find_model_dir(files.base)
    except ModelError as error:
        what = f"its base {files.base} is gone; put it back"
        if not (run_dir / "stage.json").is_file():  # the files of a run are verified: none can be edited
            what += " or edit base_model_name_or_path"
        raise ModelError(what, where=str(files.path)) from error
    return files.base  # a hub id


def is_same_model(one: str, other: str) -> bool:
    """Tell by name, place or weights whether two names mean one model."""
    here, there = find_model_dir(one), find_model_dir(other)
    if one == other or here is None or there is None:
        return one == other
    return here.resolve() == there.resolve() or fingerprint_weights(here) == fingerprint_weights(there)


def _check_same_base(files: ModelFiles, base: str, stage: Stage) -> None:
    """Refuse an adapter of another model than the recipe's: told by name, by our record, or by the weights' bytes."""

    def canonical(path: str) -> str:
        local = Path(path).expanduser()
        return str(local.resolve()) if path and not is_builtin(path) and local.exists() else path

    wanted, local = stage.model.path, find_model_dir(base)
    of_base = inspect_model_dir(local, trust_code=True).record if local else {}
    recorded = [*files.record.get("lineage", []), *of_base.get("lineage", [])]
    same_name = [entry for entry in recorded if canonical(entry.get("path", "")) == canonical(wanted)]
    drawn_alike = all(entry.get("config", {}) == stage.model.config for entry in same_name if "seed" in entry)
    if (same_name and drawn_alike) or is_same_model(base, wanted):
        return
    roots = [entry["path"] for entry in recorded[:1]] or [base]
    config = f" with model.config {same_name[0].get('config')}" if same_name else ""
    what = f"the adapter in {files.path} was trained on {roots[0]}{config}, not on model.path {wanted}; set model.path "
    what += "(and model.config) to its base, or start from another stage"
    raise ModelError(what, where=stage.where(f"{stage.name}.start_from"))


def builtin_config(path: str) -> PreTrainedConfig:
    """Make the configuration behind `builtin:NAME`; a ModelError names the nearest name that exists."""
    find_model_dir(path)
    tokenizer, name = builtin_tokenizer(), path.removeprefix(BUILTIN_PREFIX)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if name.startswith("rnn"):
        return RnnSearchConfig(attention=name == "rnnsearch")
    # GPT-2 has about 0.32 M parameters and no dropout: two forward passes of the same weights are equal in every stage;
    # Llama about 0.16 M, grouped-query attention and an untied head.
    return AutoConfig.for_model(**KNOWN["builtin_models"][name], **ids)


def builtin_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer of every builtin model: 256 bytes, 252 merges, four control tokens, no BOS."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend_json()), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
        pad_token=PAD, extra_special_tokens=[IM_START, IM_END], model_max_length=_POSITIONS,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@cache
def _backend_json() -> str:  # a text, so that every caller gets an object of its own to change
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(pair[0], pair[1]) for pair in map(str.split, _MERGES.read_text(encoding="utf-8").splitlines())]
    tokens = alphabet + [left + right for left, right in merges]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (END_OF_TEXT, PAD, IM_START, IM_END)])
    return backend.to_str()


def learn_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> str:
    """Learn words, or byte-level BPE (Sennrich et al. 2016), commonest first, as JSON; equal texts give equal bytes."""
    options: Any = {"vocab_size": vocab_size, "special_tokens": _START_TOKENS, "show_progress": False}
    if kind == "builtin:words":
        backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer: Any = trainers.WordLevelTrainer(**options)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**options, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def learnt_tokenizer(backend: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of what `learn_tokenizer` gave; like T5's it has no BOS."""
    pad, eos, unknown = _START_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend), pad_token=pad, eos_token=eos, unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def override_config(
    config: PreTrainedConfig, overrides: dict[str, Any], *, where: str | None = None
) -> PreTrainedConfig:
    """Make a config with the overrides in force; `hidden_size` and GPT-2's `n_embd` are one attribute."""
    values = {key: value for key, value in config.to_dict().items() if key not in KNOWN["no_architecture"]}
    known = set(values) | set(config.attribute_map)
    if unknown := [name for name in overrides if name not in known]:
        of = f"in a {config.model_type} model"
        raise ModelError(Problem(f"model.config has no {it!r} {of}{suggest(it, known)}", where) for it in unknown)
    renamed = {config.attribute_map.get(name, name): value for name, value in overrides.items()}
    if renamed.keys() & {"hidden_size", "num_attention_heads"} and "head_dim" not in renamed:
        values.pop("head_dim", None)  # derived from the two
    try:
        return type(config)(**values | renamed)
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"model.config does not fit a {config.model_type} model: {reason}", where=where) from error


def choose_family(config: PreTrainedConfig, *, reward: bool = False) -> Any:
    """Choose the class of transformers that makes a reward model or a language model of a config."""
    if reward:
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def random_model(
    config: PreTrainedConfig, *, seed: int, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Draw a language model on the CPU in float32 and cast it; equal seeds give equal bytes."""
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return choose_family(config).from_config(config, dtype=torch.float32, **options).to(dtype)
        except ValueError as error:
            raise ModelError(f"model.config does not make a {config.model_type} model: {error}") from error
