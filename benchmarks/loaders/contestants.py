"""The loaders that are compared. What one needs is imported in its own processes alone."""

import importlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.loaders.task import Batches


@dataclass(frozen=True, slots=True)
class Contestant:
    module: str
    """In `benchmarks.loaders`. `prepare(folder)` there, if it has one, runs once before everything else."""
    batches: str = "batches"
    """Function in the module, of type `Batches`."""
    random_augment: str = "Pillow"
    """Whose RandAugment it applies."""
    package: str = "torch"
    """The distribution whose version is of interest."""
    optional: bool = False
    """Whether what it needs may be missing, since the project does not depend on it."""

    def load(self) -> Batches:
        """Import it.

        Raises:
            ImportError: what it needs is not installed.
        """
        found: Batches = getattr(importlib.import_module(f"benchmarks.loaders.{self.module}"), self.batches)
        return found

    def prepare(self, folder: Path) -> None:
        """Import it, and write images in its own format into `folder` if it has one.

        Raises:
            ImportError: what it needs is not installed.
        """
        self.load()
        module = importlib.import_module(f"benchmarks.loaders.{self.module}")
        if hasattr(module, "prepare"):
            module.prepare(folder)


BASELINE = "webdataset, Pillow"
CONTESTANTS = {
    "ours": Contestant("ours", random_augment="ours"),
    "ours, without libturbojpeg": Contestant("ours", "batches_without_libturbojpeg", random_augment="ours"),
    "ours, restart markers": Contestant("marked_shards", random_augment="ours", optional=True),
    "ours, whole pictures": Contestant("ours", "batches_of_whole_pictures", random_augment="ours"),
    "webdataset, our transform": Contestant(
        "webdataset_shards", "batches_with_our_transform", random_augment="ours", package="webdataset"
    ),
    BASELINE: Contestant("webdataset_shards", "batches_with_pillow", package="webdataset"),
    "webdataset, OpenCV": Contestant("webdataset_shards", "batches_with_opencv", package="webdataset"),
    "DataLoader over a folder, Pillow": Contestant("image_folder"),
    "DALI": Contestant("dali_pipeline", random_augment="DALI", package="nvidia-dali-cuda120", optional=True),
    "FFCV": Contestant("ffcv_file", package="ffcv", optional=True),
    "SPDL": Contestant("spdl_threads", package="spdl", optional=True),
    "litdata, Pillow": Contestant("litdata_chunks", package="litdata", optional=True),
    "mosaicml-streaming, Pillow": Contestant("mosaic_shards", package="mosaicml-streaming", optional=True),
}


def versions(names: Iterable[str]) -> str:
    """The packages of these contestants, with their versions."""
    packages = dict.fromkeys(CONTESTANTS[name].package for name in names)
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
