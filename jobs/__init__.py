"""What a person types: the `coatnet` command, the recipes, the stage chain."""
