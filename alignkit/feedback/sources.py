"""Who answers: a model on this machine, one behind vLLM, or one behind a server, opened by what the recipe says.

Only what is needed is loaded. Published labels and chains (`replay:`) are files, not models; see `replay`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from alignkit.errors import UsageError
from alignkit.feedback.asking import Model
from alignkit.feedback.spending import Spending
from alignkit.feedback.stop import Stop
from alignkit.feedback.store import Record
from alignkit.recipe.schema import FeedbackModel
from alignkit.recipe.stage import Stage


def open_model(
    source: FeedbackModel, *, stop: Stop, spending: Spending, device: str, batch_size: int, trust_code: bool
) -> Model:
    """Return the model a source names, ready to be asked.

    Raises ModelError for weights that cannot be used, EnvironmentProblem for a package that is missing.
    """
    if source.url is not None:
        from alignkit.feedback.endpoint import Endpoint

        return Endpoint(source, spending=spending, stop=stop.event)
    assert source.model is not None
    if source.engine == "vllm":
        from alignkit.feedback.vllm import VllmModel

        return VllmModel(source.model, stop=stop.event, trust_code=trust_code)
    from alignkit.feedback.local import LocalModel

    return LocalModel(source.model, device=device, batch_size=batch_size, trust_code=trust_code, stop=stop.event)


def own_model(stage: Stage) -> FeedbackModel:
    """Return the model a stage starts from, as a source."""
    return FeedbackModel(model=stage.start_dir or stage.model.path)


def speaks_chat(source: FeedbackModel) -> bool:
    """Tell whether a source is asked in turns of a chat: a server's chat API, or a model with a chat template."""
    if source.model is None:
        return source.api == "chat"
    from alignkit.models.causal import load_tokenizer_of

    return load_tokenizer_of(source.model).chat_template is not None


def describe_source(source: FeedbackModel) -> dict[str, Any]:
    """Return what of a source decides its answers, for the run's fingerprint: not how fast or how often it is asked."""
    if source.model is not None:
        from alignkit.models.causal import fingerprint_causal

        return {"model": fingerprint_causal(source.model), "engine": source.engine}
    if source.url is not None:
        return {"url": source.url, "name": source.name, "api": source.api, "logprobs": source.logprobs}
    assert source.replay is not None
    return {"replay": fingerprint_file(source.replay)}


def fingerprint_file(path: str) -> str:
    """Hash the bytes of a file; raises UsageError when it cannot be read."""
    import hashlib

    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=path) from None


def spent_before(source: FeedbackModel, records: Iterable[Record], by: Collection[str]) -> Spending:
    """Return the spending of a source, with what earlier sittings of this run have spent already."""
    spending = Spending(source)
    for record in records:
        if record.get("by") in by:
            spending.add(record.get("input_tokens", 0), record.get("output_tokens", 0))
            spending.requests += 1
            for cause, count in record.get("retries", {}).items():
                spending.retries[cause] += count
                spending.requests += count
    return spending
