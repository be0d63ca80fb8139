"""Conversations to token ids, with what is trained marked exactly: the answer and the token that ends it.

Deliberately knows nothing of rows, labels or truncation, and never tokenises token by token. A conversation is
rendered once; prompt and answer are tokenised apart at the very place where generation will start, so that the ids
of a prompt are the same in training and in use. Templates with {% generation %} blocks say themselves what the
answers are; for others, an answer is what follows render(messages before it, add_generation_prompt=True).
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, compress, pairwise
from typing import Any, NotRequired, TypedDict

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from alignkit.errors import ModelError
from alignkit.models.words import WordTokenizer

NO_TEMPLATE = "the tokenizer has no chat template: set model.chat_template: chatml | llama3 | zephyr | plain"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDER_SECONDS = 10


class Message(TypedDict):
    """A turn; alignkit.data.rows says what each key means."""

    role: str
    content: str
    trained: NotRequired[bool]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    template_kwargs: NotRequired[dict[str, Any]]


_PROBE: list[Message] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
Text = str | list[Message]
Span = tuple[int, int]  # half open


class ConversationError(ModelError):
    """The template cannot render or split one conversation; `index` is its place in the batch."""

    def __init__(self, what: str, index: int) -> None:
        super().__init__(what)
        self.index = index


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a conversation and the spans of them that the assistant wrote, end of turn included."""

    ids: list[int]
    spans: list[Span]

    @property
    def assistant(self) -> list[bool]:
        """One flag per token."""
        flags = [False] * len(self.ids)
        for start, end in self.spans:
            flags[start:end] = [True] * (end - start)
        return flags

    @property
    def labels(self) -> list[int]:
        """The ids where the assistant wrote, -100 elsewhere."""
        labels = [-100] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels


@dataclass(frozen=True, slots=True)
class Split:
    """Token ids of a prompt and its completion; the first `prompt_length` of them are the prompt."""

    ids: list[int]
    prompt_length: int


