"""What `alignkit doctor` says of versions, this machine and what works here."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from alignkit.preflight.doctor import (
    SAFE_SINCE,
    Ability,
    DoctorReport,
    Library,
    describe_system,
    describe_variables,
    judge_version,
    read_libraries,
    require_versions,
    try_abilities,
    try_ability,
)
from alignkit.runs.record import count_cores, memory_bytes

HEALTHY = DoctorReport(
    system={"cores": "2"},
    variables={},
    libraries=[Library("trl", "1.16.0", ">=1.16", None, None), Library("wandb", None, "", "trackers", "not there")],
    devices={"cpu": "2 threads"},
    abilities=[Ability("quantization: nf4", False, "ImportError: no bitsandbytes")],
    torch_problem=None,
)


def test_missing_extra_and_missing_ability_are_no_error() -> None:
    assert HEALTHY.problems() == []
    assert HEALTHY.error() is None


def test_core_library_out_of_bounds_ends_with_exit_code_8() -> None:
    broken = replace(HEALTHY, libraries=[Library("trl", "1.17.0", "<1.17", None, "trl is 1.17.0")])
    error = broken.error()
    assert error is not None
    assert (str(error), error.exit_code) == ("trl is 1.17.0", 8)


def test_torch_that_does_not_load_is_a_problem() -> None:
    assert replace(HEALTHY, torch_problem="torch does not load: libcuda").problems() == ["torch does not load: libcuda"]


def test_tables_leave_out_what_is_empty() -> None:
    assert [title for title, _, _ in HEALTHY.tables()] == ["This computer", "Libraries", "What works here"]


@pytest.mark.slow
def test_command_prints_one_json_document(run_alignkit) -> None:
    done = run_alignkit("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["devices"]["cpu"] == "1 thread"


def test_every_core_library_is_installed_and_accepted() -> None:
    libraries = {library.name: library for library in read_libraries()}
    assert {"torch", "trl", "transformers", "peft", "bitsandbytes", "datasets", "typer"} <= set(libraries)
    assert [library.problem for library in libraries.values() if library.extra is None and library.problem] == []
    require_versions()


def test_trackers_are_an_extra_and_never_required() -> None:
    extras = {library.name for library in read_libraries() if library.extra is not None}
    assert extras == {"tensorboard", "trackio", "wandb"}


def test_libraries_without_a_bound_of_ours_still_have_a_safety_floor() -> None:
    names = {library.name.lower() for library in read_libraries()}
    assert set(SAFE_SINCE) <= names


def test_unsafe_version_is_refused_before_bounds_are_looked_at() -> None:
    assert judge_version("torch", "2.9.1", ">=2.0") == (
        "torch 2.9.1 has known security holes; alignkit needs 2.10: pip install 'torch>=2.10'"
    )


def test_local_build_of_a_safe_version_is_accepted() -> None:
    assert judge_version("torch", "2.13.0+cpu", ">=2.10") is None


def test_version_out_of_bounds_names_both_and_the_command() -> None:
    assert judge_version("trl", "1.17.0", "<1.17,>=1.16") == (
        "trl is 1.17.0; alignkit needs <1.17,>=1.16: pip install 'trl<1.17,>=1.16'"
    )


def test_secret_is_shown_as_set_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    variables = describe_variables()
    assert variables["HF_TOKEN"] == "set"
    assert variables["OMP_NUM_THREADS"] == "3"


def test_disk_of_a_directory_that_is_not_there_is_that_of_its_parent(tmp_path: Path) -> None:
    assert describe_system(tmp_path / "runs" / "a")["disk"].endswith(f"at {tmp_path}")


def test_memory_and_cores_are_at_most_what_the_host_has() -> None:
    assert 0 < count_cores() <= (os.cpu_count() or 1)
    assert 0 < memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_failed_try_becomes_a_reason_not_an_exception() -> None:
    def fail() -> None:
        raise RuntimeError("no kernel image\nwith a long story")

    ability = try_ability("something", "on cpu", fail)
    assert (ability.works, ability.note) == (False, "RuntimeError: no kernel image")


@pytest.mark.slow
def test_quantisation_is_really_tried_on_this_machine() -> None:
    abilities = {ability.name: ability for ability in try_abilities()}
    assert abilities["full fine-tuning and LoRA"].works
    for kind in ("nf4", "fp4", "int8"):
        assert abilities[f"quantization: {kind}"].works, abilities[f"quantization: {kind}"].note
