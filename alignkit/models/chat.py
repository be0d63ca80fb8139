"""Conversations and texts to token ids, with what is learnt marked exactly: the answer and the token that ends it.

Texts are tokenised in batches; where the backend cuts at spaces, a word is looked up instead of split again.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from alignkit.errors import ModelError
from alignkit.models.files import KNOWN
from alignkit.models.template import OTHERS, ConversationError, Message, Span, Template, Written

_MAX_WORDS = 100_000  # about 20 MB of Python lists
# A run of white space with a space in it is cut as a whole, and differently at its end.
_RUN = re.compile(r"\s | \s")


class WordTokenizer:
    """Tokenize texts exactly as the backend does, with a cache of words where that is safe."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self.cached = _cuts_at_spaces(backend)
        self._first: dict[str, list[int]] = {}  # the text up to its first space
        self._spaced: dict[str, list[int]] = {}  # ids of " " + word

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the ids of each text, without special tokens of its own accord."""
        if not self.cached:
            return self._encode_all(texts)
        if len(self._first) + len(self._spaced) > _MAX_WORDS:
            self._first.clear()
            self._spaced.clear()
        split = [None if _RUN.search(text) else text.split(" ") for text in texts]
        first, spaced = self._first, self._spaced
        new_first = {words[0]: None for words in split if words and words[0] not in first}
        new_spaced = {word: None for words in split if words for word in words[1:] if word not in spaced}
        # The words that are new, and the texts that must be cut as a whole, all at once.
        uncut = [text for text, words in zip(texts, split, strict=True) if words is None]
        ids = iter(self._encode_all([*new_first, *(f" {word}" for word in new_spaced), *uncut]))
        first.update(zip(new_first, ids, strict=False))
        spaced.update(zip(new_spaced, ids, strict=False))
        lookup = spaced.__getitem__
        return [
            next(ids) if words is None else [*first[words[0]], *chain.from_iterable(map(lookup, words[1:]))]
            for words in split
        ]

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _cuts_at_spaces(backend: Tokenizer) -> bool:
    """Whether a tokenizer is known to cut before each space that stands between two visible characters."""
    if not isinstance(backend.model, BPE) or backend.model.dropout:
        return False
    if any(token.rstrip or " " in token.content for token in backend.get_added_tokens_decoder().values()):
        return False
    # The pickle state of a part of the pipeline is its JSON in tokenizer.json.
    parts = (backend.normalizer, backend.pre_tokenizer)
    none: Any = {"type": None}
    normalizer, before = (none if part is None else json.loads(part.__getstate__()) for part in parts)
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    kinds = [step["type"] for step in steps]
    if normalizer["type"] not in (None, "NFC") or kinds[-1:] != ["ByteLevel"] or steps[-1]["add_prefix_space"]:
        return False
    if kinds == ["ByteLevel"]:
        return steps[0]["use_regex"]  # GPT-2's own pattern
    return (
        kinds == ["Split", "ByteLevel"]
        and not steps[1]["use_regex"]
        and steps[0]["pattern"].get("Regex") in KNOWN["patterns_cut_at_spaces"]
        and steps[0]["behavior"] == "Isolated"
        and not steps[0]["invert"]
    )


NO_TEMPLATE = f"the tokenizer has no chat template: {OTHERS}"
SETTINGS = "chat_template_kwargs"  # their key in tokenizer_config.json, so that a saved model keeps them
_THINK = re.compile(r"</?think\w*>")  # in a generation prompt, and in answers by right
Text = str | list[Message]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids; the first `prompt_length` of them are the prompt, `spans` of them are learnt."""

    ids: list[int]
    spans: list[Span] = field(default_factory=list)
    prompt_length: int = 0

    @property
    def labels(self) -> list[int]:
        """The ids that are learnt, -100 elsewhere."""
        labels = [-100] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels


