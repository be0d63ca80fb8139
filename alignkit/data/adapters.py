"""How a record becomes a Row: one function a way to write answers, which raises BadRow with the first thing wrong."""

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from alignkit.data.files import type_name
from alignkit.data.rows import BadRow, Message, Row, Text
from alignkit.data.values import (
    KNOWN,
    REASONING_KEYS,
    ROLE_KEYS,
    Reading,
    check_answer,
    check_conversation,
    check_json,
    check_list,
    check_messages,
    check_number,
    check_prompt,
    check_text,
    check_tools,
    end_prompt,
    is_empty,
    join_prompt,
    last_asked,
)

# Columns by what they say; the first one with something in it counts.
_COLUMNS: dict[str, tuple[str, ...]] = {name: tuple(columns) for name, columns in KNOWN["columns"].items()}
CONVERSATIONS, PROMPTS, ANSWERS, LABELS = (_COLUMNS[name] for name in ("conversations", "prompts", "answers", "labels"))
CONTEXTS = _COLUMNS["contexts"]  # beside a prompt they follow it; alone they are one
SYSTEMS, TOOLS, RANKED = (_COLUMNS[name] for name in ("systems", "tools", "ranked"))
REJECTED = _COLUMNS["rejected"]  # beside a conversation whose last answer is the chosen one
SCORES, MASKS = _COLUMNS["scores"], _COLUMNS["masks"]  # higher is better; TRL's
ASKED = (*PROMPTS, *CONTEXTS, *CONVERSATIONS, *SYSTEMS, *TOOLS, "chat_template_kwargs")
_WORDS = {
    **dict.fromkeys(("desirable", "good", "chosen", "accepted", "positive", "yes", "like", "thumbs_up", "up"), 1.0),
    **dict.fromkeys(("undesirable", "bad", "rejected", "negative", "no", "dislike", "thumbs_down", "down"), 0.0),
}
START = "\n\nHuman:"
_ANSWER = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")


def adapt_text(reading: Reading) -> Row:
    for name in ROLE_KEYS:
        if str(reading.record.get(name)).strip().lower() in KNOWN["roles"]:
            what = "a turn is no text of its own; write each conversation as a row of messages, or leave the column out"
            raise BadRow(f"{name}: is {reading.record[name]}; {what} with columns: {{{name}: null}}")
    return Row("text", "", (check_text(reading.need("text"), "text"),), place=reading.place)


def adapt_conversation(reading: Reading) -> Row:
    return Row("messages", "", (_read_conversation(reading),), place=reading.place)


def adapt_prompt(reading: Reading) -> Row:
    return Row("prompt", read_prompt(reading), (), place=reading.place)


def adapt_prompt_completion(reading: Reading) -> Row:
    prompt, answer = _read_answer(reading)
    return Row("prompt_completion", prompt, (answer,), place=reading.place)


def _read_conversation(reading: Reading) -> list[Message]:
    name = reading.pick(*CONVERSATIONS)
    value = reading.need(name)
    transcript = type(value) is str and value.lstrip().startswith(START.strip())
    messages = read_turns(value, name) if transcript else value
    if type(value) is list and len(value) > 1 and all(type(said) is str for said in value):  # they take turns
        messages = [{"role": ("user", "assistant")[at % 2], "content": said} for at, said in enumerate(value)]
    return _surround(check_conversation(messages, name, reading), reading)


def _split_last(reading: Reading) -> tuple[list[Message], list[Message]]:
    messages = _read_conversation(reading)
    last = last_asked(messages)
    end_prompt(messages[:last], "the turns before the answer")
    return messages[:last], messages[last:]


