"""The run directory: where each file of a run lives, who may write to it, whether it may go on, and how it ended.

Checkpoints that count are sealed by a manifest written last, verified before use, and rotated by step.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from alignkit import console
from alignkit.errors import DataError, RunError
from alignkit.recipe.methods import PpoOptions
from alignkit.recipe.stage import Stage, complete_fingerprint
from alignkit.recipe.words import method_fields
from alignkit.runs import files
from alignkit.runs.files import describe_files, disk_failures, find_damaged_file, open_own, read_json, write_json

_DIGEST = re.compile(r'\[?("[0-9a-f]{32,}"|null|, )+\]?')
_DIGESTS = {  # parts of a fingerprint that are checksums, in words
    "start_weights": "the weights it starts from", "reward_weights": "the weights or the code of its rewards",
    "data": "its rows", "ptx_data": "the rows of ptx", "template": "the chat template"}  # fmt: skip
CARD = "README.md"  # the model card, beside the weights
PRODUCTS = ("model", "rows.jsonl")  # what others take from a run
MANIFEST = "alignkit_manifest.json"
SEALED = ".sealed"  # in a run directory: it has had a checkpoint
_STEP = re.compile(r"checkpoint-(\d+)")


class RunDir:
    """Paths of one run, all of them absolute."""

    def __init__(self, path: Path) -> None:
        self.path = path = path.expanduser().absolute()
        self.recipe = path / "recipe.yaml"
        self.stage = path / "stage.json"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.rejects = path / "rejects.jsonl"
        self.warnings = path / "warnings.jsonl"  # every warning of the run, with its time
        self.preview = path / "preview.json"  # a few rows as the trainer saw them: tokens, and which are learnt
        self.report = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.base = path / "base"  # a base this run had to make (built-in, scratch, merged); adapters point to it
        self.cache = path / "cache"  # tokenised rows; deleted when the run is finished
        self.launch = path / "launch"  # launcher configuration, batch script, what the processes left
        self.probe = path / "probe.json"
        self.prompts = path / "prompts.u64"  # fingerprints of the prompts trained on, of a stage that streams none
        self.evaluation = path / "eval.json"
        self.result = path / "result.json"
        self.error_log = path / "error.log"

    def is_finished(self) -> bool:
        """Tell whether the run ended well, whatever has become of its files since."""
        return files.read_record(self.result).get("status") == "finished"


class RunLock:
    """An exclusive hold on a run directory; the kernel drops it when the process dies, however it dies."""

    def __init__(self, run: RunDir) -> None:
        """Take the lock. Raises RunError naming the holder when another process has it."""
        self._path = run.path / ".lock"
        descriptor = open_own(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        self._file: IO[str] = os.fdopen(descriptor, "a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = None if self.is_current() else "another process, which has just ended; try again"
        except OSError:
            taken = self._path.read_text(encoding="utf-8").strip() or "another process"
            taken += "; wait for it, or give this run its own directory with --out, a whole recipe with --set name=NAME"
        if taken is not None:
            self._file.close()
            raise RunError(f"in use by {taken}", where=str(run.path))
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def is_current(self) -> bool:
        """Tell whether this is still the directory's lock: the directory may have been removed or moved."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False


def open_run(path: Path, *, force: bool) -> tuple[RunDir, RunLock]:
    """Create or reuse a run directory and lock it; with `force` an existing run is moved aside, as `set_aside` does."""
    run = RunDir(path)
    refuse_foreign(run.path)
    with disk_failures(run.path, "the run directory"):
        for directory in (run.path.parent, run.path):  # the recipe's own too: its page shows what the runs' pages do
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # What a link anywhere in a run points to would be written, emptied or renamed.
        for folder, folders, files in os.walk(run.path):
            for name in (*folders, *files):
                if os.path.islink(entry := os.path.join(folder, name)):
                    what = f"is a link to {os.readlink(entry)}; a run's files lie in its directory: put what it points "
                    raise RunError(f"{what}to in its place, or remove it", where=entry)
                # A pipe would be waited for without end; what another process removes meanwhile is neither.
                if not os.path.isdir(entry) and not os.path.isfile(entry) and os.path.lexists(entry):
                    raise RunError("is neither a file nor a directory; remove it", where=entry)
        for kept in (run.checkpoints, run.cache, run.model, run.base, run.launch):
            for place in (kept, kept.with_name(f"{kept.name}.tmp")):
                if place.is_file():
                    raise RunError("is a file where the run keeps a directory; move it away", where=str(place))
        lock = RunLock(run)
    return run, set_aside(run, lock) if force else lock


