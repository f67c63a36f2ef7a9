"""Access to local paths, S3, and the other file systems of fsspec. Refuses URLs that run commands."""

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files.atomic_file import write_atomically
from data.files.file_sizes import file_sizes, regular_files
from data.files.regular_file import open_regular
from data.limits import RECORD_BYTES
from data.remote.deadlines import LISTING_SECONDS, answer, question_seconds, transfer_seconds
from data.remote.retries import Storage as Storage
from data.remote.retries import with_retries
from data.remote.web_address import split_query, without_signature

PIECE = 16 * 2**20
"""Bytes of one range request."""
CONCURRENT_QUESTIONS = 32
"""Small requests to a server that are made at the same time."""

# Object stores and plain file servers. Excluded: whatever runs a command (`pipe:`, hdfs's `hadoop`), wraps another
# URL (`reference:`, `simplecache:`), or unpacks an archive.
_SCHEMES = {"file", "s3", "s3a", "gs", "gcs", "az", "abfs", "oss", "hf", "http", "https", "ftp", "sftp", "webhdfs"}

_PART = 64 * 2**20  # bytes; S3 accepts 10,000 parts
_ASSEMBLY_SECONDS = 600.0  # that S3 may take to make one file of the parts; it sends spaces meanwhile
_CONCURRENT_PARTS = 4


def is_remote(location: str | Path) -> bool:
    """Whether `location` is a URL and not a local file."""
    return "://" in str(location) and not str(location).startswith("file://")


def checked(location: str | Path) -> str:
    """The location, a `file://` one as the path.

    Raises:
        DataError: a URL that runs a command, nests another one, has an unknown scheme, or contains a password, which
            would be kept wherever the location is: in recipes, logs and TensorBoard.
    """
    text = str(location)
    scheme = text.partition("://")[0] if "://" in text else "pipe" if text.startswith("pipe:") else "file"
    if scheme not in _SCHEMES:
        raise DataError(
            f"{text}: not a supported location; use a path or a URL of {', '.join(sorted(_SCHEMES))} "
            "(URLs that run commands or nest others are refused)"
        )
    user, at, host = text.partition("://")[2].partition("/")[0].rpartition("@")
    if at and (":" in user or scheme in ("http", "https")):
        raise DataError(
            f"{scheme}://...@{host}: the address contains a login; give it without, and put the login into ~/.netrc, "
            "or for S3 into a profile of the AWS credentials file (data.storage.profile)"
        )
    return text.removeprefix("file://")


def absolute(location: str | Path) -> str:
    """The location, `checked`, independent of the working directory and without a trailing slash."""
    text = checked(location)
    path, query = split_query(text)
    return path.rstrip("/") + query if is_remote(text) else os.path.abspath(text)


def join(folder: str | Path, name: str) -> str:
    """`name` inside `folder`. The query of a web address applies to all files in it that have none of their own."""
    path, query = split_query(str(folder))
    return f"{path.rstrip('/')}/{name}{'' if '?' in name else query}"


def parent(location: str) -> str:
    """The folder that contains `location`."""
    path, query = split_query(location)
    return path.rstrip("/").rpartition("/")[0] + query if is_remote(location) else str(Path(location).parent)


def read_bytes(
    location: str | Path, storage: Storage, start: int = 0, stop: int | None = None, *, most: int = RECORD_BYTES
) -> bytes:
    """The whole file at `location`, which may have at most `most` bytes, or its bytes `start` .. `stop`.

    Raises:
        FileNotFoundError: there is no such file.
        StorageRefused: access refused.
        StorageDown: no answer in time.
        DataError: it is larger; or see `checked`.
    """
    location = checked(location)
    if not is_remote(location):
        with open_regular(location) as file:
            if stop is not None:
                file.seek(start)
                return file.read(stop - start)
            _check_size(location, os.fstat(file.fileno()).st_size, most)
            return file.read()
    if stop is not None and stop <= start:
        return b""
    files, path = open_filesystem(location, storage)
    is_web = location.startswith(("http://", "https://"))

    def get() -> bytes:
        if stop is None and is_web:  # these need not tell a size
            seconds = transfer_seconds(storage.read_timeout, most)
            return bytes(answer(files, "whole_file", path, most, seconds=seconds))
        end = stop
        if end is None:
            end = _told_size(files, path, location, storage)
            _check_size(location, end, most)
            if end == 0:
                return b""
        seconds = transfer_seconds(storage.read_timeout, end - start)
        data = bytes(answer(files, "cat_file", path, start=start, end=end, seconds=seconds))
        if len(data) != end - start:
            raise ConnectionError(f"{len(data):,} of {end - start:,} bytes received")
        return data

    return with_retries(get, location, storage)


