"""Adapters of PEFT on a base: a new one, one that goes on, one below another, and its frozen copy.

An adapter directory is never given to AutoModel, which would load it in a way that a later wrap silently throws away.
"""

import copy
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, EvaConfig, PeftConfig, PeftModel, get_peft_model
from peft import initialize_lora_eva_weights as begin_eva
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from peft.utils.loftq_utils import _SafetensorLoader
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignkit.errors import ModelError, Problem, first_line
from alignkit.recipe.stage import Stage
from alignkit.recipe.words import adapter_fields

TRAINED, START, REFERENCE = "default", "start", "ref"  # adapter names
_LARGEST_RANK = 2**16
# What PEFT calls the weights that it puts beside the base's own; VeRA's two matrices are common to all layers.
_ADDED = re.compile(r"\.(lora_|vera_|oft_|ia3_|modules_to_save\.|trainable_tokens_delta\.)")
# Keys of `lora:` that an adapter which goes on may have otherwise: they say how one begins, or how it is trained.
_NOT_HELD = {"dropout", "modules_to_save", "trainable_token_indices", "projection_prng_key", "d_initial", "use_dora"}
_DRAWN = ("gaussian", "orthogonal", "eva")  # B A is zero: the base alone is the start
_SCALES = {"r", "alpha", "use_rslora", "rank_pattern", "alpha_pattern"}


def is_adapter(name: str) -> bool:
    """Whether a weight of an adapted model is saved with an adapter."""
    return _ADDED.search(name) is not None


def adapt(
    model: PreTrainedModel, stage: Stage, action: str, directory: Path | None, *, reward: bool,
    tokens: Sequence[int] = (), parts: Path | None = None,
) -> PeftModel:  # fmt: skip
    """Wrap a base as the stage trains it, with the embeddings of `tokens`; what is random is drawn from its seed.
    new, merge  a fresh adapter: the model still computes what the base does
    continue    the adapter of `directory`; a policy's goes on as a reward model's with a fresh score head
    stack       a fresh one on top of that of `directory`, which is frozen; both are active
    `parts` is the file of an adapter that begins as parts of the weights (`_take_parts`). Raises ModelError for `lora:`
    that does not fit the model or the adapter, and for tensors that do not fit the base."""
    assert stage.lora is not None
    name, known, init = TRAINED, _list_names(model), stage.lora.init_lora_weights
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    below = directory if action in ("continue", "stack") else None
    rows: Any = None
    try:
        if below is None:
            first = upper = _new_config(model, stage, reward=reward, tokens=tokens)
        else:
            first = _stored_config(model, below, reward=reward, trainable=action == "continue")
        if action == "continue":
            _check_shape(first, stage, directory)
            if hasattr(first, "lora_dropout"):
                first.lora_dropout = stage.lora.dropout
            rows = getattr(first, "trainable_token_indices", None)
            if tokens and rows is None:
                first.trainable_token_indices = _name_tokens(model, tokens)
            elif tokens and not set(tokens) <= {token for some in rows.values() for token in some}:
                raise ModelError("has trained the rows of other tokens; use adapter: merge", where=str(directory))
        elif action == "stack":
            name, upper = START, _new_config(model, stage, reward=reward)
            able = all(config.peft_type == "LORA" and not config.use_dora for config in (first, upper))
            if tokens or not able or first.trainable_token_indices or init not in (None, "gaussian"):
                what = "adapter: stack adds two low-rank updates: no other type of adapter, no DoRA, no tokens, no"
                raise ModelError(f"{what} init_lora_weights but gaussian; use continue or merge", where=str(directory))
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(stage.seed)
            wrapped = _wrap(model, first, name)
            if below is not None:
                _fill(wrapped, below, name, reward=reward, new=(".token_adapter.",) if tokens and rows is None else ())
            if action == "stack":
                wrapped.add_adapter(TRAINED, upper)
                _copy(wrapped, START, TRAINED, ".modules_to_save.")  # the score head starts from the lower adapter's
            elif below is None and parts is not None and init not in (None, *_DRAWN):
                lower = copy.deepcopy(upper)
                lower.trainable_token_indices, lower.modules_to_save, lower.lora_dropout = None, None, 0.0
                if init != "loftq":
                    wrapped.add_adapter(START, lower)
                _take_parts(wrapped, str(init), parts)
        if action != "continue":
            _require_matches(wrapped, stage, known)
    except (ValueError, TypeError, re.error) as error:  # PEFT's for names that match nothing, and for odd patterns
        said, fields = first_line(error), adapter_fields(stage.lora.adapter_type).items()
        key = next((ours for ours, (theirs, _) in fields if re.search(rf"\b{theirs}\b", said)), "target_modules")
        there = "; set lora.dropout: 0 or name layers without experts" if key == "dropout" else f"; {known}"
        raise ModelError(f"lora does not fit the model: {said}{there}", where=stage.where(f"lora.{key}")) from error
    if START in wrapped.peft_config:
        activate(wrapped, [START, TRAINED])
    of_ppo = wrapped.peft_config[TRAINED]
    if stage.method == "ppo" and (of_ppo.peft_type != "LORA" or of_ppo.trainable_token_indices or init == "eva"):
        what = "the roles of ppo are LoRA adapters of one base: no other type, no eva, no rows of tokens; start from"
        raise ModelError(f"{what} it with adapter: merge, or leave lora: out", where=stage.where("lora.adapter_type"))
    return wrapped


