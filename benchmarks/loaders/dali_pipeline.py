"""NVIDIA DALI on the CPU, over a folder of files; it decodes only the crop, and has a RandAugment of its own."""

from pathlib import Path
from typing import Any

from nvidia.dali import fn, pipeline_def
from nvidia.dali.auto_aug import rand_augment
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from benchmarks.loaders.task import AREA, BATCH, LAYERS, MAGNITUDE, SIZE, Images


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def _pipeline(folder: Path, augmented: bool) -> tuple[Any, Any]:
    encoded, label = fn.readers.file(file_root=str(folder), random_shuffle=True, initial_fill=1000, name="files")
    images = fn.decoders.image_random_crop(
        encoded, random_area=AREA, random_aspect_ratio=(3 / 4, 4 / 3), jpeg_fancy_upsampling=True
    )
    images = fn.flip(fn.resize(images, size=(SIZE, SIZE)), horizontal=fn.random.coin_flip())
    if augmented:
        # Of 31 magnitudes, the 15th is half of the greatest, as 15 of 30 is of ours.
        images = rand_augment.rand_augment(images, n=LAYERS, m=round(MAGNITUDE), shape=(SIZE, SIZE))
    return images, label


def batches(folder: Path, workers: int, augmented: bool) -> Images:
    pipeline = _pipeline(
        folder / "images", augmented, batch_size=BATCH, num_threads=workers, device_id=None, prefetch_queue_depth=2
    )
    iterator = DALIGenericIterator(
        pipeline, ["images", "label"], size=-1, auto_reset=True, last_batch_policy=LastBatchPolicy.DROP
    )
    return (batch["images"] for (batch,) in iterator)
