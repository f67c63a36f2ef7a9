"""Bytes of what DeepSpeed holds of a model on each rank, and of a checkpoint: formulas."""

from pipeline.recipe.schema import Precision, TrainStage, sums_after_backward
from pipeline.recipe.sections import CommunicationSettings

# Elements: DeepSpeed's stage3_max_live_parameters up to which ZeRO 3 leaves weights gathered.
_GATHERED = 1_000_000_000


def bytes_of_state(parameters: int, precision: Precision, zero_stage: int, world_size: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state on each rank; with N ranks, for each parameter

    | ZeRO | fp32, bf16_autocast | bf16 |
    |---|---|---|
    | 0 | 4 + 4 + 8 | |
    | 1 | 4 + 4 + 12/N | 2 + 4 + 12/N |
    | 2 | 4 + 4/N + 12/N | 2 + 4/N + 12/N |
    | 3 | 4/N + 4/N + 12/N | 2/N + 4/N + 12/N |
    """
    share = -(-parameters // world_size)
    if zero_stage == 0:
        return 4 * parameters, 4 * parameters, 8 * parameters
    weight = 2 if precision == "bf16" else 4
    weights = weight * (share if zero_stage == 3 else parameters)
    gradients = 4 * (share if zero_stage >= 2 else parameters)
    return weights, gradients, 12 * share


def bucket_bytes(
    parameters: int, precision: Precision, zero_stage: int, world_size: int, communication: CommunicationSettings
) -> int:
    """Bytes that communication needs on each rank, beside weights and gradients."""
    if sums_after_backward(precision, zero_stage):
        return 0
    size = communication.bucket_size
    # One is filled while the other is summed. With ZeRO 3 there is one in any case.
    bucket = (2 if communication.overlap and zero_stage < 3 else 1) * 4 * size
    if zero_stage == 2 and precision == "bf16":
        # Gradients are collected in a bucket of bf16, which is copied to be summed in float32.
        bucket = bucket // 2 + (4 * min(parameters, size) if communication.gradients == "fp32" else 0)
    gathered = min(parameters, _GATHERED) if zero_stage == 3 and world_size > 1 else 0
    return bucket + (2 if precision == "bf16" else 4) * gathered


def checkpoint_bytes(stage: TrainStage, parameters: int) -> int:
    """Bytes of a checkpoint: master weight, AdamW's two moments and the moving average of each parameter.

    Buffers, a thousandth of that, are not counted.
    """
    return parameters * (12 + (4 if stage.ema_decay is not None else 0))
