"""Conversations put together from a template's frame are those that rendering gives, for every template TRL ships."""

from __future__ import annotations

import random
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import alignkit.models
from alignkit.models.template import ConversationError, Template

SHIPPED = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"  # type: ignore[union-attr, index]
OWN = Path(alignkit.models.__file__).with_name("templates")
CONTROLS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<end_of_turn>", "<|end|>",
    "<|return|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|user|>", "</s>",
]  # fmt: skip
ROLES = [
    ["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant", "user", "assistant"], ["user"],
    ["system", "user", "assistant", "user"],
]  # fmt: skip
# What templates ask for, white space that they strip, and what JSON or Jinja would change.
PIECES = ["hello ", "word ", "  lead", "trail \n", "\nnext", "/no_think", "<tool_response>x</tool_response>", "{{x}}",
          "<tool_response>", "<think>a</think> b", "</think>", "é'q\"", "\t", "a\n\nb"]  # fmt: skip


def template_of(source: str) -> Template:
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    clock = datetime(2026, 1, 2)
    return Template(source, name="a", controls=CONTROLS, eos="</s>", settings=settings, clock=clock)


def outcome(write: Any, *given: Any, **named: Any) -> Any:
    try:
        return write(*given, **named)
    except ConversationError as error:
        return str(error)


@pytest.mark.parametrize("path", sorted([*SHIPPED.glob("*.jinja"), *OWN.glob("*.jinja")]), ids=lambda path: path.stem)
def test_a_frame_gives_what_rendering_gives(path: Path) -> None:
    draw, template, filled = random.Random(0), template_of(path.read_text(encoding="utf-8")), 0
    for _ in range(40):
        roles = draw.choice(ROLES)
        contents = ["".join(draw.choices(PIECES, k=draw.randint(1, 4))) for _ in roles]
        messages: list[Any] = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        messages[-1] |= {"trained": draw.random() < 0.8} if roles[-1] == "assistant" else {}
        first = draw.choice([0, len(roles) - 1]) if roles[-1] == "assistant" else 0
        rendered = outcome(template._write, messages, first)
        assert outcome(template.write, messages, first=first) == rendered, messages
        frame = template._frames.get((first, *((turn["role"], turn.get("trained", True)) for turn in messages)))
        filled += frame is not None and frame.fill(contents) == rendered
    if path.stem in ("chatml", "zephyr", "qwen2_5", "qwen3", "llama3_1", "gemma3", "deepseek_r1_distill", "phi3"):
        assert filled > 5


def test_a_question_about_the_content_decides_the_frame() -> None:
    source = ("{% for m in messages %}[{{ m.role }}]{% if 'loud' in m.content %}!{% endif %}{{ m.content | trim }}</s>"
              "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    template = template_of(source)

    def text_of(*contents: str) -> str:
        roles = ("user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        return template.write(messages)[-1].text

    for _ in range(4):  # the third time without rendering
        assert text_of(" a ", "b\n") == "[user]a</s>[assistant]b</s>"
    frame = template._frames[0, ("user", True), ("assistant", True)]
    assert frame is not None and frame.tries == 0
    assert frame.fill([" c", "d"])[0].text == "[user]c</s>[assistant]d</s>"  # type: ignore[index]
    assert frame.fill(["be loud", "d"]) is None
    assert text_of("be loud", "d") == "[user]!be loud</s>[assistant]d</s>"


@pytest.mark.parametrize(
    "asks",
    ["{{ m.content | length }}", "{% if m.content[0] == 'a' %}!{% endif %}", "{{ m.content | upper }}",
     "{% for letter in m.content %}{{ letter }}{% endfor %}", "{% if 'x' in m.content ~ '' %}!{% endif %}",
     "{% set text %}{{ m.content }}{% endset %}{% if 'x' in text %}!{% endif %}", "{{ m.content | tojson }}",
     "{% if 'x' in '%s' % m.content %}!{% endif %}", "{% if 'x' in 'a' + m.content %}!{% endif %}"],
)  # fmt: skip
def test_what_a_mark_cannot_answer_is_rendered(asks: str) -> None:
    source = "{% for m in messages %}[{{ m.role }}]" + asks + "{{ m.content }}</s>{% endfor %}"
    template = template_of(source + "{% if add_generation_prompt %}[assistant]{% endif %}")
    messages = [{"role": "user", "content": "axe"}, {"role": "assistant", "content": "b"}]
    assert template.write(messages) == template._write(messages, 0)
    assert not any(template._frames.values())