@torch.no_grad()
def _take_parts(model: PeftModel, kind: str, file: Path) -> None:
    """Let the adapter begin as parts of the weights: PiSSA (arXiv 2404.02948), OLoRA (arXiv 2406.01775).
    The papers take the parts off the weights: W - s B0 A0 + s B A. Here W stays whole, for the reference and for what
    is saved, and a frozen adapter START takes them off. Both are saved as one plain adapter of rank 2 r, which belongs
    to the same base. LoftQ (arXiv 2310.08659): parts of what the codes of a 4-bit base have lost, which are added. One
    process computes the parts; a resumed run reads them, for no two machines agree on an SVD."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            source = model.get_base_model().name_or_path
            # PEFT's own LoftQ (0.21) needs cuda and does not divide by the scale; its reader of weights is private.
            full = _SafetensorLoader(model, source if Path(source).is_dir() else None) if kind == "loftq" else None
            for name, layer in layers.items():
                base = layer.get_base_layer()
                weight = base.weight
                if not isinstance(base, torch.nn.Linear | Conv1D) or (kind == "olora" and isinstance(base, Conv1D)):
                    raise ModelError(f"lora.init_lora_weights: {kind} cannot split {name} ({type(base).__name__})")
                if full is None:
                    whole = weight.data.clone()  # PEFT takes the parts off in place
                else:
                    lost = full.get_tensor(f"{name.removeprefix('base_model.model.')}.weight").to(weight.device)
                    whole = lost.float() - dequantize_module_weight(base).float()
                base.weight = torch.nn.Parameter(whole, requires_grad=False)
                if kind == "olora":
                    layer.olora_init(TRAINED)
                else:
                    layer.pissa_init(TRAINED, "pissa" if full else kind)
                base.weight = weight
            state = get_peft_model_state_dict(model, adapter_name=TRAINED, save_embedding_layers=False)
            draft = file.with_suffix(".draft")
            save_file({key: value.contiguous() for key, value in state.items() if ".lora_" in key}, draft)
            draft.rename(file)
    stored = load_file(file)
    for name, layer in layers.items():
        for adapter, sign in ((TRAINED, 1), (START, -1))[: len(layer.lora_A)]:
            layer.lora_A[adapter].weight.data.copy_(stored[f"{name}.lora_A.weight"])
            layer.lora_B[adapter].weight.data.copy_(sign * stored[f"{name}.lora_B.weight"])


def begin_by_data(model: PeftModel, batches: Iterable[dict[str, Any]]) -> None:
    """Let the A of a new adapter begin along what varies most in a layer's inputs (EVA, arXiv 2410.07170)."""
    if any(bool(weight.any()) for name, weight in model.named_parameters() if ".lora_B." in name):
        return  # it goes on
    kept = ("input_ids", "attention_mask", "labels")
    loader = [{name: batch[name] for name in kept if name in batch} for batch in batches]

    def forward(model: Any, inputs: dict[str, Any]) -> Any:  # with a cache, for which no tokens are packed
        return model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=True)

    with torch.no_grad():
        begin_eva(model, loader, forward_fn=forward, gather_distributed_inputs=False, show_progress_bar=False)


