"""A node that computes wrong values, in the ranks of a command that imports this module before anything else.

Machines here compute what they should. So all ranks act as after a check that has found a rank on that node to differ: they
end in one step of a job that has the node, and take that step in one that does not.
"""

import os

from jobs.scheduler.job_end import node_name
from pipeline.errors import MachineFaulty
from pipeline.runs.event_log import Event
from pipeline.training.step import StepResult
from pipeline.training.training_run import TrainingRun

NODE, STEP = "TEST_FAULTY_NODE", "TEST_FAULTY_STEP"
"""Variables with the name of the node, and the step, from 1."""

_take_step = TrainingRun.take_step


def _checked(run: TrainingRun) -> StepResult:
    node, step, ranks = os.environ[NODE], int(os.environ[STEP]), run.context.ranks
    if run.step + 1 == step and node in (nodes := ranks.gather_texts(node_name(os.environ))):
        message = f"rank {nodes.index(node)} on {node} computes wrong values"
        if ranks.is_leader:
            devices = [{"rank": nodes.index(node), "node": node}]
            run.context.folder.events.record(
                Event.MACHINE_FAULTY, step=step, kinds=["gradient"], nodes=[node], devices=devices
            )
        raise MachineFaulty(message, (node,))
    return _take_step(run)


TrainingRun.take_step = _checked  # type: ignore[method-assign, assignment]
