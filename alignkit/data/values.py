"""Checks of single values in a record: text, numbers, messages, conversations; each raises BadRow with a reason."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from alignkit.data.files import Record, type_name
from alignkit.data.rows import BadRow, Message, Text

# What data sets call columns, roles and keys; of several names the first one with something in it counts.
KNOWN: dict[str, Any] = json.loads(Path(__file__).with_name("formats.json").read_text("utf-8"))
_CALL = "call"  # an assistant's turn whose content is a call of a tool
ROLE_NAMES: dict[str, str] = KNOWN["roles"]  # in small letters
ROLES = frozenset(ROLE_NAMES.values()) - {_CALL}
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning", "thought", "thoughts")
_TRAINED_KEYS = {
    **dict.fromkeys(("weight", "train", "training", "trainable", "loss", "learn", "loss_weight", "loss_mask"), True),
    **dict.fromkeys(("masked", "ignore", "no_loss"), False),
}
_OF_TURNS = {*ROLE_KEYS, *CONTENT_KEYS}
_OTHER_KEYS = ("name", "tool_call_id", "tool_calls", "function_call", "tools")
_KEYS = {*_OF_TURNS, *REASONING_KEYS, *_TRAINED_KEYS, *_OTHER_KEYS}
# What cannot be honoured, unless it is empty: columns and keys of messages; keys of messages.
_UNUSABLE_KEYS: dict[str, str] = KNOWN["unusable"] | KNOWN["unusable in messages"]
# A turn that holds a question and its answer: which key is whose.
_SIDES = {"input": "user", "output": "assistant", "question": "user", "answer": "assistant"}


@dataclass(slots=True)
class Reading:
    """One record being read: where it stands, what the source says of roles, and what is noted on the way."""

    roles: Mapping[str, str] = field(default_factory=dict)  # the source's names of roles
    for_prompts: bool = False  # the answers are of no interest: a conversation may end with a user's turn
    record: Record = field(default_factory=dict)
    place: str = ""
    used: set[str] = field(default_factory=set)  # columns that were read
    unread: dict[str, None] = field(default_factory=dict)  # keys of messages that nothing reads
    noted: set[str] = field(default_factory=set)  # what is odd about the row

    def need(self, name: str) -> Any:
        """Take the column's value; a missing or null one is a BadRow that lists what is there."""
        self.used.add(name)
        value = self.record.get(name)
        if value is not None:
            return value
        if name in self.record:
            raise BadRow(f"{name}: is null")
        columns = ", ".join(map(str, self.record)) or "no fields"
        raise BadRow(f"{name}: is missing; the row has {columns}{suggest_column(name, self.record)}")

    def first(self, *names: str) -> str | None:
        """Find the first of the names whose column holds something."""
        for name in names:
            if name in self.record and not is_empty(self.record[name]):
                self.used.add(name)
                return name
        return None

    def pick(self, *names: str) -> str:
        """Find the first of the names whose column holds something, or is there at all, or is the usual one."""
        return self.first(*names) or next((name for name in names if name in self.record), names[0])


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, blank text, an empty list or object, or those as JSON text (of CSV)."""
    if type(value) is str:
        return not value or value.isspace() or (len(value) < 5 and value.strip() in ("[]", "{}", "null"))
    return value is None or (type(value) in (list, dict) and not value)


def suggest_column(field: str, columns: Iterable[Any]) -> str:
    """A "did you mean" that shows how `columns:` would rename the nearest column, or ""."""
    names = {str(column).lower(): column for column in columns}
    near = get_close_matches(field.lower(), names, n=1, cutoff=0.7)
    return f" (did you mean columns: {{{field}: {names[near[0]]}}}?)" if near else ""


def check_text(value: object, field: str) -> str:
    """Require text with something in it."""
    if type(value) is not str:
        raise BadRow(f"{field}: is {type_name(value)}; it must be text")
    if not value or value.isspace():
        raise BadRow(f"{field}: is empty")
    return value


def check_number(value: object, field: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """Require a finite number in [low, high]; true and false are 1 and 0, and CSV's text is read as a number."""
    number = value
    if type(value) is str:
        try:
            number = float({"true": "1", "false": "0"}.get(value.strip().lower(), value))
        except ValueError:
            number = None
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


def check_list(value: object, field: str) -> list[Any]:
    """Require a list with something in it."""
    if type(value) is not list:
        raise BadRow(f"{field}: is {type_name(value)}; it must be a list")
    if not value:
        raise BadRow(f"{field}: is an empty list")
    return value


