"""What a pass over a model holds on a device, traced on fake tensors: no weights are read, and no device is needed.

Every storage that an operator of a forward and backward pass returns is counted while somebody holds it; what a kernel
allocates and frees inside itself is not. Layers that repeat are traced at two depths and go on linearly, by phase.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import multiprocessing
import os
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from alignkit.errors import EnvironmentProblem, first_line
from alignkit.models import adapters, kernels, start
from alignkit.models.load import ROUNDS_TO, UNQUANTIZED, freeze, number_types, rounded_layers
from alignkit.models.logprobs import run_trunk, token_logps
from alignkit.recipe import Stage
from alignkit.recipe.methods import TrainOptions
from alignkit.recipe.words import method_fields
from alignkit.runs.files import write_json
from alignkit.train.trainer import switch_off_dropout

Sizes = dict[str, float]  # bytes by what they are for


@dataclass(frozen=True)
class Shape:
    """One pass over so many sequences of so many tokens, of which the model writes `answer`."""

    sequences: int
    tokens: int
    kind: str  # words, score, answers, seq2seq; write: without gradients, with a cache
    answer: int = 0
    packed: bool = False  # all in one sequence, kept apart by a dense mask
    accumulates: bool = False  # gradients of earlier micro batches are there already


@dataclass(frozen=True)
class Footprint:
    """What a pass holds at the highest moment of each phase, and what there is before anything runs."""

    phases: dict[str, Sizes]
    rest: Sizes
    trained: Sizes  # "bytes" and "number" of the weights that are trained
    num_layers: int
    estimated: list[str]


def num_devices(stage: Stage) -> int:
    """The processes of a stage; auto counts as one."""
    return stage.launch.nodes * (1 if stage.launch.processes == "auto" else stage.launch.processes)


def shared_by(stage: Stage) -> str:
    """What shares a stage among its processes; none for one of them, and where nothing is trained."""
    shares = num_devices(stage) > 1 and isinstance(stage.options, TrainOptions)
    return stage.launch.strategy if shares else "none"


def recomputes(stage: Stage) -> bool:
    """Whether a step computes activations twice; TRL's trainers do where the recipe says nothing."""
    default = method_fields(stage.method).get("gradient_checkpointing", {}).get("default")
    asked = stage.launch.activation_checkpointing
    return bool(stage.trainer.get("gradient_checkpointing", default) if asked is None else asked)


def compute_types(stage: Stage, device: str) -> tuple[torch.dtype, str, bool]:
    """What a pass holds weights in, what autocast computes in, and whether those are 16 bits for float32 weights that
    FSDP and DeepSpeed keep elsewhere: neither leaves autocast a weight to cast."""
    dtype, mixed = number_types(stage, half=device == "cuda")
    shards = shared_by(stage) in ("fsdp", "zero2", "zero3") and stage.lora is None
    if narrows := shards and mixed != "no" and dtype == torch.float32:
        dtype = torch.float16 if mixed == "fp16" else torch.bfloat16
    return dtype, mixed, narrows


def trace(stage: Stage, config: PreTrainedConfig, shape: Shape, device: str) -> Footprint:
    """Trace a pass of a stage whose model has this config; what was traced before is read from the cache."""
    lora = stage.lora.model_dump() if stage.lora else None
    asked = [config.to_dict(), lora, asdict(shape), device, compute_types(stage, device), stage.method]
    asked += [stage.scores, stage.model.quantization, stage.model.double_quantization, stage.model.attn_implementation]
    asked += [stage.model.freeze, stage.trainer.get("disable_dropout"), recomputes(stage), shared_by(stage) == "zero3"]
    asked += [version(name) for name in ("alignkit", "torch", "transformers", "trl", "peft")]
    key = hashlib.blake2b(json.dumps(asked, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "alignkit", "plan", f"{key}.json")
    if file.is_file():
        return Footprint(**json.loads(file.read_text(encoding="utf-8")))
    text = config.get_text_config()
    whole = 0 if config.is_encoder_decoder else int(getattr(text, "num_hidden_layers", 0))
    low, high = _depths(text, whole)
    found = _run(stage, config if not low else _shorten(config, low), shape, device)
    if low:
        more, reach = _run(stage, _shorten(config, high), shape, device), (whole - low) / (high - low)

        def extend(one: Sizes, two: Sizes) -> Sizes:
            return {name: one.get(name, 0) + reach * (two.get(name, 0) - one.get(name, 0)) for name in {**one, **two}}

        phases = {name: extend(parts, more.phases[name]) for name, parts in found.phases.items()}
        rest, trained = extend(found.rest, more.rest), extend(found.trained, more.trained)
        found = Footprint(phases, rest, trained, whole, found.estimated)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(found))
    return found


