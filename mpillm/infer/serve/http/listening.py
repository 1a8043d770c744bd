"""The address that a server listens at, and the certificate that it shows there."""

import ipaddress
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from mpillm.errors import UsageError
from mpillm.system.messages import explain


@dataclass(frozen=True)
class ListeningOptions:
    """Where to listen, and what guards the place. Raises UsageError where that is not safe."""

    host: str = "127.0.0.1"
    port: int = 8000
    tokens: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            missing = "--key" if self.key is None else "--certificate"
            raise UsageError(f"TLS needs a certificate and its key; give {missing}, too")

    def check_safe(self, addresses: list[str]) -> None:
        """Raise UsageError where others reach one of `addresses`, and no token or TLS is asked."""
        open_ones = [each for each in addresses if not ipaddress.ip_address(each).is_loopback]
        if open_ones and (self.tokens is None or self.certificate is None):
            raise UsageError(
                f"--host {self.host} is reached from other hosts ({open_ones[0]}): give --tokens "
                "FILE, and --certificate FILE with --key FILE; or leave --host out, and reach the "
                "server through an ssh tunnel"
            )


def open_listener(options: ListeningOptions) -> socket.socket:
    """Bind a socket: it listens when the server is ready. Raises UsageError with the reason."""
    try:
        found = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise UsageError(
            f"--host {options.host!r} is no address of this host: {reason}; give 127.0.0.1, or "
            "leave it out"
        ) from failure
    options.check_safe([str(place[0]).partition("%")[0] for *_, place in found])
    family, kind, protocol, _, place = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        # A port in use shows here for some kinds of sockets only.
        listener.listen(1)
    except OSError as failure:
        listener.close()
        raise UsageError(
            f"cannot listen at {options.host}, port {options.port}: {failure.strerror}; take "
            "another --port, or 0 for any that is free"
        ) from failure
    return listener


def tls_context(options: ListeningOptions) -> ssl.SSLContext | None:
    """Load the certificate and its key; None without. Raises UsageError where they don't fit."""
    if options.certificate is None or options.key is None:
        return None
    for path in (options.certificate, options.key):
        try:
            with path.open("rb"):
                mode = path.stat().st_mode
        except OSError as failure:
            raise UsageError(f"cannot read {explain(failure, path)}") from failure
    if mode & stat.S_IRWXO:
        raise UsageError(
            f"the key {options.key} has the mode {stat.S_IMODE(mode):04o}, and anybody on this "
            f"host may use it; chmod 600 {options.key}"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(options.certificate, options.key, password=_refuse_password)
    except (ssl.SSLError, OSError, ValueError) as failure:
        raise UsageError(_reason(failure, options)) from failure
    return context


def _refuse_password() -> str:
    raise ValueError("encrypted")


def _reason(failure: Exception, options: ListeningOptions) -> str:
    what = str(failure)
    if what == "encrypted":
        return f"the key {options.key} is encrypted, and a job cannot type its password; decrypt it"
    if "MISMATCH" in what.upper():
        return (
            f"the certificate {options.certificate} does not fit the key {options.key}; give the "
            "key that it was made with"
        )
    return (
        f"the certificate {options.certificate} and the key {options.key} cannot be used ({what}); "
        "give PEM files"
    )


def url_of(listener: socket.socket, host: str, secure: bool) -> str:
    """Return the address to open, such as http://127.0.0.1:8000."""
    port = listener.getsockname()[1]
    shown = socket.gethostname() if host in ("", "0.0.0.0", "::") else host
    shown = f"[{shown}]" if ":" in shown else shown
    return f"http{'s' * secure}://{shown}:{port}"


def tunnel_command(port: int, host: str, submit_host: str) -> str:
    """Return the command that leads a port of a user's own machine to a compute node's.

    `submit_host`: the login node, if known.
    """
    jump = f" -J {submit_host}" if submit_host and submit_host != host else ""
    return f"ssh -N -L {port}:127.0.0.1:{port}{jump} {host}"
