"""Real processes for real faults: the libraries are imported once, then every run is a fork of this process.

A fork starts in milliseconds instead of ten seconds, so that dozens of kills fit a test run; what it executes is the
same `launch_stage` the command line calls.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Ended:
    """How a forked run ended: its exit code (negative: the signal that killed it), what it said, how long it took."""

    code: int
    stderr: str
    seconds: float


RECIPE = """
name: faults
model: {{path: {model}{quantization}}}
{lora}
sft:
  data: {{path: builtin:instructions, max_rows: 32}}
  {common}
  learning_rate: 1e-3
rm:
  data: {{path: builtin:preferences, max_rows: 32}}
  {common}
  learning_rate: 1e-3
dpo:
  data: {{path: builtin:preferences, max_rows: 32}}
  {common}
  learning_rate: 1e-3
"""
COMMON = (
    "max_steps: {steps}\n  save_steps: 1\n  batch_size: 4\n  max_length: 160\n  samples: {{num: 0}}\n  logging_steps: 4"
)
KINDS = {
    "full": ("", ""),
    "lora": ("", "lora: {r: 4, alpha: 8, dropout: 0.1}"),
    "qlora": (", quantization: nf4", "lora: {r: 4, alpha: 8, dropout: 0.1}"),
}


@pytest.fixture(scope="session")
def warm() -> None:
    """Import in the parent what every child needs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import alignkit.train.dpo
    import alignkit.train.rm
    import alignkit.train.sft  # noqa: F401


@pytest.fixture
def make_stage(tmp_path: Path) -> Callable[..., object]:
    """Return a function that resolves a stage of a tiny recipe into a run directory of its own."""
    from alignkit.recipe import load_recipe, resolve

    def make(method: str, kind: str, out: str, *, steps: int = 12, model: str = "builtin:tiny-llama") -> object:
        quantization, lora = KINDS[kind]
        path = tmp_path / f"{kind}-{steps}.yaml"
        common = COMMON.format(steps=steps)
        path.write_text(RECIPE.format(model=model, quantization=quantization, lora=lora, common=common))
        return resolve(load_recipe(path), None, method=method, out=tmp_path / out)

    return make


def _child(stage: object, log: Path, prepare: Callable[[], None] | None, allow_change: tuple[str, ...]) -> int:
    from alignkit.errors import AlignKitError
    from alignkit.launch.placement import Command
    from alignkit.launch.run import launch_stage

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    if prepare is not None:
        prepare()
    try:
        for each in stage if isinstance(stage, list) else [stage]:  # a finished one is left as it is
            launch_stage(each, Command(each, (), allow_change=allow_change))
    except AlignKitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


@pytest.fixture
def run(warm: None, tmp_path: Path) -> Iterator[Callable[..., Ended]]:
    """Return a function that runs a stage, or a list of them in turn, in a fork, with an optional signal after a delay
    or once a test holds."""
    children: list[int] = []

    def start(
        stage: object,
        *,
        kill_after: float | Callable[[], bool] | None = None,
        number: int = signal.SIGKILL,
        allow_change: tuple[str, ...] = (),
        prepare: Callable[[], None] | None = None,
        timeout: float = 300,
    ) -> Ended:
        log = tmp_path / "child.log"
        log.unlink(missing_ok=True)
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _child(stage, log, prepare, allow_change)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(pid)
        sent = False
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            elapsed = time.monotonic() - began
            if done:
                break
            if kill_after is not None and not sent and (
                kill_after() if callable(kill_after) else elapsed >= kill_after
            ):  # fmt: skip
                os.kill(pid, number)
                sent = True
            if elapsed > timeout:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        children.remove(pid)
        text = log.read_text(errors="replace") if log.exists() else ""
        return Ended(os.waitstatus_to_exitcode(status), text, time.monotonic() - began)

    yield start
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def weights_hash(run_dir: Path) -> str:
    """Return a digest of the final weights: every safetensors file of model/, by content."""
    digest = hashlib.sha256()
    files = sorted((run_dir / "model").glob("*.safetensors"))
    assert files, f"no weights below {run_dir}"
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@pytest.fixture
def digest() -> Callable[[Path], str]:
    return weights_hash


def limit_file_size(num_bytes: int) -> Callable[[], None]:
    """Return a function that makes every file of the child stop growing there, as a full disk would."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

    return prepare


@pytest.fixture
def full_disk() -> Callable[[int], Callable[[], None]]:
    return limit_file_size


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    half = len(content) // 2
    if how in ("delete", "directory"):
        path.unlink()
        if how == "directory":
            path.mkdir()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[:half])
    elif how == "zero tail":
        path.write_bytes(content[:half] + bytes(len(content) - half))
    else:
        path.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])


def damage_each(
    begun: Path, run: Callable[..., Ended], make: Callable[[str], object], read: Callable[[Path], object]
) -> Iterator[int]:
    """Damage each file of a run in turn, in a copy of it, and give its command once more; yield the exit codes.

    What comes out is what the undisturbed run `whole` has, or the command refuses in one message with a remedy.
    """
    whole, place = read(begun.parent / "whole"), begun.parent / "damaged"
    for file in sorted(path for path in begun.rglob("*") if path.is_file() and path.name != ".lock"):
        name = file.relative_to(begun)
        for how in ("delete", "empty", "cut", "flip", "directory"):
            if not file.stat().st_size and how in ("cut", "flip"):
                continue
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(begun, place)
            damage(place / name, how)
            ended = run(make("damaged"))
            said = (str(name), how, ended)
            assert ended.code in (0, 2, 4) and "Traceback" not in ended.stderr, said
            if ended.code == 0:
                assert read(place) == whole, said
            else:
                assert ended.stderr.count("error:") == 1 and any(way in ended.stderr for way in _REMEDIES), said
            yield ended.code


_REMEDIES = (
    "--force",
    "put the file back",
    "put that right",
    "mend it",
    "the model again",
    "the file again",
    "run the stage's own command",
)
