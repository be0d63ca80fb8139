"""What templates of real model families train: eight shapes of conversation, as TRL ships the templates."""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from alignkit.data import Row, escape_control_tokens, find_control_tokens
from alignkit.errors import ModelError
from alignkit.models.chat import Chat, ConversationError
from alignkit.models.start import builtin_tokenizer

USER, ANSWER = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello you"}
AGAIN, LAST = {"role": "user", "content": "Why so?"}, {"role": "assistant", "content": "Because"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
OFFER = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": PARAMETERS}}
CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
SHAPES: dict[str, list[Any]] = {
    "system": [{"role": "system", "content": "Be kind."}, USER, ANSWER],
    "multi-turn": [USER, ANSWER, AGAIN, LAST],
    "tool call": [
        USER | {"template_kwargs": {"tools": [OFFER]}},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "21 degrees", "name": "weather", "tool_call_id": "call00001"},
        LAST,
    ],
    "reasoning": [USER, ANSWER | {"reasoning_content": "A greeting."}],
    "no system": [USER, ANSWER],
    "assistant first": [ANSWER, AGAIN, LAST],
    "empty system": [{"role": "system", "content": ""}, USER, ANSWER],
    "ends with user": [USER, ANSWER, AGAIN],
}
HEADERS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<｜User｜>", "<｜Assistant｜>", "21 degrees")
TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "qwen3_5_think": ["<|im_start|>", "<|im_end|>"],
    "llama3_1": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma3": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "gptoss": ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"],
    "deepseek_r1_distill": ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
    "glm4moe": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
}


TEMPLATES = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"  # type: ignore[union-attr, index]


def chat_of(name: str, *, special: bool = True) -> Chat:
    tokenizer = builtin_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in TOKENS[name]])
    if name == "gemma3":
        tokenizer.bos_token = TOKENS[name][0]
    if name == "deepseek_r1_distill":
        tokenizer.eos_token = TOKENS[name][-1]
    shipped = Path(__file__).resolve().parents[2] / "alignkit" / "models" / "templates" / f"{name}.jinja"
    file = shipped if shipped.exists() else TEMPLATES / f"{name}.jinja"
    tokenizer.chat_template = file.read_text()
    return Chat(tokenizer, name=name)


def learnt(chat: Chat, messages: list[Any]) -> list[str]:
    (texts,) = chat.encode([messages])
    return [chat.tokenizer.decode(text.ids[start:end]) for text in texts for start, end in text.spans]


def check_shapes(chat: Chat) -> None:
    """Every shape is refused in words, or its answers are learnt as generation would write them; in pairs too."""
    for shape, messages in SHAPES.items():
        prompt = messages if shape == "ends with user" else messages[:-1]
        try:
            found = learnt(chat, messages)
            (pair,) = chat.encode_prompt_completion([prompt], [[LAST] if shape == "ends with user" else messages[-1:]])
            (start,) = chat.encode_prompts([prompt])
        except ConversationError as error:
            assert shape in ("tool call", "assistant first", "system", "empty system"), (shape, str(error))
            continue
        said = [turn for turn in messages if turn["role"] == "assistant"]
        assert len(found) == len(said), (shape, found)
        for text, turn in zip(found, said, strict=True):
            assert turn["content"] in text and turn.get("reasoning_content", "") in text, (shape, text)
            assert ("Rome" in text) == ("tool_calls" in turn), (shape, text)
            assert not text.startswith(HEADERS) and "21 degrees" not in text, (shape, text)
            assert chat.tokenizer(text, add_special_tokens=False).input_ids[-1] in chat.stop_ids, (shape, text)
        assert pair.ids[: pair.prompt_length] == start, shape  # pairs begin where ppo samples from
        if shape != "ends with user":
            assert chat.tokenizer.decode(pair.ids[pair.prompt_length :]) == found[-1], shape


@pytest.mark.parametrize("name", TOKENS)
def test_shapes_of_conversations_under_templates_of_families(name: str) -> None:
    check_shapes(chat_of(name))


REAL = {
    "llama3": TOKENS["llama3_1"],
    "llama3_1": TOKENS["llama3_1"],
    "qwen3": TOKENS["qwen3"],
    "gemma3": TOKENS["gemma3"],
    "gptoss": TOKENS["gptoss"],
    "deepseek_v3": ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜tool▁calls▁begin｜>"],
}
METHODS = {"sft": "", "dpo": "", "rm": "", "ppo": ", reward: builtin:true-reward, max_new_tokens: 4"}


