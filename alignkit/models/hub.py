"""What the hub client and transformers say while models load: failures in one line, and silence otherwise."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download
from safetensors import SafetensorError
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from alignkit.errors import EnvironmentProblem, ModelError, first_line

_HUB_ERRORS: tuple[tuple[Any, str], ...] = (
    (errors.GatedRepoError, "is gated: accept its terms on the hub and set HF_TOKEN"),
    (errors.RevisionNotFoundError, "has no such revision; check model.revision"),
    ((errors.RepositoryNotFoundError, errors.HFValidationError),
     "is neither a local directory nor a model on the hub (private ones need HF_TOKEN)"),
)  # fmt: skip


@contextmanager
def explain_hub_errors(source: str) -> Iterator[None]:
    """Turn what from_pretrained raises for `source` into a ModelError or an EnvironmentProblem."""
    try:
        yield
    except SafetensorError as error:
        raise ModelError(f"its weights are damaged ({error}); copy or download them again", where=source) from error
    except (OSError, ValueError) as error:  # transformers wraps most hub errors in OSError
        chain: list[BaseException] = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        for kinds, what in _HUB_ERRORS:
            if any(isinstance(cause, kinds) for cause in chain):
                raise ModelError(f"{source} {what}") from error
        no_hub = (errors.OfflineModeIsEnabled, errors.HfHubHTTPError, ConnectionError)
        offline = any(isinstance(cause, no_hub) for cause in chain)
        if offline or "internet connection" in str(error) or "couldn't connect" in str(error).lower():
            what = "is not on this machine and the hub cannot be reached; look at the network, or download it first"
            raise EnvironmentProblem(f"{source} {what}") from error
        remedy = "; put that right, or name another model" if os.path.isdir(source) else ""
        raise ModelError(f"cannot be loaded: {first_line(error).rstrip('.')}{remedy}", where=source) from error


def fetch_adapter(source: str, revision: str | None) -> Path | None:
    """Fetch a hub repository that holds an adapter, and give its local snapshot; None for one that holds a model."""
    with explain_hub_errors(source):
        found = cached_file(
            source, "adapter_config.json", revision=revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if found is None:
            return None
        allowed = ["*.json", "*.safetensors", "*.jinja", "*.model"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=allowed))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence what transformers reports and draws while it reads and writes: the callers judge, the console draws."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
