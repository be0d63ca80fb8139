"""A language model that is measured: log-probabilities and answers, cached by content; weights are read when needed."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from alignkit.data import Message, Row, Text
from alignkit.errors import DataError, ModelError
from alignkit.models.chat import Chat, ConversationError
from alignkit.models.frozen import Causal, fingerprint_causal, load_causal
from alignkit.models.generation import generate_answers, usual_length
from alignkit.models.hub import quiet_transformers
from alignkit.models.scoring import can_share, follow_greedily, score_tokens
from alignkit.rewards import Workspace, collect_memory

_FAR = 10**9
_Ids = Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a text: the sum of log-probabilities in nats, and over how many tokens and UTF-8 bytes."""

    logp: float
    tokens: int
    num_bytes: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer: as tokens, stop token included where one came, and as text."""

    ids: list[int]
    text: str
    ended: bool


class Policy:
    """A causal language model by the name of a run, a directory or a hub id."""

    def __init__(self, source: str, space: Workspace, given: tuple[Causal, Chat] | None = None) -> None:
        """Find the weights, or take a model that somebody holds; raises ModelError when nothing is there."""
        self.source, self._space, self._given = source, space, given
        self.weights = given[0].fingerprint if given else fingerprint_causal(source)
        self._loaded = given

    def release(self) -> None:
        self._loaded = self._given
        collect_memory()

    def _load(self) -> tuple[Causal, Chat]:
        self._space.take(self)
        if self._loaded is None:
            device, trust_code = self._space.device, self._space.trust_code
            loaded = load_causal(self.source, device=device, trust_code=trust_code, encoder_decoder=True)
            self._loaded = loaded, Chat(loaded.tokenizer, encoder_decoder=loaded.model.config.is_encoder_decoder)
        return self._loaded

    @property
    def loaded(self) -> Causal:
        return self._load()[0]

    @property
    def chat(self) -> Chat:
        return self._load()[1]

    @cached_property
    def tokens(self) -> str:
        """A hash of tokenizer and template: models with the same one read the same tokens of a conversation."""

        def answer(_: list[str]) -> list[str]:
            tokenizer = self.loaded.tokenizer
            parts = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token_id)
            return [hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()]

        return str(self._ask("tokens", [self.source], answer)[0])

    @cached_property
    def usual_length(self) -> int:
        """Most tokens of its answers where nobody says."""

        (found,) = self._ask(
            "usual length", [self.source], lambda _: [usual_length(self.chat, self.loaded.positions, short=64)]
        )
        return int(found)

    def score_completions(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Likelihood]:
        """Score log p(completion | prompt), its end token included.
        A prompt that leaves no room loses its beginning; a completion longer than the model is not scored (no tokens).
        Both are warned of. Raises DataError for a conversation that the template cannot write."""

        def answer(asked: list[tuple[Text, Text]]) -> list[list[float]]:
            splits = self._encode(lambda: self.chat.encode_prompt_completion(*zip(*asked, strict=True)))
            pairs = [(split.ids[: split.prompt_length], split.ids[split.prompt_length :]) for split in splits]
            found = zip(self.score_tokens(pairs), asked, strict=True)
            return [[sum(logps), len(logps), _count_bytes(text)] for logps, (_, text) in found]

        questions = list(zip(prompts, completions, strict=True))
        return [Likelihood(*value) for value in self._ask("completion", questions, answer)]

    def score_documents(self, rows: Sequence[Row]) -> list[Likelihood]:
        """Score log p of whole texts (each with its end token) and of the assistant's turns of conversations.
        A text longer than the model is read in windows that do not overlap; the first token of a text has nothing
        before it where the tokenizer has no BOS: it is not scored, and its bytes are not counted."""

        def answer(contents: list[Text]) -> list[list[float]]:
            (loaded, chat), values = self._load(), []
            room = loaded.positions or _FAR
            for content in contents:
                if isinstance(content, str):
                    (ids,) = chat.encode_texts([content])
                    num_bytes = len(content.encode())
                    if not chat.encode_prompts([""])[0]:  # no BOS
                        num_bytes -= len(chat.tokenizer.decode(ids[:1], clean_up_tokenization_spaces=False).encode())
                    # Each window begins with the last token of the one before it, which it does not score again.
                    starts = range(0, max(len(ids) - 1, 1), max(room - 1, 1))
                    parts = [(ids[start : start + 1], ids[start + 1 : start + room]) for start in starts]
                else:
                    (texts,) = self._encode(partial(chat.encode, [content]))
                    parts = [(text.ids[:start], text.ids[start:end]) for text in texts for start, end in text.spans]
                    num_bytes = _count_bytes([message for message in content if message["role"] == "assistant"])
                scored = self.score_tokens(parts)
                whole = all(logps or not tail for logps, (_, tail) in zip(scored, parts, strict=True))
                logps = [logp for part in scored if whole for logp in part]
                values.append([sum(logps), len(logps), num_bytes])
            return values

        return [Likelihood(*value) for value in self._ask("document", [row.completions[0] for row in rows], answer)]

    def score_continuations(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[Likelihood]:
        """Score log p(continuation | context) without an end token; cut into tokens as lm-evaluation-harness does."""

        def answer(asked: list[tuple[str, str]]) -> list[list[float]]:
            scored = self.score_tokens([self._encode_pair(*pair) for pair in asked])
            return [[sum(logps), len(logps), 0] for logps in scored]

        questions = list(zip(contexts, continuations, strict=True))
        found = [Likelihood(*value) for value in self._ask("continuation", questions, answer, start="eos")]
        if any(not item.tokens for item in found):
            raise DataError(f"a completion of a task is longer than {self.source} can read")
        return found

    def match(
        self, contexts: Sequence[str], continuations: Sequence[str], *, spare_tokens: int, num_whole: int
    ) -> list[tuple[Likelihood, str]]:
        """Score continuations as above, each with the first line of the greedy answer to its context, which is written
        after the same read; but for the first `num_whole` no further than it can still be the continuation."""
        pairs = list(zip(contexts, continuations, strict=True))
        (longest,) = self._ask("longest", [pairs], lambda _: [max(len(self._encode_pair(*pair)[1]) for pair in pairs)])
        most = longest + spare_tokens

        def answer(asked: list[tuple[str, str, bool]]) -> list[list[Any]]:
            loaded, chat = self._load()
            encoded = [self._encode_pair(context, continuation) for context, continuation, _ in asked]
            fits = all(len(context) + most <= (loaded.positions or _FAR) for context, _ in encoded)
            if not fits or not can_share(loaded.model) or any(not it.strip() or it != it.rstrip() for it, *_ in asked):
                given, wanted, _ = zip(*asked, strict=True)
                said = [group[0].text for group in self.answer(given, max_new_tokens=most, plain=True)]
                scored = self.score_continuations(given, wanted)
                return [[item.logp, item.tokens, text] for item, text in zip(scored, said, strict=True)]

            def goes_on(place: int, ids: list[int]) -> bool:
                text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
                if len(ids) >= most or ids[-1] in chat.stop_ids or "\n" in text:
                    return False
                # Up to three bytes wait for the rest of their character; what is more of them never becomes one.
                begun = text[:-3] + text[-3:].rstrip("\ufffd")
                said, wanted = ("".join(each.split()) for each in (begun, asked[place][1]))
                return asked[place][2] or wanted.startswith(said)

            values: list[list[Any]] = [[] for _ in asked]
            pad, size = int(loaded.tokenizer.pad_token_id), self._space.batch_size
            shown = [place for place, (*_, is_whole) in enumerate(asked) if is_whole]
            how: Any = {"pad_id": pad, "batch_size": size, "first": shown}
            for batch in follow_greedily(loaded.model, encoded, goes_on=goes_on, **how):
                for place, logps, ids in batch:
                    text = loaded.tokenizer.decode(ids, skip_special_tokens=True).split("\n", 1)[0]
                    values[place] = [sum(logps), len(logps), text]
            return values

        questions = [(*pair, number < num_whole) for number, pair in enumerate(pairs)]
        found = self._ask("match", questions, answer, max_new_tokens=most)
        return [(Likelihood(logp, tokens), text) for logp, tokens, text in found]

    def score_answers(
        self, prompts: Sequence[Text], answers: Sequence[Sequence[Answer]], *, temperature: float = 1.0
    ) -> list[list[float]]:
        """Score log p of every answer as it was sampled, token by token, at this temperature, in nats per answer."""

        def answer(asked: list[tuple[Text, list[int]]]) -> list[float]:
            prompt_ids = self._encode(lambda: self.chat.encode_prompts([prompt for prompt, _ in asked]))
            pairs = [(ids, tail) for ids, (_, tail) in zip(prompt_ids, asked, strict=True)]
            return [sum(logps) for logps in self.score_tokens(pairs, temperature=temperature)]

        questions = [(prompt, answer.ids) for prompt, group in zip(prompts, answers, strict=True) for answer in group]
        flat = iter(self._ask("answer logp", questions, answer, temperature=temperature))
        return [[next(flat) for _ in group] for group in answers]

    def score_tokens(self, pairs: Sequence[tuple[_Ids, _Ids]], *, temperature: float = 1.0) -> list[list[float]]:
        """Score continuations of token ids; a long context loses its beginning, one too long alone is not scored."""
        loaded, room = self.loaded, self.loaded.positions or _FAR
        tails = [tail if len(tail) <= room else () for _, tail in pairs]
        over = [len(context) + len(tail) - room for (context, _), tail in zip(pairs, tails, strict=True)]
        fitting = [(context[max(by, 0) :], tail) for (context, _), by, tail in zip(pairs, over, tails, strict=True)]
        if num_cut := sum(by > 0 for by in over):
            self._space.warn(f"{num_cut} prompts were cut on the left to fit the {room} positions of {self.source}")
        if num_long := sum(len(tail) > room for _, tail in pairs):
            self._space.warn(f"{num_long} texts are longer than the {room} positions of {self.source}: left out")
        pad, size = int(loaded.tokenizer.pad_token_id), self._space.batch_size
        return score_tokens(loaded.model, fitting, pad_id=pad, temperature=temperature, batch_size=size)

    def answer(
        self, prompts: Sequence[Text], *, max_new_tokens: int, temperature: float = 0.0, samples: int = 1,
        seed: int = 0, plain: bool = False, num_beams: int = 1, engine: str = "transformers", **cuts: float,
    ) -> list[list[Answer]]:  # fmt: skip
        """Write `samples` answers to each prompt; temperature 0 is greedy, or a search with beams, and gives one.
        What an answer draws follows from seed, prompt and its number alone. `cuts` are top_p and top_k; with `plain` a
        text prompt goes in as it is, and an answer ends at the first new line too."""
        samples = samples if temperature > 0 else 1
        common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, **cuts}
        common |= {"num_beams": num_beams} if num_beams > 1 else {}
        common |= {"engine": engine} if engine != "transformers" else {}
        settings = common | {"seed": seed, "plain": plain, "generation_config": "none"}  # see `generation.plainly`
        questions = [(prompt, number) for prompt in prompts for number in range(samples)]

        def answer(asked: list[tuple[Text, int]]) -> list[list[Any]]:
            ids = self._encode(lambda: self.chat.encode_prompts([prompt for prompt, _ in asked]))
            texts = (repr((seed, *question)).encode("utf-8", "surrogatepass") for question in asked)
            digests = (hashlib.blake2b(text, digest_size=8).digest() for text in texts)
            values = self._write(ids, [int.from_bytes(digest, "little") >> 1 for digest in digests], **common)
            return [[ids, text.split("\n", 1)[0] if plain else text, ended] for ids, text, ended in values]

        flat = [Answer(*value) for value in self._ask("answer", questions, answer, **settings)]
        return [flat[start : start + samples] for start in range(0, len(flat), samples)]

    def _write(
        self, prompts: list[list[int]], seeds: list[int], *, max_new_tokens: int, temperature: float,
        engine: str = "transformers", **settings: Any,
    ) -> list[list[Any]]:  # fmt: skip
        """Write tokens, text and whether it ended of an answer to each prompt, in batches of like length."""
        loaded, chat = self._load()
        size, pad = self._space.batch_size, int(loaded.tokenizer.pad_token_id)
        room = (loaded.positions or _FAR) - max_new_tokens
        if room < 1:
            raise ModelError(f"max_new_tokens {max_new_tokens} fills the {loaded.positions} positions of {self.source}")
        if num_cut := sum(len(ids) > room for ids in prompts):
            self._space.warn(f"{num_cut} prompts were cut on the left to fit the positions of {self.source}")
        settings |= {"in_flight": size} if engine == "continuous" else {}
        size = len(prompts) if engine == "continuous" else size  # it batches by itself
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        values: list[list[Any]] = [[] for _ in prompts]
        for start in range(0, len(order), size):  # `generate_answers` tells how far a batch is
            places = order[start : start + size]
            batch = [prompts[place][-room:] for place in places]
            with quiet_transformers():  # it looks for a mask that `generate` leaves out where nothing is padded
                answers = generate_answers(
                    loaded.model, batch, [seeds[place] for place in places], temperature=temperature,
                    max_new_tokens=max_new_tokens, eos_ids=chat.stop_ids, pad_id=pad, **settings,
                )  # fmt: skip
            for place, ids in zip(places, answers, strict=True):
                text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
                values[place] = [ids, text, bool(ids) and ids[-1] in chat.stop_ids]
        return values

    def _ask(
        self, kind: str, questions: Sequence[Any], answer: Callable[[list[Any]], Sequence[Any]], **common: Any
    ) -> Any:
        keep = max(self._space.batch_size, 64)  # answers lost at most by a kill; fewer than a batch would cut batches
        assert self._space.cache is not None
        common |= {"kind": kind, "weights": self.weights}
        return self._space.cache.ask(common, questions, answer, batch_size=keep)

    def _encode(self, encode: Callable[[], Any]) -> Any:
        try:
            return encode()
        except ConversationError as error:
            raise DataError(f"the template of {self.source} cannot write a row: {error}") from error

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.chat.encoder_decoder:  # the end token is not asked for
            (split,) = self.chat.encode_prompt_completion([context], [continuation])
            return split.ids[: split.prompt_length], split.ids[split.prompt_length : -1]
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation  # blanks belong to the continuation, as tokens have them
        head, whole = self.chat.encode_prompts([kept, kept + continuation])
        # With nothing to predict the first token from: the end-of-text token, as the harness has it.
        return (head, whole[len(head) :]) if head else ([int(self.chat.tokenizer.eos_token_id)], whole)


def _count_bytes(content: Text | Sequence[Message]) -> int:
    if isinstance(content, str):
        return len(content.encode())
    return sum(len(message["content"].encode()) for message in content)
