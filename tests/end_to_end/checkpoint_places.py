"""Where the checkpoints of a run with faults are: in its folder, or in a real S3 server whose connections fail, too."""

import contextlib
import re
import uuid
from pathlib import Path
from typing import Protocol

from tests.servers.fault_proxy import Fault, FaultProxy
from tests.servers.s3 import S3Server


class CheckpointPlace(Protocol):
    """The checkpoints of one run, as its tests see them."""

    settings: list[str]
    """What the recipe needs."""
    variables: dict[str, str]
    """What the environment of the command needs."""

    def mark(self) -> None:
        """Forget the saves that have begun so far."""

    def begun(self) -> set[int]:
        """Steps of the saves that have begun since `mark`; those in the run folder only while they are not published."""

    def settle(self) -> None:
        """Wait until nothing changes any more, once all ranks have ended."""

    def published(self) -> set[int]:
        """Steps of the checkpoints."""

    def local(self, step: int) -> Path:
        """A folder with the files of a published checkpoint."""


class InRunFolder:
    """Checkpoints below the run folder `run`."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "checkpoints"
        self._before: set[tuple[str, int]] = set()
        self.settings: list[str] = []
        self.variables: dict[str, str] = {}

    def mark(self) -> None:
        self._before = self._unpublished()

    def begun(self) -> set[int]:
        return {_step_in(name) for name, _ in self._unpublished() - self._before}

    def settle(self) -> None:
        pass

    def published(self) -> set[int]:
        return {_step_in(path.name) for path in self._folder.glob("step-*")}

    def local(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def _unpublished(self) -> set[tuple[str, int]]:
        """Names of saves that have begun but are not published, with the time of their last change."""
        found = set()
        for path in self._folder.glob(".step-*.writing"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_mtime_ns))
        return found


class InBucket:
    """Checkpoints in a real S3 server behind a proxy with `storage_faults`, about one in every save.

    Args:
        server: which.
        proxy: in front of it, for this run alone.
        scratch: a local folder for copies.
    """

    def __init__(self, server: S3Server, proxy: FaultProxy, scratch: Path) -> None:
        self._server, self._proxy, self._scratch = server, proxy, scratch
        self._files = server.files()
        self._bucket = f"test/{uuid.uuid4().hex}"
        self._first = 0
        proxy.faults += storage_faults()
        self.settings = [f"pretrain.checkpoint.folder=s3://{self._bucket}"]
        self.variables = server.environment | {"AWS_ENDPOINT_URL": proxy.url}

    def mark(self) -> None:
        self._first = len(self._proxy.requests)

    def begun(self) -> set[int]:
        new = self._proxy.requests[self._first :]
        return {_step_in(path) for method, path in new if method == "PUT" and "/step-" in path}

    def settle(self) -> None:
        self._proxy.wait_idle()

    def published(self) -> set[int]:
        return {_step_in(name) for name in self._files.find(self._bucket) if name.endswith("/manifest.json")}

    def local(self, step: int) -> Path:
        folder = self._scratch / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name in self._files.find(f"{self._bucket}/test/pretrain/step-{step:08d}"):
            (folder / name.rpartition("/")[2]).write_bytes(self._files.cat_file(name))
        return folder


def storage_faults() -> list[Fault]:
    """Errors, broken connections in every phase of a request, and late answers, for the files of checkpoints."""
    place = "/step-"
    return [
        Fault("status", place, "PUT", share=1 / 29),
        Fault("cut", place, "PUT", share=1 / 31, after=100),
        Fault("lost", place, "PUT", share=1 / 37),
        Fault("slow", place, "PUT", share=1 / 41),
        Fault("status", place, "GET", share=1 / 71, status=500, code="InternalError"),
        Fault("reset", place, "GET", share=1 / 73, after=100),
        Fault("truncate", place, "GET", share=1 / 79, after=100),
        Fault("lost", place, "DELETE", share=1 / 31),
        Fault("status", place, "DELETE", share=1 / 37),
    ]


def _step_in(text: str) -> int:
    """The step in a name such as `.step-00000012.writing`."""
    found = re.search(r"step-(\d+)", text)
    assert found, text
    return int(found[1])
