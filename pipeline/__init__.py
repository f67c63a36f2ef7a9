"""One training run: recipe, plan, engine, loop, checkpoints, evaluation, monitoring; independent of any scheduler."""
