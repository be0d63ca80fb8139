from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import PUBLISHED, real_data

from alignkit.errors import RecipeError
from alignkit.feedback.constitution import Constitution, Principle, load_constitution

REPOSITORY = Path(__file__).resolve().parents[2]


def chi_square(counts: Counter[str], weights: dict[str, float]) -> float:
    total = sum(counts.values())
    means = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    return sum((counts[name] - mean) ** 2 / mean for name, mean in means.items())


def draw_many(constitution: Constitution, count: int = 20_000, seed: int = 0) -> Counter[str]:
    return Counter(constitution.draw(seed=seed, key=f"row {n // 4}", turn=n % 4).name for n in range(count))


def test_draws_follow_the_weights() -> None:
    for weights, seeds, bound in (
        ({f"p{number}": 1.0 for number in range(16)}, (0, 1, 2), 30.6),  # 15 degrees, p = 0.01
        ({"a": 1.0, "b": 3.0, "c": 0.5}, (0,), 9.2),  # 2 degrees, p = 0.01
    ):
        principles = [Principle(name=name, comparison="?", weight=weight) for name, weight in weights.items()]
        for seed in seeds:
            assert chi_square(draw_many(Constitution(tuple(principles)), seed=seed), weights) < bound


def test_draws_of_one_row_are_independent_of_each_other() -> None:
    constitution = Constitution(tuple(Principle(name=str(number), comparison="?") for number in range(4)))
    pairs = Counter(
        "".join(constitution.draw(seed=0, key=f"row {n}", turn=turn).name for turn in (0, 1)) for n in range(16_000)
    )
    assert len(pairs) == 16 and chi_square(pairs, dict.fromkeys(pairs, 1.0)) < 30.6


def test_a_draw_depends_on_seed_key_and_turn_only() -> None:
    constitution = load_constitution("builtin:harmlessness")
    drawn = [constitution.draw(seed=1, key=f"row {n}", turn=2).name for n in range(50)]
    assert drawn == [constitution.draw(seed=1, key=f"row {n}", turn=2).name for n in reversed(range(50))][::-1]
    assert drawn != [constitution.draw(seed=2, key=f"row {n}", turn=2).name for n in range(50)]
    # Pinned: the principles of a run that is resumed next year must be those of today.
    assert drawn[:3] == ["no-preaching", "no-stereotypes", "no-cruelty"]


@pytest.mark.parametrize("name", ["harmlessness", "helpfulness"])
def test_ours_have_every_part(name: str) -> None:
    constitution = load_constitution(f"builtin:{name}")
    assert len(constitution.principles) >= 10
    for principle in constitution.principles:
        assert principle.critique and principle.revision and principle.comparison and principle.tags
        assert principle.weight == 1.0


@real_data
def test_published_files_load_as_they_are() -> None:
    revisions = PUBLISHED / "prompts_CritiqueRevisionInstructions.json"
    comparisons = PUBLISHED / "prompts_RLMadisonInstructions.json"
    both = load_constitution([str(revisions), str(comparisons)])
    assert len(both.principles) == 32
    to_criticise = load_constitution([str(revisions), str(comparisons)], needs="critique")
    assert [p.name for p in to_criticise.principles] == [f"harmful{number}" for number in range(16)]
    for principle, item in zip(to_criticise.principles, json.loads(revisions.read_text()).values(), strict=True):
        assert item["prompt"] == [f"\n\nCritiqueRequest: {principle.critique}\n\nCritique:"]
        assert item["edit_request"] == f"\n\nRevisionRequest: {principle.revision}\n\nRevision:"
    to_compare = load_constitution([str(revisions), str(comparisons)], needs="comparison")
    texts = [f"\n{principle.comparison} Options:" for principle in to_compare.principles]
    assert texts == json.loads(comparisons.read_text())


