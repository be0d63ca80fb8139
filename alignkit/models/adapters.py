"""LoRA adapters on a base: a new one, one that goes on, one below another, and its frozen copy.

An adapter directory is never given to AutoModel, which would load it in a way that a later wrap silently throws away.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignkit.errors import ModelError, Problem, first_line
from alignkit.recipe.schema import LoraOptions
from alignkit.recipe.stage import Stage

TRAINED, START, REFERENCE = "default", "start", "ref"  # adapter names
_LARGEST_RANK = 2**16


def adapt(
    model: PreTrainedModel, stage: Stage, action: str, directory: Path | None, *, reward: bool,
    tokens: Sequence[int] = (),
) -> PeftModel:  # fmt: skip
    """Wrap a base as the stage trains it, with the embeddings of `tokens`.

    A matrices are drawn from the stage's seed, in generators of their own.

    new, merge  a fresh adapter: B is zero, so the model still computes what the base does
    continue    the adapter of `directory`; a policy's goes on as a reward model's with a fresh score head
    stack       a fresh one on top of that of `directory`, which is frozen; both are active

    Raises ModelError for `lora:` that does not fit the model or the adapter, and for tensors that do not fit the base.
    """
    assert stage.lora is not None
    name, known = TRAINED, _list_names(model)
    if action not in ("continue", "stack"):
        first = upper = _new_config(model, stage, reward=reward, tokens=tokens)
    else:
        assert directory is not None
        first = _stored_config(model, directory, reward=reward, trainable=action == "continue")
    if action == "continue":
        _check_shape(first, stage.lora, directory, stage)
        first.lora_dropout = stage.lora.dropout
        first.trainable_token_indices = first.trainable_token_indices or _name_tokens(model, tokens)
    elif action == "stack":
        if tokens:
            raise ModelError("adapter: stack cannot train a task's tokens; use continue or merge", where=str(directory))
        name, upper = START, _new_config(model, stage, reward=reward)
        if first.use_dora or upper.use_dora:
            raise ModelError(
                "adapter: stack adds two low-rank updates, which DoRA's are not; use merge", where=str(directory)
            )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(stage.seed)
            wrapped = get_peft_model(model, first, adapter_name=name)
            if directory is not None and action in ("continue", "stack"):
                _fill(wrapped, directory, name, reward=reward)
            if action == "stack":
                wrapped.add_adapter(TRAINED, upper)
    except (ValueError, re.error) as error:  # PEFT's for names that match nothing, and for patterns that are none
        said = first_line(error)
        key = "lora.dropout" if "lora_dropout" in said else "lora.target_modules"
        there = "; set lora.dropout: 0 or name layers without experts" if key == "lora.dropout" else f"; {known}"
        raise ModelError(f"lora does not fit the model: {said}{there}", where=stage.where(key)) from error
    if action != "continue":
        _require_matches(wrapped, stage, known)
    if action == "stack":
        _copy(wrapped, START, TRAINED, ".modules_to_save.")  # the score head starts from the lower adapter's
        activate(wrapped, [START, TRAINED])
    return wrapped


def add_reference_adapter(model: PeftModel, *, of: str = TRAINED) -> None:
    """Add a frozen copy of an adapter under the name `ref`, for the reference of DPO and PPO."""
    copy_adapter(model, of, REFERENCE)
    model.set_adapter(TRAINED)


def copy_adapter(model: PeftModel, source: str, name: str) -> None:
    """Add an adapter that starts as a copy of another one, dtype included; which one acts is the caller's business."""
    model.add_adapter(name, model.peft_config[source])
    _copy(model, source, name)


def _copy(model: PeftModel, source: str, target: str, kind: str = ".") -> None:
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        copy = parameters.get(name.replace(f".{source}.", f".{target}."))
        if f".{source}." in name and kind in name and copy is not None:
            copy.data = parameter.data.clone()


