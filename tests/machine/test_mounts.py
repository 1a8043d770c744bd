import pytest

from mpillm.machine.mounts import hdf5_file_locking, mount_of, mounts_of, read_mounts

MOUNTS = (
    "22 27 0:21 / /proc rw - proc proc rw\n27 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n"
    "40 27 0:50 / /scratch rw - lustre mds:/scratch rw\n"
    "41 40 0:51 / /scratch/my\\040data rw - nfs4 server:/x rw\n"
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


MOUNTINFO = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:30 / /homes rw - nfs server:/homes rw,vers=3
31 22 0:31 / /homes/new rw - nfs4 server:/new rw
40 22 0:40 / /scratch rw - lustre 10.0.0.1@tcp:/s rw,checksum,noflock
41 22 0:41 / /flocked rw shared:5 master:2 - lustre 10.0.0.1@tcp:/f rw,flock
42 22 0:42 / /with\040space rw - dvs /x rw
50 22 0:50 / /gpfs rw - gpfs gpfs rw
short line
"""


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/data", ""),
        ("/homes/me/run", "FALSE"),
        ("/homes", "FALSE"),
        ("/homesick", ""),
        ("/homes/new/run", ""),
        ("/scratch/run", "FALSE"),
        ("/flocked/run", ""),
        ("/with space/run", "FALSE"),
        ("/gpfs/run", ""),
    ],
)
def test_hdf5_locks_where_the_file_system_can(path: str, wanted: str) -> None:
    assert hdf5_file_locking(None, ["/data", path], mounts_of(MOUNTINFO)) == wanted
    assert hdf5_file_locking(True, [path], []) == "TRUE"
    assert hdf5_file_locking(False, [path], []) == "FALSE"