def _check_size(location: str, size: int, most: int) -> None:
    if size > most:
        raise DataError(
            f"{without_signature(location)}: has {size:,} bytes; at most {most:,} are read, which is far more than "
            "such a file needs"
        )


def write_bytes(location: str | Path, data: bytes, storage: Storage) -> None:
    """Publish `data` at `location` atomically.

    Raises:
        StorageRefused, StorageDown, DataError: as for `read_bytes`.
    """
    location = checked(location)
    if not is_remote(location):
        write_atomically(Path(location), data)
        return
    files, path_there = open_filesystem(location, storage)
    seconds = transfer_seconds(storage.read_timeout, len(data))
    with_retries(lambda: answer(files, "pipe_file", path_there, data, seconds=seconds), location, storage)


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
    files, path = open_filesystem(probe, storage)
    with contextlib.suppress(PermissionError):  # writing may be permitted without removing
        answer(files, "rm_file", path, seconds=question_seconds(storage.read_timeout))


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
        if not below:
            return file_sizes(folder, sorted(regular_files(folder)))
        found = sorted(p for p in root.rglob("*") if p.is_file())
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in found}
    files, path = open_filesystem(folder, storage)
    path = path.rstrip("/")

    def get() -> dict[str, int | None]:
        found = answer(files, "find" if below else "ls", path, detail=True, seconds=LISTING_SECONDS)
        entries = found.values() if below else found
        # Some servers mark a folder by an empty file of its name.
        return {
            entry["name"][len(path) + 1 :]: entry["size"]
            for entry in entries
            if entry["type"] == "file" and len(entry["name"]) > len(path) + 1
        }

    listed = with_retries(get, folder, storage)
    sizes = {name: size for name, size in listed.items() if size is not None}
    asked = _asked_sizes(folder, [name for name, size in listed.items() if size is None], storage)
    return dict(sorted((sizes | asked).items()))


def named_sizes(folder: str | Path, names: Sequence[str], storage: Storage) -> dict[str, int]:
    """Name -> size in bytes of those of the files `names` that exist in `folder`, in their order.

    One listing of an object store answers this. Web servers need not have any, and those of file systems have no
    sizes: these are asked about each file, many at a time.

    Raises:
        FileNotFoundError: no such folder.
        StorageRefused, StorageDown, DataError: as for `read_bytes`.
    """
    if str(folder).startswith(("http://", "https://")):
        return _asked_sizes(str(folder), names, storage)
    if not is_remote(folder):
        return file_sizes(checked(folder), names)
    sizes = list_files(folder, storage, below=any("/" in name for name in names))
    return {name: sizes[name] for name in names if name in sizes}