class Chat:
    """Encoder of conversations and plain texts for one tokenizer and its chat template.

    `clock` is the time that templates read; `name` is what a message calls the template. For an encoder-decoder model a
    prompt and its completion are texts of their own, one for each half, and nothing is a conversation.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, clock: datetime | None = None, name: str = "the tokenizer's own",
        encoder_decoder: bool = False,
    ) -> None:  # fmt: skip
        self.tokenizer, self.encoder_decoder = tokenizer, encoder_decoder
        self.clock = clock or datetime.now()
        # What the tokenizer puts around a text by itself; templates write their own BOS.
        alone, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        self._prefix: list[int] = alone[: alone.index(bare[0])] if bare and bare[0] in alone else []
        self._tokenize = WordTokenizer(tokenizer.backend_tokenizer).encode
        # Tokenizers that start every text with a space mark (Llama 2, Mistral) cannot take a text in pieces.
        whole, parts = self._tokenize(["\nanswer"])[0], self._tokenize(["\n", "answer"])
        self._in_pieces = whole == parts[0] + parts[1]
        found = None if encoder_decoder else tokenizer.chat_template
        texts = found if isinstance(found, dict) else {"default": found} if found else {}
        settings = {**tokenizer.special_tokens_map, **self.settings}
        controls, eos = _list_controls(tokenizer), tokenizer.eos_token or ""
        self._templates = {
            key: Template(text, name=name, controls=controls, eos=eos, settings=settings, clock=self.clock)
            for key, text in texts.items()
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What every conversation gives the template beside its turns."""
        return dict(self.tokenizer.init_kwargs.get(SETTINGS) or {})

    @cached_property
    def dated(self) -> str:
        """What the template writes before a first answer where that depends on the day; "" where it does not."""
        return "".join(template.frame() for template in self._templates.values() if template.reads_clock)

    @property
    def has_template(self) -> bool:
        return "default" in self._templates

    @property
    def template(self) -> Template:
        """The template of conversations without tools; raises ModelError where there is none."""
        return self._choose([])

    def _choose(self, messages: Sequence[Any]) -> Template:
        """Choose from several templates as `apply_chat_template` does: tool_use for tools, else default."""
        tools = messages and messages[0].get("template_kwargs", {}).get("tools")
        template = (self._templates.get("tool_use") if tools else None) or self._templates.get("default")
        if template is None:
            raise ModelError(NO_TEMPLATE)
        return template

    @cached_property
    def end_of_turn(self) -> int | None:
        """Id of the token that ends an answer of the template; None when there is no template."""
        return self._id(self.template.end.token) if self.has_template else None

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end a whole answer, a call of a tool included."""
        ids = {self.tokenizer.eos_token_id, self.end_of_turn}
        ids |= {self._id(template.call_end.token) for template in self._templates.values()}
        return sorted(ids - {None})

    def _id(self, token: str) -> int | None:
        found: int | None = self.tokenizer.convert_tokens_to_ids(token)
        return found if token in self.tokenizer.get_vocab() else None

    @cached_property
    def control_tokens(self) -> list[str]:
        """The strings that act as control tokens when they occur in a text, longest first.

        Those that the tokenizer calls special, those that look it, and what the template writes around turns: some
        tokenizers flag no token of their template (DeepSeek).
        """
        tokens = set(_list_controls(self.tokenizer))
        if self.has_template:
            frame = self.template.frame()
            added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
            written = (token for token in added if token in frame and not token.isalnum() and token.strip())
            tokens |= {token for token in written if len(token) > 2 and not _THINK.fullmatch(token)}
        return sorted(tokens, key=lambda token: (-len(token), token))

    def check(self) -> None:
        """Raise ModelError unless the template renders in time, writes one BOS and trains the end of an answer."""
        if self.encoder_decoder:
            return
        self.template.check()
        bos = self.tokenizer.bos_token_id
        if bos is not None and self._tokenize([self.template.frame()])[0][:2] == [bos, bos]:
            raise ModelError("the chat template writes the BOS token twice; remove one of them from the template")

    def write(self, messages: Sequence[Any], *, mask: bool = True) -> list[Written]:
        """Write a conversation for training, after what needs a text of its own; without `mask` all of it is learnt."""
        template = self._choose(messages)
        if mask:
            return template.write(messages)
        text = template.write_all(messages)
        return [Written(text, [(0, len(text))])]

    def write_pair(self, prompt: Text, completion: Text) -> list[Written]:
        """Write a prompt and its completion, both text or both messages; as `write`, the whole comes last."""
        if self.encoder_decoder:
            prompt, completion = _read_one_turn(prompt), _read_one_turn(completion)
        if isinstance(prompt, str) and isinstance(completion, str):
            text = prompt + completion
            stops = tuple(self.tokenizer.convert_ids_to_tokens(self.stop_ids))
            if (kept := text.rstrip()).endswith(stops):  # rendered already: nothing is learnt after the end
                text = kept
            return [Written(text, [(len(prompt), len(text))], len(prompt), plain=True)]
        if isinstance(prompt, str) or isinstance(completion, str):
            raise ConversationError("a prompt and its completion must both be text or both be messages")
        return self._choose(prompt).write([*prompt, *completion], first=len(prompt))

    def write_segments(self, segments: Sequence[str], learnt: Sequence[bool]) -> Written:
        """Join one text of segments that are learnt or only read."""
        ends = [0, *accumulate(map(len, segments))]
        spans = [span for span, is_learnt in zip(pairwise(ends), learnt, strict=True) if is_learnt]
        return Written("".join(segments), spans, plain=True)

    def write_prompt(self, prompt: Text) -> Written:
        """Write a prompt as generation starts from it."""
        if self.encoder_decoder:
            prompt = _read_one_turn(prompt)
        if isinstance(prompt, str):
            return Written(prompt, start=len(prompt), plain=True)
        text = self._choose(prompt).write_prompt(prompt)
        return Written(text, start=len(text))

    def tokenize(self, written: Sequence[Written]) -> list[Encoded]:
        """Give the ids; a prompt of a plain text gets no eos.

        A plain text that begins with BOS or ends with a token that ends answers, as one that is rendered already does,
        gets no second one.
        """
        if self.encoder_decoder:
            return self._tokenize_halves(written)
        borders = [sorted({0, one.start, len(one.text), *(at for span in one.spans for at in span)}) for one in written]
        if self._in_pieces:
            cut = [one.text[a:b] for one, cuts in zip(written, borders, strict=True) for a, b in pairwise(cuts)]
            pieces = iter(self._tokenize(cut))
        else:
            texts = [one.text for one in written]
            encodings = iter(self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
        found = []
        for one, cuts in zip(written, borders, strict=True):
            if self._in_pieces:
                ids: list[int] = []
                places = {0: 0}
                for end in cuts[1:]:
                    ids += next(pieces)
                    places[end] = len(ids)
            else:
                encoding = next(encodings)
                ids, places = encoding.ids, {at: _first_token(encoding, at, len(one.text)) for at in cuts}
            if one.plain:
                head = [] if ids[: len(self._prefix)] == self._prefix else self._prefix
                ids, places = head + ids, {at: len(head) + place for at, place in places.items()}
            spans = [(places[start], places[end]) for start, end in one.spans]
            if one.plain and spans and not (ids and ids[-1] in self.stop_ids):
                ids = [*ids, self.tokenizer.eos_token_id]
                if spans[-1][1] == len(ids) - 1:
                    spans[-1] = (spans[-1][0], len(ids))
            found.append(Encoded(ids, spans, places[one.start]))
        return found

    def _tokenize_halves(self, written: Sequence[Written]) -> list[Encoded]:
        """Give source and target each with what its tokenizer puts around a text, and an eos; blanks around it go."""
        eos = self.tokenizer.eos_token_id

        def encode(**texts: list[str]) -> list[list[int]]:
            return [ids if ids and ids[-1] == eos else [*ids, eos] for ids in self.tokenizer(**texts).input_ids]

        sources = encode(text=[one.text[: one.start].strip() for one in written])
        targets = encode(text_target=[one.text[one.start :].strip() for one in written])
        return [
            Encoded(source + target, [(len(source), len(source) + len(target))], len(source))
            if one.spans
            else Encoded(source, [], len(source))
            for one, source, target in zip(written, sources, targets, strict=True)
        ]

    def encode(self, conversations: Sequence[list[Message]]) -> list[list[Encoded]]:
        """Encode whole conversations, each as `write` gives it."""
        written = _each(conversations, self.write)
        found = iter(self.tokenize([one for parts in written for one in parts]))
        return [[next(found) for _ in parts] for parts in written]

    def encode_prompt_completion(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Encoded]:
        """Encode prompts with their completions."""
        pairs = list(zip(prompts, completions, strict=True))
        return self.tokenize([parts[-1] for parts in _each(pairs, lambda pair: self.write_pair(*pair))])

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode plain documents, each with the tokenizer's own BOS if it has one, and eos."""
        return [found.ids for found in self.encode_prompt_completion([""] * len(texts), texts)]

    def encode_prompts(self, prompts: Sequence[Text]) -> list[list[int]]:
        """Encode prompts as generation starts from them."""
        return [found.ids for found in self.tokenize(_each(prompts, self.write_prompt))]


