"""`alignkit chat`: a conversation with one model, or with two side by side, in a terminal or through a pipe."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from alignkit import console
from alignkit.data import Message, Row, escape_control_tokens
from alignkit.errors import DataError, ModelError
from alignkit.models.chat import NO_TEMPLATE, Chat, ConversationError
from alignkit.models.frozen import Causal, load_causal
from alignkit.models.generation import stream_text, stream_tokens
from alignkit.rewards import name_source

HELP = """/reset            forget the conversation
/system TEXT      set the system message and start afresh; without a text, take it away
/temp T           temperature: 0 is greedy
/help             this list
/quit             leave, as Ctrl-D does
Ctrl-C stops an answer and nothing else."""


@dataclass(frozen=True)
class Settings:
    """What a conversation starts with; the commands change it."""

    system: str | None = None
    temperature: float = 0.7
    max_new_tokens: int = 256
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass
class Speaker:
    """A model with its own side of the conversation: two models do not read each other's answers."""

    name: str
    loaded: Causal
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chat = Chat(self.loaded.tokenizer, encoder_decoder=self.loaded.model.config.is_encoder_decoder)

    def reset(self, system: str | None) -> None:
        self.messages = [Message(role="system", content=system)] if system and not self.chat.encoder_decoder else []

    def say(self, text: str) -> None:
        """Add the user's message; control tokens in it are defused, so that nobody forges a turn by typing one."""
        if self.chat.encoder_decoder:  # it reads one text
            self.messages = []
        row = escape_control_tokens(Row("prompt", text, ()), self.chat.control_tokens)
        self.messages.append(Message(role="user", content=str(row.prompt)))

    def answer(self, settings: Settings, generator: torch.Generator | None) -> Iterator[str]:
        """Yield the answer piece by piece; what has been said when the caller stops is part of the conversation."""
        ids = self._encode(settings.max_new_tokens)
        tokens = stream_tokens(
            self.loaded.model, ids, temperature=settings.temperature, max_new_tokens=settings.max_new_tokens,
            eos_ids=self.chat.stop_ids, top_p=settings.top_p, top_k=settings.top_k, generator=generator)  # fmt: skip
        self.messages.append(Message(role="assistant", content=""))
        for piece in stream_text(self.loaded.tokenizer, tokens):
            self.messages[-1] = Message(role="assistant", content=self.messages[-1]["content"] + piece)
            yield piece

    def _encode(self, max_new_tokens: int) -> list[int]:
        """Encode the conversation; the oldest turns are forgotten when it outgrows the model."""
        while True:
            try:
                (ids,) = self.chat.encode_prompts([self.messages])
            except ConversationError as error:
                raise DataError(f"the chat template of {self.name} cannot write this conversation: {error}") from error
            if self.loaded.positions is None or len(ids) + max_new_tokens <= self.loaded.positions:
                return ids
            first = 1 if self.messages[0]["role"] == "system" else 0
            if len(self.messages) - first < 3:  # one question alone
                if len(ids) >= self.loaded.positions:
                    raise DataError(f"the message has {len(ids)} tokens; {self.name} reads {self.loaded.positions}")
                return ids
            del self.messages[first : first + 2]
            console.note(f"({self.name} has forgotten the oldest turn: its {self.loaded.positions} positions are full)")


def talk(sources: Sequence[str], settings: Settings, *, device: str = "auto", trust_code: bool = False) -> None:
    """Hold a conversation until the input ends; raises ModelError for a model that cannot chat."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with Ctrl-C ignored
    speakers: dict[str, Speaker] = {}
    for source in sources:
        loaded = load_causal(source, device=device, trust_code=trust_code, encoder_decoder=True)
        if not (loaded.tokenizer.chat_template or loaded.model.config.is_encoder_decoder):
            raise ModelError(f"{source} cannot chat: {NO_TEMPLATE}")
        name = name_source(source)
        name = f"{name} ({len(speakers) + 1})" if name in speakers else name
        speakers[name] = Speaker(name, loaded)
        speakers[name].reset(settings.system)
    generator = None if settings.seed is None else torch.Generator().manual_seed(settings.seed)
    console.note(f"talking to {' and '.join(speakers)}; /help lists commands")
    while (line := console.ask("> ")) is not None:
        text = line.strip()
        if text in ("/quit", "/exit"):
            return
        if text.startswith("/"):
            settings = _obey(text, settings, list(speakers.values()))
        elif text:
            _answer(text, settings, generator, list(speakers.values()))


def _obey(text: str, settings: Settings, speakers: Sequence[Speaker]) -> Settings:
    """Do what a command says, and return the settings as they are then."""
    command, rest = (*text.split(maxsplit=1), "")[:2]
    if command == "/system":
        settings = replace(settings, system=rest or None)
    if command in ("/reset", "/system"):
        for speaker in speakers:
            speaker.reset(settings.system)
    if command == "/temp":
        with suppress(ValueError):
            if 0 <= float(rest) <= 100:
                console.note(f"(temperature {float(rest):g})")
                return replace(settings, temperature=float(rest))
    said = {
        "/reset": "(a new conversation)",
        "/system": "(a new conversation with this system message)" if rest else "(no system message)",
        "/temp": f"(the temperature is {settings.temperature:g}; /temp takes a number from 0 up)",
        "/help": HELP,
    }
    console.note(said.get(command, f"(there is no {command}; /help lists commands)"))
    return settings


def _answer(text: str, settings: Settings, generator: torch.Generator | None, speakers: Sequence[Speaker]) -> None:
    before = [list(speaker.messages) for speaker in speakers]
    try:
        for speaker in speakers:
            speaker.say(text)
        console.stream({speaker.name: speaker.answer(settings, generator) for speaker in speakers})
    except KeyboardInterrupt:
        console.note("(stopped)")
        for speaker in speakers:
            if speaker.messages and speaker.messages[-1]["role"] == "user":  # it had not begun
                speaker.messages.append(Message(role="assistant", content=""))
    except DataError as error:
        console.print_error(error)
        for speaker, messages in zip(speakers, before, strict=True):
            speaker.messages = messages
