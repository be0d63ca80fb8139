"""Weights of a stage: base, policy, reference, reward model, and what a finished run left; full or quantised."""

import copy
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from accelerate.utils import is_npu_available, is_xpu_available
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.activations import ACT2FN, GELUTanh
from transformers.pytorch_utils import Conv1D

from alignkit import console
from alignkit.errors import AlignKitError, EnvironmentProblem, ModelError, first_line
from alignkit.models import adapters, start
from alignkit.models.chat import TASK_TOKENS, check_vocabulary, load_tokenizer
from alignkit.models.files import RECORD, find_model_dir, inspect_model_dir, is_builtin, read_shapes
from alignkit.models.heads import ScoreHead, double_heads, grow_vocabulary, prepare_head
from alignkit.models.hub import explain_hub_errors, quiet_transformers
from alignkit.models.start import choose_family, override_config, random_model
from alignkit.recipe.methods import PpoOptions, SftOptions
from alignkit.recipe.stage import Stage

# Kept out of quantization: a head that is read or trained directly. Embeddings are no linear layers.
UNQUANTIZED = ["lm_head", "score"]
Model: TypeAlias = PreTrainedModel | PeftModel
# How the reference of DPO is had: the adapter switched off, the frozen copy `ref`, the frozen lower adapter `start`
# alone, or a second model.
Reference = Literal["adapter_off", "ref_adapter", "base_adapter", "model"]
ROUNDS_TO = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of mixed precision, by its name
# One formula by four names, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): upstream runs it as eight operators and
# keeps the result of each for the backward pass, torch as one.
ACT2FN.update(dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), GELUTanh))


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are held: `dtype` for all that is not quantised and for computing."""

    dtype: torch.dtype
    device: str  # "cpu", "cuda", "mps"
    quantization: str = "none"
    double_quantization: bool = True
    storage: str = "uint8"  # of 4-bit codes

    @property
    def quantized(self) -> bool:
        return self.quantization != "none"


@dataclass
class Loaded:
    """A model to train and what it is made of."""

    model: Model
    reference: Reference | None  # None where the method has no reference
    lineage: list[dict[str, Any]]  # base first; each entry has `role` and `path`
    precision: Precision


def pick_device(wanted: str = "auto", *, where: str = "") -> str:
    """Pick the device asked for, at `where` in a recipe, or the best that is there."""
    available = {"cuda": torch.cuda.is_available(), "npu": is_npu_available(), "xpu": is_xpu_available(),
                 "mps": torch.backends.mps.is_available(), "cpu": True}  # fmt: skip
    if wanted == "auto":
        return next(name for name, there in available.items() if there)
    if not available[wanted.partition(":")[0]]:
        place = f"{where}: launch.device" if where else "the device asked for"
        what = f"{place} is {wanted}, which torch {torch.__version__} does not see here; use auto or cpu, or run "
        raise EnvironmentProblem(f"{what}`alignkit doctor`")
    return wanted


def number_types(stage: Stage, *, half: bool) -> tuple[torch.dtype, str]:
    """What weights are held in, and what autocast computes in: no, bf16, fp16; `half` where a device has bfloat16.

    dtype auto is bfloat16 for a frozen base where the device computes in it, and float32 for weights that are trained
    themselves: bfloat16 rounds away updates smaller than 1/256 of a weight (autocast still computes in bfloat16).
    """
    dtype, mixed = stage.model.dtype, stage.launch.mixed_precision
    if mixed == "auto":
        mixed = "fp16" if dtype == "float16" else "bf16" if dtype == "bfloat16" or (dtype == "auto" and half) else "no"
    if dtype == "auto":
        dtype = "bfloat16" if half and stage.lora is not None else "float32"
    elif dtype == "float16" and stage.lora is None:
        dtype = "float32"  # float16 computes through autocast; gradients of float16 weights cannot be unscaled
    return getattr(torch, dtype), mixed


def pick_precision(stage: Stage) -> Precision:
    """Choose the precision a stage asks for on the device that it runs on."""
    device, options = pick_device(stage.launch.device, where=stage.where("launch.device")), stage.model
    if options.dtype == "float16" and device != "cuda":
        what = f"model.dtype float16 needs cuda, this is {device}; use float32 or bfloat16"
        raise EnvironmentProblem(f"{stage.where('model.dtype')}: {what}")
    if stage.trainer.get("activation_offloading") and device == "cpu":
        key = f"{stage.name}.activation_offloading"
        raise EnvironmentProblem(f"{stage.where(key)}: {key} moves them to the CPU, which this runs on; leave it out")
    dtype, _ = number_types(stage, half=device == "cuda" and torch.cuda.is_bf16_supported())
    settings = options.quantization, options.double_quantization, options.quantization_storage
    return Precision(dtype, device, *settings)


def draw_base(stage: Stage, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> PreTrainedModel:
    """Draw the weights of a builtin model or of `init: scratch` from the stage's seed, on the CPU."""
    options, where = stage.model, stage.where("model.config")
    config = start.read_config(options.path, revision=options.revision, trust_code=stage.trust_code)
    config = override_config(config, options.config, where=where)
    start.require_sizes(config, where)
    start.require_objective(stage, config)
    for name in ("vocab_size", "decoder_vocab_size"):  # Marian has both
        if hasattr(config, name) and name not in options.config:
            setattr(config, name, len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    if config.is_encoder_decoder:  # as T5 and Marian have it
        config.decoder_start_token_id = tokenizer.pad_token_id
    is_meta = torch.get_default_device().type == "meta"  # shapes need no kernel, which may not be installed here
    kernel = None if is_meta else options.attn_implementation
    return random_model(config, seed=stage.seed, dtype=dtype, attn_implementation=kernel)


def write_base(base: Path, model: PreTrainedModel, lineage: list[dict[str, Any]]) -> None:
    """Write base weights to a directory, whole or not at all; of several ranks the first one's stay."""
    draft = base.with_name(f"base.tmp-{os.getpid()}")
    with quiet_transformers():
        model.save_pretrained(draft)
    (draft / RECORD).write_text(json.dumps({"lineage": lineage}, indent=1) + "\n", encoding="utf-8")
    try:
        draft.rename(base)
    except OSError:
        if not base.exists():  # no other rank was faster
            raise
        shutil.rmtree(draft)


def read_base(
    source: str, precision: Precision, *, reward: bool = False, num_labels: int = 1,
    head: Mapping[str, Any] | None = None, two_heads: bool = False, revision: str | None = None,
    attn_implementation: str | None = None, use_kernels: bool = False, trust_code: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """Load base weights from a directory or a hub id, in the given precision; safetensors only.

    A reward model without a stored score head gets one (see `score`), flagged as `model.score_is_new`. `head` is that
    of a classifier, as its record has it; with `two_heads` the head of the language model is kept beside it.
    Raises ModelError when weights are missing, which transformers would fill with random ones.
    """
    directory = find_model_dir(source)
    if directory is not None and inspect_model_dir(directory, trust_code=trust_code).kind == "adapter":
        raise ModelError(f"{directory} is an adapter, not base weights")  # AutoModel would load it and wipe it later
    config = start.read_config(source, revision=revision, trust_code=trust_code)
    start.require_packages(config, source)
    if reward:
        start.know_classifier(config)
    family: Any = double_heads(config) if two_heads else choose_family(config, reward=reward)
    labels = head["labels"] if head else []
    arguments: dict[str, Any] = {"num_labels": len(labels) or num_labels} if reward else {}
    if attn_implementation:
        arguments |= {"attn_implementation": attn_implementation, "allow_all_kernels": trust_code}
    if use_kernels:
        arguments["use_kernels"] = True
    if precision.quantized:
        place = int(os.environ.get("LOCAL_RANK", "0")) if precision.device == "cuda" else precision.device
        arguments |= {"quantization_config": quantization_config(precision), "device_map": {"": place}}
    with explain_hub_errors(source), quiet_transformers(), console.waiting(f"loading {source}"):
        model, info = family.from_pretrained(
            str(directory or source), revision=revision, dtype=precision.dtype, use_safetensors=True,
            trust_remote_code=trust_code, output_loading_info=True, **arguments,
        )  # fmt: skip
    missing = sorted(name for name in info["missing_keys"] if not (reward and name.split(".")[0] == "score"))
    if missing:
        what = f"{len(missing)} tensors are missing, first {missing[0]}; the copy is incomplete"
        raise ModelError(what, where=source)
    model.score_is_new = bool(info["missing_keys"])
    if reward and type(head_of_scores := getattr(model, "score", None)) is nn.Linear:
        head_of_scores.__class__ = ScoreHead
    if head:
        if labels:  # a choice has none
            model.config.id2label = dict(enumerate(labels))
            model.config.label2id = {name: number for number, name in enumerate(labels)}
        grow_vocabulary(model, head["num_tokens"])
    # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in a no-grad forward, and what is repacked has no
    # backward: gradients are wrong from then on, and only some shapes can be packed at all (bitsandbytes 0.50.2,
    # nn/modules.py, Linear4bit.forward). The layer has no other switch.
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def quantization_config(precision: Precision) -> BitsAndBytesConfig:
    """The bitsandbytes settings: blocks of 64, computing in `dtype` (arXiv 2305.14314)."""
    if precision.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNQUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=precision.quantization,
        bnb_4bit_use_double_quant=precision.double_quantization, bnb_4bit_compute_dtype=precision.dtype,
        bnb_4bit_quant_storage=getattr(torch, precision.storage), llm_int8_skip_modules=UNQUANTIZED,
    )  # fmt: skip


def load_policy(
    stage: Stage, *, run_dir: Path, tokenizer: PreTrainedTokenizerFast | None = None, reward: bool = False,
    labels: Sequence[str] | None = None,
) -> Loaded:  # fmt: skip
    """Load the causal language model a stage trains: full, or a PeftModel with the trainable adapter `default`.

    With `reward`, the sequence classifier with one label of an rm stage, whose score head is always trainable: a new
    one drawn from the stage's seed on a policy, that of a reward model as it is. With `labels`, none for a choice, the
    classifier of an sft stage: a policy gets a new head and embeddings of the task's tokens, one of the same labels
    goes on; with `lm_coef` the head of the language model is trained beside it. Random and merged bases of adapters
    are written to `<run_dir>/base`, so that the adapter loads anywhere with plain PEFT.
    """
    tokenizer = tokenizer or load_tokenizer(stage)
    origin = start.find_start(stage)
    if origin.reward and not reward:
        what = f"{stage.start_dir or stage.model.path} is a reward model; {stage.method} needs a policy to start from"
        raise ModelError(what, where=stage.where(f"{stage.name}.start_from"))
    heads = None if origin.head is None else origin.head["labels"], None if labels is None else list(labels)
    if origin.reward and heads[0] != heads[1]:
        has, wanted = ("one score" if it is None else ", ".join(it) or "one score a choice" for it in heads)
        what = f"its start has a head of {has}, and it needs one of {wanted}; start from a language model"
        raise ModelError(what, where=stage.where(f"{stage.name}.start_from"))
    head = None if labels is None else {"labels": list(labels), "num_tokens": len(tokenizer)}
    precision = pick_precision(stage)
    if precision.quantized and stage.lora is None:
        what = "quantised weights cannot be trained in full; add lora:"
        raise ModelError(what, where=stage.where("model.quantization"))
    action, lineage = start.choose_action(stage, origin), list(origin.lineage)
    base, revision, made = origin.base, origin.revision, run_dir.resolve() / "base"
    is_drawn = start.is_random(stage) and base == stage.model.path and action != "merge"
    grows = bool(stage.model.add_tokens) and not is_drawn
    if grows:
        config = start.read_config(base, revision=revision, trust_code=stage.trust_code)
        grows = len(tokenizer) > config.get_text_config().vocab_size
    if origin.adapter is not None:
        lineage.append({"role": "adapter", "path": str(origin.adapter), "action": action})
    if action == "merge" or (grows and stage.lora is not None):  # an adapter is loaded on a base that has the rows
        if not made.exists():  # a resumed run has it: it is written whole or not at all
            full = Precision(precision.dtype, "cpu")
            trust: Any = {"revision": revision, "trust_code": stage.trust_code}
            whole: Any = read_base(base, full, reward=origin.reward, head=origin.head, **trust)
            if action == "merge" and origin.adapter is not None:
                whole = adapters.attach_frozen(whole, origin.adapter, reward=origin.reward).merge_and_unload()
            grow_vocabulary(whole, len(tokenizer) if grows else 0)
            write_base(made, whole, lineage)
        base, revision = str(made), None
    elif is_drawn and (stage.lora is not None or reward):  # others build on these weights: they go through files
        if not made.exists():
            dtype = torch.float32 if precision.quantized else precision.dtype
            write_base(made, draw_base(stage, tokenizer, dtype), lineage)
        base, revision, is_drawn = str(made), None, False
    if is_drawn:
        model = draw_base(stage, tokenizer, precision.dtype)
    else:
        settings: Any = {"attn_implementation": stage.model.attn_implementation, "trust_code": stage.trust_code}
        settings |= {"head": head, "use_kernels": stage.model.use_kernels}
        settings["two_heads"] = head is not None and stage.expect(SftOptions).lm_coef > 0
        model = read_base(base, precision, reward=reward, revision=revision, **settings)
        grow_vocabulary(model, len(tokenizer) if grows else 0)
    check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, model=base)
    if reward:
        prepare_head(model, tokenizer, seed=stage.seed, of_task=head is not None)
    model.config.use_cache = False  # a cache is of no use in training, and packed rows would leak through it
    if not (reward or model.config.is_encoder_decoder) and getattr(model, "loss_type", "") is None:
        model.loss_type = "ForCausalLM"  # GPT-2's class name does not tell transformers, which warns at every start
    has_reference = stage.method in ("dpo", "ppo") and not reward
    if stage.lora is None:
        freeze(model, stage)
        return Loaded(model, "model" if has_reference else None, lineage, precision)
    model.requires_grad_(False)
    names = [*(TASK_TOKENS if head is not None else ()), *(stage.model.add_tokens if stage.method != "ppo" else ())]
    tokens, parts = tokenizer.convert_tokens_to_ids(names), run_dir.resolve() / "parts.safetensors"
    wrapped = adapters.adapt(model, stage, action, origin.adapter, reward=reward, tokens=tokens, parts=parts)
    if stage.lora.init_lora_weights == "loftq" and action in ("new", "merge"):
        lineage[-1] = {**lineage[-1], "init": "loftq"}
    if precision.quantized:
        # Gradients of float16 weights cannot be unscaled: there the adapters are float32.
        adapters.cast_adapters(wrapped, torch.float32 if precision.dtype == torch.float16 else precision.dtype)
    starts = {"stack": "base_adapter", "continue": "ref_adapter"}
    usual: Any = "ref_adapter" if stage.lora.init_lora_weights == "loftq" else "adapter_off"  # not the base alone
    reference: Any = starts.get(action, usual) if has_reference else None
    if reference == "ref_adapter":
        adapters.copy_adapter(wrapped, adapters.TRAINED, adapters.REFERENCE)
        wrapped.set_adapter(adapters.TRAINED)
    return Loaded(wrapped, reference, lineage, precision)