def copy_adapter(model: PeftModel, source: str, name: str) -> None:
    """Add an adapter that starts as a copy of another one, dtype included; which one acts is the caller's business."""
    model.add_adapter(name, model.peft_config[source])
    _copy(model, source, name)


def _copy(model: PeftModel, source: str, target: str, kind: str = ".") -> None:
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        other = parameters.get(f"{name}.".replace(f".{source}.", f".{target}.").removesuffix("."))
        if f".{source}." in f"{name}." and kind in name and other is not None:
            other.data = parameter.data.clone()


def add_scoring_adapter(model: PeftModel, directory: Path, name: str) -> torch.Tensor:
    """Put the adapter of a reward model, without its head, on the base of a policy; give the head's weight, (1, H)."""
    base = model.get_base_model()
    config = _stored_config(base, directory, reward=False, trainable=False)
    config.modules_to_save = None  # the head lies outside of a policy
    head = [tensor for key, tensor in read_adapter(directory).items() if key.endswith("score.weight")]
    if len(head) != 1:
        raise ModelError("holds no score head; it is not a reward model's adapter", where=str(directory))
    model.add_adapter(name, config)
    _fill(model, directory, name, reward=False, only=".lora_")
    return head[0]


def attach_frozen(model: PreTrainedModel, directory: Path, *, reward: bool) -> PeftModel:
    """Wrap a base with a stored adapter for use, not for training."""
    config = _stored_config(model, directory, reward=reward, trainable=False)
    wrapped = _wrap(model, config, TRAINED)
    _fill(wrapped, directory, TRAINED, reward=reward)
    return wrapped.requires_grad_(False).eval()


def _wrap(model: PreTrainedModel, config: PeftConfig, name: str) -> PeftModel:
    """PEFT's own, but that a head of which it trains rows still has its bias, which TRL's fused head asks for."""
    wrapped = get_peft_model(model, config, adapter_name=name)
    head = wrapped.get_base_model().get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.__dict__["bias"] = head.original_module.bias
    return wrapped


def activate(model: PeftModel, names: list[str]) -> None:
    """Make the named adapters act together, which PeftModel.set_adapter cannot; only `default` trains."""
    model.set_adapter(names[-1])  # modules trained in full cannot act together: the last adapter's do
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.requires_grad = f".{TRAINED}." in f"{name}."


def cast_adapters(model: PeftModel, dtype: torch.dtype) -> None:
    """Hold a quantised base's adapters in the dtype it computes in, but magnitudes: DoRA's updates are too small."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name and "magnitude" not in name and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def read_adapter(directory: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter directory."""
    try:
        return load_file(directory / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(directory / "adapter_model.safetensors")) from error


