"""Kernels against the libraries' own code: equal values, equal gradients, equal steps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import nn

from alignkit.models import kernels


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("temperature", "scale", "softcap"), [(1.0, 1.0, None), (0.7, 0.25, None), (0.7, 2.0, 3.0)])
def test_the_head_equals_trls_kernel(bias: bool, temperature: float, scale: float, softcap: float | None) -> None:
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction

    torch.manual_seed(0)
    tokens, hidden, vocabulary = 37, 16, 101
    targets, pull = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)

    def read(function: Callable) -> list[torch.Tensor]:
        torch.manual_seed(1)
        given = [torch.randn(tokens, hidden) / 4, torch.randn(vocabulary, hidden), torch.randn(vocabulary)]
        given = [tensor.requires_grad_() for tensor in given]
        last = given[2] if bias else None
        found = function(given[0], given[1], last, targets, temperature, 32768, softcap, scale, OPTIONAL_OUTPUTS)
        (found[0] * pull).sum().backward()
        return [*found, *(tensor.grad for tensor in given[: 3 if bias else 2])]

    for ours, theirs in zip(read(kernels.head_logps), read(ChunkedLogProbFunction.apply), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_many_logits_are_left_to_trls_kernel_in_tiles_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.kernels

    tiles: list[int] = []

    class Watched:
        @staticmethod
        def apply(*arguments: object) -> object:
            tiles.append(arguments[5])
            return "theirs"

    monkeypatch.setattr(trl.kernels, "ChunkedLogProbFunction", Watched)
    monkeypatch.setattr(kernels, "_LARGEST", 59)
    hidden, weight, targets = torch.zeros(6, 4), torch.zeros(10, 4), torch.zeros(6, dtype=torch.long)
    assert kernels.head_logps(hidden, weight, None, targets, 1.0, 8192) == "theirs" and tiles == [10]
    assert kernels.head_logps(hidden[:5], weight, None, targets[:5], 1.0, 8192)[0].shape == (5,)


def test_gpt2s_gelu_is_one_kernel_and_equals_its_formula() -> None:
    from transformers.activations import ACT2FN, NewGELUActivation

    import alignkit.models.load  # noqa: F401

    x = torch.linspace(-8, 8, 1001, dtype=torch.float32).requires_grad_()
    again = x.detach().clone().requires_grad_()
    ours, theirs = ACT2FN["gelu_new"](x), NewGELUActivation()(again)
    assert type(ACT2FN["gelu_new"]) is not NewGELUActivation
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-6, atol=2e-6)


HEAP = """
import ctypes, sys, torch
from alignkit.models.kernels import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
read = ctypes.CDLL(None).mallinfo2
read.restype = Info
before = read()
tensors = [torch.empty(5_000_000) for _ in range(10)]  # 20 MB each
mapped = read().hblkhd - before.hblkhd  # bytes that come from the system and go back to it
del tensors
print(mapped // 10**6, (read().arena - before.arena) // 10**6)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_freed_memory_stays_with_the_process(run_python: Callable) -> None:
    (plain_mapped, plain_left), (mapped, left) = (
        map(int, run_python("-c", HEAP, how).stdout.split()) for how in ("plain", "kept")
    )
    assert plain_mapped >= 200 and plain_left < 50
    assert mapped == 0 and left >= 190


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_mask_of_padding_on_the_right_is_left_out_and_changes_nothing(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=200, **sizes)).eval()
    ids = torch.randint(200, (3, 12))
    right = torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [1] + [0] * 11])
    seen: list[bool] = []

    def read(mask: torch.Tensor, *, use_cache: bool = False) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask, use_cache=use_cache).logits[mask.bool()]

    plain = [read(mask).detach() for mask in (right, right.flip(1))]
    kernels.leave_out_masks(model)
    model.base_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["attention_mask"] is None), with_kwargs=True
    )
    torch.testing.assert_close(read(right), plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read(right.flip(1)), plain[1], rtol=0, atol=0)
    torch.testing.assert_close(read(right, use_cache=True), plain[0], rtol=0, atol=1e-6)
    assert seen == [True, False, False]


def test_a_classifier_without_its_mask_reads_the_last_token_and_warns_of_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification, modeling_utils

    said: list[str] = []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", said.append)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "num_labels": 1}
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=200, pad_token_id=0, **sizes)).eval()
    mask = torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [1] + [0] * 11])
    ids = torch.randint(1, 200, (3, 12)) * mask
    alone = [model(input_ids=row[None, kept.bool()]).logits[0] for row, kept in zip(ids, mask, strict=True)]
    model(input_ids=ids, use_cache=False)
    assert len(said) == 1  # the warning that is kept away below
    said.clear()
    kernels.leave_out_masks(model)
    found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-6)
    assert not said


def test_a_model_that_reads_both_ways_keeps_its_mask() -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertLMHeadModel(BertConfig(vocab_size=50, **sizes))
    kernels.leave_out_masks(model)
    assert not model.base_model._forward_pre_hooks
    assert isinstance(model, nn.Module)