def _surround(messages: list[Message], reading: Reading) -> list[Message]:
    """Put the row's system message and history before a conversation, and beside it what the template is given."""
    record = reading.record
    history = record.get("history")
    if not is_empty(history) and "history" not in reading.used:  # SHP's question is one
        reading.used.add("history")
        turns = list(check_json(history, "history", list))
        messages = [*check_messages(turns, "history", reading), *messages]
    if name := reading.first(*SYSTEMS):
        said = check_text(record[name], name)
        first = messages[0]
        if first["role"] != "system":
            messages = [Message(role="system", content=said), *messages]
        elif first["content"].strip() != said.strip():
            raise BadRow(f"{name}: differs from the system message of the conversation; keep one of the two")
    given: dict[str, Any] = {}
    if name := reading.first(*TOOLS):
        given["tools"] = check_tools(record[name], name)
    if reading.first("chat_template_kwargs"):
        own = check_json(record["chat_template_kwargs"], "chat_template_kwargs", dict)
        given |= {key: value for key, value in own.items() if value is not None}
    if not given:
        return messages
    first = messages[0]  # copied: the messages may be the record's own
    return [{**first, "template_kwargs": {**first.get("template_kwargs", {}), **given}}, *messages[1:]]


def read_prompt(reading: Reading, *, transcript: bool = False) -> Text:
    """Read the question: a text, or messages where the row has them; with `transcript` an HH text becomes its turns."""
    record = reading.record
    history = ("history",) if type(record.get("history")) is str else ()  # SHP's name for the question
    name = reading.first(*PROMPTS, *CONTEXTS, *CONVERSATIONS, *history) or reading.pick(*PROMPTS, *CONVERSATIONS)
    value = reading.need(name)
    if name in CONVERSATIONS:
        check_list(value, name)
    if transcript and type(value) is str and value.startswith(START):
        value = read_turns(value, name)
        if not value[-1]["content"]:
            del value[-1]
    prompt = check_prompt(value, name, reading)
    context = reading.first(*CONTEXTS)
    if context is not None and name in PROMPTS:
        if not isinstance(prompt, str):
            raise BadRow(f"{context}: stands beside messages; put it into one of them")
        prompt = f"{prompt}\n\n{check_text(record[context], context)}"
    if isinstance(prompt, list):
        return _surround(prompt, reading)
    turns = _surround([Message(role="user", content=prompt)], reading)
    return prompt if len(turns) == 1 and len(turns[0]) == 2 else turns


def _read_answer(reading: Reading) -> tuple[Text, Text]:
    """Read a prompt and its one answer in one shape."""
    record = reading.record
    missing = "output" if "instruction" in record else "completion"
    name = reading.first(*ANSWERS) or next((name for name in ANSWERS if name in record), missing)
    prompt, answer = read_prompt(reading), check_answer(reading.need(name), name, reading)
    if thoughts := reading.first(*REASONING_KEYS):
        turns = [Message(role="assistant", content=answer)] if isinstance(answer, str) else answer
        if len(turns) > 1 or "reasoning_content" in turns[0]:
            what = "stands beside several turns, or one with its own reasoning; put it into the turn"
            raise BadRow(f"{thoughts}: {what}")
        answer = [{**turns[0], "reasoning_content": check_text(record[thoughts], thoughts)}]
    prompt, (answer,) = join_prompt(prompt, [answer], [name])
    return prompt, answer


def adapt_unpaired(reading: Reading) -> Row:
    """Read one answer and whether it is desirable; of a conversation the last answer is the one that was judged."""
    if reading.first(*ANSWERS) or not reading.first(*CONVERSATIONS):
        prompt, answer = _read_answer(reading)
    else:
        prompt, answer = _split_last(reading)
        if not answer:
            raise BadRow("label: there is no answer that it could judge")
    name = reading.pick(*LABELS)
    value = reading.need(name)
    label = _WORDS.get(value.strip().lower()) if type(value) is str else None
    label = check_number(value, name) if label is None else label
    if label not in (0.0, 1.0):
        raise BadRow(f"{name}: is {value}; it must be true or false (1 or 0) where there is one completion")
    return Row("unpaired", prompt, (answer,), label=label, place=reading.place)


def adapt_pair(reading: Reading) -> Row:
    return _pair(reading, read_prompt(reading), reading.need("chosen"), reading.need("rejected"))


def _pair(
    reading: Reading, prompt: Text, better: Any, worse: Any, names: tuple[str, str] = ("chosen", "rejected")
) -> Row:
    answers = [check_answer(value, name, reading) for value, name in zip((better, worse), names, strict=True)]
    prompt, (chosen, rejected) = join_prompt(prompt, answers, list(names))
    return _finish_pair(reading, prompt, chosen, rejected)


