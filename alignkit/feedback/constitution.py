"""Constitutions and worked examples, from our YAML or the JSON that Anthropic published.

Every mistake in a file is found at once, with its line. Published files (arXiv 2212.08073):
https://github.com/anthropics/ConstitutionalHarmlessnessPaper; the words around an instruction are taken off, and
`prompts` puts them back, byte for byte. Worked examples stand before a request: critiques with revisions, comparisons,
chains of thought. They are trusted: nothing in them is quoted.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from alignkit.data.rows import Message
from alignkit.errors import Problem, RecipeError, suggest
from alignkit.recipe.check import describe_unknown, quote_help, validate
from alignkit.recipe.schema import BUILTIN_CONSTITUTIONS, Positive, Text
from alignkit.recipe.yaml import Node, Origin, label_path, parse_yaml

CRITIQUE_FRAME = ("\n\nCritiqueRequest: ", "\n\nCritique:")
REVISION_FRAME = ("\n\nRevisionRequest: ", "\n\nRevision:")
COMPARISON_FRAME = ("\n", " Options:")
BUILTIN = "builtin:"
PRINCIPLE_HERE = "{}"  # in a published chain of thought: where the question goes
_LABEL = re.compile(r"\n\n(Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision):")
_NEXT = "\n\nHuman:"  # most published examples end with the start of the next one
_CRITIQUE_PART = re.compile(r"\n\nCritiqueRequest:.*?\n\nCritique:.*?(?=\n\nRevisionRequest:)", re.DOTALL)
Part = Literal["critique", "comparison"]
_Model = TypeVar("_Model", bound=BaseModel)
_Read = TypeVar("_Read")
# What a principle lacks that a stage needs, or that the others in its file have.
_ADVICE = {
    "critique": "critique request and a revision request; add critique: and revision:",
    "comparison": "question to compare answers by; add comparison:",
}


class Written(BaseModel):
    """A mapping in a YAML file of ours."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Principle(Written):
    """One thing to go by. `critique` and `revision` come together; `comparison` is a question about two answers."""

    name: Text = Field(description="A short name, for the report.")
    critique: Text | None = None
    revision: Text | None = None
    comparison: Text | None = None
    weight: Positive = 1.0
    tags: list[Text] = []


class _File(Written):
    name: Text | None = None
    description: Text | None = None
    principles: Annotated[
        list[Principle], Field(min_length=1, description="A list of {name, critique, revision, comparison}.")
    ]


def read_yaml(
    model: type[_Model], text: str, label: str, folder: Path, what: str
) -> tuple[_Model | None, dict[str, Node], list[Problem]]:
    """Parse a YAML mapping and make its model; with its keys and all that is wrong with them."""
    tree = parse_yaml(text, Origin(label, folder))
    if tree is None or not isinstance(tree.value, dict) or not tree.value:
        raise RecipeError(f"must be a mapping with {' and '.join(model.model_fields)}", where=f"{label}:1")
    values: dict[str, Node] = tree.value
    problems = [
        Problem(describe_unknown(key, what, model.model_fields), node.place)
        for key, node in values.items()
        if key not in model.model_fields
    ]
    for name, field in model.model_fields.items():
        if field.is_required() and name not in values:
            problems.append(Problem(f"{what}.{name} is missing; {quote_help(field.description)}", tree.place))
    made, found = validate(model, {key: node for key, node in values.items() if key in model.model_fields}, str)
    return made, values, problems + [problem for each in found.values() for problem in each]


def _read_own(text: str, label: str, folder: Path) -> list[Principle]:
    made, values, problems = read_yaml(_File, text, label, folder, "constitution")
    listed = values["principles"].value if "principles" in values else None
    mappings = [node for node in (listed if isinstance(listed, list) else ()) if isinstance(node.value, dict)]
    named = [node for node in mappings if isinstance(getattr(node.value.get("name"), "value", None), str)]
    lines: dict[str, int] = {}
    for node in named:
        name = node.value["name"].value
        if name in lines:
            what = f"the name {name} is here twice, first in line {lines[name]}; rename one"
            problems.append(Problem(what, node.place))
        lines.setdefault(name, node.line)
        if ("critique" in node.value) != ("revision" in node.value):
            there, missing = ("critique", "revision") if "critique" in node.value else ("revision", "critique")
            what = f"principle {name} has a {there} but no {missing}; the two go together"
            problems.append(Problem(what, node.place))
        elif not {"critique", "comparison"} & node.value.keys():
            what = "has no question; add comparison: (for labels), or critique: and revision:"
            problems.append(Problem(f"principle {name} {what}", node.place))
    for part, advice in _ADVICE.items() if not problems else ():  # what lacks it would never be drawn, unnoticed
        lacking = [node for node in named if part not in node.value]
        for node in lacking if len(lacking) < len(named) else ():
            name = node.value["name"].value
            problems.append(Problem(f"principle {name} has no {advice} (other principles have one)", node.place))
    if problems:
        raise RecipeError(problems)
    assert made is not None
    found = []
    for principle in made.principles:
        texts = {key: getattr(principle, key) for key in ("critique", "revision", "comparison")}
        texts = {key: " ".join(text.split()) for key, text in texts.items() if text is not None}
        if "comparison" in texts:  # the prompt adds it
            texts["comparison"] = texts["comparison"].removesuffix("Options:").rstrip()
        found.append(principle.model_copy(update=texts))
    return found