@real_data
def test_published_examples_are_no_constitution() -> None:
    path = PUBLISHED / "prompts_RLMadisonFewShotPrompts.json"
    with pytest.raises(RecipeError, match="holds examples, not instructions; name it under examples:"):
        load_constitution(str(path))


ONE = "principles:\n  - {name: one, comparison: Which?}\n"


def problems_of(tmp_path: Path, text: str, name: str = "c.yaml") -> list[str]:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_constitution(str(path))
    return [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]


def test_every_mistake_is_named_at_once_with_its_line(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path,
        """name: mine
principels: []
principles:
  - name: one
    critique: What is wrong?
    revision: Make it right.
    comparision: Which is better?
  - name: two
    comparison: ""
    weight: 0
  - name: three
    critique: What is wrong?
  - name: four
  - comparison: Which?
  - name: one
    comparison: Which?
    tags: nice
""",
    )
    assert found == [
        "2: constitution.principels is not a key of constitution; did you mean principles?",
        "7: principles[0].comparision is not a key of principles[0]; did you mean comparison?",
        "9: principles[1].comparison is empty text",
        "10: principles[1].weight is 0; it must be greater than 0",
        "14: principles[4].name is missing; a short name, for the report",
        "17: principles[5].tags is nice; it must be a list",
        "11: principle three has a critique but no revision; the two go together",
        "13: principle four has no question; add comparison: (for labels), or critique: and revision:",
        "15: the name one is here twice, first in line 4; rename one",
    ]


def test_a_constitution_without_principles_is_refused(tmp_path: Path) -> None:
    missing = "constitution.principles is missing; a list of {name, critique, revision, comparison}"
    assert problems_of(tmp_path, "name: mine\n") == [f"1: {missing}"]
    assert problems_of(tmp_path, "principles: []\n") == ["1: principles is an empty list; give at least one entry"]
    assert problems_of(tmp_path, "[]\n") == ["1: must be a mapping with name and description and principles"]


def test_a_constitution_without_what_the_stage_needs_is_refused(tmp_path: Path) -> None:
    text = """principles:
  - {name: one, critique: a, revision: b, comparison: Which?}
  - {name: two, critique: a, revision: b}
"""
    assert problems_of(tmp_path, text) == [
        "3: principle two has no question to compare answers by; add comparison: (other principles have one)"
    ]
    path = tmp_path / "c.yaml"
    path.write_text(ONE)
    load_constitution(str(path), needs="comparison")
    with pytest.raises(RecipeError, match="no principle has a critique request and a revision request; add critique:"):
        load_constitution(str(path), needs="critique")


def test_names_that_are_not_there_suggest_the_nearest_and_are_unique(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean harmlessness"):
        load_constitution("builtin:harmlesness")
    for name in ("mine.yaml", "b.yaml"):
        (tmp_path / name).write_text(ONE)
    with pytest.raises(RecipeError, match=r"mnie.yaml: the constitution is not there; did you mean mine.yaml\?"):
        load_constitution(str(tmp_path / "mnie.yaml"))
    with pytest.raises(RecipeError, match="the principle one is also in .*mine.yaml; rename one"):
        load_constitution([str(tmp_path / "mine.yaml"), str(tmp_path / "b.yaml")])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{\n,}", "2: is not JSON"),
        ('{"harmful": {"prompt": "text"}}', "harmful: must be {prompt: [TEXT], edit_request: TEXT}"),
        ('["Choose."]', r"entry 0 is not '\n' + an instruction + ' Options:'"),
    ],
)
def test_json_of_another_shape_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (found,) = problems_of(tmp_path, text, "c.json")
    assert problem in found


def test_reading_a_constitution_loads_no_machine_learning_library() -> None:
    code = (
        "import sys; from alignkit.feedback.constitution import load_constitution as load, load_examples; "
        "load('builtin:harmlessness'); load_examples('builtin'); "
        "print([name for name in ('torch', 'transformers', 'openai', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"