def _count_shared(chosen: Text, rejected: Text) -> int:
    """Count the characters or turns that two answers begin with; equal ones are a BadRow."""
    if chosen == rejected:
        raise BadRow("rejected: is the same as chosen", equal_answers=True)
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))


def _finish_pair(reading: Reading, prompt: Text, chosen: Text, rejected: Text) -> Row:
    shorter, common = min(len(chosen), len(rejected)), _count_shared(chosen, rejected)
    if isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list):
        # What both answers begin with was asked, where it ends with the user: [a, u, b] and [a, u, c] differ in b.
        while common and chosen[common - 1]["role"] == "assistant":
            common -= 1
        if common < shorter:
            prompt, chosen, rejected = [*prompt, *chosen[:common]], chosen[common:], rejected[common:]
    name = reading.first("soft_label", "label")
    label = None if name is None else check_number(reading.record[name], name, low=0, high=1)
    margin = check_number(reading.record["margin"], "margin") if reading.first("margin") else None
    return Row("pair", prompt, (chosen, rejected), label=label, margin=margin, place=reading.place)


def adapt_implicit(reading: Reading) -> Row:
    """Take the common start of two texts as their prompt, cut where a word begins.
    TRL cuts at the first character that differs, which can be inside a word ("bl" of blue and black). What the
    answers share beyond the cut adds the same log-probability to both, so no loss of pairs changes."""
    chosen, rejected = check_text(reading.need("chosen"), "chosen"), check_text(reading.need("rejected"), "rejected")
    start = _count_shared(chosen, rejected)
    while start and not (chosen[start : start + 1].isspace() and rejected[start : start + 1].isspace()):
        start -= 1
    prompt, answers = chosen[:start], (chosen[start:], rejected[start:])
    for answer, field in zip(answers, ("chosen", "rejected"), strict=True):
        check_text(answer, f"{field} after the common prompt")
    if not prompt.strip():
        columns = ", ".join(map(str, reading.record))
        raise BadRow(
            f"prompt: is missing, and chosen and rejected share no beginning that could be it; the row has {columns}; "
            "name what was asked with columns: {prompt: COLUMN}"
        )
    turns = _surround([Message(role="user", content=prompt.strip())], reading)
    if len(turns) > 1 or len(turns[0]) > 2:
        return _pair(reading, turns, answers[0].strip(), answers[1].strip())
    return _finish_pair(reading, prompt, *answers)


def adapt_implicit_chat(reading: Reading, better: str = "chosen", worse: str = "rejected") -> Row:
    """Take the common first turns of two conversations as their prompt."""
    chosen = check_conversation(reading.need(better), better, reading)
    rejected = check_conversation(reading.need(worse), worse, reading)
    start, length = _count_shared(chosen, rejected), min(len(chosen), len(rejected))
    if start == length:
        raise BadRow(f"{'rejected' if length == len(rejected) else 'chosen'}: is only the beginning of the other")
    if not start or chosen[start]["role"] != "assistant" or rejected[start]["role"] != "assistant":
        raise BadRow(f"rejected[{start}]: the prompts differ; all turns before the answer must be those of chosen")
    while chosen[start - 1]["role"] == "assistant":
        start -= 1
    end_prompt(chosen[:start], "the common prompt")
    return _finish_pair(reading, _surround(chosen[:start], reading), chosen[start:], rejected[start:])


