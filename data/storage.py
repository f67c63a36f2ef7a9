"""Access to local paths, S3, and the other file systems of fsspec. Refuses URLs that run commands."""

import contextlib
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from data.atomic_file import write_atomically
from data.errors import DataError, StorageDown, StorageRefused

Answer = TypeVar("Answer")

PIECE = 16 * 2**20
"""Bytes of one range request."""

# Object stores and plain file servers. Excluded: whatever runs a command (`pipe:`, hdfs's `hadoop`), wraps another
# URL (`reference:`, `simplecache:`), or unpacks an archive.
_SCHEMES = {"file", "s3", "s3a", "gs", "gcs", "az", "abfs", "oss", "hf", "http", "https", "ftp", "sftp", "webhdfs"}

# Errors that retrying does not fix, by their names in botocore.
_REFUSALS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ConfigNotFound", "InvalidConfigError",
    "CredentialRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError", "TokenRetrievalError",
    "ParamValidationError", "InvalidRegionError",
}  # fmt: skip
_FIRST_DELAY = 0.2  # seconds
_PART = 64 * 2**20  # bytes; S3 accepts 10,000 parts
_CONCURRENT_PARTS = 4


@dataclass(frozen=True, slots=True)
class Storage:
    """How remote locations are accessed. What is not given comes from the usual AWS variables and files.

    A failed request is retried after a random fraction of a delay that doubles up to `greatest_delay`, until none has
    succeeded for `give_up_after`, both in seconds. (Full jitter; Brooker, "Exponential Backoff And Jitter", AWS 2015.)
    """

    endpoint: str | None = None
    profile: str | None = None
    anonymous: bool = False
    give_up_after: float = 600.0
    greatest_delay: float = 10.0
    read_timeout: float = 20.0
    """Seconds without receiving a byte after which a request counts as failed."""


def is_remote(location: str | Path) -> bool:
    """Whether `location` is a URL and not a local file."""
    return "://" in str(location) and not str(location).startswith("file://")


def checked(location: str | Path) -> str:
    """The location, a `file://` one as the path.

    Raises:
        DataError: a URL that runs a command, nests another one, or has an unknown scheme.
    """
    text = str(location)
    scheme = text.partition("://")[0] if "://" in text else "pipe" if text.startswith("pipe:") else "file"
    if scheme not in _SCHEMES:
        raise DataError(
            f"{text}: not a supported location; use a path or a URL of {', '.join(sorted(_SCHEMES))} "
            "(URLs that run commands or nest others are refused)"
        )
    return text.removeprefix("file://")


def absolute(location: str | Path) -> str:
    """The location, `checked`, independent of the working directory and without a trailing slash."""
    text = checked(location)
    return text.rstrip("/") if is_remote(text) else os.path.abspath(text)


def join(folder: str | Path, name: str) -> str:
    """`name` inside `folder`."""
    return f"{str(folder).rstrip('/')}/{name}"


def parent(location: str) -> str:
    """The folder that contains `location`."""
    return location.rstrip("/").rpartition("/")[0] if is_remote(location) else str(Path(location).parent)


