"""The JSON Schema of a whole recipe, for editors: hover text, completion, and red lines under mistakes."""

import copy
from typing import Any

from alignkit.recipe.methods import OPTIONS, RLAIF, STEPS, RlaifOptions
from alignkit.recipe.schema import RecipeOptions
from alignkit.recipe.trl_fields import Fragment, method_fields


def recipe_schema() -> dict[str, Any]:
    """Describe a recipe as draft 2020-12 JSON Schema: a section named after a method, any other name with `method:`."""
    top = RecipeOptions.model_json_schema()
    defs: Fragment = top.pop("$defs")
    defs["ModelOptions"]["type"] = ["object", "string"]  # a text is its path
    kinds = {**{method: f"{method}_stage" for method in OPTIONS}, RLAIF: "rlaif_section"}
    for method, kind in kinds.items():
        fragments = (model := OPTIONS.get(method, RlaifOptions)).model_json_schema()
        defs |= fragments.pop("$defs", {})
        properties = {**fragments["properties"], **copy.deepcopy(method_fields(method))}
        said = kind.replace("_", " ")
        properties["method"] = {"const": method, "description": f"This is {'an' if method == RLAIF else 'a'} {said}."}
        defs[kind] = {"type": "object", "description": (model.__doc__ or "").strip() or f"A {said}.",
                      "properties": properties, "additionalProperties": False}  # fmt: skip
    steps = defs[kinds[RLAIF]]["properties"]
    for step in STEPS:
        stage = {"$ref": f"#/$defs/{step}_stage"}
        either = {"anyOf": [{"type": "boolean"}, stage]} if step == "critique" else stage
        steps[step] = {**either, "description": steps[step]["description"]}
    extends = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Recipe files merged below this one, relative to it; later ones win.",
    }
    named = {method: {"$ref": f"#/$defs/{kind}"} for method, kind in kinds.items()}
    other = {"description": "A stage of any other name.", "required": ["method"], "anyOf": list(named.values())}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "alignkit recipe", "type": "object",
        "properties": {"extends": extends, **top["properties"], **named}, "additionalProperties": other, "$defs": defs,
    }  # fmt: skip
    return _tidy(schema)


def _tidy(fragment: Any) -> Any:
    """Drop pydantic's titles and move "typical" into the description, where an editor shows it."""
    if isinstance(fragment, list):
        return [_tidy(item) for item in fragment]
    if not isinstance(fragment, dict):
        return fragment
    tidy = {key: _tidy(value) for key, value in fragment.items() if key != "typical"}
    if isinstance(tidy.get("title"), str) and tidy["title"] != "alignkit recipe":
        del tidy["title"]
    if tidy.get("type") == "object" and "title" not in tidy:  # null takes away what an extended recipe says
        tidy["type"] = ["object", "null"]
    if isinstance(fragment.get("typical"), str):
        tidy["description"] = f"{tidy['description']}. Typical: {fragment['typical']}."
    return tidy
