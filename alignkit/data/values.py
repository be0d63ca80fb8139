"""Checks of single values in a record: text, numbers, messages, conversations; each raises BadRow with a reason.

Deliberately knows nothing of formats: it is told the field's name for the reason and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from alignkit.data.files import Record, type_name
from alignkit.data.rejects import BadRow
from alignkit.data.rows import Message, Text

ROLES = frozenset({"system", "user", "assistant", "tool"})
# Names that other formats use. "developer" is OpenAI's newer word for system.
_ROLE_ALIASES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
}
_UNSUPPORTED = ("tool_calls", "function_call")


def need(record: Record, field: str) -> Any:
    """Return the field's value; a missing or null one is a BadRow that lists what is there."""
    value = record.get(field)
    if value is not None:
        return value
    if field in record:
        raise BadRow(f"{field}: is null")
    columns = ", ".join(map(str, record)) or "no fields"
    raise BadRow(f"{field}: is missing; the row has {columns}{suggest_column(field, record)}")


def suggest_column(field: str, columns: Iterable[Any]) -> str:
    """Return a "did you mean" that shows how `columns:` would rename the nearest column, or ""."""
    near = get_close_matches(field.lower(), {str(column).lower(): 0 for column in columns}, n=1, cutoff=0.7)
    for column in columns:
        if near and str(column).lower() == near[0]:
            return f" (did you mean columns: {{{field}: {column}}}?)"
    return ""


def check_text(value: object, field: str) -> str:
    """Return the value when it is text with something in it."""
    if type(value) is not str:
        raise BadRow(f"{field}: is {type_name(value)}; it must be text")
    if not value or value.isspace():
        raise BadRow(f"{field}: is empty")
    return value


def need_text(record: Record, field: str) -> str:
    return check_text(need(record, field), field)


