"""Tokenizers with their chat template, and conversations and texts as token ids with what is learnt marked exactly.

Texts are tokenised in batches; where the backend cuts at spaces, a word is looked up instead of split again.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alignkit.errors import ModelError
from alignkit.models.files import (
    KNOWN,
    TEMPLATES,
    find_model_dir,
    has_tokenizer,
    inspect_model_dir,
    is_builtin,
    require_available,
)
from alignkit.models.hub import explain_hub_errors, quiet_transformers
from alignkit.models.start import builtin_tokenizer, learnt_tokenizer
from alignkit.models.template import OTHERS, ConversationError, Message, Span, Template, Written, list_settings
from alignkit.recipe.schema import LEARNT_TOKENIZERS
from alignkit.recipe.stage import Stage

NO_TEMPLATE = f"the tokenizer has no chat template: {OTHERS}"
SETTINGS = "chat_template_kwargs"  # their key in tokenizer_config.json, so that a saved model keeps them
TASK_TOKENS = ("<|start|>", "<|delimiter|>", "<|extract|>")  # of a classifier, see the heads module
Text = str | list[Message]
_THINK = re.compile(r"</?think\w*>")  # in a generation prompt, and in answers by right
_MAX_WORDS, _MAX_CHARS = 100_000, 2_000_000  # that are kept, some 20 MB; text without spaces is one long word
# Where a run of white space stands, only before the spaces that stand alone; \0 marks where we cut the other texts.
_RUN, _ALONE = re.compile(r"\s | \s|\0"), re.compile(r"(?<=\S)(?= \S)")
# GPT-2's pattern starts anew before newlines; the others may end punctuation with them, and start anew behind them.
_BEFORE_LINES, _AFTER_LINES, _NOWHERE = (re.compile(at) for at in (r"(?<=\S)(?=\n)", r"(?<=\n)(?=\S)", r"(?!)"))


class WordTokenizer:
    """Tokenize texts exactly as the backend does, with a cache of words where that is safe."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self.cached = _cuts_at_spaces(backend)
        tokens = backend.get_added_tokens_decoder().values()
        lines = _AFTER_LINES if isinstance(backend.pre_tokenizer, pre_tokenizers.Sequence) else _BEFORE_LINES
        self._lines = _NOWHERE if any(token.lstrip or "\n" in token.content for token in tokens) else lines
        self._known: dict[str, bytes] = {}  # ids, as bytes, of what stands up to a space, with the space before it
        self._num_chars = 0

    def encode(self, texts: Sequence[str]) -> list[array[int]]:
        """Give the ids of each text, int32, without special tokens of its own accord."""
        if not self.cached:
            return self._encode_all(texts)
        known = self._known
        if len(known) > _MAX_WORDS or self._num_chars > _MAX_CHARS:
            known.clear()
            self._num_chars = 0
        split = [_ALONE.split(text) if _has_run(text) else text.replace(" ", "\0 ").split("\0") for text in texts]
        # The words that are new, all at once. Two words with newlines between them are seldom seen again, and each of
        # them often.
        cut = {word: self._lines.split(word) for word in set(chain.from_iterable(split)).difference(known)}
        pieces = list(set(chain.from_iterable(cut.values())).difference(known))
        known.update(zip(pieces, (ids.tobytes() for ids in self._encode_all(pieces)), strict=True))
        self._num_chars += sum(map(len, cut))  # which hold the pieces
        lookup = known.__getitem__
        for word, parts in cut.items():
            if len(parts) > 1:
                known[word] = b"".join(map(lookup, parts))
        return [array("i", b"".join(map(lookup, words))) for words in split]

    def _encode_all(self, texts: Sequence[str]) -> list[array[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [array("i", encoding.ids) for encoding in encodings]


def _has_run(text: str) -> bool:
    """Whether there is a run of white space with a space in it; most texts have no other than spaces and newlines."""
    if text.replace("\n", "").isprintable():
        return "  " in text or " \n" in text or "\n " in text
    return _RUN.search(text) is not None


def _cuts_at_spaces(backend: Tokenizer) -> bool:
    """Whether a tokenizer is known to cut before each space that stands between two visible characters."""
    if not isinstance(backend.model, BPE) or backend.model.dropout:
        return False
    if any(token.rstrip or " " in token.content for token in backend.get_added_tokens_decoder().values()):
        return False
    # The pickle state of a part of the pipeline is its JSON in tokenizer.json.
    none: Any = {"type": None}
    parts = (backend.normalizer, backend.pre_tokenizer)
    normalizer, before = (none if part is None else json.loads(part.__getstate__()) for part in parts)
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    kinds = [step["type"] for step in steps]
    if normalizer["type"] not in (None, "NFC") or kinds[-1:] != ["ByteLevel"] or steps[-1]["add_prefix_space"]:
        return False
    first, *others = steps
    if not others:
        return bool(first["use_regex"])  # GPT-2's own pattern
    is_known = kinds == ["Split", "ByteLevel"] and first["pattern"].get("Regex") in KNOWN["patterns_cut_at_spaces"]
    return is_known and first["behavior"] == "Isolated" and not first["invert"] and not others[0]["use_regex"]


@dataclass(slots=True)
class Encoded:
    """Token ids; the first `prompt_length` of them are the prompt, `spans` of them are learnt."""

    ids: Any  # list[int], or array[int] of int32 where they were asked for packed
    spans: list[Span] = field(default_factory=list)
    prompt_length: int = 0

    @property
    def labels(self) -> Any:
        """The ids that are learnt, -100 elsewhere; a list or an array as `ids` are."""
        labels: Any = (array("i", [-100]) if isinstance(self.ids, array) else [-100]) * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels


class Chat:
    """Encoder of conversations and plain texts for one tokenizer and its chat template.
    `clock` is the time that templates read; `name` is what a message calls the template. For an encoder-decoder model a
    prompt and its completion are texts of their own, one for each half, and nothing is a conversation."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, clock: datetime | None = None, name: str = "the tokenizer's own",
        encoder_decoder: bool = False,
    ) -> None:  # fmt: skip
        self.tokenizer, self.encoder_decoder = tokenizer, encoder_decoder
        self.clock = clock or datetime.now()
        # What the tokenizer puts around a text by itself; templates write their own BOS.
        alone, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        self._prefix = array("i", alone[: alone.index(bare[0])] if bare and bare[0] in alone else [])
        self._tokenize = WordTokenizer(tokenizer.backend_tokenizer).encode
        # Tokenizers that start every text with a space mark (Llama 2, Mistral) cannot take a text in pieces.
        whole, one, other = self._tokenize(["\nanswer", "\n", "answer"])
        self._in_pieces = whole == one + other
        found = None if encoder_decoder else tokenizer.chat_template
        texts = found if isinstance(found, dict) else {"default": found} if found else {}
        given: Any = {"controls": _list_controls(tokenizer), "eos": tokenizer.eos_token or "", "clock": self.clock}
        given |= {"name": name, "settings": {**tokenizer.special_tokens_map, **self.settings}}
        self._templates = {key: Template(text, **given) for key, text in texts.items()}

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

    @cached_property
    def _stops(self) -> tuple[str, ...]:
        return tuple(self.tokenizer.convert_ids_to_tokens(self.stop_ids))

    def _id(self, token: str) -> int | None:
        found: int | None = self.tokenizer.convert_tokens_to_ids(token)
        return found if token in self.tokenizer.get_vocab() else None

    @cached_property
    def control_tokens(self) -> list[str]:
        """The strings that act as control tokens when they occur in a text, longest first.
        Those that the tokenizer calls special, those that look it, and what the template writes around turns: some
        tokenizers flag no token of their template (DeepSeek)."""
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
        if bos is not None and self._tokenize([self.template.frame()])[0][:2] == array("i", [bos, bos]):
            raise ModelError("the chat template writes the BOS token twice; remove one of them from the template")

    def write(self, messages: Sequence[Any], *, mask: bool = True) -> list[Written]:
        """Write a conversation for training, after what needs a text of its own; without `mask` all of it is learnt."""
        if mask:
            return self._choose(messages).write(messages)
        text = self._choose(messages).write_text(messages)
        return [Written(text, [(0, len(text))])]

    def write_pair(self, prompt: Text, completion: Text) -> list[Written]:
        """Write a prompt and its completion, both text or both messages; as `write`, the whole comes last."""
        if self.encoder_decoder:
            prompt, completion = _read_one_turn(prompt), _read_one_turn(completion)
        if isinstance(prompt, str) and isinstance(completion, str):
            text = prompt + completion
            if (kept := text.rstrip()).endswith(self._stops):  # rendered already: nothing is learnt after the end
                text = kept
            return [Written(text, [(len(prompt), len(text))], len(prompt), plain=True)]
        if isinstance(prompt, str) or isinstance(completion, str):
            raise ConversationError("a prompt and its completion must both be text or both be messages")
        return self._choose(prompt).write([*prompt, *completion], first=len(prompt))

    def write_prompt(self, prompt: Text) -> Written:
        """Write a prompt as generation starts from it."""
        if self.encoder_decoder:
            prompt = _read_one_turn(prompt)
        if isinstance(prompt, str):
            return Written(prompt, start=len(prompt), plain=True)
        text = self._choose(prompt).write_text(prompt, prompt=True)
        return Written(text, start=len(text))

    def tokenize(self, written: Sequence[Written], *, packed: bool = False) -> list[Encoded]:
        """Give the ids, as arrays instead of lists if `packed`; a prompt of a plain text gets no eos.
        A plain text that begins with BOS or ends with a token that ends answers, as one that is rendered already does,
        gets no second one. Source and target of an encoder-decoder each get what its tokenizer puts around a text, and
        an eos; blanks around them go."""
        encoded: list[Encoded] = []
        if self.encoder_decoder:
            eos, halves = self.tokenizer.eos_token_id, []
            sources, targets = [one.text[: one.start] for one in written], [one.text[one.start :] for one in written]
            for kind, texts in (("text", sources), ("text_target", targets)):
                found = self.tokenizer(**{kind: [text.strip() for text in texts]}).input_ids
                halves.append([ids if ids and ids[-1] == eos else [*ids, eos] for ids in found])
            for one, source, target in zip(written, *halves, strict=True):
                whole = source + target if one.spans else source
                encoded.append(Encoded(whole, [(len(source), len(whole))] if one.spans else [], len(source)))
            return encoded
        borders = [sorted({0, one.start, len(one.text), *chain.from_iterable(one.spans)}) for one in written]
        if self._in_pieces:
            cut = [one.text[a:b] for one, cuts in zip(written, borders, strict=True) for a, b in pairwise(cuts)]
            pieces = iter(self._tokenize(cut))
        else:
            texts = [one.text for one in written]
            encodings = iter(self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
        for one, cuts in zip(written, borders, strict=True):
            if self._in_pieces:
                ids = array("i")
                places = {0: 0}
                for end in cuts[1:]:
                    ids += next(pieces)
                    places[end] = len(ids)
            else:  # a token over a border stays with the earlier side
                encoding = next(encodings)
                ids = array("i", encoding.ids)
                starts = [start if end > start else -1 for start, end in encoding.offsets]
                highest = list(accumulate(starts, max))
                places = {at: bisect_left(highest, at) for at in cuts}
            if one.plain:
                head = self._prefix[:0] if ids[: len(self._prefix)] == self._prefix else self._prefix
                ids, places = head + ids, {at: len(head) + place for at, place in places.items()}
            spans = [(places[start], places[end]) for start, end in one.spans]
            if one.plain and spans and not (ids and ids[-1] in self.stop_ids):
                ids.append(self.tokenizer.eos_token_id)
                if spans[-1][1] == len(ids) - 1:
                    spans[-1] = (spans[-1][0], len(ids))
            encoded.append(Encoded(ids if packed else ids.tolist(), spans, places[one.start]))
        return encoded

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
    found = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or token.content[:2] in ("<|", "<｜") or token.content[-2:] in ("|>", "｜>"):
            found.add(token.content)
    return sorted(filter(str.strip, found), key=lambda token: (-len(token), token))


def find_tokenizer(stage: Stage) -> tuple[str, str | None]:
    """Find a stage's tokenizer and its revision: its start's, `model.tokenizer`, `model.path`, or learnt words."""
    start = find_model_dir(stage.start_dir) if stage.start_dir else None
    if start is not None and inspect_model_dir(start, trust_code=stage.trust_code).has_tokenizer:
        return str(start), None
    if stage.model.tokenizer:
        return stage.model.tokenizer, None
    if stage.model.path.startswith("builtin:rnn"):
        return LEARNT_TOKENIZERS[0], None
    return stage.model.path, stage.model.revision


def load_tokenizer(stage: Stage, *, learnt: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer a stage trains with, its pad token, chat template and template settings set.
    `learnt` is the one that its rows made, where it is such. Builtin tokenizers speak chatml unless told otherwise. Of
    several templates all are kept, the chosen one as `default`. Raises ModelError or EnvironmentProblem."""
    source, revision = find_tokenizer(stage)
    if source in LEARNT_TOKENIZERS:
        assert learnt is not None, "learn_vocabulary of the train room reads the rows"
        tokenizer = learnt_tokenizer(learnt)
    elif is_builtin(source):
        tokenizer = builtin_tokenizer()
        tokenizer.chat_template = _read_template("chatml", tokenizer)
    else:
        remedy = "set model.tokenizer to the one its model was trained with"
        tokenizer = read_tokenizer(source, revision=revision, trust_code=stage.trust_code, remedy=remedy)
    require_eos(tokenizer, source)
    set_pad_token(tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in stage.model.add_tokens])
    if stage.task is not None:
        added: dict[str, Any] = {"additional_special_tokens": list(TASK_TOKENS)}
        tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
    name, where = stage.model.chat_template, stage.where("model.chat_template")
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if name in own or (name is None and len(own) == 1):
            tokenizer.chat_template = own | {"default": own.get(name) or next(iter(own.values()))}
            name = None
        elif name is None and "default" not in own:
            raise ModelError(f"{source} has several chat templates; name one: {', '.join(sorted(own))}", where=where)
    if name:
        tokenizer.chat_template = _read_template(name, tokenizer, where=where)
    found = tokenizer.chat_template or {}
    texts = found.values() if isinstance(found, dict) else [found]
    read = {setting for text in texts for setting in list_settings(text, where=name or f"{source} (chat template)")}
    settings = stage.model.chat_template_kwargs or {}
    if unread := sorted(settings.keys() - read):
        known = ", ".join(sorted(read)) or "no settings"
        what = f"the chat template does not read {', '.join(unread)}; it reads {known}"
        raise ModelError(what, where=stage.where("model.chat_template_kwargs"))
    if settings:
        tokenizer.init_kwargs[SETTINGS] = settings  # which a saved model keeps
    return tokenizer


def load_chat(stage: Stage, *, clock: datetime | None = None, learnt: str | None = None) -> Chat:
    """Load a stage's tokenizer with its template, which reads the time of `clock`."""
    name = stage.model.chat_template or "the tokenizer's own"
    tokenizer, halves = load_tokenizer(stage, learnt=learnt), stage.objective == "seq2seq"
    return Chat(tokenizer, clock=clock, name=name, encoder_decoder=halves)


def set_pad_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """Give a tokenizer a spare token for padding, behind which no score is read: an eos would be hidden so."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    spare = [token for token in KNOWN["spare_tokens"] if token in vocabulary and token not in taken]
    tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int, *, model: str) -> None:
    """Raise ModelError when the tokenizer has ids that the embedding matrix does not."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        what = f"the tokenizer has token ids up to {highest} but {model} has {vocab_size} embeddings; "
        raise ModelError(f"{what}set model.tokenizer to the tokenizer that belongs to the model")


def read_tokenizer(
    source: str, *, revision: str | None = None, trust_code: bool = False,
    remedy: str = "copy the one it was trained with into it",
) -> PreTrainedTokenizerFast:  # fmt: skip
    """Read the tokenizer of a directory, a run or a hub id; `remedy` is what to do where there is none."""
    require_available(source)
    directory = find_model_dir(source)
    if directory is not None and not has_tokenizer(directory):
        raise ModelError(f"{directory} has no tokenizer; {remedy}")
    with explain_hub_errors(source), quiet_transformers():
        place = str(directory or source)
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust_code)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{source} has no fast tokenizer (tokenizer.json); convert it once; {remedy}")
    return tokenizer


