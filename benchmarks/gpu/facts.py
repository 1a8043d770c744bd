"""Gather what the figures depend on: chip, driver, torch, CuPy, NCCL, MPI, and what MPI takes.

python benchmarks/gpu/facts.py --out facts.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

# The probe of MPI tries each operation in a child process; one may hang.
CHILD_SECONDS, ALL_SECONDS = 15.0, 25.0
MPI = "from mpi4py import MPI; print(MPI.Get_library_version().strip(chr(0)))"


def chip() -> str:
    """Name the GPU as its driver does, with its memory and the number of such GPUs."""
    if not torch.cuda.is_available():
        return platform.processor() or platform.machine()
    facts, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    times = f"{count} × " if count > 1 else ""
    return f"{times}{facts.name}, {facts.total_memory / 2**30:.0f} GiB"


def driver() -> str:
    """Read the driver's version from nvidia-smi, or from the kernel's module."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, text=True, capture_output=True, timeout=20, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        for module in ("nvidia", "amdgpu"):
            path = Path("/sys/module") / module / "version"
            if path.exists():
                return path.read_text().strip()
    return ""


def torch_build() -> str:
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    runtime = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "the CPU"
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return f"{torch.__version__} for {runtime}" + (f", cuDNN {cudnn}" if cudnn else "")


def cupy_build() -> str:
    import cupy

    return str(cupy.__version__)


def nccl_versions() -> str:
    """Name the NCCL of torch, and the one that CuPy loads, which mpillm takes."""
    found = []
    if torch.cuda.is_available():
        found.append(f"torch's {'.'.join(map(str, torch.cuda.nccl.version()))}")
    try:
        from cupy.cuda import nccl

        if nccl.available:
            number = nccl.get_version()
            found.append(f"CuPy's {number // 10000}.{number // 100 % 100}.{number % 100}")
    except ImportError:
        pass
    return ", ".join(found)


def triton_version() -> str:
    import triton

    return str(triton.__version__)


def mpi_library() -> str:
    """Ask for the library's name in a process of its own, which a wrong library would end."""
    command = [sys.executable, "-c", MPI]
    done = subprocess.run(command, text=True, capture_output=True, timeout=30, check=True)
    return done.stdout.splitlines()[0].split(",")[0].strip()


def mpi_and_gpus() -> str:
    """Say which operations this MPI takes GPU memory in, by mpillm's probe."""
    from mpillm.comm.gpu.probe import probe

    found = probe(os.environ, child_seconds=CHILD_SECONDS, all_seconds=ALL_SECONDS)
    able = [name for name, well in found.items() if well]
    if len(able) == len(found):
        return "takes GPU memory in all operations"
    return f"takes GPU memory in {', '.join(able)}" if able else "takes no GPU memory"


def tried(ask: Callable[[], str]) -> str:
    """Ask; where that fails, say why."""
    try:
        return ask() or "unknown"
    except subprocess.TimeoutExpired:
        return "not found: it took too long"
    except subprocess.CalledProcessError as failure:
        last = (failure.stderr.strip().splitlines() or [f"exit code {failure.returncode}"])[-1]
        return f"not found: {last}"
    except Exception as failure:
        return f"not found: {failure}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    asked = {
        "chip": chip,
        "driver": driver,
        "torch": torch_build,
        "Triton": triton_version,
        "CuPy": cupy_build,
        "NCCL": nccl_versions,
        "MPI": mpi_library,
        "MPI and GPUs": mpi_and_gpus,
    }
    facts = {name: tried(ask) for name, ask in asked.items()}
    facts["host"] = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