def set_aside(run: RunDir, lock: RunLock) -> RunLock:
    """Move a run that has begun, its processes ended, to `<name>.old-<time>`; give the lock of the new directory."""
    if not run.stage.exists() and not any(run.checkpoints.glob("*checkpoint-*")):
        return lock
    aside = run.path.with_name(f"{run.path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    with disk_failures(run.path, "the run directory"):
        os.replace(run.path, aside)
        console.note(f"{run.path.name}: the earlier run is kept as {aside}")
        lock.close()
        run.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return RunLock(run)


def refuse_foreign(path: Path) -> None:
    """Raise RunError unless the directory is absent, empty, or a run."""
    path = path.expanduser().absolute()
    if path == path.parent or path == Path.home():
        raise RunError("is no place for a run; name a directory of its own with --out", where=str(path))
    for place in (path, *path.parents):
        if place.is_file() or (place == path and place.exists() and not place.is_dir()):
            raise RunError("is a file; a run needs a directory", where=str(place))
    content = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if content and not content & {".lock", "stage.json", "error.log", "launch"}:
        found = ", ".join(sorted(content)[:3])
        what = f"is not empty and holds no run (found {found}); choose another directory with --out"
        raise RunError(what, where=str(path))


# What says to which rollout of ppo a step belongs, and so which prompts are left.
_OF_A_ROLLOUT = ("batch_size", "minibatches", "ppo_epochs", "num_generations", "advantage")


def list_changes(run: RunDir, current: Mapping[str, Any], *, allow_change: Sequence[str] = ()) -> dict[str, str]:
    """List what changed since stage.json was written and was not allowed: key -> "key: before -> now"."""
    if run.stage.exists():
        started = read_json(run.stage).get("fingerprint", {})
    else:  # it is gone: the newest whole checkpoint knows what the run was started with
        sealed = list_checkpoints(run.checkpoints, sealed=True)
        records = (files.read_record(path / MANIFEST) for path in sealed)
        if not (started := next((record["fingerprint"] for record in records if record.get("fingerprint")), None)):
            return {}
    now = json.loads(json.dumps(dict(current), default=str))
    before = complete_fingerprint(started, now)
    fields = method_fields(str(now.get("method")))

    def show(key: str, value: Any) -> str:
        # As the user wrote it; a fingerprint leaves out what is TRL's own default.
        default = fields.get(key.rpartition(".")[2], {}).get("default")
        if value is not None:
            return json.dumps(value)
        return "(default)" if default is None else f"{json.dumps(default)} (default)"

    refused = {}
    for key in sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
        old, new, last = before.get(key), now.get(key), key.rpartition(".")[2]
        of_a_rollout = now.get("method") == "ppo" and last in _OF_A_ROLLOUT
        if not of_a_rollout and any(key == name or key.endswith(f".{name}") for name in allow_change):
            continue
        if all(_DIGEST.fullmatch(json.dumps(value)) for value in (old, new)):
            refused[key] = f"{key}: {_DIGESTS.get(key, 'its bytes')} changed"
        else:
            differing = _differing(key, old, new)
            refused[key] = "; ".join(f"{name}: {show(name, old)} -> {show(name, new)}" for name, old, new in differing)
        if of_a_rollout:
            refused[key] += " (it decides which step is of which rollout: not to be changed in a run that has begun)"
    return refused


def _differing(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs of two values, each key of a mapping by itself: of a data source only its path, say."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in (name for name in {**old, **new} if old.get(name) != new.get(name)):
            yield from _differing(f"{key}.{name}", old.get(name), new.get(name))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) == 1:
        yield from _differing(key, old[0], new[0])
    else:
        yield key, old, new


def compare_fingerprints(run: RunDir, current: Mapping[str, Any], *, allow_change: Sequence[str] = ()) -> list[str]:
    """List the changes since stage.json was written; raises RunError, naming each, unless all are in `allow_change`."""
    if refused := list_changes(run, current, allow_change=allow_change):
        what = "\n  ".join(["this run was started with other settings:", *refused.values()])
        what += "\nchange them back, use --out for a new run, --force to move this one aside and start over, or "
        raise RunError(f"{what}--allow-change KEY to go on with the new value", where=str(run.path))
    return list(list_changes(run, current).values())


def copy_recipe(run: RunDir, source: Path) -> None:
    """Keep the recipe as it was given; a secret in a comment stays behind."""
    if not run.recipe.exists() and source.is_file():
        text = source.read_bytes().decode("utf-8", "surrogateescape")
        run.recipe.write_bytes(console.redact(text).encode("utf-8", "surrogateescape"))


@dataclass
class Result:
    """How a stage ended, as in result.json; tokens and seconds are of all sittings, speed and peak of the last one."""

    stage: str
    status: str
    step: int  # optimizer steps; rows written, where a stage makes data
    model_dir: str  # empty where a stage makes data
    metrics: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    wall_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_result(run: RunDir, result: Mapping[str, Any], products: Sequence[Path]) -> None:
    """Write result.json, which makes a run count as finished, with the checksums of `products`."""
    found = (path for product in products for path in (product.rglob("*") if product.is_dir() else [product]))
    kept = [path for path in found if path.is_file() and path.name != CARD]
    write_json(run.result, {**result, "files": describe_files(run.path, kept)})


def read_result(path: Path) -> Result:
    """Read result.json; raises RunError where a field is missing or of another type."""
    data = read_json(path)
    if missing := [key for key in Result.__dataclass_fields__ if data.get(key) is None]:
        raise RunError(f"has no {missing[0]}; put the file back as it was, or start over with --force", where=str(path))
    return Result(**{key: data[key] for key in Result.__dataclass_fields__})


def find_damaged_product(run_dir: Path, *, below: str = "") -> str | None:
    """Find which of a finished run's files (weights, rows; all or those `below` a directory) is not as its result.json
    says; None when all are."""
    result = RunDir(run_dir).result
    try:
        kept = json.loads(result.read_text(encoding="utf-8")).get("files", {})
        return find_damaged_file(run_dir, {name: facts for name, facts in kept.items() if name.startswith(below)})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{result.name} cannot be read ({type(error).__name__})"


def require_whole(product: Path) -> None:
    """Raise RunError when `product`, a model, base or rows, is of a finished run of ours and was damaged since."""
    product = product.absolute()
    if product.name == "critic":  # of a ppo run, inside its model
        product = product.parent
    run_dir = product.parent
    if product.name not in (*PRODUCTS, "base") or not RunDir(run_dir).stage.is_file():
        return
    if (damage := find_damaged_product(run_dir, below="base/" if product.name == "base" else "")) is not None:
        advice = "run the stage's own command again, which makes it anew from what it has kept, or put the file back"
        if product.name == "base" and product.exists():  # a checkpoint holds what was trained alone
            advice = "no checkpoint has the base, so put the file back, or start that stage over with --force"
        raise RunError(f"{damage}: it was damaged after the run had finished; {advice}", where=str(run_dir))


_SAYS = {"chat": "turns of its chat template", "text": "text without a chat template"}


def form_of(report: Mapping[str, Any]) -> str | None:
    """Tell the form of rows, "chat" or "text", by `DataReport.to_dict()`; None for raw text alone, which fits both."""
    found = {form: source["path"] for source in report.get("sources", ()) for form in source.get("forms", ())}
    found.pop("raw", None)
    if len(found) > 1:
        sides = ", ".join(f"{path} as {_SAYS[form]}" for form, path in found.items())
        raise DataError(f"one model reads both forms: {sides}; set chat: true or chat: false for all of them")
    return next(iter(found), None)


def require_form(stage: Stage, form: str | None, planned: Mapping[str, str | None] | None = None) -> None:
    """Raise DataError when rows have another form than a model of the stage was trained on, or is `planned` to be."""
    used = [("the model it starts from", stage.start_dir or stage.model.path, stage.start_stage)]
    for reward in stage.options.reward if isinstance(stage.options, PpoOptions) else ():
        if reward.model is not None:
            used.append(("its reward model", reward.model, stage.reward_stages.get(reward.model)))
    for role, model, name in used:
        # Of what is no run of ours, or one that does not say, nothing is known.
        record = next(filter(Path.is_file, (Path(model, "stage.json"), Path(model).parent / "stage.json")), None)
        other = (form_of(read_json(record).get("data") or {}) if record else None) or (planned or {}).get(name or "")
        if form and other and form != other:
            what = f"the rows are {_SAYS[form]}, and {role} ({name or model}) was trained on {_SAYS[other]}; chat: "
            what += f"{str(other == 'chat').lower()} gives them the same form"
            raise DataError(what, where=stage.where(f"{stage.name}.data"))


def step_of(checkpoint: Path) -> int:
    """Read the optimizer step from the name of a checkpoint directory, -1 from any other name."""
    match = _STEP.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def list_checkpoints(directory: Path, *, sealed: bool = False) -> list[Path]:
    """List the `checkpoint-N` directories, newest step first; with `sealed` only those that have a manifest."""
    found = sorted((path for path in directory.glob("checkpoint-*") if step_of(path) >= 0), key=step_of, reverse=True)
    return [path for path in found if not sealed or (path / MANIFEST).is_file()]


def newest_step(directory: Path) -> int | None:
    """Find the step of the newest sealed checkpoint, None without one; nothing is verified."""
    return next(map(step_of, list_checkpoints(directory, sealed=True)), None)


def _own_checksum(manifest: dict[str, Any]) -> str:
    """Compute the CRC-32 of a manifest's content, its own checksum left out."""
    content = {key: value for key, value in manifest.items() if key != "crc32"}
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def seal_checkpoint(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Sync every file, then write the manifest that makes this checkpoint count, with `facts` in it."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    found = [path for path in checkpoint.rglob("*") if path.is_file()]
    for path in found:
        files.sync(path)
    manifest = json.loads(json.dumps({"format": 1, "files": describe_files(checkpoint, found), **facts}, default=str))
    write_json(checkpoint / MANIFEST, {**manifest, "crc32": _own_checksum(manifest)})
    files.sync(checkpoint.parent)


def find_damage(checkpoint: Path) -> str | None:
    """Find why a checkpoint cannot be used; None when every file is as it was sealed."""
    manifest_path = checkpoint / MANIFEST
    if not manifest_path.is_file():
        return "it was never sealed (the run stopped while it was written, or its manifest is gone)"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        listed = manifest["files"]
        if manifest["crc32"] != _own_checksum(manifest):
            return f"{MANIFEST} has other content than was sealed"
        if manifest["step"] != step_of(checkpoint):
            return f"its manifest is of step {manifest['step']}"
        return find_damaged_file(checkpoint, listed, thorough=True)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"


def find_resumable(
    directory: Path, *, warn: Callable[[str], None], find_fault: Callable[[Path], str | None] = lambda checkpoint: None
) -> Path | None:
    """Find the newest checkpoint that verifies, setting damaged ones aside as `bad-...` with a warning each.
    `find_fault` says of one whose files are whole why it cannot be loaded all the same. Raises RunError when there were
    sealed checkpoints and none is whole, rather than train from the start in silence."""
    found = list_checkpoints(directory)
    for checkpoint in found:
        reason = find_damage(checkpoint) or find_fault(checkpoint)
        if reason is None:
            return checkpoint
        warn(f"{checkpoint}: {reason}; set aside as {files.put_aside(checkpoint).name}")
    # Those set aside by an earlier try count too: trying again must not start afresh in silence.
    damaged = sum((path / MANIFEST).is_file() for path in directory.glob("bad-checkpoint-*"))
    if damaged or (directory.parent / SEALED).exists():
        what = f"none of its checkpoints is whole, {damaged} were set aside as bad-*"
        what = what if damaged else "its checkpoints are gone, though the run had saved some; put them back"
        what += "; or start over with --force, which keeps this directory under another name"
        raise RunError(what, where=str(directory))
    return None


def rotate_checkpoints(directory: Path, *, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` sealed checkpoints and that of step `best`, each renamed to `trash-` first."""
    for checkpoint in list_checkpoints(directory, sealed=True)[max(keep, 1) :]:
        if step_of(checkpoint) != best:
            os.replace(checkpoint, checkpoint.with_name(f"trash-{checkpoint.name}"))
    sweep_checkpoints(directory)


def sweep_checkpoints(directory: Path) -> None:
    """Delete what an interrupted rotation left behind."""
    for path in directory.glob("trash-*"):
        shutil.rmtree(path, ignore_errors=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest of a sealed checkpoint."""
    return read_json(checkpoint / MANIFEST)


def expected_bytes(directory: Path, *, first_guess: int) -> int:
    """Estimate the size of the next checkpoint: that of the newest sealed one, or the caller's guess."""
    for newest in list_checkpoints(directory, sealed=True)[:1]:
        return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return first_guess