def require_eos(tokenizer: PreTrainedTokenizerFast, source: str) -> None:
    """Raise ModelError for a tokenizer without a token that ends a text."""
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {source} has no eos token; set eos_token in its tokenizer_config.json")


def _read_template(name: str, tokenizer: PreTrainedTokenizerFast, *, where: str | None = None) -> str:
    """Read a shipped template or a file."""
    if name not in TEMPLATES:
        if not (file := Path(name).expanduser()).is_file():
            what = f"model.chat_template {name!r} is neither a file nor one of {', '.join(TEMPLATES)}"
            raise ModelError(what, where=where)
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"is not UTF-8 text: {error}; save it as UTF-8", where=str(file)) from error
    text = TEMPLATES[name].read_text(encoding="utf-8")
    needs = re.findall(r"<\|\w+\|>", text.partition("#}")[0])
    if missing := [token for token in needs if token not in tokenizer.get_vocab()]:
        what = f"model.chat_template {name!r} writes {' and '.join(missing)}, which the tokenizer does not have as "
        raise ModelError(f"{what}tokens; use plain, or zephyr, which need no control tokens", where=where)
    # A text that is tokenised by the tokenizer alone would start with a BOS; a chat then does too, once.
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return "{{- bos_token }}" + text if adds_bos and "bos_token" not in text else text
