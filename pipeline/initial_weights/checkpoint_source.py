"""Starting from a checkpoint: of an earlier stage, or of another run."""

from contextlib import closing
from pathlib import Path

from data.remote.storage import is_remote, list_files
from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.checkpoints.resume import open_verified
from pipeline.errors import ConfigError
from pipeline.initial_weights.source import Request, WeightSource, meta, refuse_other_variant
from pipeline.model_location import find_model_checkpoint
from pipeline.ranks.distributed import Ranks
from pipeline.runs.run_folder import RunFolder
from pipeline.weights import chosen_weights, described_model, persistent_buffers


def open_checkpoint_source(request: Request, ranks: Ranks | None, scratch: Path | None) -> WeightSource:
    """As `open_source`, for a run folder or a checkpoint."""
    location, storage, folder = request.location, request.storage, request.earlier
    if folder is None:
        found = find_model_checkpoint(location)
        # A run that goes on may have a newer one by the time the last rank looks.
        location = found.location if ranks is None else ranks.broadcast_text(0, found.location)
        storage, folder = (
            (storage if is_remote(location) and is_remote(request.location) else found.storage),
            found.folder,
        )
    if ranks is None:
        with closing(open_checkpoint(location, storage)) as checkpoint:
            if problem := checkpoint.manifest.missing_or_cut(list_files(location, storage)):
                raise ConfigError(f"{location}: {problem}; restore it from a copy")
            return _source(request, checkpoint, folder, values=False)
    with closing(open_verified(location, ranks, storage, scratch)) as checkpoint:
        return _source(request, checkpoint, folder, values=True)


def _source(request: Request, checkpoint: Checkpoint, folder: RunFolder | None, *, values: bool) -> WeightSource:
    run, location = checkpoint.manifest.facts.run, checkpoint.location
    chosen = chosen_weights(checkpoint, request.which)
    refuse_other_variant(request, location, run.model)
    plain = described_model(checkpoint)
    return WeightSource(
        location=location,
        origin=f"stage {run.stage}" if request.earlier else f"stage {run.stage} of another run",
        weights=chosen,
        step=checkpoint.step,
        num_classes=run.model["num_classes"],
        classes=checkpoint.classes() or _classes_of_result(folder),
        classes_digest=run.digests.classes_digest,
        precision=run.precision,
        parameters=checkpoint.parameters(chosen) if values else meta(plain.named_parameters()),
        buffers=checkpoint.buffers(chosen) if values else meta(persistent_buffers(plain).items()),
    )


def _classes_of_result(folder: RunFolder | None) -> tuple[str, ...] | None:
    """The names of classes that checkpoints of earlier versions lack, as the result of the stage has them."""
    result = folder.result() if folder else None
    return tuple(result.classes) if result else None
