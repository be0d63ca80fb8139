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
if sys.argv[1] == "kept":
    from alignkit.models.kernels import keep_freed_memory
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


@pytest.mark.parametrize(
    ("kind", "both_ways"), [("llama", {"is_causal": False}), ("gemma3_text", {"use_bidirectional_attention": True})]
)
def test_a_decoder_whose_config_says_that_it_reads_both_ways_does(kind: str, both_ways: dict[str, bool]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "head_dim": 8, "vocab_size": 200, "pad_token_id": 0}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **both_ways)).eval()
    ids, mask = pairs_of_rows()
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    before = model(**inputs).logits
    kernels.leave_out_masks(model)
    kernels.leave_out_unread(model)
    torch.testing.assert_close(model(**inputs).logits, before)


def narrow(kind: str, *, scores: bool, window: int = 4) -> tuple[nn.Module, nn.Module]:
    """A tiny model of a family and its copy, which leaves out what is not read."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from alignkit.models.start import know_classifier

    torch.manual_seed(0)
    # Narrower windows than the rows are long: where a family has them, only masks say so.
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
             "sliding_window": window, "vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1}  # fmt: skip
    sizes |= {} if kind == "gpt2" else {"head_dim": 8, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **sizes)
    config.num_labels = 1
    if scores:
        know_classifier(config)
    family = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    plain = family.from_config(config, attn_implementation="sdpa").eval()
    copied = family.from_config(config, attn_implementation="sdpa").eval()
    copied.load_state_dict(plain.state_dict())
    for model in (plain, copied):
        kernels.leave_out_masks(model)
    kernels.leave_out_unread(copied)
    return plain, copied


LENGTHS = (12, 7, 3)
MASK = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()


def seen_by_the_last_layer(model: nn.Module) -> list[tuple[int, int]]:
    """Note rows and positions that the feed-forward of the last layer is given in each forward pass."""
    seen: list[tuple[int, int]] = []
    layer = (getattr(model.base_model, "layers", None) or model.base_model.h)[-1]
    layer.mlp.register_forward_pre_hook(lambda _, given: seen.append((given[0].shape[0], given[0].shape[1])))
    return seen


def check_equal(models: tuple[nn.Module, nn.Module], read: Callable[[nn.Module], torch.Tensor]) -> None:
    values = [read(model) for model in models]
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-6)
    for value in values:
        (value * torch.linspace(0.1, 1, value.numel()).view(value.shape)).sum().backward()
    theirs, ours = (dict(model.named_parameters()) for model in models)
    for name, parameter in theirs.items():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=2e-6, msg=name)


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "phi3", "gemma3_text", "gpt2"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_last_layer_of_a_classifier_runs_for_the_last_tokens_alone(kind: str) -> None:
    from alignkit.models.files import KNOWN

    assert set(FAMILIES) == set(KNOWN["feed_forward_norms"])
    models = narrow(kind, scores=True)
    seen = seen_by_the_last_layer(models[1])
    ids = torch.randint(3, 200, MASK.shape) * MASK
    check_equal(models, lambda model: model(input_ids=ids, attention_mask=MASK, use_cache=False).logits)
    plain, copied = models
    left = torch.cat([torch.zeros(3, 2, dtype=torch.long), MASK], dim=1).flip(1)  # padding on the left
    ids = torch.randint(3, 200, left.shape) * left
    found = [model(input_ids=ids, attention_mask=left).logits for model in models]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert seen == [(1, 3), (1, 3)]
    states = [
        model(input_ids=ids, attention_mask=left, output_hidden_states=True).hidden_states[-1] for model in models
    ]
    torch.testing.assert_close(*reversed(states), rtol=0, atol=0)  # whoever asks for all has all
    copied.gradient_checkpointing_enable()
    copied.train()(input_ids=ids, attention_mask=left).logits.sum().backward()  # is computed twice: everywhere
    assert seen[2:] == [(3, 14)] * 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_last_layer_runs_for_the_positions_that_losses_read(kind: str) -> None:
    from trl.trainer.utils import add_fused_lm_head

    from alignkit.models.logprobs import pad_answers
    from alignkit.train.ppo.roles import read_answers, return_logps

    kernels.use_head()
    models = narrow(kind, scores=False)
    seen = seen_by_the_last_layer(models[1])
    torch.manual_seed(1)
    rows = [torch.randint(3, 200, (length,)).tolist() for length in LENGTHS]
    batch = pad_answers([row[:2] for row in rows], [row[2:] for row in rows], pad_id=0)  # 10, 5 and 1 tokens
    labels = batch.input_ids_BL.masked_fill(MASK == 0, -100)
    labels[:, :2] = -100
    inputs = {"input_ids": batch.input_ids_BL, "attention_mask": MASK}
    for model in models:
        add_fused_lm_head(model)
    check_equal(models, lambda model: model(**inputs, labels=labels, fused_lm_head=True).log_probs)
    plain = [model(**inputs, use_cache=False).logits for model in models]  # generation, probes
    torch.testing.assert_close(*reversed(plain), rtol=1e-5, atol=1e-6)
    for model in models:
        model.zero_grad()
        return_logps(model)
    check_equal(models, lambda model: read_answers(model, batch)[0])
    assert seen == [(1, 16), (3, 12), (1, 16)]


def test_rows_are_laid_out_behind_each_other_and_a_common_beginning_once() -> None:
    stem = list(range(10, 20))
    rows = [[5, 6], [*stem, 3, 4], [*stem, 2], [*stem, 3, 4], stem[:7]]
    places, parts = kernels.lay_out(rows)
    assert parts == [(0, 2), (0, 7), (0, 11), (10, 2), (11, 1)]  # seven tokens are too few, and a row keeps its last
    assert places[0] == [0, 1] and places[4] == [*range(2, 9)] and places[2] == [*range(9, 20)]
    assert places[1] == [*range(9, 19), 20, 21] and places[3] == [*range(9, 19), 20, 22]


def pairs_of_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of two prompts with two answers each, one of which is there twice, and of a lone token."""
    torch.manual_seed(2)
    one, two = (torch.randint(3, 200, (size,)).tolist() for size in (9, 12))
    rows = [[*one, 7, 8, 9], [*two, 5], [*one, 7, 4, 4, 4, 4], [*two, 5], [6]]
    mask = (torch.arange(14) < torch.tensor([[len(row)] for row in rows])).long()
    return torch.tensor([row + [0] * (14 - len(row)) for row in rows]), mask


