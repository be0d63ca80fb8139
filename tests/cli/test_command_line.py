from __future__ import annotations

import inspect
import json
import re

import pytest
import typer.main

import alignkit
from alignkit.cli import app

COMMANDS = [
    "sft", "rm", "dpo", "ppo", "init", "migrate", "rlaif", "run", "plan", "check", "preview", "schema", "doctor",
    "merge", "eval", "chat", "compare", "diff", "report",
]  # fmt: skip
STAGE_OPTIONS = [
    "--recipe", "--stage", "--out", "--set", "--dry-run", "--force", "--trust-code", "--allow-change", "--allow-key",
    "--json", "--retries", "--slurm", "--submit", "--node-rank", "--main-address", "--main-port",
]  # fmt: skip
LOADED = "import sys\nfrom alignkit.cli import main\ncode = main()\nprint(code, *sorted(sys.modules))"


def _loaded(run_python, *arguments: str) -> tuple[int, set[str]]:
    """Run a command and return its exit code with the top names of the modules it had loaded at the end."""
    done = run_python("-c", LOADED, *arguments)
    code, *modules = done.stdout.splitlines()[-1].split()
    return int(code), {module.split(".")[0] for module in modules}


def test_commands_are_those_that_work() -> None:
    assert list(typer.main.get_command(app).commands) == COMMANDS


@pytest.mark.parametrize("name", ["sft", "rm", "dpo", "ppo", "rlaif"])
def test_stage_commands_share_their_options(name: str) -> None:
    command = typer.main.get_command(app).commands[name]
    assert [parameter.opts[0] for parameter in command.params] == STAGE_OPTIONS
    assert all(parameter.help for parameter in command.params)


def test_every_command_has_one_line_of_help() -> None:
    for name, command in typer.main.get_command(app).commands.items():
        first = inspect.cleandoc(command.help or "").split("\n", 1)[0]
        assert first.endswith("."), name
        assert len(first) <= 100, name


def test_version(run_alignkit) -> None:
    done = run_alignkit("--version")
    assert done.returncode == 0
    assert re.fullmatch(rf"{alignkit.__version__} \((\w{{9}}(, changed)?|commit unknown)\)\n", done.stdout)


def test_help_loads_neither_pydantic_nor_torch(run_python) -> None:
    code, modules = _loaded(run_python, "--help")
    assert code == 0
    assert not modules & {"pydantic", "pydantic_core", "ruamel", "torch", "numpy", "transformers", "datasets"}


def test_bad_recipe_loads_no_torch(run_python, tmp_path) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\nmodel: {path: builtin:tiny-gpt2}\ndpo:\n  betta: 1\n")
    for command in ("check", "dpo"):
        code, modules = _loaded(run_python, command, "--recipe", "bad.yaml")
        assert code == 2
        assert not modules & {"torch", "numpy", "transformers", "trl", "datasets", "rich"}


