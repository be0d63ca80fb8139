"""A recipe file as a tree that knows where every value was written, with what it extends and --set laid on.

Tags, anchors, aliases, several documents, repeated keys and secrets are refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from alignkit.console import holds_secret, redact
from alignkit.errors import Problem, RecipeError, find_nearest, suggest
from alignkit.recipe.words import TABLES

_SECRET_NAME = re.compile(r"(^|_)(token|api_?key|secret(_?key)?|access_?key|passwords?|passwd|credentials?)$", re.I)
# Names of vocabulary entries, which the pattern above would take for credentials.
_VOCABULARY = re.compile(r"^(pad|eos|bos|unk|sep|cls|mask|image|end|stop|special|assistant|user)_token$", re.I)


def names_secret(key: str) -> bool:
    """Tell whether a key is the name of a credential (hub_token, api-key), not of a vocabulary entry (eos_token)."""
    name = key.replace("-", "_")
    return bool(_SECRET_NAME.search(name)) and not _VOCABULARY.match(name)


def leads_to_secret(key: str) -> bool:
    """Tell whether a dotted key names a credential; the token of `truncate:` is one of the vocabulary."""
    return names_secret(key.rpartition(".")[2]) and not f".{key}".endswith(".truncate.token")


def take_secrets(tree: Node) -> list[Problem]:
    """Report secrets and take them out, so that no other message shows them."""
    advice = "a recipe holds none: take it out and set HF_TOKEN (or the service's own variable) in the environment"
    problems, secret = [], set()
    for path, node in tree.leaves():
        key, found = ".".join(path), None
        if path and holds_secret(path[-1]):
            found = "looks like a secret"
        elif leads_to_secret(key):
            found = "is the name of a secret"
        elif isinstance(node.value, str) and holds_secret(node.value):
            found = "holds what looks like a secret"
        if found:
            secret.add(id(node))
            problems.append(Problem(f"{redact(key)} {found}; {advice}", node.place))
    for _, node in list(tree.leaves()) if secret else ():
        if isinstance(node.value, dict):
            node.value = {key: child for key, child in node.value.items() if id(child) not in secret}
    return problems


MAX_DEPTH = 50

_INTEGER = re.compile(r"[-+]?[0-9]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {"": None, "~": None}
for _word, _meant in (("null", None), ("true", True), ("false", False)):
    _WORDS |= dict.fromkeys((_word, _word.title(), _word.upper()), _meant)
# Escapes such as "\0" and "\ud800" bring in what no file name, message or JSON file can hold.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a text came from: the name messages use, and the folder its relative paths start at."""

    label: str
    folder: Path

    def place(self, line: int) -> str:
        return self.label if self.label.startswith("--") else f"{self.label}:{line}"


@dataclass(slots=True)
class Node:
    """A value with its place; for an entry of a mapping the line is the key's."""

    value: Any  # str, int, float, bool, None, dict[str, Node] or list[Node]
    origin: Origin
    line: int = 1
    quoted: bool = False
    text: str = ""  # a single value as it was written: 2e-4

    @property
    def place(self) -> str:
        return self.origin.place(self.line)

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def leaves(self, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Node]]:
        """Yield every node below and including this one with its path of keys and list positions."""
        yield path, self
        if isinstance(self.value, dict | list):
            for key, child in self.value.items() if isinstance(self.value, dict) else enumerate(self.value):
                yield from child.leaves((*path, str(key)))


