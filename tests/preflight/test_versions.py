from __future__ import annotations

from alignkit.preflight.versions import SAFE_SINCE, _judge, read_libraries, require_versions


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
    assert _judge("torch", "2.9.1", ">=2.0") == (
        "torch 2.9.1 has known security holes; alignkit needs 2.10: pip install 'torch>=2.10'"
    )


def test_local_build_of_a_safe_version_is_accepted() -> None:
    assert _judge("torch", "2.13.0+cpu", ">=2.10") is None


def test_version_out_of_bounds_names_both_and_the_command() -> None:
    assert _judge("trl", "1.17.0", "<1.17,>=1.16") == (
        "trl is 1.17.0; alignkit needs <1.17,>=1.16: pip install 'trl<1.17,>=1.16'"
    )