def _asked_sizes(folder: str, names: Sequence[str], storage: Storage) -> dict[str, int]:
    def size(name: str) -> int | None:
        try:
            return file_size(join(folder, name), storage)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(CONCURRENT_QUESTIONS, thread_name_prefix="sizes") as pool:
        try:
            found = list(zip(names, pool.map(size, names), strict=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is refused once is refused thousands of times
            raise
    return {name: size for name, size in found if size is not None}


def list_folders(folder: str | Path, storage: Storage) -> list[str]:
    """Names of the folders in `folder`, sorted.

    Raises:
        FileNotFoundError, StorageRefused, StorageDown, DataError: as for `list_files`.
    """
    folder = checked(folder)
    if not is_remote(folder):
        with os.scandir(folder) as local_entries:
            return sorted(entry.name for entry in local_entries if entry.is_dir())
    files, path = open_filesystem(folder, storage)

    def get() -> list[str]:
        entries = answer(files, "ls", path.rstrip("/"), detail=True, seconds=LISTING_SECONDS)
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]

    return sorted(with_retries(get, folder, storage))


def file_size(location: str | Path, storage: Storage) -> int:
    """Size in bytes of the file at `location`.

    Raises:
        FileNotFoundError, StorageRefused, StorageDown, DataError: as for `read_bytes`.
    """
    location = checked(location)
    if not is_remote(location):
        return Path(location).stat().st_size
    files, path = open_filesystem(location, storage)
    return with_retries(lambda: _told_size(files, path, location, storage), location, storage)


def _told_size(files: Any, path: str, location: str, storage: Storage) -> int:
    size = answer(files, "info", path, seconds=question_seconds(storage.read_timeout))["size"]
    if size is None:
        raise DataError(f"{without_signature(location)}: the storage does not tell its size; copy it to another one")
    return int(size)


def pieces(location: str, size: int, storage: Storage, start: int = 0) -> Iterator[bytes]:
    """The bytes of a remote file from `start` to `size`, in order; a failed piece is requested again by itself."""
    for begin in range(start, size, PIECE):
        yield read_bytes(location, storage, begin, min(begin + PIECE, size))


def upload(
    path: Path, location: str, storage: Storage, moved: Callable[[int], None] = lambda count: None, part: int = _PART
) -> None:
    """Publish the local file `path` at the remote `location` atomically.

    `moved` is called with the number of bytes of each completed transfer. A large file is sent to S3 in parts of `part`
    bytes; a failed part is sent again by itself.

    Raises:
        StorageRefused, StorageDown, DataError: as for `read_bytes`.
    """
    files, there = open_filesystem(checked(location), storage)
    size = path.stat().st_size
    if size <= part or not hasattr(files, "call_s3"):
        seconds = transfer_seconds(storage.read_timeout, size)
        with_retries(lambda: answer(files, "put_file", str(path), there, seconds=seconds), location, storage)
        moved(size)
        return
    bucket, key, _ = files.split_path(there)

    def call(method: str, **arguments: Any) -> Any:
        seconds = transfer_seconds(storage.read_timeout, len(arguments.get("Body", b""))) + _ASSEMBLY_SECONDS
        options = {"Bucket": bucket, "Key": key, "seconds": seconds, **files.req_kw, **arguments}
        return with_retries(lambda: answer(files, "call_s3", method, **options), location, storage)

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
            files.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id, **files.req_kw)
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
    files, path = open_filesystem(location, storage)
    with contextlib.suppress(FileNotFoundError):
        seconds = question_seconds(storage.read_timeout)
        with_retries(lambda: answer(files, "rm_file", path, seconds=seconds), location, storage)


def open_filesystem(location: str, storage: Storage) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    scheme = location.partition("://")[0]
    with _FILESYSTEM_LOCK:
        files = _filesystem(scheme, storage, os.getpid())
    return files, files._strip_protocol(location)


_FILESYSTEM_LOCK = threading.Lock()


@lru_cache(maxsize=8)
def _filesystem(scheme: str, storage: Storage, process: int) -> Any:
    """Cached per process: its event loop does not survive a fork."""
    if scheme in ("http", "https"):
        from data.remote.http_files import http_files

        return http_files(storage.read_timeout)
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in ("s3", "s3a"):
        for endpoint in (storage.endpoint, *map(os.environ.get, ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))):
            if endpoint and not checked(endpoint).startswith(("http://", "https://")):
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
                "max_pool_connections": 256,  # several for each of the downloads, of which 64 may run
            },
        }
        if storage.requester_pays or os.environ.get("AWS_REQUEST_PAYER") == "requester":
            options["requester_pays"] = True
    try:
        files = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise DataError(f"{scheme}:// needs another package: {error}") from error
    files.retries = 1  # those of s3fs give up after 2 seconds
    return files
