"""Where a server listens: what is refused, and which TLS it speaks."""

import shutil
import socket
import ssl
import subprocess
import urllib.request
from pathlib import Path

import pytest

from mpillm.errors import UsageError
from mpillm.infer.serve.http.bearer_tokens import new_token
from mpillm.infer.serve.http.listening import (
    ListeningOptions,
    open_listener,
    tls_context,
    tunnel_command,
)
from tests.infer.serve.http.served import serving

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(scope="module")
def folder_of_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two keys with certificates for this host."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("one", "two"):
        words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        words += ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", "/CN=localhost"]
        words += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True)
        (folder / f"{name}.key").chmod(0o600)
    return folder


def test_a_port_in_use_is_named() -> None:
    with open_listener(ListeningOptions(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port}: Address already in use"):
            open_listener(ListeningOptions(port=port))
    with pytest.raises(UsageError, match="no address of this host"):
        open_listener(ListeningOptions("no-such-host.invalid"))


def test_other_hosts_need_tokens_and_tls(tmp_path: Path) -> None:
    file, key = tmp_path / "tokens", tmp_path / "key"
    for options in (
        ListeningOptions("0.0.0.0", 0),
        ListeningOptions("0.0.0.0", 0, tokens=file),
        ListeningOptions("0.0.0.0", 0, certificate=key, key=key),
        ListeningOptions("::", 0, tokens=file),
    ):
        with pytest.raises(UsageError, match="reached from other hosts"):
            open_listener(options)
    with open_listener(ListeningOptions("0.0.0.0", 0, file, key, key)):
        pass
    with pytest.raises(UsageError, match="give --key"):
        ListeningOptions(certificate=key)


def test_a_key_must_fit_its_certificate(folder_of_keys: Path, tmp_path: Path) -> None:
    certificate, key = folder_of_keys / "one.pem", folder_of_keys / "one.key"

    def refused(certificate: Path, key: Path, reason: str) -> None:
        with pytest.raises(UsageError, match=reason):
            tls_context(ListeningOptions(certificate=certificate, key=key))

    refused(certificate, folder_of_keys / "two.key", "does not fit the key")
    refused(certificate, tmp_path / "none", "cannot read")
    refused(key, key, "cannot be used")
    key.chmod(0o644)
    refused(certificate, key, "chmod 600")
    key.chmod(0o600)
    locked = tmp_path / "locked.key"
    openssl = ["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:abc", "-out", locked]
    subprocess.run(openssl, check=True, capture_output=True)
    locked.chmod(0o600)
    refused(certificate, locked, "is encrypted")


def test_tls_is_new_enough(folder_of_keys: Path, tmp_path: Path) -> None:
    """By `openssl s_client`, and a client that checks the certificate."""
    certificate, tokens = folder_of_keys / "one.pem", tmp_path / "tokens"
    token = new_token(tokens, "anna")
    options = ListeningOptions(
        "localhost", 0, tokens=tokens, certificate=certificate, key=folder_of_keys / "one.key"
    )
    with serving(options=options) as server:
        port = server.url.rpartition(":")[2]
        place = ["openssl", "s_client", "-connect", f"localhost:{port}", "-CAfile", certificate]
        for version, works in (("-tls1_1", False), ("-tls1_2", True), ("-tls1_3", True)):
            done = subprocess.run([*place, version], input=b"", capture_output=True, check=False)
            assert (b"BEGIN CERTIFICATE" in done.stdout) == works, done.stdout
            assert not works or b"Verify return code: 0 (ok)" in done.stdout
        request = urllib.request.Request(
            f"{server.url}/v1/models", headers={"Authorization": f"Bearer {token}"}
        )
        context = ssl.create_default_context(cafile=str(certificate))
        with urllib.request.urlopen(request, context=context) as answer:
            assert answer.status == 200
        # One that speaks no TLS harms nobody.
        with socket.create_connection(("localhost", int(port))) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with urllib.request.urlopen(request, context=context) as answer:
            assert answer.status == 200


def test_the_tunnel_leads_through_the_login_node() -> None:
    assert tunnel_command(8000, "node7", "login1") == (
        "ssh -N -L 8000:127.0.0.1:8000 -J login1 node7"
    )
    assert tunnel_command(80, "here", "here") == "ssh -N -L 80:127.0.0.1:80 here"
