"""A Recipe made from stages in which nothing is wrong.

It checks nothing: a value that does not suit its key is a bug of `validate`.
"""

from __future__ import annotations

from collections.abc import Mapping

from alignkit.recipe.axes import KEY as SWEEP
from alignkit.recipe.paths import REWARD_KEYS, SOURCE_KEYS
from alignkit.recipe.recipe import Recipe, StageSection
from alignkit.recipe.schema import OPTIONS, RecipeOptions
from alignkit.recipe.sweep import Sweep, Variant
from alignkit.recipe.tree import Node

_READ_BY_STAGES = ("seed", "model", "lora")  # data and eval are among a stage's own values by now


def construct(swept: Sweep, *, name: str, label: str) -> Recipe:
    """Return the recipe; `name` is its name where it gives none, `label` the file as messages show it."""
    tops = {id(tree): _read_top(tree) for tree in swept.tops}
    tree, top = swept.tops[0], tops[id(swept.tops[0])]
    variants = {plain: tuple(variant.name for variant in made) for plain, made in swept.variants.items()}
    groups: dict[str, tuple[str, ...]] = {}
    for group in swept.groups:
        steps = dict.fromkeys(stage.name for stage in group.stages)
        groups[group.name] = tuple(variant for step in steps for variant in variants[step])
    listed = [made for item in top.stages or () for made in groups.get(item, variants.get(item, (item,)))]
    by_name = {variant.name: variant for made in swept.variants.values() for variant in made}
    origins = {"name": "default", "seed": "default"}
    for key, node in tree.value.items():
        if key in RecipeOptions.model_fields and key != SWEEP:
            origins |= _find_origins(node, key)
    sections = {}
    for variant_name in dict.fromkeys((*listed, *by_name)):
        sections[variant_name], found = _make_section(by_name[variant_name], tops)
        origins |= found
    return Recipe(
        name=top.name or name,
        path=label,
        seed=top.seed,
        model=top.model,
        lora=top.lora,
        launch=top.launch,
        evaluate=top.evaluate,
        evaluates="evaluate" in tree.value,
        stages=sections,
        order=tuple(dict.fromkeys(listed or by_name)),
        origins=origins,
        groups=groups,
        sweeps=swept.names,
    )


def _read_top(tree: Node) -> RecipeOptions:
    known = RecipeOptions.model_fields.keys() - {SWEEP}
    return RecipeOptions.model_validate({key: node.plain() for key, node in tree.value.items() if key in known})


def _make_section(variant: Variant, tops: Mapping[int, RecipeOptions]) -> tuple[StageSection, dict[str, str]]:
    """Return a stage and the places of its values."""
    stage = variant.stage
    section = stage.section(variant.fill())
    options = {key: value for key, value in section.values.items() if key in OPTIONS[stage.method].model_fields}
    trainer = {key: value for key, value in section.values.items() if key not in options}
    if stage.method == "dpo" and isinstance(trainer.get("loss_type"), str):
        trainer["loss_type"] = [trainer["loss_type"]]
    made = OPTIONS[stage.method].model_validate({**options, "method": stage.method})
    origins = {"seed": "default"}
    for key in _READ_BY_STAGES:
        if key in stage.top.value:
            origins |= _find_origins(stage.top.value[key], key)
    top = tops[id(stage.top)]
    return (
        StageSection(variant.name, made, trainer, top, origins, stage.group, variant.values),
        _find_origins(section.node, variant.name),
    )


def _find_origins(node: Node, key: str) -> dict[str, str]:
    """Return the place of every dotted key; one source under `data:` is also `data.0`, as in the options, and one
    reward `reward.0`."""
    origins = {}
    for path, child in node.leaves((key,)):
        origins[".".join(path)] = child.place
        if path[-1] in (*SOURCE_KEYS, *REWARD_KEYS) and not isinstance(child.value, list):
            origins |= {".".join((*path, "0", *below)): leaf.place for below, leaf in child.leaves()}
    return origins
