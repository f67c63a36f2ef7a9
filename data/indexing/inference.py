"""What the members of a WebDataset that others built are: which hold images, which the labels, and how."""

import json
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from data.errors import DataError
from data.index import LabelFormat
from data.labels import number_of, values
from data.remote_file import open_file
from data.shard import split_key
from data.storage import Storage

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
LABEL_FIELDS = ("cls", "json", "txt")
LABEL_KEYS = (
    "label", "labels", "cls", "class", "classes", "class_id", "class_index", "class_name", "category", "category_id",
    "target", "synset", "wnid",
)  # fmt: skip
"""Keys of a JSON object that are taken for the label's, the likeliest first."""
_LARGEST_LABEL = 2**20  # bytes


@dataclass(frozen=True, slots=True)
class GivenFields:
    """What a person says of the members; None is inferred."""

    image_fields: tuple[str, ...] | None = None
    label_field: str | None = None
    label_key: str | None = None
    label_by: Literal["number", "name"] | None = None


class Fields(NamedTuple):
    """What the members are, and in words what of that is a inference."""

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


def read_beginning(location: str, storage: Storage, label_field: str | None, samples: int = 64) -> ShardHead:
    """The first samples of the tar at `location`, as far as it can be read; a remote one in small ranges.

    Raises:
        StorageRefused, StorageDown: access refused, or no answer.
    """
    beginning = ShardHead(location)
    labels = (label_field,) if label_field else LABEL_FIELDS
    with open_file(location, storage) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    split = split_key(member.name) if member.isfile() else None
                    if split is None:
                        continue
                    key, extension = split
                    if key not in beginning.extensions and len(beginning.extensions) == samples:
                        break
                    beginning.extensions.setdefault(key, set()).add(extension)
                    content = tar.extractfile(member)
                    if extension in labels and member.size <= _LARGEST_LABEL and content is not None:
                        beginning.contents.setdefault(extension, []).append(content.read())
        except (tarfile.TarError, EOFError):
            pass  # the pass over the whole shard says what is wrong with it
    return beginning


def infer_fields(beginning: ShardHead, said: GivenFields) -> Fields:
    """What the members are, as far as `said` leaves it open.

    Raises:
        DataError: it cannot be told, or what was said is not there.
    """
    inferred: list[str] = []
    image_fields = _image_fields(beginning, said, inferred)
    label = _label_format(beginning, said, inferred)
    return Fields(image_fields, label, inferred)


def _image_fields(beginning: ShardHead, said: GivenFields, inferred: list[str]) -> tuple[str, ...]:
    counts = beginning.counts
    if said.image_fields is not None:
        if not any(counts[name] for name in said.image_fields):
            raise DataError(f"{beginning.location}: no {' or '.join(said.image_fields)} members; {_seen(counts)}")
        return said.image_fields
    candidates = sorted((name for name in IMAGE_FIELDS if counts[name]), key=lambda name: -counts[name])
    if not candidates:
        raise DataError(
            f"{beginning.location}: no {', '.join(IMAGE_FIELDS)} members; {_seen(counts)}; name the extension of the "
            "images with --image-field"
        )
    # Two pictures in one sample are the image and something else, such as a mask.
    chosen: list[str] = []
    for name in candidates:
        beside = [c for c in chosen if any({c, name} <= found for found in beginning.extensions.values())]
        if beside:
            inferred.append(f"{name} members stand beside {beside[0]} ones and are passed over")
        else:
            chosen.append(name)
    # Others may come in later shards.
    chosen += [name for name in IMAGE_FIELDS if name not in candidates]
    inferred.append(f"images are the {' '.join(name for name in chosen if counts[name])} members (--image-field)")
    return tuple(name for name in IMAGE_FIELDS if name in chosen)


def _label_format(beginning: ShardHead, said: GivenFields, inferred: list[str]) -> LabelFormat:
    name = said.label_field
    key = said.label_key
    if name is None:
        name = "json" if key is not None else _label_field(beginning)
        inferred.append(f"labels are in the {name} members (--label-field)")
    contents = beginning.contents.get(name)
    if not contents:
        raise DataError(f"{beginning.location}: no {name} members; {_seen(beginning.counts)}; see --label-field")
    if name.rpartition(".")[2] == "json" and key is None:
        key = _json_key(beginning.location, contents)
        if key is not None:
            inferred.append(f"under the key {key!r} (--label-key)")
    by = said.label_by
    if by is None:
        by = _by(contents, LabelFormat(name, key))
        inferred.append(f"and are class {by}s (--label-by)")
    return LabelFormat(name, key, by)


def _label_field(beginning: ShardHead) -> str:
    for name in LABEL_FIELDS:
        contents = beginning.contents.get(name)
        if contents and (name != "json" or _likely_key(contents) is not False):
            return name
    raise DataError(
        f"{beginning.location}: no {', '.join(LABEL_FIELDS)} members with a label; {_seen(beginning.counts)}; name the "
        "extension of the labels with --label-field, and in JSON their key with --label-key"
    )


def _likely_key(contents: list[bytes]) -> str | Literal[False] | None:
    """The key under which JSON has the label, None where it is the label itself, False if that cannot be told."""
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
            f"{location}: which key of its json members is the label? The first is {contents[0][:200]!r}; name it "
            "with --label-key"
        )
    return key


def _by(contents: list[bytes], label: LabelFormat) -> Literal["number", "name"]:
    found = 0
    for content in contents:
        try:
            for value in values(content, label):
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
        number_of(value)
    except ValueError:
        return False
    return True


def _seen(counts: Counter[str]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listing = ", ".join(f"{name} {count}" for name, count in ordered[:8])
    return f"of {max(counts.values(), default=0)} samples these have: {listing}" if counts else "it has no samples"
