from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import AlignKitError, EnvironmentProblem, ModelError
from alignkit.models.chat import Chat, check_vocabulary, load_tokenizer, set_pad_token
from alignkit.models.start import builtin_tokenizer
from alignkit.recipe.stage import Stage

MakeStage = Callable[..., Stage]


def save_tokenizer(path: Path, **tokens: str | None) -> Path:
    tokenizer = builtin_tokenizer()
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(path)
    return path


def test_builtin_models_speak_chatml_unless_told_otherwise(make_stage: MakeStage) -> None:
    assert "<|im_end|>" in str(load_tokenizer(make_stage()).chat_template)
    assert "Human: " in str(load_tokenizer(make_stage(chat_template="plain")).chat_template)


def test_template_that_needs_tokens_the_vocabulary_lacks_is_refused(make_stage: MakeStage) -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(make_stage(chat_template="llama3"))
    assert str(caught.value) == (
        "tiny.yaml: model.chat_template 'llama3' writes <|start_header_id|> and <|end_header_id|> and <|eot_id|>, "
        "which the tokenizer does not have as tokens; use plain, or zephyr, which need no control tokens"
    )


def test_template_of_a_file_or_of_a_name_nobody_knows(make_stage: MakeStage, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert load_tokenizer(make_stage(chat_template=str(tmp_path / "mine.jinja"))).chat_template == "{{ messages }}"
    (tmp_path / "old.jinja").write_bytes("é {{ messages }}".encode("latin-1"))
    with pytest.raises(ModelError, match="old.jinja: is not UTF-8 text: .*; save it as UTF-8"):
        load_tokenizer(make_stage(chat_template=str(tmp_path / "old.jinja")))
    with pytest.raises(ModelError, match="'alpaca' is neither a file nor one of chatml, llama3, plain, zephyr"):
        load_tokenizer(make_stage(chat_template="alpaca"))


def test_settings_of_a_template_are_those_it_reads_and_stay_with_the_model(
    make_stage: MakeStage, tmp_path: Path
) -> None:
    (tmp_path / "mine.jinja").write_text(
        "{{ 'deep' if enable_thinking }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    mine = str(tmp_path / "mine.jinja")
    stage = make_stage(chat_template=mine, chat_template_kwargs={"enable_thinking": True})
    load_tokenizer(stage).save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(make_stage(tokenizer=str(tmp_path / "saved")))
    assert Chat(saved).settings == {"enable_thinking": True}
    assert Chat(saved).write_prompt([{"role": "user", "content": "hi"}]).text == "deephi"
    with pytest.raises(ModelError, match="the chat template does not read thinking; it reads enable_thinking"):
        load_tokenizer(make_stage(chat_template=mine, chat_template_kwargs={"thinking": True}))
    (tmp_path / "mine.jinja").write_text("{% include 'x' %}")
    with pytest.raises(ModelError, match="mine.jinja: includes, imports or extends another file"):
        load_tokenizer(make_stage(chat_template=mine))


def test_tokenizer_comes_from_the_start_then_the_key_then_the_model(make_stage: MakeStage, tmp_path: Path) -> None:
    given = save_tokenizer(tmp_path / "given", eos_token="<|im_end|>")
    assert load_tokenizer(make_stage()).eos_token == "<|endoftext|>"
    assert load_tokenizer(make_stage(tokenizer=str(given))).eos_token == "<|im_end|>"
    with pytest.raises(ModelError, match="no config.json"):  # a start without weights is no start
        load_tokenizer(make_stage(tokenizer=str(given), start=given))


def test_missing_or_shared_pad_token_becomes_a_spare_one_or_else_the_eos() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = builtin_tokenizer()
    for shared in (tokenizer.eos_token, None):
        tokenizer.pad_token = shared
        set_pad_token(tokenizer)
        assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|endoftext|>")
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    set_pad_token(bare)
    assert bare.pad_token == "</s>"


def test_control_tokens_are_listed_longest_first() -> None:
    assert Chat(builtin_tokenizer()).control_tokens == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def test_vocabulary_larger_than_the_embeddings_is_refused() -> None:
    check_vocabulary(builtin_tokenizer(), 512, model="m")
    check_vocabulary(builtin_tokenizer(), 576, model="m")  # padded embeddings are common
    with pytest.raises(ModelError, match="token ids up to 511 but m has 511 embeddings"):
        check_vocabulary(builtin_tokenizer(), 511, model="m")


def test_hub_model_that_cannot_be_had_is_one_line(make_stage: MakeStage) -> None:
    with pytest.raises(AlignKitError) as caught:
        load_tokenizer(make_stage(path="nobody/nothing-like-this"))
    assert isinstance(caught.value, ModelError | EnvironmentProblem)
    assert str(caught.value).startswith("nobody/nothing-like-this is ") and "\n" not in str(caught.value)


def test_a_tokenizer_that_is_missing_or_has_no_eos_is_refused(make_stage: MakeStage, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    endless = save_tokenizer(tmp_path / "t", eos_token=None)
    for path, what in (
        (tmp_path / "empty", "empty has no tokenizer; set model.tokenizer"),
        (endless, "has no eos token"),
    ):
        with pytest.raises(ModelError, match=what):
            load_tokenizer(make_stage(tokenizer=str(path)))
