"""Numbers on a card: TRL's Triton head, bf16 margins of the invariants, samplers, 4-bit layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (0.7, 30.0)])
def test_the_chunked_head_equals_a_plain_softmax(
    dtype: torch.dtype, temperature: float, softcap: float | None, note: Callable[..., None]
) -> None:
    from alignkit.models.logprobs import token_logps

    torch.manual_seed(0)
    vocabulary, hidden, num = 128_256, 1024, 300
    head = torch.nn.Linear(hidden, vocabulary, bias=False, device="cuda", dtype=dtype)
    states = torch.randn(num, hidden, device="cuda", dtype=dtype).requires_grad_()
    targets = torch.randint(vocabulary, (num,), device="cuda")
    config = SimpleNamespace(final_logit_softcapping=softcap, model_type="llama")
    config.get_text_config = lambda: config
    base = SimpleNamespace(config=config, get_output_embeddings=lambda: head)
    weights = torch.randn(num, device="cuda")
    logps, entropy = token_logps(base, states, targets, temperature)
    (logps * weights).sum().backward()
    found = logps.detach(), entropy.detach(), states.grad, head.weight.grad

    exact = states.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    logits = exact[0] @ exact[1].T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    table = (logits / temperature).log_softmax(-1)
    wanted = table.gather(1, targets[:, None]).squeeze(1)
    (wanted * weights.double()).sum().backward()
    right = wanted.detach(), -(table.exp() * table).sum(-1).detach(), exact[0].grad, exact[1].grad
    names = ("log-probability", "entropy", "gradient of states", "gradient of the head")
    errors = {name: _distance(one, other) for name, one, other in zip(names, found, right, strict=True)}
    note("head", dtype=str(dtype), temperature=temperature, softcap=softcap, **errors)
    allowed = 1e-3 if dtype == torch.float32 else 2e-2  # tf32 may be on; bf16 operands
    assert max(errors.values()) < allowed


@pytest.mark.parametrize("kind", ["full", "lora", "nf4", "int8"])
def test_bf16_margins_of_probe_and_step_zero(kind: str, tmp_path: Path, note: Callable[..., None]) -> None:
    from alignkit.models.load import load_trained
    from alignkit.models.parameters import compare_probes, take_probe
    from alignkit.recipe import load_recipe, resolve
    from alignkit.runs.directory import RunDir
    from alignkit.train.dpo import build

    model = tmp_path / "model"
    _write_llama(model)
    lora = "" if kind == "full" else "lora: {r: 16, target_modules: all-linear}\n"
    quantization = "" if kind in ("full", "lora") else f", quantization: {kind}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: m\nmodel: {{path: {model}{quantization}, chat_template: chatml}}\nlaunch: {{device: cuda}}\n"
        f"{lora}dpo: {{data: {{path: "
        "builtin:preferences, max_rows: 32}, batch_size: 8, max_steps: 1, samples: {num: 0}}\n"
    )
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    built = build(resolve(load_recipe(recipe), "dpo"), run)
    trainer, size = built.trainer, len(built.chat.tokenizer)
    trainer.model.cuda() if kind in ("full", "lora") else None
    first = take_probe(trainer.model, vocab_size=size, reward=False)
    second = take_probe(trainer.model, vocab_size=size, reward=False)
    with torch.autocast("cuda", torch.bfloat16):
        cast = take_probe(trainer.model, vocab_size=size, reward=False)
    scale = max(1.0, max(map(abs, first["values"])))
    margins = {"twice": _furthest(first, second) / scale, "autocast": _furthest(first, cast) / scale}
    trainer.model.save_pretrained(tmp_path / "saved")
    if kind == "full":
        loaded = load_trained(tmp_path / "saved", device="cuda")
        margins["saved"] = _furthest(first, take_probe(loaded, vocab_size=size, reward=False)) / scale
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in range(8)]))
    with torch.no_grad(), trainer.compute_loss_context_manager():
        margins["ln 2"] = abs(float(trainer.compute_loss(trainer.model, dict(batch))) - 0.6931472)
    note("margins", kind=kind, **margins)
    assert margins["twice"] < 1e-4
    assert compare_probes(first, cast | {"dtype": "bfloat16"}) is None
    assert margins["ln 2"] < 1e-3


def test_the_sampler_draws_the_distribution_at_a_real_vocabulary(note: Callable[..., None]) -> None:
    """The sampler's tokens have the logits' probabilities: 64 rows x 128,256, a peaked distribution."""
    from alignkit.models.generation import InverseTransform

    torch.manual_seed(0)
    rows, vocabulary = 64, 128_256
    scores = torch.full((rows, vocabulary), -20.0, device="cuda")
    wanted = torch.tensor([0.5, 0.25, 0.125, 0.125], device="cuda")
    scores[:, :4] = wanted.log()
    ids = torch.zeros((rows, 1), dtype=torch.long, device="cuda")
    steps = 200
    uniforms = torch.rand(rows, steps, device="cuda", dtype=torch.float32)
    processor, counts = InverseTransform(uniforms, temperature=1.0), torch.zeros(4, device="cuda")
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for step in range(steps):
        if step == 10:
            began.record()
        picked = processor(ids, scores.clone()).argmax(-1)
        counts += torch.bincount(picked, minlength=4)[:4]
        ids = torch.cat([ids, picked[:, None]], dim=1)
    ended.record()
    torch.cuda.synchronize()
    share = counts / counts.sum()
    note("sampler", ms_per_token=began.elapsed_time(ended) / (steps - 10), share=share.tolist())
    assert (share - wanted).abs().max() < 0.02


def test_bits_per_parameter_of_nf4(note: Callable[..., None], tmp_path: Path) -> None:
    """Blocks of 64 with double quantisation hold 4.127 bits a parameter (arXiv 2305.14314, section 3)."""
    from alignkit.models.load import Precision, read_base

    _write_llama(tmp_path / "model", hidden_size=1024)
    torch.cuda.empty_cache()
    model = read_base(str(tmp_path / "model"), Precision(torch.bfloat16, "cuda", "nf4"))
    layers = [layer for layer in model.modules() if type(layer).__name__ == "Linear4bit"]
    num = sum(layer.in_features * layer.out_features for layer in layers)
    held = 0
    for layer in layers:
        state = layer.weight.quant_state
        held += layer.weight.numel() * layer.weight.element_size() + state.absmax.numel() * state.absmax.element_size()
        held += state.state2.absmax.numel() * state.state2.absmax.element_size() + state.offset.element_size()
    bits = 8 * held / num
    note("bits", bits=bits)
    assert abs(bits - 4.127) < 0.01


def _distance(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def _furthest(one: dict, other: dict) -> float:
    return max(abs(a - b) for a, b in zip(one["values"], other["values"], strict=True))


def _write_llama(directory: Path, *, hidden_size: int = 512) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignkit.models.start import builtin_tokenizer

    tokenizer = builtin_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
