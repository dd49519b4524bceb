"""What a failed call to storage means: worth another attempt, or which sentence the user gets.

Object storage fails in passing all the time, so that every operation goes through `call`. Nothing that an exception of
a library says is passed on, as it may quote an URL or a header with a credential in it: only its code or its class.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from rayft.errors import StorageDenied, StorageDown, StorageError, StorageMissing

T = TypeVar("T")
Doing = Literal["reading", "listing", "writing", "deleting"]
Kind = Literal["missing", "denied", "unsigned", "rejected", "replaced", "transient", "fatal", "ours"]


@dataclass(frozen=True)
class Retry:
    """How often and how patiently. `attempts` counts operations, the first one too; delays are in seconds.

    `requests` is how often one request inside an operation is sent, so that a lost part of a large upload does not
    repeat the whole of it.
    """

    attempts: int = 9
    first_s: float = 0.5
    longest_s: float = 20.0
    requests: int = 2

    def delay(self, failures: int, chance: float) -> float:
        """Seconds to wait after failure number `failures` (from 1); `chance` in [0, 1) keeps workers out of step."""
        return min(self.longest_s, self.first_s * 2.0 ** (failures - 1)) * (0.5 + chance / 2)


RETRY = Retry()

_TRANSIENT_ERRNO = {
    errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETRESET,
    errno.ENOTEMPTY,  # of a folder that is being deleted: somebody still writes there
}  # fmt: skip
_TRANSIENT_CLASSES = {
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.exceptions.ResponseParserError",
    "botocore.parsers.ResponseParserError",
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "http.client.IncompleteRead",
    "urllib3.exceptions.HTTPError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
}
_UNSIGNED_CLASSES = {
    "botocore.exceptions.NoCredentialsError",
    "botocore.exceptions.PartialCredentialsError",
    "botocore.exceptions.CredentialRetrievalError",
    "botocore.exceptions.ProfileNotFound",
    "botocore.exceptions.TokenRetrievalError",
}
_LIBRARIES = (
    "botocore.", "aiobotocore.", "aiohttp.", "s3fs.", "gcsfs.", "azure.", "requests.", "urllib3.", "huggingface_hub.",
)  # fmt: skip
# Codes of S3, in its own spelling and in that of the AWS library inside pyarrow.
_TRANSIENT_CODES = {
    "slowdown", "internalerror", "internalfailure", "serviceunavailable", "requesttimeout", "throttling",
    "operationaborted", "throttlingexception", "requestlimitexceeded", "networkconnection", "toomanyrequests",
}  # fmt: skip
_REJECTED_CODES = {
    "invalidaccesskeyid", "signaturedoesnotmatch", "expiredtoken", "invalidtoken", "tokenrefreshrequired",
    "invalidsecurity", "requesttimetooskewed", "invalidclienttokenid", "unrecognizedclient",
    "authorizationheadermalformed",
}  # fmt: skip
_FULL = {os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)}
_RIGHTS = {
    "reading": "s3:GetObject and s3:ListBucket",  # without the second, what is missing looks forbidden
    "listing": "s3:ListBucket",
    "writing": "s3:PutObject",
    "deleting": "s3:DeleteObject",
}


def call(path: str, doing: Doing, action: Callable[[], T]) -> T:
    """What `action` returns; tried anew on transient errors as RETRY says, then StorageDown. Other errors: see `told`.

    `action` must be safe to repeat.
    """
    started, failures = time.monotonic(), 0
    while True:
        try:
            return action()
        except Exception as error:
            kind, reason = verdict(error)
            if kind == "ours":
                raise
        failures += 1
        if kind != "transient" or failures >= RETRY.attempts:
            # Raised outside the handler, so that no chained exception carries what a library said.
            raise told(path, doing, kind, reason, f"after {failures} attempts in {time.monotonic() - started:.0f} s")
        time.sleep(RETRY.delay(failures, random.random()))


@contextlib.contextmanager
def telling(path: str, doing: Doing) -> Iterator[None]:
    """Gives errors of the body (reading Parquet through pyarrow, say) the sentences of `call`, without its retries."""
    failure = None
    try:
        yield
    except Exception as error:
        kind, reason = verdict(error)
        if kind == "ours":
            raise
        failure = told(path, doing, kind, reason, "after the attempts of its reader")
    if failure:
        raise failure


def verdict(error: BaseException) -> tuple[Kind, str]:
    """What an exception means, and a word for it that is safe to show.

    "ours" is what is no matter of storage (a StorageError already, or a fault in a program) and passes unchanged.
    """
    if isinstance(error, StorageError):
        return "ours", ""
    if isinstance(error, FileNotFoundError) and type(error.__cause__).__module__.startswith("aiohttp."):
        error = error.__cause__ or error  # fsspec calls whatever goes wrong with a web page a missing file
    code, status = _answer(error)
    name = code or (os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__)
    return _kind(error, re.sub(r"[^a-z0-9]", "", (code or "").lower()), status), name


def _kind(error: BaseException, code: str, status: int) -> Kind:
    """`code` in small letters and digits, as the sets above have it."""
    classes = {f"{one.__module__}.{one.__name__}" for one in type(error).__mro__}
    certificate = "botocore.exceptions.SSLError" in classes  # waiting does not make one valid
    library = isinstance(error, OSError) or type(error).__module__.startswith(_LIBRARIES)
    signs: tuple[tuple[bool, Kind], ...] = (
        (bool(classes & _UNSIGNED_CLASSES), "unsigned"),
        (code in _REJECTED_CODES, "rejected"),
        ("s3fs.utils.FileExpired" in classes or status == 412, "replaced"),
        (code in _TRANSIENT_CODES or status in (408, 429) or (status >= 500 and status != 501), "transient"),
        (isinstance(error, PermissionError) or status in (401, 403) or code == "accessdenied", "denied"),
        (isinstance(error, FileNotFoundError | NotADirectoryError) or status == 404, "missing"),
        (isinstance(error, TimeoutError | ConnectionError), "transient"),
        (bool(classes & _TRANSIENT_CLASSES) and not certificate, "transient"),
        (isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO, "transient"),
        (library, "fatal"),
    )
    return next((kind for sign, kind in signs if sign), "ours")


def _answer(error: BaseException) -> tuple[str | None, int]:
    """The service's code and HTTP status behind an exception; (None, 0) where it never answered."""
    cause = error.__cause__ if error.__cause__ is not None else error
    response = getattr(cause, "response", None)
    if isinstance(response, dict):
        code = response.get("Error", {}).get("Code")
        return (str(code) if code else None), int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if type(cause).__module__.startswith(_LIBRARIES):
        for attribute in ("status", "status_code", "code"):
            status = getattr(cause, attribute, None)
            if isinstance(status, int):
                return f"HTTP {status}", status
    # pyarrow gives code and status in words only.
    found = (
        re.search(r"AWS Error ([A-Z_]+)(?: \(HTTP status (\d+)\))?", str(error)) if isinstance(error, OSError) else None
    )
    if found is None:
        return None, 0
    status = int(found.group(2) or 0)
    return (f"HTTP {status}" if found.group(1) == "UNKNOWN" and status else found.group(1)), status


