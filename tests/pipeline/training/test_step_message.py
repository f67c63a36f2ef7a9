"""The message that ranks exchange with every step."""

import torch

from pipeline.faults.preemption import REASONS, TIME_LIMIT
from pipeline.training.step_message import StepMessage
from tests.pipeline.checkpoints.small import together

NO_FLAGS = [0.0] * len(REASONS)


def test_a_packed_message_unpacks_to_itself() -> None:
    message = StepMessage([1.0, 0.0, 0.0, 2.0, 0.0, 0.0], 3.0, [0.1, 0.2, 0.3, 0.4], 2.0)
    assert StepMessage.unpack(message.pack()) == message


def test_the_sum_over_the_ranks_is_the_message_of_all() -> None:
    flags = [[*NO_FLAGS[:-1], 1.0], NO_FLAGS, NO_FLAGS]  # rank 0 is near its time limit
    times = [[0.5, 0.0, 0.0, 2.0, 0.0, 0.0], [0.0, 0.25, 0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.125, 0.0, 0.0, 4.0]]
    messages = [StepMessage(flags[rank], float(rank == 0), times[rank], float(rank > 0)) for rank in range(3)]
    (summed, *others) = together(
        3, lambda ranks: StepMessage.unpack(ranks.sum(torch.tensor(messages[ranks.rank].pack())).tolist())
    )
    assert others == [summed, summed]
    assert summed.stop_reason == TIME_LIMIT
    assert (summed.histograms, summed.verifying) == (1.0, 2.0)
    assert summed.rank_times == [0.5, 0.25, 0.125, 2.0, 3.0, 4.0]


def test_no_flag_is_no_reason_to_stop() -> None:
    assert StepMessage(NO_FLAGS, 0.0, [0.0, 0.0]).stop_reason is None