def _each(items: Sequence[Any], write: Callable[[Any], Any]) -> list[Any]:
    """Write all items; an error names the place of the item that was refused."""
    written = []
    for index, item in enumerate(items):
        try:
            written.append(write(item))
        except ConversationError as error:
            error.index = index
            raise
    return written


def _read_one_turn(content: Text) -> str:
    """Give a text, or what the one message of a prompt or an answer says; raises ConversationError for several."""
    if isinstance(content, str):
        return content
    if len(content) == 1 and not content[0].keys() - {"role", "content"}:
        return str(content[0]["content"])
    raise ConversationError("an encoder-decoder model reads one text, and this is a conversation of several turns")


def _list_controls(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """List the tokens that are special by their flag or by their bars, longest first; blanks are not."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {
        token.content
        for token in added
        if token.special or (token.content[:2] in ("<|", "<｜") or token.content[-2:] in ("|>", "｜>"))
    }
    found = {token for token in tokens | set(tokenizer.all_special_tokens) if token.strip()}
    return sorted(found, key=lambda token: (-len(token), token))


def _first_token(encoding: Any, char: int, length: int) -> int:
    """The first token that starts at or after a character; one over a border stays with the earlier side."""
    for position in range(char, length):
        token = encoding.char_to_token(position)
        if token is not None:
            start, _ = encoding.token_to_chars(token)[-2:]
            return token if start >= char else token + 1
    return len(encoding.ids)
