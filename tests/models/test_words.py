from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from alignkit.models.chat import WordTokenizer
from alignkit.models.files import KNOWN
from alignkit.models.start import builtin_tokenizer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PIECES = st.sampled_from(
    ["the", "The", "don't", "we'LL", "12345", "x1", "(", "!!", "...", "\n", "\n\n", "\r\n", "\t", " ", "  ", "é",
     "e\u0301", "\u0301", "日本", "😀", "\u00a0", "\u3000", "\u200b", "<|im_end|>", "<|im_", "\x00", "_", "-a", "İ"]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=40) | st.lists(PIECES, max_size=9).map(" ".join)


def backends() -> dict[str, Tokenizer]:
    """Return the builtin tokenizer as it is (GPT-2's pattern) and cut by each pattern we call safe, NFC too."""
    found = {"gpt2": builtin_tokenizer().backend_tokenizer}
    for number, pattern in enumerate(sorted(KNOWN["patterns_cut_at_spaces"])):
        backend = builtin_tokenizer().backend_tokenizer
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        backend.normalizer = normalizers.NFC()
        found[f"pattern{number}"] = backend
    return found


CASES = [(backend, WordTokenizer(backend)) for backend in backends().values()]


@settings(max_examples=400, deadline=None)
@given(st.lists(TEXTS, max_size=5))
@example(["", " ", "  ", "a", " a", "a ", " a b ", "a  b", "a \nb", "a\n b", "a\n\nb", "<|im_end|> a <|im_end|>"])
def test_cached_words_give_the_ids_of_the_tokenizer_itself(texts: list[str]) -> None:
    for backend, words in CASES:
        assert words.cached
        expected = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
        assert [ids.tolist() for ids in words.encode(texts)] == expected
        assert [ids.tolist() for ids in words.encode(texts)] == expected  # now from the cache


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        (["one\ntwo a\n\nb", "x\nthree y\n\nc"], "one\nthree a\n\nc"),
        (["def f(x):\n    return x + 1", "\n\nthe end.  The"], "\n\nthe end.  The f(x):\n    return x + x + 1"),
    ],
    ids=["newlines", "runs of white space"],
)
def test_known_words_are_put_together(monkeypatch: pytest.MonkeyPatch, seen: list[str], text: str) -> None:
    for backend in backends().values():
        words = WordTokenizer(backend)
        words.encode(seen)
        asked: list[str] = []
        encode = words._encode_all
        monkeypatch.setattr(words, "_encode_all", lambda texts, a=asked, e=encode: [a.extend(texts), e(texts)][1])
        assert words.encode([text])[0].tolist() == backend.encode(text).ids
        assert asked == []


def test_a_token_that_takes_the_newline_before_it_keeps_words_with_newlines_whole() -> None:
    from tokenizers import AddedToken

    for backend in backends().values():
        backend.add_tokens([AddedToken("<x>", lstrip=True)])
        words = WordTokenizer(backend)
        assert words.cached
        assert words.encode(["one\n<x> two\nthree"])[0].tolist() == backend.encode("one\n<x> two\nthree").ids


def test_full_cache_is_emptied_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.models.chat._MAX_WORDS", 3)
    backend = builtin_tokenizer().backend_tokenizer
    words = WordTokenizer(backend)
    for text in ("one two three four five", "six seven", "one two eight"):
        assert words.encode([text])[0].tolist() == backend.encode(text).ids


def test_texts_without_spaces_do_not_pile_up_in_the_cache() -> None:
    import tracemalloc

    words, held = WordTokenizer(builtin_tokenizer().backend_tokenizer), []
    tracemalloc.start()
    for batch in range(20):
        words.encode([f"{batch}{number}" + "日本語" * 2000 for number in range(50)])
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert max(held) < 50 * 2**20  # 93 MiB for all of them, and so on with their number


@pytest.mark.parametrize("change", ["normalizer", "prefix", "pattern", "rstrip"])
def test_tokenizers_that_may_cut_elsewhere_do_the_work_themselves(change: str) -> None:
    from tokenizers import AddedToken

    backend = builtin_tokenizer().backend_tokenizer
    if change == "normalizer":
        backend.normalizer = normalizers.Prepend("▁")
    elif change == "prefix":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "pattern":
        split = pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    else:
        backend.add_tokens([AddedToken("<x>", rstrip=True)])
    words = WordTokenizer(backend)
    assert not words.cached
    (ids,) = words.encode(["the cat <x> sat"])
    assert ids.tolist() == backend.encode("the cat <x> sat", add_special_tokens=False).ids


@pytest.mark.real_data
def test_real_gpt2_vocabulary_on_real_dialogues() -> None:
    import gzip
    import json

    if not (DATA / "gpt2-bpe").is_dir():
        pytest.skip(f"{DATA} is not here")
    from tokenizers import models

    vocabulary = json.loads((DATA / "gpt2-bpe" / "encoder.json").read_text())
    lines = (DATA / "gpt2-bpe" / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    merges = [(pair[0], pair[1]) for pair in (line.split() for line in lines) if len(pair) == 2]
    merges = merges[1:] if merges[0][0] == "#version:" else merges
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with gzip.open(DATA / "hh-rlhf" / "harmless_pairs.jsonl.gz", "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line, _ in zip(stream, range(500), strict=False)]
    texts = [text for row in rows for text in (row["chosen"], row["rejected"])]
    words = WordTokenizer(backend)
    assert words.cached
    assert [ids.tolist() for ids in words.encode(texts)] == [one.ids for one in backend.encode_batch(texts)]
