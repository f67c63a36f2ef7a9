"""torch.compile: each block one graph, the same numbers, code shared between like blocks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models.coatnet import CoAtNet
from models.norm import recorded_statistics
from models.options import CheckpointingPolicy
from models.registry import create_model

pytestmark = pytest.mark.slow(seconds=11)

OTHER = {
    "convolution_norm": "layer", "relative_attention": "post_normalization", "pool": "average", "stride_in": "depthwise",
}  # fmt: skip
# Stem; the first and the other blocks of S1, S2 and S3. S4 of the debug model is like the rest of its S3.
KINDS = 1 + 2 + 2 + 2
# Of these, stem and MBConv blocks: recomputed, BatchNorm records nothing.
WITH_BATCH_NORM = 1 + 2 + 2


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(**options: Any) -> tuple[CoAtNet, CoAtNet, CompileCounterWithBackend]:
    """Two equal models, the second compiled; aot_eager traces forward and backward and needs no C compiler."""
    eager, compiled = (
        create_model("coatnet_debug", num_classes=3, image_size=32, drop_path_rate=0.3, depths=(2, 2, 3, 2), **options)
        for _ in range(2)
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile_blocks(backend=counter, dynamic=False)
    return eager, compiled, counter


def outcome(model: CoAtNet, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    y = model(torch.randn(8, 32, 32, 3))
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters())), recorded_statistics(model)]


@pytest.mark.parametrize("options", [{}, OTHER], ids=["paper", "other-options"])
def test_compiled_blocks_train_and_evaluate_as_eager_ones_with_and_without_recomputation(
    options: dict[str, Any],
) -> None:
    eager, compiled, counter = pair(**options)
    recomputed = 0 if options else WITH_BATCH_NORM
    policies: tuple[tuple[CheckpointingPolicy, int], ...] = (("none", KINDS), ("every_block", KINDS + recomputed))
    for policy, expected in policies:
        graphs = []
        for model in (eager, compiled):
            model.set_grad_checkpointing(policy=policy)
        for seed in range(3):
            for ours, plain in zip(outcome(compiled, seed), outcome(eager, seed), strict=True):
                assert torch.equal(ours, plain)
            graphs.append(counter.frame_count)
        # A block is one graph. Blocks of one kind share it, and other numbers of kept samples compile nothing new.
        assert graphs == [expected] * 3
    x = torch.randn(8, 32, 32, 3)
    with torch.no_grad():
        assert torch.equal(compiled.eval()(x), eager.eval()(x))
    assert counter.frame_count == 2 * KINDS + recomputed
    assert list(compiled.state_dict()) == list(eager.state_dict())
