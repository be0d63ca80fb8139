from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from alignkit.cli import end
from alignkit.errors import DiskError, NonFiniteError, OutOfMemoryError, RecipeError, explain


def test_our_own_error_is_left_as_it_is() -> None:
    error = RecipeError("beta is -1", where="a.yaml:7")
    assert explain(error) is error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_says_what_to_do(number: int) -> None:
    explained = explain(OSError(number, os.strerror(number), "runs/a/model.safetensors"))
    assert isinstance(explained, DiskError)
    assert str(explained) == (
        f"runs/a/model.safetensors: {os.strerror(number)}; what was complete before is untouched; "
        "free some space and run the same command again"
    )


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_place_that_cannot_be_written_asks_for_another(number: int) -> None:
    explained = explain(OSError(number, os.strerror(number), "runs"))
    assert isinstance(explained, DiskError)
    assert str(explained).endswith("choose another --out")


def test_name_that_is_too_long_for_the_file_system_asks_for_another() -> None:
    with pytest.raises(OSError) as error:
        Path("a" * 300).stat()
    known = explain(error.value)
    assert known is not None and known.exit_code == 2
    assert str(known) == f"{'a' * 60}...: file name too long; choose a shorter one"


def test_home_of_a_user_who_is_not_there_is_a_mistake_in_the_path() -> None:
    with pytest.raises(RuntimeError) as error:
        Path("~nobody-of-this-name/run").expanduser()
    known = explain(error.value)
    assert known is not None and known.exit_code == 2
    assert str(known) == "a path begins with ~ and a user whom this machine has not; write the path out"


def test_full_disk_in_the_words_of_torch_and_safetensors() -> None:
    for words in (
        "[enforce fail at inline_container.cc:672] . unexpected pos 273024 vs 272912",
        "I/O error: No space left on device (os error 28)",
    ):
        assert isinstance(explain(RuntimeError(words)), DiskError)


def test_out_of_memory_of_host_and_device() -> None:
    class OutOfMemoryErrorOfTorch(RuntimeError):
        pass

    OutOfMemoryErrorOfTorch.__name__ = "OutOfMemoryError"
    for error in (MemoryError(), OutOfMemoryErrorOfTorch("CUDA out of memory. Tried to allocate 2 GiB\nmore")):
        explained = explain(error)
        assert isinstance(explained, OutOfMemoryError)
        assert "micro_batch_size" in str(explained)


def test_other_errors_are_bugs() -> None:
    assert explain(KeyError("x")) is None
    assert explain(FileNotFoundError(errno.ENOENT, "not there", "a")) is None


def test_bug_leaves_one_line_and_a_traceback_in_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("token hf_abcdefghijklmnopqrstuvwx\nsecond line")
    except ValueError as error:
        code = end(error, tmp_path)
    log = tmp_path / "error.log"
    assert code == 1
    assert capsys.readouterr().err == f"error: unexpected ValueError: token [redacted] (traceback: {log})\n"
    assert "Traceback (most recent call last)" in log.read_text()
    assert "hf_abc" not in log.read_text()


def test_bug_before_there_is_a_run_leaves_its_traceback_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert end(ValueError("x"), tmp_path / "not-there") == 1
    assert "(traceback: alignkit-error.log)" in capsys.readouterr().err
    assert (tmp_path / "alignkit-error.log").exists()


def test_our_error_ends_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(NonFiniteError("the loss at step 7 is NaN"), None) == 3
    assert capsys.readouterr().err == "error: the loss at step 7 is NaN\n"


def test_code_of_others_that_exits_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "alignkit_quits.py").write_text(
        "import sys, alignkit.cli as cli\n"
        "def quits(*given, **named):\n    raise SystemExit(0)\n"
        "cli.app.command('quits')(lambda: quits())\n"
        "sys.argv = ['alignkit', 'quits']\n"
        "sys.exit(cli.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "alignkit_quits.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "code that alignkit called ended the process, SystemExit: 0 (traceback: alignkit-error.log)" in done.stderr


@pytest.mark.parametrize("loading", ["alignkit/cli/__init__.py", "typer/__init__.py", "alignkit/errors.py"])
def test_ctrl_c_while_the_command_line_loads_ends_as_later(loading: str) -> None:
    # Python tells of each import as it begins: that the compiled file matches its source, or that it reads the source.
    process = subprocess.Popen([sys.executable, "-v", "-m", "alignkit", "check", "none.yaml"], stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        if re.match(r"# (code object from|\S+ matches) ", said := line.decode()) and loading in said:
            break
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in said and "interrupted" in said.splitlines()


def test_the_command_is_the_module_that_is_run() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"alignkit": "alignkit.__main__:main"}