def parse_yaml(text: str, origin: Origin) -> Node | None:
    """Read one YAML document as a tree, None when it holds nothing; raises RecipeError with every problem."""
    problems: list[Problem] = []

    def report(what: str, line: int) -> None:
        if len(problems) < 100:
            problems.append(Problem(what, origin.place(line)))

    for number, written in enumerate(text.splitlines(), 1):
        if re.match(r"\s*\t\s*\S", written):
            report("a tab indents this line; YAML indents with spaces", number)
    root, documents = None, 0
    try:
        stream = iter(YAML(typ="safe", pure=True).parse(text))
        for event in stream:
            line = event.start_mark.line + 1
            if isinstance(event, events.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    report("a second document; a recipe is one document", line)
                    break
                if event.version or event.tags:
                    report("a % directive; a recipe needs none", line)
            elif isinstance(event, events.NodeEvent):
                root = _build(event, stream, origin, report, 0)
    except ReaderError as error:
        report("a control character; a recipe is plain UTF-8 text", text.count("\n", 0, error.position or 0) + 1)
    except MarkedYAMLError as error:
        if not problems:  # a tab also breaks the parser: one message is enough
            problem, context = (error.problem or "").strip(), (error.context or "").strip()
            what = f"this is not YAML: {problem or context}" + (f" ({context})" if context and problem else "")
            mark = error.problem_mark or error.context_mark
            for said, meant, begins in TABLES["complaints of the YAML parser"]:  # it knows expectations, not causes
                if said in problem:
                    what, mark = meant.replace("{problem}", problem), (begins and error.context_mark) or mark
                    break
            lines = text.rstrip().splitlines()  # the end of the text is not a line to look at
            line = min(mark.line + 1 if mark else 1, len(lines))
            key = re.match(r"[\s-]*([\w.-]{1,60}):(\s|$)", lines[line - 1]) if lines else None
            report(redact(f"{key[1]}: {what}") if key else what, line)
    except YAMLError as error:
        report(f"this is not YAML ({type(error).__name__})", 1)
    if problems:
        raise RecipeError(problems)
    return root


def _build(event: Any, stream: Iterator[Any], origin: Origin, report: Callable[[str, int], None], depth: int) -> Node:
    """Build the value that begins with an event, and take the events that belong to it; what cannot go on is raised."""
    line = event.start_mark.line + 1
    if isinstance(event, events.AliasEvent):
        report(f"an alias (*{event.anchor}); share values through `extends:` instead", line)
        return Node(None, origin, line)
    if event.anchor:
        report(f"an anchor (&{event.anchor}); share values through `extends:` instead", line)
    if event.tag is not None:
        report(f"a tag ({str(event.tag)[:40]}); a recipe is plain data and cannot name types or code", line)
    if isinstance(event, events.ScalarEvent):
        if _UNPRINTABLE.search(event.value):
            report("a control character or half a surrogate pair in this text", line)
        text, quoted = _UNPRINTABLE.sub("?", event.value), bool(event.style)
        return Node(text if quoted else read_scalar(text), origin, line, quoted, text)
    if depth >= MAX_DEPTH:
        report(f"nested deeper than {MAX_DEPTH} levels", line)
        raise MarkedYAMLError
    if isinstance(event, events.SequenceStartEvent):
        items = []
        while not isinstance(item := next(stream), events.SequenceEndEvent):
            items.append(_build(item, stream, origin, report, depth + 1))
        return Node(items, origin, line)
    entries: dict[str, Node] = {}
    while not isinstance(item := next(stream), events.MappingEndEvent):
        at = item.start_mark.line + 1
        if not isinstance(item, events.ScalarEvent):
            report("a list, mapping or alias used as a key; a key is one word", at)
            raise MarkedYAMLError
        key = _build(item, stream, origin, report, depth + 1)
        if key.text in entries:
            report(f"{shorten(key.text)} is here twice, first in line {entries[key.text].line}; keep one", at)
        if key.text == "<<" and not key.quoted:
            report("a merge key (<<); share values through `extends:` instead", at)
        if not key.text.strip():
            report("an empty key", at)
        child = _build(next(stream), stream, origin, report, depth + 1)
        child.line = at
        entries.setdefault(key.text, child)
    return Node(entries, origin, line)


def read_scalar(text: str) -> Any:
    """Read what a plain (unquoted) scalar means.
    YAML 1.2 core schema, less its octal and hexadecimal forms: 1e-4 is a number, no and 1:30 are text, 010 is ten."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def write_flow(value: Any) -> str:
    """Write a value as a recipe has it, in one line; `read_scalar` reads a text as it was."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {write_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(write_flow, value)) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[\w./~$][\w./@+$-]*(:[\w./-]+)?", value) and isinstance(read_scalar(value), str)
        return value if plain else json.dumps(value, ensure_ascii=False)
    return re.sub(r"e([+-])0+", r"e\1", json.dumps(value, default=str)).replace("e+", "e")


