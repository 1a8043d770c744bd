"""Try what can go wrong: kills, signals, damaged files, full disks, two verbs at once, odd values.

    python benchmarks/reliability.py --seconds 60            # a sample; it prints its seed
    python benchmarks/reliability.py --full --table out.md   # all trials: about an hour
    python benchmarks/reliability.py --seed 7 --only files:123

Each trial runs verbs of the catalogue in forked children, in a copy of a small workspace. A trial
is right where each verb works as it does without the fault, or refuses in one message with an exit
code of docs/reliability.md: no bare Python exception, no hang, no other result with exit code 0,
and no file left. A wrong trial is printed with the command that repeats it.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from trials.child import preload
from trials.kinds import KINDS, Trial, reference_of
from trials.workspace import copy_workspace, make_workspace

WORKERS = min(4, os.cpu_count() or 1)


def main() -> int:
    options = _parse()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    os.environ.update(OMP_NUM_THREADS="1", COLUMNS="200")
    if os.geteuid() == 0:
        os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    preload()
    root = Path(tempfile.mkdtemp(prefix="mpillm-trials-"))
    shared_before = set(Path("/dev/shm").iterdir())
    try:
        rows = _try_all(options, seed, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    left = sorted(map(str, set(Path("/dev/shm").iterdir()) - shared_before))
    text = _table(rows)
    print(text)
    if left:
        print(f"/dev/shm has {len(left)} files more: {left[:5]}")
    if options.table:
        Path(options.table).write_text(text + "\n", encoding="utf-8")
    wrong = [row for row in rows if row["findings"]]
    again = f"python benchmarks/reliability.py --seed {seed} --only"
    for row in wrong:
        print(f"\n{row['kind']}:{row['number']}  {row['title']}")
        print("\n".join(f"    {finding}" for finding in row["findings"]))
        print(f"    {again} {row['kind']}:{row['number']}")
    print(f"{len(rows)} trials, {len(wrong)} wrong (seed {seed})")
    return 1 if wrong or left or not rows else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="of all trials; else a new one")
    parser.add_argument("--seconds", type=float, help="try all kinds in turns for this long")
    parser.add_argument("--full", action="store_true", help="all trials of all kinds")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of trials, with commas")
    parser.add_argument("--only", help="one trial, KIND:NUMBER, whose folder is kept")
    parser.add_argument("--table", help="write the table of results into this file")
    parser.add_argument("--workers", type=int, default=WORKERS, help="trials at the same time")
    return parser.parse_args()


def _try_all(options: argparse.Namespace, seed: int, root: Path) -> list[dict[str, Any]]:
    first = root / "first"
    make_workspace(first, seed)
    reference = reference_of(copy_workspace(first, root / "reference"), _mpirun())
    shutil.rmtree(root / "reference")
    if options.only:
        kind, _, number = options.only.partition(":")
        return [_try(kind, int(number), seed, root, first, reference, keep=True)]
    kinds = options.kinds.split(",")
    if options.full:
        todo = [(kind, number) for kind in kinds for number in range(KINDS[kind][1])]
    else:
        todo = [(kind, number) for number in range(10**4) for kind in kinds]
    end = time.monotonic() + options.seconds if options.seconds else float("inf")
    results = root / "results"
    results.mkdir()
    workers = []
    for worker in range(options.workers):
        pid = os.fork()
        if not pid:
            _work(todo[worker :: options.workers], end, seed, (root, first, results), reference)
        workers.append(pid)
    if any(os.waitpid(pid, 0)[1] for pid in workers):
        raise SystemExit("a worker of the trials failed, see above")
    return [
        json.loads(line)
        for path in sorted(results.iterdir())
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def _work(
    todo: list[tuple[str, int]],
    end: float,
    seed: int,
    places: tuple[Path, Path, Path],
    reference: dict[str, Any],
) -> None:
    """Run trials in this child until all are done or the time is over; never returns."""
    root, first, results = places
    try:
        with (results / str(os.getpid())).open("w", encoding="utf-8") as file:
            for kind, number in todo:
                if time.monotonic() > end:
                    break
                row = _try(kind, number, seed, root, first, reference)
                file.write(json.dumps(row) + "\n")
                file.flush()
                if row["findings"]:
                    print(f"wrong: {kind}:{number} {row['findings'][0]}"[:400], flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _try(
    kind: str,
    number: int,
    seed: int,
    root: Path,
    first: Path,
    reference: dict[str, Any],
    keep: bool = False,
) -> dict[str, Any]:
    folder = copy_workspace(first, root / f"{kind}-{number}")
    chance = random.Random(f"{seed} {kind} {number}")
    trial = Trial(folder, chance, _mpirun(), reference)
    began = time.monotonic()
    try:
        KINDS[kind][0](trial)
    except Exception as failure:
        trial.findings.append(f"the trial itself: {type(failure).__name__}: {failure}")
    if keep:
        kept = Path(tempfile.mkdtemp(prefix="mpillm-trial-"))
        shutil.copytree(folder, kept / "folder", symlinks=True, ignore=_pipes)
        print(f"{trial.title}: {trial.ways}; its folder: {kept}/folder")
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "kind": kind,
        "number": number,
        "title": trial.title,
        "ways": trial.ways,
        "findings": trial.findings,
        "seconds": time.monotonic() - began,
    }


def _pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_fifo()]


def _mpirun() -> list[str]:
    found = shutil.which("mpirun")
    return [found, "-n", "2", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"] if found else []


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| kind | trials | verbs run | how they ended | wrong | seconds a trial |",
        "|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        if not own:
            continue
        ways: dict[str, int] = {}
        for row in own:
            for way, count in row["ways"].items():
                ways[way] = ways.get(way, 0) + count
        wrong = sum(bool(row["findings"]) for row in own)
        seconds = sum(row["seconds"] for row in own) / len(own)
        ends = ", ".join(f"{count:,} {way}" for way, count in sorted(ways.items()))
        lines.append(
            f"| {kind} | {len(own):,} | {sum(ways.values()):,} | {ends} | {wrong} | {seconds:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
