"""A chat template by what it does: what it can write, where generation begins, where an answer ends.

Nothing is told from a template's text. It is asked by rendering short conversations, and a conversation is split by
comparing the rendering of the turns before an answer, as generation would be given them, with that of the answer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from itertools import product
from typing import Any

from jinja2 import meta
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

from alignkit.errors import ModelError
from alignkit.models.files import KNOWN
from alignkit.models.frames import Frame, can_be_learnt, learn_frame
from alignkit.runs.signals import time_limit

OTHERS = "set model.chat_template: chatml | llama3 | zephyr | plain"
_RENDER_SECONDS = 1
_MOST_FRAMES = 1000  # sequences of roles whose frames are kept
_PLAIN = {"role", "content", "trained"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\s*(.*)\Z", re.DOTALL)
# Whatever an expression of a template can raise inside the sandbox.
_FAILURES = (TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)
# What transformers gives every template.
_GIVEN = {"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"}
_GIVEN |= {"bos_token", "eos_token", "pad_token", "unk_token"}
Span = tuple[int, int]  # half open, in characters
Message = Any  # a turn; alignkit.data.rows says what each of its keys means


class ConversationError(ModelError):
    """The template cannot render or split one conversation; `index` is its place in a batch."""

    def __init__(self, what: str, index: int = 0) -> None:
        super().__init__(what)
        self.index = index


class Endless(ConversationError):
    """The template does not come to an end."""


@dataclass(slots=True)
class Written:
    """A text to be tokenised: `start` characters are its prompt, `spans` are learnt; a `plain` one gets BOS and eos."""

    text: str
    spans: list[Span] = field(default_factory=list)
    start: int = 0
    plain: bool = False


@dataclass(frozen=True)
class _End:
    """What ends an answer: the token, whether we have to append it, and what the template writes after it."""

    token: str
    appended: str = ""
    dropped: str = ""


_A, _B, _THOUGHT, _TOOL = "Xanswer", "Xlater", "Xthought", "Xtool"  # capitals: no template changes them
_SYSTEM, _USER, _ANSWER, _CALL, _OTHER_CALL, _RESULT, _OFFER = KNOWN["probes"]  # turns, and a tool


class Template:
    """One template text with the settings it is rendered with."""

    def __init__(
        self, source: str, *, name: str, controls: Sequence[str], eos: str, settings: Mapping[str, Any], clock: datetime
    ) -> None:
        self.source, self.name, self._settings, self._eos = source, name, dict(settings), eos
        self._strftime = clock.strftime
        self._control = re.compile("|".join(map(re.escape, controls)) or r"(?!)")
        self.marked = _GENERATION.search(source) is not None
        self._frames: dict[tuple[Any, ...], Frame | None] = {}

    @cached_property
    def _has_frames(self) -> bool:
        return can_be_learnt(_compile_jinja_template(self.source).environment, self.source)

    @cached_property
    def end(self) -> _End:
        """What ends a whole answer."""
        return self._find_end(_ANSWER, {"role": "user", "content": _B})

    @cached_property
    def call_end(self) -> _End:
        """What ends an answer that calls a tool."""
        if not self._call_form:
            return self.end
        call = self._prepare(_CALL)
        # Behind several calls, where the template writes several: one may be closed by a token of its own (DeepSeek).
        both = call | {"tool_calls": [_in_form(_OTHER_CALL, self._call_form)["tool_calls"][0], *call["tool_calls"]]}
        return self._find_end(both if _A in self._try([_USER, both]) else call, _RESULT)

    @cached_property
    def reads_clock(self) -> bool:
        """Whether the date is part of what is written, as far as a short conversation tells."""
        now, texts = self._strftime, set()
        for clock in (datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 10, 9, 8, 7)):
            self._strftime = clock.strftime
            texts.add(self._try([_USER], prompt=True))
        self._strftime = now
        return len(texts) > 1

    @cached_property
    def reads_reasoning(self) -> bool:
        """Whether a turn's `reasoning_content` (or `thinking`, which transformers fills in) is written."""
        return _THOUGHT in self._try([_USER, _ANSWER | {"reasoning_content": _THOUGHT}])

    @cached_property
    def _writes_tools(self) -> bool:
        return _TOOL in self._try([_USER | {"template_kwargs": {"tools": [_OFFER]}}], prompt=True)

    @cached_property
    def _call_form(self) -> tuple[Any, type] | None:
        """How a call is given: its empty content ("", None or no key: ...) and the type of its arguments."""
        for form in product(("", None, ...), (dict, str)):
            text = self._try([_USER, _in_form(_CALL, form), _RESULT])
            if "Xname" in text and _A in text:
                return form
        return None

    def describe(self) -> str:
        """Say what was found out about the template."""
        appended = ", which it does not write: added to the last answer" if self.end.appended == self._eos else ""
        said = f"an answer ends with {self.end.token}{appended}, which is trained"
        if self.call_end.token != self.end.token:
            said += f", a tool call with {self.call_end.token}"
        if not self._writes_tools or self._call_form is None:
            said += "; no tools"
        if not self.reads_reasoning:
            said += "; reasoning is written as <think> in the answer"
        return said + ("; it reads the clock" if self.reads_clock else "")

    def frame(self) -> str:
        """The texts around turns: before the first, between them, and at the end of an answer."""
        asked = self._try([_SYSTEM, _USER], prompt=True) or self._try([_USER], prompt=True)
        return asked + self.end.token

    def check(self) -> None:
        """Raise ModelError when no conversation can be used."""
        answered = [_USER, _ANSWER, _USER, _ANSWER]
        if not (self._try([_USER], prompt=True) and self.marked and self._try(answered)):
            return  # it may want a system turn, or tools: the rows will tell
        text, marks = self._render(answered, mark=True)
        if len(marks) < 2:
            what = f"the chat template marks {len(marks)} of 2 answers with {{% generation %}}; put the block around "
            raise ModelError(f"{what}every assistant message, or {OTHERS}")
        if not text[: marks[-1][1]].rstrip().endswith(self.end.token) and not self.end.appended:
            what = "the chat template never trains a token that ends an answer, so the model would not learn to stop; "
            raise ModelError(f"{what}end the assistant message with eos_token inside {{% generation %}}, or {OTHERS}")

    def write_text(self, messages: Sequence[Any], *, prompt: bool = False) -> str:
        """Write turns up to the end of the last one; with `prompt` up to where generation starts after them."""
        text = self.render(self._prepare_all(messages), prompt=prompt)
        _require_written(messages, text)
        end = self._end_of(messages[-1])
        return text if prompt else text.removesuffix(end.dropped) + end.appended

    def write(self, messages: Sequence[Any], *, first: int = 0) -> list[Written]:
        """Write a conversation with the answers that are learnt, which are those of its turns from `first` on.
        An answer that the template writes otherwise once later turns follow (without its thoughts, with another end)
        is learnt as generation produces it, in a text of its own that ends there; the whole conversation comes last."""
        contents = [message.get("content") for message in messages if _PLAIN.issuperset(message)]
        plain = all(type(text) is str and text.strip() and "think>" not in text for text in contents)
        if not self._has_frames or not plain or len(contents) < len(messages):
            return self._write(messages, first)
        # Without rendering, where the template's frame for these roles is known.
        key = (first, *((message["role"], message.get("trained", True)) for message in messages))
        if key not in self._frames and len(self._frames) < _MOST_FRAMES:
            environment = _compile_jinja_template(self.source).environment
            self._frames[key] = None
            with suppress(ConversationError):
                self._frames[key] = learn_frame(partial(self._write, first=first), messages, environment)
        frame = self._frames.get(key)
        found: list[Written] | None = frame.fill(contents) if frame else None
        if frame is None or found is None or not frame.tries:
            return found or self._write(messages, first)
        frame.tries -= 1
        written = self._write(messages, first)
        if found != written:
            self._frames[key] = None
        return written

    def _write(self, messages: Sequence[Any], first: int) -> list[Written]:
        given = self._prepare_all(messages)
        try:
            return self._compare(messages, given, first)
        except ConversationError as error:
            if isinstance(error, Endless) or not self.marked or first:
                raise
            return [Written(*self._render(given, mark=True))]

    def _compare(self, messages: Sequence[Any], given: list[Any], first: int) -> list[Written]:
        answered = [n for n, message in enumerate(messages) if message["role"] == "assistant" and n >= first]
        trained = [number for number in answered if messages[number].get("trained", True)]
        last, answers = len(given) - 1, given[first]["role"] == "assistant"
        single = [last] if first == last and answers else []
        parts = {number: self._split(messages, given, number) for number in {*trained, *single}}
        text = "".join(parts[last]) if last in parts else self.render(given)
        blank = self._end_of(given[last]).dropped
        if last in parts and not first and blank.isspace():
            text += blank  # as the template has it; it is not learnt
        _require_written(messages[:last], text)
        start = 0
        if first:
            opening = parts[last][0] if first == last and answers else self.render(given[:first], prompt=answers)
            if not text.startswith(opening):
                raise self._unsplittable("once later turns follow it")
            start = len(opening)
        spans, others = [], []
        for number in trained:
            head, said = parts[number]
            answer = Written(head + said, [(len(head), len(head) + len(said))], len(head))
            if self.marked:  # what {% generation %} blocks leave out is left out
                whole, marks = self._render(given[: number + 1], mark=True)
                end = len(answer.text.removesuffix(self._end_of(given[number]).appended))
                if answer.text[:end] == whole[:end]:  # else it was put together: what is marked in it is not known
                    kept = [(max(len(head), a), min(end, b)) for a, b in marks if max(len(head), a) < min(end, b)]
                    if kept and kept[-1][1] == end:
                        kept[-1] = (kept[-1][0], len(answer.text))
                    answer = Written(answer.text, kept, answer.start)
            if text.startswith(answer.text):
                spans += answer.spans
            else:
                others.append(answer)
        return [*others, Written(text, spans, start)] if spans or not others else others

    def _split(self, messages: Sequence[Any], given: list[Any], number: int) -> tuple[str, str]:
        """Split at an answer: the text generation starts from, and the answer with its end."""
        message, before, end = given[number], given[:number], self._end_of(given[number])
        head = self.render(before, prompt=True) if before else self._try([], prompt=True)
        whole = self.render(given[: number + 1])
        if not before and not (head and whole.startswith(head)):
            what = "its first turn is the assistant's, and the chat template has no prompt before it that generation "
            what = f'{what}could start from; put a user turn before it, or give that message "train": false'
            raise ConversationError(what)
        if whole.startswith(head):
            said = self._cut(whole[len(head) :], end)
            if not before or not _missing(messages[number], said):
                return head, said
        return head, self._compose(messages[number], message, before, head, end)

    def _compose(self, message: Any, given: Any, before: list[Any], head: str, end: _End) -> str:
        """Put together an answer that the template does not write behind its own prompt, thoughts included.
        Templates of reasoning models open the thoughts in the generation prompt and leave them out of an answer that
        is rendered (DeepSeek-R1): the model writes on from the prompt, so the answer is its thoughts and its content.
        """
        thoughts, content = _split_thoughts(message)
        if thoughts and head.rstrip().endswith("</think>"):
            what = "the answer has thoughts, and the generation prompt of the chat template has closed them already "
            raise ConversationError(f"{what}(chat_template_kwargs: enable_thinking?)")
        if thoughts is None and head.rstrip().endswith("<think>"):
            thoughts = ""
        body = content if thoughts is None else _join_thoughts(thoughts, content)
        lead, found, tail = self._try([*before, _ANSWER]).rpartition(_A)
        prompted = head.removeprefix(lead)
        if "tool_calls" in given or not found or not head.startswith(lead) or not body.startswith(prompted):
            if lost := _missing(message, self.render([*before, given])):
                raise ConversationError(f"the chat template ({self.name}) does not write {lost} of this turn")
            raise self._unsplittable("than add_generation_prompt begins it")
        return self._cut(body[len(prompted) :] + tail, end)

    def _unsplittable(self, when: str) -> ConversationError:
        what = f"the chat template ({self.name}) writes an answer otherwise {when}, so the answers cannot be told from "
        return ConversationError(f"{what}the rest; give it {{% generation %}} blocks, or {OTHERS}")

    def _end_of(self, message: Any) -> _End:
        return self.call_end if message.get("tool_calls") else self.end

    def _cut(self, rest: str, end: _End) -> str:
        """Cut the rendering of an answer behind its end."""
        said = rest.removesuffix(end.dropped)
        if end.appended:
            return said + end.appended
        if not said.endswith(end.token):
            said = rest[: rest.rfind(end.token) + len(end.token)] if end.token in rest else rest.rstrip() + self._eos
        return said

    def _find_end(self, message: Any, following: Any) -> _End:
        for before in ([_USER], [_SYSTEM, _USER]):
            text = self._try([*before, message])
            if _A not in text:
                continue
            tail = text.rpartition(_A)[2]
            run = self._first_tokens(tail)
            if run and self._try(before) == self._try(before, prompt=True):
                run = run[:1]  # it always writes the next header
            if run:
                return _End(run[-1][0], dropped=tail[run[-1][1] :])
            # Families whose end is the token that opens the next turn (GLM-4).
            written = tail.rstrip()
            after = self._try([*before, message, following]).rpartition(_B)[0].rpartition(_A)[2].removeprefix(written)
            run = self._first_tokens(after)
            if run and after[: run[0][1]].strip() == run[0][0]:
                return _End(run[0][0], appended=after[: run[0][1]], dropped=tail[len(written) :])
            return _End(self._eos, appended=self._eos, dropped=tail[len(written) :])
        return _End(self._eos)

    def _first_tokens(self, text: str) -> list[tuple[str, int]]:
        """Find the first control token of a text and those that follow without a gap, each with its end."""
        found: list[tuple[str, int]] = []
        for match in self._control.finditer(text):
            if found and match.start() != found[-1][1]:
                break
            found.append((match.group(), match.end()))
        return found

    def _prepare_all(self, messages: Sequence[Any]) -> list[Any]:
        """Give messages as this template wants them."""
        given = messages[0].get("template_kwargs", {}) if messages else {}
        if given.get("tools") and not self._writes_tools:
            raise ConversationError(f"the chat template ({self.name}) does not write `tools`; use one that does")
        own = given.keys() - {"tools"}
        if own and (unread := own - list_settings(self.source, where=self.name)):
            what = f"chat_template_kwargs: {', '.join(sorted(unread))}"
            raise ConversationError(f"the chat template ({self.name}) does not read {what}")
        return [self._prepare(message) for message in messages]

    def _prepare(self, message: Any) -> Any:
        if message.get("tool_calls"):
            if self._call_form is None:
                raise ConversationError(f"the chat template ({self.name}) does not write tool calls; use one that does")
            message = _in_form(message, self._call_form)
        thoughts, content = _split_thoughts(message) if message["role"] == "assistant" else (None, "")
        if thoughts is not None and self.reads_reasoning:
            return message | {"reasoning_content": thoughts, "content": content}
        if thoughts is None or "reasoning_content" not in message:
            return message
        kept = {key: value for key, value in message.items() if key != "reasoning_content"}
        return kept | {"content": _join_thoughts(thoughts, content)}

    def render(self, messages: Sequence[Any], *, prompt: bool = False) -> str:
        """Write messages as the template does; with `prompt` up to where generation starts."""
        return self._render(messages, prompt=prompt)[0]

    def _try(self, messages: Sequence[Any], *, prompt: bool = False) -> str:
        """Render a probe; "" where the template refuses it."""
        try:
            return self.render(messages, prompt=prompt)
        except Endless:
            raise
        except ConversationError:
            return ""

    def _render(self, messages: Sequence[Any], *, prompt: bool = False, mark: bool = False) -> tuple[str, list[Span]]:
        given = messages[0].get("template_kwargs", {}) if messages else {}
        ours = ("trained", "template_kwargs")
        bare = [{key: value for key, value in message.items() if key not in ours} for message in messages]
        for message in bare:
            if (thoughts := message.get("reasoning_content")) is not None:
                message.setdefault("thinking", thoughts)  # what gpt-oss reads, as transformers' render_jinja_template
        # transformers offers no way to set the clock: its cached template takes a global of its own. Nor does it
        # render without copying all that it is given, which here is plain data: half of the time of a short turn.
        compiled = _compile_jinja_template(self.source)
        compiled.globals["strftime_now"] = self._strftime
        what = f"the chat template did not render within {_RENDER_SECONDS} s; use another: model.chat_template"
        values = {"messages": bare, "tools": None, "documents": None, "add_generation_prompt": prompt}
        values |= self._settings | given
        try:
            with time_limit(_RENDER_SECONDS, Endless(what), of_thread=True):
                return _render_with_assistant_indices(compiled, **values) if mark else (compiled.render(values), [])
        except RecursionError as error:
            raise Endless(f"the chat template ({self.name}) calls itself without end") from error
        except OverflowError as error:  # of the sandbox
            raise Endless(f"the chat template ({self.name}) fails: {error}") from error
        except _FAILURES as error:
            first = "; its first turn is the assistant's" if bare and bare[0]["role"] == "assistant" else ""
            said = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(error))
            name = ""
            if type(error) is not TemplateError:  # which raise_exception raises: a mistake of the template's own
                name, said = f" ({self.name})", f"{type(error).__name__}: {said}"
            raise ConversationError(f"the chat template{name} refuses the conversation: {said}{first}") from error


