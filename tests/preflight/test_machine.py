from __future__ import annotations

import os
from pathlib import Path

import pytest

from alignkit.preflight.machine import (
    _try,
    count_cores,
    describe_system,
    describe_variables,
    memory_bytes,
    try_abilities,
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

    ability = _try("something", "on cpu", fail)
    assert (ability.works, ability.note) == (False, "RuntimeError: no kernel image")


@pytest.mark.slow
def test_quantisation_is_really_tried_on_this_machine() -> None:
    abilities = {ability.name: ability for ability in try_abilities()}
    assert abilities["full fine-tuning and LoRA"].works
    for kind in ("nf4", "fp4", "int8"):
        assert abilities[f"quantization: {kind}"].works, abilities[f"quantization: {kind}"].note
