"""Recipes and command lines of other tools as alignkit recipes: what `alignkit migrate` writes and reports.

peers.json says how a file of each tool is recognised, where its method, rows and batch stand, and what it assumes where
nothing is said; words.tsv says what every other key is here. What a recipe refuses of the outcome is taken out again,
with the refusal as the reason.
"""

import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Template
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from alignkit.errors import Problem, RecipeError
from alignkit.recipe.check import accepted_keys
from alignkit.recipe.load import find_problems
from alignkit.recipe.methods import OPTIONS
from alignkit.recipe.words import Word, find_method, find_word
from alignkit.recipe.yaml import Origin, label_path, names_secret, parse_yaml, read_scalar, shorten, write_flow

SAME, RENAMED, CONVERTED, AUTOMATIC, LEFT = KINDS = ("same", "renamed", "converted", "automatic", "not carried over")
_TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("peers.json").read_text("utf-8"))
_SECTIONS = ("model", "lora", "launch", "seed", "data", "eval")  # at the top level of a recipe, in this order


class Row(NamedTuple):
    """What became of one key of the source: `alignkit` is our key, or why there is none."""

    key: str
    value: Any
    what: str
    alignkit: str


class Line(NamedTuple):
    """A value of the recipe with its comment, and the key of the source that it comes from."""

    value: Any
    comment: str = ""
    key: str = ""


@dataclass
class Migration:
    """A recipe made of another tool's, a report of every key, and what alignkit cannot do or a person has to write."""

    name: str
    peer: str
    text: str
    rows: list[Row]
    missing: list[str]


