"""Files of figures, each with its origin: how they are read and checked."""

from importlib.resources import files
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import ConfigError


class StrictModel(BaseModel):
    """A part of a data file; fields that it does not have are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(StrictModel):
    """A number with what it may be at least and at most, and where it is from."""

    value: float
    least: float | None = None
    most: float | None = None
    origin: str

    @property
    def known(self) -> bool:
        """Whether it has no range."""
        return self.least is None and self.most is None


Content = TypeVar("Content", bound=StrictModel)


def bundled_figures(kind: type[Content], name: str) -> Content:
    """The file `name` that comes with the program."""
    return read_figures(kind, files("pipeline.planner").joinpath(name).read_text("utf-8"), name)


def read_figures(kind: type[Content], text: str, name: str) -> Content:
    """The content of a file of figures.

    Raises:
        ConfigError: it is no YAML, or figures are missing, unknown or without an origin.
    """
    try:
        return kind.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{name}: {place}: {first['msg']}; see the file that comes with the program") from error