def check_json(value: Any, field: str, kind: type) -> Any:
    """Require a list or an object, which may stand as JSON text; it must be writable as JSON."""
    try:
        value = json.loads(value) if type(value) is str else value
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"{field}: is no JSON: {error}") from None
    if type(value) is not kind:
        raise BadRow(f"{field}: is {type_name(value)}; it must be {type_name(kind())}")
    return value


def check_tools(value: Any, field: str, *, calls: bool = False) -> list[dict[str, Any]]:
    """Read tools that the template is given, or calls of them, in OpenAI's shape; a bare function is put into one."""
    tools = []
    for index, tool in enumerate(check_json(value, field, list)):
        function = tool.get("function", tool) if type(tool) is dict else None
        if type(function) is not dict or type(function.get("name")) is not str:
            what = "an object with function: {name, arguments}" if calls else (
                "a function's description with a name and parameters")  # fmt: skip
            raise BadRow(f"{field}[{index}]: must be {what}")
        if calls:
            arguments = function.get("arguments")
            arguments = {} if is_empty(arguments) else check_json(arguments, f"{field}[{index}].arguments", dict)
            known = {"id": tool["id"]} if tool.get("id") is not None else {}
            tool = {"type": "function", **known, "function": {"name": function["name"], "arguments": arguments}}
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools


