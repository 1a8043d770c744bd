"""Whether the server takes requests, and the bounds of each request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HttpLimits:
    """Bounds of each request."""

    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    """For the body to arrive."""
    head_seconds: float = 30.0
    """For the head of a request: a client that never ends it would hold its connection."""
    answer_seconds: float = 600.0
    connections: int = 1024


@dataclass
class Lifetime:
    """The state that a signal or the job's end changes."""

    retry_seconds: float = 60.0
    """When a client may ask again while the server drains: by then another job may serve."""
    draining: bool = False
    open_requests: int = 0