def freeze(model: nn.Module, stage: Stage) -> None:
    """Leave the weights that `model.freeze` names out of training; raise ModelError for what names none."""
    where, named = stage.where("model.freeze"), dict(model.named_parameters())
    for pattern in stage.model.freeze:
        try:
            found = [weight for name, weight in named.items() if re.search(pattern, name)]
        except re.error as error:
            raise ModelError(f"{pattern} is no regular expression: {error}", where=where) from error
        if not found:
            some = ", ".join([*named][:4])
            what = f"model.freeze: {pattern} is found in the name of no weight; there are {some}, ..."
            raise ModelError(what, where=where)
        for weight in found:
            weight.requires_grad_(False)


load_reward_model = partial(load_policy, reward=True)


def load_reference(loaded: Loaded, autocast: torch.dtype | None = None) -> PreTrainedModel | None:
    """Copy the frozen second model of full fine-tuning from the policy as it is now; None where adapters give it.

    Linear layers lie in what `autocast` would round their weights to in every pass: half the memory, the same bits.
    """
    if loaded.reference != "model":
        return None
    model: PreTrainedModel = copy.deepcopy(loaded.model).requires_grad_(False).eval()
    for layer in rounded_layers(model) if autocast else ():
        layer.to(autocast)
    return model


def rounded_layers(model: nn.Module) -> list[nn.Module]:
    """List the layers whose weights autocast rounds: no norms, no embeddings, and not the head, which may be these."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head]


def load_trained(
    source: Path | str, *, device: str = "auto", dtype: torch.dtype | None = None, reward: bool = False,
    num_labels: int = 1, quantization: str | None = None, trust_code: bool = False,
) -> Model:  # fmt: skip
    """Load what a stage saved, or any model or hub id, frozen, in eval mode and in the precision of its training."""
    directory = find_model_dir(str(source))
    files = inspect_model_dir(directory, trust_code=trust_code) if directory else None
    if files is not None and files.reward != reward:
        has, wanted = ("a reward model", "a policy") if files.reward else ("a policy", "a reward model")
        raise ModelError(f"{directory} is {has}, not {wanted}")
    record: dict[str, Any] = files.record if files else {}
    stored = record.get("dtype") or (files.config.get("dtype") if files else None)
    codes, double = quantization or record.get("quantization", "none"), record.get("double_quantization", True)
    precision = Precision(dtype or getattr(torch, stored or "float32"), pick_device(device), codes, double)
    place = start.find_base(files) if files and files.kind == "adapter" else str(directory or source)
    model = read_base(
        place, precision, reward=reward, num_labels=num_labels, head=record.get("head"),
        revision=files.base_revision if files else None, trust_code=trust_code,
    )  # fmt: skip
    if reward and model.config.pad_token_id is None:
        model.config.pad_token_id = record.get("pad_token_id")
    if not precision.quantized:
        model = model.to(precision.device)
    if files and files.kind == "adapter":
        return adapters.attach_frozen(model, files.path, reward=reward)
    return model.requires_grad_(False).eval()


@dataclass
class Skeleton:
    """What is known of a model before it is loaded."""

    num_parameters: int
    num_trained: int
    four_bit_share: float  # of all weights: what bitsandbytes would quantise
    doubts: list[str]
    notes: list[str]  # settings that are not used, which may be right


def build_skeleton(stage: Stage, tokenizer: Any = None, *, learnt: str | None = None) -> Skeleton:
    """Build the stage's model on torch's meta device, where weights have names and shapes and cost no memory."""
    origin = start.find_start(stage)
    action = start.choose_action(stage, origin)
    base = _build_base(stage, origin, tokenizer, learnt)
    total = sum(weight.numel() for weight in base.parameters())
    layers = (module for name, module in base.named_modules() if name.split(".")[-1] not in UNQUANTIZED)
    linear = sum(module.weight.numel() for module in layers if isinstance(module, nn.Linear | Conv1D))
    doubts, notes = [], []
    if stage.model.quantization != "none" and linear < total / 2:
        experts = sorted({name.split(".")[-1] for name, weight in base.named_parameters() if weight.ndim == 3})
        rest = f"the experts' {', '.join(experts)}" if experts else "embeddings and head"
        what = f"model.quantization {stage.model.quantization} holds {linear / total:.1%} of the weights; bitsandbytes "
        doubts.append(f"{what}quantises linear layers, and the rest ({rest}) stays as it is")
    if stage.lora is None:
        freeze(base, stage)
    else:
        try:
            with torch.device("meta"):
                base.requires_grad_(False)
                base = adapters.adapt(base, stage, action, origin.adapter, reward=stage.scores)
        except AlignKitError:
            raise
        except Exception as error:  # whatever a strange adapter_config.json provokes
            place = str(origin.adapter) if origin.adapter else stage.where("lora")
            raise ModelError(f"does not fit the model: {first_line(error)}", where=place) from error
        adapted = {(id(m.get_base_layer()), m.parameter_name) for m in base.modules() if isinstance(m, ParamWrapper)}
        left: dict[str, int] = defaultdict(int)  # experts are parameters and not layers: those that no adapter reaches
        for module in (module for module in base.modules() if not isinstance(module, LoraLayer)):
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim == 3 and (id(module), name) not in adapted:
                    left[name] += weight.numel()
        if left:
            share = sum(left.values()) / total
            doubts.append(f"no adapter reaches the experts' {', '.join(sorted(left))}, {share:.1%} of the weights")
        if stage.lora.dropout and stage.method != "sft" and stage.trainer.get("disable_dropout") is not False:
            notes.append(f"lora.dropout {stage.lora.dropout}: {stage.method} switches dropout off (disable_dropout)")
    sorting, rows = [n for n in stage.trainer.get("loss_type") or () if n.startswith("aot")], stage.training.batch_size
    if sorting and stage.training.micro_batch_size != rows:
        what = f"loss_type {sorting[0]} sorts the rows of a forward pass, so micro_batch_size and the number of "
        doubts.append(f"{what}processes change it: micro_batch_size: {rows} in one process sorts those of a step")
    directory = find_model_dir(origin.base)
    if stage.method != "rm" and directory and (directory / "generation_config.json").exists():
        settings = GenerationConfig.from_pretrained(str(directory)).to_diff_dict()
        others = ("_token_id", "_version", "_from_model_config", "use_cache", "_attentions", "_hidden_states")
        if names := [name for name in settings if not name.endswith(others)]:
            notes.append(f"the base's generation_config.json ({', '.join(names)}): the saved model keeps it")
    num_trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    return Skeleton(total, num_trained, linear / total, doubts, notes)


def _build_base(stage: Stage, origin: start.Start, tokenizer: Any, learnt: str | None) -> nn.Module:
    reward, source = stage.scores, origin.base
    is_drawn = start.is_random(stage) and source == stage.model.path
    if is_drawn:
        with torch.device("meta"):
            model = draw_base(stage, tokenizer or load_tokenizer(stage, learnt=learnt), torch.float32)
        num_bytes = 4 * sum(weight.numel() for weight in model.parameters())
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if num_bytes > memory:
            what = f"the model has {num_bytes // 4:,} parameters, {num_bytes / 2**30:,.0f} GiB to be drawn; this "
            what = f"{what}machine has {memory / 2**30:,.0f} GiB"
            raise ModelError(what, where=None if is_builtin(source) else source)
        config = model.config
        if not reward:
            return model
    else:
        config = start.read_config(source, revision=origin.revision, trust_code=stage.trust_code)
        start.require_objective(stage, config)
    start.require_packages(config, source)
    is_quantized = bool(getattr(config, "quantization_config", None))
    if is_quantized and stage.lora is None:
        raise ModelError("quantised weights cannot be trained in full; add lora:", where=source)
    if reward or (isinstance(stage.options, PpoOptions) and stage.options.advantage == "gae"):  # which has a critic
        start.know_classifier(config)
    if reward and not origin.head:
        config.num_labels = 1
    directory = find_model_dir(source)
    config_file = str(directory / "config.json") if directory else source
    try:
        with torch.device("meta"):
            model = choose_family(config, reward=reward).from_config(config, trust_remote_code=stage.trust_code)
    except Exception as error:  # whatever a strange config provokes; nothing but this build is in here
        raise ModelError(f"does not make a model: {first_line(error)}", where=config_file) from error
    stored: dict[str, list[int]] = {}
    for file in sorted(directory.glob("*.safetensors")) if directory and not is_quantized and not is_drawn else ():
        try:
            stored |= read_shapes(file)
        except ValueError as error:
            raise ModelError(f"{error}; copy or save the file again", where=str(file)) from error
    shapes = {name: list(weight.shape) for name, weight in model.named_parameters() if name in stored}
    if wrong := [name for name, shape in shapes.items() if shape != stored[name]]:
        what = f"promises other shapes than the weights have: {wrong[0]} would be {shapes[wrong[0]]} and is "
        what = f"{what}{stored[wrong[0]]}; {len(wrong)} tensors differ; put the config back that belongs to them"
        raise ModelError(what, where=config_file)
    return model