def add_scoring_adapter(model: PeftModel, directory: Path, name: str) -> torch.Tensor:
    """Put the adapter of a reward model, without its head, on the base of a policy; give the head's weight, (1, H)."""
    base = model.get_base_model()
    config = _stored_config(base, directory, reward=False, trainable=False)
    config.modules_to_save = None  # the head lies outside of a policy
    stored = read_adapter(directory)
    head = [tensor for key, tensor in stored.items() if key.endswith("score.weight")]
    if len(head) != 1:
        raise ModelError("holds no score head; it is not a reward model's adapter", where=str(directory))
    model.add_adapter(name, config)
    places = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    rest = {key: tensor for key, tensor in stored.items() if ".lora_" in key}
    if rest.keys() != places.keys() or any(places[key].shape != rest[key].shape for key in rest):
        raise ModelError("the reward model's adapter does not fit the policy's base", where=str(directory))
    set_peft_model_state_dict(model, rest, adapter_name=name)
    return head[0]


def attach_frozen(model: PreTrainedModel, directory: Path, *, reward: bool) -> PeftModel:
    """Wrap a base with a stored adapter for use, not for training."""
    config = _stored_config(model, directory, reward=reward, trainable=False)
    wrapped = get_peft_model(model, config, adapter_name=TRAINED)
    _fill(wrapped, directory, TRAINED, reward=reward)
    return wrapped.requires_grad_(False).eval()


def activate(model: PeftModel, names: list[str]) -> None:
    """Make the named adapters act together; only `default` trains.

    PeftModel.set_adapter takes one name, and the layers' own would make all of them trainable. The reference of a
    stacked model is `activate(model, [START])`, its way back `activate(model, [START, TRAINED])`.
    """
    model.set_adapter(names[-1])  # modules trained in full cannot act together: the last adapter's do
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            parameter.requires_grad = f".{TRAINED}." in name


def cast_adapters(model: PeftModel, dtype: torch.dtype) -> None:
    """Hold the adapters of a quantised base in the dtype it computes in.

    DoRA magnitudes stay as they are: their updates are smaller than bfloat16 can add.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name and "magnitude" not in name and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def read_adapter(directory: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter directory."""
    try:
        return load_file(directory / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(directory / "adapter_model.safetensors")) from error


