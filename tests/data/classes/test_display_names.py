"""Names of classes for people."""

from pathlib import Path

import pytest

from data.classes.display_names import read_display_names
from data.errors import DataError
from data.remote.storage import Storage

SYNSETS = ("n01440764", "n01443537", "n02012849")
WORDS = "n02012849 crane\nn01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn03126707 crane\n"
NAMES = ("tench, Tinca tinca", "goldfish, Carassius auratus", "crane")


@pytest.mark.parametrize(
    ("text", "classes", "expected"),
    [
        (WORDS, SYNSETS, NAMES),
        ("n02012849\tcrane\nn01440764\ttench\nn01443537\tgoldfish\n", SYNSETS, ("tench", "goldfish", "crane")),
        ("a\tAnt\nb\tBee\n", ("b", "a"), ("Bee", "Ant")),
        ("Ant\nBee\n", ("b", "a"), ("Ant", "Bee")),
        ("n01440764 tench\nn01443537 goldfish\n", None, ("tench", "goldfish")),
        ("n01440764 tench\nn01443537 goldfish\n", ("0", "1"), ("tench", "goldfish")),
    ],
    ids=["synset words", "tabs", "other ids", "in order", "unknown classes", "classes that are numbers"],
)
def test_names_are_for_the_classes_of_their_ids_or_else_in_order(
    text: str, classes: tuple[str, ...] | None, expected: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "words.txt"
    path.write_text(text)
    assert read_display_names(str(path), classes, len(expected), Storage()) == expected


@pytest.mark.parametrize(
    ("text", "classes", "message"),
    [
        (WORDS, (*SYNSETS, "n09999999"), r"no name for 1 of the 4 classes \(first: n09999999\)"),
        (WORDS, ("a", "b", "c"), r"no name for 3 of the 3 classes \(first: a\); .* as ids, such as n02012849"),
        ("Ant\nBee\n", ("a", "b", "c"), "2 names for 3 classes; it needs one line per class, in the order"),
        ("b\na\n", ("a", "b"), "the names of the classes in another order"),
        ("", ("a",), "no class in it"),
    ],
)
def test_names_that_do_not_fit_the_classes_are_refused(
    text: str, classes: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "words.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_display_names(str(path), classes, len(classes), Storage())
