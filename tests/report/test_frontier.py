"""Reward against KL on the page of a recipe, from eval.json files written by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from browser import CHROMIUM, Browser, open_browser
from written_runs import HOSTILE, WriteRun, figure, writer

from alignkit.report.charts import Frontier, draw_frontier, draw_frontier_file, judge_frontier, read_frontiers
from alignkit.report.facts import Facts, find_runs
from alignkit.report.publish import write_report

HOW = {"rows": 48, "temperature": 1.0, "max_new_tokens": 48}
DATA = "builtin:prompts[test]"


def optimum(betas: tuple[float, ...] = (2.0, 1.0, 0.5, 0.2, 0.1, 0.05), **more: Any) -> list[dict[str, Any]]:
    """Return figures of a reference with reward 0 and variance 1 whose rewards are normal: reward is sqrt(2 KL).

    The optimum at beta has reward 1 / beta, KL 1 / (2 beta^2) and value 1 / (2 beta); everything a tenth.
    """
    settings = {**HOW, "seed": 0, "reward": "true_reward", "answers": 256, **more}
    curve = [
        {"beta": beta / 10, "kl": 0.5 / beta**2, "reward": 0.1 / beta, "value": 0.05 / beta, "low": 0.05 / beta - 0.01,
         "high": 0.05 / beta + 0.01, "effective": 50.0, "effective_lowest": 20.0}
        for beta in betas
    ]  # fmt: skip
    start = figure("reference_reward", 0.0, -0.01, 0.01, data=DATA, settings=settings, details=curve)
    best = {**settings, "kl": 0.636}
    return [
        start,
        figure("best_of_n", 0.05, 0.04, 0.06, data=DATA, slice="N=4", settings=best),
        figure("best_of_n_kl", 0.6, 0.58, 0.62, data=DATA, slice="N=4", settings=settings),
    ]


def policy(kl: float, reward: float, *, half: float = 0.02, **how: Any) -> list[dict[str, Any]]:
    settings = {**HOW, "seed": 0, "samples": 8, **how}
    reference = {"reference": "runs/demo/sft/model"}
    return [
        figure("true_reward", reward, reward - half, reward + half, data=DATA, settings=settings),
        figure("kl", kl, kl * 0.9, kl * 1.1, data=DATA, settings=settings | reference),
    ]


def write_all(directory: Path, policies: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]]) -> Path:
    write: WriteRun = writer(directory)
    runs = write("sft", "sft", evaluation=optimum()).parent
    for name, (method, more, evaluation) in policies.items():
        stage = {"trainer": {}, "options": {"data": []}} | more
        write(name, method, start_stage="sft", stage=stage, evaluation=evaluation)
    return runs


def dpo(beta: float) -> dict[str, Any]:
    return {"trainer": {"beta": beta}}


def ppo(kl_coef: float, model: str = "builtin:true-reward") -> dict[str, Any]:
    return {"options": {"kl_coef": kl_coef, "reward": [{"model": model, "weight": 1.0}], "data": []}}


POLICIES = {
    "dpo-1": ("dpo", dpo(0.5), policy(0.9, 0.10)),
    "dpo-2": ("dpo", dpo(0.1), policy(6.0, 0.25)),
    "ppo-1": ("ppo", ppo(0.05), policy(2.0, 0.19)),
    "ppo-2": ("ppo", ppo(0.05, "runs/demo/rm/model"), policy(3.0, 0.18)),
}


def read(runs: Path) -> Frontier:
    (frontier,) = read_frontiers([Facts(run) for run in find_runs(runs)])
    return frontier


def test_points_have_method_strength_and_the_optimum_at_their_kl(tmp_path: Path) -> None:
    frontier = read(write_all(tmp_path, POLICIES))
    found = [(point.series, point.label, point.run, point.kl.value) for point in frontier.points]
    assert found == [
        ("DPO", "0.5", "dpo-1", 0.9), ("DPO", "0.1", "dpo-2", 6.0), ("PPO, rm", "0.05", "ppo-2", 3.0),
        ("PPO, true reward", "0.05", "ppo-1", 2.0), ("best of N", "4", "", 0.6),
    ]  # fmt: skip
    # At KL 2 the line of beta 0.05 touches: 0.05 / 0.5 + 0.05 x 2 = 0.2, as the reward 0.1 / 0.5 of that optimum.
    (ppo_gt,) = (point for point in frontier.points if point.run == "ppo-1")
    assert ppo_gt.optimum.value == pytest.approx(0.2)
    assert ppo_gt.gap.value == pytest.approx(0.01)
    assert (ppo_gt.gap.high - ppo_gt.gap.low) / 2 == pytest.approx(math.hypot(0.02, 0.01, 0.05 * 0.2))
    assert not any(point.above for point in frontier.points)
    assert (frontier.start.value, frontier.reach) == (0.0, 0.5 / 0.05**2)
    assert judge_frontier(frontier).startswith("No point lies above the optimum beyond its interval.")


def test_the_bound_is_never_below_the_optimum_and_touches_it_at_each_beta(tmp_path: Path) -> None:
    frontier = read(write_all(tmp_path, {}))
    for at in frontier.optima:
        assert frontier.bound(at.kl)[0].value == pytest.approx(at.reward)
    for kl in (0.2, 0.7, 3.0, 20.0, 150.0):
        assert 0.1 * math.sqrt(2 * kl) <= frontier.bound(kl)[0].value + 1e-12


@pytest.mark.parametrize(("reward", "above"), [(0.2, False), (0.215, False), (0.3, True)])
def test_a_point_above_the_curve_is_said_only_beyond_its_interval(tmp_path: Path, reward: float, above: bool) -> None:
    frontier = read(write_all(tmp_path, {"dpo-1": ("dpo", dpo(0.1), policy(2.0, reward))}))
    assert [point.above for point in frontier.points if point.run] == [above]
    assert ("dpo-1 lies above the optimum" in judge_frontier(frontier)) is above


def test_what_was_measured_otherwise_is_not_compared(tmp_path: Path) -> None:
    policies = {
        "colder": ("dpo", dpo(0.1), policy(1.0, 0.1, temperature=0.7)),
        "longer": ("dpo", dpo(0.1), policy(1.0, 0.1, max_new_tokens=64)),
        "same": ("dpo", dpo(0.1), policy(1.0, 0.1)),
    }
    elsewhere = policy(1.0, 0.1)
    elsewhere[1]["settings"]["reference"] = "runs/demo/other/model"
    frontier = read(write_all(tmp_path, policies | {"elsewhere": ("dpo", dpo(0.1), elsewhere)}))
    assert [point.run for point in frontier.points if point.run] == ["same"]
    assert sorted(frontier.left_out) == ["colder", "longer"]
    assert "in another way: " in judge_frontier(frontier)


def test_without_an_optimum_there_is_no_picture(tmp_path: Path) -> None:
    write = writer(tmp_path)
    runs = write("sft", "sft", evaluation=[figure("perplexity", 3.0)]).parent
    write("dpo", "dpo", start_stage="sft", evaluation=policy(1.0, 0.1))
    page = write_report(runs).read_text()
    assert "Reward against KL" not in page
    assert not (runs / "frontier.json").exists() and not (runs / "frontier.svg").exists()


def test_the_page_the_data_and_the_picture_say_the_same(tmp_path: Path) -> None:
    runs = write_all(tmp_path, POLICIES)
    page = write_report(runs).read_text()
    assert "Reward against KL" in page and "No point lies above" in page
    data = json.loads((runs / "frontier.json").read_text())
    (frontier,) = data["frontiers"]
    assert [point["run"] for point in frontier["points"]] == ["dpo-1", "dpo-2", "ppo-2", "ppo-1", ""]
    assert all(point["above"] is False and point["gap"]["value"] > 0 for point in frontier["points"])
    alone = ElementTree.fromstring((runs / "frontier.svg").read_text())
    words = [text.text for text in alone.iter("{http://www.w3.org/2000/svg}text")]
    assert {"optimum", "DPO", "PPO, rm", "PPO, true reward", "best of N", "\u221aKL"} <= set(words)
    assert {"0.1", "0.5", "0.05", "4"} == {each.text for each in alone.iter("{http://www.w3.org/2000/svg}title")}
    assert page.count("0.1: 0.250") == 1 and ">DPO 0.1</span>" in page  # under the pointer, and in the table


def test_marks_lie_where_their_values_are(tmp_path: Path) -> None:
    frontier = read(write_all(tmp_path, {"dpo-1": ("dpo", dpo(0.1), policy(50.0, 0.5))}))
    svg = ElementTree.fromstring(draw_frontier(frontier))
    (series,) = (each for each in json.loads(svg.attrib["data-series"]) if each["label"] == "DPO")
    (x, y, root, reward), *_ = series["points"]
    assert (root, reward) == ("7.071", "0.1: 0.5000")
    # The axis is a square root and ends at half as much again as the interval's 55 nats, short of the curve's 200;
    # 44 pixels are left of it and 10 right.
    assert x == pytest.approx(44 + math.sqrt(50 / (55 * 1.5)) * (380 - 44 - 10), abs=0.1)
    (circle,) = (each for each in svg.iter("circle") if each.attrib["class"] == "dot c1")
    assert (float(circle.attrib["cx"]), float(circle.attrib["cy"])) == (x, y)
    (bars,) = (each.attrib["d"] for each in svg.iter("path") if each.attrib["class"] == "span c1")
    assert bars.startswith(f"M{44 + math.sqrt(45 / 82.5) * 326:.1f} {y}H{44 + math.sqrt(55 / 82.5) * 326:.1f}M{x} ")


def test_a_reference_without_any_reward_has_a_picture_and_names_are_escaped(tmp_path: Path) -> None:
    flat = {"beta": 1.0, "kl": 0.0, "reward": 0.0, "value": 0.0, "low": 0.0, "high": 0.0, "effective": 256.0}
    settings = {**HOW, "reward": "true_reward", "answers": 256}
    start = figure("reference_reward", 0.0, 0.0, 0.0, data=DATA, settings=settings, details=[flat])
    runs = writer(tmp_path / "flat")("sft", "sft", evaluation=[start]).parent
    write_report(runs)
    assert "nan" not in draw_frontier(read(runs))
    policies = {"dpo-1": ("dpo", dpo(0.1) | {"stage": HOSTILE}, policy(1.0, 0.4))}
    frontier = read(write_all(tmp_path, policies))
    assert "<script>" not in draw_frontier_file(frontier, "")
    assert "<script>alert" not in re.sub(r"data-series=\"[^\"]*\"", "", draw_frontier(frontier))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 390])
def test_many_points_close_together_stay_readable(browser: Browser, tmp_path: Path, width: int) -> None:
    crowd = {f"dpo-{n}": ("dpo", dpo(0.1 * n), policy(2 + n / 20, 0.1 + n / 500)) for n in range(1, 9)}
    runs = write_all(tmp_path, POLICIES | crowd)
    write_report(runs)
    for dark in (False, True):
        browser.open(runs / "report.html", width=width, dark=dark)
        assert (browser.complaints(), browser.requests(), browser.overlaps()) == ([], [], [])
