"""Run the benchmarks of `mpillm bench`, print the results and write the files."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.bench.bench_options import COLLECTIVES, STDOUT, BenchOptions
from mpillm.bench.collectives import run_collective
from mpillm.bench.context import BenchContext, header
from mpillm.bench.filesystem import run_filesystem
from mpillm.bench.gemm import run_gemm
from mpillm.bench.handover import run_handover
from mpillm.bench.make_profile import SavedProfile, make_profile
from mpillm.bench.memory_bandwidth import run_memory
from mpillm.bench.overlap import run_overlap
from mpillm.bench.plot import draw_bandwidth, drawn
from mpillm.bench.point_to_point import run_message_rate, run_pairs
from mpillm.bench.results import Section, as_csv, as_json, print_sections
from mpillm.bench.sample_arrays import check_memory
from mpillm.comm.communicator import Communicator
from mpillm.comm.failure import on_root
from mpillm.comm.gpu.probe import probe
from mpillm.errors import UsageError
from mpillm.machine.cluster_profile import Cluster, ClusterProfile, describe_cluster, load_profile
from mpillm.machine.node_map import NodeMap, map_nodes
from mpillm.system.atomic import check_outputs, write_text
from mpillm.system.console import Console
from mpillm.system.extras import require_packages
from mpillm.system.malloc import keep_pages
from mpillm.system.messages import explain

if TYPE_CHECKING:
    from mpi4py import MPI


def run_benchmarks(
    options: BenchOptions,
    comm: "MPI.Intracomm",
    console: Console,
    environment: Mapping[str, str] | None = None,
    node_map: NodeMap | None = None,
) -> None:
    """Measure, print and write what `options` ask for. Every rank of `comm` calls it with equal
    options.

    Raises UsageError for what cannot run here. `environment`: the process's, for the child that
    probes MPI with a GPU's memory; None: no probe.
    `node_map`: of `comm`, else MPI is asked.
    """
    if options.plot is not None:
        # Before anything is measured: a long run must not end in a picture that cannot be drawn.
        require_packages("bench --plot", "matplotlib")
    saved = on_root(comm, lambda: _check_places(options))
    node_map = node_map or map_nodes(comm)
    _check_device(options, node_map.local_rank(comm.rank))
    check_memory(options, comm, node_map)
    quiet = Console(speaks=False) if options.quiet else console
    cluster = describe_cluster(comm, node_map)
    profile = load_profile(options.profile, quiet.warn, cluster) if options.profile else None
    kept = options.buffers == "warm" and keep_pages()
    gpu: dict[str, Any] = {}
    if options.device == "cuda":
        known = profile or ClusterProfile("", cluster)
        gpu = {**known.gpu_probe, **on_root(comm, lambda: _gpu_facts(environment))}
        # The Communicator of this run already chooses by the probe.
        profile = replace(known, gpu_probe=gpu)
    group = Communicator(comm, profile=profile, warn=quiet.warn, node_map=node_map)
    bench = BenchContext(options, comm, group, quiet)
    facts = header(bench, cluster, kept)
    sections = [section for what in options.benchmarks() for section in _measure(bench, what)]
    group.free()
    faults = on_root(comm, lambda: _write(bench, sections, cluster, facts, gpu, saved))
    if options.as_json:
        console.write(as_json(facts, sections, bench.notes))
    elif options.csv == STDOUT:
        console.write(as_csv(sections))
    else:
        print_sections(facts, sections, bench.notes, console)
    if faults:
        # After the figures, which are not measured again for the sake of a file.
        raise UsageError("; ".join(faults))


def _measure(bench: BenchContext, what: str) -> list[Section]:
    if what in COLLECTIVES:
        return run_collective(bench, what)
    others: dict[str, Callable[[BenchContext], list[Section]]] = {
        "overlap": run_overlap,
        "memory": run_memory,
        "gemm": run_gemm,
        "message-rate": run_message_rate,
        "handover": run_handover,
        "filesystem": run_filesystem,
    }
    return others[what](bench) if what in others else run_pairs(bench, what)


def _check_places(options: BenchOptions) -> SavedProfile | None:
    """Fail before measuring where a file of the options cannot be written."""
    check_outputs({"--csv": options.csv_file, "--plot": options.plot, "--save": options.save})
    return SavedProfile.find(options.save) if options.save is not None else None


def _check_device(options: BenchOptions, local_rank: int) -> None:
    """Take this rank's GPU, those of a node in turn; raise UsageError without a GPU."""
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError(
                f"--device cuda needs a GPU and a torch built for it, "
                f"this is torch {torch.__version__}"
            )
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def _write(
    bench: BenchContext,
    sections: list[Section],
    cluster: Cluster,
    facts: dict[str, str],
    gpu: Mapping[str, Any],
    saved: SavedProfile | None,
) -> list[str]:
    """Write the files that were asked for, and return what could not be; rank 0 calls it."""
    options, size = bench.options, bench.comm.size

    def profile() -> None:
        assert saved is not None
        made = make_profile(sections, cluster, size, options.device, facts["date"], gpu)
        if (place := saved.write(made)) != saved.path:
            bench.note(f"{saved.path} was written by another run meanwhile: this one is in {place}")

    works: list[tuple[Path, Callable[[], None]]] = []
    if (table := options.csv_file) is not None:
        works.append((table, lambda: write_text(table, as_csv(sections))))
    if options.plot is not None and drawn(sections, size):
        plot = options.plot
        works.append((plot, lambda: draw_bandwidth(sections, size, plot)))
    elif options.plot is not None:
        bench.note(f"no picture: {options.what} measures no bandwidth over size")
    if saved is not None:
        works.append((saved.path, profile))
    return [fault for path, work in works if (fault := _fault(path, work))]


def _fault(path: Path, work: Callable[[], None]) -> str:
    """Write one file; return why that failed, "" where it did not."""
    try:
        work()
    except OSError as failure:
        return f"cannot write {explain(failure, path)}"
    except UsageError as failure:
        return str(failure)
    # The next file may still be written, and the figures are not measured again: whatever
    # matplotlib raises takes its own picture alone.
    except Exception as failure:
        return f"cannot write {path}: {type(failure).__name__}: {failure}"
    return ""


def _gpu_facts(environment: Mapping[str, str] | None) -> dict[str, Any]:
    """Describe the GPUs of rank 0's node; `mpi`: operations that take their memory."""
    import torch

    taken = {} if environment is None else {"mpi": probe(environment)}
    return {"device": torch.cuda.get_device_name(), "devices": torch.cuda.device_count()} | taken
