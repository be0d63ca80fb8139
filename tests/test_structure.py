"""The shape of the code: which room may import which, what is never called, and what users may rely on."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import alignkit

PACKAGE = Path(alignkit.__file__).parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}

# A room imports only rooms with a smaller number; rooms with the same number never import each other.
LEVELS = {
    "errors": 0,
    "console": 1,
    "recipe": 2,
    "runs": 3,
    "data": 4,
    "models": 4,
    "report": 4,  # of the files of a run alone: stages write their page when they end
    "feedback": 5,
    "rewards": 6,  # a judge asks as the feedback room does
    "evaluate": 7,
    "chat": 7,
    "train": 8,  # evaluates what it trains
    "preflight": 9,
    "launch": 10,
    "cli": 11,
    "__main__": 12,
}


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_rooms(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and room of every import from alignkit, those inside functions and for type checkers included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            deep = node.module == "alignkit"
            names = [f"alignkit.{alias.name}" for alias in node.names] if deep else [node.module or ""]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "alignkit" and len(parts) > 1 and parts[1] != "__version__":
                yield node.lineno, parts[1]


def _top_level_imports(tree: ast.Module) -> Iterator[str]:
    """Yield the first part of each name that importing the module loads."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def _all_calls() -> Iterator[tuple[Path, ast.Call, str]]:
    """Yield every call in the package with the dotted name of what is called."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield path, node, ast.unparse(node.func)


def _has(call: ast.Call, name: str, value: object) -> bool:
    return any(
        word.arg == name and isinstance(word.value, ast.Constant) and word.value.value is value
        for word in call.keywords
    )


def test_every_room_has_a_level() -> None:
    assert {_room(path) for path in TREES} - {"__init__"} - set(LEVELS) == set()


def test_imports_only_go_up() -> None:
    wrong = [
        f"{_name(path)}:{line} imports {other}"
        for path, tree in TREES.items()
        for line, other in _imported_rooms(tree)
        if other != _room(path) and LEVELS[other] >= LEVELS.get(_room(path), -1)
    ]
    assert wrong == []


def test_files_of_a_room_import_each_other_in_no_circle() -> None:
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): tree
             for path, tree in TREES.items()}  # fmt: skip
    left = {
        name: {other for other in _imported_modules(tree, set(names)) if other.split(".")[1:2] == name.split(".")[1:2]}
        for name, tree in names.items()
    }
    while leaves := {name for name, imported in left.items() if not imported & left.keys() - {name}}:
        left = {name: imported for name, imported in left.items() if name not in leaves}
    assert sorted(left) == []


def _imported_modules(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """Yield the modules of alignkit that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield from {full if full in modules else node.module or ""} & modules


def test_every_module_says_what_it_is_for() -> None:
    assert [_name(path) for path, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_only_the_console_prints() -> None:
    found = [f"{_name(path)}:{call.lineno}" for path, call, name in _all_calls() if name == "print"]
    assert [place for place in found if not place.startswith("alignkit/console.py")] == []


def test_nothing_unpickles() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    found = [
        f"{_name(path)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and forbidden & {alias.name.split(".")[0] for alias in node.names})
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in forbidden)
    ]
    found += [
        f"{_name(path)}:{call.lineno}"
        for path, call, name in _all_calls()
        if (name == "torch.load" and not _has(call, "weights_only", True)) or _has(call, "allow_pickle", True)
    ]
    assert found == []


def test_nothing_runs_what_a_file_says() -> None:
    forbidden = {"eval", "exec", "os.system", "os.popen", "yaml.load", "jinja2.Template"}
    found = [
        f"{_name(path)}:{call.lineno}: {name}"
        for path, call, name in _all_calls()
        if name in forbidden or _has(call, "shell", True) or _has(call, "trust_remote_code", True)
    ]
    assert found == []


def test_recipe_room_loads_no_machine_learning_library() -> None:
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "numpy", "pyarrow"}
    found = [
        f"{_name(path)}:{node.lineno}"
        for path, tree in TREES.items()
        if _room(path) == "recipe"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and heavy & {alias.name.split(".")[0] for alias in node.names})
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in heavy)
    ]
    assert found == []


COMMAND_LINE = [path for path in TREES if path.parent == PACKAGE / "cli"]


def test_command_line_loads_typer_and_the_standard_library_only() -> None:
    allowed = {"typer", *sys.stdlib_module_names}
    for name in ("errors.py", "__init__.py", "__main__.py"):
        foreign = set(_top_level_imports(TREES[PACKAGE / name])) - allowed
        assert foreign <= ({"alignkit"} if name == "__main__.py" else set()), name
    assert COMMAND_LINE
    for path in COMMAND_LINE:
        assert set(_top_level_imports(TREES[path])) - allowed <= {"alignkit"}, path


def test_of_alignkit_the_command_line_loads_only_how_a_command_ends() -> None:
    found = {
        node.module or "" for path in COMMAND_LINE for node in TREES[path].body if isinstance(node, ast.ImportFrom)
    }
    loaded = {name for name in found if name.startswith("alignkit") and not name.startswith("alignkit.cli.")}
    assert loaded == {"alignkit.errors"}


def test_public_names() -> None:
    assert alignkit.__all__ == ["__version__"]
    assert alignkit.__version__.count(".") == 2


def test_every_file_that_is_not_code_is_installed_with_the_package() -> None:
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]
    installed = {
        path for package, globs in patterns.items() if package != "alignkit.recipes" for glob in globs
        for path in PACKAGE.parent.joinpath(*package.split(".")).glob(glob)
    }  # fmt: skip
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == installed