def adapt_hh(reading: Reading) -> Row:
    """Read two of Anthropic's HH transcripts, "\\n\\nHuman: ...\\n\\nAssistant: ...".
    The split is `get_hh`'s of eric-mitchell/direct-preference-optimization (the DPO paper's code, arXiv 2305.18290):
    the prompt is everything up to and including the last "\\n\\nAssistant:" of chosen, and rejected is cut at the same
    length. We differ in one thing: where rejected does not start with that prompt, or goes on with further turns, the
    cut would pair answers to different prompts, so the row is refused (4 of 1,800 pairs of the harmlessness test set).
    """
    ends, texts = [], [check_text(reading.need(field), field) for field in ("chosen", "rejected")]
    for field, text in zip(("chosen", "rejected"), texts, strict=True):
        if not text.startswith(START):
            raise BadRow(f"{field}: does not start with '\\n\\nHuman:'; it is not an HH transcript")
        if _ANSWER not in text:
            raise BadRow(f"{field}: has no '\\n\\nAssistant:' turn")
        ends.append(text.rfind(_ANSWER) + len(_ANSWER))
    end, (chosen, rejected) = ends[0], texts
    if ends[1] != end or rejected[:end] != chosen[:end]:
        raise BadRow("rejected: its prompt (all up to the last '\\n\\nAssistant:') differs from that of chosen")
    prompt = read_turns(chosen[: end - len(_ANSWER)], "chosen")
    if prompt[-1]["role"] != "user":
        raise BadRow("chosen: two assistant turns in a row at its end; the prompt must end with a Human turn")
    answers = [text[end:].strip() for text in texts]
    if "" in answers:
        field = ("chosen", "rejected")[answers.index("")]
        raise BadRow(f"{field}: the answer after the last '\\n\\nAssistant:' is empty")
    better, worse = ([Message(role="assistant", content=answer)] for answer in answers)
    return _finish_pair(reading, _surround(prompt, reading), better, worse)


def read_turns(transcript: str, field: str) -> list[Message]:
    """Read the turns of a transcript; an empty last one of the assistant, which asks for an answer, is kept empty."""
    _, *pieces = _TURN.split(f"\n\n{transcript.lstrip()}")
    turns: list[Message] = []
    for number, (speaker, said) in enumerate(zip(pieces[::2], pieces[1::2], strict=True)):
        content = said.strip()
        if not content and (speaker != "Assistant" or 2 * number + 2 < len(pieces)):
            raise BadRow(f"{field}: turn {len(turns) + 1} ({speaker}) is empty")
        turns.append({"role": "user" if speaker == "Human" else "assistant", "content": content})
    return turns


def adapt_rejected_response(reading: Reading) -> Row:
    """Read a conversation whose last answer is the chosen one, with the other one beside it."""
    name = reading.pick(*REJECTED)
    prompt, chosen = _split_last(reading)
    return _pair(reading, prompt, chosen, reading.need(name), ("messages", name))


def adapt_choice(reading: Reading, answers: list[str], choice: str = "", how: str = "") -> Row:
    """Read two answers and a column that says which is better; without one it is the first.
    It says so by "number", 1 if the "first" is, "strength" around 0, or "name"."""
    is_second, equal = False, "no answer is better than the other"
    if how == "name":
        name = check_text(reading.need(choice), choice).strip().lower()
        name = name.removeprefix("model_").removeprefix("response_")
        if name not in ("a", "b", "1", "2"):
            raise BadRow(f"{choice}: is {reading.record[choice]!r}; {equal}", equal_answers=True)
        is_second = name in ("b", "2")
    elif how:
        number = check_number(reading.need(choice), choice)
        if how == "strength" and number == 0:
            raise BadRow(f"{choice}: is 0; {equal}", equal_answers=True)
        if how != "strength" and number not in (0.0, 1.0):
            raise BadRow(f"{choice}: is {reading.record[choice]}; it must be 0 or 1, the number of the better answer")
        is_second = number > 0 if how == "strength" else (number == 1) is (how == "number")
    better, worse = reversed(answers) if is_second else answers
    if better.startswith("conversation"):
        return adapt_implicit_chat(reading, better, worse)
    return _pair(reading, read_prompt(reading), reading.need(better), reading.need(worse), (better, worse))


_ITEM_TEXTS = ("response", "answer", "completion", "text", "content", "output")
_ITEM_SCORES = {**dict.fromkeys(SCORES, 1), "rank": -1, "ranking": -1}


def adapt_rated_items(reading: Reading) -> Row:
    """Read answers with their scores or ranks in one list of objects: raw UltraFeedback, Nectar."""
    column = reading.pick(*RANKED)
    prompt = read_prompt(reading, transcript=True)
    answers: list[Text] = []
    scores = []
    for index, item in enumerate(check_list(reading.need(column), column)):
        field = f"{column}[{index}]"
        if type(item) is not dict:
            raise BadRow(f"{field}: must be an object with response and overall_score")
        text = next((key for key in _ITEM_TEXTS if key in item), "response")
        score = next((key for key in _ITEM_SCORES if item.get(key) is not None), None)
        score = score or next((key for key in _ITEM_SCORES if key in item), "overall_score")
        for key in (text, score):
            if item.get(key) is None:
                raise BadRow(f"{field}.{key}: is {'null' if key in item else 'missing'}")
        answers.append(check_text(item[text], f"{field}.{text}"))
        scores.append(_ITEM_SCORES[score] * check_number(item[score], f"{field}.{score}"))
    return _ranked(reading, prompt, answers, scores, column)


