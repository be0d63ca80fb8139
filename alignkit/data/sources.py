"""Where a source's records come from: local files, directories, builtin data, hub data sets.

Turns a recipe's DataSource into a stream of (place, record or BadRow). Deliberately does not look into records.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from alignkit.data.builtin import PREFIX, BuiltinData, iter_builtin, parse_builtin
from alignkit.data.files import SUFFIXES, Entry, data_suffix, display_name, read_file
from alignkit.errors import DataError, Problem
from alignkit.recipe.schema import DataSource

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_HUB_BATCH = 1000
_TRAIN = re.compile(r"(?:^|[^a-z])train", re.IGNORECASE)
_HELD_OUT = re.compile(r"(?:^|[^a-z])(?:test|valid|validation|eval|dev)(?:[^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Located:
    """A source that has been found but not yet read."""

    source: DataSource
    origin: Literal["files", "builtin", "saved", "hub"]
    files: tuple[Path, ...] = ()
    builtin: BuiltinData | None = None


def locate(sources: Sequence[DataSource]) -> list[Located]:
    """Find every source without reading it; the network is not touched.

    Raises:
        DataError: sources that do not exist, hold no data files, or carry keys without effect; all at once.
    """
    located: list[Located] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            located.append(_locate(source))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return located


def read_entries(located: Located) -> Iterator[Entry]:
    """Yield (place, record or BadRow) for every row of the source, in a fixed order; can be called again.

    Raises:
        DataError: a file or data set that cannot be read.
    """
    source = located.source
    if located.builtin is not None:
        yield from iter_builtin(located.builtin)
    elif located.origin == "files":
        for path in located.files:
            yield from read_file(path, blocks=source.format == "text")
    else:
        yield from _read_dataset(source, saved=located.origin == "saved")


def _locate(source: DataSource) -> Located:
    if source.path.startswith(PREFIX):
        _refuse_keys(source, "builtin data", ("name", "revision"))
        data = parse_builtin(source.path, split=source.split, max_rows=source.max_rows)
        return Located(source, "builtin", builtin=data)
    path = Path(source.path).expanduser()
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            _refuse_keys(source, "a data set saved on disk", ("name", "revision"))
            return Located(source, "saved")
        _refuse_keys(source, "local files", ("name", "revision", "split"))
        return Located(source, "files", _list_files(path))
    if path.exists():
        _refuse_keys(source, "a local file", ("name", "revision", "split"))
        if data_suffix(path) is None:
            raise DataError(f"is not a data file we read ({_suffix_list()}, plain or .gz)", where=display_name(path))
        return Located(source, "files", (path,))
    if _HUB_ID.fullmatch(source.path) and data_suffix(path) is None:
        return Located(source, "hub")
    raise DataError(f"no such file{_near_files(path)}", where=display_name(path))


def _refuse_keys(source: DataSource, what: str, keys: Sequence[str]) -> None:
    """Refuse keys that mean nothing for this kind of source, so that none is silently ignored."""
    defaults = {"name": None, "revision": None, "split": "train"}
    if given := [key for key in keys if getattr(source, key) != defaults[key]]:
        raise DataError([Problem(f"data.{key} has no effect on {what}; remove it", source.path) for key in given])


def _suffix_list() -> str:
    return ", ".join(SUFFIXES)


def _list_files(directory: Path) -> tuple[Path, ...]:
    """List the data files of a directory by name; files of other kinds (README, LICENSE) are passed over.

    Raises:
        DataError: none is there, or training and held-out files lie side by side.
    """
    name = display_name(directory)
    files = sorted(path for path in directory.iterdir() if path.is_file() and data_suffix(path) and path.name[0] != ".")
    if not files:
        below = sorted({display_name(path.parent) for path in directory.glob("*/*") if data_suffix(path)})
        hint = f"; there are some in {', '.join(below[:3])}" if below else ""
        raise DataError(f"the directory has no data files ({_suffix_list()}, plain or .gz){hint}", where=name)
    held_out = [path.name for path in files if _HELD_OUT.search(path.name)]
    if held_out and any(_TRAIN.search(path.name) for path in files):
        mixed = ", ".join(held_out[:3])
        raise DataError(f"holds training files and held-out ones ({mixed}); name the files to use", where=name)
    return tuple(files)


def _near_files(path: Path) -> str:
    """Say what is near a path that does not exist: the first missing directory, or files with like names."""
    parent = path.parent
    if not parent.is_dir():
        while not parent.parent.is_dir():
            parent = parent.parent
        return f"; the directory {display_name(parent)} does not exist"
    names = [entry.name for entry in parent.iterdir()]
    near = get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _read_dataset(source: DataSource, *, saved: bool) -> Iterator[Entry]:
    """Read a data set of the hub, or one written by `save_to_disk`.

    A hub data set is downloaded to the datasets cache and memory-mapped, or streamed when only its first rows are
    wanted.
    """
    # Ours to import late: datasets takes a second.
    from datasets.exceptions import DatasetsError

    try:
        dataset = _open_saved(source) if saved else _open_hub(source)
        number = 0
        for table in dataset.with_format("arrow").iter(_HUB_BATCH):
            for record in table.to_pylist():
                number += 1
                yield f"{source.path}[row {number}]", record
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(_hub_problem(source, error, saved=saved), where=source.path) from error
    if not number:
        raise DataError("the data set has no rows", where=source.path)


def _open_hub(source: DataSource) -> Any:
    from datasets import load_dataset

    streaming = source.max_rows is not None
    return load_dataset(source.path, source.name, split=source.split, revision=source.revision, streaming=streaming)


def _open_saved(source: DataSource) -> Any:
    from datasets import DatasetDict, load_from_disk

    held = load_from_disk(source.path)
    if not isinstance(held, DatasetDict):
        return held
    if source.split not in held:
        raise ValueError(f"no split {source.split!r}; it has {', '.join(held)}")
    return held[source.split]


def _hub_problem(source: DataSource, error: Exception, *, saved: bool) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if saved:
        return f"cannot be read as a data set saved on disk: {said}"
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    switch = "HF_HUB_OFFLINE is set, so only the cache was searched; " if offline else ""
    return f"no such local path, and not to be had as a hub data set (split {source.split}): {switch}{said}"
