"""The JSON Schema of a whole recipe, for editors: hover text, completion, and red lines under mistakes."""

import copy
from typing import Any

from alignkit.recipe.schema import OPTIONS, RLAIF, STEPS, RecipeOptions, RlaifOptions
from alignkit.recipe.trl_fields import Fragment, method_fields


def recipe_schema() -> dict[str, Any]:
    """Describe a recipe as draft 2020-12 JSON Schema: a section named after a method, any other name with `method:`."""
    top = RecipeOptions.model_json_schema()
    defs: Fragment = top.pop("$defs")
    defs["ModelOptions"]["type"] = ["object", "string"]  # a text is its path
    for method in OPTIONS:
        fragments = OPTIONS[method].model_json_schema()
        defs |= fragments.pop("$defs", {})
        fields = copy.deepcopy(method_fields(method))
        properties = {**fragments["properties"], **fields}
        properties["method"] = {"const": method, "description": f"This section is a {method} stage."}
        defs[f"{method}_stage"] = {
            "type": "object", "description": (OPTIONS[method].__doc__ or "").strip() or f"A {method} stage.",
            "properties": properties, "additionalProperties": False,
        }  # fmt: skip
    rlaif = RlaifOptions.model_json_schema()
    defs |= rlaif.pop("$defs", {})
    steps = rlaif["properties"]
    steps["method"] = {"const": RLAIF, "description": "This section is an rlaif section."}
    for step in STEPS:
        stage = {"$ref": f"#/$defs/{step}_stage"}
        either = {"anyOf": [{"type": "boolean"}, stage]} if step == "critique" else stage
        steps[step] = {**either, "description": steps[step]["description"]}
    defs["rlaif_section"] = {
        "type": "object", "description": (RlaifOptions.__doc__ or "").strip(), "properties": steps,
        "additionalProperties": False,
    }  # fmt: skip
    extends = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Recipe files merged below this one, relative to it; later ones win.",
    }
    named = {method: {"$ref": f"#/$defs/{method}_stage"} for method in OPTIONS}
    named[RLAIF] = {"$ref": "#/$defs/rlaif_section"}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "alignkit recipe",
        "type": "object",
        "properties": {"extends": extends, **top["properties"], **named},
        "additionalProperties": {
            "description": "A stage of any other name.",
            "required": ["method"],
            "anyOf": list(named.values()),
        },
        "$defs": defs,
    }
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
