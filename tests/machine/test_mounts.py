import pytest

from mpillm.machine.mounts import mount_of, mounts_of, read_mounts

MOUNTS = (
    "22 27 0:21 / /proc rw - proc proc rw\n27 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n"
    "40 27 0:50 / /scratch rw - lustre mds:/scratch rw\n41 40 0:51 / /scratch/my\\040data rw - nfs4 server:/x rw\n"
    "42 27 0:52 / /tmp rw - xfs /dev/vdb rw\n43 27 0:53 / /tmp rw - tmpfs tmpfs rw\n"
)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/apps/me", "ext4"),
        ("/scratch", "lustre"),
        ("/scratches", "ext4"),
        ("/scratch/my data/run", "nfs4"),
        ("/tmp/x", "tmpfs"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    mount = mount_of(path, mounts_of(MOUNTS))
    assert mount is not None
    assert mount.kind == kind
    assert mount_of(path, []) is None


def test_this_machine_has_a_root() -> None:
    mount = mount_of("/", read_mounts())
    assert mount is not None
    assert mount.place == "/"
