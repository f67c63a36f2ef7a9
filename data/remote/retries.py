"""How storages are accessed, and what happens when a request fails: it is repeated, or its error says what to do."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from data.errors import StorageDown, StorageRefused
from data.remote.storage_errors import describe, is_missing, is_transient, refusal_fix
from data.remote.web_address import split_query, without_signature

Answer = TypeVar("Answer")

_FIRST_DELAY = 0.2  # seconds


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
    requester_pays: bool = False
    """Agree to pay for requests to S3 buckets whose owners do not; AWS_REQUEST_PAYER=requester does the same."""
    shards_elsewhere: bool = False
    """Read shards that a remote index names outside of its own folder, with the credentials of this user."""


def with_retries(request: Callable[[], Answer], location: str, storage: Storage) -> Answer:
    """The answer to `request`, retried while it fails for a transient reason.

    Raises:
        FileNotFoundError: there is no such file or folder.
        StorageRefused: access refused.
        StorageDown: no answer in time.
        Exception: another error of `request`.
    """
    deadline = time.monotonic() + storage.give_up_after
    delay = _FIRST_DELAY
    while True:
        try:
            return request()
        except Exception as error:
            if is_missing(error):
                if isinstance(error, OSError):
                    raise
                raise FileNotFoundError(location) from error
            fix = refusal_fix(error, _access_fix(location, storage))
            if fix is not None:
                raise StorageRefused(
                    f"{without_signature(location)}: access refused ({describe(error)}); {fix}"
                ) from error
            if not is_transient(error):
                raise
            if time.monotonic() > deadline:
                raise StorageDown(
                    f"{without_signature(location)}: no answer in {storage.give_up_after:.0f} s "
                    f"(last: {describe(error)}); the server or the network is down"
                ) from error
        time.sleep(random.uniform(0, delay))
        delay = min(2 * delay, storage.greatest_delay)


def _access_fix(location: str, storage: Storage) -> str:
    """What to do if a storage refuses access."""
    if location.startswith("http"):
        signed = "its signature may have expired: use a new one, or " if split_query(location)[1] else ""
        return f"{signed}give a login in ~/.netrc or a signed address (https://.../shard.tar?...)"
    if location.startswith("hf:"):
        return "accept the terms of the dataset on its page, and set HF_TOKEN to a token that may read it"
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
    pays = (
        ""
        if storage.requester_pays
        else ", or, if its requesters pay, set data.storage.requester_pays or AWS_REQUEST_PAYER=requester"
    )
    return f"tried {urlsplit(where).netloc or where} {who}; check them and the bucket's policy{pays}"
