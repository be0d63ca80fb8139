from __future__ import annotations

import torch

from alignkit.models.probe import compare_probes, probe_ids, take_probe
from alignkit.models.scratch import builtin_config, random_model


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return random_model(builtin_config("builtin:tiny-gpt2"), seed=seed, dtype=dtype)


def test_probe_rows_stay_away_from_both_ends_of_any_vocabulary() -> None:
    for size in (512, 50_257, 128_256):
        ids = probe_ids(size)
        assert ids.shape == (2, 16) and ids.min() >= size // 8 and ids.max() < size // 2
        assert len(ids.unique()) == 32


def test_probe_holds_the_logits_and_leaves_the_mode_alone() -> None:
    model = tiny().train()
    probe = take_probe(model, vocab_size=512, reward=False)
    assert model.training and len(probe["values"]) == 2 * 4 * 16
    logits = model.eval()(input_ids=probe_ids(512)).logits
    assert probe["values"][0] == logits[0, 3, 0].item()
    assert probe["values"][-1] == logits[1, 15, 480].item()
    assert (probe["dtype"], probe["quantization"], probe["reward"]) == ("float32", "none", False)


def test_same_model_passes_and_another_is_told_by_how_much() -> None:
    first = take_probe(tiny(0), vocab_size=512, reward=False)
    assert compare_probes(first, take_probe(tiny(0), vocab_size=512, reward=False)) is None
    reason = compare_probes(first, take_probe(tiny(1), vocab_size=512, reward=False))
    assert reason is not None and reason.startswith("its outputs differ by up to ")


def test_small_change_is_seen_in_float32_and_forgiven_in_bfloat16() -> None:
    first = take_probe(tiny(), vocab_size=512, reward=False)
    moved = first | {"values": [value + 0.001 for value in first["values"]]}
    assert compare_probes(first, moved) is not None
    assert compare_probes(first | {"dtype": "bfloat16"}, moved) is None


def test_kind_size_and_finiteness_are_compared() -> None:
    probe = take_probe(tiny(), vocab_size=512, reward=False)
    assert compare_probes(probe, probe | {"reward": True}) == "it was a policy and is a reward model"
    assert compare_probes(probe, probe | {"values": [0.0]}) == "the probe has 1 values, not 128"
    broken = probe | {"values": [float("nan"), *probe["values"][1:]]}
    assert compare_probes(probe, broken) == "it computes values that are not finite"
