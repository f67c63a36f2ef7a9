"""The downloader of a cache as one of its readers sees it: started if there is none, given up if it dies repeatedly.

<folder>/start.lock       held while a downloader is started
<folder>/downloader.json  a `DownloaderStart`, until that downloader ends in order
"""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data.errors import StorageDown
from data.files.atomic_file import open_no_link, write_atomically
from data.files.child_process import own_packages_first, python_module
from data.files.file_lock import locked, try_lock
from data.files.json_records import check_at_least, parse_json
from data.files.regular_file import open_regular
from data.text.printable import one_line

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""What reaches every process of a job that must stop. Readers act on it; the downloader ends with its reader."""

_EARLY = 60.0  # seconds after its start in which the end of a downloader counts
_MOST_DEATHS = 5
_LAST_WORDS = 4096  # bytes of the log


@dataclass(frozen=True, slots=True)
class DownloaderStart:
    """A downloader that was started and has not ended in order."""

    time: float
    """By the monotonic clock, which the processes of a node share."""
    log_bytes: int
    """Length of the log before it was started."""
    deaths: tuple[float, ...]
    """When those before it were found dead, each soon after its start."""

    def __post_init__(self) -> None:
        check_at_least(0, log_bytes=self.log_bytes)


def start_record(folder: Path) -> Path:
    """The file with the `DownloaderStart` of the cache in `folder`."""
    return folder / "downloader.json"


class DownloaderProcess:
    """The downloader of the cache in `folder`, which the readers of a node share and one of them has started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began = time.monotonic()
        self.own: subprocess.Popen[bytes] | None = None
        """The one that this reader has started."""
        self._last: DownloaderStart | None = None
        """Its start, which a full disk may have no room for."""

    def ensure(self) -> bool:
        """Start a downloader unless one is running; readers that find none at the same time start only one.

        Returns whether one is ready; if not, it has ended at once, and the next call tries again.

        Raises:
            StorageDown: as many have died soon after their start as this reader puts up with; names the last reason.
            FileNotFoundError: a cleaner has removed the folder.
        """
        with locked(self._folder / "start.lock"):
            probe = try_lock(self._folder / "downloader.lock")
            if probe is None:
                return True
            probe.close()
            status = None if self.own is None else self._collect(self.own)
            self.own = self._start(self._deaths(status))
            assert self.own.stdout is not None
            # It ends without an error if another one has taken the lock meanwhile.
            return bool(self.own.stdout.readline()) or not self.own.wait()

    def end(self) -> None:
        """Stop the downloader if this reader has started it; another reader starts the next one."""
        if self.own is not None:
            self._collect(self.own)

    def _collect(self, downloader: "subprocess.Popen[bytes]") -> int:
        """The exit status of one that has ended, or does so at the end of its input."""
        downloader.communicate()
        return downloader.returncode

    def _deaths(self, status: int | None) -> tuple[float, ...]:
        """When downloaders in a row were found dead soon after their start; `status` is that of the last, if known."""
        last = self._last if self.own is not None else None
        with suppress(FileNotFoundError, ValueError):  # the node may have gone down while it was written
            last = parse_json(DownloaderStart, start_record(self._folder).read_bytes())
        now = time.monotonic()
        if last is None or status == 0 or not 0 <= now - last.time < _EARLY:
            return ()
        deaths = (*last.deaths, now)
        # Those before this reader began were of other runs, whose whole job may have been killed.
        if sum(death >= self._began for death in deaths) >= _MOST_DEATHS:
            log = self._folder / "downloader.log"
            raise StorageDown(
                f"the downloader of remote shards has died {_MOST_DEATHS} times, each soon after its start (last: "
                f"{_last_words(log, last.log_bytes) or _described(status)}); see {log}"
            )
        return deaths[-_MOST_DEATHS:]

    def _start(self, deaths: tuple[float, ...]) -> "subprocess.Popen[bytes]":
        # It inherits this thread's blocked signals and unblocks them once it ignores them.
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            with open_no_link(self._folder / "downloader.log", "ab") as log:
                length = os.fstat(log.fileno()).st_size
                self._last = DownloaderStart(time.monotonic(), length, deaths)
                with suppress(OSError):
                    write_atomically(start_record(self._folder), json.dumps(asdict(self._last)))
                return subprocess.Popen(
                    python_module("data.remote.downloader", str(self._folder)),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=os.environ | own_packages_first(),
                    start_new_session=True,  # Ctrl-C is for the readers
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def _last_words(log: Path, start: int) -> str:
    """The last line of the log behind its first `start` bytes; empty if there is none."""
    try:
        with open_regular(log) as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - _LAST_WORDS))
            lines = file.read(_LAST_WORDS).decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((one_line(line.strip()) for line in reversed(lines) if line.strip()), "")


def _described(status: int | None) -> str:
    """How a downloader ended that has written nothing."""
    if status is None:
        return "it has written nothing"
    return f"signal {-status}, as the kernel sends where memory is short" if status < 0 else f"exit status {status}"
