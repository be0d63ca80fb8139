"""Audits of rows and settings: what is found, with its number and place, and that shipped recipes raise no alarm."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from alignkit.data.audit import PUBLISHED, RowAudit, audit_rows, compare_settings
from alignkit.data.rows import Row
from alignkit.recipe import load_recipe, resolve
from alignkit.recipe.methods import FEEDBACK
from alignkit.recipe.schema import DataSource

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
Lines = Callable[..., object]


def audit(*rows: Row) -> RowAudit:
    found = RowAudit()
    for row in rows:
        found.add(row)
    return found


def pair(prompt: str, chosen: str, rejected: str, place: str, label: float | None = None) -> Row:
    return Row("pair", prompt, (chosen, rejected), label=label, place=place)


def sentence(draw: random.Random, words: int = 40) -> list[str]:
    return [f"word{draw.randrange(3000)}" for _ in range(words)]


def text(place: str, words: list[str]) -> Row:
    return Row("text", "", (" ".join(words),), place=place)


def test_a_pair_turned_round_and_a_label_that_changed_are_contradictions() -> None:
    found = audit(
        pair("q", "yes", "no", "a:1"), pair("q", "yes", "no", "a:2"), pair("q", "no", "yes", "a:3"),
        pair("q", "no", "yes", "a:4", label=0.1), pair("other", "no", "yes", "a:5"),
        pair("q", "x", "y", "a:6", label=0.5),
        Row("ranked", "r", ("best", "good", "as good"), (2.0, 1.0, 1.0), place="a:7"),
        Row("ranked", "r", ("good", "best"), (2.0, 1.0), place="a:8"),
        Row("labelled", "", ("fine",), answer="good", place="a:9"),
        Row("labelled", "", ("fine",), answer="bad", place="a:10"),
        Row("unpaired", "u", ("v",), label=1.0, place="a:11"), Row("unpaired", "u", ("v",), label=0.0, place="a:12"),
    )  # fmt: skip
    assert found.contradictions == ["a:3", "a:8", "a:10", "a:12"]
    assert found.advise() == [
        "4 rows say the opposite of an earlier one with the same prompt and answers, first a:3",
        "2 of 10 comparisons are ties (label 0.5, or equal scores), which prefer no answer",
    ]


def test_near_duplicates_are_found_and_equal_rows_layout_and_short_texts_are_not() -> None:
    draw = random.Random(0)
    texts = [sentence(draw) for _ in range(500)]
    almost = list(texts[7])
    almost[20] = "changed"  # one word of forty: 5 of 36 runs
    half = texts[8][:20] + sentence(draw, 20)
    rows = [text(f"a:{number}", words) for number, words in enumerate(texts)]
    rows += [text("b:1", almost), text("b:2", half), text("b:3", texts[9]), text("b:4", ["too", "short"])]
    assert audit(*rows).find_near_duplicates() == [("b:1", "a:7")]
    layout = sentence(draw, 60)  # an instruction that all rows have
    assert audit(*(text(f"c:{number}", layout + words) for number, words in enumerate(texts))).advise() == []
    copies = audit(*(text(f"d:{number}", [*texts[number % 400], "end", str(number)]) for number in range(500)))
    assert copies.advise() == ["100 of 500 rows are nearly an earlier one, first d:400 as d:0"]
    assert audit().find_near_duplicates() == []


def test_prompts_held_out_of_one_stage_and_trained_on_by_an_earlier_one_are_leaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [{"prompt": f"Question number {number}?", "completion": f"Answer {number}."} for number in range(40)]
    judged = [{"prompt": row["prompt"], "chosen": "Yes.", "rejected": "No."} for row in asked]
    lines("sft.jsonl", asked)
    lines("dpo.jsonl", judged[20:])
    lines("held.jsonl", [*judged[:5], {"prompt": "Quite another one?", "chosen": "Yes.", "rejected": "No."}])
    lines("eval.jsonl", [*asked[30:33], {"prompt": "New?", "completion": "Yes."}])
    Path("a.yaml").write_text(
        "model: builtin:tiny-gpt2\nsft: {data: sft.jsonl}\ndpo: {start_from: sft, data: dpo.jsonl, eval: held.jsonl}\n"
    )
    recipe = load_recipe(Path("a.yaml"))
    sft, dpo = (resolve(recipe, name) for name in ("sft", "dpo"))
    assert audit_rows([sft, dpo], [DataSource(path="eval.jsonl")], max_rows=3) == {
        "sft": [],
        "dpo": ["5 of 6 held-out prompts are trained on by sft, first held.jsonl:1"],
        "evaluate": ["3 of 3 prompts of the evaluation are trained on by sft, first eval.jsonl:1",
                     "3 of 3 prompts of the evaluation are trained on by dpo, first eval.jsonl:1"],
    }  # fmt: skip
    assert audit_rows([sft, replace(dpo, start_stage=None)])["dpo"] == []  # it starts from another model


def test_settings_beyond_published_ones_are_named_with_their_source(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"

    def compare(text: str) -> list[str]:
        path.write_text(text)
        recipe = load_recipe(path)
        return [said for name in recipe.stage_names for said in compare_settings(resolve(recipe, name))]

    def known(method: str, key: str, lora: bool | None = None) -> str:
        (row,) = (row for row in PUBLISHED if (row["method"], row.get("lora"), row["key"]) == (method, lora, key))
        return f"what published recipes of {method}{' with LoRA' if lora else ''} take: {row['source']}"

    full = "model: org/model\nsft: {data: a/b, learning_rate: 2e-3}\n"
    full += "dpo: {data: a/b, learning_rate: 1e-4, beta: 2, num_train_epochs: 5}\n"
    assert compare(full) == [
        f"sft.learning_rate is 0.002, above {known('sft', 'learning_rate', False)}",
        f"dpo.learning_rate is 0.0001, above {known('dpo', 'learning_rate', False)}",
        f"dpo.beta is 2, above {known('dpo', 'beta')}",
        f"dpo.num_train_epochs is 5, above {known('dpo', 'num_train_epochs')}",
    ]
    lora = "model: org/model\nlora: {}\nsft: {data: a/b, learning_rate: 2e-5}\n"
    lora += "dpo: {data: a/b, loss_type: ipo, beta: 2}\n"  # another loss has another beta
    assert compare(lora) == [f"sft.learning_rate is 2e-05, below {known('sft', 'learning_rate', True)}"]
    stage = resolve(load_recipe(path), "sft")
    assert compare_settings(stage, num_parameters=135_000_000) == compare_settings(stage) == compare(lora)
    assert compare_settings(stage, num_parameters=2_000_000) == []
    assert compare(full.replace("org/model", "builtin:tiny-gpt2")) == []  # tiny models take large steps


@pytest.mark.parametrize(
    "path", sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("papers/*/*.yaml")]), ids=lambda path: path.stem
)
def test_shipped_recipes_raise_no_alarm(path: Path) -> None:
    recipe = load_recipe(path)
    stages = [stage for name in recipe.stage_names if (stage := resolve(recipe, name)).method not in FEEDBACK]
    # What base.yaml makes is tiny, and not here.
    known = [stage for stage in stages if "/runs/" not in stage.model.path]
    said = [advice for stage in known for advice in compare_settings(stage)]
    here = [stage for stage in stages if all(source.path.startswith("builtin:") for source in stage.options.data)]
    evaluation = [source for source in recipe.evaluate.data or () if source.path.startswith("builtin:")]
    found = audit_rows(here, evaluation, max_rows=recipe.evaluate.max_rows)
    assert said + [advice for name in found for advice in found[name]] == []


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_less_than_twenty_seconds() -> None:
    draw = random.Random(0)
    texts = [[" ".join(sentence(draw, words)) for words in (20, 60, 60)] for _ in range(100_000)]
    rows = [pair(*three, f"a:{number}") for number, three in enumerate(texts)]
    before = time.process_time()
    assert audit(*rows).advise() == []
    assert time.process_time() - before < 20
