"""`index.json`: what a folder of shards holds. Its presence says that the shards beside it are whole."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError

FILE_NAME = "index.json"
FORMAT = "coatnet-shards"
VERSION = 1


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One tar: file name, samples, size in bytes, sha256 of the whole file in hex."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The shards of one dataset in their canonical order.

    A sample's id is its position in that order: the samples of the shards before its own, plus its place in the tar.
    """

    folder: Path
    classes: tuple[str, ...]
    """Class names; a label is a position in this list."""
    image_fields: tuple[str, ...]
    """Extensions under which a sample's encoded image may lie."""
    label_field: str
    """Extension of the label, decimal digits."""
    shards: tuple[ShardEntry, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """sha256 over everything but the place: two copies of a dataset have the same digest."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "fields": {"image": list(self.image_fields), "label": self.label_field},
            "samples": self.samples,
            "bytes": sum(shard.bytes for shard in self.shards),
            "classes": list(self.classes),
            "shards": [asdict(shard) for shard in self.shards],
        }

    def write(self) -> None:
        """Publish the index in its folder by one rename."""
        path = self.folder / FILE_NAME
        unfinished = path.with_name(f".{FILE_NAME}.writing")
        unfinished.write_text(json.dumps(self._content(), indent=1) + "\n")
        unfinished.replace(path)


def read_index(folder: str | Path) -> ShardIndex:
    """The index of the shards in `folder`.

    Raises:
        DataError: no index, one that cannot be read, or a shard that is absent or of another size.
    """
    if "://" in str(folder):
        raise DataError(f"{folder}: shards are read from a local folder; copy them to one")
    folder = Path(folder)
    path = folder / FILE_NAME
    if not path.is_file():
        raise DataError(f"{folder}: no {FILE_NAME} there; build the shards with: coatnet shards build SOURCE {folder}")
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise DataError(
                f"{path}: format {content['format']} version {content['version']}, this program reads "
                f"{FORMAT} version {VERSION}; build the shards again with it"
            )
        index = ShardIndex(
            folder=folder,
            classes=tuple(content["classes"]),
            image_fields=tuple(content["fields"]["image"]),
            label_field=content["fields"]["label"],
            shards=tuple(ShardEntry(**shard) for shard in content["shards"]),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not an index of shards ({error}); build the shards again") from error
    for shard in index.shards:
        try:
            size = (folder / shard.name).stat().st_size
        except FileNotFoundError:
            raise DataError(
                f"{folder}: shard {shard.name} is missing; copy it there or build the shards again"
            ) from None
        if size != shard.bytes:
            raise DataError(
                f"{folder}: shard {shard.name} has {size:,} bytes and {shard.bytes:,} in the index; "
                "copy it again or build the shards again"
            )
    return index
