"""What is in a checkpoint: the names of its files, and the manifest that describes them. Needs no torch.

    step-00012000/  manifest.json  classes.json  buffers.safetensors  rank-00000.safetensors  rank-00001.safetensors ...

A folder without a manifest is not a checkpoint.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.errors import raise_if_passing
from data.files.digest import json_sha256
from data.files.json_records import FLAT, check_at_least, check_sha256, load_json, to_json, to_record
from data.files.regular_file import read_regular
from data.remote.storage import Storage, checked, is_remote, join, read_bytes
from models.model_facts import LossKind, Preprocessing
from pipeline.errors import ConfigError
from pipeline.runs.run_identity import check_run_id

MANIFEST = "manifest.json"
BUFFERS = "buffers.safetensors"
CLASSES = "classes.json"
_FORMAT = {"format": "coatnet-checkpoint", "version": 1}
_RANK = re.compile(r"^rank-([0-9]{5,})\b")
_FILE = re.compile(r"classes\.json|buffers\.safetensors|rank-[0-9]{5,}\.safetensors")
_NAME = re.compile(r"step-([0-9]{8,})")
_LARGEST = 2**48
_DIMENSIONS = 8
_STATE = ("master", "exp_avg", "exp_avg_sq")
_ELEMENT = 4  # bytes: all state is float32
_WRITER = ("run_id", "computed_with", "sha256")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and checksum of one file."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_at_least(0, bytes=self.bytes)
        check_sha256(self.sha256)


@dataclass(frozen=True, slots=True)
class FragmentEntry:
    """Elements `start` .. `stop` of the flattened `parameter` are stored in `file`."""

    parameter: str
    start: int
    stop: int
    file: str

    def __post_init__(self) -> None:
        check_at_least(0, start=self.start)
        check_at_least(self.start, stop=self.stop)


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What one rank wrote into a checkpoint, or why it could not."""

    files: Mapping[str, FileEntry]
    fragments: tuple[FragmentEntry, ...]
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class RunDigests:
    """What distinguishes a run: digests of its settings, of its training shards, and of its classes."""

    recipe_digest: str
    index_digest: str
    classes_digest: str


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What all checkpoints of a stage have in common."""

    stage: str
    precision: str
    model: Mapping[str, Any]
    """Arguments of `models.registry.create_model`."""
    digests: RunDigests = field(metadata=FLAT)
    run_id: str | None = None
    """Of the run that wrote it, see `pipeline.runs.run_identity`."""
    computed_with: Mapping[str, str] | None = None
    """What the start that wrote it computed with, see `pipeline.runs.continuation`; None if that was not recorded."""
    preprocessing: Preprocessing | None = None
    """Of evaluation; None in checkpoints from before it was recorded, as is `loss`."""
    loss: LossKind | None = None

    def __post_init__(self) -> None:
        model = to_record(_Model, dict(self.model))
        if self.preprocessing is not None and self.preprocessing.image_size != model.image_size:
            raise ValueError(
                f"preprocessing: has the image size {self.preprocessing.image_size}, and the model {model.image_size}"
            )
        if self.run_id is not None:
            check_run_id(self.run_id)


@dataclass(frozen=True, slots=True)
class _Model:
    """What the arguments of every model contain."""

    name: str
    num_classes: int
    image_size: int

    def __post_init__(self) -> None:
        check_at_least(0, num_classes=self.num_classes)
        check_at_least(1, image_size=self.image_size)


@dataclass(frozen=True, slots=True)
class ClassNames:
    """The content of `classes.json`."""

    classes: tuple[str, ...]
    """In the order of the classifier's outputs."""


@dataclass(frozen=True, slots=True)
class RollBack:
    """A return to the weights after `to` steps, made after `at` steps."""

    to: int
    at: int

    def __post_init__(self) -> None:
        check_at_least(0, to=self.to)
        check_at_least(self.to, at=self.at)

    def discarded(self, step: int) -> bool:
        """Whether the weights after `step` steps are among those that it discarded."""
        return self.to < step < self.at


