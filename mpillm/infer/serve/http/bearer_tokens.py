"""Bearer tokens: a file of names and hashes, which only its owner may read.

Each line is a JSON object: `name`, `sha256` of the token, `expires` (ISO 8601, or null), and
`requests_a_minute` (0: without bound). The token itself is random, so a plain hash is safe.
"""

import hashlib
import hmac
import os
import secrets
import stat
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mpillm.errors import UsageError
from mpillm.infer.serve.http.forms.api_error import ApiError, retry_later
from mpillm.system.atomic import replacing
from mpillm.system.json_text import from_json, to_json
from mpillm.system.messages import explain
from mpillm.system.plain_files import read_plain

PREFIX = "mpillm-"
# 256 bits: no list of hashes leads back to a token.
RANDOM_BYTES = 32
LONGEST_FILE = 1 << 20
OTHERS = stat.S_IRWXG | stat.S_IRWXO
MINUTE_SECONDS = 60.0
FIELDS = frozenset({"name", "sha256", "expires", "requests_a_minute"})
LONGEST_NAME = 64


@dataclass(frozen=True)
class BearerToken:
    """One entry of the file."""

    name: str
    sha256: str
    expires: str | None = None
    requests_a_minute: int = 0

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= LONGEST_NAME or not self.name.isprintable():
            raise ValueError(f"name is 1 to {LONGEST_NAME} visible characters")
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise ValueError("sha256 is 64 digits of hexadecimal")
        if type(self.requests_a_minute) is not int or self.requests_a_minute < 0:
            raise ValueError("requests_a_minute is a whole number from 0")
        _ = self.expiry

    @property
    def expiry(self) -> float:
        """When it ends, in unix seconds. A time without a zone is of UTC."""
        if self.expires is None:
            return float("inf")
        found = datetime.fromisoformat(self.expires)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


@dataclass
class _RequestBucket:
    """What is left of a token's requests: it fills evenly, up to those of a minute."""

    left: float
    filled: float


@dataclass
class BearerTokens:
    """The tokens of a file. A changed file is read again, so that a token can be taken away."""

    path: Path
    _entries: tuple[BearerToken, ...] = ()
    _stamp: tuple[int, ...] = ()
    _buckets: dict[str, _RequestBucket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._entries, self._stamp = _read(self.path)

    def check(self, header: str | None) -> BearerToken:
        """Return the entry of an Authorization header. Raises ApiError with 401 or 429."""
        self._read_again()
        scheme, _, given = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise _refused("a bearer token is missing: send the header Authorization: Bearer …")
        digest = hashlib.sha256(given.strip().encode("utf-8", "replace")).hexdigest()
        found = None
        # All entries, whichever fits: the time says nothing of them.
        for entry in self._entries:
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        if found is None:
            raise _refused("the bearer token is not known here")
        if found.expiry <= time.time():
            raise _refused(f"the bearer token of {found.name} has expired; ask for another")
        self._count(found)
        return found

    def _count(self, entry: BearerToken) -> None:
        most, now = entry.requests_a_minute, time.monotonic()
        if not most:
            return
        bucket = self._buckets.setdefault(entry.name, _RequestBucket(most, now))
        bucket.left += (now - bucket.filled) * most / MINUTE_SECONDS
        bucket.left, bucket.filled = min(bucket.left, most), now
        if bucket.left < 1:
            seconds = (1 - bucket.left) * MINUTE_SECONDS / most
            reason = f"the token {entry.name} may ask {most} times a minute; wait {seconds:.0f} s"
            raise retry_later(429, reason, seconds, "rate_limit_exceeded")
        bucket.left -= 1

    def _read_again(self) -> None:
        try:
            if _stamp_of(self.path.stat()) == self._stamp:
                return
            self._entries, self._stamp = _read(self.path)
        except (OSError, UsageError):
            # A file that is gone or wrong lets nobody in: its owner may have meant that.
            self._entries, self._stamp = (), ()


def new_token(path: Path, name: str, days: float | None = None, requests_a_minute: int = 0) -> str:
    """Add a token to the file, which is made where it is missing, and return it: only here is it
    known. Raises UsageError for a name that is there, and where the file cannot be used.
    """
    entries = _read(path)[0] if os.path.lexists(path) else ()
    if any(entry.name == name for entry in entries):
        raise UsageError(f"{path} has a token named {name!r}; take another name")
    token = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    expires = None
    if days is not None:
        try:
            end = datetime.now(UTC) + timedelta(days=days)
        except OverflowError as failure:
            raise UsageError(f"--days {days:g} ends after the year 9999; give fewer") from failure
        expires = end.isoformat(timespec="seconds")
    digest = hashlib.sha256(token.encode()).hexdigest()
    try:
        entry = BearerToken(name, digest, expires, requests_a_minute)
    except ValueError as failure:
        raise UsageError(f"the new token's {failure}") from failure
    text = "".join(to_json(asdict(each)) + "\n" for each in (*entries, entry))
    try:
        with replacing(path, plain=True) as temporary:
            # Others never see it, whatever the umask is.
            made = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(made, "w", encoding="utf-8") as file:
                file.write(text)
    except OSError as failure:
        raise UsageError(f"cannot write {explain(failure, path)}") from failure
    return token


def _read(path: Path) -> tuple[tuple[BearerToken, ...], tuple[int, ...]]:
    """Read the file and its stamp. Raises UsageError where others may read it, or it is wrong."""
    try:
        found = path.stat()
        text = read_plain(path, most=LONGEST_FILE).decode()
    except OSError as failure:
        raise UsageError(f"cannot read the tokens {explain(failure, path)}") from failure
    except UnicodeDecodeError as failure:
        raise UsageError(f"the tokens {path} are not UTF-8; write the file again") from failure
    if found.st_mode & OTHERS:
        raise UsageError(
            f"{path} has the mode {stat.S_IMODE(found.st_mode):04o}, and others may use it; "
            f"chmod 600 {path}"
        )
    entries: dict[str, BearerToken] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = _entry(from_json(line))
        except (ValueError, TypeError) as failure:
            # The line itself is not shown: a token may be in it by mistake.
            raise UsageError(f"{path}, line {number}: {failure}; correct or remove it") from None
        if entry.name in entries:
            raise UsageError(f"{path}, line {number}: the name {entry.name!r} is there twice")
        entries[entry.name] = entry
    return tuple(entries.values()), _stamp_of(found)


def _entry(value: Any) -> BearerToken:
    if not isinstance(value, Mapping) or not {"name", "sha256"} <= value.keys() <= FIELDS:
        raise ValueError(f"a token is an object with {', '.join(sorted(FIELDS))}")
    return BearerToken(**value)


def _stamp_of(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode


def _refused(reason: str) -> ApiError:
    return ApiError(401, reason, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
