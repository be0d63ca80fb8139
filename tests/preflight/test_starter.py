from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from alignkit.errors import DataError, RecipeError, UsageError
from alignkit.preflight.check import check_recipe
from alignkit.preflight.starter import write_starter
from alignkit.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
PAIR = {"question": "Which?", "chosen": "This one.", "rejected": "That."}
JUDGED = {"prompt": "Which?", "completion": "This one.", "label": True}


def _start(path: str, *, source: str = "start", model=None, data=None, method: str | None = None) -> Recipe:
    if data is not None:
        Path("rows").mkdir(exist_ok=True)
        Path("rows/rows.jsonl").write_text(json.dumps(data) + "\n")
    write_starter(Path(path), source=source, model=model, data="rows/rows.jsonl" if data else None, method=method)
    return load_recipe(path)


@pytest.mark.parametrize(
    ("given", "stages", "line"),
    [
        ({}, ["sft", "rm", "dpo", "ppo"], "  data: builtin:instructions"),
        ({"data": PAIR}, ["dpo"], '  data: "rows/rows.jsonl"  # columns question, chosen, rejected: read as trl pair'),
        ({"data": PAIR, "method": "rm"}, ["rm"], '  data: "rows/rows.jsonl"  # columns question, chosen, rejected:'),
        ({"data": JUDGED}, ["dpo"], "  loss_type: kto  # for single answers with a label"),
        ({"data": {"prompt": "Which?"}}, ["ppo"], "columns prompt: read as trl prompt"),
        ({"source": "smollm2-cpu", "model": "builtin:tiny-llama"}, ["sft"], str(ROOT / "recipes/smollm2-cpu.jsonl")),
        ({"source": "llama-qlora", "model": "builtin:tiny-llama", "data": PAIR}, ["dpo"], "extends: builtin:launch/"),
    ],
)  # fmt: skip
def test_what_init_writes_passes_check(tmp_path, monkeypatch, given, stages, line) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = _start("mine.yaml", **given)
    text = Path("mine.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n") and line in text
    assert json.loads(Path("recipe.schema.json").read_text())["title"] == "alignkit recipe"
    assert recipe.name == "mine" and recipe.stage_names == stages
    if given.get("source") != "llama-qlora":  # nf4 is slow here
        assert check_recipe(recipe).error() is None


def test_every_shipped_recipe_can_be_cut_to_one_method_and_filled(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        name = path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
        for method in (None, "sft", "rm", "dpo", "ppo") if path.parent.name != "launch" else ():
            try:
                recipe = _start("x.yaml", source=name, method=method, data=PAIR, model="builtin:tiny-llama")
            except RecipeError as error:
                assert re.search(rf"{name} has no {method or 'dpo|sft'} stage, only [\w, ]+; name another", str(error))
            else:
                assert len(recipe.stage_names) == 1 and recipe.model.path == "builtin:tiny-llama"
            Path("x.yaml").unlink(missing_ok=True)


def test_what_init_refuses(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"has columns prompt, completion, label: .*; rm does not take such rows, dpo,"):
        _start("a.yaml", data=JUDGED, method="rm")
    with pytest.raises(RecipeError, match="smollm2-cpu has no dpo stage, only sft"):
        _start("a.yaml", source="smollm2-cpu", method="dpo")
    with pytest.raises(UsageError, match=r"owner/rows is on the hub .*; name what is trained: dpo, sft, rm, ppo"):
        write_starter(Path("a.yaml"), source="start", model=None, data="owner/rows", method=None)
    with pytest.raises(RecipeError, match=r"builtin:tiny-cpi is no recipe .*; did you mean tiny-cpu\?"):
        _start("a.yaml", source="tiny-cpi")
    Path("a.yaml").touch()
    with pytest.raises(UsageError, match="is there already; name another file"):
        _start("a.yaml")


@pytest.mark.slow
def test_a_wheel_holds_the_recipes_and_its_commit_and_starts_away_from_the_clone(tmp_path) -> None:
    pytest.importorskip("setuptools", reason="builds a wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "clone" / name, follow_symlinks=False)
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm one"):
        subprocess.run(["git", *command.split()], cwd=tmp_path / "clone", check=True)
    head = ["git", "rev-parse", "--short=9", "HEAD"]  # as .github/workflows/release.yml
    commit = subprocess.run(head, cwd=tmp_path / "clone", capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "clone/alignkit/COMMIT").write_text(commit + "\n")
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "clone", check=True, capture_output=True)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path / "installed")
    shutil.rmtree(tmp_path / "clone")
    files = [path for path in ROOT.glob("recipes/**/*") if path.suffix in (".yaml", ".jsonl")]
    shipped = {path.relative_to(ROOT / "recipes") for path in files}
    assert shipped and not [path for path in shipped if not (tmp_path / "installed/alignkit/recipes" / path).is_file()]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "HF_HUB_OFFLINE": "1"}
        (tmp_path / "empty").mkdir(exist_ok=True)
        return subprocess.run([sys.executable, "-m", "alignkit", *words], cwd=tmp_path / "empty", env=environment,
                              capture_output=True, text=True, timeout=300)  # fmt: skip

    assert commit in run("--version").stdout
    done = run("sft", "builtin:smoke")
    assert done.returncode == 0 and (tmp_path / "empty/runs/smoke/sft/model").is_dir(), done.stderr
