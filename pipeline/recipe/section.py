"""What sections of a recipe are made of: their base class, common types, and the mark of what may change."""

from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict

PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
# YAML has lists and no tuples.
Numbers = Annotated[tuple[PositiveInt, ...], Strict(False)]
Pair = Annotated[tuple[Annotated[float, Strict()], Annotated[float, Strict()]], Strict(False)]
WhichWeights = Literal["auto", "raw", "ema"]


Setting = TypeVar("Setting")


class _MayChange:
    """Marks a setting that may change between two starts of a run: it decides where, how fast and how reliably the run
    is computed, and not what."""


MayChange = Annotated[Setting, _MayChange()]


class Section(BaseModel):
    """A part of a recipe; unknown keys and mistyped values are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def changeable_settings(section: type[Section]) -> frozenset[str]:
    """Dotted keys of the settings and sections below `section` that are declared `MayChange`."""
    found = set()
    for name, field in section.model_fields.items():
        if any(isinstance(mark, _MayChange) for mark in field.metadata):
            found.add(name)
        else:
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, Section):
                    found |= {f"{name}.{below}" for below in changeable_settings(kind)}
    return frozenset(found)


def unless_none() -> Any:
    return Field(exclude_if=lambda value: value is None)
