"""A traced step, against independent counts and against a trace of the whole model."""

from dataclasses import replace

import pytest
import torch

from models.complexity import count_costs, count_parameters
from models.registry import create_model
from models.variants import find_variant
from pipeline.planner.trace.gpu_functions import GpuFunctions
from pipeline.planner.trace.operations import Scores
from pipeline.planner.trace.recording import Recording
from pipeline.planner.trace.training_trace import StepTrace, Traced, Workload, trace_evaluation, trace_training

DEPTHS = (2, 3, 3, 2)
VARIANT = find_variant("coatnet_debug", depths=DEPTHS)
SUBJECT = Workload(VARIANT, 64, 10, micro_batch=4)


@pytest.fixture(scope="module")
def step() -> StepTrace:
    return trace_training(SUBJECT)


def flops_of_parts() -> list[int]:
    """Of the forward of stem, blocks and head, by the count of the models themselves."""
    return [2 * SUBJECT.micro_batch * cost.multiply_adds for cost in count_costs(VARIANT, 64, 10)]


def bytes_of(traced: Traced, name: str) -> int:
    return sum(count * operation.bytes for operation, count in traced.counts if operation.name == name)


def test_an_evaluation_has_the_multiply_adds_of_the_model() -> None:
    assert trace_evaluation(SUBJECT).flops == sum(flops_of_parts())


def test_a_step_has_three_times_those_and_what_attention_recomputes(step: StepTrace) -> None:
    forwards = [(o.work, count) for o, count in step.micro_batch.counts if isinstance(o.work, Scores)]
    one_product = sum(count * work.flops // 2 for work, count in forwards if work.products == 2)
    images_gradient = 2 * 4 * 32 * 32 * 8 * 3 * 9  # of the stem's first convolution: images need none
    assert step.micro_batch.flops == 3 * sum(flops_of_parts()) + one_product - images_gradient


def test_distinct_blocks_times_their_number_are_the_whole_model(step: StepTrace) -> None:
    with torch.device("meta"):
        model = create_model("coatnet_debug", num_classes=10, image_size=64, depths=DEPTHS).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    images = torch.empty(4, 64, 64, 3, dtype=torch.bfloat16, device="meta")
    recording = Recording()
    with recording, GpuFunctions():
        y = model(images)
        torch.autograd.backward(y, torch.empty_like(y))
    whole = recording.operations
    assert sum(operation.flops for operation in whole) == step.micro_batch.flops
    accumulated = bytes_of(step.micro_batch, "add_gradients")
    assert sum(operation.bytes for operation in whole) == step.micro_batch.bytes - accumulated
    assert len(whole) == step.micro_batch.kernels - 1


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_adds_the_forward_of_what_it_recomputes(compiled: bool) -> None:
    flops = {
        policy: trace_training(replace(SUBJECT, compiled=compiled, policy=policy)).micro_batch.flops
        for policy in ("none", "mbconv", "every_block")
    }
    of_parts = flops_of_parts()
    assert flops["mbconv"] - flops["none"] == sum(of_parts[:6])
    assert flops["every_block"] - flops["none"] == sum(of_parts[:-1])


def test_stochastic_depth_computes_transformers_for_the_kept_images_alone(step: StepTrace) -> None:
    dropped = trace_training(replace(SUBJECT, drop_path_rate=0.5))
    heads = {o.work.heads for o, _ in dropped.micro_batch.counts if isinstance(o.work, Scores)}
    assert dropped.micro_batch.flops < step.micro_batch.flops
    assert min(heads) == 2 * 2  # those of the last block for half of the images


def test_a_compiled_step_has_the_same_arithmetic_and_fewer_bytes(step: StepTrace) -> None:
    compiled = trace_training(replace(SUBJECT, compiled=True)).micro_batch
    assert compiled.flops == step.micro_batch.flops
    assert compiled.bytes < 0.9 * step.micro_batch.bytes
    assert compiled.kernels < 0.9 * step.micro_batch.kernels


def test_autocast_casts_weights_once_a_step_and_computes_in_half_precision() -> None:
    step = trace_training(replace(SUBJECT, precision="bf16_autocast"))
    model = create_model("coatnet_debug", num_classes=10, image_size=64, device="meta", depths=DEPTHS)
    # A gate may multiply the weights of the layer that shrinks, in float32.
    matrices = [p for name, p in model.named_parameters() if p.dim() in (2, 4) and "shrink" not in name]
    assert bytes_of(step.optimizer, "_to_copy") >= 6 * sum(p.numel() for p in matrices)
    kinds = {o.kind for o, _ in step.micro_batch.counts if o.work and not isinstance(o.work, Scores) and o.in_float32}
    assert not kinds


def test_the_optimizer_works_on_the_share_of_a_rank() -> None:
    parameters = count_parameters(VARIANT, 64, 10)
    alone, shared = (trace_training(SUBJECT, shares=shares, moving_average=True).optimizer for shares in (1, 4))
    quarter = -(-parameters // 4)
    assert bytes_of(alone, "adamw") == (28 + 2) * parameters
    assert bytes_of(shared, "adamw") == 28 * quarter + 2 * parameters
    assert (bytes_of(alone, "moving_average"), bytes_of(shared, "moving_average")) == (12 * parameters, 12 * quarter)


def test_the_largest_variant_is_counted_without_taking_memory() -> None:
    variant = find_variant("coatnet_7")
    flops = trace_evaluation(Workload(variant, 224, 1000, micro_batch=2)).flops
    assert flops == 2 * 2 * sum(cost.multiply_adds for cost in count_costs(variant, 224))


def test_a_step_is_forward_recomputation_and_backward(step: StepTrace) -> None:
    again = trace_training(replace(SUBJECT, policy="mbconv"))
    of_parts = flops_of_parts()
    assert (again.forward.flops, again.recomputation.flops) == (sum(of_parts), sum(of_parts[:6]))
    for count in ("flops", "bytes", "kernels"):
        parts = (again.forward, again.recomputation, again.backward)
        assert sum(getattr(part, count) for part in parts) == getattr(again.micro_batch, count)
        assert getattr(again.backward, count) == getattr(step.backward, count)
        assert getattr(again.forward, count) == getattr(step.forward, count)


def test_nothing_is_recomputed_without_checkpointing(step: StepTrace) -> None:
    assert step.recomputation.counts == ()
    assert trace_training(replace(SUBJECT, compiled=True)).recomputation.counts == ()
