"""Which members of an existing WebDataset are the images, which are the labels, and how labels are stored."""

import json
import tarfile
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

from data.classes.labels import class_number, is_decimal, is_number, split_list, stored_labels, text_of
from data.errors import DataError
from data.index import LabelFormat
from data.remote.remote_file import open_file
from data.remote.storage import Storage
from data.shard import split_key
from data.tarfile_limits import open_limited

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "jfif", "jpe")
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
    label_lists: Literal["classes", "multi-hot"] | None = None
    first_label: int | None = None
    ignored_labels: tuple[str, ...] = ()


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
    full_extensions: dict[str, set[str]] = field(default_factory=dict)
    """Key up to the first dot -> all behind it, as WebDataset splits names, such as `input.jpg`."""
    damage: str = ""
    """Why no more of it can be read."""

    @property
    def counts(self) -> Counter[str]:
        """Extension -> samples that have it."""
        return Counter(extension for found in self.extensions.values() for extension in found)


def read_head(location: str, storage: Storage, given: GivenFields, samples: int = 64) -> ShardHead:
    """The first samples of the tar at `location`, as far as it is readable; a remote one is read in small ranges.

    Raises:
        StorageRefused, StorageDown: access refused, or no answer.
    """
    head = ShardHead(location)
    labels = (given.label_field,) if given.label_field else LABEL_FIELDS
    fields = {*IMAGE_FIELDS, *labels, *(given.image_fields or ())}
    found: list[tuple[str, str, str, bytes | None]] = []
    keys: set[str] = set()
    with open_file(location, storage) as file:
        try:
            with open_limited(file) as tar:
                for member in tar:
                    split = split_key(member.name) if member.isfile() else None
                    if split is None:
                        continue
                    first, (key, extension) = split[0], _split(split, member.name, fields)
                    if key not in keys and len(keys) == samples:
                        break
                    keys.add(key)
                    head.full_extensions.setdefault(first, set()).add(split[1])
                    file_ = tar.extractfile(member) if extension in labels and member.size <= _LARGEST_LABEL else None
                    found.append((first, key, extension, file_.read() if file_ else None))
        except (tarfile.TarError, EOFError) as error:
            head.damage = str(error)  # the scan of the whole shard reports where
    plain = {key for first, key, _, _ in found if first == key}
    for first, key, extension, content in found:
        if first != key and first in plain:  # such as the mask of a sample
            continue
        head.extensions.setdefault(key, set()).add(extension)
        if content is not None:
            head.contents.setdefault(extension, []).append(content)
    return head


def _split(split: tuple[str, str], name: str, fields: set[str]) -> tuple[str, str]:
    """Key and extension; by the last dot of names with further dots, as `data.shard.split_members`."""
    extension = split[1].rpartition(".")[2]
    return split if split[1] in fields or extension not in fields else (name.rpartition(".")[0], extension)


def infer_fields(head: ShardHead, given: GivenFields) -> Fields:
    """What the members are, inferred as far as `given` leaves it open.

    Raises:
        DataError: it cannot be inferred, or what was given does not occur.
    """
    inferred: list[str] = []
    _refuse_double_extensions(head, given)
    image_fields = _image_fields(head, given, inferred)
    label = _label_format(head, given, inferred)
    return Fields(image_fields, label, inferred)


def _refuse_double_extensions(head: ShardHead, given: GivenFields) -> None:
    """Refuse samples of members such as `a.input.jpg` and `a.target.cls`, whose keys differ behind the first dot."""
    images, labels = {*IMAGE_FIELDS, *(given.image_fields or ())}, {*LABEL_FIELDS, given.label_field}
    if any(found & images and found & labels for found in head.extensions.values()):
        return
    full = Counter(extension for found in head.full_extensions.values() for extension in found)
    double = [extension for extension, _ in full.most_common() if "." in extension]
    candidates = [
        [extension for extension in double if extension.rpartition(".")[2] in fields] for fields in (images, labels)
    ]
    if not any(len(found) > 1 for found in head.full_extensions.values()) or not all(candidates):
        return
    options = " ".join(f"--{use}-field {found[0]}" for use, found in zip(("image", "label"), candidates, strict=True))
    raise DataError(
        f"{head.location}: no sample has an image and a label by the last part of their extensions; what follows the "
        f"first dot is {', '.join(double[:6])}; specify which are meant, such as {options}"
    )


