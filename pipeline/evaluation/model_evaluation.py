"""`coatnet evaluate` on one rank: a trained model on any indexed shards, from opening both to the report."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from data.classes.class_matching import for_classes
from data.dataset import Dataset, open_dataset
from data.errors import DataError
from data.files.digest import json_sha256
from data.index import check_shards
from data.prefetch import evaluation_need
from data.remote.cache import Cache
from data.remote.storage import Storage, is_remote
from data.stream import MicroBatch
from models.model_facts import ModelFacts
from models.registry import create_model
from models.variants import Variant, find_variant
from pipeline.errors import ConfigError
from pipeline.evaluate import EvaluationInput, evaluate_on
from pipeline.evaluation.analysis import Analysis
from pipeline.evaluation.report_files import file_names, write_report
from pipeline.evaluation.report_parts import class_table, confused_pairs, left_out, mean_precision
from pipeline.initial_weights.fitting import resized_tables
from pipeline.model_location import find_model_checkpoint
from pipeline.precision import autocast, model_dtype
from pipeline.ranks.device_settings import prepare_devices
from pipeline.ranks.distributed import Ranks, join_ranks, leave_ranks, name_lost_ranks
from pipeline.ranks.gpus import device_name
from pipeline.recipe.data_sections import DataSettings
from pipeline.recipe.schema import Precision, TrainStage
from pipeline.recipe.section import WhichWeights
from pipeline.runs.evaluation_report import (
    LOCK,
    Circumstances,
    Computation,
    EvaluatedData,
    EvaluatedModel,
    EvaluationReport,
    ReportedMistake,
    create_folder,
    lock_folder,
    refuse_existing,
)
from pipeline.runs.stage_result import distinct_names
from pipeline.trained_model import open_trained_model
from pipeline.training.training_batches import SkippedLimits
from pipeline.weights import to_precision

_BATCH = 64
_UNUSABLE = 20
"""How many of them the report has; the CSV files have all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """What to evaluate on what, and how; None is what the stage of the model does, or else the default."""

    model: str
    """See `open_trained_model`."""
    weights: WhichWeights
    data: DataSettings
    """`validation` are the shards."""
    crop: Literal["center", "whole"] | None
    image_size: int | None
    batch_size: int | None
    """Images of one forward pass; 64 unless the stage is known."""
    precision: Precision | None
    """fp32 unless the stage is known."""
    mistakes: int
    """How many of the most confident mistakes to show."""
    folder: Path
    """For the report."""
    overwrite: bool
    """Whether to replace an earlier report in that folder."""
    threads: int | None = None
    """Compute threads of a rank without a GPU; unless the stage is known, its share of the processors."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How an evaluation shows what it does, on the leader."""

    say: Callable[[str], None]
    begin: Callable[[int], None]
    """Called once with the number of images."""
    advance: Callable[[int], None]
    """Called with the number of images since the last call."""