def check_tables(chat: Chat, directory: Path) -> None:
    """Each method trains on what `apply_chat_template` writes, token for token, and learns its answers alone."""
    from alignkit.data import Rejects
    from alignkit.errors import DataError
    from alignkit.recipe import load_recipe, resolve
    from alignkit.train.tables import prepare_tables

    def apply(turns: list[Any], *, prompt: bool = False) -> str:
        kept = [dict(turn) for turn in turns if turn["content"] or turn["role"] != "system"]
        if not kept:  # apply_chat_template refuses to begin
            return chat.template.render([], prompt=prompt)
        given = {"tools": tools, "add_generation_prompt": prompt, "tokenize": False}
        return str(chat.tokenizer.apply_chat_template(kept, **given))

    def ids(turns: list[Any], *, prompt: bool = False) -> list[int]:
        text = apply(turns, prompt=prompt)
        if not prompt:  # up to the end of the answer
            end = (chat.template.call_end if "tool_calls" in turns[-1] else chat.template.end).token
            start, thoughts = apply(turns[:-1], prompt=True), turns[-1].get("reasoning_content", "")
            if thoughts not in text or not text.startswith(start):  # written by us, on from where generation starts
                opened = start.endswith("<think>\n")
                text = start + "<think>\n" * (not opened and bool(thoughts)) + thoughts
                text += "\n</think>\n\n" * (opened or bool(thoughts)) + turns[-1]["content"]
            text = text[: text.rindex(end) + len(end)] if end in text[len(start) :] else text + end
        return list(chat.tokenizer(text, add_special_tokens=False).input_ids)

    for shape, method in product(SHAPES, METHODS):
        turns = [{key: value for key, value in turn.items() if key != "template_kwargs"} for turn in SHAPES[shape]]
        tools = SHAPES[shape][0].get("template_kwargs", {}).get("tools")
        prompt, answer = (turns, LAST) if shape == "ends with user" else (turns[:-1], turns[-1])
        other = {"role": "assistant", "content": "No."}
        pair = {"prompt": prompt} | ({} if method == "ppo" else {"chosen": [answer], "rejected": [other]})
        row = ({"messages": turns} if method == "sft" else pair) | ({"tools": tools} if tools else {})
        (directory / "rows.jsonl").write_text(json.dumps(row))
        (directory / "recipe.yaml").write_text(
            "model: {path: builtin:tiny-llama, init: scratch, config: {max_position_embeddings: 2048}}\n"
            f"{method}: {{data: ./rows.jsonl{METHODS[method]}}}"
        )
        stage = resolve(load_recipe(directory / "recipe.yaml"), method)
        try:
            table = list(prepare_tables(stage, chat, directory / "cache", rejects=Rejects()).train)
        except DataError as error:
            assert shape in ("tool call", "assistant first"), (shape, method, str(error))
            assert re.search(r"rows.jsonl:1: (the chat template|its first turn is the assistant's)", str(error))
            continue
        where = (shape, method)
        if method == "sft":
            numbers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
            answers = [(len(ids(turns[:number], prompt=True)), ids(turns[: number + 1])) for number in numbers]
            for start, whole in answers:
                assert any(
                    made["input_ids"][: len(whole)] == whole and made["labels"][start : len(whole)] == whole[start:]
                    for made in table
                ), where
            learnt = sum(len(made["labels"]) - made["labels"].count(-100) for made in table)
            assert learnt == sum(len(whole) - start for start, whole in answers), where  # and nothing else
        elif method == "rm":
            assert table[0]["answers_ids"] == [ids([*prompt, answer]), ids([*prompt, other])], where
        else:
            assert table[0]["prompt_ids"] == ids(prompt, prompt=True), where
            for side, said in {"chosen_ids": answer, "rejected_ids": other}.items():
                assert method == "ppo" or table[0]["prompt_ids"] + table[0][side] == ids([*prompt, said]), where


@pytest.mark.parametrize("name", TOKENS)
def test_every_method_trains_on_what_apply_chat_template_writes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_tables(chat_of(name), tmp_path)


def test_shapes_of_conversations_with_real_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.environ.get("ALIGNKIT_TOKENIZERS")
    if not folder:
        pytest.skip("ALIGNKIT_TOKENIZERS names no directory of tokenizers (tok-llama3, tok-gptoss, ...)")
    monkeypatch.chdir(tmp_path)
    for path in sorted(Path(folder).glob("tok-*")):
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        if not tokenizer.chat_template:  # gpt-oss ships its template beside the tokenizer
            tokenizer.chat_template = (TEMPLATES / f"{path.name.removeprefix('tok-')}.jinja").read_text()
        chat = Chat(tokenizer, name=path.name)
        check_shapes(chat)
        check_tables(chat, tmp_path)
        check_forged(chat, REAL[path.name.removeprefix("tok-")])


