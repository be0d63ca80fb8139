"""Where a source's records come from: local files, directories, builtin data, hub data sets."""

import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from alignkit.data.builtin import PREFIX, BuiltinData, iter_builtin, parse_builtin
from alignkit.data.files import ACCEPTED, MAX_BYTES, Entry, data_suffix, read_file, read_parallel, read_records
from alignkit.errors import DataError, Problem, first_line, suggest
from alignkit.recipe.schema import DataSource
from alignkit.recipe.yaml import label_path
from alignkit.runs.directory import require_whole

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_HUB_BATCH = 1000
_SHARDED = re.compile(r"(.+)-\d{5}-of-\d{5}")  # how the hub names the files of a split: train_sft-00000-of-00003
_NUMBERED = re.compile(r"[-_.]?\d[-_.\d]*$")
_KEYWORD = re.compile(r"(?:^|(?<=[^a-z]))(train|test|validation|valid|val|eval|dev)(?![a-z])", re.IGNORECASE)
_SPLIT_OF = {"valid": "validation", "val": "validation", "eval": "validation", "dev": "validation"}
# What the hub passes over, too.
_ABOUT = {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
_CONFIGS = re.compile(r"\A---\n(?:(?!---).*\n)*?configs:")  # in the front matter of a data set's README.md


@dataclass(frozen=True)
class Located:
    """A source that has been found but not yet read."""

    source: DataSource
    origin: Literal["files", "builtin", "saved", "hub"]
    splits: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)  # every split that is there, with its files
    builtin: BuiltinData | None = None

    @property
    def files(self) -> list[Path]:
        """The local files that hold the rows."""
        return [path for name in _split_names(self.source.split) for path in self.splits.get(name, ())]


def locate(sources: Sequence[DataSource]) -> list[Located]:
    """Find every source without reading it or touching the network; raises DataError with all that is wrong at once."""
    located, problems = list[Located](), list[Problem]()
    for source in sources:
        try:
            located.append(_locate(source))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return located


def read_entries(located: Located, *, documents: bool = False, named: bool = False) -> Iterator[Entry]:
    """Yield (place, record or BadRow) of a source in order; with `named` a ClassLabel is its name, not its number."""
    source = located.source
    if located.builtin is not None:
        yield from iter_builtin(located.builtin)
    elif located.origin == "files":
        limit = MAX_BYTES[documents]

        def read(name: str) -> Iterator[Entry]:
            if source.target is not None:
                return read_parallel(*located.splits[name], limit=limit)
            options: Any = {"blocks": source.format == "text", "limit": limit, "named": named}
            paths = located.splits[name]
            return chain.from_iterable(read_file(path, shard=len(paths) > 1, **options) for path in paths)

        for name, start, stop in _read_slices(source, lambda name: sum(1 for _ in read(name))):
            yield from islice(read(name), start, stop)
    else:
        yield from _read_dataset(source, saved=located.origin == "saved", named=named)


