"""Recipes: the settings of a chain of stages, their checks, and their YAML files."""
