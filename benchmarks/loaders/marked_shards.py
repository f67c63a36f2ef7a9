"""Our reader over the same JPEGs with restart markers, which `shards build --restart-markers` writes without a loss."""

from pathlib import Path

from benchmarks.loaders import ours
from benchmarks.loaders.task import SAMPLES_PER_SHARD, Images
from data.building.build import build_shards
from data.building.restart_markers import require_libturbojpeg
from data.errors import DataError


def prepare(folder: Path) -> None:
    """Build the shards.

    Raises:
        ImportError: there is no libturbojpeg that writes the markers.
    """
    try:
        require_libturbojpeg()
    except DataError as error:
        raise ImportError(str(error)) from error
    build_shards(folder / "images", folder / "marked", samples_per_shard=SAMPLES_PER_SHARD, restart_markers=True)


def batches(folder: Path, workers: int, augmented: bool) -> Images:
    return ours.batches_of(folder / "marked", workers, augmented)
