"""The cluster of a plan: names of GPUs, figures with their origins, and nodes."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from pipeline.errors import ConfigError
from pipeline.planner.figures import Figure
from pipeline.planner.hardware import bundled_hardware, figure_range, find_cluster
from pipeline.planner.ranges import Range
from pipeline.ranks.gpus import PEAKS, memory_bandwidth


def figures(part: BaseModel) -> Iterator[Figure]:
    for value in (getattr(part, name) for name in type(part).model_fields):
        yield from [value] if isinstance(value, Figure) else figures(value)


def test_every_kind_of_gpu_is_in_the_file() -> None:
    assert list(bundled_hardware().gpus) == list(PEAKS)


def test_every_figure_has_an_origin_and_lies_in_its_range() -> None:
    content = bundled_hardware()
    found = [figure for part in (content.law, *content.gpus.values()) for figure in figures(part)]
    assert len(found) == len(type(content.law).model_fields) + 4 * len(PEAKS)
    for figure in found:
        assert figure.origin.strip()
        ends = figure_range(figure)
        assert 0 <= ends.least <= ends.value <= ends.most
        assert figure.value > 0


def test_a_figure_that_is_assumed_for_all_clusters_has_a_range() -> None:
    law = bundled_hardware().law
    assert [f.origin for f in figures(law) if f.origin.startswith(("assumed", "measured")) and f.known] == []


@pytest.mark.parametrize(
    ("name", "kind", "gigabytes", "bandwidth_of"),
    [
        ("h100", "H100", 80, "H100"),
        ("h100-80", "H100", 80, "H100"),
        ("H100-24", "H100", 24, "H100"),
        ("h100-8", "H100", 8, "H100"),
        ("h100-79.6", "H100", 79.6, "H100"),
        ("h100_64gb", "H100", 64, "H100"),
        ("NVIDIA H100 80GB HBM3", "H100", 80, "H100"),
        ("h100 pcie", "H100 PCIe", 80, "H100 PCIe"),
        ("H100-NVL", "H100 NVL", 94, "H100 NVL"),
        ("h200", "H200", 141, "H200"),
        ("NVIDIA H200 NVL", "H200 NVL", 141, "H200"),
        ("A100", "A100", 40, "A100"),
        ("a100-80", "A100", 80, "A100-SXM4-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100", 80, "A100-SXM4-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100", 40, "A100"),
        ("NVIDIA A100 80GB PCIe", "A100", 80, "A100 80GB PCIe"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090", 32, "RTX 5090"),
        ("rtx4090", "RTX 4090", 24, "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 48, "RTX 6000 Ada"),
        ("GH200", "GH200", 96, "GH200"),
        ("NVIDIA GH200 480GB", "GH200", 96, "GH200"),
        ("GH200 144G HBM3e", "GH200", 144, "GH200 144G"),
        ("b200", "B200", 180, "B200"),
        ("GB200", "GB200", 186, "GB200"),
        ("mi300x", "MI300X", 192, "MI300X"),
        ("AMD Instinct MI300X", "MI300X", 192, "MI300X"),
    ],
)
def test_a_gpu_is_found_by_any_spelling_of_its_name(name: str, kind: str, gigabytes: float, bandwidth_of: str) -> None:
    cluster = find_cluster(name, 8, 8)
    assert (cluster.gpu.kind, cluster.memory) == (kind, gigabytes * 1e9)
    assert (cluster.gpu.peak, cluster.gpu.bandwidth) == (PEAKS[kind], memory_bandwidth(bandwidth_of))


@pytest.mark.parametrize("name", ["v100", "NVIDIA RTX A1000", "", "100", "RTX PRO 6000"])
def test_an_unknown_gpu_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        find_cluster(name, 8, 8)
    assert str(refused.value).startswith(f"GPU {name}: not known; use one of GB200, B200, GH200, ")
    assert all(kind in str(refused.value) for kind in PEAKS)


@pytest.mark.parametrize(("gpus", "per_node", "nodes"), [(8, 8, 1), (4, 8, 1), (64, 8, 8), (12, 4, 3), (1, 1, 1)])
def test_gpus_are_in_equal_nodes(gpus: int, per_node: int, nodes: int) -> None:
    cluster = find_cluster("h100", gpus, per_node)
    assert (cluster.nodes, cluster.nodes * cluster.gpus_per_node) == (nodes, gpus)


def test_nodes_that_do_not_divide_the_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"12 GPUs in nodes of 8: the last node would have fewer; set --gpus"):
        find_cluster("h100", 12, 8)


def test_given_bandwidths_replace_those_of_the_file() -> None:
    usual, given = find_cluster("h100", 16, 8), find_cluster("h100", 16, 8, link=1e9, network=2e9, cores_per_node=5)
    assert (usual.link, usual.network) == (
        bundled_hardware().gpus["H100"].link,
        bundled_hardware().gpus["H100"].network,
    )
    assert (given.link.value, given.network.value, given.cores_per_node) == (1e9, 2e9, 5)


def test_the_same_cluster_with_fewer_gpus_than_a_node_is_one_node() -> None:
    whole = find_cluster("h100", 16, 8, cores_per_node=7)
    assert (whole.with_gpus(4).nodes, whole.with_gpus(4).gpus_per_node) == (1, 4)
    assert (whole.with_gpus(32).nodes, whole.with_gpus(32).gpus_per_node) == (4, 8)
    assert whole.with_gpus(16) == whole


def test_a_figure_without_ends_is_exact() -> None:
    kwargs: Any = {"origin": "made up"}
    assert figure_range(Figure(value=3, **kwargs)) == Range.exactly(3)
    assert figure_range(Figure(value=3, least=1, **kwargs)) == Range(3, 1, 3)