def check_number(value: object, field: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """Return a finite number in [low, high]; true and false are 1 and 0, and CSV's text is read as a number."""
    number = value
    if type(value) is str:
        number = _number_in(value)
    if not isinstance(number, (int, float)):
        shown = repr(value[:40]) if type(value) is str else type_name(value)
        raise BadRow(f"{field}: is {shown}; it must be a number")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(f"{field}: is {number}; it must be a finite number")
    if not low <= number <= high:
        raise BadRow(f"{field}: is {value}; it must be between {low:g} and {high:g}")
    return number


def _number_in(text: str) -> float | None:
    if text.strip().lower() in ("true", "false"):
        return float(text.strip().lower() == "true")
    try:
        return float(text)
    except ValueError:
        return None


def check_list(value: object, field: str) -> list[Any]:
    """Return the value when it is a list with something in it."""
    if type(value) is not list:
        raise BadRow(f"{field}: is {type_name(value)}; it must be a list")
    if not value:
        raise BadRow(f"{field}: is an empty list")
    return value


def check_messages(value: object, field: str) -> list[Message]:
    """Return messages with exactly role and content, roles in our names, at most one system message and that first.

    Accepts role/content and from/value. Other keys of a message are dropped (`Detector.count_ignored` names them),
    but for those that say what to train on: tool calls, and a weight other than 1.
    """
    messages = check_list(value, field)
    checked: list[Message] = []
    for index, message in enumerate(messages):
        if type(message) is not dict:
            raise BadRow(f"{field}[{index}]: is {type_name(message)}; it must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        named = type(role) is str and role in ROLES
        said = type(content) is str and content and not content.isspace()
        if not (named and said and len(message) == 2):
            message = _repair_message(message, f"{field}[{index}]")
            role = message["role"]
        if role == "system" and index:
            raise BadRow(f"{field}[{index}]: {_second_system(checked)}")
        checked.append(message)
    return checked


def _second_system(before: list[Message]) -> str:
    if before[0]["role"] == "system":
        return "is a second system message; a conversation has at most one"
    return "is a system message; it must come first"


def _repair_message(message: dict[str, Any], field: str) -> Message:
    """Bring an unusual message into our shape, or say what is wrong with it."""
    role_key, content_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    for key in _UNSUPPORTED:
        if message.get(key):
            raise BadRow(f"{field}.{key}: calls of tools cannot be trained on; write them as text in content")
    if message.get("weight") not in (None, 1):
        raise BadRow(
            f"{field}.weight: is {message['weight']!r}; messages cannot be weighted, leave the row or turn out"
        )
    role = message.get(role_key)
    if role is None:
        raise BadRow(f"{field}.{role_key}: is {'null' if role_key in message else 'missing'}")
    if type(role) is not str:
        raise BadRow(f"{field}.{role_key}: is {type_name(role)}; it must be text")
    name = role if role in ROLES else _ROLE_ALIASES.get(role)
    if name is None:
        accepted = ", ".join(sorted(ROLES))
        raise BadRow(f"{field}.{role_key}: {role!r} is not a role{_nearest_role(role)}; accepted: {accepted}")
    content = message.get(content_key)
    if content is None:
        raise BadRow(f"{field}.{content_key}: is {'null' if content_key in message else 'missing'}")
    if type(content) is list:
        content = _join_parts(content, f"{field}.{content_key}")
    return {"role": name, "content": check_text(content, f"{field}.{content_key}")}


def _nearest_role(role: str) -> str:
    near = get_close_matches(role.lower(), [*ROLES, *_ROLE_ALIASES], n=1, cutoff=0.6)
    return f" (did you mean {_ROLE_ALIASES.get(near[0], near[0])}?)" if near else ""


def _join_parts(parts: list[Any], field: str) -> str:
    """Join OpenAI's content parts by line ends; only text can be trained on."""
    texts = []
    for index, part in enumerate(parts):
        if type(part) is not dict:
            raise BadRow(f"{field}[{index}]: is {type_name(part)}; it must be an object with type and text")
        if part.get("type") != "text":
            raise BadRow(f"{field}[{index}]: is a part of type {part.get('type')}; only text parts can be used")
        texts.append(check_text(part.get("text"), f"{field}[{index}].text"))
    return "\n".join(texts)


def check_conversation(value: object, field: str) -> list[Message]:
    """Return messages that hold at least one user turn and end with an assistant turn."""
    messages = check_messages(value, field)
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"{field}: the last turn is {messages[-1]['role']}; it must be assistant")
    if messages[0]["role"] != "user" and all(message["role"] != "user" for message in messages):
        raise BadRow(f"{field}: has no user turn")
    return messages


def check_prompt(value: object, field: str) -> Text:
    """Return a prompt: text, or messages that end with a user (or tool) turn."""
    if type(value) is not list:
        return check_text(value, field)
    messages = check_messages(value, field)
    end_prompt(messages, field)
    return messages


def end_prompt(messages: list[Message], field: str) -> None:
    """Refuse a prompt after which it is not the assistant's turn."""
    if messages[-1]["role"] not in ("user", "tool"):
        raise BadRow(f"{field}: the last turn is {messages[-1]['role']}; it must be user")


def check_answer(value: object, field: str) -> Text:
    """Return an answer: text, or messages (one may stand without its list) that end with an assistant turn."""
    if type(value) is str:
        return check_text(value, field)
    if type(value) not in (dict, list):
        raise BadRow(f"{field}: is {type_name(value)}; it must be text or a list of messages")
    messages = check_messages([value] if type(value) is dict else value, field)
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"{field}: the last turn is {messages[-1]['role']}; it must be assistant")
    return messages


def join_prompt(prompt: Text, answers: list[Text], fields: list[str]) -> tuple[Text, list[Text]]:
    """Bring a prompt and its answers to one shape: all text, or all messages.

    Text becomes a user or an assistant turn as soon as anything else is a list of messages. Answers that repeat the
    prompt's turns (UltraFeedback's do) are cut to what follows them.
    """
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return prompt, answers
    given = prompt if isinstance(prompt, list) else None
    tails: list[Text] = []
    for answer, field in zip(answers, fields, strict=True):
        messages = [Message(role="assistant", content=answer)] if isinstance(answer, str) else answer
        start = _answer_start(messages)
        if start:
            _same_prompt(messages[:start], prompt, field)
            if given is not None and messages[:start] != given:
                raise BadRow(f"{field}: starts with other turns than the prompt")
            given = messages[:start]
        tails.append(messages[start:])
    return given if given is not None else [Message(role="user", content=str(prompt))], tails


def _answer_start(messages: list[Message]) -> int:
    """Return where the answer begins in a conversation: after its last turn that is not the assistant's.

    An answer that starts with an assistant turn is an answer throughout, further user turns included.
    """
    if messages[0]["role"] == "assistant":
        return 0
    return max(place for place, message in enumerate(messages) if message["role"] != "assistant") + 1


def _same_prompt(turns: list[Message], prompt: Text, field: str) -> None:
    if isinstance(prompt, str) and all(turn["content"].strip() != prompt.strip() for turn in turns):
        raise BadRow(f"{field}: its turns before the answer do not contain the prompt")
