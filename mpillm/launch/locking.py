"""Whether HDF5 should lock its files, by the file systems that they lie on."""

from collections.abc import Iterable, Sequence

from mpillm.machine.mounts import Mount, mount_of


def locks_fail(mount: Mount) -> bool:
    """Whether file locks are known to fail or to hang there.

    Lustre has them only where it is mounted with flock or localflock; NFS before version 4 needs a lock daemon, which
    compute nodes often lack; Cray's DVS passes none on. Locks of GPFS, BeeGFS, NFS 4 and local disks work.
    """
    if mount.kind == "lustre":
        return not mount.options & {"flock", "localflock"}
    return mount.kind in ("nfs", "dvs")


def hdf5_file_locking(wish: bool | None, paths: Iterable[str], mounts: Sequence[Mount]) -> str:
    """What HDF5_USE_FILE_LOCKING should be: the site's wish, else FALSE where a path's file system has no locks, else
    empty, which leaves it to HDF5. `paths` are whole.
    """
    if wish is not None:
        return "TRUE" if wish else "FALSE"
    under = [mount_of(path, mounts) for path in paths]
    return "FALSE" if any(mount is not None and locks_fail(mount) for mount in under) else ""
