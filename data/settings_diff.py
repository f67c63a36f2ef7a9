"""What differs between two nested settings."""

import json
from collections.abc import Callable, Mapping


def flatten(settings: Mapping[str, object]) -> dict[str, object]:
    """Nested settings by dotted key: `{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": nested for inner, nested in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def changed_settings(
    before: Mapping[str, object],
    now: Mapping[str, object],
    ignored: Callable[[str], bool] = lambda key: False,
) -> list[str]:
    """`key: old -> new` for each dotted key that differs, sorted, without those that `ignored` accepts."""
    old, new = flatten(before), flatten(now)
    return [
        f"{key}: {_shown(old.get(key))} -> {_shown(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not ignored(key)
    ]


def _shown(value: object) -> str:
    return "not given" if value is None else json.dumps(value)
