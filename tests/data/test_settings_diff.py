"""Differences between nested settings."""

from data.settings_diff import changed_settings, flatten


def test_nested_settings_are_flattened_to_dotted_keys() -> None:
    assert flatten({"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "f": {}}) == {"a": 1, "b.c": [1, 2], "b.d.e": None}


def test_changes_are_listed_by_key_with_json_values() -> None:
    before = {"model": {"size": "a", "depth": 2}, "seed": 0, "flip": True, "gone": "x"}
    now = {"model": {"size": "b", "depth": 2}, "seed": None, "flip": False, "new": [1, "y"]}
    assert changed_settings(before, now) == [
        "flip: true -> false",
        'gone: "x" -> not given',
        'model.size: "a" -> "b"',
        'new: not given -> [1, "y"]',
        "seed: 0 -> not given",
    ]


def test_ignored_keys_are_not_listed() -> None:
    before, now = {"a": {"b": 1, "c": 1}, "d": 1}, {"a": {"b": 2, "c": 2}, "d": 2}
    assert changed_settings(before, now, lambda key: key.startswith("a.")) == ["d: 1 -> 2"]