def read_bytes(location: str | Path, storage: Storage, start: int = 0, stop: int | None = None) -> bytes:
    """The file at `location`, or its bytes `start` .. `stop`.

    Raises:
        FileNotFoundError: there is no such file.
        StorageRefused: access refused.
        StorageDown: no answer in time.
        DataError: see `checked`.
    """
    location = checked(location)
    if not is_remote(location):
        with open(location, "rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)
    if stop is not None and stop <= start:
        return b""
    files, path = _open(location, storage)

    def get() -> bytes:
        data = bytes(files.cat_file(path, start=start or None if stop is None else start, end=stop))
        if stop is not None and len(data) != stop - start:
            raise ConnectionError(f"{len(data):,} of {stop - start:,} bytes received")
        return data

    return _with_retries(get, location, storage)


def write_bytes(location: str | Path, data: bytes, storage: Storage) -> None:
    """Publish `data` at `location` atomically.

    Raises:
        StorageRefused, StorageDown, DataError: as for `read_bytes`.
    """
    location = checked(location)
    if not is_remote(location):
        write_atomically(Path(location), data)
        return
    files, path_there = _open(location, storage)
    _with_retries(lambda: files.pipe_file(path_there, data), location, storage)


def check_writable(folder: str | Path, storage: Storage) -> None:
    """Write an empty file into `folder`, created if necessary, and remove it.

    Raises:
        OSError, NotImplementedError: it cannot be written.
        StorageRefused, StorageDown, DataError: as for `read_bytes`.
    """
    probe = join(checked(folder), f".writable-{uuid.uuid4().hex}")
    if not is_remote(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_bytes(probe, b"", storage)
        Path(probe).unlink()
        return
    write_bytes(probe, b"", storage)
    files, path = _open(probe, storage)
    with contextlib.suppress(PermissionError):  # writing may be permitted without removing
        files.rm_file(path)


def list_files(folder: str | Path, storage: Storage, *, below: bool = False) -> dict[str, int]:
    """Name -> size in bytes of the files in `folder`, sorted; with `below`, also in its subfolders ("a/b.jpg").

    Raises:
        FileNotFoundError: no such folder.
        StorageRefused, StorageDown, DataError: as for `read_bytes`.
    """
    folder = checked(folder)
    if not is_remote(folder):
        root = Path(folder)
        if not root.is_dir():
            raise FileNotFoundError(folder)
        found = sorted(p for p in (root.rglob("*") if below else root.iterdir()) if p.is_file())
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in found}
    files, path = _open(folder, storage)
    path = path.rstrip("/")

    def get() -> dict[str, int]:
        entries = files.find(path, detail=True).values() if below else files.ls(path, detail=True)
        # Some servers mark a folder by an empty file of its name.
        return {
            entry["name"][len(path) + 1 :]: entry["size"] or 0
            for entry in entries
            if entry["type"] == "file" and len(entry["name"]) > len(path) + 1
        }

    return dict(sorted(_with_retries(get, folder, storage).items()))


def list_folders(folder: str | Path, storage: Storage) -> list[str]:
    """Names of the folders in `folder`, sorted.

    Raises:
        FileNotFoundError, StorageRefused, StorageDown, DataError: as for `list_files`.
    """
    folder = checked(folder)
    if not is_remote(folder):
        with os.scandir(folder) as local_entries:
            return sorted(entry.name for entry in local_entries if entry.is_dir())
    files, path = _open(folder, storage)

    def get() -> list[str]:
        entries = files.ls(path.rstrip("/"), detail=True)
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]

    return sorted(_with_retries(get, folder, storage))


def file_size(location: str | Path, storage: Storage) -> int:
    """Size in bytes of the file at `location`.

    Raises:
        FileNotFoundError, StorageRefused, StorageDown, DataError: as for `read_bytes`.
    """
    location = checked(location)
    if not is_remote(location):
        return Path(location).stat().st_size
    files, path = _open(location, storage)
    return _with_retries(lambda: int(files.info(path)["size"]), location, storage)


def pieces(location: str, size: int, storage: Storage) -> Iterator[bytes]:
    """The `size` bytes of a remote file, in order; a failed piece is requested again by itself."""
    for start in range(0, size, PIECE):
        yield read_bytes(location, storage, start, min(start + PIECE, size))


