"""Write what HH-RLHF's recipes here learn from, out of alignkit's toy world of film reviews:

    python prepare.py rows

votes.jsonl: preference pre-training's comparisons, as Askell et al. 2021 make them from a forum's votes: score =
round(log2(1 + votes)), of each pair the higher one. binary.jsonl: the same, each pair as GOOD:A over BAD:A and BAD:B
over GOOD:B. Readers vote for good reviews, and for long ones. human-train.jsonl and human-test.jsonl: two halves of
comparisons by people of whom one in five is wrong, for a reward model and for the one that is only watched.
"""

import json
import math
import random
import sys
from pathlib import Path

from alignkit.data.builtin import BuiltinData, iter_builtin, true_reward

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
draw = random.Random(0)


def write(name, rows):
    with (out / name).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def count_votes(text):
    liked = math.exp(1.5 * true_reward(text) + len(text) / 100)
    return int(draw.expovariate(1 / liked) * 4)


def said(word, turns):
    return [{**turns[0], "content": f"{word}: {turns[0]['content']}"}]


votes, binary = [], []
for _, row in iter_builtin(BuiltinData("ranked", "train", 1500)):
    scored = [(round(math.log2(1 + count_votes(turns[0]["content"]))), turns) for turns in row["completions"]]
    (high, a), (low, b) = sorted(draw.sample(scored, 2), key=lambda pair: -pair[0])
    if high > low:
        votes.append({"prompt": row["prompt"], "chosen": a, "rejected": b})
        binary.append({"prompt": row["prompt"], "chosen": said("GOOD", a), "rejected": said("BAD", a)})
        binary.append({"prompt": row["prompt"], "chosen": said("BAD", b), "rejected": said("GOOD", b)})
write("votes.jsonl", votes)
write("binary.jsonl", binary)

pairs = [row for _, row in iter_builtin(BuiltinData("preferences", "train", 2000, noise=0.2))]
write("human-train.jsonl", pairs[:1000])
write("human-test.jsonl", pairs[1000:])
