"""Write tensors into a safetensors file that others read."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mpillm.errors import CheckpointError
from mpillm.system.atomic import flush


def write_tensors(path: Path, tensors: Mapping[str, Tensor], like: Path) -> None:
    """Write contiguous tensors by name to `path`, with the access rights of the file `like`.

    Raises CheckpointError where they cannot be written.
    """
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
        # The library's files are the owner's alone.
        path.chmod(like.stat().st_mode & 0o777)
        flush(path)
    except Exception as failure:
        raise CheckpointError(f"cannot write {path.name}: {failure}; free some space") from failure