@dataclass(frozen=True, slots=True)
class NonFiniteRecord:
    """What steps with a non-finite loss or gradient have led to so far, over all starts."""

    steps_not_applied: int = 0
    not_applied_in_a_row: int = 0
    """Of them, the series that includes the last step; 0 if that was applied."""
    roll_backs: tuple[RollBack, ...] = ()
    """Oldest first."""

    def __post_init__(self) -> None:
        check_at_least(0, steps_not_applied=self.steps_not_applied, not_applied_in_a_row=self.not_applied_in_a_row)


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What a checkpoint is of."""

    run: RunFacts = field(metadata=FLAT)
    step: int
    """Steps taken."""
    samples: int
    """Samples trained on."""
    skipped_samples: int
    """Samples so far that could not be used and were replaced."""
    optimizer_steps: int
    """How often AdamW has stepped."""
    world_size: int
    """Ranks that wrote it."""
    ema_updates: int | None = None
    """How often the moving average was updated; None without one."""
    non_finite: NonFiniteRecord = field(default=NonFiniteRecord(), metadata=FLAT)
    for_stop: bool = False
    """Saved because a start was stopped: an undisturbed run would have no checkpoint of this step."""

    def __post_init__(self) -> None:
        counts = ("step", "samples", "skipped_samples", "optimizer_steps")
        check_at_least(0, **{name: getattr(self, name) for name in counts}, ema_updates=self.ema_updates or 0)
        check_at_least(1, world_size=self.world_size)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint consists of."""

    facts: CheckpointFacts = field(metadata=FLAT)
    parameters: Mapping[str, tuple[int, ...]]
    """Name -> shape."""
    fragments: tuple[FragmentEntry, ...]
    """Together every element of every parameter once."""
    files: Mapping[str, FileEntry]
    """Every other file by name."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: the fragments are not every element of every parameter once, or the files do not hold them.
        """
        _check_coverage(self.parameters, self.fragments)
        _check_files(self.files, self.fragments, len(self.kinds) * _ELEMENT)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is stored of every element, each (stop - start,) float32: see `pipeline.zero.fragments.Fragment`."""
        return _STATE if self.facts.ema_updates is None else (*_STATE, "ema")

    def fragments_by_file(self) -> dict[str, list[FragmentEntry]]:
        """The fragments in each file that has some."""
        found: dict[str, list[FragmentEntry]] = {}
        for fragment in self.fragments:
            found.setdefault(fragment.file, []).append(fragment)
        return found

    @classmethod
    def of(
        cls, facts: CheckpointFacts, parameters: Mapping[str, tuple[int, ...]], records: Sequence[RankRecord]
    ) -> "Manifest":
        """The manifest of what all ranks wrote.

        Raises:
            ValueError: the fragments are not every element of every parameter once, or the files do not hold them.
        """
        fragments = tuple(fragment for record in records for fragment in record.fragments)
        return cls(facts, parameters, fragments, {k: v for record in records for k, v in record.files.items()})

    def as_json(self) -> dict[str, Any]:
        """The content of `manifest.json`, with its own checksum."""
        return signed({**_FORMAT, **to_json(self)})

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(entry.bytes for entry in self.files.values())

    def missing_or_cut(self, sizes: Mapping[str, int]) -> str | None:
        """What is wrong with files of the `sizes` in bytes, by name, if one is missing or of another size."""
        for name, expected in sorted(self.files.items()):
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != expected.bytes:
                return f"{name} has {sizes[name]:,} bytes instead of {expected.bytes:,}"
        return None


def step_name(step: int) -> str:
    """The folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in the folder name of a checkpoint; None for other names."""
    match = _NAME.fullmatch(name)
    step = int(match.group(1)) if match else None
    return step if step is not None and step_name(step) == name else None


def rank_name(rank: int) -> str:
    """What the names of a rank's files begin with."""
    return f"rank-{rank:05d}"


def writer_of(file: str) -> int:
    """The rank that wrote `file`; the leader wrote the buffers and the classes."""
    match = _RANK.match(file)
    return int(match.group(1)) if match else 0


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with the sha256 of its other content, as JSON with sorted keys, under `sha256`."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return content | {"sha256": json_sha256(content)}