def shorten(text: str, longest: int = 60) -> str:
    """Cut a text for a message, without secrets or line breaks."""
    text = redact(text)
    text = text if text.isprintable() else json.dumps(text, ensure_ascii=False)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


FLAG = "--set"


def apply_override(tree: Node, override: str) -> Node:
    """Set one value in a copy of the tree; null takes a section away. Raises RecipeError when it cannot be laid on."""
    key, separator, text = override.partition("=")
    keys, shown, origin = key.strip().split("."), shorten(override, 80), Origin(FLAG, Path.cwd())
    if not separator or not all(keys):
        raise RecipeError(f"{shown} is not KEY.PATH=VALUE, such as dpo.beta=0.2", where=FLAG)
    if leads_to_secret(key.strip()):
        raise RecipeError(f"{key} is the name of a secret; set it in the environment instead (HF_TOKEN)", where=FLAG)
    try:
        value = parse_yaml(text, origin) or Node(None, origin)
    except RecipeError as error:
        raise RecipeError(f"{shown}: {error.problems[0].what}", where=FLAG) from None
    return lay_value(tree, keys, value, key=key, where=FLAG)


def lay_value(node: Node, keys: list[str], value: Node, *, key: str, where: str) -> Node:
    """Put a value at the end of these keys, in a copy of the tree; null takes a section away.
    Raises RecipeError at `where` when they lead through a single value or past a list; `key` is what it calls them."""
    if not keys:
        return value
    first, *rest = keys
    if isinstance(node.value, list):
        if not first.isdecimal() or len(first) > 6 or int(first) >= len(node.value):
            raise RecipeError(f"{key}: {first} is not a position in a list of {len(node.value)}", where=where)
        items = list(node.value)
        items[int(first)] = lay_value(items[int(first)], rest, value, key=key, where=where)
        return Node(items, node.origin, node.line)
    if node.value is not None and not isinstance(node.value, dict):
        raise RecipeError(f"{key}: what stands before .{first} is a single value, not a section", where=where)
    entries = dict(node.value or {})
    if not rest and value.value is None and first in entries and isinstance(entries[first].value, dict):
        del entries[first]
    else:
        before = entries.get(first, Node({}, value.origin, value.line))
        entries[first] = lay_value(before, rest, value, key=key, where=where)
    return Node(entries, node.origin, node.line)


MAX_BYTES = 256 * 1024  # some 5,000 lines; the parser needs a second per 100 KB
MAX_FILES = 32
SHIPPED = Path(__file__).resolve().parents[1].joinpath("recipes").resolve()
_VARIABLE = re.compile(r"\$\{([^}]*)\}|\$([A-Za-z_][A-Za-z0-9_]*)")


def expand(text: str) -> str:
    """Replace ~ and environment variables in a text; raises ValueError saying what is wrong."""

    def replace(match: re.Match[str]) -> str:
        name = match[1] if match[1] is not None else match[2]
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{match[0]} is not an environment variable; write ${{NAME}}")
        if names_secret(name):
            raise ValueError(f"{match[0]} is a secret; a path cannot hold one")
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} is not set")
        return os.environ[name]

    return os.path.expanduser(_VARIABLE.sub(replace, text))


def find_recipe(path: Path | str) -> Path:
    """Find the file that a name means: a shipped recipe of `builtin:NAME`; anything else is a path itself."""
    name = str(path).removeprefix("builtin:")
    if name == str(path):
        return Path(path)
    if (found := SHIPPED / f"{name.removesuffix('.yaml')}.yaml").is_file():
        return found
    names = sorted(file.relative_to(SHIPPED).with_suffix("").as_posix() for file in SHIPPED.rglob("*.yaml"))
    hint = suggest(name, names) or f"; there are {', '.join(names)}"
    raise RecipeError(f"{path} is no recipe that comes with alignkit{hint}")