def _depths(text: Any, whole: int) -> tuple[int, int]:
    """Choose two depths that a period of layers lies between and that begin as the whole does; zeros: trace it all."""
    lists = [value for value in text.to_dict().values() if isinstance(value, list) and len(value) == whole]
    first = int(getattr(text, "first_k_dense_replace", 0) or 0)
    for period in range(1, 9):
        if all(kinds[at] == kinds[at - period] for kinds in lists for at in range(first + period, whole)):
            low = first + max(period, 2)
            return (low, low + period) if whole > low + period else (0, 0)
    return 0, 0


def _shorten(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return config


class _Held(TorchDispatchMode):
    """Counts bytes of storages that are alive by what they are for, and keeps the highest sum of every phase."""

    def __init__(self, grain: int) -> None:
        super().__init__()
        self.grain, self.label, self.phase, self.total = grain, "weights", "build", 0
        self.now: Counter[str] = Counter()
        self.peaks: dict[str, tuple[float, Sizes]] = {}
        self._known: dict[int, tuple[str, int, Any]] = {}

    def enter(self, phase: str, label: str = "activations") -> None:
        """Begin a phase, or go on with it; what comes from now on is for `label`."""
        self.phase, self.label = phase, label
        if self.total > self.peaks.get(self.phase, (-1,))[0]:
            self.peaks[self.phase] = self.total, dict[str, float](self.now)

    def _drop(self, key: int, _: Any) -> None:
        label, size, _ = self._known.pop(key)
        self.now[label] -= size
        self.total -= size

    def rename(self, tensor: Any, label: str) -> None:
        """Say what a tensor has turned out to be for."""
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            before, size, alive = self._known[key]
            self._known[key] = label, size, alive
            self.now.update({before: -size, label: size})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # .item(): any number will do
            return 1
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                storage = tensor.untyped_storage()
                size = -(-storage.nbytes() // self.grain) * self.grain
                self._known[key] = self.label, size, weakref.ref(storage, partial(self._drop, key))
                self.now[self.label] += size
                self.total += size
        self.enter(self.phase, self.label)
        return found


_child: list[ProcessPoolExecutor] = []  # of `one_process`


@contextmanager
def one_process() -> Iterator[None]:
    """Let all traces until the end run in one process, forked at the first of them, instead of one each. It leaves
    without freeing anything: storages without values that Python has looked at crash the interpreter when they are
    collected (torch 2.11, THPStorage_dealloc)."""
    if _child:
        yield
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), _begin) as child:
        _child.append(child)
        try:
            yield
        finally:
            _child.clear()


def _begin() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    gc.disable()
    torch.set_num_threads(1)  # OpenMP's threads are not in this process


def _run(stage: Stage, config: PreTrainedConfig, shape: Shape, device: str) -> Footprint:
    """Trace in a process of its own; EnvironmentProblem where that is not possible."""
    with one_process():
        try:
            found = _child[0].submit(_try_here, stage, config, shape, device).result()
        except BrokenProcessPool:
            found = "the interpreter crashed"
    if isinstance(found, str):
        raise EnvironmentProblem(f"the memory of a {config.model_type} model cannot be traced here: {found}")
    return found


def _try_here(*asked: Any) -> Footprint | str:
    try:
        return _trace_here(*asked)
    except Exception as error:  # not every exception can be sent
        return first_line(error)