def known_stage(model: str) -> TrainStage | None:
    """The settings of the stage that trained the model at this location; None for an exported one.

    Raises:
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    try:
        return find_model_checkpoint(model).stage()
    except ConfigError:  # an exported model; or none, as opening it will say
        return None


def evaluate_here(request: EvaluationRequest, progress: Progress) -> EvaluationReport | None:
    """Evaluate as the only process, or as one rank of the group that the environment describes; see `evaluate_model`.

    Raises:
        LostRank, DeviceFailed: as for `name_lost_ranks`.
    """
    stage = known_stage(request.model)
    is_rank = "RANK" in os.environ
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) if is_rank else 1
    threads = request.threads or (stage.resources.threads_per_rank if stage else max(1, (os.cpu_count() or 1) // here))
    # As the stage itself evaluated, if that is known.
    gpus = stage is None or stage.resources.gpus_per_rank > 0
    prepare_devices(gpus=gpus, deterministic=stage.deterministic if stage else True)
    if not is_rank:
        torch.set_num_threads(threads)
        device = torch.device("cuda" if gpus and torch.cuda.is_available() else "cpu")
        return evaluate_model(request, stage, Ranks(0, 1, device), progress)
    with name_lost_ranks():
        ranks = join_ranks(threads, gpus=gpus)
        report = evaluate_model(request, stage, ranks, progress)
        ranks.barrier()
    leave_ranks()
    return report


def evaluate_model(
    request: EvaluationRequest, stage: TrainStage | None, ranks: Ranks, progress: Progress
) -> EvaluationReport | None:
    """Evaluate on all ranks together; write the report on the leader, which also returns it.

    With the batch size, precision and compute threads of the stage that trained the model, the figures are those of
    the stage's own evaluation to the last bit, on any number of ranks.

    Raises:
        ConfigError: no model, an image size or classes that do not fit, too little memory, or a report exists.
        DataError: shards that cannot be read or are not the indexed ones, or too many samples that cannot be used.
        StorageDown, StorageRefused: remote shards or a remote model that cannot be read.
    """
    precision = request.precision or (stage.precision if stage else "fp32")
    batch_size = request.batch_size or (stage.batch.micro_size if stage else _BATCH)
    if ranks.is_leader:
        refuse_existing(request.folder, overwrite=request.overwrite)
    with open_trained_model(request.model, request.weights) as trained:
        facts = trained.facts
        dataset = open_for_model(request.data, facts, stage)
        if ranks.is_leader:
            check_shards(dataset.index, dataset.storage)
        image_size = request.image_size or facts.preprocessing.image_size
        _check_image_size(image_size, facts)
        model = trained.build(ranks.device, image_size)
        before = create_model(**facts.arguments, device="meta")
        resized = resized_tables(dict(before.named_parameters()), dict(model.named_parameters()))
    to_precision(model, model_dtype(precision))
    data, crop = request.data, request.crop or facts.preprocessing.crop
    view = replace(facts.preprocessing, image_size=image_size, crop=crop)
    given = EvaluationInput(
        dataset=dataset,
        limits=SkippedLimits(data, data.validation, "--skipped-share", "--skipped-run"),
        workers=data.workers,
        preprocessing=view,
        micro_size=batch_size,
        loss=facts.loss,
        cache=_cache(data, dataset, batch_size, ranks),
    )
    lock = None
    if ranks.is_leader:
        create_folder(request.folder)
        lock = lock_folder(request.folder)
        refuse_existing(request.folder, overwrite=request.overwrite)  # written meanwhile
    for line in (*facts.remarks, *remarks(request, facts, stage, image_size, resized)):
        progress.say(line)
    analysis = Analysis(
        len(dataset.classes),
        several_labels=dataset.labels_per_sample > 1,
        kind=facts.loss,
        mistakes=request.mistakes,
        device=ranks.device,
    )

    def note(batch: MicroBatch) -> None:
        analysis.note(batch)
        progress.advance(len(batch.labels) * ranks.world_size)

    progress.begin(dataset.samples)
    began = time.monotonic()
    try:
        with torch.no_grad(), autocast(precision, ranks.device):
            accuracy = evaluate_on(model, given, ranks, model_dtype(precision), note, observe=analysis.add)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{batch_size} images of {image_size} pixels do not fit into the memory of the GPU "
            f"({str(error).partition('. ')[0]}); give a smaller --batch-size"
        ) from None
    seconds = time.monotonic() - began
    findings = analysis.result(ranks)
    if not ranks.is_leader:
        return None
    names = distinct_names(dataset.classes)
    report = EvaluationReport(
        model=EvaluatedModel(
            given=facts.source.given,
            location=facts.source.resolved,
            name=str(facts.arguments["name"]),
            weights=facts.weights,
            step=facts.step,
            run_id=facts.run_id,
            classes=len(dataset.classes),
            trained_image_size=facts.preprocessing.image_size,
            resized_tables=resized,
            remarks=facts.remarks,
        ),
        data=EvaluatedData(
            shards=data.validation,
            digest=dataset.digest,
            label_map=data.validation_label_map,
            labels_per_sample=dataset.labels_per_sample,
            left_out=dataset.index.samples - dataset.samples,
            classes_without_samples=int((accuracy.of_classes[:, 0] == 0).sum()),
        ),
        loss_kind=facts.loss,
        computation=Computation(image_size, crop, precision, batch_size),
        circumstances=Circumstances(
            ended=time.time(),
            seconds=seconds,
            images_per_second=round(accuracy.samples / max(1e-9, seconds), 1),
            ranks=ranks.world_size,
            device=device_name(ranks.device),
        ),
        figures=accuracy.figures,
        calibration=findings.calibration,
        average_precision=mean_precision(findings),
        not_finite=findings.not_finite,
        classes=class_table(accuracy, findings, names, facts.display_names),
        confused=confused_pairs(accuracy, findings, names),
        mistakes=tuple(
            ReportedMistake(
                one.shard, one.key, tuple(names[label] for label in one.labels), names[one.predicted], one.score
            )
            for one in findings.mistakes
        ),
        unusable=tuple(findings.unusable[:_UNUSABLE]),
        files=file_names(findings),
        left_out=left_out(findings),
    )
    write_report(request.folder, report, findings, names)
    if lock:
        (request.folder / LOCK).unlink(missing_ok=True)
        lock.close()
    return report


def open_for_model(data: DataSettings, facts: ModelFacts, stage: TrainStage | None) -> Dataset:
    """The shards of `data.validation`, whose labels are those of the model.

    Raises:
        ConfigError: the model has no classifier, or samples have several labels and it was trained for one.
        DataError: they cannot be read, or have other classes than the model.
    """
    if facts.arguments.get("num_classes") == 0:
        raise ConfigError(f"{facts.source.given}: has no classifier; evaluate a model that has one")
    dataset = open_dataset(data.validation, Storage(**data.storage.model_dump()), data.validation_label_map)
    own_map = stage.data.validation_label_map if stage else None
    hint = f"; the stage of the model was evaluated with --label-map {own_map}" if own_map else ""
    if facts.classes is not None:
        dataset = for_classes(dataset, facts.classes, facts.source.given, hint)
    elif json_sha256(dataset.classes) != facts.classes_digest:
        raise DataError(
            f"{facts.source.given}: does not have the names of its {facts.arguments['num_classes']:,} classes, and "
            f"that they are the {len(dataset.classes):,} of {data.validation} cannot be seen; evaluate it on shards "
            f"with the class list that it was trained with, or export it again, with its names{hint}"
        )
    if dataset.labels_per_sample > 1 and facts.loss == "softmax":
        raise ConfigError(
            f"{data.validation}: its samples have up to {dataset.labels_per_sample} labels, and {facts.source.given} "
            "was trained with softmax, for one; evaluate it on shards with one label, or drop others by --label-map"
        )
    return dataset


def remarks(
    request: EvaluationRequest,
    facts: ModelFacts,
    stage: TrainStage | None,
    image_size: int,
    resized: dict[str, int],
) -> list[str]:
    """What is computed otherwise than in the evaluation of the model's own stage."""
    found = []
    for sizes, count in resized.items():
        found.append(
            f"{count} relative position tables are resized from {sizes}, for {image_size} pixels instead of "
            f"{facts.preprocessing.image_size}"
        )
    if stage and stage.evaluation.weights == "raw" and request.weights == "auto" and facts.weights == "ema":
        found.append(
            "the stage evaluates its raw weights and this is their moving average; --weights raw has the former"
        )
    if stage and stage.compile:
        found.append("the stage computes with torch.compile and this evaluation without, so the last digits may differ")
    if stage is None and request.precision is None:
        found.append("the precision that the model was trained in is not known; it computes in fp32")
    return found


