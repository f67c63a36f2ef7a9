"""Which members of an existing WebDataset are the images, which are the labels, and how labels are stored."""

import json
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from data.errors import DataError
from data.index import LabelFormat
from data.labels import class_number, stored_labels
from data.remote_file import open_file
from data.shard import split_key
from data.storage import Storage

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
LABEL_FIELDS = ("cls", "json", "txt")
LABEL_KEYS = (
    "label", "labels", "cls", "class", "classes", "class_id", "class_index", "class_name", "category", "category_id",
    "target", "synset", "wnid",
)  # fmt: skip
"""Keys of a JSON object that may be the label, most likely first."""
_LARGEST_LABEL = 2**20  # bytes


@dataclass(frozen=True, slots=True)
class GivenFields:
    """What the user specifies about the members; None is inferred."""

    image_fields: tuple[str, ...] | None = None
    label_field: str | None = None
    label_key: str | None = None
    label_by: Literal["number", "name"] | None = None


class Fields(NamedTuple):
    """What the members are, and a description of what was inferred."""

    image_fields: tuple[str, ...]
    label: LabelFormat
    inferred: list[str]


@dataclass(slots=True)
class ShardHead:
    """The first samples of a shard."""

    location: str
    extensions: dict[str, set[str]] = field(default_factory=dict)
    """Key -> extensions of its members."""
    contents: dict[str, list[bytes]] = field(default_factory=dict)
    """Extension -> contents of the members that may be labels."""

    @property
    def counts(self) -> Counter[str]:
        """Extension -> samples that have it."""
        return Counter(extension for found in self.extensions.values() for extension in found)


def read_head(location: str, storage: Storage, label_field: str | None, samples: int = 64) -> ShardHead:
    """The first samples of the tar at `location`, as far as it is readable; a remote one is read in small ranges.

    Raises:
        StorageRefused, StorageDown: access refused, or no answer.
    """
    head = ShardHead(location)
    labels = (label_field,) if label_field else LABEL_FIELDS
    with open_file(location, storage) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    split = split_key(member.name) if member.isfile() else None
                    if split is None:
                        continue
                    key, extension = split
                    if key not in head.extensions and len(head.extensions) == samples:
                        break
                    head.extensions.setdefault(key, set()).add(extension)
                    content = tar.extractfile(member)
                    if extension in labels and member.size <= _LARGEST_LABEL and content is not None:
                        head.contents.setdefault(extension, []).append(content.read())
        except (tarfile.TarError, EOFError):
            pass  # the scan of the whole shard reports the damage
    return head


def infer_fields(head: ShardHead, given: GivenFields) -> Fields:
    """What the members are, inferred as far as `given` leaves it open.

    Raises:
        DataError: it cannot be inferred, or what was given does not occur.
    """
    inferred: list[str] = []
    image_fields = _image_fields(head, given, inferred)
    label = _label_format(head, given, inferred)
    return Fields(image_fields, label, inferred)


def _image_fields(head: ShardHead, given: GivenFields, inferred: list[str]) -> tuple[str, ...]:
    counts = head.counts
    if given.image_fields is not None:
        if not any(counts[name] for name in given.image_fields):
            raise DataError(f"{head.location}: no {' or '.join(given.image_fields)} members; {_seen(counts)}")
        return given.image_fields
    candidates = sorted((name for name in IMAGE_FIELDS if counts[name]), key=lambda name: -counts[name])
    if not candidates:
        raise DataError(
            f"{head.location}: no {', '.join(IMAGE_FIELDS)} members; {_seen(counts)}; specify the extension of "
            "the images with --image-field"
        )
    # Of two images in one sample, one is something else, such as a mask.
    chosen: list[str] = []
    for name in candidates:
        beside = [c for c in chosen if any({c, name} <= found for found in head.extensions.values())]
        if beside:
            inferred.append(f"{name} members accompany {beside[0]} ones and are ignored")
        else:
            chosen.append(name)
    # Others may occur in later shards.
    chosen += [name for name in IMAGE_FIELDS if name not in candidates]
    inferred.append(f"images are the {' '.join(name for name in chosen if counts[name])} members (--image-field)")
    return tuple(name for name in IMAGE_FIELDS if name in chosen)


def _label_format(head: ShardHead, given: GivenFields, inferred: list[str]) -> LabelFormat:
    name = given.label_field
    key = given.label_key
    if name is None:
        name = "json" if key is not None else _label_field(head)
        inferred.append(f"labels are in the {name} members (--label-field)")
    contents = head.contents.get(name)
    if not contents:
        raise DataError(f"{head.location}: no {name} members; {_seen(head.counts)}; see --label-field")
    if name.rpartition(".")[2] == "json" and key is None:
        key = _json_key(head.location, contents)
        if key is not None:
            inferred.append(f"under the key {key!r} (--label-key)")
    by = given.label_by
    if by is None:
        by = _by(contents, LabelFormat(name, key))
        inferred.append(f"and are class {by}s (--label-by)")
    return LabelFormat(name, key, by)


def _label_field(head: ShardHead) -> str:
    for name in LABEL_FIELDS:
        contents = head.contents.get(name)
        if contents and (name != "json" or _likely_key(contents) is not False):
            return name
    raise DataError(
        f"{head.location}: no {', '.join(LABEL_FIELDS)} members with a label; {_seen(head.counts)}; specify "
        "the extension of the labels with --label-field, and in JSON their key with --label-key"
    )


def _likely_key(contents: list[bytes]) -> str | Literal[False] | None:
    """The key of the label in JSON, None if the JSON is the label itself, False if that is unclear."""
    objects = []
    for content in contents:
        try:
            objects.append(json.loads(content))
        except (ValueError, RecursionError):
            continue
    if not objects:
        return False
    if not any(isinstance(found, dict) for found in objects):
        return None
    keys = Counter(key for found in objects if isinstance(found, dict) for key in found)
    for key in LABEL_KEYS:
        if 2 * keys[key] > len(objects):  # not all: some samples may lack a label
            return key
    return next(iter(keys)) if len(keys) == 1 else False


def _json_key(location: str, contents: list[bytes]) -> str | None:
    key = _likely_key(contents)
    if key is False:
        raise DataError(
            f"{location}: which key of its json members is the label? The first is {contents[0][:200]!r}; specify it "
            "with --label-key"
        )
    return key


def _by(contents: list[bytes], label: LabelFormat) -> Literal["number", "name"]:
    found = 0
    for content in contents:
        try:
            for value in stored_labels(content, label):
                found += 1
                if not _is_number(value):
                    return "name"
        except ValueError:
            continue
    if not found:
        where = f" under the key {label.key!r}" if label.key else ""
        raise DataError(f"no label in the first {label.field} members{where}, such as {contents[0][:100]!r}")
    return "number"


def _is_number(value: object) -> bool:
    try:
        class_number(value)
    except ValueError:
        return False
    return True


def _seen(counts: Counter[str]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listing = ", ".join(f"{name} {count}" for name, count in ordered[:8])
    return f"of {max(counts.values(), default=0)} samples these have: {listing}" if counts else "it has no samples"