def _name_tokens(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, list[int]]:
    """Say which rows of which matrices PEFT trains beside the adapter: the embeddings' and those of an untied head."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    untied = head if head is not None and head.weight is not embeddings.weight else embeddings
    return {name: list(tokens) for name, module in model.named_modules() if module is embeddings or module is untied}


def _new_config(model: PreTrainedModel, stage: Stage, *, reward: bool, tokens: Sequence[int] = ()) -> PeftConfig:
    options = stage.lora
    assert options is not None
    if not isinstance(options.target_modules, str | None) and "lm_head" in options.target_modules:
        what = "lora.target_modules names lm_head, which is never adapted; use all-linear"
        raise ModelError(what, where=stage.where("lora.target_modules"))
    given, known = options.model_dump(), adapter_fields(options.adapter_type)
    # PEFT adds the score head of a SEQ_CLS adapter to modules_to_save.
    values = {theirs: given[ours] for ours, (theirs, _) in known.items() if given.get(ours) not in (None, [], {})}
    if values.get("lora_alpha") == int(options.alpha):
        values["lora_alpha"] = int(options.alpha)
    if options.adapter_type == "dora":
        values["use_dora"] = True
    if options.adapter_type == "oft" and options.r:  # PEFT takes one of the two, and the size by default
        values.setdefault("oft_block_size", 0)
    if options.target_modules == "all-linear" and "layers_to_transform" in values:  # PEFT wants names with it
        heads = {model.get_output_embeddings(), getattr(model, "score", None)}
        linear = (torch.nn.Linear, Conv1D)
        found = {name for name, module in model.named_modules() if isinstance(module, linear) and module not in heads}
        values["target_modules"] = sorted({name.split(".")[-1] for name in found})
    if options.init_lora_weights in _DRAWN:
        values["init_lora_weights"] = options.init_lora_weights
    if options.init_lora_weights == "eva":
        values["eva_config"] = EvaConfig(rho=1.0)  # ranks stay as they are asked for
    if tokens:
        values["trainable_token_indices"] = _name_tokens(model, tokens)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING["LORA" if options.adapter_type == "dora" else options.adapter_type.upper()]
    return kind(**values, **_describe(model, reward=reward))


def _describe(model: PreTrainedModel, *, reward: bool) -> dict[str, Any]:
    """What a config says of its model; that GPT-2's layers are transposed PEFT would find out, with a warning each."""
    kind = "SEQ_CLS" if reward else "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return {"task_type": kind, "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules())}


def _stored_config(model: PreTrainedModel, directory: Path, *, reward: bool, trainable: bool) -> Any:
    place = str(directory / "adapter_config.json")
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # PEFT hands what stands there to a dataclass
        raise ModelError(f"is not the config of an adapter: {error}", where=place) from error
    if config.peft_type not in ("LORA", "VERA", "OFT", "IA3"):
        what = f"holds a {config.peft_type} adapter; only LoRA, VeRA, OFT and IA3 adapters can be used"
        raise ModelError(what, where=str(directory))
    least = 0 if config.peft_type == "OFT" else 1
    if hasattr(config, "r") and not (isinstance(config.r, int) and least <= config.r <= _LARGEST_RANK):
        raise ModelError(f"r is {config.r!r}; it must be a whole number from 1 to {_LARGEST_RANK:,}", where=place)
    config.inference_mode = not trainable
    config.base_model_name_or_path = model.name_or_path  # a moved base is found again, see load.find_base
    vars(config).update(_describe(model, reward=reward))
    if reward and config.modules_to_save:  # the LM head of a policy, trained in full, is no part of a reward model
        config.modules_to_save = [name for name in config.modules_to_save if name.split(".")[-1] != "lm_head"] or None
    if reward and isinstance(rows := getattr(config, "trainable_token_indices", None), dict):
        config.trainable_token_indices = {name: some for name, some in rows.items() if name != "lm_head"}
    return config


def _fill(model: PeftModel, directory: Path, name: str, *, reward: bool, new: Any = (), only: str = "") -> None:
    """Copy stored tensors into an adapter; every one must find its place, and every place but `new` ones its tensor."""
    unused = ".lm_head." if reward else "\0"
    stored = {key: value for key, value in read_adapter(directory).items() if only in key and unused not in key}
    places = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    wrong = [key for key in stored if key not in places or places[key].shape != stored[key].shape]
    may_miss = (*new, ".score.", ".token_adapter.") if reward else new
    unfilled = [key for key in places if key not in stored and not any(part in key for part in may_miss)]
    if wrong or unfilled:
        what = f"the adapter does not fit its base: {len(wrong)} of its tensors have no place, {len(unfilled)} are "
        what += f"missing (first {(wrong or unfilled)[0]}); load it on the base it was trained on"
        raise ModelError(what, where=str(directory))
    # PEFT wants every saved module in the state; a new head stays what it is.
    new_head = {key: place for key, place in places.items() if key not in stored}
    if not model.get_input_embeddings().weight.is_meta:
        set_peft_model_state_dict(model, stored | new_head, adapter_name=name)


