"""The time of a step, against the sum of its parts and counts by hand."""

import pytest

from models.complexity import count_costs, count_parameters
from models.registry import create_model
from pipeline.planner.hardware import Cluster, figure_range, find_cluster
from pipeline.planner.ranges import NOTHING, Range
from pipeline.planner.step_estimate import MeasuredSpeed, StepEstimate, estimate_step, parameters_of
from pipeline.planner.trace.training_trace import workload
from pipeline.recipe.schema import TrainStage
from tests.pipeline.planner.stages import CLASSES, small_stage


def cluster(gpus: int = 4) -> Cluster:
    return find_cluster("h100", gpus, 8)


def estimate(gpus: int = 4, measured: MeasuredSpeed | None = None, **changes: object) -> StepEstimate:
    return estimate_step(small_stage(**changes), CLASSES, cluster(gpus), measured)


def at_224(**changes: object) -> TrainStage:
    """Whose micro-batches keep a GPU busy for longer than the host takes to issue their kernels."""
    batch = {"global_size": 512, "micro_size": 128}
    return small_stage(model={"name": "coatnet_0"}, resolution=224, batch=batch, **changes)


@pytest.fixture(scope="module")
def busy() -> StepEstimate:
    return estimate_step(at_224(activation_checkpointing="mbconv"), CLASSES, cluster(2))


def test_a_step_is_the_sum_of_its_parts(busy: StepEstimate) -> None:
    assert busy.micro_batches == 2
    parts = 2 * (busy.forward.value + busy.recomputation.value + busy.backward.value) + busy.optimizer.value
    assert parts > busy.issuing.most
    assert busy.computing.value == pytest.approx(parts, rel=1e-12)
    assert busy.seconds == busy.computing + busy.communication.exposed
    assert busy.images_per_second.value == pytest.approx(512 / busy.seconds.value, rel=1e-12)
    assert min(busy.forward.value, busy.recomputation.value, busy.backward.value, busy.optimizer.value) > 0


def test_the_kinds_of_operation_together_are_the_micro_batches(busy: StepEstimate) -> None:
    together = 2 * (busy.forward.value + busy.recomputation.value + busy.backward.value)
    assert sum(busy.kinds.values()) == pytest.approx(together, rel=1e-9)


def test_an_estimate_has_a_range_around_it(busy: StepEstimate) -> None:
    for found in (busy.forward, busy.backward, busy.seconds, busy.images_per_second, busy.utilization):
        assert found.least < found.value < found.most


def test_a_host_that_is_slower_than_the_gpu_decides() -> None:
    step = estimate()
    assert step.issuing.value > 2 * (step.forward.value + step.backward.value) + step.optimizer.value
    assert step.computing.value == step.issuing.value
    launch = figure_range(cluster().law.host_launch) * step.kernels
    assert (step.issuing.value, step.issuing.least, step.issuing.most) == (launch.value, launch.least, launch.most)


def test_zero_3_takes_the_host_time_for_each_weight_and_micro_batch() -> None:
    model = create_model("coatnet_debug", num_classes=CLASSES, image_size=32, device="meta")
    tensors, seconds = len(list(model.parameters())), cluster().law.zero3_tensor.value
    with_three, with_two = estimate(zero_stage=3), estimate(zero_stage=2)
    assert with_three.kernels == with_two.kernels
    assert with_three.issuing.value - with_two.issuing.value == pytest.approx(2 * tensors * seconds, rel=1e-9)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_one_gpu_neither_sends_nor_gathers(zero_stage: int) -> None:
    step = estimate(1, zero_stage=zero_stage)
    assert (step.collectives, step.communication.total, step.communication.exposed) == ((), NOTHING, NOTHING)
    assert step.issuing == estimate(1, zero_stage=1).issuing


def test_the_optimizer_works_on_the_share_of_a_gpu_with_zero_alone() -> None:
    whole = {zero: estimate(8, precision="fp32", zero_stage=zero).optimizer.value for zero in (0, 1)}
    alone = {zero: estimate(1, precision="fp32", zero_stage=zero).optimizer.value for zero in (0, 1)}
    assert alone[0] == alone[1] == whole[0]
    large = [
        estimate_step(at_224(precision="fp32", zero_stage=zero), CLASSES, cluster(4)).optimizer.value for zero in (0, 1)
    ]
    assert large[1] < 0.5 * large[0]


def test_more_gpus_share_the_micro_batches(busy: StepEstimate) -> None:
    step = estimate_step(at_224(activation_checkpointing="mbconv"), CLASSES, cluster(4))
    assert step.micro_batches == 1
    assert (step.forward, step.backward, step.images) == (busy.forward, busy.backward, 512)
    assert step.model_flops == busy.model_flops / 2


def test_utilization_is_that_of_six_operations_for_each_multiply_add(busy: StepEstimate) -> None:
    stage = at_224()
    multiply_adds = sum(cost.multiply_adds for cost in count_costs(stage.model.variant, 224, CLASSES))
    flops = 6 * 256 * multiply_adds
    assert busy.model_flops == flops
    assert busy.utilization.value == pytest.approx(flops / busy.seconds.value / 989e12, rel=1e-12)
    assert busy.executed_flops > 1.1 * flops  # recomputation is executed and does not count


def test_without_checkpointing_nothing_is_recomputed() -> None:
    step = estimate()
    assert step.recomputation == NOTHING
    assert step.executed_flops == pytest.approx(step.model_flops, rel=0.1)


def test_a_measurement_of_the_same_micro_batch_removes_the_range() -> None:
    step = estimate_step(at_224(), CLASSES, cluster(1))
    measured = estimate_step(at_224(), CLASSES, cluster(1), MeasuredSpeed(1.25, 0.0, "made up"))
    assert measured.measured
    assert not step.measured
    for one, other in ((step.forward, measured.forward), (step.backward, measured.backward)):
        assert other == Range.exactly(1.25 * one.value)
    assert measured.seconds.is_exact
    assert measured.seconds.value == pytest.approx(1.25 * step.seconds.value, rel=1e-12)


def test_a_measured_step_that_waited_for_its_host_is_as_long_as_measured() -> None:
    """The factor is that of the whole step, whatever it waited for."""
    step = estimate(1)
    assert step.computing.value == step.issuing.value
    for factor in (0.5, 2.0):
        measured = estimate(1, MeasuredSpeed(factor, 0.0, "made up"))
        assert measured.seconds.is_exact
        assert measured.seconds.value == pytest.approx(factor * step.seconds.value, rel=1e-12)


def test_a_measurement_of_another_micro_batch_leaves_a_range() -> None:
    step = estimate_step(at_224(), CLASSES, cluster(1), MeasuredSpeed(1.0, 0.1, "made up"))
    assert step.forward.least == pytest.approx(0.9 * step.forward.value)
    assert step.forward.most == pytest.approx(1.1 * step.forward.value)


def test_what_is_traced_is_that_of_the_stage() -> None:
    stage = small_stage(
        activation_checkpointing=2, compile=True, model={"name": "coatnet_debug", "drop_path_rate": 0.1}
    )
    found = workload(stage, CLASSES)
    assert (found.image_size, found.classes, found.micro_batch) == (32, CLASSES, 4)
    assert (found.precision, found.policy, found.drop_path_rate, found.compiled) == ("bf16", 2, 0.1, True)
    assert parameters_of(stage, CLASSES) == count_parameters(stage.model.variant, 32, CLASSES)
