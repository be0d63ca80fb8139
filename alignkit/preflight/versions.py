"""The installed libraries against the versions alignkit is made for, from package metadata alone.

It imports none of the libraries it looks at, so that a broken one cannot take the answer down with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from alignkit.errors import EnvironmentProblem

# Older versions load hostile files whatever we do, so they are refused whatever else the bounds say:
# torch CVE-2025-32434 and CVE-2026-24747 (weights_only), transformers CVE-2026-4372, CVE-2026-5241 and
# CVE-2026-1839 (code from the hub without trust), jinja2 CVE-2025-27516 (sandbox), PyYAML CVE-2020-14343.
SAFE_SINCE = {"torch": "2.10", "transformers": "5.3", "jinja2": "3.1.6", "pyyaml": "5.4"}


@dataclass(frozen=True, slots=True)
class Library:
    """One library: what is installed and what alignkit accepts."""

    name: str
    installed: str | None
    accepted: str  # a version specifier, "" for any
    extra: str | None  # the extra it belongs to; None for what alignkit cannot do without
    problem: str | None


def read_libraries() -> list[Library]:
    """Return every library that alignkit declares, core ones first, and those with a safety floor.

    Raises EnvironmentProblem when alignkit itself is not installed as a package: its bounds are not known then.
    """
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in metadata.requires("alignkit") or ()]
    except metadata.PackageNotFoundError:
        raise EnvironmentProblem("alignkit is not installed, only importable; run `pip install -e .`") from None
    core = [_look_at(need.name, str(need.specifier), None) for need in declared if need.marker is None]
    known = {library.name.lower() for library in core}
    core += [_look_at(name, "", None) for name in SAFE_SINCE if name not in known]
    extras = [
        _look_at(need.name, str(need.specifier), extra)
        for extra in ("trackers",)
        for need in declared
        if need.marker is not None and need.marker.evaluate({"extra": extra})
    ]
    return sorted(core, key=lambda library: library.name) + extras


def require_versions() -> None:
    """Raise EnvironmentProblem naming every core library that is missing, unsafe or out of bounds."""
    problems = [library.problem for library in read_libraries() if library.extra is None and library.problem]
    if problems:
        raise EnvironmentProblem("\n".join(problems))


def _look_at(name: str, specifier: str, extra: str | None) -> Library:
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        install = f"pip install 'alignkit[{extra}]'" if extra else f"pip install '{name}{specifier}'"
        return Library(name, None, specifier, extra, f"{name} is not installed; {install}")
    return Library(name, installed, specifier, extra, _judge(name, installed, specifier))


def _judge(name: str, installed: str, specifier: str) -> str | None:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    floor = SAFE_SINCE.get(name.lower())
    if floor and Version(installed) < Version(floor):
        return f"{name} {installed} has known security holes; alignkit needs {floor}: pip install '{name}>={floor}'"
    if not SpecifierSet(specifier).contains(installed, prereleases=True):
        return f"{name} is {installed}; alignkit needs {specifier}: pip install '{name}{specifier}'"
    return None