def _trace_here(stage: Stage, config: PreTrainedConfig, shape: Shape, device: str) -> Footprint:
    held = _Held(512 if device == "cuda" else 64)  # what torch's allocators round up to
    _, mixed, _ = compute_types(stage, device)
    autocast = ROUNDS_TO.get(mixed)
    with ExitStack() as stack:
        for owner, name, value in _substitutes(device, shared_by(stage) == "zero3"):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(held)
        model, estimated = _build(stage, config, shape, device, held)
        rest = {name: float(size) for name, size in held.now.items()}
        held.peaks.clear()
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained = {"number": float(sum(map(Tensor.numel, weights)))}
        trained["bytes"] = float(sum(weight.numel() * weight.element_size() for weight in weights))
        rounded = [weight for layer in rounded_layers(model) for weight in layer.parameters()] if autocast else []
        trained["more than autocast reads"] = float(sum(w.numel() * max(0, w.element_size() - 2) for w in rounded))
        held.label = "gradients"
        for weight in weights:
            if shape.accumulates:
                weight.grad = torch.empty_like(weight)
            else:
                weight.register_post_accumulate_grad_hook(lambda weight: held.rename(weight.grad, "gradients"))
        # A phase begins where the last layer ends, and where gradients reach the last, the first, and any other one.
        depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
        lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
        for number, layer in enumerate(next(lists, ())):
            phase = "last layer" if number == depth - 1 else "first layer" if number == 0 else "layers"
            layer.register_forward_hook(partial(_note_layer, held, phase))
        held.enter("forward")
        try:
            with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
                if shape.kind == "write":
                    _write(model, shape, held)
                else:
                    loss = _pass_forward(model, shape)
            if shape.kind != "write":
                loss.backward()  # outside of autocast, as accelerate has it: its casts of weights are gone
        except Exception as error:  # of an operator that must know values, or has nothing to run on fake tensors
            text = config.get_text_config()
            # 34 bytes a token and unit of hidden size in a layer (arXiv 2205.05198, section 4), 2 where it recomputes.
            layers = 34 + (2 if recomputes(stage) else 34) * text.num_hidden_layers
            guess = shape.sequences * shape.tokens * text.hidden_size * layers
            held.peaks = {"any": (0, {**rest, "activations": float(guess), "gradients": trained["bytes"]})}
            estimated.append(f"activations, by formula ({type(error).__name__}: {first_line(error)[:80]})")
    phases = {name: {part: float(size) for part, size in parts.items() if size}
              for name, (_, parts) in held.peaks.items()}  # fmt: skip
    layers = int(getattr(config.get_text_config(), "num_hidden_layers", 1))
    return Footprint(phases, rest, trained, layers, estimated)


def _substitutes(device: str, splits_head: bool) -> Iterator[tuple[Any, str, Any]]:
    """Yield what stands in for operators of a device's own kernels, and for what fake tensors refuse."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    # Modules would swap their tensors when they are moved or cast: all are where they should be. And a generator that
    # is given a fake state would read it where there is nothing.
    yield nn.Module, "_apply", lambda module, *_, **__: module
    yield torch.cuda, "is_available", lambda: False  # a forked process cannot ask a card
    yield from ((owner, "set_rng_state", lambda _: None) for owner in (torch, torch.random))
    yield nn.functional, "scaled_dot_product_attention", _Attention.attend
    yield utils, "_use_triton", lambda _: False  # how many positions are labelled, only values say
    head = chunked_logprob.ChunkedLogProbFunction.apply if device == "cuda" else kernels.head_logps
    yield utils, "_ChunkedLogProbFunction", type("Head", (), {"apply": staticmethod(head)})
    if device == "cuda" or splits_head:
        yield kernels, "_LARGEST", 0
    if device == "cuda":  # Triton folds a tile of logits in place
        for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
            yield chunked_logprob, name, lambda *_, **__: None


class _Attention(torch.autograd.Function):
    """What a fused kernel keeps: its arguments, what it gives, and a float32 for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = torch.empty_like(q.transpose(1, 2)[..., : v.size(-1)]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, found, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])

    @classmethod
    def attend(cls, *qkv: Tensor, **_: Any) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else qkv[0].dtype
        found: Tensor = cls.apply(*(tensor.to(dtype) for tensor in qkv[:3]))
        return found