@pytest.mark.parametrize("kind", FAMILIES)
def test_tokens_alone_are_read_and_common_beginnings_once(kind: str) -> None:
    ids, mask = pairs_of_rows()
    own = sum(
        size for _, size in kernels.lay_out([row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)])[1]
    )
    assert own < int(mask.sum()) < mask.numel()
    kernels.use_head()
    for scores in (True, False):
        models = narrow(kind, scores=scores, window=64)
        seen: list[int] = []
        trunk = models[1].base_model
        layers = getattr(trunk, "layers", None) or trunk.h
        layers[0].mlp.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].shape[1]))
        if scores:
            check_equal(models, lambda model: model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
        else:
            from trl.trainer.utils import add_fused_lm_head

            for model in models:
                add_fused_lm_head(model)
            labels = ids.masked_fill(mask == 0, -100)
            inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "fused_lm_head": True}
            check_equal(models, lambda model, inputs=inputs: model(**inputs).log_probs)
        assert seen == [own]


def test_dropout_keeps_the_padding_for_which_its_numbers_are_drawn() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=200, n_embd=32, n_layer=1, n_head=2)).train()  # rates of 0.1
    kernels.leave_out_unread(model)
    seen = seen_by_the_last_layer(model)
    ids, mask = pairs_of_rows()
    for _ in range(2):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        model.eval()
    assert seen == [(5, 14), (1, 31)]


def test_noise_on_embeddings_is_that_of_padded_rows() -> None:
    """Its size falls with the places of a row, and rows that begin alike are given noise of their own."""
    from transformers.integrations.neftune import activate_neftune, deactivate_neftune

    ids, mask = pairs_of_rows()
    models = narrow("llama", scores=False, window=64)
    handles = [activate_neftune(model.train(), 5.0) for model in models]

    def read(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(0)
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]

    assert models[1].takes_reads
    torch.testing.assert_close(read(models[1]), read(models[0]), rtol=1e-5, atol=1e-6)
    seen = seen_by_the_last_layer(models[1])
    deactivate_neftune(models[1], handles[1])
    read(models[1])
    assert seen == [(1, 31)]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
def test_packed_layers_that_are_computed_again_for_the_gradients_give_the_same(kind: str) -> None:
    from trl.trainer.utils import add_fused_lm_head

    kernels.use_head()
    ids, mask = pairs_of_rows()
    models = narrow(kind, scores=False, window=64)
    for model in models:
        add_fused_lm_head(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for layer in getattr(model.base_model, "layers", None) or model.base_model.h:
            (getattr(layer, "self_attn", None) or layer.attn).attention_dropout = 0.0
        model.train()
    models[1].gradient_checkpointing_enable()
    seen = seen_by_the_last_layer(models[1])
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "fused_lm_head": True}
    check_equal(models, lambda model: model(**inputs, use_cache=False).log_probs)
    assert seen == [(1, 31)] * 2  # forward, and again on the way back


@torch.no_grad()
def test_a_cache_with_room_gives_the_logits_that_a_growing_one_gives() -> None:
    from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=200, intermediate_size=64)).eval()
    draw = torch.Generator().manual_seed(4)
    caches = [kernels.make_cache(model), DynamicCache(config=model.config)]
    num_rows, moved = 3, set()
    # More than there is room for; of one row; other rows of the same number, and fewer.
    for step, (width, chosen) in enumerate(
        [(7, None), (1, None), (40, [2, 1, 0]), (1, [2, 0]), (1, None), (3, [0, 0, 1]), (1, [1, 2, 0]), (1, None)]
    ):
        if chosen is not None:
            num_rows = len(chosen)
            for cache, select in zip(caches, ("batch_select_indices", "reorder_cache"), strict=True):
                getattr(cache, select)(torch.tensor(chosen))
        ids_BT = torch.randint(200, (num_rows, width), generator=draw)
        ours, theirs = (model(ids_BT, past_key_values=cache, use_cache=True).logits for cache in caches)
        assert torch.allclose(ours, theirs, atol=1e-6, rtol=0), step
        moved.add(caches[0].layers[0].keys.data_ptr())
        for mine, other in zip(caches[0].layers, caches[1].layers, strict=True):
            assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)
    assert len(moved) < 8  # not all steps copy
