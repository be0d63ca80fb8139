"""The report in a real Chromium, on a screen and a phone: no complaint, no request, no text on top of another."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, open_browser
from written_runs import HOSTILE, WriteRun, figure, writer

from alignkit.report.publish import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)"),
]

LONG = "The plot of this very long answer goes on and on, and nothing in it ever ends. " * 12
WORD = "unbreakable" * 30
EVALUATION = [
    figure("reward_accuracy", 0.816, 0.75, 0.865, unit="share", better="higher", data="builtin:preferences[test]"),
    figure("reward_accuracy", 0.6, 0.5, 0.7, unit="share", slice="margin 0.5 to 1.0, chosen longer"),
    figure("win_rate_length_controlled", 0.61, 0.54, 0.67, unit="share", settings={"against": "runs/demo/sft"}),
    figure("win_rate", 0.61, 0.54, 0.67, unit="share",
           settings={"against": "runs/demo/sft", "judge": "a-judge-with-a-name at 10.0.0.1:8000", "max_new_tokens": 8}),
    figure("win_rate", 0.66, 0.6, 0.7, unit="share",
           settings={"against": "runs/demo/sft", "judge": "another-judge at 10.0.0.1:8000", "max_new_tokens": 64}),
    figure("judge_agreement", 0.8, 0.7, 0.9, unit="share", details=[{"order_agreement": None, "spent": {"cost": 1.0}}]),
    figure("kl", 1234567.8, -1e6, 2e6, unit="nats per sequence"),
    figure("calibration_error", 0.04, 0.02, 0.07, unit="share",
           details=[{"confidence": 0.5 + number / 10, "accuracy": 0.5 + number / 11} for number in range(5)]),
    figure(f"lm_eval/{WORD}/acc", 0.25, 0.22, 0.28, unit="share", data=WORD),
]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of every method, with texts that are hostile, long, or cannot be broken."""
    write: WriteRun = writer(tmp_path_factory.mktemp("runs"))
    more = {"evaluation": EVALUATION, "warnings": ["few rows", LONG, WORD]}
    sft = write("sft", "sft", text=HOSTILE, **more)
    write("rm", "rm", start_stage="sft", text=LONG, num_steps=2000, **more)
    write("dpo", "dpo", start_stage="sft", text=WORD, **more)
    rewards = {"runs/demo/rm/model": "rm"}
    write("a-stage-with-quite-a-long-name", "ppo", start_stage="sft", rewards=rewards, finished=False, **more)
    for run in sft.parent.iterdir():
        write_report(run)
    write_report(sft.parent)
    return sft.parent


PAGES = ["", "sft", "rm", "dpo", "a-stage-with-quite-a-long-name"]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_clean(browser: Browser, runs: Path, page: str, width: int) -> None:
    for dark in (False, True):
        browser.open(runs / page / "report.html", width=width, dark=dark)
        assert browser.complaints() == []
        assert browser.requests() == []
        assert browser.overlaps() == []
    browser.run("document.querySelectorAll('details').forEach((each) => each.open = true)")
    assert browser.overlaps() == []


def test_dark_is_dark_and_light_is_light(browser: Browser, runs: Path) -> None:
    def lightness() -> float:
        color = browser.run("getComputedStyle(document.body).backgroundColor")
        return sum(float(part) for part in color[4:-1].split(",")) / 3

    browser.open(runs / "sft" / "report.html", width=1280)
    assert lightness() > 230
    browser.look_like(dark=True)
    assert lightness() < 40


def test_the_pointer_tells_a_value(browser: Browser, runs: Path) -> None:
    browser.open(runs / "sft" / "report.html", width=1280, height=3000)
    box = browser.run("(() => { const b = document.querySelector('svg.chart').getBoundingClientRect();"
                      " return [b.left, b.top, b.width, b.height]; })()")  # fmt: skip
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + box[2] * 0.9, y=box[1] + box[3] / 2)
    tip = browser.run("document.getElementById('tip').innerText")
    assert tip.startswith("step ") and "training" in tip
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.run("document.getElementById('tip').hidden") is True
    assert browser.complaints() == []


def test_a_hundred_thousand_steps_open_in_under_a_second(browser: Browser, tmp_path: Path) -> None:
    steps = [{"step": step, "loss": 1 / step, "reward": step % 7, "objective/kl": 0.1, "sqrt_kl": 0.3 + step % 5}
             for step in range(1, 100_001)]  # fmt: skip
    page = write_report(writer(tmp_path)("ppo", "ppo", metrics=steps, num_steps=100_000))
    assert page.stat().st_size < 500_000
    assert "a point is the mean of 417 values, the band their range" in page.read_text()
    browser.open(page, width=390)
    assert browser.run("performance.timing.loadEventEnd - performance.timing.navigationStart") < 1000


def test_it_prints_with_everything_unfolded(browser: Browser, runs: Path) -> None:
    browser.open(runs / "sft" / "report.html", width=1280)
    data = base64.b64decode(browser.ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
    assert data.startswith(b"%PDF") and len(data) > 20_000
    assert browser.run("[...document.querySelectorAll('details:not(.reference)')].every((each) => each.open)") is True
    assert browser.complaints() == []


def test_the_check_sees_what_it_looks_for(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<p style='position:absolute;top:10px'>one text here</p><p style='position:absolute;top:14px'>and another</p>"
        "<div style='width:3000px'>wide</div><img src='http://127.0.0.1:9/x.png'><script>console.error('no')</script>"
    )
    browser.open(page, width=390)
    assert any("one text" in each for each in browser.overlaps())
    assert any("outside: DIV" in each for each in browser.overlaps())
    assert browser.requests() == ["http://127.0.0.1:9/x.png"]
    assert browser.complaints() != []