def _check_image_size(image_size: int, facts: ModelFacts) -> None:
    arguments = {key: value for key, value in facts.arguments.items() if key not in ("num_classes", "image_size")}
    variant: Variant = find_variant(**arguments)
    if image_size % variant.stride:
        lower = max(variant.stride, image_size // variant.stride * variant.stride)
        raise ConfigError(
            f"--image-size {image_size}: no multiple of {variant.stride}, as {arguments['name']} needs; {lower} is"
        )


def _cache(data: DataSettings, dataset: Dataset, batch_size: int, ranks: Ranks) -> Cache:
    settings = data.cache
    cache = Cache(Path(settings.folder), int(settings.gigabytes * 1e9), settings.downloads)
    if not is_remote(dataset.index.folder):
        return cache
    need = evaluation_need(dataset, batch_size * ranks.world_size, data.workers)
    if need > cache.bytes:
        raise ConfigError(
            f"--cache-gigabytes {settings.gigabytes:g}: too little for the shards that are needed at the same time; "
            f"set it to {math.ceil(need / 1e6) / 1e3:g}"
        )
    cache.make()
    if (room := cache.room_for_another_run()) < need:
        raise ConfigError(
            f"--cache {cache.folder}: has room for {max(0, room) / 1e9:.1f} GB of shards beside those that running "
            f"jobs read, and {need / 1e9:.1f} are needed at the same time; give a folder on another disk"
        )
    return cache