def _image_fields(head: ShardHead, given: GivenFields, inferred: list[str]) -> tuple[str, ...]:
    counts = head.counts
    if given.image_fields is not None:
        if not any(counts[name] for name in given.image_fields):
            raise DataError(f"{head.location}: no {' or '.join(given.image_fields)} members; {_seen(head)}")
        return given.image_fields
    candidates = sorted((name for name in IMAGE_FIELDS if counts[name]), key=lambda name: -counts[name])
    if not candidates:
        raise DataError(
            f"{head.location}: no {', '.join(IMAGE_FIELDS)} members; {_seen(head)}; specify the extension of "
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
    inferred.append(f"images are the {', '.join(name for name in chosen if counts[name])} members (--image-field)")
    return tuple(name for name in IMAGE_FIELDS if name in chosen)


def _label_format(head: ShardHead, given: GivenFields, inferred: list[str]) -> LabelFormat:
    name = given.label_field
    key = given.label_key
    if name is None:
        name = "json" if key is not None else _label_field(head)
        inferred.append(f"labels are in the {name} members (--label-field)")
    contents = head.contents.get(name)
    if not contents:
        raise DataError(f"{head.location}: no {name} members; {_seen(head)}; see --label-field")
    is_json = name.rpartition(".")[2] == "json"
    if is_json and key is None:
        key = _json_key(head.location, contents)
        if key is not None:
            inferred.append(f"under the key {key!r} (--label-key{_other_keys(contents, key)})")
    # In JSON, lists of classes are the default.
    lists = given.label_lists if given.label_lists and (not is_json or given.label_lists != "classes") else ""
    label = LabelFormat(name, key, lists=lists, first=given.first_label or 0)
    if given.label_by != "name" and not given.label_lists:
        _refuse_lists_of_numbers(head.location, contents, label)
    by = given.label_by
    if by is None:
        by = "number" if label.lists == "multi-hot" else _by(head.location, contents, label)
        inferred.append(f"and are class {by}s (--label-by)")
    if by == "name" and (label.first or label.lists == "multi-hot"):
        raise DataError("--first-label and --label-lists multi-hot are for labels that are numbers, not names")
    for value in given.ignored_labels if by == "number" else ():
        if not is_number(value):
            raise DataError(f"--ignore-label {value}: the labels are numbers, and this is none")
    return replace(label, by=by, ignored=given.ignored_labels)


def _label_field(head: ShardHead) -> str:
    for name in LABEL_FIELDS:
        contents = head.contents.get(name)
        if contents and (name != "json" or _likely_key(contents) is not False):
            return name
    raise DataError(
        f"{head.location}: no {', '.join(LABEL_FIELDS)} members with a label; {_seen(head)}; specify "
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


def _other_keys(contents: list[bytes], chosen: str) -> str:
    """The keys of the first object that may be labels as well."""
    try:
        first = json.loads(contents[0])
    except (ValueError, RecursionError):
        return ""
    keys = first if isinstance(first, dict) else {}
    others = [key for key in keys if key != chosen and key.partition("_")[0] in {*LABEL_KEYS, "label"}]
    return f", not {' or '.join(map(repr, others[:4]))}" if others else ""


def _json_key(location: str, contents: list[bytes]) -> str | None:
    key = _likely_key(contents)
    if key is False:
        raise DataError(
            f"{location}: which key of its json members is the label? The first is {contents[0][:200]!r}; specify it "
            "with --label-key"
        )
    return key


def _refuse_lists_of_numbers(location: str, contents: list[bytes], label: LabelFormat) -> None:
    """Refuse lists whose meaning is unclear: one-hot ones, and several numbers in a text."""
    is_json = label.field.rpartition(".")[2] == "json"
    lists: list[list[Any]] = []
    single = 0
    for content in contents:
        try:
            found = stored_labels(content, label) if is_json else _numbers_in_text(content)
        except ValueError:
            continue
        if len(found) > 1:
            lists.append(found)
        else:
            single += 1
    if lists and not single and len({len(found) for found in lists}) == 1 and all(map(_is_flag, chain(*lists))):
        raise DataError(
            f"{location}: the labels are lists of {len(lists[0]):,} numbers that are all 0 or 1, such as "
            f"{contents[0][:60]!r}: if there is one for each class (one-hot, multi-hot), use --label-lists multi-hot; "
            "if they are class numbers, --label-lists classes"
        )
    if lists and not is_json:
        raise DataError(
            f"{location}: the {label.field} members have several numbers, such as {contents[0][:60]!r}: if each is a "
            "class, use --label-lists classes; if all of them are the name of one, --label-by name"
        )


def _numbers_in_text(content: bytes) -> list[str]:
    """
    Raises:
        ValueError: there is something else.
    """
    found = split_list(text_of(content).removeprefix("[").removesuffix("]"))
    for value in found:
        class_number(value)
    return found


def _is_flag(value: object) -> bool:
    return isinstance(value, bool) or (is_number(value) and class_number(value) in (0, 1))


def _by(location: str, contents: list[bytes], label: LabelFormat) -> Literal["number", "name"]:
    numbers: list[Any] = []
    names: list[str] = []
    neither: list[Any] = []
    reason = ""
    for content in contents:
        try:
            for value in stored_labels(content, label):
                text = isinstance(value, str) and not is_decimal(value)
                (numbers if is_number(value) else names if text else neither).append(value)
        except ValueError as error:
            reason = reason or str(error)
    if numbers and names:
        total = len(numbers) + len(names) + len(neither)
        raise DataError(
            f"{location}: {len(numbers):,} of the first {total:,} labels are numbers, such as {numbers[0]!r}, and "
            f"others are not, such as {names[0]!r}; --label-by number makes the others unusable, --label-by name "
            "makes all of them names"
        )
    if numbers or names:
        return "number" if numbers else "name"
    if neither:
        fix = "store 0 and 1, or names" if isinstance(neither[0], bool) else "--label-by name makes them names"
        fix = "correct them" if isinstance(neither[0], float) else fix
        raise DataError(f"{location}: labels such as {neither[0]!r} are neither whole numbers nor names; {fix}")
    where = f" under the key {label.key!r}" if label.key else ""
    fix = (
        f"correct them: {reason}"
        if "twice" in reason
        else "a key in a nested object is --label-key OUTER.INNER"
        if label.field.rpartition(".")[2] == "json"
        else "labels must be text, a number or a name: write the shards again with such labels, or see --label-field"
    )
    raise DataError(
        f"{location}: no label in the first {label.field} members{where}, such as {contents[0][:100]!r}; {fix}"
    )


def _seen(head: ShardHead) -> str:
    # Also such as `input.jpg`, which are not taken unless they are specified.
    counts = head.counts | Counter(extension for found in head.full_extensions.values() for extension in found)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listing = ", ".join(f"{name} {count}" for name, count in ordered[:8])
    return f"of {max(counts.values(), default=0)} samples these have: {listing}" if counts else "it has no samples"
