"""A thousand damaged data files: every one is read, or refused in words that name file and place. Seeds are kept."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from alignkit.data.formats import FORMATS, GROUPS, Detector, Format, Parsed
from alignkit.data.load import join_threads
from alignkit.data.report import Rejects
from alignkit.data.rows import METHOD_KINDS, BadRow, Row, digest_row
from alignkit.errors import AlignKitError, DataError
from alignkit.recipe import Stage, load_recipe, resolve

Read = Callable[..., Any]

# What is put in place of one row's field, and of a whole row.
VALUES: list[Any] = [
    None, "", " ", 5, -0.5, True, [], {}, [None], [""], ["a"], [{}], [{"role": "user"}], "\ud800", "\x00", "a" * 5000,
    float("nan"), float("inf"), 10**400, [{"role": "asistant", "content": "a"}], [{"role": "user", "content": None}],
    [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}], {"role": "assistant", "content": "a"},
    [{"role": "user", "content": "a"}], [{"role": "assistant", "content": ["a"]}], "<|im_end|><|im_start|>assistant",
    [{"from": "human", "value": "a"}, {"from": "usr", "value": "b"}], [[["a"]]], {"a": {"b": [1]}},
    "\u202ea\u2028\ufeff", "e\u0301\U0001f468\u200d", "<｜end▁of▁sentence｜>", "[INST] a</s>", "<think>a",
    [{"type": "text", "text": "a"}, {"type": "image"}], "a" * (1 << 20), {"a": "\udfff"}, '[{"role": "a", "text": "a"',
    -1, 2**63, "5", "model_c", "null", [[]], [1, "a", None], {"\ud800": 1}, [{"role": "tool", "content": "a"}],
]  # fmt: skip
LINES: list[bytes] = [
    b"   ", b"{", b"}", b"null", b"5", b'"a"', b"[]", b"{}", b"[1, 2]", b'{"a": 1}', b'{"text": "a"} {"text": "b"}',
    b'{"text": "caf\xe9"}', b"\xff\xfe\x00", b"\x00\x00", b'{"text": "a"', b"{'text': 'a'}", b'{"text": "a",}',
    b'{"text": ' + b"[" * 3000, b'{"text": "\\ud83d"}', b"# comment", b"text,label", b'{"": ""}', b'{"text": NaN}',
    b'{"text": "' + b"a" * (2 << 20) + b'"}', b"\xef\xbb\xbf{}", b'{"text": "a", "text": 5}', b'"\n"', b"\r", b'"',
]  # fmt: skip
CALL = '{"name": "f", "arguments": {"a": 1}}'


def chat(n: int, **last: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": f"a{n}"} | last]


SHAPES: list[Callable[[int], dict[str, Any]]] = [
    lambda n: {"text": f"text {n}"},
    lambda n: {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "a"}]},
    lambda n: {"prompt": f"{n}", "completion": "a"},
    lambda n: {"prompt": f"{n}", "chosen": "a", "rejected": "b", "margin": 1.0, "label": 1.0},
    lambda n: {"chosen": f"\n\nHuman: {n}\n\nAssistant: a", "rejected": f"\n\nHuman: {n}\n\nAssistant: b"},
    lambda n: {"conversations": [{"from": "human", "value": f"{n}"}, {"from": "gpt", "value": "a"}]},
    lambda n: {"instruction": f"{n}", "input": "", "output": "a", "chosen": "a", "rejected": "b"},
    lambda n: {"prompt": f"{n}", "completions": ["a", "b", "c"], "scores": [1, 2, 3]},
    lambda n: {"instruction": f"{n}", "completions": [{"response": c, "overall_score": ord(c)} for c in "ab"]},
    lambda n: {"prompt": f"{n}", "completion": "a", "label": True},
    lambda n: {"messages": chat(n, weight=n % 2), "tools": [{"name": "f", "parameters": {}}], "system": "s"},
    lambda n: {"conversations": [{"from": "user", "value": f"{n}"}, {"from": "function_call", "value": CALL},
                                 {"from": "observation", "value": "21"}, {"from": "gpt", "value": "a"}]},
    lambda n: {"messages": [*chat(n)[:1], {"role": "assistant", "content": None, "tool_calls": [json.loads(CALL)]}]},
    lambda n: {"query": f"{n}", "response": "a", "history": [["b", "c"]], "system": "s"},
    lambda n: {"messages": chat(n, thinking="b"), "label": "desirable", "chat_template_kwargs": {"a": True}},
    lambda n: {"prompt": f"{n}", "response_0": "a", "response_1": "b", "better_response_id": n % 2},
    lambda n: {"prompt": f"{n}", "response_1": "a", "response_2": "b", "preference_strength": n % 7 - 3},
    lambda n: {"history": f"{n}", "human_ref_A": "a", "human_ref_B": "b", "labels": n % 2},
    lambda n: {"prompt": f"\n\nHuman: {n}\n\nAssistant: ", "answers": [{"answer": a, "rank": ord(a)} for a in "ab"]},
    lambda n: {"conversation_a": chat(n), "conversation_b": [*chat(n)[:1], *chat(1)[1:]], "winner": "model_a"},
    lambda n: {"messages": chat(n), "rejected_response": "b"},
    lambda n: {"message_id": f"{n}", "parent_id": f"{n - 1}" if n % 4 else None, "text": f"{n}",
               "role": ("prompter", "assistant")[n % 2], "rank": 0, "deleted": False},
    lambda n: {"prompt": {"text": f"{n}", "role": "prompter", "replies": [{"text": "a", "role": "assistant"}]}},
    lambda n: {"conversation": [{"input": f"{n}", "output": "a"}]},
    lambda n: {"transcript": f"\n\nHuman: {n}\n\nAssistant: a"},
    lambda n: {"segments": [{"label": False, "text": f"{n}"}, {"label": True, "text": "a"}]},
    lambda n: {"input_ids": [n, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
]  # fmt: skip

# What a column of the formats' table holds where it is neither a short text nor a conversation.
COLUMNS: dict[str, Callable[[Random], Any]] = {
    **dict.fromkeys(("label", "kto_tag"), lambda random: random.choice([True, 0, 0.5, "good"])),
    **dict.fromkeys(("better_response_id", "safer_response_id", "labels"), lambda random: random.randrange(2)),
    **dict.fromkeys(("preference_strength", "overall_preference"), lambda random: random.randint(-3, 3)),
    "winner": lambda random: random.choice(["model_a", "model_b", "response_a", "tie"]),
    "completions": lambda random: [{"response": answer, "overall_score": ord(answer)} for answer in "abc"],
    "responses": lambda random: ["a", "b"],
    "answers": lambda random: [{"answer": answer, "rank": ord(answer)} for answer in "ab"],
    "segments": lambda random: [{"label": False, "text": "b"}, {"label": True, "text": "a"}],
    "input_ids": lambda random: [1, 2, 3],
    "transcript": lambda random: "\n\nHuman: b\n\nAssistant: a",
}
BESIDE = ("system", "history", "tools", "input", "weight", "margin", "id", "scores", "chat_template_kwargs", "images")


def row_of(random: Random, form: Format, number: int) -> dict[str, Any]:
    """A row with the columns that a format needs, under any of their names; most are sound before they are damaged."""
    words = form.needs.split()
    if form.needs == "instruction":
        words.append("output")
    elif not {"PROMPT", "CONVERSATION", "history:str"} & set(words) and form.kind not in ("text", "messages"):
        words += random.choice([[], ["PROMPT"], ["PROMPT"]])
    if "chosen" in form.needs:
        words += ["chosen", "rejected"]
    row: dict[str, Any] = {}
    chat = form.chat or "list" in form.needs
    for word in words:
        name, _, kind = random.choice(word.split("|")).partition(":")
        column = random.choice(GROUPS.get(name, (name,)))
        turns = [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": f"{column} {number}"}]
        if column in COLUMNS:
            row[column] = COLUMNS[column](random)
        elif column in (*GROUPS["CONVERSATION"], "conversation_a", "conversation_b"):
            row[column] = turns[:1] if {"chosen", "chosen|rejected", "completion", "REJECTED"} & set(words) else turns
        elif kind != "str" and chat:
            row[column] = turns[:1] if column in GROUPS["PROMPT"] else turns[1:]
        else:
            said = f"{column} {number}"
            row[column] = f"\n\nHuman: {number}\n\nAssistant: {said}" if form.name == "hh" else said
    if random.random() < 0.1:
        said = random.choice(["a", 1, [], [["b", "c"]], [{"name": "f", "parameters": {}}], {}])
        row.setdefault(random.choice(BESIDE), said)
    return row


def damage_row(random: Random, row: dict[str, Any]) -> dict[str, Any]:
    if not row:
        return {"": 1}
    field = random.choice(list(row))
    if random.random() < 0.5 and type(row[field]) in (list, dict) and row[field]:
        return row | {field: damage_inside(random, row[field])}
    choice = random.randrange(3)
    if choice == 0:
        return {key: value for key, value in row.items() if key != field}
    if choice == 1:
        return {(key[:-1] if key == field else key): value for key, value in row.items()}
    return row | {field: random.choice(VALUES)}


def damage_inside(random: Random, value: Any) -> Any:
    """Damage an item of a list, or a key of an object, at any depth."""
    if type(value) is dict and value:
        return damage_row(random, value)
    if type(value) is not list or not value or random.random() < 0.2:
        return random.choice(VALUES)
    place = random.randrange(len(value))
    return [*value[:place], damage_inside(random, value[place]), *value[place + 1 :]]


def make_file(random: Random, directory: Path) -> Path:
    shape = random.choice(SHAPES)
    rows = [shape(number) for number in range(random.randint(1, 30))]
    for _ in range(random.randint(0, 2)):
        place = random.randrange(len(rows))
        rows[place] = damage_row(random, rows[place]) if random.random() < 0.8 else random.choice(SHAPES)(place)
    suffix = random.choice([".jsonl", ".jsonl", ".json", ".csv", ".txt", ".parquet"])
    content = write_rows(random, rows, suffix, directory)
    if random.random() < 0.3:
        content = damage_bytes(random, content)
    if random.random() < 0.2 and suffix != ".parquet":
        content, suffix = gzip.compress(content), f"{suffix}.gz"
        if random.random() < 0.3:
            content = damage_bytes(random, content)
    path = directory / f"rows{suffix}"
    path.write_bytes(content)
    return path


def write_rows(random: Random, rows: list[dict[str, Any]], suffix: str, directory: Path) -> bytes:
    if suffix == ".jsonl":
        lines = [json.dumps(row).encode() for row in rows]
        if random.random() < 0.4:
            lines.insert(random.randint(0, len(lines)), random.choice(LINES))
        return random.choice([b"", b"\xef\xbb\xbf"]) + random.choice([b"\n", b"\r\n", b"\n\n"]).join(lines)
    if suffix == ".json":
        items: list[Any] = [*rows, random.choice(VALUES)] if random.random() < 0.2 else [*rows]
        return json.dumps(random.choice([items, {"data": items}, {"a": items, "b": items}, rows[0]])).encode()
    if suffix == ".csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode(errors="surrogatepass")
    if suffix == ".parquet":
        return write_parquet(rows, directory)
    return "\n".join(str(row) for row in rows).encode(errors="surrogatepass")


def write_parquet(rows: list[dict[str, Any]], directory: Path) -> bytes:
    """As Parquet where Arrow finds a type for the column, else bytes that are no Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = directory / "written"
    try:
        pq.write_table(pa.Table.from_pylist(rows), path)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError):
        return json.dumps(rows).encode()
    return path.read_bytes()


