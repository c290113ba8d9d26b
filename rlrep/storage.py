"""Where datasets and encoders are read from: a folder, or a URL of an object store, read through tensorstore.

    s3://bucket/path         S3 and what speaks its language: AWS_ACCESS_KEY_ID and so on or a profile, AWS_ENDPOINT_URL
    gs://bucket/path         Google Cloud Storage, with the application default credentials
    https://host/path        any web server that answers range requests; also http
    file:///path             this machine, and memory://path, this process

Nothing is written to a URL: a commit is an atomic rename under a lock, which object stores do not have.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

import tensorstore as ts

SCHEMES = ("file", "gs", "http", "https", "memory", "s3")

PATIENCE = 30.0
"""Seconds in which a store must answer when it is first asked; looking for credentials alone can take minutes."""

RETRIES = {"max_retries": 4, "max_delay": "4s"}


@dataclasses.dataclass(frozen=True)
class Url:
    """A file or folder in an object store; for reading, as much of a `Path` as is needed."""

    text: str

    def __post_init__(self) -> None:
        scheme = self.text.partition("://")[0]
        if scheme not in SCHEMES:
            raise ValueError(f"{self.text} cannot be read: rlrep knows the URLs of {', '.join(SCHEMES)}, not {scheme}")

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text.rstrip('/')}/{name}")

    def spec(self) -> dict[str, Any]:
        """What tensorstore needs to know of it, as a folder.

        Raises:
            OSError: It is no well-formed URL.
        """
        try:
            found: dict[str, Any] = ts.KvStore.Spec(f"{self.text.rstrip('/')}/").to_json()
        except ValueError as error:
            reason = _first_line(error).rpartition('": ')[2]
            raise OSError(f"{self.text} is no URL of a folder: {reason}") from error
        if found["driver"] == "s3":
            if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
                found["endpoint"] = endpoint
            if "AWS_ACCESS_KEY_ID" in os.environ:
                # Otherwise it complains on stderr of every other place that has none.
                found["aws_credentials"] = {"type": "environment"}
        return found

    def read_bytes(self) -> bytes:
        """Returns a file's content.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The store does not answer, or not to us.
        """
        folder, _, name = self.text.rpartition("/")
        spec = Url(folder).spec()
        try:
            store = ts.KvStore.open(spec, context=context()).result(timeout=PATIENCE)
            found = store.read(name).result(timeout=PATIENCE)
        except (ValueError, OSError) as error:
            raise OSError(explain(error, self.text)) from error
        if found.state == "value":
            return bytes(found.value)
        try:
            # A bucket that does not exist has no file of that name either, and says so only when it is listed.
            (store / name).list().result(timeout=PATIENCE)
        except NotImplementedError:
            # A web server lists nothing.
            pass
        except (ValueError, OSError) as error:
            # Whoever may read need not be allowed to list.
            if "PERMISSION_DENIED" not in str(error):
                raise OSError(explain(error, self.text)) from error
        raise FileNotFoundError(f"there is no file {self.text}")

    def read_text(self) -> str:
        """Returns a file's content as text; raises what `read_bytes` does."""
        return self.read_bytes().decode()

    def is_file(self) -> bool:
        """Whether there is such a file; raises OSError where that cannot be told."""
        try:
            self.read_bytes()
        except FileNotFoundError:
            return False
        return True


def locate(place: str | Path | Url) -> Path | Url:
    """Returns the folder that a path or URL names."""
    return Url(place) if isinstance(place, str) and "://" in place else place if isinstance(place, Url) else Path(place)


def check_local(path: Path) -> None:
    """Raises OSError where a path that is to be written to was meant as a URL."""
    if re.match(r"[a-z0-9]{2,}:/", str(path)):
        url = str(path).replace(":/", "://", 1)
        raise OSError(
            f"{url} is a URL, and rlrep writes to folders of a file system only: write to one, and copy it up when it "
            "is finished, for example with `aws s3 cp --recursive`. Reading from a URL works"
        )


def kvstore(folder: Path | Url) -> dict[str, Any]:
    """What tensorstore needs to know of a folder."""
    return folder.spec() if isinstance(folder, Url) else {"driver": "file", "path": f"{folder}/"}


@functools.cache
def context() -> ts.Context:
    """What all that is read in this process shares: `memory://`, and how often a request is tried again."""
    return ts.Context({f"{kind}_request_retries": RETRIES for kind in ("s3", "gcs", "http")})


def explain(error: Exception, what: str) -> str:
    """Returns what an error of tensorstore's means for whoever asked for `what`."""
    text = str(error)
    if isinstance(error, TimeoutError):
        reason = f"no answer within {PATIENCE:g} seconds; there may be no network, or no credentials for the store"
    elif "NoSuchBucket" in text or "bucket does not exist" in text:
        reason = "there is no such bucket"
    elif "PERMISSION_DENIED" in text or "UNAUTHENTICATED" in text:
        reason = "access is denied to the credentials that were found"
    elif "credentials" in text:
        reason = "no credentials were found; for s3, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    elif "CURL error" in text:
        reason = f"the store cannot be reached: {text.partition('CURL error ')[2].partition(' [')[0]}"
    elif "Requested byte range" in text:
        reason = "the web server does not answer range requests"
    else:
        reason = _first_line(error)
    return f"{what} cannot be read: {reason}"


def _first_line(error: Exception) -> str:
    return str(error).split(" [")[0].split("\n")[0]
