"""YAML 1.2 values, their places, and what YAML may not do in a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.recipe.yaml import Origin, parse_yaml, read_scalar

Complain = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-6", 5e-6),
        ("1e-4", 1e-4),
        ("1.0e-5", 1e-5),
        ("5E+3", 5000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("010", 10),
        ("3.10", 3.1),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("-.inf", -math.inf),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("0o17", "0o17"),
        ("1_000", "1_000"),
        ("1e", "1e"),
        ("2026-11-22", "2026-11-22"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    read = read_scalar(text)
    assert (read, type(read)) == (value, type(value))


def test_a_number_of_a_thousand_digits_is_infinite_not_an_exception() -> None:
    assert read_scalar("9" * 5000) == math.inf


def test_every_value_knows_its_line() -> None:
    text = "a:\n  b: 1\n  c:\n    - x\n    -\n      d: 2\n# note\ne: |\n  two\n  lines\n"
    tree = parse_yaml(text, Origin("f.yaml", Path()))
    assert tree is not None
    assert {".".join(path): node.place for path, node in tree.leaves()} == {
        "": "f.yaml:1",
        "a": "f.yaml:1",
        "a.b": "f.yaml:2",
        "a.c": "f.yaml:3",
        "a.c.0": "f.yaml:4",
        "a.c.1": "f.yaml:6",
        "a.c.1.d": "f.yaml:6",
        "e": "f.yaml:8",
    }
    assert tree.plain() == {"a": {"b": 1, "c": ["x", {"d": 2}]}, "e": "two\nlines\n"}


def test_repeated_keys_are_all_refused(complain: Complain) -> None:
    assert complain("seed: 1\nmodel: {path: a, path: b}\nseed: 2\n") == [
        "a.yaml:2: path is here twice, first in line 2; keep one",
        "a.yaml:3: seed is here twice, first in line 1; keep one",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "a.yaml:1: a tag (tag:yaml.org,2002:python/object/apply:os); "
            "a recipe is plain data and cannot name types or code",
        ),
        ("a: 1\nb: !x y\n", "a.yaml:2: a tag (!x); a recipe is plain data and cannot name types or code"),
        ("a: &x 1\n", "a.yaml:1: an anchor (&x); share values through `extends:` instead"),
        ("b:\n  - *x\n", "a.yaml:2: an alias (*x); share values through `extends:` instead"),
        ("a:\n\tb: 1\n", "a.yaml:2: a tab indents this line; YAML indents with spaces"),
        (
            "a: b: c\n",
            "a.yaml:1: a: a `:` that cannot be here; check the indentation, and put text that holds `: ` in quotes",
        ),
        (
            "a: 1\n b: 2\n",
            "a.yaml:2: b: a `:` that cannot be here; check the indentation, and put text that holds `: ` in quotes",
        ),
        ("a:\n  - x\n b: 1\n", "a.yaml:3: b: the indentation does not fit the lines above"),
        ("seed: 1\na: 'x\nb: 1\n", "a.yaml:2: a: a bracket or quote that opens here is never closed"),
        ("a: 1\nb\nc: 1\n", "a.yaml:2: a key without `:`"),
        ("a: 1\n---\nb: 2\n", "a.yaml:2: a second document; a recipe is one document"),
        ("%YAML 1.1\n---\na: 1\n", "a.yaml:2: a % directive; a recipe needs none"),
        ("? [a]\n: 1\n", "a.yaml:1: a list, mapping or alias used as a key; a key is one word"),
        ("a: 1\n: 2\n", "a.yaml:2: an empty key"),
        ('a: "x\\0y"\n', "a.yaml:1: a control character or half a surrogate pair in this text"),
        ('a: "\\ud800"\n', "a.yaml:1: a control character or half a surrogate pair in this text"),
        ("a: " + "[" * 10_000, "a.yaml:1: nested deeper than 50 levels"),
        ("a: " + "{b: {c: " * 40, "a.yaml:1: nested deeper than 50 levels"),
        ("a: @x\n", "a.yaml:1: a: found character '@' that cannot start any token; put the text in quotes"),
        ("a: [1,\nb: 2\n", "a.yaml:1: a: a bracket or quote that opens here is never closed"),
        ("", "a.yaml:1: the file is empty; a recipe needs at least `model:` and one stage"),
        ("# only a note\n", "a.yaml:1: the file is empty; a recipe needs at least `model:` and one stage"),
        ("- a\n", "a.yaml:1: the file holds a list; a recipe is a mapping of `key: value` lines"),
        ("word\n", "a.yaml:1: the file holds one value; a recipe is a mapping of `key: value` lines"),
        (b"a: 1\nb: \xff\n", "a.yaml:2: a byte that is not UTF-8; save the file as UTF-8"),
        (b"a: 1\n\0\n", "a.yaml:2: a NUL byte; a recipe is plain UTF-8 text"),
        (b"a: 1\nb: \x07\n", "a.yaml:2: a control character; a recipe is plain UTF-8 text"),
        (b"x" * 5_000_000, "a.yaml:1: larger than 256 KB; this is not a recipe"),
    ],
)
def test_what_yaml_may_not_do_here(complain: Complain, text: str | bytes, message: str) -> None:
    first = complain(text)[0]
    assert first == message


def test_alias_bomb_is_refused_at_once(complain: Complain) -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert len(complain("\n".join(lines))) == 100  # the first hundred are enough


def test_byte_order_mark_and_windows_line_ends_are_read(load: Callable[..., Any]) -> None:
    text = "\ufeffmodel: {path: gpt2}\r\nsft:\r\n  data: x/y\r\n  seed: 1\r\n"
    with pytest.raises(Exception, match=r"^a\.yaml:4: sft\.seed"):
        load(text)
