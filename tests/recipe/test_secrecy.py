"""A secret in a recipe is refused, and shown nowhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.console import redact
from alignkit.recipe import Recipe
from alignkit.recipe.yaml import names_secret

Complain = Callable[..., list[str]]

ADVICE = "a recipe holds none: take it out and set HF_TOKEN (or the service's own variable) in the environment"
START = "model: {path: gpt2}\nsft:\n  data: x/y\n"
# Built from parts, so that no scanner takes this file for a leak.
SECRETS = [
    "hf_" + "aB3" * 12,
    "sk-" + "proj-" + "x9" * 12,
    "Bearer " + "abcdef123456",
    "AKIA" + "ABCDEFGHIJKLMNOP",
    "ghp_" + "a1" * 15,
    "https://me:" + "hunter2@host/data",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_value_that_looks_like_a_secret_is_refused_and_not_shown(complain: Complain, secret: str) -> None:
    for line in (f'  run_name: "{secret}"', f'  betta: "{secret}"', f'  "{secret}": 1', f'  samples: ["{secret}"]'):
        lines = complain(f"{START}{line}\n")
        assert lines[0].startswith("a.yaml:4: sft.") and lines[0].endswith(ADVICE)
        assert secret not in "\n".join(lines) and "hunter2" not in "\n".join(lines)


def test_a_key_that_names_a_secret_is_refused(complain: Complain) -> None:
    keys = "  hub_token: abc\n  api_key: abc\n  WANDB_API_KEY: abc\n  password: abc\n  client-secret: abc\n"
    assert complain(START + keys) == [
        f"a.yaml:{line}: sft.{key} is the name of a secret; {ADVICE}"
        for line, key in enumerate(("hub_token", "api_key", "WANDB_API_KEY", "password", "client-secret"), 4)
    ]


def test_a_secret_on_the_command_line_is_not_echoed(complain: Complain) -> None:
    secret = SECRETS[0]
    lines = complain(START, f"sft.run_name={secret}", f"sft.hub_token={secret}", secret, f"sft.x=[{secret}")
    assert len(lines) == 4 and secret not in "\n".join(lines)


def test_a_secret_as_the_name_of_a_run_is_refused(run_alignkit: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: builtin:tiny-gpt2\nsft: {data: builtin:instructions}\n")
    for command in (("sft", "-r", "a.yaml"), ("eval", "builtin:tiny-gpt2"), ("merge", "runs/a")):
        done = run_alignkit(*command, "--out", f"runs/{SECRETS[0]}")
        said = "error: --out: holds what looks like a secret, and a run's records name its directory; choose another\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize(
    "key", ["pad_token", "eos_token", "max_new_tokens", "pad_token_id", "special_tokens_in_text", "tokenizer", "keys"]
)
def test_vocabulary_is_not_secret(key: str) -> None:
    assert not names_secret(key)


def test_fields_about_tokens_can_be_set(load: Callable[..., Recipe]) -> None:
    line = "  include_num_input_tokens_seen: all\n  samples: {max_new_tokens: 5}\n  special_tokens_in_text: keep\n"
    assert load(START + line).stages["sft"].options.samples.max_new_tokens == 5


def test_redaction_leaves_the_rest() -> None:
    assert redact(f"a {SECRETS[0]} b https://me:pw@host") == "a [redacted] b https://[redacted]@host"
    assert redact("task-sk-model hf_model org/hf-name") == "task-sk-model hf_model org/hf-name"
