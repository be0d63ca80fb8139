from __future__ import annotations

import pytest
import torch

from alignkit.errors import ModelError
from alignkit.models.start import builtin_config, builtin_tokenizer, override_config, random_model


@pytest.mark.parametrize(("path", "size"), [("builtin:tiny-gpt2", 322_176), ("builtin:tiny-llama", 158_016)])
def test_size_and_seed_of_embedded_models(path: str, size: int) -> None:
    model = random_model(builtin_config(path), seed=0, dtype=torch.float32)
    again = random_model(builtin_config(path), seed=0, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    rounded = random_model(builtin_config(path), seed=0, dtype=torch.bfloat16)
    for a, b, c in zip(model.parameters(), again.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.to(torch.bfloat16), c)


@pytest.mark.parametrize("text", ["Hello, world", "  two  spaces\n\nand lines\t", "naïve 😀 日本語", "", "\x00\x7f"])
def test_every_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = builtin_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_control_tokens_are_single_ids_at_the_end_of_the_vocabulary() -> None:
    tokenizer = builtin_tokenizer()
    assert len(tokenizer) == 512
    assert tokenizer("a<|im_end|>b<|endoftext|>").input_ids[1::2] == [511, 508]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (508, 508, 509)
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids


def test_overrides_take_both_spellings_and_derive_the_head_size() -> None:
    gpt2 = override_config(builtin_config("builtin:tiny-gpt2"), {"hidden_size": 128, "n_layer": 3})
    assert (gpt2.n_embd, gpt2.n_layer, gpt2.n_head) == (128, 3, 4)
    llama = override_config(builtin_config("builtin:tiny-llama"), {"hidden_size": 128})
    assert (llama.hidden_size, llama.head_dim) == (128, 32)


def test_unknown_names_are_reported_all_at_once_with_the_nearest() -> None:
    for make, said in (
        (lambda: builtin_config("builtin:tiny-gtp2"),
         "'builtin:tiny-gtp2' is not one of builtin:tiny-gpt2, builtin:tiny-llama, builtin:rnnsearch, "
         "builtin:rnnencdec; did you mean builtin:tiny-gpt2?"),
        (lambda: override_config(builtin_config("builtin:tiny-gpt2"), {"n_layr": 3, "widht": 1}, where="a.yaml:3"),
         "a.yaml:3: model.config has no 'n_layr' in a gpt2 model; did you mean n_layer?\n"
         "a.yaml:3: model.config has no 'widht' in a gpt2 model"),
    ):  # fmt: skip
        with pytest.raises(ModelError) as caught:
            make()
        assert str(caught.value) == said


@pytest.mark.parametrize("overrides", [{"n_layer": "three"}, {"n_head": 7}])
def test_values_that_make_no_model_are_refused(overrides: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="model.config"):
        config = override_config(builtin_config("builtin:tiny-gpt2"), overrides)
        random_model(config, seed=0, dtype=torch.float32)