def adapt_ranked(reading: Reading) -> Row:
    """Read answers with scores (higher is better) or ranking (1 is best), or responses from best to worst."""
    field = reading.pick(*RANKED)
    values = check_list(reading.need(field), field)
    if type(values[0]) is dict and "role" not in values[0]:
        return adapt_rated_items(reading)
    prompt = read_prompt(reading)
    answers = [check_answer(value, f"{field}[{index}]", reading) for index, value in enumerate(values)]
    count, record = len(answers), reading.record
    given = [name for name in ("scores", "ranking") if record.get(name) is not None]
    reading.used.update(given)
    if len(given) > 1:
        raise BadRow("ranking: give scores or ranking, not both")
    if not given:
        if field != "responses":
            raise BadRow(f"scores: is missing; {field} need scores (higher is better) or ranking (1 is best)")
        return _ranked(reading, prompt, answers, [float(count - at) for at in range(count)], field)
    (name,) = given
    ranks = check_list(record[name], name)
    if len(ranks) != count:
        raise BadRow(f"{name}: has {len(ranks)} entries for {count} {field}")
    numbers = [check_number(value, f"{name}[{index}]") for index, value in enumerate(ranks)]
    return _ranked(reading, prompt, answers, numbers if name == "scores" else [-number for number in numbers], field)


def _ranked(reading: Reading, prompt: Text, answers: list[Text], scores: list[float], field: str) -> Row:
    if len(answers) < 2:
        raise BadRow(f"{field}: has one answer; a ranking needs two or more")
    prompt, answers = join_prompt(prompt, answers, [f"{field}[{index}]" for index in range(len(answers))])
    order = sorted(range(len(answers)), key=lambda index: -scores[index])
    if scores[order[0]] == scores[order[-1]]:
        raise BadRow("scores: are all equal; no answer is better than another")
    for above, below in combinations(order, 2):
        if scores[above] != scores[below] and answers[above] == answers[below]:
            raise BadRow(f"{field}[{below}]: is the same as {field}[{above}] with another score", equal_answers=True)
    completions = tuple(answers[index] for index in order)
    return Row("ranked", prompt, completions, tuple(scores[index] for index in order), place=reading.place)


# Rows with labels, of an sft stage whose objective is named so. The columns, by what data sets call them.
TEXTS, CHOICES = _COLUMNS["texts"], _COLUMNS["choices"]

_STORIES = ("article", "passage", "context", "ctx", "premise", "prompt")
_QUESTIONS = ("question", "query")
_LABELLED = ("label", "gold_label", "class", "category", "target")
_RIGHT = ("answer", "label", "answerKey", "answer_key", "gold")


def adapt_classified(reading: Reading, usual: Sequence[str] = ("text",)) -> Row:
    """Read a text, or a pair such as premise and hypothesis, with its label; a pair alone where that is usual."""
    ways = [*KNOWN["pairs"], *([name] for name in TEXTS if len(usual) == 1)]
    names = next((names for names in ways if set(names) <= reading.record.keys()), usual)
    texts = tuple(check_text(reading.need(name), name) for name in names)
    name = next((name for name in _LABELLED if name in reading.record), "label")
    value = reading.need(name)
    if type(value) is float and value.is_integer():  # what pandas makes of whole numbers beside empty cells
        value = int(value)
    if type(value) not in (str, int, bool) or is_empty(value):
        raise BadRow(f"{name}: is {value!r}; it must be the name or the number of a label")
    if value in (-1, "-1", "-"):
        raise BadRow(f"{name}: is {value}, which stands for a row without a label; leave such rows out")
    answer = str(value).lower() if type(value) is bool else str(value).strip()
    return Row("labelled", "", texts, place=reading.place, answer=answer)


