"""The front door: one short function a verb. Rooms are imported inside the verbs, so that `--help` loads none."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpillm.launch.launchers import rank_from_environment
from mpillm.system.console import Console

if TYPE_CHECKING:
    from mpi4py import MPI

app = typer.Typer(
    name="mpillm",
    help="Train large language models on classic HPC clusters, over MPI alone. Each verb runs with or without mpirun.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Trained = Annotated[
    Path,
    typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, or one of its checkpoints."),
]


@dataclass(frozen=True)
class Job:
    """What each verb is handed: all ranks, a voice, and this rank's number of threads."""

    comm: "MPI.Intracomm"
    console: Console
    threads: int


@contextmanager
def _job(debug: bool, torch_threads: bool = False, stops_in_order: bool = False) -> Iterator[Job]:
    """Open MPI, let ranks fail together, and give each its share of the cores. `stops_in_order`: the verb itself sees
    to the signals that ask to stop.
    """
    from mpillm.comm.failure import fail_together
    from mpillm.comm.world import open_world
    from mpillm.launch.launchers import watched
    from mpillm.launch.signals import interrupt_on_terminate
    from mpillm.launch.singleton import one_voice, refuse_before_init, refuse_lonely_ranks
    from mpillm.launch.threads import threads_per_rank

    if not stops_in_order:
        interrupt_on_terminate()
    with fail_together(None, debug=debug), one_voice(os.environ):
        comm = open_world(lambda library: refuse_before_init(os.environ, library))
        from mpi4py import MPI

        refuse_lonely_ranks(os.environ, comm.size, MPI.Get_library_version())
    with fail_together(comm, debug=debug):
        threads = threads_per_rank(comm, os.environ)
        # The tokenizers' own thread pool reads its size from the environment alone.
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        if torch_threads:
            import torch

            torch.set_num_threads(threads)
        yield Job(comm, Console(speaks=comm.rank == 0, watched=watched(os.environ)), threads)


@contextmanager
def _first_alone(debug: bool) -> Iterator[Console]:
    """For verbs that need one process and no MPI: under a launcher all but the first leave at once."""
    from mpillm.comm.failure import fail_together
    from mpillm.launch.launchers import watched

    if rank_from_environment(os.environ):
        raise typer.Exit
    with fail_together(None, debug=debug):
        yield Console(watched=watched(os.environ))


@app.command(
    epilog="Example: mpirun -n 2 mpillm prepare stdlib --out prepared/stdlib --vocab-size 4096"
)
def prepare(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE…",
            help="Text files, folders, .jsonl files (field text), or stdlib: the source of Python's own library.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make.")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="bpe (trained on the text), bytes, or a tokenizer.json.")
    ] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Tokens of the BPE, specials included.")] = 8192,
    validation: Annotated[
        float, typer.Option(help="The share of documents held out for validation.")
    ] = 0.05,
    glob: Annotated[str, typer.Option(help="Which files of a folder.")] = "**/*",
    end_of_text: Annotated[
        str | None, typer.Option(help="The token that ends a document, for a FILE tokenizer.")
    ] = None,
    shard_bytes: Annotated[int, typer.Option(help="Bytes of tokens in a shard, about.")] = 256
    << 20,
    seed: Annotated[int, typer.Option(help="Decides the documents' order and split.")] = 0,
    workers: Annotated[int, typer.Option(help="Threads a rank; 0: its share of the cores.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another dataset in --out.")
    ] = False,
    verify: Annotated[
        Path | None, typer.Option(help="Check every byte of a prepared folder instead.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Turn text into tokens: HDF5 shards and a manifest, the same bytes for any number of ranks."""
    if verify is None and (not sources or out is None):
        raise typer.BadParameter("name at least one SOURCE and --out DIR, or --verify DIR")
    if workers:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    with _job(debug) as job:
        from mpillm.tokens.prepare import PrepareOptions
        from mpillm.tokens.prepare import prepare as run
        from mpillm.tokens.verify import verify as check

        if verify is not None:
            check(verify, job.comm, job.console)
            return
        assert out is not None
        options = PrepareOptions(
            sources=tuple(sources or ()),
            out=out,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            validation=validation,
            glob=glob,
            workers=workers or job.threads,
            shard_bytes=shard_bytes,
            seed=seed,
            end_of_text=end_of_text,
            overwrite=overwrite,
        )
        run(options, job.comm, job.console)


@app.command(
    epilog="Example: mpirun -n 2 mpillm train jobs/recipes/quickstart.toml --set train.steps=200"
)
def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.toml", help="What to train, on what, and how.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a setting of the recipe."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")
    ] = False,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="Leave RUN/trace.json: when each rank did what, for Perfetto or Chrome."
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Tell where each rank is: host, cores, GPU.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a model as a recipe says, the data and the layers shared by the ranks.

    SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or SIGURG to any rank, or the end of the job's time: the run saves and leaves with
    exit code 75, and --resume goes on with it.
    """
    from mpillm.launch.current_job import current_job, job_end
    from mpillm.launch.signals import StopSignals

    begun, signals = time.time(), StopSignals()
    with _job(debug, torch_threads=True, stops_in_order=True) as job:
        from mpillm.launch.placement import print_placement
        from mpillm.train.loop import Allotment
        from mpillm.train.recipe import load_recipe
        from mpillm.train.setup import train as run

        print_placement(job.comm, os.environ, job.threads, job.console, verbose)
        allotment = Allotment(signals, current_job(os.environ), job_end(os.environ), begun)
        run(load_recipe(recipe, overrides or ()), job.comm, job.console, resume, trace, allotment)


@app.command(epilog="Example: mpirun -n 2 mpillm evaluate runs/quickstart --baselines")
def evaluate(
    trained: Trained,
    data: Annotated[
        Path | None, typer.Option(help="Another prepared folder than the run's own.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Score a unigram and a bigram model too.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Loss, perplexity and bits per byte over the whole validation set."""
    with _job(debug, torch_threads=True) as job:
        from mpillm.infer.print_results import print_evaluation

        print_evaluation(trained, data, baselines, as_json, job.comm, job.console)


