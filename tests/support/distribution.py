"""Which pytest worker gets which test file."""

from typing import Any

from xdist.scheduler import LoadFileScheduling

_WAITING = (
    "tests/slurm/", "tests/servers/", "tests/end_to_end/test_hang.py", "tests/end_to_end/test_stop.py",
    "tests/pipeline/faults/test_watchdog.py",
)  # fmt: skip
"""Tests that mostly wait: for Slurm, or until a time limit has passed."""


class WaitingAside(LoadFileScheduling):  # type: ignore[misc]
    """Whole files, as `--dist loadfile`; of three or more workers, the last one starts with files that mostly wait.

    So two files compute on two cores while a third one waits for the daemons of Slurm.
    """

    def _assign_work_unit(self, node: Any) -> None:
        aside = self.numnodes > 2 and node is self.nodes[-1]
        chosen = next(
            (file for file in self.workqueue if file.startswith(_WAITING) == aside), next(iter(self.workqueue))
        )
        self.workqueue.move_to_end(chosen, last=False)
        super()._assign_work_unit(node)
