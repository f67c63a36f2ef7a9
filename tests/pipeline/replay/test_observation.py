"""What is observed inside a micro-batch is what a step computes there, and where numbers stop being finite is found."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.images.random_erasing import ErasedRectangle
from data.random_streams import RandomStream
from models.attention import TransformerBlock
from models.coatnet import CoAtNet
from models.drop import draw_kept
from models.norm import BatchNorm
from pipeline.fingerprint import fingerprint
from pipeline.precision import autocast, model_dtype
from pipeline.replay.not_finite import NotFinite
from pipeline.replay.observation import Observation, ObservedModel
from pipeline.training.inputs import prepared_inputs
from pipeline.training.loss import classification_loss
from pipeline.weights import build_model, persistent_buffers, to_precision
from tests.pipeline.replay.brightness import (
    BRIGHT,
    CPU,
    DARK,
    DETECTING,
    STEP,
    micro_batch,
    observed_model,
    overflow_forward,
    overflow_gradient,
    planned,
)
from tests.support.ranks import run_ranks
from tests.support.recipes import write_recipe

EVERYTHING = {
    "mixup_alpha": 0.8,
    "loss": {"label_smoothing": 0.1},
    "model": {"name": "coatnet_debug", "drop_path_rate": 0.4},
}
ENGINE_CASES = ("fp32", "bf16_autocast-recomputed", "bf16-recomputed", "fp32-recomputed-fused")
POLICIES = ("none", "every_block")


def numbers(observation: Observation) -> str:
    """Everything of an observation, exactly."""
    tensors = (
        observation.losses, observation.predicted, observation.probabilities, observation.label_probabilities,
        observation.images,
    )  # fmt: skip
    bits = fingerprint({str(place): tensor for place, tensor in enumerate(tensors)})
    return f"{observation.loss!r} {bits} {observation.blocks!r} {observation.not_finite!r}"


@pytest.fixture(scope="module")
def engine_cases(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("observed")
    recipe = write_recipe(folder, shards, **EVERYTHING)
    # Every micro-batch has erased rectangles, mixed images and dropped branches.
    text = recipe.read_text().replace(
        "    workers: 1\n", "    workers: 1\n    random_erasing:\n      probability: 0.9\n"
    )
    recipe.write_text(text)
    run_ranks(1, Path(__file__).with_name("observation_worker.py"), recipe, folder, *ENGINE_CASES)
    return folder


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("case", ENGINE_CASES)
def test_losses_are_those_of_the_step_of_an_engine(engine_cases: Path, case: str) -> None:
    found = json.loads((engine_cases / f"{case}.json").read_text())
    assert found["erased"] > 0
    assert len(set(found["engine"])) == 4
    assert found["observed"] == found["engine"]


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
def test_norms_and_probabilities_are_those_of_a_plain_forward_and_backward(
    shards: Path, tmp_path: Path, precision: str
) -> None:
    plan = planned(shards, tmp_path, f"precision={precision}", "model.drop_path_rate=0")
    batch, kind = micro_batch(plan), plan.stage.precision
    model = build_model(plan).train()
    to_precision(model, model_dtype(kind))
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    names = ("stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head")
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
    images, targets = prepared_inputs(batch, plan, STEP, 0, CPU)
    with autocast(kind, CPU):
        logits = model(images.to(model_dtype(kind)))
    losses = classification_loss(logits, targets, "softmax")
    losses.mean().backward()  # type: ignore[no-untyped-call]

    def norm(tensor: Tensor | None) -> float:
        assert tensor is not None
        return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))

    seen = ObservedModel(plan, CPU).observe(batch, STEP, 0)
    assert seen.loss == losses.mean().item()
    assert torch.equal(seen.losses, losses.detach())
    probabilities = logits.detach().float().softmax(dim=1)
    assert torch.equal(seen.predicted, probabilities.argmax(dim=1))
    assert torch.equal(seen.probabilities, probabilities.amax(dim=1))
    assert torch.equal(seen.label_probabilities, probabilities[range(4), batch.labels[:, 0]])
    assert torch.equal(seen.images, images)
    assert [block.name for block in seen.blocks] == list(names)
    for block in seen.blocks:
        assert block.output == norm(outputs[block.name])
        assert block.output_gradient == norm(outputs[block.name].grad)
        of_parameters = [norm(parameter.grad) for parameter in model.get_submodule(block.name).parameters()]
        assert block.parameter_gradient == math.sqrt(math.fsum(one * one for one in of_parameters))
    assert outputs["stem"].grad is not None
    assert seen.sample_gradients is not None
    assert seen.sample_gradients.tolist() == [norm(gradient) for gradient in outputs["stem"].grad]


def test_probabilities_of_a_sigmoid_loss_are_for_each_class_and_a_sample_may_have_no_label(
    shards: Path, tmp_path: Path
) -> None:
    plan = planned(shards, tmp_path, "loss.kind=sigmoid", "model.drop_path_rate=0")
    batch = micro_batch(plan)
    labels = batch.labels.copy()
    labels[2] = -1
    seen = ObservedModel(plan, CPU).observe(replace(batch, labels=labels), STEP, 0)
    with torch.enable_grad():
        logits = build_model(plan).train()(prepared_inputs(batch, plan, STEP, 0, CPU)[0]).detach()
    assert torch.equal(seen.probabilities, logits.sigmoid().amax(dim=1))
    of_label = logits.sigmoid()[range(4), batch.labels[:, 0]]
    of_label[2] = math.nan
    assert torch.equal(seen.label_probabilities.nan_to_num(-1), of_label.nan_to_num(-1))
    assert seen.not_finite is None


def test_observing_changes_nothing_and_a_repetition_has_the_same_bits(shards: Path, tmp_path: Path) -> None:
    plan = planned(shards, tmp_path, "mixup_alpha=0.5", "model.drop_path_rate=0.4")
    observed, batch = ObservedModel(plan, CPU), micro_batch(plan)
    state = dict(observed.model.named_parameters()) | dict(observed.model.named_buffers())
    before = fingerprint(state)
    first = numbers(observed.observe(batch, STEP, 0))
    assert numbers(observed.observe(batch, STEP, 1)) != first  # other draws
    assert numbers(observed.observe(batch, STEP, 0)) == first
    assert fingerprint(state) == before
    assert all(parameter.grad is None for parameter in observed.model.parameters())


def test_activation_checkpointing_changes_nothing_that_is_seen(shards: Path, tmp_path: Path) -> None:
    found = set()
    for policy in POLICIES:
        plan = planned(shards, tmp_path, f"activation_checkpointing={policy}", "model.drop_path_rate=0.4")
        found.add(numbers(ObservedModel(plan, CPU).observe(micro_batch(plan), STEP, 0)))
    assert len(found) == 1


def test_without_a_backward_the_forward_is_the_same_and_there_are_no_gradients(shards: Path, tmp_path: Path) -> None:
    plan = planned(shards, tmp_path)
    observed, batch = ObservedModel(plan, CPU), micro_batch(plan)
    whole = observed.observe(batch, STEP, 0)
    with torch.no_grad():  # the caller's is of no effect
        forward = observed.observe(batch, STEP, 0, backward=False)
    assert torch.equal(whole.losses, forward.losses)
    assert [block.output for block in whole.blocks] == [block.output for block in forward.blocks]
    assert {(block.output_gradient, block.parameter_gradient) for block in forward.blocks} == {(None, None)}
    assert forward.sample_gradients is None
    assert not observed.model.stem.norm.recorded.any()  # type: ignore[union-attr, operator]


def test_weights_of_another_model_are_refused(shards: Path, tmp_path: Path) -> None:
    plan = planned(shards, tmp_path)
    model = build_model(plan)
    weights = dict(model.named_parameters())
    weights.pop("stem.conv1.bias")
    with pytest.raises(ValueError, match="names or shapes differ"):
        ObservedModel(plan, CPU).load(weights, persistent_buffers(model))


def set_weight(model: CoAtNet) -> None:
    model.blocks[1].expand.weight[0, :2] = math.nan  # type: ignore[operator, union-attr]


def set_buffer(model: CoAtNet) -> None:
    assert isinstance(model.blocks[0].depthwise_norm, BatchNorm)
    model.blocks[0].depthwise_norm.running_var[3] = math.inf


def set_large(model: CoAtNet) -> None:
    model.head.hidden.bias[5] = 3.4e38  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "precision", "found"),
    [
        (set_weight, "fp32", NotFinite("blocks.1.expand.weight", "weight", 2, 512, ())),
        (set_buffer, "fp32", NotFinite("blocks.0.depthwise_norm.running_var", "weight", 1, 32, ())),
        # Finite in float32, and more than bfloat16 has.
        (set_large, "bf16", NotFinite("head.hidden.bias", "weight", 1, 32, ())),
    ],
)  # fmt: skip
def test_weights_and_buffers_come_first(
    shards: Path, tmp_path: Path, change: Callable[[CoAtNet], None], precision: str, found: NotFinite
) -> None:
    plan = planned(shards, tmp_path, f"precision={precision}")
    observed = observed_model(plan, change)
    assert observed.observe(micro_batch(plan), STEP, 0).not_finite == found
    assert not observed.is_finite(micro_batch(plan), STEP, 0)
    other = build_model(plan)
    observed.load(dict(other.named_parameters()), persistent_buffers(other))
    assert observed.observe(micro_batch(plan), STEP, 0).not_finite is None
    assert observed.is_finite(micro_batch(plan), STEP, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_first_module_whose_output_is_not_finite_is_named_with_its_samples(
    shards: Path, tmp_path: Path, policy: str
) -> None:
    plan = planned(shards, tmp_path, DETECTING, f"activation_checkpointing={policy}")
    observed, batch = observed_model(plan, overflow_forward), micro_batch(plan, [DARK, DARK, BRIGHT, DARK])
    seen = observed.observe(batch, STEP, 0)
    found = seen.not_finite
    assert found is not None
    assert (found.name, found.kind, found.samples, found.size) == ("stem.conv2", "output", (2,), 4 * 16 * 16 * 8)
    assert found.count is not None
    assert 0 < found.count <= found.size // 4
    assert [math.isfinite(block.output) for block in seen.blocks] == [False] * 6
    assert observed.observe(batch, STEP, 0, backward=False).not_finite == found
    assert not observed.is_finite(batch, STEP, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gradient_that_is_not_finite_is_named_where_all_outputs_are(
    shards: Path, tmp_path: Path, policy: str
) -> None:
    plan = planned(shards, tmp_path, DETECTING, f"activation_checkpointing={policy}")
    observed, batch = observed_model(plan, overflow_gradient), micro_batch(plan, [DARK, DARK, BRIGHT, DARK])
    seen = observed.observe(batch, STEP, 0)
    assert seen.not_finite == NotFinite("stem.conv2.weight", "gradient", 288, 576, ())
    assert all(math.isfinite(block.output) for block in seen.blocks)
    assert [math.isfinite(block.parameter_gradient or 0.0) for block in seen.blocks] == [False] + [True] * 5
    assert not observed.is_finite(batch, STEP, 0)
    assert observed.observe(batch, STEP, 0, backward=False).not_finite is None


def test_a_gradient_of_an_output_is_named_with_its_samples(shards: Path, tmp_path: Path) -> None:
    def overflow_one(model: CoAtNet) -> None:
        """The logits of all samples are those biases, so the gradient of each sample follows from its label."""
        assert isinstance(model.head.hidden, nn.Linear)
        assert isinstance(model.head.classifier, nn.Linear)
        model.head.hidden.weight.zero_()
        model.head.classifier.weight.copy_(torch.tensor([[3.4e38], [-3.4e38], [-3.4e38]]).expand(3, 32))
        model.head.classifier.bias.copy_(torch.tensor([-200.0, 0.0, -200.0]))

    plan = planned(shards, tmp_path, "model.drop_path_rate=0", "batch.micro_size=1", "batch.global_size=4")
    observed = observed_model(plan, overflow_one)
    assert observed.observe(micro_batch(plan, [DARK]), STEP, 0).not_finite is None
    # (p - y) times the weights is 3.4e38 + 3.4e38 for a bright image that is taken for a dark one.
    found = observed.observe(micro_batch(plan, [BRIGHT]), STEP, 0).not_finite
    assert found == NotFinite("head.hidden", "gradient", 32, 32, (0,))


@pytest.mark.parametrize("module", ["attention.qkv", "feed_forward.expand"])
def test_the_samples_of_a_branch_are_positions_in_the_micro_batch(shards: Path, tmp_path: Path, module: str) -> None:
    def overflow(model: CoAtNet) -> None:
        model.get_submodule(f"blocks.3.{module}").weight.fill_(3e38)  # type: ignore[operator]

    plan = planned(shards, tmp_path, "model.drop_path_rate=0.6")
    observed = observed_model(plan, overflow)
    torch.manual_seed(RandomStream.STOCHASTIC_DEPTH.torch_seed(plan.seed, STEP, 1))
    draws = draw_kept([rate for rates in observed.model.drop_rates for rate in rates], 4, CPU)
    assert isinstance(observed.model.blocks[3], TransformerBlock)
    kept = draws[-2 if module.startswith("attention") else -1].samples.tolist()
    assert 0 < len(kept) < 4
    found = observed.observe(micro_batch(plan), STEP, 1).not_finite
    assert found is not None
    assert (found.name, found.samples) == (f"blocks.3.{module}", tuple(kept))


def test_a_relative_bias_that_is_not_finite_belongs_to_no_sample(shards: Path, tmp_path: Path) -> None:
    plan = planned(shards, tmp_path, "precision=bf16_autocast", "model.drop_path_rate=0")

    def overflow(model: CoAtNet) -> None:
        model.get_submodule("blocks.2.attention.relative_bias").table.fill_(3.4e38)  # type: ignore[operator]

    # Finite in float32; the bias is rounded to the queries' bfloat16.
    found = observed_model(plan, overflow).observe(micro_batch(plan), STEP, 0).not_finite
    assert found == NotFinite("blocks.2.attention.relative_bias", "output", 32, 32, ())


def test_images_that_are_not_finite_are_no_fault_of_the_model(shards: Path, tmp_path: Path) -> None:
    plan = planned(shards, tmp_path)
    batch = micro_batch(plan)
    spot = ErasedRectangle(slice(3, 5), slice(0, 4), np.full((1, 1, 3), np.inf, np.float32))
    found = ObservedModel(plan, CPU).observe(replace(batch, erased=[(1, spot)]), STEP, 0).not_finite
    assert found == NotFinite("images", "input", 24, 4 * 32 * 32 * 3, (1,))


def test_a_loss_may_be_infinite_where_all_logits_are_finite(shards: Path, tmp_path: Path) -> None:
    def overflow(model: CoAtNet) -> None:
        assert isinstance(model.head.classifier, nn.Linear)
        model.head.classifier.bias.copy_(torch.tensor([-3e38, 3e38, 3e38]))

    plan = planned(shards, tmp_path)
    observed = observed_model(plan, overflow)
    found = observed.observe(micro_batch(plan), STEP, 0).not_finite
    assert found == NotFinite("loss", "output", 4, 4, (0, 1, 2, 3))


def test_what_a_repetition_does_not_show_is_named_by_its_block(shards: Path, tmp_path: Path) -> None:
    plan = planned(shards, tmp_path)
    observed = ObservedModel(plan, CPU)
    # As an overflow that depends on the order in which a GPU adds.
    factors = iter([math.inf, 1.0])
    observed.model.blocks[1].register_forward_hook(lambda _, __, output: output * next(factors))
    found = observed.observe(micro_batch(plan), STEP, 0).not_finite
    assert found == NotFinite("blocks.1", "output", None, 4 * 4 * 4 * 16, ())
