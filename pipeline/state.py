"""The state of a training run: what does not follow from the recipe and the step."""

from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.checkpoint import Checkpoint, load_state
from pipeline.checkpoints.host_copy import LiveState
from pipeline.distributed import Ranks
from pipeline.fragments import fragments, optimizer_steps, publish_masters, set_optimizer_steps
from pipeline.weights import load_buffers, persistent_buffers


class TrainingState:
    """Weights, AdamW's moments and BatchNorm's statistics, as they live in a DeepSpeed engine.

    `shapes` are those of the model's parameters before the engine took them: ZeRO 3 leaves them empty.
    """

    def __init__(self, engine: Any, shapes: dict[str, tuple[int, ...]], ranks: Ranks) -> None:
        self._engine = engine
        self._shapes = shapes
        self._ranks = ranks
        self._fragments = fragments(engine, ranks)

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`, whatever its number of ranks and ZeRO stage."""
        load_state(checkpoint, self._fragments, self._shapes)
        set_optimizer_steps(self._engine, checkpoint.manifest["optimizer_steps"])
        load_buffers(self._engine.module, checkpoint)
        publish_masters(self._engine)

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Begin with whole float32 `weights`; parameters that are not among them keep theirs."""
        for fragment in self._fragments:
            if fragment.parameter in weights:
                whole = weights[fragment.parameter].view(-1)
                fragment.tensors["master"].copy_(whole[fragment.start : fragment.stop])
        publish_masters(self._engine)

    def live(self, facts: dict[str, Any]) -> LiveState:
        """What this rank gives to a checkpoint with `facts` in its manifest, as views of what is trained."""
        facts = facts | {"optimizer_steps": optimizer_steps(self._engine), "world_size": self._ranks.world_size}
        return LiveState(facts, self._fragments, persistent_buffers(self._engine.module), self._shapes)
