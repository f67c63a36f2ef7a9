"""What has changed between a checkpoint and the start that continues from it."""

from dataclasses import replace

from pipeline.runs.continuation import changes_since
from tests.support.records import RUN, checkpoint_facts

NOW = {"zero_stage": "1", "torch": "2.13.0", "device": "NVIDIA H100 80GB HBM3"}


def test_each_difference_is_a_line_with_the_step_of_the_checkpoint() -> None:
    before = replace(RUN, computed_with={"zero_stage": "2", "torch": "2.13.0", "device": "NVIDIA A100-SXM4-80GB"})
    checkpoint = checkpoint_facts(1200, before, world_size=8)
    assert [str(change) for change in changes_since(checkpoint, NOW, 16)] == [
        "ranks: 8 at step 1,200, now 16",
        "zero_stage: 2 at step 1,200, now 1",
        "device: NVIDIA A100-SXM4-80GB at step 1,200, now NVIDIA H100 80GB HBM3",
    ]
    assert changes_since(checkpoint_facts(1200, replace(RUN, computed_with=NOW), world_size=16), NOW, 16) == []


def test_what_an_older_checkpoint_does_not_say_is_no_difference() -> None:
    assert [change.what for change in changes_since(checkpoint_facts(3, RUN, world_size=2), NOW, 1)] == ["ranks"]
