"""One submission at a time: who has the folder, and what happens if that is a node which went down."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from data.errors import EXIT_CONFIG, EXIT_TRY_AGAIN, LockHeld
from jobs.scheduler import submissions
from jobs.scheduler.submissions import SubmissionFolder
from pipeline.errors import ConfigError


def test_another_submission_on_this_node_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "_OWN_NODE_SECONDS", 0.0)
    folder = SubmissionFolder(tmp_path / "slurm")
    with folder.lock(), pytest.raises(ConfigError) as refused:
        folder.lock()
    assert refused.value.exit_code == EXIT_CONFIG
    assert str(refused.value) == (
        f"{folder.path}: another `coatnet submit` is using this folder (process {os.getpid()}); wait until it has "
        "finished, or stop it"
    )
    folder.lock().close()


def test_a_submission_on_another_node_is_waited_for_and_then_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "_OWN_NODE_SECONDS", 0.0)
    monkeypatch.setattr(submissions, "_OTHER_NODE_SECONDS", 0.0)
    (tmp_path / ".lock").write_text("node9 4711\n")
    with open(tmp_path / ".lock", "rb+") as server:
        fcntl.flock(server, fcntl.LOCK_EX)
        with pytest.raises(
            LockHeld, match="is using this folder .process 4711 on node node9.*If that node is"
        ) as refused:
            SubmissionFolder(tmp_path).lock()
        assert refused.value.exit_code == EXIT_TRY_AGAIN
        monkeypatch.setattr(submissions, "_OTHER_NODE_SECONDS", 60.0)
        release = threading.Timer(0.1, fcntl.flock, (server, fcntl.LOCK_UN))
        release.start()
        SubmissionFolder(tmp_path).lock().close()
        release.join()