def _name_tokens(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """Say which rows of which matrix PEFT trains beside the adapter."""
    if not tokens:
        return None
    embeddings = model.get_input_embeddings()
    return {next(name for name, module in model.named_modules() if module is embeddings): list(tokens)}


def _new_config(model: PreTrainedModel, stage: Stage, *, reward: bool, tokens: Sequence[int] = ()) -> LoraConfig:
    options = stage.lora
    assert options is not None
    if not isinstance(options.target_modules, str) and "lm_head" in options.target_modules:
        raise ModelError(
            "lora.target_modules names lm_head, which is never adapted; use all-linear",
            where=stage.where("lora.target_modules"),
        )
    return LoraConfig(
        r=options.r,
        lora_alpha=int(options.alpha) if options.alpha == int(options.alpha) else options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.target_modules,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        modules_to_save=list(options.modules_to_save) or None,  # PEFT adds the score head of a SEQ_CLS adapter
        task_type=_task_type(model, reward=reward),
        trainable_token_indices=_name_tokens(model, tokens),
        fan_in_fan_out=_is_transposed(model),
    )


def _task_type(model: PreTrainedModel, *, reward: bool) -> str:
    return "SEQ_CLS" if reward else "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _is_transposed(model: PreTrainedModel) -> bool:
    """Whether linear layers hold their weights transposed (GPT-2); PEFT would find out, with a warning per layer."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def _stored_config(model: PreTrainedModel, directory: Path, *, reward: bool, trainable: bool) -> LoraConfig:
    place = str(directory / "adapter_config.json")
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # PEFT hands what stands there to a dataclass
        raise ModelError(f"is not the config of an adapter: {error}", where=place) from error
    if isinstance(config, LoraConfig) and not (isinstance(config.r, int) and 1 <= config.r <= _LARGEST_RANK):
        raise ModelError(f"r is {config.r!r}; it must be a whole number from 1 to {_LARGEST_RANK:,}", where=place)
    if not isinstance(config, LoraConfig):
        raise ModelError(f"holds a {config.peft_type} adapter; only LoRA adapters can be used", where=str(directory))
    config.inference_mode = not trainable
    config.fan_in_fan_out = _is_transposed(model)
    config.base_model_name_or_path = model.name_or_path  # a moved base is found again, see load.find_base
    config.task_type = _task_type(model, reward=reward)
    if reward and config.modules_to_save:  # the LM head of a policy, trained in full, is no part of a reward model
        config.modules_to_save = [name for name in config.modules_to_save if name.split(".")[-1] != "lm_head"] or None
    return config


def _fill(model: PeftModel, directory: Path, name: str, *, reward: bool) -> None:
    """Copy stored tensors into an adapter; every one must find its place, and every place but a new head its tensor."""
    stored = read_adapter(directory)
    if reward:
        stored = {key: tensor for key, tensor in stored.items() if ".lm_head." not in key}
    places = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    wrong = [key for key in stored if key not in places or places[key].shape != stored[key].shape]
    unfilled = [
        key for key in places if key not in stored and not (reward and (".score." in key or ".token_adapter." in key))
    ]
    if wrong or unfilled:
        first = (wrong or unfilled)[0]
        raise ModelError(
            f"the adapter does not fit its base: {len(wrong)} of its tensors have no place, {len(unfilled)} are "
            f"missing (first {first}); load it on the base it was trained on",
            where=str(directory),
        )
    # PEFT wants every saved module in the state; a new head stays what it is.
    new_head = {key: place for key, place in places.items() if key not in stored}
    set_peft_model_state_dict(model, stored | new_head, adapter_name=name)


def _check_shape(config: LoraConfig, options: LoraOptions, directory: Path | None, stage: Stage) -> None:
    """Refuse `lora:` values that a continued adapter would silently ignore."""
    wanted: dict[str, tuple[Any, Any]] = {
        "r": (options.r, config.r), "alpha": (float(options.alpha), float(config.lora_alpha)),
        "use_rslora": (options.use_rslora, config.use_rslora), "use_dora": (options.use_dora, config.use_dora),
    }  # fmt: skip
    if isinstance(options.target_modules, list) and not isinstance(config.target_modules, str):
        wanted["target_modules"] = (sorted(options.target_modules), sorted(config.target_modules or ()))
    problems = [
        Problem(
            f"lora.{key} is {asked} but the adapter in {directory} has {has}; set lora.{key}: {has}, or adapter: merge "
            "or stack to train a new one",
            stage.where(f"lora.{key}"),
        )
        for key, (asked, has) in wanted.items()
        if asked != has
    ]
    if problems:
        raise ModelError(problems)


def _list_names(model: PreTrainedModel) -> str:
    """Say which layers a model has, and which experts it holds as parameters."""
    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    layers = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, kinds)}
    experts = {name.split(".")[-1] for name, weight in model.named_parameters() if weight.ndim == 3}
    known = f"the model has {', '.join(sorted(layers))}"
    if not experts:
        return known
    return f"{known}; its experts' {', '.join(sorted(experts))} are parameters, which all-linear adapts where PEFT can"


def _require_matches(model: PeftModel, stage: Stage, known: str) -> None:
    """Refuse names in `lora:` that match nothing, which PEFT passes over as long as another one matches.

    A pattern is asked for its words. PEFT itself puts names of experts that were layers once (w1, gate_proj) on the
    parameters that they are now; what is left in the config is what it took for layers.
    """
    options = stage.lora
    assert options is not None
    config = model.peft_config[TRAINED]
    names = [name for name, _ in model.named_modules()]
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    missing: dict[str, list[str]] = {}
    if isinstance(options.target_modules, list):
        left = config.target_modules if isinstance(config.target_modules, set | list) else options.target_modules
        asked = [name for name in options.target_modules if name in left]
        missing["target_modules"] = [n for n in asked if not any(f".{key}".endswith(f".{n}") for key in adapted)]
    elif options.target_modules != "all-linear":
        pattern = re.sub(r"\(\?[!<][^)]*\)|\[[^]]*\]|\\.", " ", options.target_modules)
        words = dict.fromkeys(re.findall(r"[A-Za-z]\w{2,}", pattern))
        missing["target_modules"] = [word for word in words if not any(word in key for key in names)]
    saved = options.modules_to_save
    missing["modules_to_save"] = [n for n in saved if not any(f".{key}".endswith(f".{n}") for key in names)]
    problems = [
        Problem(f"lora.{key} names {', '.join(left)}: nothing in the model; {known}", stage.where(f"lora.{key}"))
        for key, left in missing.items()
        if left
    ]
    if problems:
        raise ModelError(problems)
