"""The figures of clusters: the file that comes with the program, and files that are wrong."""

import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.planner.cluster_figures import ClusterFigures, bundled_cluster_figures
from pipeline.planner.figures import Figure, read_figures


def figures() -> list[tuple[str, Figure]]:
    found = bundled_cluster_figures()
    sections = (name for name in ClusterFigures.model_fields if name != "version")
    return [(f"{name}.{key}", figure) for name in sections for key, figure in getattr(found, name)]


@pytest.mark.parametrize(("name", "figure"), figures())
def test_every_figure_has_an_origin_and_lies_in_its_range(name: str, figure: Figure) -> None:
    assert len(figure.origin) > 20, name
    assert (figure.least if figure.least is not None else figure.value) <= figure.value
    assert (figure.most if figure.most is not None else figure.value) >= figure.value
    # Nothing that is assumed may look exact.
    assert not (figure.origin.startswith("assumed") and figure.known), name


def test_the_failures_of_nodes_are_those_of_the_published_run() -> None:
    gpu_hours = 16_384 * 54 * 24 / 419
    assert round(gpu_hours) == 50_677
    assert bundled_cluster_figures().failures.node_hours.value == round(gpu_hours / 8)


def test_a_file_with_a_mistake_is_refused_by_name() -> None:
    content = bundled_cluster_figures().model_dump()
    del content["starts"]["names"]
    with pytest.raises(ConfigError, match=r"mine\.yaml: starts\.names: Field required"):
        read_figures(ClusterFigures, yaml.safe_dump(content), "mine.yaml")
    with pytest.raises(ConfigError, match="not YAML"):
        read_figures(ClusterFigures, "{", "cluster_figures.yaml")
