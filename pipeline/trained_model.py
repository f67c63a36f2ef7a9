"""A trained model, from wherever it lies: a run folder, a checkpoint, or an exported file or folder.

Read without DeepSpeed and without a process group.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from data.errors import raise_if_passing
from data.remote.storage import is_remote
from models.coatnet import CoAtNet
from models.model_facts import ModelFacts, ModelSource
from models.pretrained import WEIGHTS_FILE, build_trained, open_pretrained
from models.variants import Variant
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.resume import open_verified
from pipeline.errors import ConfigError
from pipeline.model_location import CheckpointLocation, find_model_checkpoint
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.section import WhichWeights
from pipeline.training.images import imagenet_preprocessing
from pipeline.weights import chosen_weights, described_model, persistent_buffers

SUFFIX = ".safetensors"


class TrainedModel:
    """A trained model: what is known about it, and its tensors, which are read when they are asked for.

    Args:
        facts: what it is.
        model: on the meta device, as `facts` describe it.
        parameters, buffers: read them, whole, on the CPU.
        close: frees what reading has left.
    """

    def __init__(
        self,
        facts: ModelFacts,
        model: CoAtNet,
        parameters: Callable[[], dict[str, Tensor]],
        buffers: Callable[[], dict[str, Tensor]],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.facts = facts
        self._model, self._parameters, self._buffers, self._close = model, parameters, buffers, close

    @property
    def variant(self) -> Variant:
        """The blocks and options of the model."""
        return self._model.variant

    def parameters(self) -> dict[str, Tensor]:
        """The parameters, whole, float32 on the CPU, by the model's names.

        Raises:
            ConfigError: they are not those of the model.
        """
        return self._checked(self._parameters(), dict(self._model.named_parameters()))

    def buffers(self) -> dict[str, Tensor]:
        """The buffers, which are BatchNorm's statistics, float32 on the CPU, by the model's names.

        Raises:
            ConfigError: they are not those of the model.
        """
        return self._checked(self._buffers(), persistent_buffers(self._model))

    def build(self, device: torch.device | str = "cpu", image_size: int | None = None) -> CoAtNet:
        """The model on `device`, float32 in evaluation mode.

        For another image size than the trained one its relative tables are resized.

        Raises:
            ConfigError: an image size that the model does not support, or tensors that are not those of the model.
        """
        tensors = self.parameters() | self.buffers()
        try:
            return build_trained(self.facts, tensors, device, image_size)
        except ValueError as error:
            raise ConfigError(f"{self.facts.source.resolved}: {error}") from None

    def _checked(self, found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kinds = ({name: _kind(tensor) for name, tensor in tensors.items()} for tensors in (found, expected))
        _refuse_other(self.facts.source.resolved, *kinds)
        return found

    def close(self) -> None:
        """Remove what was downloaded."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_trained_model(location: str, weights: WhichWeights = "auto") -> TrainedModel:
    """The trained model at `location`, its files verified.

    Args:
        location: the run folder of a stage, or of a run, which means its last trained stage; a checkpoint, its folder
            or URL; an exported safetensors file, or an exported folder.
        weights: the trained ones, their moving average, or `auto`: the average where there is one. An exported model
            has only one of them.

    Raises:
        ConfigError: there is no trained model, it is damaged, or it does not have these weights.
        OSError: a file system that fails for a while, see `data.errors.may_pass`.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    path = Path(location)
    if not is_remote(location) and (path.suffix == SUFFIX or (path / WEIGHTS_FILE).exists()):
        return _exported(location, weights)
    return _of_checkpoint(location, find_model_checkpoint(location), weights)


def _exported(location: str, which: WhichWeights) -> TrainedModel:
    try:
        file = open_pretrained(location)
    except (OSError, ValueError) as error:
        raise_if_passing(error)
        raise ConfigError(str(error)) from None
    if which not in ("auto", file.facts.weights):
        has = "the moving average" if file.facts.weights == "ema" else "the raw weights"
        raise ConfigError(
            f"{location}: exported with {has} alone; leave --weights out, or take what it was exported from"
        )
    parameters = dict(file.model.named_parameters())

    def some(wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in file.tensors().items() if wanted(name)}

    return TrainedModel(
        file.facts,
        file.model,
        lambda: some(lambda name: name in parameters),
        lambda: some(lambda name: name not in parameters),
    )


def _of_checkpoint(given: str, found: CheckpointLocation, which: WhichWeights) -> TrainedModel:
    checkpoint = open_verified(found.location, Ranks(0, 1, torch.device("cpu")), found.storage)
    try:
        chosen = chosen_weights(checkpoint, which)
        model = described_model(checkpoint)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        _refuse_other(checkpoint.location, checkpoint.shapes, shapes)
        facts = _checkpoint_facts(given, found, checkpoint, chosen)
    except BaseException:
        checkpoint.close()
        raise
    return TrainedModel(
        facts,
        model,
        lambda: checkpoint.parameters(chosen),
        lambda: checkpoint.buffers(chosen),
        checkpoint.close,
    )


def _checkpoint_facts(
    given: str, found: CheckpointLocation, checkpoint: Checkpoint, chosen: Literal["raw", "ema"]
) -> ModelFacts:
    facts = checkpoint.manifest.facts
    run, remarks = facts.run, list[str]()
    classes = checkpoint.classes()
    if classes is None:
        classes = found.classes_of_shards(run)
        source = "were read from its shards" if classes else "are not known: its shards are not where they were"
        remarks.append(f"the checkpoint has no class names, as those of earlier versions; they {source}")
    preprocessing, loss = run.preprocessing, run.loss
    if preprocessing is None or loss is None:
        stage = found.stage()
        crop = stage.data.evaluation_crop if stage else "center"
        preprocessing, loss = (
            imagenet_preprocessing(run.model["image_size"], crop),
            stage.loss.kind if stage else "softmax",
        )
        source = "are those of its run folder" if stage else "are assumed"
        remarks.append(f"the checkpoint does not say its crop and loss; {crop} and {loss} {source}")
    return ModelFacts(
        arguments=run.model,
        classes=classes,
        display_names=None,
        preprocessing=preprocessing,
        loss=loss,
        weights=chosen,
        step=facts.step,
        samples=facts.samples,
        run_id=run.run_id,
        stage=run.stage,
        recipe_digest=run.digests.recipe_digest,
        classes_digest=run.digests.classes_digest,
        source=ModelSource(given, checkpoint.location),
        remarks=tuple(remarks),
    )


def _refuse_other(location: str, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Refuse tensors that are not those of the model that the manifest describes."""
    for name in sorted(expected.keys() | found.keys()):
        there, here = found.get(name, "absent"), expected.get(name, "absent")
        if there != here:
            raise ConfigError(
                f"{location}: {name} is {there} there and {here} in the model that its manifest describes; restore it "
                "from a copy"
            )


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
