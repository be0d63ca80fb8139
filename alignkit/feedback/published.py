"""The JSON files that Anthropic published with Constitutional AI (arXiv 2212.08073), as they are.

https://github.com/anthropics/ConstitutionalHarmlessnessPaper: critique and revision instructions, comparison
instructions. The words around an instruction ("\\n\\nCritiqueRequest: ", " Options:") are taken off, for `prompts` puts
them back, byte for byte. Examples and chains are read elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from alignkit.errors import Problem, RecipeError
from alignkit.feedback.principles import Principle

CRITIQUE_FRAME = ("\n\nCritiqueRequest: ", "\n\nCritique:")
REVISION_FRAME = ("\n\nRevisionRequest: ", "\n\nRevision:")
COMPARISON_FRAME = ("\n", " Options:")


def read_published(text: str, label: str) -> list[Principle]:
    """Return the principles of one published file; each has a critique and a revision, or a comparison.

    Raises RecipeError for JSON of another shape.
    """
    data = load_json(text, label)
    if isinstance(data, dict):
        return _refuse_none(list(_read_instructions(data, label)), label)
    if isinstance(data, list) and all(isinstance(item, str) for item in data):
        questions = [unframe(item, COMPARISON_FRAME, f"entry {number}", label) for number, item in enumerate(data)]
        found = [Principle(f"comparison{number}", comparison=question) for number, question in enumerate(questions)]
        return _refuse_none(found, label)
    what = "holds examples, not instructions; name it under examples:" if isinstance(data, list) else "holds no object"
    raise RecipeError(what, where=label)


def load_json(text: str, label: str) -> Any:
    """Return the value in a JSON text; raises RecipeError with the line."""
    try:
        return json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise RecipeError(f"is not JSON: {getattr(error, 'msg', error)}", where=f"{label}:{line}") from None


def unframe(text: str, frame: tuple[str, str], name: str, label: str) -> str:
    """Return what stands inside a frame; raises RecipeError where the text is not framed so."""
    start, end = frame
    if not (text.startswith(start) and text.endswith(end) and text[len(start) : -len(end)].strip()):
        raise RecipeError(f"{name} is not {start!r} + an instruction + {end!r}", where=label)
    return text[len(start) : -len(end)]


def _read_instructions(data: dict[str, Any], label: str) -> Iterator[Principle]:
    problems = []
    for name, item in data.items():
        prompts = item.get("prompt") if isinstance(item, dict) else None
        request = item.get("edit_request") if isinstance(item, dict) else None
        if not isinstance(prompts, list) or not prompts or not isinstance(request, str):
            problems.append(Problem(f"{name}: must be {{prompt: [TEXT], edit_request: TEXT}}", label))
            continue
        for number, prompt in enumerate(prompts):
            try:
                critique = unframe(str(prompt), CRITIQUE_FRAME, f"{name}.prompt", label)
                revision = unframe(request, REVISION_FRAME, f"{name}.edit_request", label)
            except RecipeError as error:
                problems += error.problems
                continue
            yield Principle(name if number == 0 else f"{name}.{number}", critique=critique, revision=revision)
    if problems:
        raise RecipeError(problems)


def _refuse_none(found: list[Principle], label: str) -> list[Principle]:
    if not found:
        raise RecipeError("there are no principles in it", where=label)
    return found
