"""Whatever a reward function does wrong is one message that names it, the answer and the remedy."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignkit.errors import NonFiniteError, RewardError
from alignkit.recipe import Stage, load_recipe, resolve
from alignkit.rewards import Workspace
from alignkit.rewards.kinds.function import FunctionReward

RECIPE = """model: {path: builtin:tiny-gpt2}
ppo:
  reward: {function: "FUNCTION"}
  reward_timeout: 0.4
  data: builtin:prompts
"""
PROMPTS, ANSWERS = ["What is red?", "What is blue?"], ["an apple", "the sky"]
Load = Callable[..., FunctionReward]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Write a module beside a recipe and load a function of it, as a stage does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(code: str, path: str = "score_it:score", *, trust: bool = True) -> FunctionReward:
        (tmp_path / "score_it.py").write_text(code)
        stage = make_stage(tmp_path, path, trust=trust)
        where = stage.where("ppo.reward")
        space = Workspace(trust_code=trust, folder=tmp_path, stage=stage, where=where)
        return FunctionReward(stage.options.reward[0], space)  # type: ignore[attr-defined]

    yield run
    written = [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]
    for name in written:
        del sys.modules[name]


def make_stage(folder: Path, path: str, *, trust: bool) -> Stage:
    recipe = folder / "a.yaml"
    recipe.write_text(RECIPE.replace("FUNCTION", path))
    return resolve(load_recipe(recipe), trust_code=trust)


def complain(function: FunctionReward, **columns: list[object]) -> str:
    with pytest.raises((RewardError, NonFiniteError)) as caught:
        function(PROMPTS, ANSWERS, columns)
    return str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "value", "scores"),
    [
        ("**columns", "[len(w) for w in columns['wanted']]", [3.0, 5.0]),
        ("wanted, other=None", "[float(len(w)) for w in wanted]", [3.0, 5.0]),  # only the columns it names
        ("**columns", "numpy.array([1, 2])", [1.0, 2.0]),
        ("**columns", "torch.tensor([1.0, 2.0])", [1.0, 2.0]),
        ("**columns", "(True, 2)", [1.0, 2.0]),
        ("**columns", "[numpy.float32(1), 2]", [1.0, 2.0]),
    ],
)
def test_a_function_gets_columns_and_gives_numbers(load: Load, parameters: str, value: str, scores: list) -> None:
    function = load(f"import numpy, torch\ndef score(prompts, completions, {parameters}):\n    return {value}\n")
    assert function(PROMPTS, ANSWERS, {"wanted": ["red", "blue!"], "unused": [0, 0]}) == scores


@pytest.mark.parametrize(
    "parameters",
    ["completions, **columns", "completions, prompts, wanted", "completions, wanted, **columns",
     "*, completions, wanted"],
)  # fmt: skip
def test_a_function_written_for_trl_gets_everything_by_name(load: Load, parameters: str) -> None:
    function = load(f"def score({parameters}):\n    assert 'wanted' not in vars() or wanted == [3, 4]\n"
                    "    assert 'prompts' not in vars() or prompts == ['What is red?', 'What is blue?']\n"
                    "    return [len(text) for text in completions]\n")  # fmt: skip
    assert function(PROMPTS, ANSWERS, {"wanted": [3, 4], "unused": [0, 0]}) == [8.0, 7.0]


@pytest.mark.parametrize("parameters", ["a, completions, wanted", "a, said, /, wanted", "a, said, *, wanted"])
def test_other_names_get_prompts_and_answers_in_this_order(load: Load, parameters: str) -> None:
    said = "completions" if "completions" in parameters else "said"
    function = load(f"def score({parameters}):\n    assert wanted == [3, 4] and a[0] == 'What is red?'\n"
                    f"    return [len(text) for text in {said}]\n")  # fmt: skip
    assert function(PROMPTS, ANSWERS, {"wanted": [3, 4]}) == [8.0, 7.0]


def test_what_it_changes_or_prints_stays_its_own(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    function = load("def score(prompts, completions):\n    print('hi')\n    prompts.clear()\n    return [1, 2]\n")
    prompts = list(PROMPTS)
    function(prompts, ANSWERS, {})
    assert prompts == PROMPTS
    assert capsys.readouterr() == ("", "hi\n")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1.0]", "returned 1 rewards for 2 answers"),
        ("None", "returned NoneType; it must return a list of 2 numbers"),
        ("1.0", "returned float; it must return a list of 2 numbers"),
        ("[1, 'good']", "returned 'good' for answer 1 ('What is blue?'); it must be a number"),
        ("[1, None]", "returned None for answer 1 ('What is blue?'); it must be a number"),
        ("[1j, 1]", "returned 1j for answer 0 ('What is red?'); it must be a number"),
        ("[numpy.ones(2), 1]", "returned array([1., 1.]) for answer 0 ('What is red?'); it must be a number"),
        ("[10**400, 1]", "returned an integer of 1329 bits for answer 0 ('What is red?'); it must be a number a float "
         "can hold"),
        ("[float('nan'), 1]", "returned nan for answer 0 ('What is red?'); a reward must be finite"),
        ("[1, -float('inf')]", "returned -inf for answer 1 ('What is blue?'); a reward must be finite"),
    ],
)  # fmt: skip
def test_a_wrong_answer_of_a_function_is_one_message(load: Load, value: str, message: str) -> None:
    function = load(f"import numpy\ndef score(prompts, completions):\n    return {value}\n")
    with pytest.raises((RewardError, NonFiniteError)) as caught:
        function(PROMPTS, ANSWERS, {})
    assert str(caught.value) == f"a.yaml:3: the reward function score_it:score {message}"
    assert caught.value.exit_code == (3 if "finite" in message else 2)


def test_an_exception_is_named_with_its_line(load: Load, tmp_path: Path) -> None:
    function = load("def score(prompts, completions):\n    return {}['nothing']\n")
    assert complain(function) == (
        f"a.yaml:3: the reward function score_it:score raised KeyError: 'nothing' at {tmp_path / 'score_it.py'}:2"
    )
    del sys.modules["score_it"]
    assert "raised SystemExit: 3 at " in complain(load("def score(prompts, completions):\n    raise SystemExit(3)\n"))


@pytest.mark.parametrize(
    "body",
    [
        "import time; time.sleep(30)",
        "exec('while True: pass')",
        "import threading; threading.Event().wait(30)",
        "exec('''import time\nwhile True:\n    try:\n        time.sleep(30)\n    except Exception:\n        pass''')",
    ],
    ids=["sleeps", "loops", "waits", "swallows"],
)
def test_a_function_that_hangs_is_stopped_and_leaves_nothing_running(load: Load, body: str) -> None:
    function = load(f"def score(prompts, completions):\n    {body}\n")
    before, threads, began = signal.getsignal(signal.SIGALRM), threading.active_count(), time.monotonic()
    assert complain(function) == (
        "a.yaml:3: the reward function score_it:score did not return within 0.4 s for 2 answers; make it faster, or "
        "raise reward_timeout"
    )
    assert time.monotonic() - began < 3
    assert threading.active_count() == threads
    time.sleep(1.2)  # no alarm is left that would end something else
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_column_it_needs_and_the_rows_do_not_have(load: Load) -> None:
    function = load("def score(prompts, completions, wanted):\n    return [1, 2]\n")
    assert complain(function, wantd=[1, 2]) == (
        "a.yaml:3: the reward function score_it:score needs the column wanted; did you mean wantd?; the rows have wantd"
    )


@pytest.mark.parametrize(
    ("code", "path", "message"),
    [
        ("", "score_it:scoer", "scoer is not there in score_it"),
        ("def score(): ...", "score_it:scoer", "scoer is not there in score_it; did you mean score?"),
        ("score = 3", "score_it:score", "score is not a function in score_it"),
        ("", "no_such_module:score", "there is no module no_such_module, on sys.path or in "),
        ("", "score_it.deeper:score", "there is no module score_it.deeper, on sys.path or in "),
        ("", "score_it.py:score", "a module is named without .py: score_it:score"),
        ("import not_installed_x", "score_it:score", "score_it imports not_installed_x, which is not there"),
        ("1 / 0", "score_it:score", "importing score_it raised ZeroDivisionError: division by zero at "),
        ("def score(:", "score_it:score", "importing score_it raised SyntaxError: "),
        ("import time; time.sleep(9)", "score_it:score", "score_it takes longer than 0.5 s"),
    ],
)
def test_a_function_that_cannot_be_had(
    load: Load, monkeypatch: pytest.MonkeyPatch, code: str, path: str, message: str
) -> None:
    monkeypatch.setattr("alignkit.rewards.kinds.function._IMPORT_SECONDS", 0.5)
    with pytest.raises(RewardError) as caught:
        load(code, path)
    assert message in str(caught.value) and str(caught.value).startswith(f"a.yaml:3: the reward function {path}")


@pytest.mark.parametrize("code", ["def broken(:", "raise SystemExit(0)", "1 / 0"])
def test_the_fingerprint_of_a_function_whose_package_cannot_be_imported_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "bad_package").mkdir()
    (tmp_path / "bad_package" / "__init__.py").write_text(code)
    stage = make_stage(tmp_path, "bad_package.part:score", trust=True)
    assert FunctionReward.fingerprint(stage.options.reward[0], stage) is None  # type: ignore[attr-defined]


def test_code_needs_trust(load: Load, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(RewardError, match="is code, which a recipe cannot allow; .* --trust-code"):
        load(f"open({str(marker)!r}, 'w')\n", trust=False)
    assert not marker.exists()


def test_the_fingerprint_is_that_of_the_file(load: Load, tmp_path: Path) -> None:
    load("def score(prompts, completions):\n    return [1, 2]\n")
    stage = make_stage(tmp_path, "score_it:score", trust=True)
    source = stage.options.reward[0]  # type: ignore[attr-defined]
    before = FunctionReward.fingerprint(source, stage)
    assert before is not None
    (tmp_path / "score_it.py").write_text("def score(prompts, completions):\n    return [1, 3]\n")
    assert FunctionReward.fingerprint(source, stage) not in (None, before)
