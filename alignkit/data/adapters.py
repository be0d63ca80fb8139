"""How a record of each format becomes a Row.

One function a format, record and place in, Row out; each raises BadRow with the first thing that is wrong. Which
format a record is in was decided before (`formats`).
"""

from __future__ import annotations

from itertools import combinations

from alignkit.data.files import Record
from alignkit.data.rejects import BadRow
from alignkit.data.rows import Row, Text
from alignkit.data.transcripts import split_pair
from alignkit.data.values import (
    check_answer,
    check_conversation,
    check_list,
    check_number,
    check_prompt,
    check_text,
    end_prompt,
    join_prompt,
    need,
    need_text,
)


def adapt_text(record: Record, place: str) -> Row:
    return Row("text", "", (need_text(record, "text"),), None, None, None, place)


def adapt_messages(record: Record, place: str) -> Row:
    return Row("messages", "", (check_conversation(need(record, "messages"), "messages"),), None, None, None, place)


def adapt_sharegpt(record: Record, place: str) -> Row:
    messages = check_conversation(need(record, "conversations"), "conversations")
    return Row("messages", "", (messages,), None, None, None, place)


def adapt_prompt(record: Record, place: str) -> Row:
    return Row("prompt", check_prompt(need(record, "prompt"), "prompt"), (), None, None, None, place)


def adapt_prompt_completion(record: Record, place: str) -> Row:
    prompt = check_prompt(need(record, "prompt"), "prompt")
    answer = check_answer(need(record, "completion"), "completion")
    if type(prompt) is not str or type(answer) is not str:
        prompt, (answer,) = join_prompt(prompt, [answer], ["completion"])
    return Row("prompt_completion", prompt, (answer,), None, None, None, place)


def adapt_unpaired(record: Record, place: str) -> Row:
    prompt = check_prompt(need(record, "prompt"), "prompt")
    answer = check_answer(need(record, "completion"), "completion")
    prompt, (answer,) = join_prompt(prompt, [answer], ["completion"])
    label = check_number(need(record, "label"), "label")
    if label not in (0.0, 1.0):
        raise BadRow(f"label: is {record['label']}; it must be true or false (1 or 0) where there is one completion")
    return Row("unpaired", prompt, (answer,), None, label, None, place)


def adapt_pair(record: Record, place: str) -> Row:
    return _pair(record, check_prompt(need(record, "prompt"), "prompt"), place)


def adapt_sharegpt_pair(record: Record, place: str) -> Row:
    turns = check_list(need(record, "conversations"), "conversations")
    return _pair(record, check_prompt(turns, "conversations"), place)


def adapt_alpaca_pair(record: Record, place: str) -> Row:
    return _pair(record, _instruction(record), place)


def _pair(record: Record, prompt: Text, place: str) -> Row:
    chosen = check_answer(need(record, "chosen"), "chosen")
    rejected = check_answer(need(record, "rejected"), "rejected")
    if type(prompt) is not str or type(chosen) is not str or type(rejected) is not str:
        prompt, (chosen, rejected) = join_prompt(prompt, [chosen, rejected], ["chosen", "rejected"])
    return _finish_pair(record, prompt, chosen, rejected, place)


def _finish_pair(record: Record, prompt: Text, chosen: Text, rejected: Text, place: str) -> Row:
    if chosen == rejected:
        raise BadRow("rejected: is the same as chosen", equal_answers=True)
    return Row("pair", prompt, (chosen, rejected), None, _soft_label(record), _margin(record), place)


def _soft_label(record: Record) -> float | None:
    field = "soft_label" if record.get("soft_label") is not None else "label"
    value = record.get(field)
    return None if value is None or value == "" else check_number(value, field, low=0, high=1)


def _margin(record: Record) -> float | None:
    value = record.get("margin")
    return None if value is None or value == "" else check_number(value, "margin")  # CSV has no null


def adapt_implicit(record: Record, place: str) -> Row:
    """Take the common start of two texts as their prompt, cut where a word begins.

    TRL cuts at the first character that differs, which can be inside a word ("bl" of blue and black). What the
    answers share beyond the cut adds the same log-probability to both, so no loss of pairs changes.
    """
    chosen, rejected = need_text(record, "chosen"), need_text(record, "rejected")
    if chosen == rejected:
        raise BadRow("rejected: is the same as chosen", equal_answers=True)
    length = min(len(chosen), len(rejected))
    start = next((at for at in range(length) if chosen[at] != rejected[at]), length)
    while start and not (chosen[start : start + 1].isspace() and rejected[start : start + 1].isspace()):
        start -= 1
    prompt, answers = chosen[:start], (chosen[start:], rejected[start:])
    for answer, field in zip(answers, ("chosen", "rejected"), strict=True):
        check_text(answer, f"{field} after the common prompt")
    return _finish_pair(record, prompt, *answers, place)


