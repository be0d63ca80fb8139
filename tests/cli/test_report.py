"""`alignkit report` as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from written_runs import WriteRun, writer


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    return writer(tmp_path)


def test_a_run_gets_its_page_and_its_card(write_run: WriteRun, run_alignkit) -> None:
    run = write_run()
    done = run_alignkit("report", "runs/demo/sft")
    assert (done.returncode, done.stderr) == (0, "")
    paths = f"report: {run}/report.html\ncard: {run}/model/README.md\n"
    fell = "[better] sft's loss on its 10 held-out rows fell: 0.525 at step 4, 0.175 at step 12"
    assert done.stdout == f"{fell}\n{paths}"


def test_a_recipe_file_stands_for_its_stages(write_run: WriteRun, run_alignkit, tmp_path: Path) -> None:
    write_run()
    rows = "data: {path: builtin:instructions}"
    (tmp_path / "demo.yaml").write_text(
        f"model: {{path: builtin:tiny-gpt2}}\nsft: {{{rows}}}\nother: {{method: sft, {rows}}}\nstages: [sft, other]\n"
    )
    done = run_alignkit("report", "demo.yaml", "--out", "pages/demo.html", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["report"], [each["stage"] for each in shown["verdicts"]]) == ("pages/demo.html", ["sft"])
    assert shown["verdicts"][0]["verdict"] == "better" and shown["verdicts"][0]["says"].startswith("sft's loss")
    assert "1 of 2 stages finished" in (tmp_path / "pages" / "demo.html").read_text()


def test_what_is_no_run_is_one_line(run_alignkit) -> None:
    done = run_alignkit("report", "nothing/here")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line == "error: nothing/here: holds no run; name a run directory such as runs/demo/sft, or runs/demo"


def test_it_loads_neither_torch_nor_transformers(write_run: WriteRun, run_python) -> None:
    write_run()
    script = "import sys\nfrom alignkit.cli import main\nprint(main(), *sorted(sys.modules))"
    code, *modules = run_python("-c", script, "report", "runs/demo/sft").stdout.splitlines()[-1].split()
    assert code == "0" and not {"torch", "transformers", "datasets", "matplotlib"} & set(modules)


def test_watch_keeps_the_page_up_to_date_until_the_run_ends(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(finished=False, num_steps=7, stage={"trl": {"max_steps": 20}})
    command = [sys.executable, "-m", "alignkit", "report", "runs/demo/sft", "--watch"]
    watching = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait(text: str) -> str:
        deadline = time.monotonic() + 30
        while text not in (page := (run / "report.html").read_text() if (run / "report.html").is_file() else ""):
            assert time.monotonic() < deadline and watching.poll() is None
            time.sleep(0.1)
        return page

    assert '<meta http-equiv="refresh" content="3">' in wait("at step 7 of 20")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 0.1}\n')
    wait("at step 9 of 20")
    (run / "result.json").write_text('{"stage": "sft", "status": "finished", "step": 20, "metrics": {}}')
    stdout, stderr = watching.communicate(timeout=30)
    assert (watching.returncode, stderr.count("watching: open file://")) == (0, 1)
    page = (run / "report.html").read_text()
    assert "sft's loss on its 10 held-out rows" in stdout and 'http-equiv="refresh"' not in page
    assert (run / "model/README.md").is_file()