def check_messages(value: object, field: str, reading: Reading) -> list[Message]:
    """Read messages in our shape (see Message), whatever their roles and keys; what cannot be honoured is a BadRow."""
    checked: list[Message] = []
    for index, message in enumerate(_split_sides(check_list(value, field))):
        if type(message) is not dict:
            raise BadRow(f"{field}[{index}]: is {type_name(message)}; it must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        named = type(role) is str and role in ROLES and role not in reading.roles
        said = type(content) is str and content and not content.isspace()
        if named and said and len(message) == 2:
            checked.append(message)  # type: ignore[arg-type]
        elif read := _read_message(message, f"{field}[{index}]", reading):
            checked.append(read)
    if not checked:
        raise BadRow(f"{field}: holds nothing but an empty system message")
    return checked


def _split_sides(turns: list[Any]) -> list[Any]:
    """Take turns of [question, answer] or {input, output} apart into messages; leave other lists as they are."""
    first = turns[0]
    if type(first) is list:
        if not all(type(turn) is list and len(turn) == 2 for turn in turns):
            return turns
        sides = [zip(("user", "assistant"), turn, strict=True) for turn in turns]
    elif type(first) is dict and first and _OF_TURNS.isdisjoint(first):
        names = _SIDES | ROLE_NAMES
        if not all(type(turn) is dict and all(key in names for key in turn) for turn in turns):
            return turns
        sides = [((names[key], value) for key, value in turn.items()) for turn in turns]  # type: ignore[misc]
    else:
        return turns
    return [{"role": role, "content": content} for turn in sides for role, content in turn if content is not None]


def _read_message(message: dict[str, Any], field: str, reading: Reading) -> Message | None:
    """Bring an unusual message into our shape, or say what is wrong with it; None for an empty system message."""
    role = _read_role(message, field, reading)
    content, reasoning = _read_content(message, field, role)
    read = Message(role="assistant" if role == _CALL else role, content=content)
    if role in ("assistant", _CALL):
        said: dict[str, bool] = {}
        for key, means in _TRAINED_KEYS.items():
            if message.get(key) is not None:
                number = check_number(message[key], f"{field}.{key}")
                if number not in (0.0, 1.0):
                    raise BadRow(f"{field}.{key}: is {message[key]!r}; a turn is learnt or not: 1 or 0, true or false")
                said[key] = bool(number) is means
        if len(set(said.values())) > 1:
            raise BadRow(f"{field}: {' and '.join(said)} contradict each other")
        if not all(said.values()):
            read["trained"] = False
        if reasoning:
            read["reasoning_content"] = reasoning
    elif reasoning:
        raise BadRow(f"{field}: reasoning is the assistant's, and the turn is {role}")
    for key in ("tool_calls", "function_call"):
        if not is_empty(message.get(key)):
            given = message[key] if key == "tool_calls" else [message[key]]
            if role != "assistant":
                raise BadRow(f"{field}.{key}: calls of tools are the assistant's, and the turn is {role}")
            read["tool_calls"] = check_tools(given, f"{field}.{key}", calls=True)
    if role == _CALL and content.lstrip()[:1] in ("{", "["):
        # JSON becomes a call; what names no function stays what the assistant wrote.
        try:
            calls = json.loads(content)
        except (ValueError, RecursionError):
            calls = None
        calls = calls if type(calls) is list else [calls]
        if calls and all(type(call) is dict and "name" in call.get("function", call) for call in calls):
            read["tool_calls"], read["content"] = check_tools(calls, field, calls=True), ""
    if role == "tool":
        for key in ("name", "tool_call_id"):
            if message.get(key) is not None:
                read[key] = check_text(message[key], f"{field}.{key}")  # type: ignore[literal-required]
    if not is_empty(message.get("tools")):
        if role != "system":
            raise BadRow(f"{field}.tools: belong to the row or to its system message")
        read["template_kwargs"] = {"tools": check_tools(message["tools"], f"{field}.tools")}
    unread = [key for key in message.keys() - _KEYS if not is_empty(message[key]) and message[key] is not False]
    if unusable := [key for key in unread if key in _UNUSABLE_KEYS]:
        raise BadRow(f"{field}.{unusable[0]}: {_UNUSABLE_KEYS[unusable[0]]}")
    if message.get("name") is not None and message.get("role") != "tool":
        unread.append("name")
    reading.unread.update((f"{field[: field.rindex('[')]}[].{key}", None) for key in unread)
    if not read["content"].strip() and read.get("tool_calls"):
        read["content"] = ""
    elif not read["content"].strip() and role != "tool":
        if role == "system" and "template_kwargs" not in read:
            return None
        raise BadRow(f"{field}.{_key_of(message, CONTENT_KEYS)}: is empty")
    return read


def _key_of(message: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Find the first of the keys that is there, with something in it if one has."""
    there = [key for key in keys if key in message]
    usual = {"role": "role", "content": "value" if "from" in message and "role" not in message else "content"}
    return next((key for key in there if message[key] is not None), there[0] if there else usual[keys[0]])


def _read_role(message: dict[str, Any], field: str, reading: Reading) -> str:
    key = _key_of(message, ROLE_KEYS)
    role = message.get(key)
    if type(role) is not str:
        found = f"{type_name(role)}; it must be text" if role is not None else "null" if key in message else "missing"
        raise BadRow(f"{field}.{key}: is {found}")
    name = reading.roles.get(role) or ROLE_NAMES.get(role.strip().lower())
    if name is None:
        near = get_close_matches(role.lower(), ROLE_NAMES, n=1, cutoff=0.6)
        nearest = ROLE_NAMES[near[0]] if near else ""
        meant = f" (did you mean {'assistant' if nearest == _CALL else nearest}?)" if near else ""
        raise BadRow(
            f"{field}.{key}: {role!r} is not a role{meant}; accepted: {', '.join(sorted(ROLES))}; "
            f"data.roles: {{{role}: user}} maps other names"
        )
    return name


def _read_content(message: dict[str, Any], field: str, role: str) -> tuple[str, str]:
    key = _key_of(message, CONTENT_KEYS)
    content, where = message.get(key), f"{field}.{key}"
    for other in CONTENT_KEYS:
        if other != key and not is_empty(message.get(other)) and message[other] != content:
            raise BadRow(f"{field}.{other}: stands beside {key} and says something else")
    thoughts = [message[name] for name in REASONING_KEYS if not is_empty(message.get(name))]
    if thoughts and any(thought != thoughts[0] for thought in thoughts):
        raise BadRow(f"{field}: has two texts of reasoning that differ")
    reasoning = check_text(thoughts[0], f"{field}: the reasoning") if thoughts else ""
    if type(content) is list:  # OpenAI's parts, of which only text can be trained on
        parts: dict[bool, list[str]] = {False: [], True: []}
        for index, part in enumerate(content):
            if type(part) is not dict:
                raise BadRow(f"{where}[{index}]: is {type_name(part)}; it must be an object with type and text")
            kind = part.get("type")
            kind = "text" if kind in ("input_text", "output_text") else kind
            if kind not in ("text", "thinking", "reasoning"):
                raise BadRow(f"{where}[{index}]: is a part of type {kind}; only text parts can be used")
            text = next((name for name in (kind, "text", "value", "content") if part.get(name) is not None), "text")
            parts[kind != "text"].append(check_text(part.get(text), f"{where}[{index}].{text}"))
        content, reasoning = "\n".join(parts[False]), reasoning or "\n".join(parts[True])
    elif type(content) is dict and role == "tool":
        content = json.dumps(check_json(content, where, dict), ensure_ascii=False)
    calls = [message.get("tool_calls"), message.get("function_call")] if role == "assistant" else []
    if content is None and (role == "system" or not all(map(is_empty, calls))):
        content = ""
    if type(content) is not str:
        missing = "null" if key in message else "missing"
        raise BadRow(f"{where}: is {missing if content is None else f'{type_name(content)}; it must be text'}")
    return content, reasoning


def check_conversation(value: object, field: str, reading: Reading) -> list[Message]:
    """Read messages that hold a user turn and end with an assistant turn; what follows the last one is cut off."""
    messages = check_messages(value, field, reading)
    roles = [message["role"] for message in messages]
    if roles[0] != "user" and "user" not in roles:
        raise BadRow(f"{field}: has no user turn")
    _note_opening(roles, reading)
    if reading.for_prompts or roles[-1] == "assistant":
        return messages
    if "assistant" not in roles:
        raise BadRow(f"{field}: the last turn is {roles[-1]}; it must be assistant")
    last = max(place for place, role in enumerate(roles) if role == "assistant")
    if "user" not in roles[:last]:
        raise BadRow(f"{field}: no turn of the user comes before an answer; {_SWAPPED}")
    reading.noted.add("conversations end with another turn than the assistant's, which was cut off")
    return messages[: last + 1]


_SWAPPED = "where roles are swapped, data.roles: {user: assistant, assistant: user} swaps them back"


def _note_opening(roles: Sequence[str], reading: Reading) -> None:
    if roles[0] == "assistant" or roles[:2] == ["system", "assistant"]:
        reading.noted.add(f"conversations begin with the assistant's turn; {_SWAPPED}")


def check_prompt(value: object, field: str, reading: Reading) -> Text:
    """Read a prompt: text, or messages that end with a user (or tool) turn."""
    if type(value) is not list:
        return check_text(value, field)
    messages = check_messages(value, field, reading)
    end_prompt(messages, field)
    _note_opening([message["role"] for message in messages], reading)
    for message in messages:
        message.pop("trained", None)
    return messages


def end_prompt(messages: list[Message], field: str) -> None:
    """Refuse a prompt after which it is not the assistant's turn."""
    if messages[-1]["role"] not in ("user", "tool"):
        raise BadRow(f"{field}: the last turn is {messages[-1]['role']}; it must be user")


def check_answer(value: object, field: str, reading: Reading) -> Text:
    """Read an answer: text, or messages (one may stand without its list) that end with an assistant turn."""
    if type(value) is str:
        return check_text(value, field)
    if type(value) not in (dict, list):
        raise BadRow(f"{field}: is {type_name(value)}; it must be text or a list of messages")
    messages = check_messages([value] if type(value) is dict else value, field, reading)
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"{field}: the last turn is {messages[-1]['role']}; it must be assistant")
    return messages


def join_prompt(prompt: Text, answers: list[Text], fields: list[str]) -> tuple[Text, list[Text]]:
    """Bring a prompt and its answers to one shape, all text or all messages; answers that repeat the prompt are cut."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return prompt, answers
    given = prompt if isinstance(prompt, list) else None
    tails: list[Text] = []
    for answer, name in zip(answers, fields, strict=True):
        messages = [Message(role="assistant", content=answer)] if isinstance(answer, str) else answer
        # After the prompt, or after its last turn that is not the assistant's; an answer that starts with an assistant
        # turn is one throughout, further user turns included.
        start = 0
        if messages[0]["role"] != "assistant":
            repeats = given and messages[: len(given)] == given and len(messages) > len(given)
            start = len(given) if given and repeats else last_asked(messages)
        if start:
            turns = messages[:start]
            if isinstance(prompt, str) and all(turn["content"].strip() != prompt.strip() for turn in turns):
                raise BadRow(f"{name}: its turns before the answer do not contain the prompt")
            if given is None:
                given = turns
            elif turns != given[-start:] or any(turn["role"] != "system" for turn in given[:-start]):
                raise BadRow(f"{name}: starts with other turns than the prompt")
        tails.append(messages[start:])
    return given if given is not None else [Message(role="user", content=str(prompt))], tails


def last_asked(messages: list[Message]) -> int:
    """Where the last answer of a conversation begins."""
    return max(place for place, message in enumerate(messages) if message["role"] != "assistant") + 1
