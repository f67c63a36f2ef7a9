"""A trained model, from wherever it lies: a run folder, a checkpoint, or an exported file or folder.

Read without DeepSpeed and without a process group.
"""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from models.adaptation import adapt_parameters
from models.coatnet import CoAtNet
from models.model_facts import ModelFacts, ModelSource
from models.registry import create_model
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.resume import open_verified
from pipeline.errors import ConfigError
from pipeline.model_location import CheckpointLocation, find_model_checkpoint
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.sections import WhichWeights
from pipeline.training.images import imagenet_preprocessing
from pipeline.weights import chosen_weights, copy_tensors, persistent_buffers


class TrainedModel:
    """A trained model: what is known about it, and its tensors, which are read when they are asked for.

    Args:
        facts: what it is.
        shapes: of its parameters and buffers by name, with their dtypes.
        parameters, buffers: read them, whole, on the CPU.
        close: frees what reading has left.

    Raises:
        ConfigError: its tensors are not those of the model that `facts` describe.
    """

    def __init__(
        self,
        facts: ModelFacts,
        parameters: Callable[[], dict[str, Tensor]],
        buffers: Callable[[], dict[str, Tensor]],
        shapes: Mapping[str, tuple[int, ...]],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.facts = facts
        self._parameters, self._buffers, self._close = parameters, buffers, close
        self._plain = _without_values(facts, len(shapes))
        _refuse_other_shapes(facts, shapes, self._plain)

    def parameters(self) -> dict[str, Tensor]:
        """The parameters, whole, float32 on the CPU, by the model's names."""
        return self._parameters()

    def buffers(self) -> dict[str, Tensor]:
        """The buffers, which are BatchNorm's statistics, on the CPU, by the model's names.

        Raises:
            ConfigError: they are not those of the model.
        """
        buffers, wanted = self._buffers(), persistent_buffers(self._plain)
        for name in sorted(buffers.keys() | wanted.keys()):
            there, here = (_kind(tensors.get(name)) for tensors in (buffers, wanted))
            if there != here:
                raise _other_tensor(self.facts, name, there, here)
        return buffers

    def build(self, device: torch.device | str = "cpu", image_size: int | None = None) -> CoAtNet:
        """The model on `device`, float32 in evaluation mode.

        For another image size than the trained one its relative tables are resized.

        Raises:
            ConfigError: an image size that the model does not support.
        """
        arguments = dict(self.facts.arguments)
        if image_size is not None:
            arguments["image_size"] = image_size
        try:
            model = create_model(**arguments, device=device)
        except ValueError as error:
            raise ConfigError(f"{self.facts.source.resolved}: {error}") from None
        copy_tensors(adapt_parameters(self.parameters(), model), dict(model.named_parameters()))
        copy_tensors(self.buffers(), persistent_buffers(model))
        return model.eval()

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
    return _of_checkpoint(location, find_model_checkpoint(location), weights)


def _of_checkpoint(given: str, found: CheckpointLocation, which: WhichWeights) -> TrainedModel:
    checkpoint = open_verified(found.location, Ranks(0, 1, torch.device("cpu")), found.storage)
    try:
        chosen = chosen_weights(checkpoint, which)
        return TrainedModel(
            _checkpoint_facts(given, found, checkpoint, chosen),
            lambda: checkpoint.parameters(chosen),
            lambda: checkpoint.buffers(chosen),
            checkpoint.shapes,
            checkpoint.close,
        )
    except BaseException:
        checkpoint.close()
        raise


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


def _without_values(facts: ModelFacts, tensors: int) -> CoAtNet:
    """The model that `facts` describe, on the meta device; `tensors` is how many parameters the files have."""
    arguments = facts.arguments
    try:
        if sum(arguments.get("depths") or ()) > tensors:
            raise ValueError(f"depths {str(arguments['depths'])[:80]} are more blocks than there are parameters")
        return create_model(**arguments, device="meta")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{facts.source.resolved}: no model can be made of the arguments in its manifest ({reason}); restore it "
            "from a copy"
        ) from None


def _refuse_other_shapes(facts: ModelFacts, found: Mapping[str, tuple[int, ...]], model: CoAtNet) -> None:
    """Refuse parameters that are not those of the model that the manifest describes."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(expected.keys() | found.keys()):
        there, here = (_shape(shapes.get(name)) for shapes in (found, expected))
        if there != here:
            raise _other_tensor(facts, name, there, here)


def _other_tensor(facts: ModelFacts, name: str, there: str, here: str) -> ConfigError:
    return ConfigError(
        f"{facts.source.resolved}: {name} is {there} there and {here} in the model that its manifest describes; "
        "restore it from a copy"
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"float32 {tuple(shape)}"


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
