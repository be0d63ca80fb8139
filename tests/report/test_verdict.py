"""What is said of a stage at its end: the sentence, whether it is green, and what would decide."""

from __future__ import annotations

import json
from typing import Any

import pytest
from written_runs import WriteRun, figure

from alignkit.report.facts import Facts
from alignkit.report.verdict import Verdict, judge


def change(low: float, value: float, high: float, *, start: str = "sft", **more: Any) -> dict[str, Any]:
    return {"start": start, "from": 0.8, "value": value, "low": low, "high": high, "rose": 71, "fell": 26, **more}


def pairs(value: float, low: float, high: float, **more: Any) -> list[dict[str, Any]]:
    longer = figure("pair_accuracy_longer", 0.54, 0.47, 0.61, unit="share", data="pairs")
    return [figure("reward_accuracy", value, low, high, unit="share", data="pairs", **more), longer]


SETTINGS = {"against": "runs/demo/sft/model", "judge": "rm"}
WON = figure("win_rate", 71 / 97, 0.634, 0.804, n=97, settings=SETTINGS, change=change(0.134, 0.232, 0.304))
KL = figure("kl", 9.7, 8.1, 11.2, settings={"reference": "runs/demo/sft/model"})
ENDED = figure("ended_share", 0.65, 0.6, 0.7, change=change(-0.2, -0.15, -0.1))
EVEN = figure("win_rate", 0.5, 0.35, 0.65, n=40, settings=SETTINGS, change=change(-0.1, 0, 0.1, rose=4, fell=4))
LOST = figure("true_reward", 0.2, 0.1, 0.3, better="higher", n=97, change=change(-0.8, -0.6, -0.4))
LOWER = figure("perplexity", 13.3, 9.8, 19.1, better="lower", n=18, data="rows (held-out 0.2)",
               change=change(-50.0, -34.6, -21.0, start="base", **{"from": 47.9}, fell=18, rose=0))  # fmt: skip


@pytest.mark.parametrize(
    ("method", "results", "tone", "says"),
    [
        ("dpo", [WON, KL, ENDED], "better",
         "dpo beats sft on 71 of 97 prompts (63 to 80 %), judged by rm; it drifted 9.7 nats an answer from sft; "
         "15 % fewer answers end"),
        ("dpo", [EVEN], "undecided",
         "dpo is not told apart from sft: it wins on 20 of 40 prompts (35 to 65 %), 32 ties counted half, judged by "
         "rm"),
        ("ppo", [LOST], "not better",
         "ppo: true reward fell from 0.800 to 0.200 (difference \u22120.800 to \u22120.400), on 26 of 97 rows, against "
         "sft; KL to sft 0.75 nats (mean of the last 10 rollouts)"),
        ("dpo", [WON, LOST], "undecided",
         "dpo beats sft on 71 of 97 prompts (63 to 80 %), judged by rm; true reward fell from 0.800 to 0.200 "
         "(difference \u22120.800 to \u22120.400), on 26 of 97 rows, against sft"),
        ("sft", [LOWER], "better",
         "sft: perplexity fell from 47.9 to 13.3 (difference \u221250 to \u221221), on 18 of 18 rows, against "
         "builtin:tiny-gpt2, of rows (held-out 0.2)"),
        ("rm", pairs(0.816, 0.75, 0.865, change=change(0.1, 0.27, 0.4)), "better",
         "rm puts 81.6 % of 200 pairs of pairs in order (75 to 86 %); longer is better gets 54.0 %"),
        ("rm", pairs(0.60, 0.53, 0.67, change=change(-0.02, 0.06, 0.13)), "undecided",
         "rm is not clearly above longer is better: it puts 60.0 % of 200 pairs of pairs in order (53 to 67 %); "
         "longer is better gets 54.0 %"),
        ("rm", pairs(0.52, 0.45, 0.59), "not better",
         "rm is no better than chance: it puts 52.0 % of 200 pairs of pairs in order (45 to 59 %); longer is better "
         "gets 54.0 %"),
    ],
)  # fmt: skip
def test_a_sentence_of_paired_differences_green_only_where_something_got_better(
    write_run: WriteRun, method: str, results: list[dict[str, Any]], tone: str, says: str
) -> None:
    start = None if method in ("sft", "rm") else "sft"
    found = judge(Facts(write_run(method, method, start_stage=start, evaluation=results)))
    assert (found.tone, found.says, found.missing) == (tone, says, "")


