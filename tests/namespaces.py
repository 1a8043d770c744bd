"""A host with other mounts, for tests: a small /dev/shm, little memory, no network."""

import os
import shutil
import subprocess

import pytest


def namespace(script: str, *kinds: str) -> list[str]:
    """Make a command prefix that runs `script` and the rest in namespaces; skip without any."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *user, *(f"--{kind}" for kind in kinds or ("mount",))]
    if (
        not shutil.which("unshare")
        or subprocess.run([*command, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("the kernel gives no namespaces; be root, or allow user namespaces")
    return [*command, "sh", "-c", f'{script} && exec "$@"', "sh"]
