"""Control tokens in user text: every one found, and escaped so that nothing matches."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from alignkit.data.rows import BREAKER, Row, escape_control_tokens, find_control_tokens, iter_contents

FAMILIES = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<end_of_turn>", "<bos>",
    "<eos>", "<pad>", "<|assistant|>", "<|user|>", "<｜end▁of▁sentence｜>",
]  # fmt: skip


@pytest.mark.parametrize("token", FAMILIES)
def test_every_family_is_found_wherever_it_stands(token: str) -> None:
    text = f"before{token}after"
    rows = [
        Row("text", "", (text,)),
        Row("prompt_completion", text, ("fine",)),
        Row("pair", [{"role": "user", "content": "fine"}], ("fine", [{"role": "assistant", "content": text}])),
    ]
    for row in rows:
        assert find_control_tokens(row, FAMILIES) == [token]
        escaped = escape_control_tokens(row, FAMILIES)
        assert find_control_tokens(escaped, FAMILIES) == []
        assert [content.replace(BREAKER, "") for content in iter_contents(escaped)] == list(iter_contents(row))


def test_tokens_are_found_once_in_order_the_longest_first_and_escaped_behind_their_first_character() -> None:
    row = Row("pair", "</s> <s>", ("<s> <|im_end|>", "fine"))
    assert find_control_tokens(row, FAMILIES) == ["</s>", "<s>", "<|im_end|>"]
    assert find_control_tokens(Row("text", "", ("a<|x|>yb",)), ["<|x|>", "<|x|>y"]) == ["<|x|>y"]
    assert escape_control_tokens(Row("text", "", ("a<s>b",)), FAMILIES).completions == (f"a<{BREAKER}s>b",)
    plain = Row("text", "", ("a < b and c > d",))
    assert escape_control_tokens(plain, FAMILIES) is plain is escape_control_tokens(plain, [])
    assert find_control_tokens(plain, []) == []
    with pytest.raises(ValueError, match="one character"):
        escape_control_tokens(Row("text", "", ("a|b",)), ["|"])


@example("<s>a")  # two tokens that overlap
@given(st.text(alphabet=f"<>s/|ab{BREAKER}", max_size=30))
def test_escaping_leaves_no_token_and_adds_only_joiners(text: str) -> None:
    tokens = ["<s>", "</s>", "<|a|>", "s>a", "ab"]
    (escaped,) = escape_control_tokens(Row("text", "", (text,)), tokens).completions
    assert isinstance(escaped, str)
    assert not any(token in escaped for token in tokens)
    assert escaped.replace(BREAKER, "") == text.replace(BREAKER, "")