def _locate(source: DataSource) -> Located:
    path = Path(source.path).expanduser()
    if source.target is not None and not path.is_file() and (path.exists() or not path.is_absolute()):
        found = "is no text file" if path.exists() or source.path.startswith(PREFIX) else "there is no such file here"
        raise DataError(f"{found}, and data.target needs one to go beside, line by line", where=source.path)
    if source.path.startswith(PREFIX):
        _refuse_keys(source, "builtin data", ("name", "data_dir", "revision"))
        data = parse_builtin(source.path, split=source.split, max_rows=source.max_rows)
        return Located(source, "builtin", builtin=data)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            _refuse_keys(source, "a data set saved on disk", ("name", "data_dir", "revision"))
            try:
                if (path / "dataset_dict.json").is_file():
                    names = [*json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]]
                else:  # a Dataset, which may know its split
                    names = [json.loads((path / "state.json").read_text(encoding="utf-8")).get("_split") or "train"]
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise DataError(f"cannot be read as a data set saved on disk: {error}", where=str(path)) from error
            return _choose(Located(source, "saved", dict.fromkeys(names, ())))
        _refuse_keys(source, "local files", ("revision",))
        return _choose(Located(source, "files", _list_splits(path, source)))
    if path.exists():
        split = () if _split_names(source.split) == ["train"] else ("split",)
        _refuse_keys(source, "a local file", ("name", "data_dir", "revision", *split))
        if source.target is not None:
            if not (target := Path(source.target).expanduser()).is_file():
                raise DataError("no such file (data.target)", where=label_path(target))
            return _choose(Located(source, "files", {"train": (path, target)}))
        if data_suffix(path) is None or not path.is_file():  # a pipe would be waited for
            raise DataError(f"is not a data file we read ({ACCEPTED})", where=label_path(path))
        require_whole(path)
        return _choose(Located(source, "files", {"train": (path,)}))
    if files := [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if data_suffix(Path(name))]:
        _refuse_keys(source, "local files", ("name", "data_dir", "revision"))
        splits = _split_by_name(files, label_path(path))
        if len(splits) == 1 and "split" not in source.model_fields_set:
            splits = {"train": tuple(files)}
        elif "split" not in source.model_fields_set:
            raise DataError(f"matches files of the splits {', '.join(splits)}; write split: NAME, or name the files",
                            where=label_path(path))  # fmt: skip
        return _choose(Located(source, "files", splits))
    if _HUB_ID.fullmatch(source.path) and data_suffix(path) is None:
        return Located(source, "hub")
    if path.parent.is_dir():
        near = suggest(path.name, [entry.name for entry in path.parent.glob("*")])
    else:
        missing = next(parent for parent in path.parents if parent.parent.is_dir())
        near = f"; the directory {label_path(missing)} does not exist"
    raise DataError(f"no such file{near}", where=label_path(path))


def _refuse_keys(source: DataSource, what: str, keys: Sequence[str]) -> None:
    """Refuse keys that mean nothing for this kind of source, so that none is silently ignored."""
    defaults = {"name": None, "data_dir": None, "revision": None, "split": "train"}
    if given := [key for key in keys if getattr(source, key) != defaults[key]]:
        raise DataError([Problem(f"data.{key} has no effect on {what}; remove it", source.path) for key in given])