@app.command(
    epilog="Example: mpillm generate runs/quickstart --prompt 'def ' --max-tokens 100 --seed 1"
)
def generate(
    trained: Trained,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens at the most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0: from all.")] = 50,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest that make up this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    debug: Debug = False,
) -> None:
    """Go on from a prompt; rank 0 computes and speaks."""
    with _job(debug, torch_threads=True) as job:
        from mpillm.infer.generate import Sampling
        from mpillm.infer.print_results import print_generation

        print_generation(
            trained,
            prompt,
            Sampling(max_tokens, temperature, top_k, top_p, seed),
            job.comm,
            job.console,
        )


@app.command(
    epilog="Example: mpirun -n 2 mpillm bench allreduce --sizes 64K:64M:x4 --check --plot allreduce.png"
)
def bench(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="allreduce, reduce-scatter, allgather, broadcast, reduce, alltoall, barrier, latency, bandwidth, "
            "bibw, message-rate, handover, overlap, memory, gemm, filesystem, or all.",
        ),
    ],
    sizes: Annotated[str, typer.Option(help="1K:256M:x2, 1M:4M:+1M or a list such as 64,1M.")] = "",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, int32 …; float32 where none is named.")
    ] = "",
    algorithms: Annotated[
        str,
        typer.Option(help="auto,native,shared,ring,gloo …; all that can run where none is named."),
    ] = "",
    iterations: Annotated[int, typer.Option(help="Rounds that are timed.")] = 20,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 3,
    check: Annotated[bool, typer.Option("--check", help="Count wrong elements.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    in_place: Annotated[
        bool, typer.Option("--in-place", help="The result replaces the data.")
    ] = False,
    buffers: Annotated[
        str, typer.Option(help="warm: the same each time; fresh: new pages each time.")
    ] = "warm",
    op: Annotated[str, typer.Option(help="sum, mean, max or min.")] = "sum",
    node_shared: Annotated[
        bool | None,
        typer.Option(
            "--node-shared/--private",
            help="Where the data lies; by default shared for auto and shared.",
        ),
    ] = None,
    as_json: Json = False,
    csv: Annotated[
        str, typer.Option(metavar="FILE", help="Write the figures; - prints them instead.")
    ] = "",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw bandwidth over size.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="PROFILE.json", help="Write the cluster profile.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="PROFILE.json", help="Let auto choose by it.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Which file system to measure.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure messages, memory, arithmetic and files as OSU and nccl-tests do, and write the cluster profile."""
    with _job(debug, torch_threads=True) as job:
        from mpillm.bench.filesystem import TrainingPaths
        from mpillm.bench.options import BenchOptions
        from mpillm.bench.run import run
        from mpillm.comm.mesh import on_one_node
        from mpillm.tokens.manifest import Manifest, Split
        from mpillm.tokens.reader import open_split
        from mpillm.tokens.shards import Documents, write_shard
        from mpillm.tokens.windows import ReadPlan
        from mpillm.weights.checkpoint import Checkpoint
        from mpillm.weights.saving import save as save_checkpoint

        if on_one_node(job.comm):
            # gloo, a peer, takes its network from the environment alone, and else from the host's name.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        options = BenchOptions(
            what=what,
            sizes=sizes,
            dtype=dtype,
            algorithms=algorithms,
            iterations=iterations,
            warmup=warmup,
            check=check,
            device=device,
            in_place=in_place,
            buffers=buffers,
            op=op,
            node_shared=node_shared,
            as_json=as_json,
            csv=csv,
            plot=plot,
            save=save,
            profile=profile,
            folder=folder,
            threads=job.threads,
        )
        paths = TrainingPaths(
            Documents,
            write_shard,
            Split,
            Manifest,
            open_split,
            ReadPlan,
            save_checkpoint,
            Checkpoint,
        )
        run(options, job.comm, job.console, paths, environment=dict(os.environ))


@app.command(epilog="Example: mpillm schedule 1f1b --stages 4 --microbatches 8 --svg 1f1b.svg")
def schedule(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipe-v, a .csv file, or all: a comparison.",
        ),
    ],
    stages: Annotated[
        int, typer.Option(metavar="P", help="Ranks of the pipeline; 0: as a .csv file has.")
    ] = 0,
    microbatches: Annotated[
        int, typer.Option(metavar="M", help="Microbatches; 0: as a .csv file has.")
    ] = 0,
    chunks: Annotated[
        int, typer.Option(metavar="V", help="Stages a rank; 0: as is usual for the schedule.")
    ] = 0,
    costs: Annotated[
        str,
        typer.Option(
            metavar="F,B,W,T",
            help="What a rank's forward, the input half and the weights half of its backward, and a message take.",
        ),
    ] = "1,1,1,0",
    svg: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the chart.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the chart.")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write the schedule, a row a rank.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a pipeline schedule, and tell how long ranks wait and what they store; no MPI, no torch."""
    with _first_alone(debug) as console:
        from mpillm.launch.launchers import watched
        from mpillm.parallel.pipeline.schedule_report import ScheduleOptions, print_schedule

        options = ScheduleOptions(
            name=name,
            ranks=stages,
            microbatches=microbatches,
            chunks=chunks,
            costs=costs,
            svg=svg,
            png=png,
            csv=csv,
            as_json=as_json,
            width=shutil.get_terminal_size((120, 24)).columns,
            coloured=watched(os.environ),
        )
        print_schedule(options, console)


@app.command(epilog="Example: mpirun -n 4 mpillm doctor /scratch/me --json")
def doctor(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH…",
            help="Folders that runs and data will lie in; else this one and the temporary one.",
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="PROFILE.json", help="A cluster profile to judge.")
    ] = None,
    hosts: Annotated[
        str, typer.Option(metavar="A,B,…", help="Hosts to reach; else those of the allocation.")
    ] = "",
    gpus: Annotated[int | None, typer.Option(help="GPUs that each host should have.")] = None,
    site: Annotated[
        Path | None, typer.Option(metavar="SITE.toml", help="Another site file than your own.")
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            metavar="package.module:Name", help="A check of your own, run after the others."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look for what would keep a run from starting or make it slow: alone, or under mpirun on every host."""
    from mpillm.comm.failure import fail_together
    from mpillm.launch.launchers import watched

    with fail_together(None, debug=debug):
        from mpillm.doctor.diagnose import diagnose
        from mpillm.doctor.options import DoctorOptions

        names = tuple(filter(None, hosts.split(",")))
        options = DoctorOptions(
            tuple(paths or ()), profile, names, gpus, site, as_json, tuple(check or ())
        )
        console = Console(
            speaks=rank_from_environment(os.environ) == 0, watched=watched(os.environ)
        )
        raise typer.Exit(diagnose(options, console, os.environ))


@app.command(
    epilog="Example: mpillm submit recipe.toml --nodes 2 --ranks-per-node 64 --time 12:00:00 --dry-run"
)
def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to train.")],
    nodes: Annotated[int, typer.Option(help="Nodes of the job.")],
    ranks_per_node: Annotated[int, typer.Option(help="Ranks on each.")],
    time: Annotated[str, typer.Option(help="Wall time: 1:30:00, 2-00:00:00, 90m, 2h.")],
    scheduler: Annotated[
        str, typer.Option(help="slurm, pbs, lsf, or auto: the one that is here.")
    ] = "auto",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a setting of the recipe."),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(metavar="SITE.toml", help="Instead of ~/.config/mpillm/site.toml."),
    ] = None,
    partition: Annotated[
        str, typer.Option(help="Slurm's partition, the queue of PBS and LSF.")
    ] = "",
    account: Annotated[str, typer.Option(help="The project that pays.")] = "",
    name: Annotated[str, typer.Option(help="The job's name; else the recipe's.")] = "",
    threads: Annotated[
        int, typer.Option(help="Threads a rank; 0: the node's cores shared out, or 1.")
    ] = 0,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs to ask for; else as the site file says.")
    ] = None,
    stage: Annotated[
        bool, typer.Option("--stage", help="Copy the shards to each node first.")
    ] = False,
    oversubscribe: Annotated[
        bool, typer.Option("--oversubscribe", help="Allow more threads than cores.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that is there.")
    ] = False,
    max_restarts: Annotated[
        int, typer.Option(help="How often a job that ran out of time is submitted again.")
    ] = 100,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the script, and do nothing.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a batch script beside the run, show it, and hand it to Slurm, PBS or LSF; no MPI, no torch."""
    with _first_alone(debug) as console:
        from mpillm.launch.site import load_site
        from mpillm.parallel.axis_sizes import mesh_sizes
        from mpillm.runs.submit import SubmitOptions, SubmittedRecipe, submit_run
        from mpillm.train.recipe import load_recipe, write_recipe

        options = SubmitOptions(
            nodes=nodes,
            ranks_per_node=ranks_per_node,
            time=time,
            scheduler=scheduler,
            partition=partition,
            account=account,
            name=name,
            threads=threads,
            gpus_per_node=gpus_per_node,
            stage=stage,
            oversubscribe=oversubscribe,
            resume=resume,
            max_restarts=max_restarts,
            dry_run=dry_run,
            as_json=as_json,
        )
        plan = load_recipe(recipe, overrides or ())
        submitted = SubmittedRecipe(
            recipe.stem, plan.train.run, plan.data.path, plan.parallel.profile, write_recipe(plan)
        )
        mesh_sizes(plan.parallel, options.ranks, plan.model, plan.train.batch)
        submit_run(options, submitted, load_site(site, os.environ), console, os.environ)


@app.command(epilog="Example: mpillm status runs/quickstart")
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Where a run stands: its last step, speed, time left, checkpoint and job; no MPI, no torch."""
    with _first_alone(debug) as console:
        from mpillm.launch.schedulers import job_state
        from mpillm.runs.status import print_status as tell

        tell(
            run,
            console,
            as_json,
            lambda scheduler, job: job_state(scheduler, job, os.environ) or "",
        )


@app.command(epilog="Example: mpillm report runs/quickstart --out quickstart.html")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Instead of RUN/report.html.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw a run as one HTML file that needs no network: curves, hosts, recipe, failures and restarts."""
    with _first_alone(debug) as console:
        from mpillm.runs.report.run_report import write_report as write

        write(run, console, out)


@app.callback(invoke_without_command=True)
def _door(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version (with --verbose: of all parts).")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Tell more.")] = False,
) -> None:
    if version:
        from mpillm.system.versions import package_version, versions

        if verbose:
            Console().facts("versions", versions())
        else:
            Console().say(f"mpillm {package_version('mpillm')}")
        raise typer.Exit


def main() -> None:
    """Run the command line; help and mistakes in typing are told once, by the first rank."""
    rank = rank_from_environment(os.environ)
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    try:
        code = app(standalone_mode=False)
    except Exception as failure:
        if not hasattr(failure, "show"):
            raise
        if rank == 0:
            failure.show()
        else:
            # A launcher kills the rest once a rank leaves with an error: the first rank must speak before that.
            time.sleep(1)
        code = getattr(failure, "exit_code", 1)
    sys.exit(code)