@pytest.mark.parametrize("name", ["chatml", "gemma3", "deepseek_r1_distill"])
def test_templates_without_tools_are_refused_by_name(name: str) -> None:
    chat = chat_of(name)
    with pytest.raises(ConversationError, match=f"template .{name}. does not write `tools`; use one that does"):
        chat.encode([SHAPES["tool call"]])
    if name != "deepseek_r1_distill":  # it writes calls, but not behind the thoughts that its prompt opens
        with pytest.raises(ConversationError, match=f"template .{name}. does not write tool calls; use one that does"):
            chat.encode([[USER, *SHAPES["tool call"][1:]]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", ['<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
                   "</tool_call><|im_end|>", "<think>\n\n</think>\n\nBecause<|im_end|>"]),
        ("llama3_1", ['{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>', "Because<|eot_id|>"]),
        ("gptoss", [' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
                    "<|channel|>final<|message|>Because<|return|>"]),
    ],
)  # fmt: skip
def test_calls_of_tools_are_learnt_and_their_results_are_not(name: str, expected: list[str]) -> None:
    assert learnt(chat_of(name), SHAPES["tool call"]) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", "<think>\nA greeting.\n</think>\n\nHello you<|im_end|>"),
        ("qwen3_5_think", "A greeting.\n</think>\n\nHello you<|im_end|>"),  # the prompt gives <think>
        ("deepseek_r1_distill", "A greeting.\n</think>\n\nHello you<｜end▁of▁sentence｜>"),
        ("gptoss", "<|channel|>analysis<|message|>A greeting.<|end|><|start|>assistant<|channel|>final<|message|>"
                   "Hello you<|return|>"),
        ("glm4moe", "\n<think>A greeting.</think>\nHello you<|user|>"),  # the next turn's header ends an answer
        ("chatml", "<think>\nA greeting.\n</think>\n\nHello you<|im_end|>"),
    ],
)  # fmt: skip
def test_reasoning_is_learnt_as_generation_writes_it(name: str, expected: str) -> None:
    chat = chat_of(name)
    assert learnt(chat, SHAPES["reasoning"]) == [expected]
    inside = {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello you"}
    assert learnt(chat, [USER, inside]) == [expected]


def test_whole_answers_stop_generation_and_parts_of_them_do_not() -> None:
    chat = chat_of("gptoss")
    names = set(chat.tokenizer.convert_ids_to_tokens(chat.stop_ids))
    assert {"<|return|>", "<|call|>"} <= names and "<|end|>" not in names
    assert chat.dated and not chat_of("qwen3").dated


def with_template(text: str, **templates: str) -> PreTrainedTokenizerFast:
    tokenizer = builtin_tokenizer()
    tokenizer.chat_template = {"default": text, **templates} if templates else text
    return tokenizer


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_template_that_always_writes_the_next_header_is_cut_before_it() -> None:
    chat = Chat(with_template(TURNS + "{{ '<|im_start|>assistant\\n' }}"))
    assert learnt(chat, [USER, ANSWER, AGAIN, LAST]) == ["Hello you<|im_end|>", "Because<|im_end|>"]
    (whole,) = chat.encode([[USER, ANSWER]])[0]
    assert chat.tokenizer.decode(whole.ids).count("assistant") == 1


def test_of_several_templates_tools_choose_theirs() -> None:
    prompt = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    chat = Chat(with_template(prompt, tool_use="{{ tools | tojson }}" + prompt))
    assert learnt(chat, [USER, ANSWER]) == ["Hello you<|im_end|>"]
    offered = [USER | {"template_kwargs": {"tools": [OFFER]}}, ANSWER]
    (text,) = chat.encode([offered])[0]
    assert chat.tokenizer.decode(text.ids).startswith('[{"type": "function"')


def test_template_that_never_ends_or_calls_itself_is_stopped() -> None:
    for text, message in (
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "did not render within 1 s"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself without end"),
        ("{% for a in range(1000000000) %}{% endfor %}", r"\(the tokenizer's own\) fails: Range too big"),
    ):
        with pytest.raises(ModelError, match=message):
            Chat(with_template(text)).check()


def test_what_a_row_gives_a_template_is_read_or_refused() -> None:
    turns = [USER | {"template_kwargs": {"enable_thinking": False}}, ANSWER]
    (text,) = chat_of("qwen3").write(turns)
    assert text.start == 0 and "<think>\n\n</think>\n\nHello you" in text.text
    with pytest.raises(ConversationError, match=r"template \(chatml\) does not read chat_template_kwargs: enable_thin"):
        chat_of("chatml").write(turns)


def test_a_mistake_of_a_template_is_told_from_its_refusal() -> None:
    wrong = Chat(with_template("{% for a in range(1e9) %}{% endfor %}"), name="loop.jinja")
    with pytest.raises(ConversationError) as error:
        wrong.encode([SHAPES["no system"]])
    assert str(error.value) == (
        "the chat template (loop.jinja) refuses the conversation: TypeError: 'float' object cannot be interpreted as "
        "an integer"
    )


def check_forged(chat: Chat, tokens: list[str]) -> None:
    """Control tokens of the template in a user's text are found and can be defused, whatever the tokenizer flags."""
    ids = chat.tokenizer.convert_tokens_to_ids(tokens)

    def count(row: Row) -> list[int]:
        (found,) = chat.encode_prompts([row.prompt])
        return [found.count(token) for token in ids]

    clean = count(Row("prompt", [{"role": "user", "content": "Hi  there"}], ()))
    for token in tokens:
        forged = Row("prompt", [{"role": "user", "content": f"Hi {token} there"}], ())
        assert token in find_control_tokens(forged, chat.control_tokens), token
        assert count(forged) != clean, token
        assert count(escape_control_tokens(forged, chat.control_tokens)) == clean, token


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", ["gemma3", "gptoss", "deepseek_r1_distill", "llama3_1", "glm4moe"])
def test_forged_turns_are_found_and_defused(name: str, special: bool) -> None:
    check_forged(chat_of(name, special=special), TOKENS[name])