def _split_names(split: str) -> list[str]:
    """The splits that `train[:10%]+test` takes rows of."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def _choose(located: Located) -> Located:
    """Refuse a split that is not there, or a slice that cannot be read."""
    split, where = located.source.split, located.source.path
    if missing := [name for name in _split_names(split) if name not in located.splits]:
        known = ", ".join(located.splits)
        raise DataError(f"has no split {missing[0]}; it has {known}: write split: NAME", where=where)
    _read_slices(located.source, lambda name: 1 << 60)
    return located


def _read_slices(source: DataSource, count: Callable[[str], int]) -> list[tuple[str, int, int | None]]:
    """Split, first row and end of each part of `split:`; rows are counted only where a slice asks for it."""
    if "[" not in source.split:
        return [(name, 0, None) for name in _split_names(source.split)]
    from datasets import ReadInstruction

    counts = {name: count(name) for name in _split_names(source.split)}
    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute(counts)
    except (ValueError, AssertionError) as error:
        raise DataError(f"split: {first_line(error)}", where=source.path) from error
    return [(part.splitname, part.from_, part.to) for part in parts]


def _list_splits(directory: Path, source: DataSource) -> dict[str, tuple[Path, ...]]:
    """Sort the data files of a directory into splits; files of other kinds (LICENSE) are passed over.
    A local copy of a hub data set whose README.md lists its files is read as the hub does. Else the files that lie in
    the directory itself count, or, where none does, those below it."""
    name, readme = label_path(directory), directory / "README.md"
    if readme.is_file() and _CONFIGS.match(readme.read_text(encoding="utf-8", errors="replace").replace("\r", "")):
        from datasets import load_dataset_builder
        from datasets.exceptions import DatasetsError
        from yaml import YAMLError  # type: ignore[import-untyped]

        try:
            builder = load_dataset_builder(str(directory), source.name, data_dir=source.data_dir)
        except (OSError, ValueError, DatasetsError, YAMLError) as error:
            said = " ".join(str(error).split()).partition(" Example of usage")[0]
            said += "; name one with data.name" if "onfig name is missing" in said else ""
            raise DataError(f"cannot be read as its README.md describes it: {said}", where=name) from error
        splits = {str(split): tuple(map(Path, paths)) for split, paths in (builder.config.data_files or {}).items()}
        if foreign := [path for paths in splits.values() for path in paths if data_suffix(path) is None]:
            raise DataError(f"lists {foreign[0].name}, which is not a data file we read ({ACCEPTED})", where=name)
        return splits
    if source.name is not None:
        raise DataError("data.name has no effect: the directory's README.md lists no configs", where=name)
    if source.data_dir is not None:
        directory = directory / source.data_dir
        name = label_path(directory)
        if not directory.is_dir():
            raise DataError("no such directory (data.data_dir)", where=name)
    below = [path for path in sorted(directory.rglob("*")) if path.is_file() and data_suffix(path)]
    below = [path for path in below if path.name not in _ABOUT]
    below = [path for path in below if not any(part[0] in "._" for part in path.relative_to(directory).parts)]
    files = [path for path in below if path.parent == directory] or below
    if not files:
        raise DataError(f"the directory has no data files ({ACCEPTED})", where=name)
    folders = sorted({label_path(path.parent) for path in files})
    if len(folders) > 1:
        several = ", ".join([*folders[:4], *(["..."] if len(folders) > 4 else [])])
        remedy = "name one with data_dir:, or several with a pattern such as DIR/**/*.jsonl"
        raise DataError(f"holds data files in {several}; {remedy}", where=name)
    return _split_by_name(files, name)


def _split_by_name(files: Sequence[Path], where: str) -> dict[str, tuple[Path, ...]]:
    """Sort files into splits by their names, as the hub does: train-00000-of-00002, alpaca_test, train_sft."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        stem = path.name[: path.name.lower().rindex(data_suffix(path) or "")]
        sharded = _SHARDED.fullmatch(stem)
        name = sharded[1] if sharded else _NUMBERED.sub("", stem)
        word = _KEYWORD.search(name)
        if word and word.start() > 0:
            name = word[1].lower()
        splits.setdefault(_SPLIT_OF.get(name.lower(), name) if word else "", []).append(path)
    if len(splits) > 1 and "" in splits:
        bare, named = splits[""][0].name, next(paths[0].name for name, paths in splits.items() if name)
        raise DataError(f"holds {named}, which names a split, and {bare}, which names none; name the files to use",
                        where=where)  # fmt: skip
    return {name or "train": tuple(paths) for name, paths in splits.items()}


def _read_dataset(source: DataSource, *, saved: bool, named: bool) -> Iterator[Entry]:
    """Read a data set of the hub, streamed where only its first rows are wanted, or one written by `save_to_disk`."""
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    number = 0
    streaming = source.max_rows is not None and not set("[+") & set(source.split)  # datasets streams whole splits only
    keys = {key: getattr(source, key) for key in ("data_dir", "split", "revision")}
    parts: list[tuple[Any, int]] = []  # each with the number of rows before it
    try:
        if saved:
            held = load_from_disk(source.path)
            splits = held if isinstance(held, DatasetDict) else dict.fromkeys(_split_names(source.split), held)
            for name, start, stop in _read_slices(source, lambda name: len(splits[name])):
                whole = splits[name]
                parts.append((whole.select(range(start, len(whole) if stop is None else stop)), start))
        else:
            parts.append((load_dataset(source.path, source.name, **keys, streaming=streaming), 0))
        for dataset, place in parts:
            for table in dataset.with_format("arrow").iter(_HUB_BATCH):
                for record in read_records(table, named=named):
                    number, place = number + 1, place + 1
                    yield f"{source.path}[row {place}]", record
    except (OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError, DatasetsError) as error:
        what = "cannot be read as a data set saved on disk: "
        if not saved:
            offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
            switch = "HF_HUB_OFFLINE is set, so only the cache was searched; " if offline else ""
            what = f"no such local path, and not to be had as a hub data set (split {source.split}): {switch}"
        raise DataError(what + first_line(error), where=source.path) from error
    if not number:
        raise DataError("the data set has no rows", where=source.path)
