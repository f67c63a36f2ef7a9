"""Histograms of fragments against those that torch's TensorBoard writer makes of whole parameters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import make_histogram

from pipeline.monitoring import histograms
from pipeline.monitoring.histograms import EDGES, weight_histograms
from pipeline.ranks.distributed import Ranks
from pipeline.zero.fragments import Fragment

ALONE = Ranks(0, 1, torch.device("cpu"))


def halves(name: str, values: torch.Tensor) -> list[Fragment]:
    middle = len(values) // 3
    parts = [(0, middle), (middle, len(values))]
    fragments = [Fragment(name, *part, {"master": values[slice(*part)]}, True) for part in parts]
    return [*fragments, Fragment(name, 0, len(values), {"master": values}, False)]


def test_the_bins_are_those_of_tensorboards_writer(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        assert writer.default_bins == EDGES


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 0.02, id="weights"),
        pytest.param(torch.zeros(7), id="zeros"),
        pytest.param(torch.tensor([-3.0, 0.0, 1e-20, 5.0]), id="few"),
        pytest.param(torch.ones(5), id="ones"),
    ],
)
def test_fragments_together_give_the_histogram_of_the_whole(
    values: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(histograms, "_CHUNK", 1000)
    found = weight_histograms([*halves("b", values), *halves("a", torch.ones(3))], ["a", "b"], ALONE)
    # float32 edges, as values are compared in float32.
    reference = make_histogram(values.numpy(), np.array(EDGES, np.float32))  # type: ignore[no-untyped-call]
    summary = found["b"].summary("weights/b").value[0]
    ours = summary.histo
    assert summary.tag == "weights/b"
    assert ours.num == reference.num == len(values)
    assert ours.sum == pytest.approx(reference.sum, rel=1e-6, abs=1e-6)
    assert ours.sum_squares == pytest.approx(reference.sum_squares, rel=1e-5)
    limits = dict(zip(np.asarray(reference.bucket_limit, np.float32), reference.bucket, strict=True))
    expected = {limit: count for limit, count in limits.items() if count}
    counted = zip(np.asarray(ours.bucket_limit, np.float32), ours.bucket, strict=True)
    assert {limit: count for limit, count in counted if count} == expected
    assert ours.min <= values.min()
    assert values.max() <= ours.max
    assert found["a"].counts.sum() == 3


def test_values_outside_all_bins_are_counted_too() -> None:
    found = weight_histograms(halves("a", torch.tensor([-1e30, 1e30, 1e30])), ["a"], ALONE)["a"]
    assert list(found.counts[[0, -1]]) == [1, 2]
    assert list(found.summary("a").value[0].histo.bucket[:: len(EDGES)]) == [1, 2]
