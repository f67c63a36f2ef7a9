"""What a GPU does with a recipe, measured: each measurement in a process of its own, one record of all of them."""
