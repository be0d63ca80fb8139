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


def test_what_ends_with_exit_code_8_and_what_is_left_out_of_the_tables() -> None:
    assert HEALTHY.problems() == [] and HEALTHY.error() is None  # a missing extra or ability is no error
    assert [title for title, _, _ in HEALTHY.tables()] == ["This computer", "Libraries", "What works here"]
    error = replace(HEALTHY, libraries=[Library("trl", "1.17.0", "<1.17", None, "trl is 1.17.0")]).error()
    assert error is not None and (str(error), error.exit_code) == ("trl is 1.17.0", 8)
    assert replace(HEALTHY, torch_problem="torch does not load: libcuda").problems() == ["torch does not load: libcuda"]


@pytest.mark.slow
def test_command_prints_one_json_document(run_alignkit) -> None:
    done = run_alignkit("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["devices"]["cpu"] == "1 thread"


def test_libraries_are_installed_and_accepted_and_have_a_safety_floor() -> None:
    libraries = {library.name: library for library in read_libraries()}
    assert {"torch", "trl", "transformers", "peft", "bitsandbytes", "datasets", "typer"} <= set(libraries)
    assert [library.problem for library in libraries.values() if library.extra is None and library.problem] == []
    require_versions()
    extras = {library.name for library in libraries.values() if library.extra is not None}
    assert extras == {"tensorboard", "trackio", "wandb"}
    assert set(SAFE_SINCE) <= {name.lower() for name in libraries}


@pytest.mark.parametrize(
    ("name", "installed", "accepted", "problem"),
    [
        ("torch", "2.9.1", ">=2.0", "torch 2.9.1 has known security holes; alignkit needs 2.10: pip install "
         "'torch>=2.10'"),
        ("torch", "2.13.0+cpu", ">=2.10", None),
        ("trl", "1.17.0", "<1.17,>=1.16", "trl is 1.17.0; alignkit needs <1.17,>=1.16: pip install 'trl<1.17,>=1.16'"),
    ],
)  # fmt: skip
def test_a_version_is_judged_for_safety_first_then_by_its_bounds(
    name: str, installed: str, accepted: str, problem: str | None
) -> None:
    assert judge_version(name, installed, accepted) == problem


def test_variables_disk_memory_and_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    variables = describe_variables()
    assert (variables["HF_TOKEN"], variables["OMP_NUM_THREADS"]) == ("set", "3")  # never the value of a secret
    assert describe_system(tmp_path / "runs" / "a")["disk"].endswith(f"at {tmp_path}")
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
    assert {"kernels of Triton (TRL's fused head)", "use_kernels, attn_implementation of the hub"} <= abilities.keys()