class Chat:
    """Encoder of conversations and plain texts for one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._use(tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None)
        self._added = tuple(sorted(token.content for token in tokenizer.added_tokens_decoder.values()))
        # What the tokenizer puts around a text by itself; templates write their own BOS.
        alone, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        self._prefix: list[int] = alone[: alone.index(bare[0])] if bare and bare[0] in alone else []
        self._tokenize = WordTokenizer(tokenizer.backend_tokenizer).encode
        self._special_tokens = dict(tokenizer.special_tokens_map)
        # Tokenizers that start every text with a space mark (Llama 2, Mistral) cannot take a text in pieces.
        whole, parts = self._tokenize(["\nanswer"])[0], self._tokenize(["\n", "answer"])
        self._in_pieces = whole == parts[0] + parts[1]
        if self._template and not self._marked:
            self._replace_unsplittable()

    @property
    def has_template(self) -> bool:
        """Whether conversations can be read."""
        return self._template is not None

    @property
    def end_of_turn(self) -> int | None:
        """Id of the token that ends an assistant turn of the template; None when there is no template."""
        if self._template is None:
            return None
        probe = self.encode([_PROBE[:3]])[0]
        if not probe.spans:
            return None
        added = self.tokenizer.added_tokens_decoder
        start, end = probe.spans[-1]
        for token in reversed(probe.ids[start:end]):
            if token in added:
                return token
            if self.tokenizer.decode([token]).strip():
                return None  # an answer's own text comes last
        return None

    @property
    def stop_ids(self) -> list[int]:
        """Ids at which generation stops: the eos and the end of a turn."""
        return sorted({self.tokenizer.eos_token_id, self.end_of_turn} - {None})

    def encode(self, conversations: Sequence[list[Message]], *, add_generation_prompt: bool = False) -> list[Encoded]:
        """Encode whole conversations and mark what the assistant wrote.

        Raises ConversationError for a conversation that the template refuses, ModelError without a template.
        """
        texts, spans = self._render_spans(conversations, add_generation_prompt)
        return self._tokenize_spans(texts, spans)

    def encode_prompt_completion(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Split]:
        """Encode prompts with their completions.

        Strings: prompt, completion and eos. Messages: the prompt rendered up to the start of the assistant's turn,
        then the completion up to and with its end of turn.
        """
        for index, pair in enumerate(zip(prompts, completions, strict=True)):
            if isinstance(pair[0], str) != isinstance(pair[1], str):
                raise ConversationError("a prompt and its completion must both be text or both be messages", index)
        plain = [isinstance(prompt, str) for prompt in prompts]
        heads = self._render_prompts(prompts)
        texts = self._join(prompts, completions, heads)
        cuts = [[(len(head), len(text))] for head, text in zip(heads, texts, strict=True)]
        eos = [self.tokenizer.eos_token_id]
        splits = []
        for encoded, is_plain in zip(self._tokenize_spans(texts, cuts), plain, strict=True):
            head, tail = (self._prefix, eos) if is_plain else ([], [])
            start = encoded.spans[0][0] if encoded.spans else len(encoded.ids)
            splits.append(Split(head + encoded.ids + tail, len(head) + start))
        return splits

    def encode_segments(self, segments: Sequence[str], learnt: Sequence[bool]) -> Encoded:
        """Encode one text whose segments are learnt or only read, with BOS and eos unless it writes them itself."""
        ends = [0, *accumulate(map(len, segments))]
        spans = [span for span, is_learnt in zip(pairwise(ends), learnt, strict=True) if is_learnt]
        (found,) = self._tokenize_spans(["".join(segments)], [spans])
        head = self._prefix if found.ids[: len(self._prefix)] != self._prefix else []
        tail = [self.tokenizer.eos_token_id] if found.ids[-1:] != [self.tokenizer.eos_token_id] else []
        moved = [(start + len(head), end + len(head)) for start, end in found.spans]
        if learnt[-1] and tail:
            moved.append((len(head) + len(found.ids), len(head) + len(found.ids) + 1))
        return Encoded(head + found.ids + tail, moved)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode plain documents, each with the tokenizer's own BOS if it has one, and eos."""
        eos = [self.tokenizer.eos_token_id]
        return [self._prefix + ids + eos for ids in self._tokenize(texts)]

    def encode_prompts(self, prompts: Sequence[Text]) -> list[list[int]]:
        """Encode prompts as generation starts from them."""
        texts = self._render_prompts(prompts)
        heads = [self._prefix if isinstance(prompt, str) else [] for prompt in prompts]
        return [head + ids for head, ids in zip(heads, self._tokenize(texts), strict=True)]

    def check(self) -> None:
        """Raise ModelError unless the template renders in time, writes one BOS and trains the end of a turn."""
        with _time_limit(_RENDER_SECONDS):
            encoded = self.encode([_PROBE])[0]
        bos = self.tokenizer.bos_token_id
        if bos is not None and encoded.ids[:2] == [bos, bos]:
            raise ModelError("the chat template writes the BOS token twice; remove one of them from the template")
        if len(encoded.spans) < 2:
            raise ModelError(
                f"the chat template marks {len(encoded.spans)} of 2 answers with {{% generation %}}; put the block "
                "around every assistant message, or set model.chat_template: chatml | llama3 | zephyr | plain"
            )
        if self.end_of_turn is None:
            raise ModelError(
                "the chat template never trains a token that ends an answer, so the model would not learn to stop; "
                "end the assistant message with eos_token (inside {% generation %} where the template has it), or set "
                "model.chat_template: chatml | llama3 | zephyr | plain"
            )

    def _use(self, template: str | None) -> None:
        self._template = template
        self._marked = bool(template and _GENERATION.search(template))

    def _replace_unsplittable(self) -> None:
        """Encode with TRL's training variant of a template that rewrites earlier turns (Qwen3, Phi-3), if it has one.

        The tokenizer keeps its own template: the two differ only in conversations of several answers.
        """
        try:
            self._find_answers(_PROBE, self._render(_PROBE, 0), 0)
        except ConversationError:
            from trl.chat_template_utils import get_training_chat_template

            with suppress(ValueError):  # TRL knows no variant: check() and encode() say so
                self._use(get_training_chat_template(self.tokenizer))

    def _render_prompts(self, prompts: Sequence[Text]) -> list[str]:
        """Return prompts as generation starts from them; texts stay as they are."""
        places = [index for index, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        rendered, _ = self._render_all([prompts[index] for index in places], places, add_generation_prompt=True)
        texts = iter(rendered)
        return [prompt if isinstance(prompt, str) else next(texts) for prompt in prompts]

    def _join(self, prompts: Sequence[Text], completions: Sequence[Text], heads: list[str]) -> list[str]:
        """Return the texts of prompts with their completions, up to the end of the last answer."""
        pairs = list(zip(prompts, completions, strict=True))
        places = [index for index, (prompt, _) in enumerate(pairs) if not isinstance(prompt, str)]
        rendered, _ = self._render_all([[*pairs[index][0], *pairs[index][1]] for index in places], places)
        texts = [a + b if isinstance(a, str) and isinstance(b, str) else "" for a, b in pairs]
        for index, text in zip(places, rendered, strict=True):
            if not text.startswith(heads[index]):
                raise self._not_a_prefix(index)
            texts[index] = text[: self._end_of_answer(text, len(text))]
        return texts

    def _render_spans(
        self, conversations: Sequence[list[Message]], add_generation_prompt: bool
    ) -> tuple[list[str], list[list[Span]]]:
        texts, spans = self._render_all(
            conversations,
            range(len(conversations)),
            add_generation_prompt=add_generation_prompt,
            mark=self._marked,
        )
        if not self._marked:
            spans = [
                self._find_answers(messages, text, index)
                for index, (messages, text) in enumerate(zip(conversations, texts, strict=True))
            ]
            return texts, spans
        for index, messages in enumerate(conversations):
            learnt = [message.get("trained", True) for message in messages if message["role"] == "assistant"]
            if len(learnt) == len(spans[index]):
                spans[index] = list(compress(spans[index], learnt))
            elif not all(learnt):  # which block is whose cannot be told from their number
                spans[index] = self._find_answers(messages, texts[index], index)
        return texts, spans

    def _find_answers(self, messages: list[Message], text: str, index: int) -> list[Span]:
        """Return the answers of a rendered conversation whose template does not mark them."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or not message.get("trained", True):
                continue
            head = self._render(messages[:number], index, add_generation_prompt=True)
            upto = text if number == len(messages) - 1 else self._render(messages[: number + 1], index)
            if not (upto.startswith(head) and text.startswith(upto)):
                raise self._not_a_prefix(index)
            spans.append((len(head), self._end_of_answer(upto, len(upto))))
        return spans

    def _end_of_answer(self, text: str, end: int) -> int:
        """Leave out white space after the token that ends a turn: generation has stopped before it."""
        stripped = text[:end].rstrip()
        return len(stripped) if stripped.endswith(self._added) else end

    def _render(self, messages: list[Message], index: int, *, add_generation_prompt: bool = False) -> str:
        return self._render_all([messages], [index], add_generation_prompt=add_generation_prompt)[0][0]

    def _render_all(
        self,
        conversations: Sequence[Any],
        places: Sequence[int],
        *,
        add_generation_prompt: bool = False,
        mark: bool = False,
    ) -> tuple[list[str], list[list[Span]]]:
        """Render a batch; `places` are the numbers under which a refused conversation is reported."""
        if not conversations:
            return [], []
        if self._template is None:
            raise ModelError(NO_TEMPLATE)
        kwargs = [_template_kwargs(messages) for messages in conversations]
        try:
            if any(own != kwargs[0] for own in kwargs):
                each = zip(conversations, places, strict=True)
                parts = [
                    self._render_all([messages], [place], add_generation_prompt=add_generation_prompt, mark=mark)
                    for messages, place in each
                ]
                return [text for (text,), _ in parts], [spans[0] for _, spans in parts if spans]
            texts, spans = render_jinja_template(
                list(conversations),
                chat_template=self._template,
                return_assistant_tokens_mask=mark,
                add_generation_prompt=add_generation_prompt,
                **(self._special_tokens | kwargs[0]),
            )
            return texts, spans
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            if len(conversations) == 1:
                raise ConversationError(f"the chat template refuses the conversation: {error}", places[0]) from error
            for messages, place in zip(conversations, places, strict=True):  # find the one
                self._render_all([messages], [place], add_generation_prompt=add_generation_prompt, mark=mark)
            raise

    def _tokenize_spans(self, texts: list[str], spans: list[list[Span]]) -> list[Encoded]:
        if not self._in_pieces:
            return self._tokenize_whole(texts, spans)
        pieces: list[str] = []
        for text, cuts in zip(texts, spans, strict=True):
            borders = [0, *(border for span in cuts for border in span), len(text)]
            pieces += [text[left:right] for left, right in zip(borders, borders[1:], strict=False)]
        encoded, tokens = [], iter(self._tokenize(pieces))
        for cuts in spans:  # the pieces of a text alternate: outside, answer, outside, ...
            ids, found = next(tokens), []
            for _ in cuts:
                start = len(ids)
                ids += next(tokens)
                found.append((start, len(ids)))
                ids += next(tokens)
            encoded.append(Encoded(ids, found))
        return encoded

    def _tokenize_whole(self, texts: list[str], spans: list[list[Span]]) -> list[Encoded]:
        """Tokenise in one go and cut by character; a token that reaches over a border stays with the earlier side."""
        encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        encoded = []
        for text, cuts, encoding in zip(texts, spans, encodings, strict=True):
            found = [
                (_first_token(encoding, start, len(text)), _first_token(encoding, end, len(text)))
                for start, end in cuts
            ]
            encoded.append(Encoded(encoding.ids, found))
        return encoded

    def _not_a_prefix(self, index: int) -> ConversationError:
        return ConversationError(
            f"the chat template ({(self._template or '')[:40]!r}...) renders earlier turns differently once later ones "
            "follow, so the answers cannot be told from the rest; give it {% generation %} blocks, or set "
            "model.chat_template: chatml | llama3 | zephyr | plain",
            index,
        )


def _template_kwargs(messages: Sequence[Any]) -> dict[str, Any]:
    """Return what a row gives the template beside its messages; `tools` among them."""
    return messages[0].get("template_kwargs", {}) if messages else {}


def _first_token(encoding: Any, char: int, length: int) -> int:
    """Return the number of the first token that starts at or after a character."""
    for position in range(char, length):
        token = encoding.char_to_token(position)
        if token is not None:
            start, _ = encoding.token_to_chars(token)[-2:]
            return token if start >= char else token + 1
    return len(encoding.ids)


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Stop a template that does not end; only the main thread can be interrupted, elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: object) -> None:
        raise ModelError(f"the chat template did not render within {seconds} s; use another: model.chat_template")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
