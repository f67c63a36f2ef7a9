"""Files that the first of several writers creates: a claim, of which there must be only one."""

import errno
import os
import uuid
from pathlib import Path
from typing import Any

from data.files.atomic_file import UNFINISHED, sync_folder
from data.remote.deadlines import answer, question_seconds, transfer_seconds
from data.remote.retries import with_retries
from data.remote.storage import Storage, checked, is_remote, open_filesystem

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_EXISTS, _NOT_IMPLEMENTED = 412, 501  # HTTP


def create_file(location: str | Path, data: bytes, storage: Storage) -> bool:
    """Publish `data` at `location`, whole or not at all, unless there is a file; returns whether it did.

    Of several writers at the same time one succeeds: on local and network file systems by a hard link, on S3 by a
    conditional request. Other stores, and S3 servers without such requests, only see whether the file exists; who wants
    to be sure reads it back.

    Raises:
        OSError: a local file that cannot be written.
        StorageRefused, StorageDown, DataError: as for `data.remote.storage.read_bytes`.
    """
    location = checked(location)
    if not is_remote(location):
        return _create_local(Path(location), data)
    files, there = open_filesystem(location, storage)
    seconds = question_seconds(storage.read_timeout) + transfer_seconds(storage.read_timeout, len(data))

    def create() -> bool:
        if answer(files, "exists", there, seconds=seconds):
            return False
        if hasattr(files, "call_s3"):
            bucket, key, _ = files.split_path(there)
            try:
                options = {"Bucket": bucket, "Key": key, "Body": data, "IfNoneMatch": "*"}
                answer(files, "call_s3", "put_object", seconds=seconds, **options)
                return True
            except OSError as error:
                status = _http_status(error)
                if status == _EXISTS:
                    return False
                if status != _NOT_IMPLEMENTED:
                    raise
        answer(files, "pipe_file", there, data, seconds=seconds)
        return True

    return with_retries(create, location, storage)


def _create_local(path: Path, data: bytes) -> bool:
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        with open(unfinished, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(unfinished, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            try:
                with open(path, "xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _http_status(error: OSError) -> int | None:
    """The status of the answer that s3fs has turned into `error`."""
    answer: Any = getattr(error.__cause__, "response", None)
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
