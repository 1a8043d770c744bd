"""Who asked for what, and when: a line a request, without a word of what was written."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from mpillm.errors import UsageError
from mpillm.infer.serve.http.request_record import RequestRecord
from mpillm.system.json_text import to_json
from mpillm.system.messages import explain


class AuditLog:
    """A file of JSON lines that grows, with the mode 0600 where it is made here."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        """Open the file. Raises UsageError where it cannot be written.

        `warn`: called once where a line cannot be written later, such as on a full disk.
        """
        self._path, self._warn = path, warn
        # Without waiting: a pipe that nobody reads is refused.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self._file = os.open(path, flags, 0o600)
        except OSError as failure:
            raise UsageError(f"cannot write the audit log {explain(failure, path)}") from failure
        self._failed = False

    def write(self, record: RequestRecord) -> None:
        """Append the line of a request that has ended."""
        line = to_json(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "token": record.token or None,
                "method": record.method,
                "route": record.route,
                "model": record.model or None,
                "status": record.status,
                "stream": record.stream,
                "prompt_tokens": record.count("prompt_tokens"),
                "completion_tokens": record.count("completion_tokens"),
                "seconds": round(record.seconds, 4),
            }
        )
        try:
            # One write a line: those of two servers do not mix.
            os.write(self._file, f"{line}\n".encode())
        except OSError as failure:
            if not self._failed:
                self._failed = True
                self._warn(f"the audit log has gaps: {explain(failure, self._path)}")

    def close(self) -> None:
        os.close(self._file)
