"""Opening, locking and comparing run directories; sealing, verifying, falling back and rotating checkpoints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import RunError
from alignkit.recipe import load_recipe, resolve
from alignkit.runs.directory import (
    MANIFEST,
    SEALED,
    RunDir,
    compare_fingerprints,
    find_damage,
    find_resumable,
    list_changes,
    open_run,
    require_whole,
    rotate_checkpoints,
    seal_checkpoint,
    sweep_checkpoints,
)
from alignkit.runs.files import describe_files, write_json

FILES = {
    "model.safetensors": b"w" * 5000,
    "optimizer.pt": b"o" * 3000,
    "trainer_state.json": b"{}",
    "rng_state.pth": b"r",
}


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    _, lock = open_run(tmp_path / "run", force=False)
    code = (
        "import sys; from pathlib import Path; from alignkit.errors import RunError\n"
        "from alignkit.runs.directory import open_run\n"
        "try: open_run(Path(sys.argv[1]), force=False)\n"
        "except RunError as error: print(error)"
    )
    second = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, check=True)
    assert "in use by process" in second.stdout
    lock.close()
    third = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, check=True)
    assert third.stdout == ""


def test_force_moves_the_old_run_aside_and_nothing_else(tmp_path: Path) -> None:
    run, lock = open_run(tmp_path / "runs/a/sft", force=False)
    assert [path.stat().st_mode & 0o777 for path in (run.path, run.path.parent)] == [0o700, 0o700]  # its owner's alone
    write_json(run.stage, {"fingerprint": {}})
    lock.close()
    run, lock = open_run(run.path, force=True)
    lock.close()
    assert not run.stage.exists()
    (aside,) = run.path.parent.glob("sft.old-*")
    assert (aside / "stage.json").is_file()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="holds no run"):
        open_run(tmp_path, force=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_every_changed_setting_is_named_with_both_values(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_json(run.stage, {"stage": "dpo", "method": "dpo", "fingerprint": {"dpo.beta": 0.1, "seed": 0, "data": "aa"}})
    with pytest.raises(RunError) as error:
        compare_fingerprints(run, {"dpo.beta": 0.2, "seed": 0, "data": "bb"})
    assert "dpo.beta: 0.1 -> 0.2" in str(error.value)
    assert 'data: "aa" -> "bb"' in str(error.value)
    with pytest.raises(RunError, match="dpo.beta"):
        compare_fingerprints(run, {"dpo.beta": 0.2, "seed": 0, "data": "bb"}, allow_change=["data"])
    allowed = compare_fingerprints(run, {"dpo.beta": 0.2, "seed": 0, "data": "bb"}, allow_change=["data", "beta"])
    assert allowed == ['data: "aa" -> "bb"', "dpo.beta: 0.1 -> 0.2"]


def test_a_change_from_or_to_trls_default_shows_its_value(tmp_path: Path) -> None:
    run, _ = open_run(tmp_path / "run", force=False)
    fingerprint = {"method": "dpo", "dpo.learning_rate": 1e-5}
    write_json(run.stage, {"stage": "dpo", "method": "dpo", "fingerprint": fingerprint})
    changes = list_changes(run, {"method": "dpo", "dpo.beta": 0.5})  # a fingerprint leaves out TRL's own defaults
    assert changes["dpo.beta"] == "dpo.beta: 0.1 (default) -> 0.5"
    assert changes["dpo.learning_rate"] == "dpo.learning_rate: 1e-05 -> 1e-06 (default)"


def test_a_run_that_lost_its_stage_file_is_compared_with_its_newest_checkpoint_and_moved_by_force(
    tmp_path: Path,
) -> None:
    run, lock = open_run(tmp_path / "run", force=False)
    lock.close()
    for step, beta in ((2, 0.3), (10, 0.1), (12, None)):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        write_json(run.checkpoints / f"checkpoint-{step}" / MANIFEST, {"fingerprint": beta and {"dpo.beta": beta}})
    assert list_changes(run, {"dpo.beta": 0.1}) == {}
    assert list_changes(run, {"dpo.beta": 0.5}) == {"dpo.beta": "dpo.beta: 0.1 -> 0.5"}
    _, lock = open_run(run.path, force=True)
    lock.close()
    assert not run.checkpoints.exists()
    assert len(list(tmp_path.glob("run.old-*/checkpoints/checkpoint-10"))) == 1


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "stage.json.tmp", "model/config.json", "checkpoints"])
def test_a_link_in_a_run_is_refused_and_nothing_it_points_to_is_touched(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (outside / "checkpoint-1").mkdir(parents=True)
    (outside / "precious").write_text("precious\nlast line")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    (tmp_path / "run/.lock").touch()
    link.unlink(missing_ok=True)
    link.symlink_to(outside if name == "checkpoints" else outside / "precious")
    for force in (False, True):
        with pytest.raises(RunError, match=rf"{re.escape(name)}: is a link to {outside}"):
            open_run(tmp_path / "run", force=force)
    assert (outside / "precious").read_text() == "precious\nlast line"
    assert sorted(path.name for path in outside.iterdir()) == ["checkpoint-1", "precious"]


def test_a_base_that_changed_after_its_run_is_refused_and_other_damage_of_that_run_is_not(tmp_path: Path) -> None:
    run, lock = open_run(tmp_path / "run", force=False)
    lock.close()
    for place in (run.base, run.model):
        place.mkdir()
        (place / "config.json").write_text("{}")
    kept = describe_files(run.path, [run.base / "config.json", run.model / "config.json"])
    write_json(run.stage, {"fingerprint": {}})
    write_json(run.result, {"status": "finished", "files": kept})
    (run.model / "config.json").write_text("[]")
    require_whole(run.base)
    (run.base / "config.json").write_text("[]")
    with pytest.raises(RunError, match=r"base/config.json has other bytes than were saved.*no checkpoint has the base"):
        require_whole(run.base)
    shutil.rmtree(run.base)
    with pytest.raises(RunError, match=r"base/config.json is missing.*run the stage's own command again"):
        require_whole(run.base)


@pytest.mark.parametrize("name", ["checkpoints", "cache", "model", "model.tmp", "launch"])
def test_a_file_where_the_run_keeps_a_directory_is_refused_before_anything_is_loaded(tmp_path: Path, name: str) -> None:
    run, lock = open_run(tmp_path / "run", force=False)
    lock.close()
    (run.path / name).write_text("kept")
    with pytest.raises(RunError, match=rf"/{name}: is a file where the run keeps a directory; move it away"):
        open_run(run.path, force=False)
    assert (run.path / name).read_text() == "kept"


def test_a_run_below_a_file_is_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(RunError, match=r"rows.jsonl: is a file; a run needs a directory"):
        open_run(tmp_path / "rows.jsonl" / "run", force=False)


def test_a_pipe_in_a_run_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    run, lock = open_run(tmp_path / "run", force=False)
    lock.close()
    os.mkfifo(run.metrics)
    with pytest.raises(RunError, match=r"metrics.jsonl: is neither a file nor a directory; remove it"):
        open_run(run.path, force=False)


def test_a_checksum_that_changed_is_told_in_words(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    before = {"start_weights": "a" * 32, "reward_weights": ["b" * 64, None], "sft.model": None}
    write_json(run.stage, {"stage": "sft", "method": "sft", "fingerprint": before})
    now = {"start_weights": "c" * 32, "reward_weights": [None, None], "sft.model": "a" * 32}
    assert list(list_changes(run, now).values()) == [
        "reward_weights: the weights or the code of its rewards changed",
        "sft.model: its bytes changed",
        "start_weights: the weights it starts from changed",
    ]


def test_a_key_that_came_with_a_release_is_no_change_while_it_has_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "model: {path: x/m}\nlora: {r: 4}\ndata: [{path: x/y, weight: 2}]\n"
    Path("a.yaml").write_text(f"{text}ppo: {{reward: {{judge: m/j, constitution: c}}}}\n")

    def read(*overrides: str) -> dict[str, object]:
        return resolve(load_recipe("a.yaml", overrides=overrides), "ppo").fingerprint_values()

    run, now, new = RunDir(tmp_path / "run"), read(), ("model.use_kernels", "lora.dropout", "ppo.importance")
    began = {key: value for key, value in now.items() if key not in new}
    began |= {"ppo.data": [{"path": "x/y", "weight": 2}], "ppo.generation": {"engine": "transformers"}}
    began["ppo.reward"] = [{"judge": {"model": "m/j"}, "constitution": "c"}]
    run.path.mkdir()
    write_json(run.stage, {"stage": "ppo", "method": "ppo", "fingerprint": began})
    assert list_changes(run, now) == {}
    changed = read("model.use_kernels=true", "ppo.data=[{path: x/y, weight: 3}]", "ppo.generation.batch_size=8")
    assert list(list_changes(run, changed).values()) == [
        "model.use_kernels: false -> true", "ppo.data.weight: 2.0 -> 3.0", "ppo.generation.batch_size: 64 -> 8",
    ]  # fmt: skip
    bare = {key: value for key, value in began.items() if not key.startswith("lora.")}
    write_json(run.stage, {"stage": "ppo", "method": "ppo", "fingerprint": bare})
    assert "lora.r" in list_changes(run, now)  # adapters that were not there are a change
    write_json(run.stage, {"stage": "label", "method": "label", "fingerprint": {"method": "label", "answers": 2}})
    assert list_changes(run, {"method": "label", "answers": 2, "hard": False}) == {}
    assert list(list_changes(run, {"method": "label", "answers": 2, "hard": True}).values()) == ["hard: false -> true"]


def make(directory: Path, step: int, *, sealed: bool = True) -> Path:
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name, content in FILES.items():
        (checkpoint / name).write_bytes(content)
    if sealed:
        seal_checkpoint(checkpoint, {"step": step, "num_tokens": 0})
    return checkpoint


def zero_tail(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def flip_bit(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(content) // 2] ^= 4
    return bytes(changed)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"", "cut": lambda content: content[: len(content) // 2], "zero_tail": zero_tail,
    "flip_bit": flip_bit,
}  # fmt: skip


@pytest.mark.parametrize("damage", ["delete", *DAMAGE])
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_older_one_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    older, newest = make(tmp_path, 9), make(tmp_path, 10)
    content = (newest / name).read_bytes()
    (newest / name).unlink()
    if damage != "delete":
        (newest / name).write_bytes(DAMAGE[damage](content))
    warnings: list[str] = []
    assert find_resumable(tmp_path, warn=warnings.append) == older
    assert len(warnings) == 1 and warnings[0].startswith(str(newest))
    assert not newest.exists()
    assert len(list(tmp_path.glob("bad-checkpoint-10-*"))) == 1


def test_all_damaged_or_gone_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        (make(tmp_path, step) / "optimizer.pt").write_bytes(b"p" * 3000)
    for _ in range(2):  # the second try finds them set aside, and must not start afresh either
        with pytest.raises(RunError, match="none of its checkpoints is whole, 2 were set aside"):
            find_resumable(tmp_path, warn=lambda _: None)
    directory = tmp_path / "checkpoints"
    write_json(directory.parent / SEALED, {"step": 2})
    with pytest.raises(RunError, match="its checkpoints are gone, though the run had saved some"):
        find_resumable(directory, warn=lambda _: None)


def test_a_sealed_checkpoint_that_cannot_be_loaded_is_set_aside(tmp_path: Path) -> None:
    older, newest = make(tmp_path, 9), make(tmp_path, 10)
    warnings: list[str] = []
    faults = {newest: "optimizer.pt cannot be loaded"}
    found = find_resumable(tmp_path, warn=warnings.append, find_fault=faults.get)
    assert found == older and not newest.exists()
    assert warnings[0].startswith(f"{newest}: optimizer.pt cannot be loaded; set aside as bad-checkpoint-10-")


def test_a_partly_written_or_renamed_checkpoint_does_not_count(tmp_path: Path) -> None:
    make(tmp_path, 1, sealed=False)
    assert find_resumable(tmp_path, warn=lambda _: None) is None
    os.rename(make(tmp_path, 5), tmp_path / "checkpoint-50")
    assert find_damage(tmp_path / "checkpoint-50") == "its manifest is of step 5"


def test_rotation_goes_by_step_not_by_time(tmp_path: Path) -> None:
    for step in (2, 10, 9, 1):
        make(tmp_path, step)
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    make(tmp_path, 11, sealed=False)
    rotate_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11", "checkpoint-9"]
    os.rename(tmp_path / "checkpoint-9", tmp_path / "trash-checkpoint-9")  # an interrupted rotation
    sweep_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
