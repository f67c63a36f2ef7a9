"""Our reader over the same JPEGs with restart markers, which `shards build --restart-markers` writes without a loss."""

from pathlib import Path

from benchmarks.loaders import ours
from benchmarks.loaders.task import Images
from data.building.build import build_shards
from data.errors import DataError


def prepare(folder: Path) -> None:
    """Build the shards.

    Raises:
        ImportError: there is no libturbojpeg 3.
    """
    try:
        build_shards(
            folder / "images", folder / "marked", samples_per_shard=ours.SAMPLES_PER_SHARD, restart_markers=True
        )
    except DataError as error:
        raise ImportError(str(error)) from error


def batches(folder: Path, workers: int, augmented: bool) -> Images:
    return ours.batches_of(folder / "marked", workers, augmented)
