"""An adapter folded into its base: one model directory that needs no PEFT.

Deliberately full precision only: what an adapter learned on quantised weights moves to the unquantised ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from alignkit.errors import ModelError
from alignkit.models.adapters import attach_frozen
from alignkit.models.bases import Precision, read_base
from alignkit.models.files import find_model_dir, inspect_model_dir
from alignkit.models.probe import compare_probes, take_probe
from alignkit.models.save import save_model
from alignkit.models.start import find_base


def merge(source: Path, out: Path, *, dtype: torch.dtype | None = None, trust_code: bool = False) -> None:
    """Write adapter plus base as one model; what is read back must compute what the adapter on its base does.

    `source` is a run or an adapter directory. Works on the CPU, in the dtype of training unless given. Raises
    ModelError for a source without an adapter, an `out` that is not empty, or a result that differs.
    """
    directory = find_model_dir(str(source)) or source
    files = inspect_model_dir(directory, trust_code=trust_code)
    if files.kind != "adapter":
        raise ModelError(f"{directory} is a whole model already; there is nothing to merge")
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out} is not empty; give a directory that does not exist yet", where="--out")
    precision = Precision(dtype or getattr(torch, files.record.get("dtype", "float32")), "cpu")
    base = read_base(
        find_base(files), precision, reward=files.reward, revision=files.base_revision, trust_code=trust_code
    )
    if files.reward and base.config.pad_token_id is None:
        base.config.pad_token_id = files.record.get("pad_token_id")
    adapted = attach_frozen(base, directory, reward=files.reward)
    vocab_size = base.get_input_embeddings().num_embeddings
    before = take_probe(adapted, vocab_size=vocab_size, reward=files.reward)
    merged = adapted.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(str(directory if files.has_tokenizer else find_base(files)))
    stop_ids = _stop_ids(directory)
    lineage = [*files.record.get("lineage", []), {"role": "adapter", "path": str(directory), "action": "merge"}]
    save_model(merged, tokenizer, out, lineage=lineage, precision=precision, stop_ids=stop_ids)
    after = take_probe(
        read_base(str(out), precision, reward=files.reward, trust_code=trust_code),
        vocab_size=vocab_size,
        reward=files.reward,
    )
    reason = compare_probes(before, after)
    if reason:
        raise ModelError(f"the merged model is not the adapted one: {reason}", where=str(out))


def _stop_ids(directory: Path) -> list[int]:
    """Return the stop tokens saved beside the adapter."""
    from transformers import GenerationConfig

    if not (directory / "generation_config.json").exists():
        return []
    stop = GenerationConfig.from_pretrained(str(directory)).eos_token_id
    return [stop] if isinstance(stop, int) else list(stop or ())