def _read_published(data: Any, label: str) -> list[Principle]:
    """Read one published file; each principle has a critique and a revision, or a comparison."""
    texts = isinstance(data, list) and all(isinstance(item, str) for item in data)
    if not isinstance(data, dict) and not texts:
        what = "holds examples, not instructions; name it under examples:" if isinstance(data, list) else "is no object"
        raise RecipeError(what, where=label)
    found: list[Principle] = []
    problems: list[Problem] = []
    for number, (name, item) in enumerate(data.items() if isinstance(data, dict) else enumerate(data)):
        try:
            if texts:
                question = _unframe(item, COMPARISON_FRAME, f"entry {number}", label)
                found.append(Principle(name=f"comparison{number}", comparison=question))
                continue
            prompts, request = (item.get("prompt"), item.get("edit_request")) if isinstance(item, dict) else ((), None)
            if not isinstance(prompts, list) or not prompts or not isinstance(request, str):
                raise RecipeError(f"{name}: must be {{prompt: [TEXT], edit_request: TEXT}}", where=label)
            for place, prompt in enumerate(prompts):
                critique = _unframe(str(prompt), CRITIQUE_FRAME, f"{name}.prompt", label)
                revision = _unframe(request, REVISION_FRAME, f"{name}.edit_request", label)
                full = name if place == 0 else f"{name}.{place}"
                found.append(Principle(name=full, critique=critique, revision=revision))
        except RecipeError as error:
            problems += error.problems
    if problems or not found:
        raise RecipeError(problems or [Problem("there are no principles in it", label)])
    return found


def _unframe(text: str, frame: tuple[str, str], name: str, label: str) -> str:
    start, end = frame
    if not (text.startswith(start) and text.endswith(end) and text[len(start) : -len(end)].strip()):
        raise RecipeError(f"{name} is not {start!r} + an instruction + {end!r}", where=label)
    return text[len(start) : -len(end)]