def list_settings(source: str, *, where: str) -> set[str]:
    """List the names that a template reads beside turns and tools; ModelError for one that cannot be a template."""
    try:
        tree = _compile_jinja_template(source).environment.parse(source)
    except TemplateSyntaxError as error:
        raise ModelError(f"is no chat template: {error.message} (line {error.lineno})", where=where) from error
    if list(meta.find_referenced_templates(tree)):
        raise ModelError("includes, imports or extends another file, which a chat template cannot do", where=where)
    return meta.find_undeclared_variables(tree) - _GIVEN


def _in_form(message: Any, form: tuple[Any, type]) -> Any:
    """Give a turn that calls tools its empty content and its arguments in the form that the template reads."""
    empty, arguments = form
    calls = [call | {"function": dict(call["function"])} for call in message["tool_calls"]]
    for call in calls:
        held = call["function"].get("arguments")
        if arguments is str and not isinstance(held, str):
            call["function"]["arguments"] = json.dumps(held, ensure_ascii=False)
    changed = message | {"tool_calls": calls}
    if not message["content"]:
        changed["content"] = empty
    return {key: value for key, value in changed.items() if value is not ...}


def _split_thoughts(message: Any) -> tuple[str | None, str]:
    """Split off the thoughts of a turn (None without any) and what it says after them."""
    content = message.get("content") or ""
    if (thoughts := message.get("reasoning_content")) is not None:
        return thoughts.strip("\n"), content.lstrip("\n")
    if found := _THOUGHTS.match(content):
        return found[1].strip("\n"), found[2]
    return None, content


