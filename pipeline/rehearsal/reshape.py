"""What each rank of another world reads of a checkpoint: arithmetic on its manifest, or on that of the rehearsal.

Reading is `pipeline.checkpoints.checkpoint.load_state`: a rank reads the ranges that its engine holds from the files in
which they overlap, and the buffers. Before, all ranks hash the files, each those of the ranks that it stands for
(`pipeline.checkpoints.verification`). A remote file is downloaded as a whole.
"""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.checkpoints.manifest import BUFFERS, FragmentEntry, Manifest, rank_name, writer_of
from pipeline.errors import ConfigError, RunFailed
from pipeline.rehearsal.checkpoint_layout import CheckpointLayout, PlannedFile
from pipeline.rehearsal.partitions import Partitioning

_ELEMENT = 4  # bytes: all state is float32


@dataclass(frozen=True, slots=True)
class RankReading:
    """What one rank of the new world reads."""

    rank: int
    files: tuple[str, ...]
    """With state that it holds, and the buffers; by name."""
    pieces: int
    """Parts of fragments, each read for every kind of state."""
    state_bytes: int
    """Of these parts."""
    hashed_bytes: int
    """Of the files whose checksums it verifies."""
    downloaded_bytes: int
    """Of the files that it reads from or verifies, each of which it downloads once if the checkpoint is remote."""


@dataclass(frozen=True, slots=True)
class Reshape:
    """A checkpoint read by another number of ranks."""

    source: str
    """The checkpoint, or what it was made up of."""
    made_up: bool
    """Whether there is no such checkpoint yet."""
    from_ranks: int
    to_ranks: int
    refused: str | None
    """Why a start on so many ranks fails; None if it does not."""
    checkpoint_bytes: int
    state_bytes: int
    """That all ranks read together."""
    elements: int
    """Of the model; each of them was found in exactly one place for every rank that holds it."""
    most_files: int
    """That any rank reads."""
    ranks: tuple[RankReading, ...]
    """Those rehearsed."""


@dataclass(frozen=True)
class SavedState:
    """Where the elements of each parameter are in the files of a checkpoint."""

    source: str
    made_up: bool
    world_size: int
    kinds: int
    """Of state that is stored of each element."""
    files: Mapping[str, int]
    """Bytes by name, without the manifest."""
    starts: Mapping[str, list[int]]
    """The first element of each fragment of a parameter, ascending."""
    stops: Mapping[str, list[int]]
    """Where they end."""
    places: Mapping[str, list[str]]
    """The file of each."""

    @classmethod
    def of_manifest(cls, location: str, manifest: Manifest) -> "SavedState":
        """A checkpoint that exists; its manifest has been checked when it was read."""
        sizes = {name: entry.bytes for name, entry in manifest.files.items()}
        found = _by_parameter(manifest.fragments)
        return cls(location, False, manifest.facts.world_size, len(manifest.kinds), sizes, *found)

    @classmethod
    def of_layout(cls, layout: CheckpointLayout, files: Sequence[PlannedFile]) -> "SavedState":
        """A checkpoint that ranks as in the rehearsal would save; `files` are those of the layout."""
        ranks = layout.partitioning.ranks
        entries = (
            FragmentEntry(part.parameter, part.start, part.stop, f"{rank_name(rank)}.safetensors")
            for rank in range(ranks)
            for part in layout.partitioning.ranges(rank)
            if part.saved_here
        )
        sizes = {file.name: file.bytes for file in files}
        return cls(f"of {ranks} ranks", True, ranks, len(layout.kinds), sizes, *_by_parameter(entries))

    def reshaped(self, partitioning: Partitioning, ranks: Sequence[int], refused: str | None) -> Reshape:
        """What each of `ranks` reads of it in a world with `partitioning`.

        Raises:
            ConfigError: the checkpoint has other parameters.
            RunFailed: an element is in no place, or in several.
        """
        now, saved = partitioning.parameters.sizes, {name: ends[-1] for name, ends in self.stops.items()}
        differing = sorted(name for name in now.keys() | saved.keys() if now.get(name) != saved.get(name))
        if differing:
            name = differing[0]
            raise ConfigError(
                f"{self.source}: a checkpoint of another model: {name} has {saved.get(name, 0):,} elements there and "
                f"{now.get(name, 0):,} in this model ({len(differing)} parameters differ); give the recipe another "
                "name, or remove the run folder"
            )
        read, most, shown = 0, 0, dict[int, RankReading]()
        for rank in range(partitioning.ranks):
            found = self._read_by(partitioning, rank)
            read += found.state_bytes
            most = max(most, len(found.files))
            if rank in ranks:
                shown[rank] = found
        return Reshape(
            self.source,
            self.made_up,
            self.world_size,
            partitioning.ranks,
            refused,
            sum(self.files.values()),
            read,
            partitioning.elements,
            most,
            tuple(shown[rank] for rank in ranks),
        )

    def _read_by(self, partitioning: Partitioning, rank: int) -> RankReading:
        files, pieces, elements = {BUFFERS}, 0, 0
        for part in partitioning.ranges(rank):
            starts, stops = self.starts[part.parameter], self.stops[part.parameter]
            first, last = bisect.bisect_right(stops, part.start), bisect.bisect_left(starts, part.stop)
            position = part.start
            for number in range(first, last):
                if max(starts[number], part.start) != position:
                    break
                position = min(stops[number], part.stop)
            if position != part.stop:
                raise RunFailed(
                    f"rehearsal: {self.source}: elements {part.start:,} to {part.stop:,} of {part.parameter}, which "
                    f"rank {rank} of {partitioning.ranks} reads, are not once in its files; please report it"
                )
            files.update(self.places[part.parameter][first:last])
            pieces += last - first
            elements += part.elements
        hashed = {name for name in self.files if writer_of(name) % partitioning.ranks == rank}
        return RankReading(
            rank,
            tuple(sorted(files)),
            pieces,
            elements * self.kinds * _ELEMENT,
            sum(self.files[name] for name in hashed),
            sum(self.files[name] for name in files | hashed),
        )


def _by_parameter(
    entries: Iterable[FragmentEntry],
) -> tuple[dict[str, list[int]], dict[str, list[int]], dict[str, list[str]]]:
    found: dict[str, list[tuple[int, int, str]]] = {}
    for entry in entries:
        if entry.start < entry.stop:
            found.setdefault(entry.parameter, []).append((entry.start, entry.stop, entry.file))
    for pieces in found.values():
        pieces.sort()
    return (
        {name: [start for start, _, _ in pieces] for name, pieces in found.items()},
        {name: [stop for _, stop, _ in pieces] for name, pieces in found.items()},
        {name: [file for _, _, file in pieces] for name, pieces in found.items()},
    )