def adapt_implicit_chat(record: Record, place: str) -> Row:
    """Take the common first turns of two conversations as their prompt."""
    chosen = check_conversation(need(record, "chosen"), "chosen")
    rejected = check_conversation(need(record, "rejected"), "rejected")
    if chosen == rejected:
        raise BadRow("rejected: is the same as chosen", equal_answers=True)
    length = min(len(chosen), len(rejected))
    start = next((at for at in range(length) if chosen[at] != rejected[at]), length)
    if start == length:
        raise BadRow(f"{'rejected' if length == len(rejected) else 'chosen'}: is only the beginning of the other")
    if not start or chosen[start]["role"] != "assistant" or rejected[start]["role"] != "assistant":
        raise BadRow(f"rejected[{start}]: the prompts differ; all turns before the answer must be those of chosen")
    end_prompt(chosen[:start], "the common prompt")
    return _finish_pair(record, chosen[:start], chosen[start:], rejected[start:], place)


def adapt_hh(record: Record, place: str) -> Row:
    prompt, chosen, rejected = split_pair(need_text(record, "chosen"), need_text(record, "rejected"))
    return _finish_pair(record, prompt, chosen, rejected, place)


def _instruction(record: Record) -> str:
    """Join Alpaca's instruction and input by a blank line; an input that is empty adds nothing."""
    instruction = need_text(record, "instruction")
    context = record.get("input")
    if context is None or (type(context) is str and not context.strip()):
        return instruction
    return f"{instruction}\n\n{check_text(context, 'input')}"


def adapt_alpaca(record: Record, place: str) -> Row:
    return Row("prompt_completion", _instruction(record), (need_text(record, "output"),), None, None, None, place)


def adapt_ultrafeedback_ranked(record: Record, place: str) -> Row:
    """Rank the completions of raw UltraFeedback by overall_score."""
    prompt = need_text(record, "instruction" if "instruction" in record else "prompt")
    answers, scores = [], []
    for index, item in enumerate(check_list(need(record, "completions"), "completions")):
        field = f"completions[{index}]"
        if type(item) is not dict:
            raise BadRow(f"{field}: must be an object with response and overall_score")
        for key in ("response", "overall_score"):
            if item.get(key) is None:
                raise BadRow(f"{field}.{key}: is {'null' if key in item else 'missing'}")
        answers.append(check_text(item["response"], f"{field}.response"))
        scores.append(check_number(item["overall_score"], f"{field}.overall_score"))
    return _ranked(prompt, list(answers), scores, "completions", place)


def adapt_ranked(record: Record, place: str) -> Row:
    """Read completions with scores (higher is better) or ranking (1 is best, equal ranks are ties), or responses
    from best to worst."""
    prompt = check_prompt(need(record, "prompt"), "prompt")
    field = "responses" if "completions" not in record else "completions"
    values = check_list(need(record, field), field)
    answers = [check_answer(value, f"{field}[{index}]") for index, value in enumerate(values)]
    return _ranked(prompt, answers, _scores(record, field, len(answers)), field, place)


def _scores(record: Record, field: str, count: int) -> list[float]:
    given = [name for name in ("scores", "ranking") if record.get(name) is not None]
    if len(given) > 1:
        raise BadRow("ranking: give scores or ranking, not both")
    if not given:
        if field == "completions":
            raise BadRow("scores: is missing; completions need scores (higher is better) or ranking (1 is best)")
        return [float(count - place) for place in range(count)]
    (name,) = given
    values = check_list(record[name], name)
    if len(values) != count:
        raise BadRow(f"{name}: has {len(values)} entries for {count} {field}")
    numbers = [check_number(value, f"{name}[{index}]") for index, value in enumerate(values)]
    return numbers if name == "scores" else [-number for number in numbers]


def _ranked(prompt: Text, answers: list[Text], scores: list[float], field: str, place: str) -> Row:
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
    return Row("ranked", prompt, completions, tuple(scores[index] for index in order), None, None, place)