def _is_off(value: Any) -> bool:
    return json.dumps(value, default=str) in _TABLE["off"]  # as JSON, where 0 is not false


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _flatten(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _flatten(item, f"{path}[{number}]")
    else:
        yield path, value


_ASSIGNED = re.compile(r"""(?m)^\s*(?:export\s+|local\s+)?(\w+)=("(?:[^"\\]|\\.)*"|'[^']*'|\([^)]*\)|\S*)""")
_VARIABLE = re.compile(r'(")?\$\{(\w+)(?:\[@\]|:-([^}]*))?\}(?(1)")|\$(\w+)')
_SUM = re.compile(r"\$\((?:expr )?\(? *(\d+) *([*/]) *(\d+) *\)?\)")  # $(expr 16 / 2) and $((16 / 2))


def _read_commands(text: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield tool, method and arguments of every training command of a shell script, or of a text that shows some."""
    text = re.sub(r"[ \t]*\\+[ \t]*\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    values = {name: value.strip("\"'()").replace("\n", " ") for name, value in _ASSIGNED.findall(text)}

    def expand(found: re.Match[str]) -> str:
        name, default = found[2] or found[4], found[3]
        value = str(values.get(name, found[0]))  # MODEL="${MODEL:-x}" is its own value
        return default if default is not None and value.strip('"') == found[0].strip('"') else value

    for line in text.splitlines():
        for _ in range(3):  # a variable may stand in another
            line = _VARIABLE.sub(expand, line)
        line = _SUM.sub(
            lambda at: str(int(at[1]) * int(at[3]) if at[2] == "*" else int(at[1]) // max(1, int(at[3]))), line
        )
        for peer, table in _TABLE["peers"].items():
            found = re.search(table["command"], line) if "command" in table else None
            method = next((group for group in found.groups() if group), "") if found else ""
            # TRL's scripts have common names; any other script is somebody's own
            if found and (peer != "TRL" or method in (*OPTIONS, *table["methods"]) or find_method(method)):
                try:
                    before, after = shlex.split(line[: found.start()]), shlex.split(line[found.end() :])
                except ValueError:  # a quote that does not end
                    break
                tree = {**_read_arguments(before), **_read_arguments(after)}
                if len(tree) > 1:
                    yield peer, method, tree
                break


def _read_arguments(words: Sequence[str]) -> dict[str, Any]:
    """Read `--key value`, `--key=value`, `--key a b`, `--flag`, and the variables that stand before a command."""
    found: dict[str, list[Any]] = {}
    given: list[Any] = []
    for word in words:
        if re.match(r"([|&;>]|\d?>|<<)", word):
            break
        key, equals, value = word.lstrip("-").partition("=")
        if word.startswith("--") or re.fullmatch(r"-[a-z]", word) or (equals and re.fullmatch("[A-Z_]+", key)):
            given = found[key.replace("-", "_")] = [read_scalar(value)] if equals else []
        else:
            given.append(read_scalar(word))
            with suppress(ValueError):
                given[-1] = json.loads(word) if word[:1] == "{" else given[-1]
    return {key: values[0] if len(values) == 1 else values or True for key, values in found.items() if key}


def migrate_file(path: Path, *, gpus: int | None = None) -> tuple[list[Migration], list[Problem]]:
    """Make recipes of a YAML file, or of every training command in a script or text, and say which cannot be made.
    `gpus` is on how many it ran where it does not say so, which decides batch_size."""
    made, problems = list[Migration](), list[Problem]()
    try:
        text = path.read_text(encoding="utf-8")
        found = [] if path.suffix in (".yaml", ".yml") else [*_read_commands(text)]
        if path.suffix in (".yaml", ".yml"):
            reader = YAML(typ="safe", pure=True)
            reader.allow_duplicate_keys = True
            tree = reader.load(text)
            keys = {*dict(_flatten(tree))} if isinstance(tree, dict) else set()
            there = keys | {re.split(r"[.\[]", key)[0] for key in keys}
            for peer, table in _TABLE["peers"].items():  # by the marks of its keys: a&b|c is a, and b or c
                if any(all(there & {*one.split("|")} for one in mark.split("&")) for mark in table["marks"]):
                    found = [(peer, "", tree)]
                    break
    except (OSError, ValueError, YAMLError, RecursionError) as error:
        deep = "it is nested too deeply" if isinstance(error, RecursionError) else None
        what = deep or getattr(error, "strerror", None) or getattr(error, "problem", None) or error
        mark = getattr(error, "problem_mark", None)
        return [], [Problem(f"cannot be read: {what}", f"{path}:{mark.line + 1}" if mark else str(path))]
    for number, (peer, method, tree) in enumerate(found, 1):
        try:
            made.append(_Writer(path, path.stem + f"-{number}" * (number > 1), peer, method, tree, gpus).write())
        except RecipeError as error:  # of a method that alignkit has not
            problems += error.problems
    what = f"is not recognised as a training recipe or command of {', '.join(_TABLE['peers'])}"
    return made, problems if found else [Problem(what, str(path))]


class _Writer:
    def __init__(self, path: Path, name: str, peer: str, command: str, tree: dict[str, Any], gpus: int | None) -> None:
        self.path, self.name, self.peer, self.command, self.tree, self.gpus = path, name, peer, command, tree, gpus
        given = dict(_flatten(tree))  # a value may name another: ${batch_size}
        named = {key: re.fullmatch(r"\$\{([\w.]+)\}", str(value)) for key, value in given.items()}
        self.keys = {key: given.get(found[1], given[key]) if found else given[key] for key, found in named.items()}
        self.table: dict[str, Any] = _TABLE["peers"][peer]
        self.rows: dict[str, Row] = {}
        self.lines: dict[str, Line] = {}  # by our key, dotted
        self.missing: list[str] = []
        self.train: list[dict[str, Any]] = []
        self.method, self.word = self._find_method()
        self.fixed = {*self.lines, *_TABLE["to write"]}  # without these it would be another method
        self.of_method = {*self.lines} if self.method == "ppo" else set[str]()  # until a key says otherwise
        self.accepted = accepted_keys(self.method)
        self.has_lora = self._find_lora()
        assumed = self.table["defaults"]  # by method, or the name of a tool that assumes the same
        assumed = _TABLE["peers"][assumed]["defaults"] if isinstance(assumed, str) else assumed
        kinds = dict.fromkeys(("*", self.method, self.word, "lora" if self.has_lora else "full"))
        self.defaults: dict[str, Any] = {key: value for kind in kinds for key, value in assumed.get(kind, {}).items()}

    def write(self) -> Migration:
        self._read_rows()
        self._read_batch()
        for key, value in self.keys.items():
            if key not in self.rows:
                self._convert(key, value)
        self._fill()
        text, rows = self._check(), [self.rows[key] for key in self.keys]
        return Migration(self.name, self.peer, text, rows, [*dict.fromkeys(self.missing)])

    def _note(self, key: str, kind: str, said: str) -> None:
        self.rows[key] = Row(key, self.keys.get(key), kind, said)

    def _put(self, ours: str, value: Any, key: str, kind: str = "") -> None:
        """Write our key, unless another key of the source has said it already."""
        if ours.startswith("lora."):
            self.lines.pop("lora", None)
        if ours in self.of_method:
            self.of_method.remove(ours)
            del self.lines[ours]
        taken = (one for one in self.lines if f"{one}.".startswith(f"{ours}.") or f"{ours}.".startswith(f"{one}."))
        if (before := self.lines.get(next(taken, ""))) is not None:
            self._note(key, AUTOMATIC if before.value == value else LEFT, f"{ours}, as {before.key} says")
            return
        kind = kind or (CONVERTED if value != self.keys[key] else SAME if ours == key else RENAMED)
        was = f"was {key}" + f": {shorten(write_flow(self.keys[key]), 40)}" * (kind == CONVERTED)
        self.lines[ours] = Line(value, "" if kind == SAME else was, key)
        self._note(key, kind, ours)

    def _find_method(self) -> tuple[str, str]:
        """The section of the recipe, and what the source calls it."""
        there = ((name, key) for name in self.table["method"] for key in self.keys if f"{key}.".startswith(f"{name}."))
        name, key = next(((name, key) for name, key in there if not _is_off(self.keys[key])), ("", ""))
        said = self.command if not key else name if key != name else str(self.keys[key]).rpartition(".")[2]
        if not said and not self.table["method"]:  # the folder, or a key that only one method has
            words = re.split(r"[^a-z]+", f"{self.path.parent.name}/{self.name}".lower())
            said = next((word for word in reversed(words) if word in OPTIONS or word in ("orpo", "kto", "grpo")), "")
            said = said or ("dpo" if "beta" in self.keys else "sft")
        methods = self.table["methods"]
        word, *settings = (methods.get(said, methods.get(said.lower(), said.lower())) or "sft").split()
        found = None if word in OPTIONS else find_method(word)
        section, why = (found.key, found.said) if found else (word, "alignkit has no such method")
        if section not in OPTIONS:
            raise RecipeError(f"{self.peer}'s {said}: {why}", where=str(self.path))
        for setting in [*settings, *(found.value.split() if found else ())]:
            ours, _, value = setting.partition("=")
            value = json.loads(value) if value[:1] == "[" else read_scalar(value)
            self.lines[ours] = Line(value, f"was {key or 'the command'}: {said}", key)
        if key:
            self._note(key, CONVERTED, f"the section {section}:")
        return section, word

    def _find_lora(self) -> bool:
        """Whether adapters are trained, and of which kind."""
        key = next((key for key in self.table["lora"] if self.keys.get(key) is not None), "")
        said = str(self.keys[key]).lower() if key else "lora" if self.table.get("lora default") else ""
        kind = next((kind for kind in ("dora", "vera", "oft", "ia3") if re.search(rf"\bq?{kind}", said)), "")
        has_lora = bool(kind or re.search(r"lora|true|^[1-9]", said))
        comment = f"was {key}: {said}" if key else f"{self.peer}'s default"
        if has_lora:
            ours = "lora.r" if said.isdecimal() else "lora.adapter_type" if kind else "lora"
            self.lines[ours] = Line(self.keys[key] if said.isdecimal() else kind or {}, comment, key)
            self.lines |= {"model.quantization": Line("nf4", comment, key)} if re.search(r"\bq(lora|oft)", said) else {}
        elif said not in ("", "full", "false", "none", "0") and "." not in said:
            self.missing.append(f"{key}: {said}: there are no such adapters; without lora: all weights are trained")
        if key:
            self._note(key, CONVERTED if has_lora else AUTOMATIC, "lora:" if has_lora else "all weights are trained")
        return has_lora

    def _read_batch(self) -> None:
        """batch_size is over all devices: rows on a device x steps of accumulation x devices."""

        def take(names: Sequence[str]) -> tuple[str, int]:
            found = ((key, value) for key, value in self.keys.items() if key in names or key.lower() in names)
            return next(((key, value) for key, value in found if type(value) is int and value > 0), ("", 0))

        (micro_key, micro), (steps_key, steps) = take(self.table["micro"]), take(self.table["accumulation"])
        (gpus_key, gpus), (nodes_key, nodes) = take(_TABLE["gpus"]), take(_TABLE["nodes"])
        whole_key, whole = take(self.table.get("whole", ()))
        # accelerate's num_processes counts those of all nodes
        total = self.gpus or max(gpus, 1) * (1 if gpus_key == "num_processes" else max(nodes, 1))
        micro = micro or self.defaults["micro"]
        steps = steps or (math.ceil(16 / micro / total) if self.peer == "ms-swift" else 1)
        for key in filter(None, (steps_key, gpus_key, nodes_key)):
            self._note(key, CONVERTED, "batch_size")
        if whole:
            self._put("batch_size", whole, whole_key)
        else:
            unsaid = "" if self.gpus or gpus else " (--gpus says how many)"
            shown = f"{micro} on a device x {steps} accumulated x {total} GPU{'s' * (total > 1)}{unsaid}"
            self.lines["batch_size"] = Line(micro * steps * total, shown, micro_key)
        if micro_key:
            self._put("micro_batch_size", micro, micro_key)
        if total > 1:
            nodes = nodes if nodes > 1 and total % nodes == 0 else 1
            said = "of --gpus" if self.gpus else f"was {gpus_key}"
            self.lines["launch.processes"] = Line(total // nodes, said, gpus_key)
            self.lines |= {"launch.nodes": Line(nodes, f"was {nodes_key}", nodes_key)} if nodes > 1 else {}

    def _read_rows(self) -> None:
        """The sources of rows, and those held out; what stands beside them is added by `_convert`."""
        for place in self.table["data"]:
            value: Any = self.tree
            for part in [place] if place in self.tree else place.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if _is_off(value):
                continue
            is_source = not isinstance(value, dict) or {*_TABLE["sources"], "_component_"} & value.keys()
            if isinstance(value, str):
                value = [part.strip() for part in value.split(",") if part.strip()]
            elif isinstance(value, dict):
                value = [value] if is_source else [{"path": key, "weight": share} for key, share in value.items()]
            sources = [one for item in value if (one := self._read_source(item, place)).get("path")]
            ours = "eval" if re.search(r"eval|val|test", place) else "data"
            under = [key for key in self.keys if re.match(rf"{re.escape(place)}(\.|\[|$)", key)]
            known = {*_TABLE["sources"], "_component_", *place.split(".")}
            for key in under:
                if key.rpartition(".")[2] in known or ".column" in key or (not is_source and "." in key):
                    self._note(key, CONVERTED, ours)
            if ours == "data" and not self.train and sources:
                self.train = sources
                self.lines["data"] = Line(sources, f"was {place}", under[0])
            elif sources and ours == "eval":
                self.lines.setdefault("eval", Line(sources, f"was {place}", under[0]))

    def _read_source(self, item: Any, place: str) -> dict[str, Any]:
        """One source: a name, of a registry or with a number of rows behind it, or a mapping."""
        if isinstance(item, str):
            name, _, count = re.sub(r"^(hf|ms)::", "", item, flags=re.I).partition("#")
            name, _, subset = name.partition(":") if self.peer == "ms-swift" else (name, "", "")
            has_registry = self.peer == "LLaMA-Factory" and not re.search(r"[/.]", name)
            entry: dict[str, Any] | None = None
            below = str(self.keys.get("dataset_dir") or "data")  # in a folder above the file
            files = [folder / below / "dataset_info.json" for folder in self.path.absolute().parents]
            if file := next((file for file in files if has_registry and file.is_file()), None):
                entry = dict[str, Any](json.loads(file.read_text("utf-8")).get(name) or {})
                entry |= {"file_name": str(file.parent / entry["file_name"])} if "file_name" in entry else {}
            if not entry and has_registry:
                self.missing.append(f"data: {name} is a name of dataset_info.json, which is not beside the file")
            source = self._read_source(entry, place) if entry else {"path": name}
            source |= {"name": subset} if subset and subset != "default" else {}
            return source | ({"max_rows": int(count)} if count.isdecimal() else {})
        if not isinstance(item, dict):
            return {}
        component = str(item.get("_component_", "")).rpartition(".")[2]
        source = dict(self.table.get("datasets", {}).get(component, {}))
        for name, value in item.items():
            _add_to_source(source, name, value)
        kind = f"{item.get('type', '')} {component}"
        if re.match(r"completion|pretrain| text_completion", kind) and self.method == "sft":
            self.lines["objective"] = Line("lm", f"was the type of {place}")
        return source

    def _convert(self, key: str, value: Any) -> None:
        section, _, name = key.rpartition(".")
        known = self.table.get("sections", ())
        name = name if known == "*" or section in known else key  # without the sections of its tool
        word = find_word(key, self.method, self.peer)
        if word is None and value is True and name.startswith("no_"):  # how argparse takes back what is on
            positive = find_word(name[3:], self.method, self.peer)
            if positive is not None or name[3:] in self.accepted:
                name, value, word = name[3:], False, positive
        is_own = word is not None and word.tool == self.peer
        is_launch = name in ("deepspeed", "config_file", "accelerate_config", "fsdp")
        epochs = next((self.keys[one] for one in ("num_epochs", "epochs") if self.keys.get(one)), 1)
        if value is None or value in ("", [], {}):
            self._note(key, AUTOMATIC, "empty")
        elif name in ("save_steps", "eval_steps", "steps") and isinstance(value, int | float) and value <= 0:
            self._note(key, AUTOMATIC, "never before the end")
        elif name in ("evals_per_epoch", "saves_per_epoch") and isinstance(value, int) and value > 0:
            self._put(f"{name[:4]}_steps", round(1 / (value * epochs), 4), key)
        elif name == "max_steps_per_epoch" and isinstance(value, int):
            self._put("max_steps", int(value * epochs), key, kind=CONVERTED)
        elif name in ("rpo_alpha", "nll_loss_coef", "pref_ftx") and self.method == "dpo" and value not in (0, False):
            self._put("loss_weights", [1.0, float(value)], key)
            before = self.lines.get("loss_type", Line("sigmoid")).value
            self.lines["loss_type"] = Line([before, "sft"], f"was {key}", key)
        elif name == "lora_attn_modules" and isinstance(value, list):  # torchtune has names of its own
            mlp = ["gate_proj", "up_proj", "down_proj"] if self.keys.get("model.apply_lora_to_mlp") else []
            self._put("lora.target_modules", [{"output_proj": "o_proj"}.get(one, one) for one in value] + mlp, key)
        elif found := re.search(r"(?:zero|_z|stage)_?([0-3])|fsdp", f"{name} {value}".lower() if is_launch else ""):
            self._put("launch.strategy", ("ddp", "zero2", "zero2", "zero3")[int(found[1])] if found[1] else "fsdp", key)
        elif re.search(r"\b(teacher|ref|reward|value|critic)\w*(_model|_init_kwargs)\.", key) and not is_own:
            self._note(key, AUTOMATIC, "its own configuration says it, and a recipe has one model section")
        elif name == "steps_per_generation" and isinstance(value, int):  # counts passes of micro-batches
            steps = next((n for one, n in self.keys.items() if one in self.table["accumulation"]), 1)
            self._put("minibatches", max(1, value // steps if type(steps) is int and steps > 0 else 1), key)
        elif name == "hub_strategy" and value in ("every_save", "checkpoint", "all_checkpoints"):
            steps = self.keys.get("save_steps", 500)
            self._put("push_every", steps if isinstance(steps, int) and steps > 0 else 500, key, kind=CONVERTED)
        elif key in ("rollout.batch_size", "rollout_batch_size", "generation_batch_size") and isinstance(value, int):
            each = 1 if key.startswith("gen") else next((n for one, n in self.keys.items() if "n_samples" in one), 1)
            self._put("minibatches", max(1, value * each // self.lines["batch_size"].value), key, kind=CONVERTED)
        elif re.search(r"\.(roles|message_property_mappings|tags)\b|^data.*\.seed$", key):
            self._note(key, AUTOMATIC, "roles and turns are recognised (else data.roles), rows are ordered by seed")
        elif name in ("dataset_splits", "dataset_test_split") and self.train:
            train, test = (value[0], value[1:]) if isinstance(value, list) else (None, [value])
            for source in self.train:
                source |= {"split": train} if train else {}
            if test and (self.keys.get("do_eval") or self.keys.get("eval_strategy", "no") not in ("no", False)):
                held_out = [{**source, "split": test[0]} for source in self.train]
                self.lines["eval"] = Line(held_out, f"was {key}", key)
            self._note(key, CONVERTED, "eval, data.split")
        elif not is_own and name.rpartition(".")[2] in _TABLE["sources"] and self.train:
            for source in self.train:
                _add_to_source(source, name.rpartition(".")[2], value)
            self._note(key, CONVERTED, "data")
        elif not is_own and name in self.accepted and name not in ("data", "eval") and not isinstance(value, dict):
            self._put(name, value.lower() if name == "log_level" else value, key)
        elif word is not None:
            self._follow(word, key, value)
        elif key.isupper() or names_secret(name.rpartition(".")[2]):
            self._note(key, LEFT, "a recipe sets no variables and holds no secrets; set it in the environment")
        else:
            self._note(key, AUTOMATIC if _is_off(value) else LEFT, "off" if _is_off(value) else "not known to alignkit")

    def _follow(self, word: Word, key: str, value: Any) -> None:
        """Write what the table of words says of a key."""
        first = word.key.split(".")[0]
        new = word.convert(value) if word.action in ("renamed", "converted") else None
        if first == "reward" and isinstance(value, list):
            parts = [word.convert(part) for part in value]
            new = None if None in parts else parts[0] if len(parts) == 1 else parts
        is_off = _is_off(value) or (word.action == "missing" and value in (0, 1) and value is not True)
        if first == "eval" and not (isinstance(new, float) and 0 < new < 1):
            is_off, new = not new, None
        if first == "lora" and not self.has_lora:
            self._note(key, AUTOMATIC, "all weights are trained")
        elif first == "data" and word.action in ("renamed", "converted"):
            self._note(key, AUTOMATIC if self.train else LEFT, word.say())
        elif word.action == "automatic" or (
            is_off and not isinstance(new, bool) and (new in (None, value) or first in _SECTIONS)
        ):
            self._note(key, AUTOMATIC, word.say() if word.action == "automatic" else "off, as here")
        elif new is None or (first not in _SECTIONS and first not in self.accepted):
            said = word.say() if new is None else f"{word.say()}, which {self.method} has not"
            self._note(key, AUTOMATIC if is_off else LEFT, said)
            is_text = word.key == "model.chat_template" and "{%" in str(value)
            if is_text or word.action == "missing":
                self.missing.append(f"{key}: {'write its text to a .jinja file, and name that' if is_text else said}")
        elif word.key in ("lora.target_modules", "lora.modules_to_save") and isinstance(new, str):
            self._put(word.key, new if new == "all-linear" else [part.strip() for part in new.split(",")], key)
        else:
            self._put(word.key, new, key)

    def _fill(self) -> None:
        """What the other tool assumes where nothing is said, and what only somebody who knows can write."""
        for ours, value in self.defaults.items():
            is_ours = ours.startswith("lora.") or ours in self.accepted
            if is_ours and ours not in self.lines and (ours != "num_train_epochs" or "max_steps" not in self.lines):
                self.lines.pop("lora" if ours.startswith("lora.") else "", None)
                self.lines[ours] = Line(value, f"{self.peer}'s default")
        rates = [ours for ours in self.lines if ours.startswith("lr_scheduler_kwargs.min_lr")]
        scheduler = self.lines.get("lr_scheduler_type", Line("cosine"))
        if rates and "min_lr" not in str(scheduler.value):
            comment = f"{scheduler.comment}, and {self.lines[rates[0]].comment}"
            self.lines["lr_scheduler_type"] = Line("cosine_with_min_lr", comment, scheduler.key)
        if rates or "min_lr" not in str(scheduler.value):
            self.lines.pop("lr_scheduler_kwargs", None)
        if "start_from" in self.lines and "model.path" not in self.lines:
            self.lines["model.path"] = self.lines.pop("start_from")
        if self.lines.get("generation.mode", Line("")).value == "server" and "generation.url" not in self.lines:
            host, port = self.keys.get("vllm_server_host", "127.0.0.1"), self.keys.get("vllm_server_port", 8000)
            self.lines["generation.url"] = Line(f"http://{host}:{port}", "was vllm_server_host and vllm_server_port")
        for ours, (value, why) in _TABLE["to write"].items():  # what stands there meanwhile, and what is missing
            needed = {"reward": self.method == "ppo", "teacher.model": self.word in ("gkd", "distillation")}
            if ours not in self.lines and needed.get(ours, True):
                self.lines[ours] = Line(value, "to be written")
                self.missing.append(f"{ours}: {why}")

    def _check(self) -> str:
        """Take out what a recipe refuses, until nothing is; the refusal is the reason."""
        while True:
            text = self._compose()
            tree = parse_yaml(text, Origin("recipe", self.path.parent))
            assert tree is not None
            paths = reversed([*tree.leaves()])  # of several on a line the outermost counts
            places = {node.place: ".".join(path).removeprefix(f"{self.method}.") for path, node in paths}
            refused, problems = dict[str, str](), find_problems(tree)[2]
            for what, place in ((problem.what, places.get(problem.where or "", "?")) for problem in problems):
                there = [one for one in self.lines if f"{one}.".startswith(f"{place}.")]
                strategy = self.lines.get("launch.strategy", Line("")).value
                if strategy and self.fixed.issuperset(there) and f" {strategy} " in what:  # it goes, not the method
                    there = ["launch.strategy"]
                refused |= {one: what for one in there if one not in self.fixed or "has no effect" in what}
            if not refused:
                self.missing += [problem.what for problem in problems]
                return text
            for one, what in refused.items():
                key, is_idle = self.lines.pop(one).key, "has no effect" in what
                self.missing += [] if is_idle else [f"{key or one}: {what}"]
                if key in self.keys:
                    self._note(key, AUTOMATIC if is_idle else LEFT, what)

    def _compose(self) -> str:
        tree: dict[str, Any] = {}
        for ours, line in self.lines.items():
            *above, last = ours.split(".") if ours.split(".")[0] in _SECTIONS else [self.method, *ours.split(".")]
            inside = tree
            for part in above:
                inside = inside.setdefault(part, {})
            inside[last] = line
        template = Template(Path(__file__).with_name("migrated.yaml.jinja").read_text("utf-8"))
        return template.render(
            source=label_path(self.path), peer=self.peer, missing=dict.fromkeys(self.missing), tree=tree,
            order=(*_SECTIONS, self.method), show=write_flow,
        ) + "\n"  # fmt: skip


def _add_to_source(source: dict[str, Any], name: str, value: Any) -> None:
    """Say in a source of rows what another tool's key says of it; what it says already stays."""
    recognised = _TABLE["recognised columns"]
    ours = _TABLE["sources"].get(name, "")
    value = value[0] if isinstance(value, list) and value and ours in ("path", "split") else value
    if not ours or _is_off(value) or (ours, value) in (("weight", 1), ("name", "default")):
        return
    if ours == "path" and ("path" not in source or name in ("dataset_path", "data_files")):
        source["path"] = value
    elif ours.startswith("columns"):
        given = value if isinstance(value, dict) else {ours.partition(".")[2]: value}
        renamed = {_TABLE["columns"].get(left, left): right for left, right in given.items()}
        wanted = {a: b for a, b in renamed.items() if a and isinstance(b, str) and a != b and b not in recognised}
        if wanted:
            source["columns"] = {**wanted, **source.get("columns", {})}
    else:
        source.setdefault(ours, value)