_join_thoughts = "<think>\n{}\n</think>\n\n{}".format


def _missing(message: Any, text: str) -> str:
    """Name what a turn says and a text does not hold, or ""."""
    pieces = re.split(r"</?think>", message.get("content") or "")
    if not all(_is_written(piece, text) for piece in pieces):
        return "the thoughts or the content" if len(pieces) > 1 else "the content"
    if not _is_written(message.get("reasoning_content") or "", text):
        return "the reasoning"
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return "" if _is_written(calls, text) else "all tool calls"


def _require_written(messages: Sequence[Any], text: str) -> None:
    """Raise ConversationError for a turn that a template leaves out in silence; thoughts of earlier turns may go."""
    for message in messages:
        content = _split_thoughts(message)[1] if message["role"] == "assistant" else message["content"]
        if not _is_written(content, text):
            raise ConversationError(f"the chat template leaves out a {message['role']} turn: {content[:40]!r}")


def _is_written(value: Any, text: str) -> bool:
    """Whether a text holds a value, or all in a JSON value: as it is, as JSON, or with other white space."""
    if isinstance(value, dict | list):
        return all(_is_written(item, text) for item in (value.values() if isinstance(value, dict) else value))
    if not isinstance(value, str) or (value := value.strip()) in text:
        return True
    as_json = (json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return any(form in text for form in as_json) or "".join(value.split()) in "".join(text.split())
