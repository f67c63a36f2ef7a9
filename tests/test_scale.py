"""The tables of docs/scale.md, of a small model: their form, and what they say about the recipe."""

import pytest

from benchmarks import scale
from jobs.bundled_recipes import bundled_recipes, load_recipe
from models.variants import find_variant
from pipeline.planner.datasets import planned_dataset
from pipeline.planner.training_trace import Workload, build_on_meta
from pipeline.recipe.schema import TrainStage


@pytest.fixture
def small() -> scale.ScaledStage:
    """The stage of the tables with a small model, which is traced in a moment."""
    stage = load_recipe(bundled_recipes()[scale.RECIPE]).stages[scale.STAGE]
    assert isinstance(stage, TrainStage)
    checkpoint = stage.checkpoint.model_copy(update={"every_steps": 10**6})  # its steps are as short as it is small
    model_settings = stage.model.model_copy(update={"name": "coatnet_debug"})
    stage = stage.model_copy(update={"model": model_settings, "checkpoint": checkpoint})
    model = build_on_meta(Workload(find_variant("coatnet_debug"), stage.resolution, 10, 1))
    sizes = [parameter.numel() for parameter in model.parameters()]
    dataset = planned_dataset(stage, samples=3 * 10**9, classes=10)
    return scale.ScaledStage(stage, dataset, sum(sizes), len(sizes))


def test_more_ranks_than_the_recipe_can_use_are_named_as_another_run(small: scale.ScaledStage) -> None:
    assert small.most_ranks == 128
    assert [small.micro_batch(ranks) for ranks in (8, 128, 512, 4096)] == [32, 32, 8, 1]
    lines = scale.step_table(small, [128, 512]).splitlines()
    assert lines[2].endswith("|  |")
    assert "needs `micro_size: 8`, another run" in lines[3]


def test_a_step_of_fewer_ranks_has_more_micro_batches_and_less_to_wait_for(small: scale.ScaledStage) -> None:
    few, many = small.step(8), small.step(128)
    assert (few.micro_batches, many.micro_batches) == (16, 1)
    assert (few.forward, few.backward) == (many.forward, many.backward)
    assert few.communication.each[1].value < many.communication.each[1].value  # weights are gathered once in a step


@pytest.mark.parametrize("remote", [False, True])
def test_all_tables_are_printed(
    small: scale.ScaledStage, remote: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "stage_of_recipe", lambda: small)
    monkeypatch.setattr("sys.argv", ["scale", "--gpus", "8", "512", *(["--remote"] if remote else [])])
    scale.main()
    text = capsys.readouterr().out
    assert text.count("## ") == 5
    assert ("an object store" if remote else "a shared file system") in text
    assert ("requests for shards" in text) is remote
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        columns = {line.count(" | ") for line in table.replace("|  |", "| - |").strip().splitlines()}
        assert len(columns) == 1, table
    assert "| connections to the store of the ranks | never |" in text
