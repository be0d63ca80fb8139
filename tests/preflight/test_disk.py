from __future__ import annotations

from pathlib import Path

import pytest

from alignkit.errors import EnvironmentProblem
from alignkit.preflight.disk import checkpoint_bytes, require_space


def test_checkpoint_holds_weights_and_two_optimizer_values() -> None:
    assert checkpoint_bytes(1000, dtype="float32") == 12_000
    assert checkpoint_bytes(1000, dtype="bfloat16") == 6_000


def test_too_little_space_says_how_much_is_needed_and_what_to_do(tmp_path: Path) -> None:
    assert require_space(tmp_path / "runs" / "a", 1024, num_checkpoints=3) > 1024
    with pytest.raises(EnvironmentProblem, match=r"3 checkpoints and the final model need about 1048576\.00 GiB; free"):
        require_space(tmp_path / "runs" / "a", 2**50, num_checkpoints=3)
