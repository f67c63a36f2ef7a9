"""The largest micro-batch that a GPU trains: each size is tried in a process of its own, since it may not fit."""

from collections.abc import Callable

from pipeline.gpu_benchmark.machine import is_memory_full
from pipeline.gpu_benchmark.record import MicroBatchAttempt
from pipeline.gpu_benchmark.subject import MeasuredStage, join
from pipeline.gpu_benchmark.timing import wait_for
from pipeline.gpu_benchmark.training_steps import Rank, peak_bytes

_STEPS = 2  # AdamW makes its state in the first one
_LARGEST = 1 << 14


def try_micro_batch(subject: MeasuredStage) -> MicroBatchAttempt:
    """Whether steps of the subject's micro-batch fit; the estimate is left to the caller."""
    plan = subject.plan()
    ranks = join(plan)
    fits = True
    try:
        rank = Rank(plan, ranks)
        for _ in range(_STEPS):
            rank.take_step()
        wait_for(ranks.device)
    except RuntimeError as error:
        if not is_memory_full(error):
            raise
        fits = False
    return MicroBatchAttempt(plan.stage.batch.micro_size, fits, peak_bytes(ranks.device), 0)


def first_size(estimate: Callable[[int], int], memory: int) -> int:
    """The largest power of two whose bytes by `estimate` are at most `memory`, where a search begins; at least 1."""
    size = 1
    while size < _LARGEST and estimate(2 * size) <= memory:
        size *= 2
    return size


def search(first: int, fits: Callable[[int], bool | None]) -> None:
    """Call `fits` for sizes that enclose the largest that fits ever more closely: doubled and halved from `first`, then
    the one in the middle. Ends where it answers None: that it cannot be known."""
    begins = answer = fits(first)
    size = first
    while answer is not None and answer == begins and 1 <= (other := 2 * size if begins else size // 2) <= _LARGEST:
        size, answer = other, fits(other)
    if answer is not None and answer != begins and (low := size // 2 if begins else size) > 1:
        fits(low + low // 2)
