"""A micro-batch computed beside the step: its checksums are taken, and nothing of it is left."""

import torch

from data.random_streams import RandomStream
from data.stream import MicroBatch
from models.norm import discard_recorded_statistics
from pipeline.cross_check.checksums import Checksums
from pipeline.plan import TrainPlan
from pipeline.precision import autocast
from pipeline.ranks.distributed import Ranks
from pipeline.training.inputs import prepared_inputs
from pipeline.training.loss import classification_loss
from pipeline.zero.engine import ZeroEngine


def computed_beside(
    engine: ZeroEngine, checksums: Checksums, batch: MicroBatch, plan: TrainPlan, ranks: Ranks, step: int, number: int
) -> torch.Tensor:
    """The checksums of micro-batch `number` of step `step`, both from 0, with the bits that its step computes.

    To be called before the first micro-batch of a step, or after its last; with ZeRO 3 by all ranks together, since
    they gather weights for it. DeepSpeed's accumulation does not see these gradients, as they do not reach the
    parameters. Each is freed when its checksum is computed, so that the memory is at most that of a micro-batch of a
    step, without its gradients.
    """
    stage = plan.stage
    discard_recorded_statistics(engine.module)
    images, targets = prepared_inputs(batch, plan, step, number, ranks.device)
    torch.manual_seed(RandomStream.STOCHASTIC_DEPTH.torch_seed(plan.seed, step, number))
    with autocast(stage.precision, ranks.device):
        logits = engine.module(images.to(engine.dtype))
    loss = classification_loss(logits, targets, stage.loss.kind).mean()
    values = checksums.of_forward(loss.detach())
    rounds = stage.batch.micro_batches // ranks.world_size
    with checksums.add_gradients(values, freed=True):
        torch.autograd.grad(loss / rounds, checksums.parameters, allow_unused=True)
    discard_recorded_statistics(engine.module)
    return values
