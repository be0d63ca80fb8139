from __future__ import annotations

import json
from dataclasses import replace

import pytest

from alignkit.preflight.doctor import DoctorReport
from alignkit.preflight.machine import Ability
from alignkit.preflight.versions import Library

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
