"""A thousand broken recipes: each is refused with line and key, or accepted and resolved the same way twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from alignkit.errors import RecipeError
from alignkit.recipe import load_recipe, resolve

RECIPES = 250  # for each of four seeds
BASE = """\
name: fuzz
seed: 3
model:
  path: builtin:tiny-gpt2
  dtype: float32
  quantization: nf4
lora:
  r: 8
  alpha: 16
  target_modules: all-linear
launch:
  device: cpu
sft:
  data: builtin:instructions
  eval: 0.1
  max_length: 128
  batch_size: 16
  micro_batch_size: 4
  learning_rate: 5e-4
  lr_scheduler_type: cosine
  packing: true
rm:
  start_from: sft
  loss: pairwise
  normalize: bias
  weight_decay: 0.01
  data:
    path: builtin:preferences
    max_rows: 200
    weight: 0.5
dpo:
  start_from: sft
  data: builtin:preferences
  beta: 0.1
  loss_type: [sigmoid, sft]
  loss_weights: [1.0, 0.2]
  max_grad_norm: 1.0
  save_steps: 50
  disable_dropout: true
stages: [sft, rm, dpo]
"""


@dataclass(frozen=True)
class Broken:
    data: bytes
    line: int | None = None  # where the mistake is; None for what is wrong with the file as a whole
    word: str = ""  # what the message must name


def break_value(random: Random) -> Broken:
    """Replace the value of a random key."""
    values = (
        "null", "~", "", "true", "no", "yes", "-1", "0", "1e400", ".nan", ".inf", "-.inf", "1e30", "2.5", "'12'",
        '"x y"',
        "[]", "[1, 2]", "[[a]]", "{}", "{a: 1}", "zzz", "Ünïcödé", "日本語", "🎉", "1_000", "0x10", "1:30", "9" * 400,
        "x" * 3000, '"a\\tb"', "hf_" + "Ab1" * 10, "../..", "${NOT_SET}", "$(touch canary)", "; touch canary", "`x`",
    )  # fmt: skip
    lines, number, key = pick_line(random)
    indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
    lines[number] = f"{indent}{key}: {random.choice(values)}"
    end = number + 1
    while end < len(lines) and lines[end].startswith(indent + " "):  # what was below the key goes with it
        del lines[end]
    return Broken("\n".join(lines).encode(), number + 1, key)


def break_key(random: Random) -> Broken:
    """Swap, drop, double or replace a letter of a random key."""
    lines, number, key = pick_line(random)
    at = random.randrange(len(key))
    typo = key[:at] + random.choice((key[at + 1 :], key[at] + key[at:], "q" + key[at + 1 :], "ß" + key[at:]))
    lines[number] = lines[number].replace(f"{key}:", f"{typo}:", 1)
    return Broken("\n".join(lines).encode(), number + 1, typo)


def double_line(random: Random) -> Broken:
    """Give a key twice, one right after the other."""
    lines, number, key = pick_line(random)
    indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
    lines.insert(number, f"{indent}{key}: 1")
    return Broken("\n".join(lines).encode(), number + 2, key)


def add_line(random: Random) -> Broken:
    """Add a key that belongs nowhere, or not here."""
    keys = ("output_dir", "bf16", "beta_", "torch_dtype", "hub_token", "trust_remote_code", "env", "extends", "r")
    lines, number, _ = pick_line(random)
    key = random.choice(keys)
    indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
    lines.insert(number, f"{indent}{key}: 1")
    return Broken("\n".join(lines).encode(), number + 1, key)


def break_text(random: Random) -> Broken:
    """Damage the file, not a value."""
    data = BASE.encode()
    at = random.randrange(len(data))
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: b"",
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data[:at],
        lambda: data[:at] + bytes([random.randrange(256)]) + data[at + 1 :],
        lambda: data[:at] + random.choice((b"\t", b"\n", b" ", b"[", b"{", b"'", b'"', b"&a ", b"*a ", b"!!x ", b"@"))
        + data[at:],
        lambda: random.randbytes(2000),
        lambda: data * 1000,
        lambda: data.replace(b"  ", b"\t"),
        lambda: data.replace(b"\n", b"\r"),
        lambda: b"a: " + b"[" * 10_000,
        lambda: b"a: " + b"{b: " * 10_000,
        lambda: b"- " * 10_000 + b"x",
        lambda: b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 60)),
        lambda: data + b"x: !!python/object/apply:os.system ['touch canary']\n",
        lambda: data.decode().encode("utf-16"),
        lambda: data + b"---\n" + data,
    )  # fmt: skip
    return Broken(random.choice(kinds)())


def pick_line(random: Random) -> tuple[list[str], int, str]:
    lines = BASE.splitlines()
    number = random.randrange(len(lines))
    return lines, number, lines[number].split(":")[0].strip()


def names_the_mistake(message: str, broken: Broken) -> bool:
    return any(
        line.startswith(f"a.yaml:{broken.line}: ") and broken.word.lower() in line.lower()
        for line in message.split("\n")
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_broken_recipes(directory: Path, seed: int) -> None:
    random = Random(seed)
    kinds = (break_value, break_value, break_value, break_key, break_key, double_line, add_line, break_text)
    refused, unnamed, slowest = 0, [], 0.0
    for number in range(RECIPES):
        broken = random.choice(kinds)(random)
        Path("a.yaml").write_bytes(broken.data)
        started = time.process_time()
        try:
            recipe = load_recipe(Path("a.yaml"))
            stages = [resolve(recipe, name).to_dict() for name in recipe.stage_names]
            assert stages == [resolve(load_recipe(Path("a.yaml")), name).to_dict() for name in recipe.stage_names]
        except RecipeError as error:
            message = str(error)
            message.encode("utf-8")
            assert message and "\n\n" not in message and "Ab1Ab1" not in message
            assert all(line.startswith("a.yaml:") for line in message.split("\n")), message
            refused += broken.line is not None
            if broken.line is not None and not names_the_mistake(message, broken):
                unnamed.append((number, broken.word, broken.line, message))
        slowest = max(slowest, time.process_time() - started)
    assert not Path("canary").exists()
    assert refused > RECIPES / 2
    assert len(unnamed) <= refused / 100, unnamed
    assert slowest < 2.0