def upload(
    path: Path, location: str, storage: Storage, moved: Callable[[int], None] = lambda count: None, part: int = _PART
) -> None:
    """Publish the local file `path` at the remote `location` atomically.

    `moved` is called with the number of bytes of each completed transfer. A large file is sent to S3 in parts of `part`
    bytes; a failed part is sent again by itself.

    Raises:
        StorageRefused, StorageDown, DataError: as for `read_bytes`.
    """
    files, there = _open(checked(location), storage)
    size = path.stat().st_size
    if size <= part or not hasattr(files, "call_s3"):
        _with_retries(lambda: files.put_file(str(path), there), location, storage)
        moved(size)
        return
    bucket, key, _ = files.split_path(there)

    def call(method: str, **arguments: Any) -> Any:
        return _with_retries(lambda: files.call_s3(method, Bucket=bucket, Key=key, **arguments), location, storage)

    upload_id = call("create_multipart_upload")["UploadId"]

    def send(number: int) -> dict[str, Any]:
        with open(path, "rb") as file:
            file.seek(number * part)
            body = file.read(part)
        tag = call("upload_part", UploadId=upload_id, PartNumber=number + 1, Body=body)["ETag"]
        moved(len(body))
        return {"PartNumber": number + 1, "ETag": tag}

    try:
        with ThreadPoolExecutor(_CONCURRENT_PARTS, thread_name_prefix="upload") as pool:
            parts = list(pool.map(send, range(-(-size // part))))
        try:
            call("complete_multipart_upload", UploadId=upload_id, MultipartUpload={"Parts": parts})
        except FileNotFoundError:  # an earlier attempt may have succeeded without its answer arriving
            if file_size(location, storage) != size:
                raise
    except BaseException:
        with contextlib.suppress(Exception):  # its invisible parts would be billed
            files.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id)
        raise


def remove(location: str | Path, storage: Storage) -> None:
    """Remove the file at `location`, if there is one.

    Raises:
        StorageRefused, StorageDown, DataError: as for `read_bytes`.
    """
    location = checked(location)
    if not is_remote(location):
        Path(location).unlink(missing_ok=True)
        return
    files, path = _open(location, storage)
    with contextlib.suppress(FileNotFoundError):
        _with_retries(lambda: files.rm_file(path), location, storage)


def _open(location: str, storage: Storage) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    scheme = location.partition("://")[0]
    with _FILESYSTEM_LOCK:
        files = _filesystem(scheme, storage, os.getpid())
    return files, files._strip_protocol(location)


_FILESYSTEM_LOCK = threading.Lock()


@lru_cache(maxsize=8)
def _filesystem(scheme: str, storage: Storage, process: int) -> Any:
    """Cached per process: its event loop does not survive a fork."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in ("s3", "s3a"):
        endpoint = storage.endpoint or os.environ.get("AWS_ENDPOINT_URL", "https://")
        if not endpoint.startswith(("http://", "https://")):
            raise DataError(f"{endpoint}: not the URL of an S3 server; write https://{endpoint}")
        options |= {
            "anon": storage.anonymous,
            "profile": storage.profile,
            "endpoint_url": storage.endpoint,
            "config_kwargs": {
                "connect_timeout": 10,
                "read_timeout": storage.read_timeout,
                "retries": {"max_attempts": 1, "mode": "standard"},
                # Whole files are verified by the sha256 in the index.
                "response_checksum_validation": "when_required",
                "request_checksum_calculation": "when_required",
                "max_pool_connections": 64,
            },
        }
    try:
        files = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise DataError(f"{scheme}:// needs another package: {error}") from error
    files.retries = 1  # those of s3fs give up after 2 seconds
    return files


def _with_retries(request: Callable[[], Answer], location: str, storage: Storage) -> Answer:
    """The answer to `request`, retried while it fails for a transient reason."""
    deadline = time.monotonic() + storage.give_up_after
    delay = _FIRST_DELAY
    while True:
        try:
            return request()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except Exception as error:
            if _is_refusal(error):
                raise StorageRefused(
                    f"{location}: access refused ({_describe(error)}); {_credentials(location, storage)}"
                ) from error
            if not _is_transient(error):
                raise
            if time.monotonic() > deadline:
                raise StorageDown(
                    f"{location}: no answer in {storage.give_up_after:.0f} s (last: {_describe(error)}); "
                    "the server or the network is down"
                ) from error
        time.sleep(random.uniform(0, delay))
        delay = min(2 * delay, storage.greatest_delay)


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or type(error).__name__ in _REFUSALS


def _is_transient(error: Exception) -> bool:
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | TimeoutError) or library in ("botocore", "aiobotocore", "aiohttp")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:300]


def _credentials(location: str, storage: Storage) -> str:
    if not location.startswith("s3"):
        return "check the credentials"
    who = (
        "without credentials, because of storage.anonymous"
        if storage.anonymous
        else f"with the profile {storage.profile}"
        if storage.profile
        else "with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or the default profile"
    )
    where = storage.endpoint or os.environ.get("AWS_ENDPOINT_URL") or "the default endpoint"
    return f"tried {urlsplit(where).netloc or where} {who}; check them and the bucket's policy"
