"""`alignkit doctor`: one report on versions, devices and what works here.

It mends nothing and needs no recipe.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import EnvironmentProblem
from alignkit.preflight.machine import (
    Ability,
    describe_system,
    describe_variables,
    try_abilities,
)
from alignkit.preflight.versions import Library, read_libraries
from alignkit.runs.record import describe_devices

Table = tuple[str, list[str], list[list[str]]]  # title, column names, rows


@dataclass(frozen=True)
class DoctorReport:
    """What was found; `torch_problem` says why torch would not load, and then nothing that needs it was tried."""

    system: dict[str, str]
    variables: dict[str, str]
    libraries: list[Library]
    devices: dict[str, str]
    abilities: list[Ability]
    torch_problem: str | None

    def problems(self) -> list[str]:
        """Return what stops alignkit from working at all; a missing extra or ability does not."""
        found = [library.problem for library in self.libraries if library.extra is None and library.problem]
        return found + ([self.torch_problem] if self.torch_problem else [])

    def error(self) -> EnvironmentProblem | None:
        """Return the error to end with, or None when alignkit can work here."""
        problems = self.problems()
        return EnvironmentProblem("\n".join(problems)) if problems else None

    def tables(self) -> list[Table]:
        """Return the report for a terminal."""
        libraries = [
            [library.name, library.installed or "-", library.accepted or "any", _state(library)]
            for library in self.libraries
        ]
        abilities = [[ability.name, "yes" if ability.works else "no", ability.note] for ability in self.abilities]
        facts = {**self.system, **self.devices}
        tables: list[Table] = [
            ("This computer", ["what", "found"], [[name, value] for name, value in facts.items()]),
            ("Environment variables", ["name", "value"], [[name, value] for name, value in self.variables.items()]),
            ("Libraries", ["name", "installed", "accepted", "state"], libraries),
            ("What works here", ["what", "works", "how, or why not"], abilities),
        ]
        return [table for table in tables if table[2]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for --json."""
        return asdict(self) | {"problems": self.problems()}


def examine(directory: Path = Path("runs")) -> DoctorReport:
    """Look at everything; loads torch and bitsandbytes, which takes a few seconds.

    Raises EnvironmentProblem when alignkit is not installed as a package.
    """
    libraries = read_libraries()
    devices: dict[str, str] = {}
    abilities: list[Ability] = []
    problem = None
    try:
        devices = describe_devices()
        abilities = try_abilities()
    except (ImportError, OSError) as error:  # not installed, or a shared library that does not load
        problem = f"torch does not load: {error}"
    return DoctorReport(
        system=describe_system(directory),
        variables=describe_variables(),
        libraries=libraries,
        devices=devices,
        abilities=abilities,
        torch_problem=problem,
    )


def _state(library: Library) -> str:
    if library.problem is None:
        return "ok"
    return "optional, missing" if library.extra and library.installed is None else "problem"
