"""A small workspace in which the line of every verb runs: texts, a dataset, a run, recipes."""

import json
import random
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from mpillm.system import hdf5
from mpillm.system.plugins import load_plugin
from mpillm.verbs.verb_catalog import VERBS
from mpillm.weights.places import CHECKPOINTS, INDEX, checkpoint_folders

from .child import run_verb

RUN, DATA, STEPS = "runs/quickstart", "prepared/stdlib", 6
RECIPE = f"""
[model]
layers = 2
width = 16
heads = 2
context = 32

[data]
path = "{DATA}"

[optimizer]
learning_rate = 3e-3
warmup_steps = 2

[train]
run = "{RUN}"
steps = {STEPS}
batch = 4
microbatch = 2
save_every = 2
evaluate_every = 3
keep = 2
fixed_order = true
"""
PAIR_DATA, PAIR_RUN = "prepared/pairs", "runs/pairs"
PAIR_RECIPE = f"""
[model]
architecture = "encoder"
layers = 1
width = 16
heads = 2
context = 32
head = "sequence"

[task]
name = "sequence-classification"

[data]
path = "{PAIR_DATA}"

[train]
run = "{PAIR_RUN}"
steps = 3
batch = 8
"""
SITE = 'scheduler = "slurm"\ncores_per_node = 8\n'
# Short lines of the verbs that are known; a verb that is added is tried by its own example.
LINES: Mapping[str, tuple[str, ...]] = {
    "prepare": (
        "prepare texts texts.jsonl --out made/all --tokenizer bytes",
        f"prepare texts --out made/bpe --tokenizer {DATA}/tokenizer.json",
        "prepare pairs.jsonl --out made/pairs --task sequence-classification --tokenizer bytes",
        f"prepare --verify {DATA}",
        f"prepare --verify {PAIR_DATA}",
    ),
    "train": (
        "train recipe.toml --set train.run=runs/fresh --set train.steps=2",
        f"train {RUN}/recipe.toml --set train.steps={STEPS + 2} --resume",
        "train pairs.toml",
    ),
    "evaluate": (f"evaluate {RUN} --json",),
    "generate": (f"generate {RUN} --prompt word --max-tokens 12 --seed 1",),
    "bench": (
        "bench allreduce --sizes 8:64:x8 --iterations 3 --csv made/bench.csv",
        "bench gemm --sizes 8 --iterations 2 --json",
    ),
    "schedule": (
        "schedule gpipe --ranks 2 --microbatches 3 --csv made/rows.csv",
        "schedule rows.csv --json",
    ),
    "doctor": ("doctor texts --json",),
    "submit": (
        "submit recipe.toml --nodes 1 --ranks-per-node 2 --time 1:00:00 --site site.toml --dry-run",
    ),
    "status": (f"status {RUN} --json",),
    "report": (f"report {RUN} --out made/report.html",),
}


def lines_of(verb: str) -> tuple[str, ...]:
    """Return the lines by which a verb of the catalogue is tried."""
    if verb in LINES:
        return LINES[verb]
    example = shlex.split(load_plugin(verb, VERBS, "verb").example)
    return (shlex.join(example[example.index("mpillm") + 1 :]),)


def trained_by() -> dict[str, str]:
    """Return the run of each line that trains with what is there."""
    return dict(zip(LINES["train"][1:], (RUN, PAIR_RUN), strict=True))


def make_workspace(root: Path, seed: int) -> None:
    """Make texts, dataset, run and the files that the lines name, by the verbs themselves."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(200)]
    (root / "texts").mkdir(parents=True)
    (root / "made").mkdir()
    (root / "jobs/recipes").mkdir(parents=True)

    def text() -> str:
        rows = chance.randint(4, 12)
        return "".join(" ".join(chance.choices(words, k=8)) + ".\n" for _ in range(rows))

    for number in range(60):
        (root / f"texts/{number:02d}.txt").write_text(text())
    lines = [json.dumps({"text": text(), "id": number}) for number in range(40)]
    (root / "texts.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("recipe.toml", "jobs/recipes/quickstart.toml"):
        (root / name).write_text(RECIPE)
    records = [json.dumps({"text": text(), "label": number % 3}) for number in range(40)]
    (root / "pairs.jsonl").write_text("\n".join(records) + "\n")
    (root / "pairs.toml").write_text(PAIR_RECIPE)
    (root / "site.toml").write_text(SITE)
    for line in (
        f"prepare texts --out {DATA} --vocab-size 300 --validation 0.1",
        f"prepare pairs.jsonl --out {PAIR_DATA} --task sequence-classification --tokenizer bytes",
        "train recipe.toml",
        "schedule 1f1b --ranks 2 --microbatches 4 --csv rows.csv",
    ):
        done = run_verb(line.split(), root)
        if done.code:
            raise SystemExit(f"the workspace: mpillm {line}: {done.err}")


def copy_workspace(root: Path, to: Path) -> Path:
    shutil.copytree(root, to, symlinks=True)
    return to


def weights_of(run: Path) -> dict[str, object]:
    """Return the hashes of all tensors of a run's newest checkpoint, by name; empty without one."""
    folders = checkpoint_folders(run / CHECKPOINTS)
    if not folders:
        return {}
    index = json.loads((list(folders.values())[-1] / INDEX).read_text())
    found: dict[str, object] = {"step": index["facts"]["step"]}
    for name, tensor in index["tensors"].items():
        found[name] = [piece["xxh3_128"] for piece in tensor["pieces"]]
    return found


def digest_of(folder: Path) -> dict[str, str]:
    """Return the hash of each file below `folder`."""
    return {
        str(path.relative_to(folder)): hdf5.digest(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
