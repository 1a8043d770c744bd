"""Run sampled programs with their tests and print pass@k: the work of `mpillm programs`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.errors import UsageError
from mpillm.infer.programs.problem_files import ProblemSet, read_problem_set
from mpillm.infer.programs.run_programs import ProgramLimits, score_programs
from mpillm.infer.scores.print_scores import print_scores
from mpillm.infer.scores.score_texts import SAMPLES
from mpillm.system.console import Console, binary_bytes, counted
from mpillm.system.json_text import to_json
from mpillm.tasks.metrics.metric_catalog import check_metrics, make_metrics, metrics_of
from mpillm.tasks.metrics.pass_at_k import PassAtK

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class ProgramOptions:
    """What is asked of `mpillm programs`. `allowed`: whether programs may be run at all."""

    allowed: bool
    metrics: Sequence[str] = ()
    limits: ProgramLimits = field(default_factory=ProgramLimits)
    as_json: bool = False


def print_programs(
    problems: Path,
    samples: Path,
    options: ProgramOptions,
    comm: "MPI.Intracomm",
    console: Console,
) -> None:
    """Score problems by their samples that pass. Every rank calls it, and runs its share.

    Raises DataError for a faulty file; UsageError where running was not allowed, for a metric of
    something else, for too few samples, and where the host has no sandbox.
    """
    check_metrics(options.metrics, "of problems", SAMPLES)
    given = comm.bcast(on_root(comm, lambda: read_problem_set(problems, samples)))
    least = min(len(own) for own in given.programs)
    names = options.metrics or _that_fit(least)
    count = sum(len(own) for own in given.programs)
    if not options.allowed:
        limits = f"{options.limits.seconds} s and {binary_bytes(options.limits.memory_bytes)}"
        raise UsageError(
            f"{samples} has {counted(count, 'program')} that a model wrote, and scoring runs them "
            "on this host; allow it with --run-programs: each runs in a sandbox of its own, of "
            f"{limits}, without network and without your files"
        )
    score = score_programs(given.programs, names, comm, options.limits)
    if options.as_json:
        found = _facts(problems, samples, given) | {
            "values": score.values,
            "intervals": score.intervals,
        }
        console.write(to_json(found) + "\n")
        return
    title = (
        f"{samples}: n = {counted(len(given.names), 'problem')}, {counted(count, 'program')}, "
        f"{least:,} or more of each, with 95% intervals"
    )
    print_scores(title, {"model": score}, make_metrics(names), console)


def _that_fit(least: int) -> list[str]:
    """Return the metrics for which each problem has enough samples."""
    names = metrics_of(PassAtK)
    sizes = {metric.name: metric.k for metric in make_metrics(names) if isinstance(metric, PassAtK)}
    return [name for name in names if sizes[name] <= least]


def _facts(problems: Path, samples: Path, given: ProblemSet) -> dict[str, object]:
    return {
        "problems_file": str(problems),
        "samples_file": str(samples),
        "problems": len(given.names),
        "programs": sum(len(own) for own in given.programs),
    }
