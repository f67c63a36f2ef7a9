"""What the errors of storages mean: nothing is there, access is refused, or trying again may help."""

from collections.abc import Iterator

REFUSED_STATUSES = {401, 403, 407, 451}
"""Access is refused; a login, a token or a new signature would change that."""
MISSING_STATUSES = {404, 410}
_CREDENTIALS = "check the credentials"
_ADDRESS = "correct the address"
_CERTIFICATE = "check the server's certificate, or name the authority that signed it in SSL_CERT_FILE"
_TERMS = "accept the terms of the dataset on its page, and set HF_TOKEN to a token that may read it"

# Errors that trying again does not fix, by their names in botocore, aiohttp, huggingface_hub, google-auth and azure.
# None: what to do depends on how the storage is accessed.
_REFUSALS: dict[str, str | None] = {
    "NoCredentialsError": None, "PartialCredentialsError": None, "ProfileNotFound": None, "ConfigNotFound": None,
    "InvalidConfigError": None, "CredentialRetrievalError": None, "UnauthorizedSSOTokenError": None,
    "SSOTokenLoadError": None, "TokenRetrievalError": None, "ParamValidationError": None, "InvalidRegionError": None,
    "DefaultCredentialsError": _CREDENTIALS, "RefreshError": _CREDENTIALS, "ClientAuthenticationError": _CREDENTIALS,
    "InvalidURL": _ADDRESS, "InvalidUrlClientError": _ADDRESS, "NonHttpUrlClientError": _ADDRESS,
    "InvalidUrlRedirectClientError": _ADDRESS, "TooManyRedirects": _ADDRESS,
    "ClientConnectorCertificateError": _CERTIFICATE,
    "GatedRepoError": _TERMS, "LocalTokenNotFoundError": _TERMS,
    "RepositoryNotFoundError": f"if the name is right, the dataset is private: {_TERMS}",
    "DisabledRepoError": "the dataset has been disabled on Hugging Face",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set: unset it, or copy the shards here",
}  # fmt: skip


def passes(status: int) -> bool:
    """Whether an HTTP error status may be another one later: too many requests, or a fault of the server."""
    return status in (408, 425, 429) or (status >= 500 and status != 501)  # 501: it never will


def is_missing(error: Exception) -> bool:
    """Whether an error means that there is no such file or folder."""
    if refusal_fix(error, "") is not None:  # a private dataset looks like a missing one
        return False
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return True
    return _status(error) in MISSING_STATUSES


def refusal_fix(error: Exception, usual_fix: str) -> str | None:
    """What to do if an error means that access is refused or that the request is wrong; None if it does not.

    `usual_fix` is what to do about credentials that are missing or refused.
    """
    for cause in _causes(error):
        name = type(cause).__name__
        if name in _REFUSALS:
            fix = _REFUSALS[name]
            return usual_fix if fix is None else fix
    status = _status(error)
    if isinstance(error, PermissionError) or status in REFUSED_STATUSES:
        return usual_fix
    if status is not None and status >= 400 and status not in MISSING_STATUSES and not passes(status):
        return "check the address, and whether the server allows the request"
    return None


def is_transient(error: Exception) -> bool:
    """Whether an error that is no refusal may pass."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | TimeoutError) or library in ("botocore", "aiobotocore", "aiohttp", "httpx")


def describe(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:300]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those from which it was raised; s3fs and huggingface_hub translate errors into others."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _status(error: Exception) -> int | None:
    """The HTTP status that the error of a web client carries; None for S3, which has codes of its own."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            status = getattr(holder, name, None)
            if isinstance(status, int) and not isinstance(status, bool) and 100 <= status < 600:
                return status
    return None
