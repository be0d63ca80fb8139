from __future__ import annotations

import copy
from array import array
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from alignkit.errors import ModelError
from alignkit.models.chat import Chat, ConversationError, Message
from alignkit.models.start import builtin_tokenizer

SYSTEM: Message = {"role": "system", "content": "Be kind."}
FIRST: list[Message] = [{"role": "user", "content": "Hi 😀 there"}, {"role": "assistant", "content": "Hello,  you"}]
SECOND: list[Message] = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because\n\nof it"}]
SHIPPED = Path(__file__).resolve().parents[2] / "alignkit" / "models" / "templates"
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def shipped(name: str) -> str:
    return (SHIPPED / f"{name}.jinja").read_text()


def trl_template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def tokenizer_with(template: str | None, *, llama3: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = builtin_tokenizer()
    if llama3:
        tokenizer.add_special_tokens({"bos_token": LLAMA3_TOKENS[0], "extra_special_tokens": LLAMA3_TOKENS[1:]})
    tokenizer.chat_template = template
    return tokenizer


def answers(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> list[str]:
    (texts,) = Chat(tokenizer).encode([messages])
    return [tokenizer.decode(text.ids[start:end]) for text in texts for start, end in text.spans]


@pytest.mark.parametrize(
    ("name", "lead", "end"),
    [("chatml", "", "<|im_end|>"), ("llama3", "", "<|eot_id|>"), ("zephyr", "", "<|endoftext|>"),
     ("plain", " ", "<|endoftext|>")],
)  # fmt: skip
def test_shipped_templates_train_exactly_the_answers_and_their_end(name: str, lead: str, end: str) -> None:
    tokenizer = tokenizer_with(shipped(name), llama3=name == "llama3")
    expected = [f"{lead}Hello,  you{end}", f"{lead}Because\n\nof it{end}"]
    for messages in ([*FIRST, *SECOND], [SYSTEM, *FIRST, *SECOND]):
        assert answers(tokenizer, messages) == expected
        ids = Chat(tokenizer).encode([messages])[0][-1].ids
        assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    chat = Chat(tokenizer)
    chat.check()
    assert chat.end_of_turn == tokenizer.convert_tokens_to_ids(end)
    assert chat.stop_ids == sorted({508, tokenizer.convert_tokens_to_ids(end)})


def test_plain_template_renders_a_dialogue_for_base_models() -> None:
    text = tokenizer_with(shipped("plain")).apply_chat_template([SYSTEM, *FIRST, SECOND[0]], tokenize=False)
    assert text == "Be kind.\n\nHuman: Hi 😀 there\n\nAssistant: Hello,  you<|endoftext|>\n\nHuman: Why?"


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2", "llama3"])
def test_llama3_instruct_templates_are_split_without_generation_blocks(name: str) -> None:
    tokenizer = tokenizer_with(trl_template(name), llama3=True)
    assert answers(tokenizer, [SYSTEM, *FIRST, *SECOND]) == ["Hello,  you<|eot_id|>", "Because\n\nof it<|eot_id|>"]
    chat = Chat(tokenizer)
    chat.check()
    ids = chat.encode([[SYSTEM, *FIRST]])[0][-1].ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert ids == tokenizer.apply_chat_template([SYSTEM, *FIRST], return_dict=False)


@pytest.mark.parametrize(("name", "strip"), [("llama3", ""), ("qwen2_5", "\n")])
def test_derived_answers_agree_with_trl_training_templates(name: str, strip: str) -> None:
    ours = tokenizer_with(trl_template(name), llama3=True)
    theirs = tokenizer_with(trl_template(f"{name}_training"), llama3=True)
    messages = [SYSTEM, *FIRST, *SECOND]
    # Qwen2.5's training variant also trains the line break before an answer, which generation is given.
    assert answers(ours, messages) == [answer.strip(strip) for answer in answers(theirs, messages)]


def test_answer_that_later_turns_rewrite_is_learnt_in_a_text_of_its_own() -> None:
    tokenizer = tokenizer_with(trl_template("qwen3"))
    Chat(tokenizer).check()
    thought = "<think>\n\n</think>\n\n"
    assert answers(tokenizer, [*FIRST, *SECOND]) == [
        f"{thought}Hello,  you<|im_end|>",
        f"{thought}Because\n\nof it<|im_end|>",
    ]
    assert tokenizer.chat_template == trl_template("qwen3")  # what is saved stays the model's own


def test_prompt_and_completion_meet_where_generation_starts() -> None:
    for name in ("chatml", "zephyr", "plain"):
        tokenizer = tokenizer_with(shipped(name))
        chat = Chat(tokenizer)
        prompt = [SYSTEM, *FIRST, SECOND[0]]
        split = chat.encode_prompt_completion([prompt], [[SECOND[1]]])[0]
        at_use = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert split.ids[: split.prompt_length] == at_use == chat.encode_prompts([prompt])[0]
        assert split.ids[-1] == chat.end_of_turn
        assert tokenizer.decode(split.ids[split.prompt_length : -1]).strip() == "Because\n\nof it"


def test_plain_text_rows_end_with_eos_and_keep_the_prompt_as_it_is_alone() -> None:
    chat = Chat(tokenizer_with(None))
    prompts, completions = ["Question: ", "a\n\n", ""], ["the answer", "b", "only"]
    for prompt, completion, split in zip(
        prompts, completions, chat.encode_prompt_completion(prompts, completions), strict=True
    ):
        assert split.ids[: split.prompt_length] == chat.tokenizer(prompt).input_ids
        assert chat.tokenizer.decode(split.ids) == prompt + completion + "<|endoftext|>"
    assert chat.encode_texts(["ab"]) == [[*chat.tokenizer("ab").input_ids, 508]]


def bos_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(None, llama3=True)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def test_tokenizer_with_its_own_bos_gives_exactly_one_everywhere() -> None:
    tokenizer = bos_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.chat_template = shipped("llama3")
    chat = Chat(tokenizer)
    chat.check()
    found = [
        chat.encode([FIRST])[0][-1].ids,
        chat.encode_texts(["ab"])[0],
        chat.encode_prompt_completion(["ab"], [" cd"])[0].ids,
        chat.encode_prompt_completion([FIRST[:1]], [FIRST[1:]])[0].ids,
        chat.encode_prompts(["ab"])[0],
    ]
    assert [ids.count(bos) for ids in found] == [1] * 5 and all(ids[0] == bos for ids in found)
    split = chat.encode_prompt_completion(["ab"], [" cd"])[0]
    assert split.ids[: split.prompt_length] == tokenizer("ab").input_ids


def space_mark_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 has: a mark before the first word, byte fallback, special tokens for bos and eos."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz[]/INST.\n"]
    pairs = [("▁", "a"), ("▁", "y"), ("e", "s"), ("▁y", "es"), ("h", "i")]
    vocabulary = {token: number for number, token in enumerate([*letters, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def test_tokenizers_with_a_space_mark_keep_the_ids_of_the_whole_text() -> None:
    tokenizer = space_mark_tokenizer()
    messages: list[Message] = [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "yes."},
    ]  # fmt: skip
    chat = Chat(tokenizer)
    chat.check()
    encoded = chat.encode([messages])[0][-1]
    assert encoded.ids == tokenizer.apply_chat_template(messages, return_dict=False)
    spans = [tokenizer.convert_ids_to_tokens(encoded.ids[start:end]) for start, end in encoded.spans]
    assert spans == [["▁yes", "</s>"], ["▁yes", ".", "</s>"]]
    split = chat.encode_prompt_completion([messages[:3]], [messages[3:]])[0]
    assert tokenizer.convert_ids_to_tokens(split.ids[split.prompt_length :]) == ["▁yes", ".", "</s>"]


def test_messages_without_a_template_say_what_to_set() -> None:
    chat = Chat(tokenizer_with(None))
    for call in (lambda: chat.encode([FIRST]), chat.check):
        with pytest.raises(ModelError) as caught:
            call()
        assert str(caught.value) == (
            "the tokenizer has no chat template: set model.chat_template: chatml | llama3 | zephyr | plain"
        )


BLOCK = "{% generation %}{% endgeneration %}"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ bos_token }}" + shipped("llama3"), "writes the BOS token twice"),
        (shipped("chatml").replace("message['content'] + '<|im_end|>' }}\n        {%- endgeneration %}",
                                   "message['content'] }}\n        {%- endgeneration %}{{- '<|im_end|>' }}"),
         "never trains a token that ends an answer"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}" + BLOCK + "{% endif %}",
         "marks 0 of 2 answers"),
    ],
)  # fmt: skip
def test_templates_that_would_teach_the_wrong_thing_are_refused(template: str, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        Chat(tokenizer_with(template, llama3="bos" in template)).check()


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}",
         "cannot be told from the rest; give it {% generation %} blocks, or set"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}" + BLOCK, "refuses the conversation"),  # the sandbox
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used_are_refused(template: str, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        Chat(tokenizer_with(template)).encode([FIRST])


def test_refused_conversation_is_named_by_its_place_in_the_batch() -> None:
    chat = Chat(
        tokenizer_with("{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + shipped("chatml"))
    )
    with pytest.raises(ConversationError, match="the chat template refuses the conversation: too long") as caught:
        chat.encode([FIRST, [*FIRST, *SECOND]])
    assert caught.value.index == 1


def test_labels_and_flags_follow_the_spans() -> None:
    chat = Chat(tokenizer_with(shipped("chatml")))
    encoded = chat.encode([FIRST])[0][-1]
    kept = [token for start, end in encoded.spans for token in encoded.ids[start:end]]
    assert kept == [token for token in encoded.labels if token != -100]
    assert chat.tokenizer.decode(kept) == "Hello,  you<|im_end|>"


@pytest.mark.parametrize("llama3", [False, True])
def test_packed_ids_and_labels_are_those_of_lists(llama3: bool) -> None:
    chat = Chat(tokenizer_with(shipped("llama3" if llama3 else "chatml"), llama3=llama3))
    written = [*chat.write(FIRST), *chat.write_pair("one\n\ntwo ", "three  four"), *chat.write_pair("", "")]
    for one, other in zip(chat.tokenize(written), chat.tokenize(written, packed=True), strict=True):
        assert (type(one.ids), type(other.ids), other.ids.typecode) == (list, array, "i")
        assert (one.ids, one.labels) == (other.ids.tolist(), other.labels.tolist())
        assert (one.spans, one.prompt_length) == (other.spans, other.prompt_length)


def test_encoding_leaves_the_tokenizer_and_the_messages_as_they_were() -> None:
    tokenizer = tokenizer_with(shipped("chatml"))
    before, messages = tokenizer.backend_tokenizer.to_str(), copy.deepcopy(FIRST)
    Chat(tokenizer).encode([messages])
    assert tokenizer.backend_tokenizer.to_str() == before and messages == FIRST