def damage_bytes(random: Random, content: bytes) -> bytes:
    place = random.randint(0, len(content))
    return random.choice(
        [
            content[:place],
            content[place:],
            content[:place] + bytes([random.randrange(256)]) + content[place + 1 :],
            content[:place] + b"\0" * 50 + content[place + 50 :],
            content[:place] + random.choice(LINES) + content[place:],
            b"",
        ]
    )


def is_sound(row: Row) -> bool:
    """Whether a row has something to train on, in every text that a tokenizer will see."""
    if row.tokens is not None:
        return len(row.tokens[0]) == len(row.tokens[1]) > 1
    for text in row.completions if row.kind != "prompt" else (row.prompt,):
        contents = [text] if isinstance(text, str) else [said(message) for message in text]
        if not contents or not all(
            (content.strip() or row.kind == "segments") and content.encode() for content in contents
        ):
            return False
    return True


def said(message: Any) -> str:
    """Return the content, or what stands in its place."""
    return message["content"] or json.dumps(message.get("tool_calls", "")) if message["role"] != "tool" else "told"


OPEN = [form for form in FORMATS if form.kind != "labelled"]  # the others are read by objectives of their names
NAMES = sorted({form.name for form in FORMATS})


TASK_SHAPES: list[Callable[[int], dict[str, Any]]] = [
    lambda n: {"text": f"{n}", "label": n % 3},
    lambda n: {"premise": f"{n}", "hypothesis": "b", "label": "x"},
    lambda n: {"context": f"{n}", "question": "q", "choices": ["a", "b", "c"], "answer": n % 3},
    lambda n: {"question": f"{n}", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
]


def test_damaged_rows_with_labels_are_read_or_refused_in_words() -> None:
    random, read = Random(0), 0
    for number in range(4000):
        kind = random.randrange(len(TASK_SHAPES))
        row, task = TASK_SHAPES[kind](number), "classify" if kind < 2 else "multiple_choice"
        detector = Detector(random.choice([task, task, task, "similarity"]))
        for _ in range(random.randint(0, 2)):
            row = damage_row(random, row)
        try:
            found = detector.read(detector.recognise(row), row, Parsed("a.jsonl:1"))
            digest_row(found)
        except BadRow as bad:
            assert bad.reason, row
        else:
            assert is_sound(found) and found.answer, row
            read += 1
    assert read > 1000


@pytest.mark.parametrize("count", [4000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_damaged_rows_of_every_format_are_read_or_refused_in_words(count: int) -> None:
    random, read = Random(count), 0
    for number in range(0, count, 50):
        detector = Detector(
            random.choice(["auto"] * 20 + NAMES), for_prompts=random.random() < 0.2, keeps_columns=random.random() < 0.1
        )
        shape = random.choice(SHAPES)
        rows = [shape(number + place) | random.choice([*[{}] * 9, random.choice(SHAPES)(place)]) for place in range(50)]
        for _ in range(random.randint(0, 40)):
            place = random.randrange(50)
            rows[place] = damage_row(random, rows[place])
        for place, record in join_threads((f"a.jsonl:{place}", row) for place, row in enumerate(rows)):
            try:
                if isinstance(record, BadRow):
                    raise record
                row = detector.read(detector.recognise(record), record, Parsed(place))
                digest_row(row)
            except BadRow as bad:
                assert bad.reason, record
            else:
                assert is_sound(row), record
                read += 1
    assert read > count / 5


def write_damaged(random: Random, path: Path, count: int, forms: Sequence[Format] = OPEN) -> Format:
    """One format of the table (seldom others in between), four rows of ten damaged; return the format."""
    form, lines = random.choice(forms), list[str]()
    for number in range(count):
        row = row_of(random, form if random.random() < 0.98 else random.choice(OPEN), number)
        for _ in range(random.choice([0, 0, 0, 0, 0, 0, 1, 1, 2, 3])):
            row = damage_row(random, row)
        lines.append(json.dumps(row, ensure_ascii=random.random() < 0.5))
    path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    return form


@pytest.mark.parametrize("count", [6000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_damaged_rows_of_the_whole_table_are_accepted_refused_or_left_out(
    read: Read, tmp_path: Path, rejected_rows: Callable[..., list[dict[str, Any]]], count: int
) -> None:
    """Through the reading of a stage: each row is counted once, and one that is not kept is named with its line."""
    random, kept, refused = Random(count), 0, 0
    assert set(OPEN) == {Detector().recognise(row_of(Random(seed), form, 0)) for form in OPEN for seed in range(9)}
    for _ in range(count // 100):
        form = write_damaged(random, tmp_path / "rows.jsonl", 100)
        settings: dict[str, Any] = {
            "on_bad_row": random.choice(["skip", "skip", "skip", "error"]),
            "template": random.choice([True, False]),
            "dedupe": random.random() < 0.3,
        }
        takes = [name for name in ("sft", "rm", "dpo", "ppo") if form.kind in METHOD_KINDS[name]]
        method = random.choice(takes if random.random() < 0.95 else ["sft", "rm", "dpo"])
        if method == "ppo":
            settings["reward"] = "builtin:true-reward"
        reading = read(method, "rows.jsonl", **settings)
        [source] = reading.report.sources
        assert source.read == 100 == source.kept + source.rejected + source.duplicates_dropped, method
        kept += source.kept
        refused += source.rejected
        assert all(map(is_sound, reading.rows))
        if settings["on_bad_row"] == "skip":
            rejects = rejected_rows(reading.rejects)
            assert len(rejects) == source.rejected
            assert all(1 <= reject["line"] <= 100 and reject["reason"] for reject in rejects)
        elif reading.error is not None:
            assert reading.message.startswith("rows.jsonl:")
    print(f"{count} rows: {kept} kept, {refused} refused with their line")
    assert min(kept, refused) > count / 5


@pytest.fixture(scope="module")
def chats() -> Callable[[Stage], Any]:
    """Tokenizer and template of a stage, loaded once for all that name the same."""
    from alignkit.models.chat import load_chat

    found: dict[Any, Any] = {}

    def load(stage: Stage) -> Any:
        name = stage.model.chat_template
        if name not in found:
            found[name] = load_chat(stage)
        return found[name]

    return load


@pytest.mark.parametrize("files", [10, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["sft", "rm", "dpo", "kto", "ppo"])
def test_damaged_rows_are_tokenised_or_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chats: Callable[[Stage], Any], method: str, files: int
) -> None:
    """Rows of each method, ten to a file, from the file to the table of tokens."""
    from alignkit.train.tables import prepare_tables

    monkeypatch.chdir(tmp_path)
    random, tokenised = Random(method), 0
    forms = [form for form in FORMATS if form.kind in METHOD_KINDS["dpo" if method == "kto" else method]]
    name, own = {"kto": ("dpo", "loss_type: kto, "), "ppo": ("ppo", "reward: builtin:true-reward, ")}.get(
        method, (method, "")
    )
    for number in range(files):
        write_damaged(random, Path("rows.jsonl"), 10, forms)
        template = random.choice(["", ", chat_template: chatml"])
        tokens = random.choice(["error", "escape", "keep"])
        Path("recipe.yaml").write_text(
            f"name: a\nmodel: {{path: builtin:tiny-gpt2{template}}}\n"
            f"{name}: {{{own}data: rows.jsonl, on_bad_row: skip, special_tokens_in_text: {tokens}}}\n"
        )
        stage, rejects = resolve(load_recipe(Path("recipe.yaml")), name), Rejects()
        try:
            tables = prepare_tables(stage, chats(stage), tmp_path / f"{number}", rejects=rejects)
        except AlignKitError as error:
            assert str(error)
            assert not isinstance(error, DataError) or "rows.jsonl" in str(error) or "recipe.yaml" in str(error), error
            continue
        [source] = tables.report.sources
        assert source.read == 10 == source.kept + source.rejected
        tokenised += source.kept
    print(f"{method}: {10 * files} rows, {tokenised} tokenised")
    assert tokenised > 2 * files


@pytest.mark.parametrize("block", range(10))
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_damaged_file_is_read_or_refused_in_words(read: Read, tmp_path: Path, block: int, on_bad_row: str) -> None:
    accepted = 0
    for seed in range(100 * block, 100 * block + 100):
        random = Random(seed)
        path = make_file(random, tmp_path)
        method = random.choice(["sft", "sft", "rm", "dpo"])
        reading = read(method, path.name, on_bad_row=on_bad_row, dedupe=random.random() < 0.5)
        source = reading.report.sources[0] if reading.report.sources else None
        assert all(map(is_sound, reading.rows)), f"seed {seed}"
        if reading.error is None:
            accepted += 1
            assert source is not None
            assert source.read == source.kept + source.rejected + source.duplicates_dropped, f"seed {seed}"
            assert reading.rows, f"seed {seed}"
        else:
            first = reading.message.splitlines()[0]
            assert first.startswith((f"{path.name}:", f"{path.name}[")), f"seed {seed}: {first}"
            assert len(reading.error.problems) <= 7, f"seed {seed}"
            assert all(problem.what and "\n" not in problem.what for problem in reading.error.problems), f"seed {seed}"
        path.unlink()
    assert accepted >= 5  # the damage must not be so thorough that only the first check is tested
