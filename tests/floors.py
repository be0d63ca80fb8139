"""Print the lowest accepted version of every dependency as pip constraints: what `make test-versions` installs first.

torch is left out: its version is chosen by TORCH_VERSION, since which build of it fits depends on the machine.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def floors(pyproject: Path) -> list[str]:
    """Turn `name>=1.2,<2` into `name==1.2` for each of the project's dependencies but torch."""
    needs = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    found = [re.fullmatch(r"([\w.-]+)>=([\d.]+).*", need) for need in needs]
    assert all(found), (
        f"without a lowest version: {[need for need, match in zip(needs, found, strict=True) if not match]}"
    )
    return [f"{match[1]}=={match[2]}" for match in found if match and match[1] != "torch"]


if __name__ == "__main__":
    print("\n".join(floors(Path(__file__).parents[1] / "pyproject.toml")))
