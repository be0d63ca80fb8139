"""What a run is: the recipe file, its validation, and the resolved stage."""

from alignkit.recipe.load import load_recipe
from alignkit.recipe.methods import recipe_schema
from alignkit.recipe.stage import Recipe, Stage, pick_span, pick_steps, resolve

__all__ = ["Recipe", "Stage", "load_recipe", "pick_span", "pick_steps", "recipe_schema", "resolve"]
