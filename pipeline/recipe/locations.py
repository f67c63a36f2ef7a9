"""The types of settings that name files, folders and URLs. A setting chooses by its type whether it may be a URL.

Validating a recipe with its folder as the context resolves them: `$NAME`, `${NAME}` and `~` are replaced, `$$` becomes
`$`, and relative paths start at the folder. Without a context, values are taken for resolved and stay as they are.
"""

import os
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, GetCoreSchemaHandler, SerializationInfo, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from data.errors import DataError
from data.remote.storage import checked

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_PLAIN_NAME = re.compile(r"[\w.\-]*[\w\-][\w.\-]*")
_AS_WRITTEN = {"dollar signs": "doubled"}


@dataclass(frozen=True, slots=True)
class Location:
    """The metadata of a type of text that is resolved."""

    def resolved(self, text: str, folder: Path) -> str:
        """The location in `text`, which the recipe in `folder` has.

        Raises:
            ValueError: it cannot be resolved, or this setting cannot have it; the message says why.
        """
        raise NotImplementedError

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(text: str, info: ValidationInfo) -> str:
            return text if info.context is None else self.resolved(text, info.context)

        def serialize(text: str, info: SerializationInfo) -> str:
            return text.replace("$", "$$") if info.context is _AS_WRITTEN else text

        return core_schema.with_info_after_validator_function(
            validate,
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(serialize, info_arg=True),
        )


def is_url(text: str) -> bool:
    """Whether `text` is a URL, perhaps with the one slash that is left of one in a `Path`."""
    return _URL.match(text) is not None


def as_written(settings: BaseModel) -> dict[str, Any]:
    """The plain values with which a file is read as these resolved settings: a dollar sign is written twice."""
    return settings.model_dump(mode="json", context=_AS_WRITTEN)


@dataclass(frozen=True, slots=True)
class _Path(Location):
    instead: str = ""
    """What to do if a URL is wanted."""
    urls: bool = False

    def resolved(self, text: str, folder: Path) -> str:
        text = _local_part(_expanded(text, folder))
        if match := _URL.match(text):
            if not self.urls:
                raise ValueError(f"{text} is a URL, and this must be a local path; {self.instead}")
            if "://" not in text:
                raise ValueError(
                    f"{text} is neither a path nor a URL; write {match[1]}://..., or ./{match[1]}:/... for a folder"
                )
        if "://" in text or text.startswith("pipe:"):
            return _checked(text)
        return _absolute(text, folder)


@dataclass(frozen=True, slots=True)
class _StageOrPath(Location):
    def resolved(self, text: str, folder: Path) -> str:
        # A plain name may be that of a stage, as the recipe decides, which knows them.
        return text if _PLAIN_NAME.fullmatch(text) else _Path(urls=True).resolved(text, folder)


@dataclass(frozen=True, slots=True)
class _Image(Location):
    def resolved(self, text: str, folder: Path) -> str:
        text = _expanded(text, folder)
        # Other text may be the name of an image in a registry.
        return _absolute(text, folder) if text.startswith(("/", "./", "../")) else text


@dataclass(frozen=True, slots=True)
class _Mount(Location):
    def resolved(self, text: str, folder: Path) -> str:
        text = _variables(text, folder)
        outside, colon, inside = text.partition(":")
        if "://" in text or not outside:
            raise ValueError(f"{text!r} is not a folder of this machine; write PATH or PATH:PATH_INSIDE")
        return _absolute(_home(outside), folder) + colon + inside


@dataclass(frozen=True, slots=True)
class _Server(Location):
    def resolved(self, text: str, folder: Path) -> str:
        text = _variables(text, folder)
        if not text.startswith(("http://", "https://")):
            raise ValueError(f"{text!r} is not the URL of a server; write https://{text.partition('://')[2] or text}")
        return _checked(text)


PathOrUrl = Annotated[str, _Path(urls=True)]
"""A path, or a URL of a storage that `data.remote.storage` supports."""
RunsPath = Annotated[str, _Path("run folders are on a file system, and checkpoint.folder may be a URL")]
ShardsPath = Annotated[str, _Path("shards are built in a local folder, from where they can be copied to a URL")]
LabelMapPath = Annotated[str, _Path("copy the label map to a file system")]
CachePath = Annotated[str, _Path("remote shards are cached on a local disk of the node")]
StageOrPath = Annotated[str, _StageOrPath()]
"""The name of a stage, which has no slash, or a path or URL, which has one. `./name` is a path."""
ImageName = Annotated[str, _Image()]
"""The path of a container image if it begins with `/`, `./`, `../` or `~`, otherwise its name in a registry."""
Mount = Annotated[str, _Mount()]
"""`PATH` or `PATH:PATH_INSIDE`."""
ServerUrl = Annotated[str, _Server()]
"""`http://...` or `https://...`."""


def _expanded(text: str, folder: Path) -> str:
    return _home(_variables(text, folder))


def _variables(text: str, folder: Path) -> str:
    """The text with environment variables replaced, except in the recipe's own folder if it begins with that."""
    own = next((own for own in (os.path.abspath(folder), os.path.realpath(folder)) if _is_below(text, own)), "")
    template = string.Template(text[len(own) :])
    if not template.is_valid():
        raise ValueError(f"{text}: write $NAME or ${{NAME}} for an environment variable, and $$ for a dollar sign")
    for name in template.get_identifiers():
        if not os.environ.get(name):
            how = "is empty" if name in os.environ else "is not set"
            raise ValueError(f"{text}: the environment variable {name} {how}; set it, or write $$ for a dollar sign")
    text = own + template.substitute(os.environ)
    if not text.strip():
        raise ValueError("is empty; give a path, or null for none")
    return text


def _is_below(text: str, folder: str) -> bool:
    return text == folder or text.startswith(f"{folder}/")


def _home(text: str) -> str:
    """The text with a home folder for the `~` or `~user` with which it begins."""
    found = os.path.expanduser(text)
    if found.startswith("~"):
        raise ValueError(f"{text}: there is no home folder of {text.partition('/')[0]}; write ./~... for such a name")
    return found


def _local_part(text: str) -> str:
    """The path of a `file:` URL; other text as it is."""
    if not text.lower().startswith("file:/"):
        return text
    match = re.fullmatch(r"file:(?://)?(/(?!/)[^%]*)", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text} has a host, or characters in percent encoding; write the path alone")
    return match[1]


def _checked(url: str) -> str:
    try:
        return checked(url)
    except DataError as error:
        raise ValueError(str(error)) from None


def _absolute(path: str, folder: Path) -> str:
    try:
        return str((folder / path).resolve())
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ValueError(f"{path}: {error}") from None
