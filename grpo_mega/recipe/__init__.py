"""YAML -> a frozen, typed Recipe. Nothing here imports torch."""

from grpo_mega.recipe.load import LoadedRecipe, load_recipe
from grpo_mega.recipe.render import dump_resolved, render_resolved
from grpo_mega.recipe.schema import Recipe

__all__ = ["LoadedRecipe", "Recipe", "dump_resolved", "load_recipe", "render_resolved"]
