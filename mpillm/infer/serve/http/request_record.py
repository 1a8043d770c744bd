"""What the metrics and the audit log know of a request: numbers and names, no contents."""

import time
from dataclasses import dataclass, field
from typing import Any

from mpillm.infer.serve.http.text_answers import TextDelta


@dataclass
class RequestRecord:
    """One request, from its head to the end of its answer."""

    route: str
    method: str
    token: str = ""
    """The name of the bearer token; "" where none is asked for."""
    model: str = ""
    status: int = 0
    stream: bool = False
    usage: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    first_token_seconds: float | None = None

    def note_delta(self, delta: TextDelta) -> None:
        """Take the time of the first text."""
        if self.first_token_seconds is None and delta.text:
            self.first_token_seconds = self.seconds

    @property
    def seconds(self) -> float:
        """The time since the request came."""
        return time.monotonic() - self.started

    def count(self, name: str) -> int:
        """Return a count of `usage`, such as `prompt_tokens`."""
        return int(self.usage.get(name, 0))