@dataclass(frozen=True)
class Constitution:
    """Principles in the order of their files; all of them have what the stage asks for."""

    principles: tuple[Principle, ...]

    def draw(self, *, seed: int, key: str, turn: int) -> Principle:
        """Draw the principle for one turn of whatever `key` names, by weight.
        It depends on nothing else: neither the order of the work nor a restart changes it (CAI, arXiv 2212.08073,
        section 3.1: a principle is drawn at every step, uniformly where the weights are equal)."""
        digest = hashlib.blake2b(f"principle {seed} {turn} {key}".encode(), digest_size=8).digest()
        drawn = int.from_bytes(digest, "little") / 2.0**64 * self._borders[-1]
        return self.principles[min(bisect_right(self._borders, drawn), len(self.principles) - 1)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash, in hex, of everything that can change a draw or a prompt."""
        text = json.dumps([principle.model_dump() for principle in self.principles])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def _borders(self) -> list[float]:
        return list(accumulate(principle.weight for principle in self.principles))


def load_constitution(values: str | Sequence[str], *, needs: Part | None = None) -> Constitution:
    """Read one or more constitutions into one; each value is a file or builtin:NAME.
    `needs` leaves only the principles that can be criticised, or compared, by: the published files hold either kind.
    Raises RecipeError with every problem found, each with file and line."""
    names = [values] if isinstance(values, str) else list(values)
    shown = [name if name.startswith(BUILTIN) else label_path(Path(name).expanduser()) for name in names]
    problems: list[Problem] = []
    found: list[Principle] = []
    places: dict[str, str] = {}
    for place, principles in zip(shown, _read_all(names, _read), strict=True):
        for principle in principles:
            if principle.name in places:
                what = f"the principle {principle.name} is also in {places[principle.name]}; rename one"
                problems.append(Problem(what, place))
            places[principle.name] = place
        found += principles
    if problems:
        raise RecipeError(problems)
    kept = tuple(principle for principle in found if needs is None or getattr(principle, needs) is not None)
    if not kept:
        leave = ", or leave the stage out (critique: false)" if needs == "critique" else ""
        what = f"no principle has a {_ADVICE[needs or 'comparison']} to each{leave}"
        raise RecipeError(what, where=", ".join(shown))
    return Constitution(kept)


def _read_all(names: Sequence[str], read: Callable[[str], _Read]) -> list[_Read]:
    """Read several files; raises RecipeError with the problems of all of them."""
    found, problems = [], list[Problem]()
    for name in names:
        try:
            found.append(read(name))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return found


def _read(value: str) -> list[Principle]:
    path = Path(value).expanduser()
    if value.startswith(BUILTIN):
        if value not in BUILTIN_CONSTITUTIONS:
            known = [name.removeprefix(BUILTIN) for name in BUILTIN_CONSTITUTIONS]
            hint = suggest(value.removeprefix(BUILTIN), known)
            raise RecipeError(f"constitution is {value}; there are {' and '.join(BUILTIN_CONSTITUTIONS)}{hint}")
        path = Path(__file__).with_name("constitutions") / f"{value.removeprefix(BUILTIN)}.yaml"
    advice = "give a YAML or JSON file, builtin:harmlessness or builtin:helpfulness"
    content, label = _load(path, "constitution is", advice)
    return _read_published(content, label) if path.suffix == ".json" else _read_own(content, label, path.parent)


def _load(path: Path, what: str, advice: str) -> tuple[Any, str]:
    """Read a file, parsed where it is JSON, and what messages call it."""
    label = label_path(path)
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*") if other.suffix in (".yaml", ".yml", ".json"))
        raise RecipeError(f"the {what} not there{suggest(path.name, near) or f'; {advice}'}", where=label)
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else text, label
    except json.JSONDecodeError as error:
        raise RecipeError(f"is not JSON: {error.msg}", where=f"{label}:{error.lineno}") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"the {what} not readable: {error}", where=label) from None


# Worked examples.


class _WrittenCritique(Written):
    human: Text
    assistant: Text
    critique_request: Text
    critique: Text
    revision_request: Text
    revision: Text


class Pair(Written):
    """An answer that is better and one that is worse; the question they are compared by is drawn."""

    prompt: Text = Field(alias="human")
    better: Text
    worse: Text


class _ExampleFile(Written):
    critiques: list[_WrittenCritique] = []
    comparisons: list[Pair] = []


@dataclass(frozen=True)
class Examples:
    """Worked examples by kind; transcripts start with a blank line and end with their last word."""

    critiques: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    thoughts: tuple[str, ...] = ()

    @cached_property
    def critique_messages(self) -> tuple[Message, ...]:
        return tuple(message for text in self.critiques for message in messages_of(text))

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.blake2b(repr((self.critiques, self.pairs, self.thoughts)).encode(), digest_size=16).hexdigest()


def load_examples(values: str | Sequence[str]) -> Examples:
    """Read worked examples: builtin, none, or one or more files; raises RecipeError with every problem found."""
    names = [name for name in ([values] if isinstance(values, str) else values) if name != "none"]
    found = _read_all(names, _read_examples)
    return Examples(
        tuple(text for part in found for text in part.critiques),
        tuple(pair for part in found for pair in part.pairs),
        tuple(text for part in found for text in part.thoughts),
    )


def without_critiques(examples: Examples) -> Examples:
    """Leave out what was said between an answer and its revision."""
    return replace(examples, critiques=tuple(_CRITIQUE_PART.sub("", text) for text in examples.critiques))


def messages_of(transcript: str) -> list[Message]:
    """Turn a transcript into messages: what the model is to write are assistant turns, all else user turns."""
    pieces = _LABEL.split(transcript)[1:]
    return [
        Message(role="assistant" if label in ("Assistant", "Critique", "Revision") else "user", content=said.strip())
        for label, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _read_examples(name: str) -> Examples:
    """Read a YAML file of ours, or a published one of transcripts, pairs, or chains of thought."""
    path = Path(__file__).with_name("examples.yaml") if name == "builtin" else Path(name).expanduser()
    content, label = _load(path, "examples are", "give builtin, none, or a YAML or JSON file")
    critiques, pairs, thoughts = list[str](), list[Pair](), list[str]()
    if path.suffix != ".json":
        file, _, problems = read_yaml(_ExampleFile, content, label, path.parent, "examples")
        for item in file.critiques if file else ():
            critique = f"{item.critique_request.strip().join(CRITIQUE_FRAME)} {item.critique.strip()}"
            revision = f"{item.revision_request.strip().join(REVISION_FRAME)} {item.revision.strip()}"
            asked = f"\n\nHuman: {item.human.strip()}\n\nAssistant: {item.assistant.strip()}"
            critiques.append(asked + critique + revision)
        for it in file.comparisons if file else ():
            pairs.append(Pair(human=it.prompt.strip(), better=it.better.strip(), worse=it.worse.strip()))
    elif not isinstance(content, list) or not content:
        problems = [Problem("holds no list of examples; instructions belong under constitution:", label)]
    else:
        problems = []
        for number, item in enumerate(content):
            prompt = item.get("prompt") if isinstance(item, dict) else None
            if isinstance(item, str) and "\n\nRevision:" in item:
                critiques.append("\n\n" + item.removesuffix(_NEXT).strip("\n"))
            elif isinstance(prompt, str) and PRINCIPLE_HERE in prompt:
                thoughts.append("\n\n" + prompt.strip("\n"))
            else:
                try:
                    human = str(prompt).removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
                    pairs.append(Pair(human=human, better=item["corrects"][0], worse=item["incorrects"][0]))
                except (AttributeError, KeyError, IndexError, TypeError, ValueError):
                    what = f"entry {number} is neither a critique with a revision nor a comparison"
                    problems.append(Problem(what, label))
    if problems:
        raise RecipeError(problems)
    return Examples(tuple(critiques), tuple(pairs), tuple(thoughts))