def weights_digest(content: bytes) -> str:
    """What identifies the weights of a checkpoint by the `content` of its manifest: all but the start that wrote it."""
    try:
        kept = {key: value for key, value in json_object(content).items() if key not in _WRITER}
    except ValueError:
        return hashlib.sha256(content).hexdigest()  # damaged, as reading it will say
    return json_sha256(kept)


def manifest_bytes(location: str, storage: Storage) -> bytes:
    """The content of the manifest of the checkpoint at `location`, unchecked.

    Raises:
        FileNotFoundError: not a checkpoint.
        OSError: it is no regular file, larger than any manifest, or cannot be read.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    path = checked(join(location, MANIFEST))
    return read_bytes(path, storage) if is_remote(path) else read_regular(path)


def read_manifest(location: str, storage: Storage) -> Manifest:
    """The manifest of the checkpoint at `location`, verified against its own checksum.

    Raises:
        ConfigError: not a checkpoint, or a damaged manifest.
        OSError: a file system that fails for a while, see `may_pass`.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    try:
        content = json_object(manifest_bytes(location, storage))
        if signed(content) != content:
            raise ConfigError(f"{location}: {MANIFEST} does not have its own checksum")
        _check_format(location, content)
        return to_record(Manifest, content)
    except FileNotFoundError:
        raise ConfigError(f"{location}: not a checkpoint ({MANIFEST} is missing)") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{location}: {MANIFEST} is not JSON ({error})") from None
    except (OSError, ValueError) as error:
        raise_if_passing(error)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{location}: not a checkpoint ({MANIFEST}: {reason})") from None


def json_object(content: bytes) -> dict[str, Any]:
    """The object in the `content` of a manifest, not checked any further.

    Raises:
        ValueError: it is no JSON object.
    """
    value = load_json(content)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _check_format(location: str, content: Mapping[str, Any]) -> None:
    found = {key: content.get(key) for key in _FORMAT}
    if json.dumps(found) != json.dumps(_FORMAT):  # to Python, true is 1
        raise ConfigError(
            f"{location}: {MANIFEST} has the format {str(found['format'])[:40]!r}, version "
            f"{str(found['version'])[:40]}; this program reads {_FORMAT['format']!r}, version {_FORMAT['version']}: "
            "use the one that wrote it"
        )


def _check_coverage(parameters: Mapping[str, Sequence[int]], fragments: Sequence[FragmentEntry]) -> None:
    """Refuse fragments that are not every element of every parameter once: what none has would stay uninitialized."""
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in parameters}
    for fragment in fragments:
        if fragment.parameter not in ranges:
            raise ValueError(f"fragments: {fragment.parameter} is not one of the parameters")
        ranges[fragment.parameter].append((fragment.start, fragment.stop))
    for name, shape in parameters.items():
        if len(shape) > _DIMENSIONS or not all(0 < size < _LARGEST for size in shape):
            raise ValueError(f"{name}: a shape must be at most {_DIMENSIONS} positive sizes, not {str(shape)[:80]}")
        end = 0
        for start, stop in sorted(ranges[name]):
            if start != end:
                raise ValueError(f"{name}: elements {end} to {start} are missing or written twice")
            end = stop
        if end < math.prod(shape):
            raise ValueError(f"{name}: elements from {end} are missing")
        if end > math.prod(shape):
            raise ValueError(f"{name}: has {math.prod(shape)} elements, and a fragment ends at {end}")


def _check_files(files: Mapping[str, FileEntry], fragments: Sequence[FragmentEntry], element: int) -> None:
    """Refuse names that are not those of `save`, and files that are smaller than their fragments."""
    for name in files:
        if not _FILE.fullmatch(name):
            raise ValueError(f"files: {name[:80]!r} must be {CLASSES}, {BUFFERS} or rank-NNNNN.safetensors")
    if BUFFERS not in files:
        raise ValueError(f"files: {BUFFERS} is missing")
    needed = dict.fromkeys(files, 0)
    for fragment in fragments:
        if fragment.file not in needed:
            raise ValueError(f"fragments: {fragment.file[:80]!r} is not one of the files")
        needed[fragment.file] += element * (fragment.stop - fragment.start)
    for name, size in needed.items():
        if size > files[name].bytes:
            raise ValueError(f"files: {name}: its fragments take {size:,} bytes, and it has {files[name].bytes:,}")
