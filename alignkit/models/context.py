"""How many tokens a model can read at once.

Deliberately reads configs only, never weights.
"""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedConfig

from alignkit.models.bases import is_random
from alignkit.models.builtin import builtin_config
from alignkit.models.files import find_model_dir, is_builtin
from alignkit.models.hub import explain_hub_errors
from alignkit.models.scratch import override_config
from alignkit.models.start import find_start
from alignkit.recipe.stage import Stage


def context_length(stage: Stage) -> int | None:
    """Return the positions of the model a stage starts from; None where its config names no limit.

    Raises ModelError, or EnvironmentProblem when a hub id cannot be reached.
    """
    start = find_start(stage)
    config = _read_config(start.base, start.revision, stage)
    if is_random(stage) and start.base == stage.model.path:
        config = override_config(config, stage.model.config, where=stage.where("model.config"))
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if positions else None


def _read_config(source: str, revision: str | None, stage: Stage) -> PreTrainedConfig:
    if is_builtin(source):
        return builtin_config(source)
    with explain_hub_errors(source):
        return AutoConfig.from_pretrained(
            str(find_model_dir(source) or source), revision=revision, trust_remote_code=stage.trust_code
        )