def told(path: str, doing: Doing, kind: Kind, reason: str, effort: str) -> StorageError:
    """The error for the user: the path, what was tried, why it failed and what would mend it."""
    head = f"{shown(path)}: {doing} failed"
    if path.startswith(("s3://", "s3a://")):
        need = f"the credentials need {_RIGHTS[doing]} on it"
    else:
        need = f"whoever runs this needs the right of {doing} it"
    if reason == "NoSuchBucket":
        return StorageMissing(f"{shown(path)}: there is no such bucket at this endpoint")
    if kind == "missing" and doing != "writing":
        return StorageMissing(f"{shown(path)} does not exist")
    if reason in _FULL:
        return StorageError(f"{head}, the disk of {os.path.dirname(path) or '.'} is full; free some space")
    sentences: dict[Kind, StorageError] = {
        "denied": StorageDenied(f"{head}, access is denied ({reason}); {need}"),
        "unsigned": StorageDenied(
            f"{head}, no complete credentials were found ({reason}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "choose a profile, or give the machine a role"
        ),
        "rejected": StorageDenied(f"{head}, the credentials were not accepted ({reason}); check that they are current"),
        "replaced": StorageError(f"{head}, the object was replaced while it was being read; run it again"),
        "transient": StorageDown(f"{head} {effort} ({reason}); run it again when the storage answers"),
    }
    return sentences.get(kind, StorageError(f"{head}: {reason}"))


def shown(path: str) -> str:
    """`path` as it may be printed: without a user's name or password in an URL, and without a (signed) query."""
    scheme, found, rest = path.partition("://")
    if not found:
        return path
    host, slash, inside = rest.partition("/")
    if scheme.startswith("http"):
        inside = inside.partition("?")[0]
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{inside}"