def load_tree(path: Path, *, above: tuple[Path, ...] = (), read: list[Path] | None = None) -> Node:
    """Read a file and all it extends as one tree; `above` are the files that led here."""
    read = [] if read is None else read
    read.append(path)
    origin = Origin(label_path(path), path.parent)
    tree = parse_yaml(_read_text(path), origin)
    if tree is None or tree.value is None:
        raise RecipeError("the file is empty; a recipe needs at least `model:` and one stage", where=origin.place(1))
    if not isinstance(tree.value, dict):
        kind = "a list" if isinstance(tree.value, list) else "one value"
        raise RecipeError(f"the file holds {kind}; a recipe is a mapping of `key: value` lines", where=tree.place)
    extends = tree.value.pop("extends", None)
    if extends is None:
        return tree
    merged = Node({}, origin)
    for node in extends.value if isinstance(extends.value, list) else [extends]:
        if not isinstance(node.value, str) or not node.value.strip():
            raise RecipeError("extends must be a file name or a list of file names", where=node.place)
        try:
            file = node.origin.folder / find_recipe(expand(node.value))
        except (ValueError, RecipeError) as error:
            raise RecipeError(f"extends: {error}", where=node.place) from None
        if os.path.realpath(file) in map(os.path.realpath, (*above, path)):
            chain = " -> ".join(map(label_path, (*above, path, file)))
            raise RecipeError(f"extends goes round in a circle: {chain}", where=node.place)
        if len(read) >= MAX_FILES:
            raise RecipeError(f"extends reads more than {MAX_FILES} files", where=node.place)
        if not file.is_file():
            raise RecipeError(f"extends names {node.value}, {_describe_missing(file)}", where=node.place)
        merged = merge(merged, load_tree(file, above=(*above, path), read=read))
    return merge(merged, tree)


def merge(base: Node, over: Node) -> Node:
    """Lay one tree on another: mappings are merged, all else is replaced, null takes a mapping away."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = {**base.value, **over.value}
    for key in base.value.keys() & over.value.keys():
        before, node = base.value[key], over.value[key]
        merged[key] = merge(before, node)
        if node.value is None and isinstance(before.value, dict):
            del merged[key]
    return Node(merged, over.origin, over.line)


def _read_text(path: Path) -> str:
    """Read the file's text; refuses what cannot be a recipe before anything parses it."""
    label = label_path(path)
    try:
        if not path.is_file():
            raise RecipeError(f"recipe {label} {'is ' if path.is_dir() else ''}{_describe_missing(path)}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=label) from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES // 1024} KB; this is not a recipe", where=f"{label}:1")
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise RecipeError("a NUL byte; a recipe is plain UTF-8 text", where=f"{label}:{line}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError("a byte that is not UTF-8; save the file as UTF-8", where=f"{label}:{line}") from None


def _describe_missing(path: Path) -> str:
    if path.is_dir():
        recipes = sorted(file.name for file in path.glob("*.y*ml"))
        return "a directory; name a file" + (f" in it, such as {recipes[0]}" if recipes else "")
    folder = path.parent
    if not folder.is_dir():
        return f"does not exist; there is no directory {label_path(folder)}"
    names = [file.name for file in folder.glob("*") if file.suffix in (".yaml", ".yml")]
    by_stem = {Path(name).stem: name for name in names}
    if nearest := find_nearest(path.name, names) or by_stem.get(find_nearest(path.stem, by_stem) or ""):
        return f"does not exist; did you mean {label_path(folder / nearest)}?"
    return "does not exist" + (f"; {label_path(folder)} has {', '.join(sorted(names)[:8])}" if names else "")


def label_path(path: Path) -> str:
    """A path as messages show it: relative to the working directory when it is below it."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith("..") else relative