def adapt_choices(reading: Reading) -> Row:
    """Read a context, its answers, and which is right: as a number from 0, a letter, a name of theirs, or the text."""
    record, context = reading.record, [reading.first(*_STORIES), reading.first(*_QUESTIONS)]
    prompt = "\n".join(check_text(reading.need(name), name) for name in [*filter(None, context)] or ["context"])
    column = next((name for name in CHOICES if name in record), "choices")
    given = reading.need(column)
    own: list[Any] = []
    if type(given) is dict:  # ARC, CommonsenseQA
        own, given = check_list(given.get("label"), f"{column}.label"), given.get("text")
    texts = [check_text(text, f"{column}[{number}]") for number, text in enumerate(check_list(given, column))]
    if len(texts) < 2:
        raise BadRow(f"{column}: has one answer; a choice needs two or more")
    name = next((name for name in _RIGHT if name in record), "answer")
    value = reading.need(name)
    said = value.strip() if type(value) is str else value
    for known in ([text.strip() for text in texts], own, range(len(texts)), list(map(str, range(len(texts)))),
                  [chr(ord("A") + number) for number in range(len(texts))]):  # fmt: skip
        if type(said) in (int, str) and said in known:
            return Row("labelled", prompt, tuple(texts), place=reading.place, answer=str(list(known).index(said)))
    raise BadRow(f"{name}: is {value!r}, which is none of the {len(texts)} {column}: give its number from 0, a letter, "
                 "or the text")  # fmt: skip


def adapt_segments(reading: Reading) -> Row:
    """Read pieces of one text, each learnt or only read."""
    pieces, learnt = [], []
    for index, piece in enumerate(check_list(reading.need("segments"), "segments")):
        field = f"segments[{index}]"
        if type(piece) is not dict or type(piece.get("text")) is not str or type(piece.get("label")) is not bool:
            raise BadRow(f"{field}: must be an object with text and label: true (learnt) or false (only read)")
        if piece["text"]:
            pieces.append(piece["text"])
            learnt.append(float(piece["label"]))
    if not any(learnt):
        raise BadRow("segments: none is to be learnt")
    return Row("segments", "", tuple(pieces), tuple(learnt), place=reading.place)


def adapt_tokens(reading: Reading) -> Row:
    """Take token ids as they are; learnt is what labels, or a mask of TRL's, says; all of them without one."""
    record = reading.record
    ids = _check_ids(reading.need("input_ids"), "input_ids", low=0)
    reading.used.update(("labels", "attention_mask", *MASKS))
    labels = _check_ids(record["labels"], "labels", low=-100) if record.get("labels") is not None else ids
    masks = {name: record[name] for name in ("attention_mask", *MASKS) if record.get(name) is not None}
    for name, value in (("labels", labels), *masks.items()):
        if type(value) is not list or len(value) != len(ids):
            what = f"has {len(value)} entries" if type(value) is list else f"is {type_name(value)}"
            raise BadRow(f"{name}: {what}; input_ids has {len(ids)}")
    for name in MASKS:
        if name in masks:
            labels = [label if keep else -100 for label, keep in zip(labels, masks[name], strict=True)]
    if any(label not in (-100, token) for label, token in zip(labels, ids, strict=True)):
        raise BadRow("labels: are -100 or the ids of the same places; they are shifted while training")
    attended = masks.get("attention_mask") or [1] * len(ids)
    kept = [(token, label) for token, label, keep in zip(ids, labels, attended, strict=True) if keep]
    if not any(label != -100 for _, label in kept[1:]):
        raise BadRow("labels: nothing is to be learnt")
    tokens = ([token for token, _ in kept], [label for _, label in kept])
    return Row("tokens", "", (), place=reading.place, tokens=tokens)


def _check_ids(value: Any, field: str, *, low: int) -> list[int]:
    ids = check_list(check_json(value, field, list) if type(value) is str else value, field)
    for index, token in enumerate(ids):
        if type(token) is not int or token < low or (low < 0 and low < token < 0):
            found = token if type(token) is int else type_name(token)
            raise BadRow(f"{field}[{index}]: is {found}; it must be a token id")
    return ids