def _check_shape(config: Any, stage: Stage, directory: Path | None) -> None:
    """Refuse `lora:` values that a continued adapter would silently ignore."""
    options: Any = stage.lora
    kind = "dora" if getattr(config, "use_dora", False) else str(config.peft_type.value).lower()
    wanted = "dora" if options.use_dora else options.adapter_type
    found: dict[str, tuple[Any, Any]] = {"adapter_type": (wanted, kind)}
    held = {*options.model_fields_set, "r", "alpha", "use_rslora"} - _NOT_HELD
    if str(options.init_lora_weights)[:5] in ("pissa", "olora") and getattr(config, "r", 0) == 2 * options.r:
        held -= _SCALES  # saved with both parts, as one of scale 1
    for ours, (theirs, _) in adapter_fields(kind).items() if wanted == kind else ():
        asked, has = getattr(options, ours), getattr(config, theirs)
        if ours in held and isinstance(asked, str) == isinstance(has, str):  # all-linear is kept as what it stood for
            asked, has = (sorted(value) if isinstance(value, set | list) else value for value in (asked, has))
            found[ours] = asked, has
    problems = []
    for key, (asked, has) in found.items():
        what = f"lora.{key} is {asked} but the adapter in {directory} has {has}; set lora.{key}: {has}, or adapter: "
        if asked != has:
            problems.append(Problem(f"{what}merge or stack to train a new one", stage.where(f"lora.{key}")))
    if problems:
        raise ModelError(problems)


def _list_names(model: PreTrainedModel) -> str:
    """Say which layers a model has, and which experts it holds as parameters."""
    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    layers = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, kinds)}
    experts = {name.split(".")[-1] for name, weight in model.named_parameters() if weight.ndim == 3}
    more = f"; its experts' {', '.join(sorted(experts))} are parameters, which all-linear adapts where PEFT can"
    return f"the model has {', '.join(sorted(layers))}{more if experts else ''}"


def _require_matches(model: PeftModel, stage: Stage, known: str) -> None:
    """Refuse names in `lora:` that match nothing, which PEFT passes over as long as another one matches.
    A pattern is asked for its words. PEFT itself puts names of experts that were layers once (w1, gate_proj) on the
    parameters that they are now; what is left in the config is what it took for layers."""
    options: Any = stage.lora
    config, given = next(iter(model.peft_config.values())), options.model_dump()
    names = [name for name, _ in model.named_modules()]
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    weights = [name.removesuffix(".default").replace(".base_layer", "") for name, _ in model.named_parameters()]
    places = {"modules_to_save": names, "exclude_modules": names, "feedforward_modules": adapted,
              "rank_pattern": adapted, "alpha_pattern": adapted, "target_parameters": weights}  # fmt: skip
    targets = options.target_modules
    if isinstance(targets, list):
        left = config.target_modules if isinstance(config.target_modules, set | list) else targets
        given["target_modules"], places["target_modules"] = [name for name in targets if name in left], adapted
    missing = {}
    for key, where in places.items():
        asked = () if isinstance(given.get(key), str) else given.get(key) or ()
        missing[key] = [one for one in asked if not any(re.search(rf"(^|\.)({one})$", name) for name in where)]
    if isinstance(targets, str) and targets != "all-linear":
        pattern = re.sub(r"\(\?[!<][^)]*\)|\[[^]]*\]|\\.", " ", targets)
        words = dict.fromkeys(re.findall(r"[A-Za-z]\w{2,}", pattern))
        missing["target_modules"] = [word for word in words if not any(word in key for key in names)]
    layers = given.get("layers_to_transform") or []
    chosen = [layers] if isinstance(layers, int) else layers
    missing["layers_to_transform"] = [str(n) for n in chosen if not any(f".{n}." in name for name in adapted)]
    said = {key: f"names {', '.join(left)}: nothing in the model; {known}" for key, left in missing.items() if left}
    key = "r" if options.r else "oft_block_size"
    if options.adapter_type == "oft" and (asked := given.get(key)):  # where it does not fit, PEFT takes another
        taken = {getattr(layer, key)[TRAINED] for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
        if taken != {asked}:
            said[key] = f"is {asked}, which does not divide the inputs of every layer (it would be {taken})"
    if said:
        raise ModelError(Problem(f"lora.{key} {what}", stage.where(f"lora.{key}")) for key, what in said.items())