NO_KEY = (
    "error: Invalid value: --allow-key has no effect here; name the key of a judge as evaluate.judge.api_key_env in a "
    "--recipe (see alignkit eval --help)\n"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dpo", "--recpe", "a"], "error: No such option: --recpe; did you mean --recipe? (see alignkit dpo --help)\n"),
        (["dop"], "error: No such command 'dop'. Did you mean 'dpo'? (see alignkit --help)\n"),
        (["dpo"], "error: Missing option '--recipe' / '-r' (see alignkit dpo --help)\n"),
        (["eval", "x", "--allow-key", "MY_TOKEN"], NO_KEY),
        (
            [
                "eval",
                "x",
                "--against",
                "y",
                "--judge",
                "http://h/v1",
                "--judge-name",
                "m",
                "--constitution",
                "builtin:helpfulness",
                "--allow-key",
                "MY_TOKEN",
            ],
            NO_KEY,
        ),
        (["dpo", "-r", "a", "b"], "error: Got unexpected extra argument(s) (b) (see alignkit dpo --help)\n"),
    ],
)
def test_usage_error_is_one_line_and_exit_code_2(run_alignkit, arguments: list[str], message: str) -> None:
    done = run_alignkit(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_bare_command_shows_help_once(run_alignkit) -> None:
    done = run_alignkit()
    assert done.returncode == 2
    assert done.stdout.count("Usage:") + done.stderr.count("Usage:") == 1
    assert "error" not in done.stderr


def test_a_recipe_may_stand_behind_the_command_s_name(run_alignkit, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {path: builtin:tiny-gpt2}\nsft: {data: builtin:instructions}\n")
    done, same = (run_alignkit("sft", *given, "--dry-run") for given in (["mine.yaml"], ["-r", "mine.yaml"]))
    assert done.returncode == 0 and (done.stdout, done.stderr) == (same.stdout, same.stderr)
    assert "mine2.yaml" in run_alignkit("check", "mine2.yaml").stderr


def test_unknown_key_is_one_message_with_its_line(run_alignkit, tmp_path) -> None:
    recipe = "name: bad\nmodel: {path: builtin:tiny-gpt2}\ndpo:\n  data: {path: builtin:preferences}\n  betta: 1\n"
    (tmp_path / "bad.yaml").write_text(recipe)
    done = run_alignkit("dpo", "-r", "bad.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: bad.yaml:5: ")
    assert done.stderr.count("betta") == 1
    assert "did you mean" in done.stderr and "beta" in done.stderr


def test_schema_is_json_schema_of_the_recipe(run_alignkit) -> None:
    done = run_alignkit("schema")
    assert done.returncode == 0, done.stderr
    schema = json.loads(done.stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert {"model", "sft", "rm", "dpo", "lora"} <= set(schema["properties"])


def test_migrate_writes_recipes_and_a_report_of_every_key(run_alignkit, tmp_path) -> None:
    (tmp_path / "a.sh").write_text("openrlhf.cli.train_sft --data.dataset org/d --model.model_name_or_path org/m\n")
    (tmp_path / "b.yaml").write_text("services: {}\n")
    done = run_alignkit("migrate", "a.sh", "b.yaml", "--out", "new", "--gpus", "2")
    assert done.returncode == 2 and done.stderr.startswith("error: b.yaml: is not recognised as a training recipe")
    assert done.stdout.startswith("new/a.yaml from a.sh (OpenRLHF): 0 same, 1 renamed, 1 converted, 0 automatic, 0 not")
    assert "model.model_name_or_path" in done.stdout and "batch_size: 16" in (tmp_path / "new" / "a.yaml").read_text()
    again = run_alignkit("migrate", "a.sh", "--out", "new")
    assert (again.returncode, again.stderr) == (
        2, "error: new/a.yaml: is there already; --force writes over it, --out elsewhere\n"
    )  # fmt: skip
    done = run_alignkit("migrate", "a.sh", "--out", "new", "--force", "--json")
    (made,) = json.loads(done.stdout)
    assert done.returncode == 0 and made["recipe"] == "new/a.yaml" and len(made["keys"]) == 2


def test_schema_into_a_closed_pipe_says_nothing(run_python) -> None:
    script = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-m', 'alignkit', 'schema'], stdout=subprocess.PIPE,"
        " stderr=subprocess.PIPE, text=True)\n"
        "p.stdout.close()\n"
        "print(repr(p.stderr.read()))\n"
    )
    assert run_python("-c", script).stdout == "''\n"


def test_a_preview_is_text_a_page_or_json_and_loads_no_weights(run_alignkit, tmp_path) -> None:
    """The recipe's stage starts from one that is not trained yet."""
    chat = [{"role": "user", "content": "Say <b>hello</b>."}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (tmp_path / "r.yaml").write_text(
        "name: seen\nmodel: {path: builtin:tiny-llama}\nsft: {data: ./rows.jsonl}\n"
        "second: {method: sft, start_from: sft, data: ./rows.jsonl}\n"
    )
    done = run_alignkit("preview", "-r", "r.yaml", "--stage", "second")
    assert done.returncode == 0, done.stderr
    assert "[[Hello.<|im_end|>]]" in done.stdout and "nothing looks wrong" in done.stdout
    as_json = json.loads(run_alignkit("preview", "-r", "r.yaml", "--stage", "sft", "--json").stdout)
    learnt = as_json["rows"][0]["sequences"][0]["spans"][1]
    assert (learnt["kind"], "".join(learnt["tokens"])) == ("learnt", "Hello.<|im_end|>")
    assert learnt["special"] == [len(learnt["tokens"]) - 1]
    done = run_alignkit("preview", "-r", "r.yaml", "--stage", "sft", "--html", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert done.returncode == 0 and "Nothing looks wrong" in page and "<b>hello" not in page
    done = run_alignkit("preview", "-r", "r.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "name one with --stage: sft, second" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_flags_take_no_value_in_the_help(run_alignkit) -> None:
    for words in ([], ["sft"], ["doctor"]):
        assert "<bool>" not in run_alignkit(*words, "--help").stdout


def test_a_column_that_is_renamed_wrongly_and_a_run_that_is_not_there_say_what_is(run_alignkit, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    data = "{path: rows.jsonl, columns: {prompt: quetsion, completion: answer}}"
    (tmp_path / "mine.yaml").write_text(f"model: {{path: builtin:tiny-gpt2}}\nsft: {{data: {data}}}\n")
    said = run_alignkit("check", "mine.yaml").stderr
    assert "quetsion: is missing (columns.prompt); the row has question, answer; did you mean question?" in said
    (tmp_path / "runs/demo/sft").mkdir(parents=True)
    (tmp_path / "runs/demo/sft/stage.json").write_text("{}")
    assert run_alignkit("report", "gone").stderr == "error: gone: holds no run; the runs here are runs/demo/sft\n"