class _Product(torch.autograd.Function):
    """A product with a quantised weight as far as memory goes: it is unpacked for it, and dropped again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ grad.new_empty(ctx.shape), None


class _Quantized(nn.Module):
    """A linear layer of the size of bitsandbytes', whose parameters are a tensor class that fake tensors refuse."""

    def __init__(self, layer: Any, stage: Stage, compute: torch.dtype) -> None:
        super().__init__()
        turned = isinstance(layer, Conv1D)
        self.in_features, self.out_features = layer.weight.shape if turned else reversed(layer.weight.shape)
        self.bias, self.compute, count = layer.bias, compute, layer.weight.numel()
        four_bits, blocks = stage.model.quantization != "int8", -(-count // 64)
        packed = torch.empty(-(-count // 2) if four_bits else count, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scales = [torch.empty(blocks if four_bits else self.out_features)]
        if four_bits and stage.model.double_quantization:  # a byte a block, and a float32 for 256 of them
            self.scales = [torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // 256))]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Product.apply(x.to(self.compute), (self.out_features, self.in_features))
        return (found if self.bias is None else found + self.bias).to(x.dtype).clone()  # as PEFT's layer on top does


def _build(stage: Stage, config: PreTrainedConfig, shape: Shape, device: str, held: _Held) -> tuple[Any, list[str]]:
    """Make the model that a stage trains as `load_policy` and TRL's trainers do, and say what is only like it."""
    from trl.trainer.utils import add_fused_lm_head

    dtype, _, _ = compute_types(stage, device)
    config, scores, attention = copy.deepcopy(config), shape.kind == "score", stage.model.attn_implementation
    config.pad_token_id = config.pad_token_id or 0
    if scores:
        start.know_classifier(config)
        config.num_labels = 1
    own = {"attn_implementation": attention} if attention in ("eager", "sdpa") else {}
    estimated = [f"{attention} as sdpa"] if attention and not own else []
    model = base = start.choose_family(config, reward=scores).from_config(config, dtype=dtype, **own)
    if stage.lora is None:
        freeze(model, stage)
    else:
        held.label = "adapters"
        model = adapters.adapt(model.requires_grad_(False), stage, "new", None, reward=scores)
    if stage.lora is not None and stage.model.quantization != "none":
        held.label = "weights"
        for name, layer in list(base.named_modules()):
            parent, _, last = name.rpartition(".")
            is_linear = isinstance(layer, nn.Linear | Conv1D) and ".lora_" not in name
            if is_linear and name.removesuffix(".base_layer").split(".")[-1] not in UNQUANTIZED:
                setattr(base.get_submodule(parent), last, _Quantized(layer, stage, dtype))
        held.label = "adapters"
        for name, module in model.named_modules():
            if ".lora_" in name and hasattr(module, "weight"):
                module.weight = nn.Parameter(module.weight.detach().to(dtype))
        estimated += ["int8 layers"] if stage.model.quantization == "int8" else []
    model.config.use_cache = False
    model.train(shape.kind != "write")
    if stage.trainer.get("disable_dropout", method_fields(stage.method).get("disable_dropout", {}).get("default")):
        switch_off_dropout(model)
    if recomputes(stage) and base.supports_gradient_checkpointing and shape.kind != "write":
        base.gradient_checkpointing_enable({"use_reentrant": False})
        if stage.lora is not None:
            base.enable_input_require_grads()
    if shape.kind == "words":
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    if shape.kind == "score":
        kernels.leave_out_unread(model)
    return model, estimated


def _note_layer(held: _Held, phase: str, _: Any, __: Any, output: Any) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    if held.phase == "forward" and hidden.requires_grad:  # else it is computed again for its gradient
        hidden.register_hook(lambda _: held.enter(phase))
    if held.phase == "forward" and phase == "last layer":
        held.enter("head", "logits")


def _pass_forward(model: Any, shape: Shape) -> Tensor:
    """Read the tokens of a shape as its kind of stage does; the loss."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    size = (1, shape.sequences * shape.tokens) if shape.packed else (shape.sequences, shape.tokens)
    ids_BL = torch.zeros(size, dtype=torch.long)
    # Attention is not given the mask of padding on the right (`leave_out_masks`).
    mask = torch.ones(1, 1, size[1], size[1], dtype=torch.bool) if shape.packed else None
    inputs = {"input_ids": ids_BL, "attention_mask": mask, "use_cache": False}
    if shape.kind == "words":
        values = model(**inputs, labels=ids_BL, fused_lm_head=True).log_probs
    elif shape.kind == "answers":
        hidden_BLH, _ = run_trunk(base.forward, base.get_output_embeddings(), **inputs)
        hidden_NH = hidden_BLH[:, -shape.answer - 1 : -1].flatten(0, 1)
        values, _ = token_logps(base, hidden_NH, torch.zeros(len(hidden_NH), dtype=torch.long))
    elif shape.kind == "score":
        values = model(**inputs).logits.float()
    else:
        logits_NV = model(**inputs, labels=ids_BL).logits.flatten(0, 1).float()
        values = nn.functional.cross_entropy(logits_NV, ids_BL.flatten(), reduction="none")
    return values.sum()


@torch.no_grad()
def _write(model: Any, shape: Shape, held: _Held) -> None:
    """Read prompts into a cache, then hold the cache of whole answers while a token is drawn."""
    prompt = max(shape.tokens - shape.answer, 1)
    output = model(input_ids=torch.zeros(shape.sequences, prompt, dtype=torch.long), use_cache=True, logits_to_keep=1)
    for layer in getattr(output.past_key_values, "layers", ()):
        for tensor in (value for value in vars(layer).values() if isinstance(value, Tensor)):
            held.rename(tensor, "KV cache")
    for _, parts in held.peaks.values():  # the whole cache is there at the highest moment of the last layer
        parts |= {"KV cache": held.now["KV cache"], "activations": parts["activations"] - held.now["KV cache"]}
    held.enter("decoding", "KV cache")
    kept: list[Any] = [torch.empty(held.now["KV cache"] * shape.answer // prompt, dtype=torch.uint8)]
    held.label = "logits"
    logits_BV = output.logits[:, -1].float()
    kept += [logits_BV.softmax(dim=-1), logits_BV.sort(dim=-1), logits_BV.cumsum(dim=-1)]
