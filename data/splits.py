"""Words in names that tell which split of a dataset a file or folder belongs to."""

import re

SPLITS = {
    "train": "training", "training": "training", "val": "validation", "valid": "validation",
    "validation": "validation", "dev": "validation", "eval": "validation", "test": "test", "testing": "test",
    "trainval": "training and validation",
}  # fmt: skip
"""Word -> the split that it means."""


def name_words(name: str) -> list[str]:
    """The words of a name, in lower case: what is between digits, slashes and punctuation."""
    return re.findall(r"[^\W\d_]+", name.lower())