def test_what_was_trained_on_is_never_green(write_run: WriteRun) -> None:
    seen = {**WON, "trained": {"by": ["sft"], "rows": 12, "of": 97}}
    found = judge(Facts(write_run("dpo", "dpo", start_stage="sft", evaluation=[seen])))
    assert found.tone == "undecided"
    assert found.says.endswith("; not held out: 12 of 97 prompts were trained on by sft")


def unmeasured(write_run: WriteRun, method: str, result: dict[str, Any], **stage: Any) -> Verdict:
    run = write_run(method, method, start_stage="sft" if method in ("dpo", "ppo") else None, stage=stage)
    data = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(data | {"metrics": result}))
    return judge(Facts(run))


def test_a_stage_without_an_evaluation_says_what_is_missing(write_run: WriteRun) -> None:
    none = {"eval_lengths": None}
    found = unmeasured(write_run, "rm", {"loss": 0.861}, **none)
    # The mean of the last ten of 2/3, 2/4 ... 2/12 is below ln 2, the mean accuracy above one half.
    assert found.tone == "undecided" and "none of its rows was held out" in found.says and "eval: 0.1" in found.missing
    found = unmeasured(write_run, "dpo", {"eval_rewards/accuracies": 0.9}, eval_lengths={"num_rows": 50})
    assert found.tone == "better" and "against: sft" in found.missing
    assert found.says.startswith(
        "dpo has learnt the preference: its implicit reward puts 90.0 % of 50 pairs of its held-out rows in order (79"
    )
    found = unmeasured(write_run, "sft", {"loss": 0.5})
    assert (found.tone, found.says) == (
        "better", "sft's loss on its 10 held-out rows fell: 0.525 at step 4, 0.175 at step 12",
    )  # fmt: skip
    found = unmeasured(write_run, "ppo", {"reward": -0.8})
    assert found.tone == "better" and found.says.startswith(
        "ppo: gold reward rose: 0.0350 to 0.0950, means of the first"
    )


def test_an_untrained_reward_model_says_so(write_run: WriteRun) -> None:
    lost = "; its held-out loss 0.800 is not below ln 2 (0.693), that of a coin toss"
    found = unmeasured(write_run, "rm", {"eval_accuracy": 0.56, "eval_loss": 0.8}, eval_lengths={"num_rows": 50})
    assert (found.tone, found.says) == (
        "not better",
        "rm is no better than chance: it puts 56.0 % of 50 pairs of its held-out rows in order (42 to 69 %)" + lost,
    )
    sure = {"metrics": {"eval_accuracy": 0.9, "eval_loss": 0.8}}  # right, and far too sure where it is wrong
    run = write_run("sure", "rm", stage={"eval_lengths": {"num_rows": 50}})
    (run / "result.json").write_text(json.dumps(json.loads((run / "result.json").read_text()) | sure))
    assert judge(Facts(run)).tone == "undecided" and judge(Facts(run)).says.endswith(lost)


def test_a_failed_run_and_a_monitor_are_told(write_run: WriteRun) -> None:
    found = judge(Facts(write_run(finished=False, num_steps=7, stage={"trl": {"max_steps": 20}})))
    assert (found.tone, found.says) == (
        "not better", "sft is not finished, at step 7 of 20: ValueError: The plot was good.",
    )  # fmt: skip
    found = judge(Facts(write_run("ppo", "ppo", warnings=["ppo: the reward rose while answers grew"])))
    assert found.to_dict()["warnings"] == ["the reward rose while answers grew"]
