"""Numbers with nouns in messages: `1 class`, `1,200 classes`."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """The number, and the noun in the form that it needs; `plural` if that is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
