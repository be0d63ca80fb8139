"""Models that a recipe names to write or judge: opened, described, and fingerprinted."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from alignkit.errors import UsageError
from alignkit.feedback.cache import Store
from alignkit.feedback.writer import Model, Spending
from alignkit.recipe.schema import FeedbackModel
from alignkit.recipe.stage import Stage
from alignkit.runs.stop import Stop


def open_model(
    source: FeedbackModel, store: Store, by: Collection[str], *, stop: Stop, device: str, batch_size: int,
    trust_code: bool,
) -> Model:  # fmt: skip
    """Open the model a source names, with what the askers in `by` have spent on it already.

    Raises ModelError for weights that cannot be used, EnvironmentProblem for a package that is missing.
    """
    if source.url is not None:
        from alignkit.feedback.server import Endpoint

        spending = Spending(source)
        for record in store.values():
            if record.get("by") in by:
                spending.add_record(record)
        return Endpoint(source, spending=spending, stop=stop.event)
    assert source.model is not None
    from alignkit.feedback.local import LocalModel, VllmModel

    if source.engine == "vllm":
        return VllmModel(source.model, stop=stop.event, trust_code=trust_code)
    return LocalModel(source.model, device=device, batch_size=batch_size, trust_code=trust_code, stop=stop.event)


def own_model(stage: Stage) -> FeedbackModel:
    """The model a stage starts from, as a source."""
    return FeedbackModel(model=stage.start_dir or stage.model.path)


def speaks_chat(source: FeedbackModel) -> bool:
    """Tell whether a source is asked in turns of a chat: a server's chat API, or a model with a chat template."""
    if source.model is None:
        return source.api == "chat"
    from alignkit.models.frozen import load_tokenizer_of

    return load_tokenizer_of(source.model).chat_template is not None


def describe_source(source: FeedbackModel) -> dict[str, Any]:
    """Describe what decides a source's answers, for the run's fingerprint: not how fast or how often it is asked."""
    if source.model is not None:
        from alignkit.models.frozen import fingerprint_causal

        return {"model": fingerprint_causal(source.model), "engine": source.engine}
    if source.url is not None:
        return {"url": source.url, "name": source.name, "api": source.api, "logprobs": source.logprobs}
    return {"replay": fingerprint_file(str(source.replay))}


def fingerprint_file(path: str) -> str:
    """Hash the bytes of a file; raises UsageError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=path) from None


def describe_model(model: FeedbackModel, stage: Stage) -> str:
    """Say in words what answers or judges; of an address only its host."""
    if model.url is not None:
        return f"{model.name} at {urlsplit(model.url).netloc}"
    if model.replay is not None:
        return f"the labels of {model.replay}"
    return stage.source_stages.get(str(model.model), str(model.model))
