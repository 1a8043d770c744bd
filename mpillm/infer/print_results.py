"""What `evaluate` and `generate` print."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.waiting import patient_barrier
from mpillm.infer.baselines import baselines as score_baselines
from mpillm.infer.evaluate import Score, WholeModel, evaluate
from mpillm.infer.generate import Sampling, generate
from mpillm.infer.loading import Loaded, load
from mpillm.system.console import Console
from mpillm.tokens.manifest import Manifest, check_tokenizer
from mpillm.tokens.reader import open_split

if TYPE_CHECKING:
    from mpi4py import MPI


def print_evaluation(
    trained: Path,
    data: Path | None,
    baselines: bool,
    as_json: bool,
    comm: "MPI.Intracomm",
    console: Console,
) -> None:
    """Score a trained model on the validation split of `data` (None: of its own data) and print it.

    Every rank calls it. Raises MismatchError when the data was made with another tokenizer than the model's.
    """
    loaded = load(trained, comm, console)
    folder = data or Path(loaded.checkpoint.facts["recipe"]["data"]["path"])
    manifest = Manifest.load(folder)
    check_tokenizer(manifest, loaded.tokenizer)
    with open_split(folder, "validation") as reader:
        scorer = WholeModel(loaded.model, comm)
        scores = {
            "model": evaluate(scorer, reader, comm, Console(speaks=False) if as_json else console)
        }
        if baselines and comm.rank == 0:
            with open_split(folder, "train") as train:
                counted = score_baselines(train, reader, manifest.vocab_size)
            scores |= {"bigram": counted.bigram, "unigram": counted.unigram}
    patient_barrier(comm)
    _print(scores, loaded, folder, as_json, console)


def _print(
    scores: dict[str, Score], loaded: Loaded, folder: Path, as_json: bool, console: Console
) -> None:
    if as_json:
        facts = {
            "checkpoint": str(loaded.checkpoint.folder),
            "step": loaded.checkpoint.step,
            "data": str(folder),
        }
        console.write(
            json.dumps(facts | {name: score.to_json() for name, score in scores.items()}) + "\n"
        )
        return
    tokens = scores["model"].tokens
    console.table(
        f"{loaded.checkpoint.folder} on {folder}: {tokens:,} validation tokens",
        ["", "loss (nats a token)", "perplexity", "bits per byte"],
        [
            [name, f"{score.loss:.4f}", f"{score.perplexity:,.2f}", f"{score.bits_per_byte:.4f}"]
            for name, score in scores.items()
        ],
    )


def print_generation(
    trained: Path, prompt: str, sampling: Sampling, comm: "MPI.Intracomm", console: Console
) -> None:
    """Print the prompt and what the model makes of it, as it comes. Every rank calls it; rank 0 computes."""
    loaded = load(trained, comm, console)
    if comm.rank == 0:
        console.write(prompt)
        for text in generate(loaded.model, loaded.tokenizer, prompt, sampling):
            console.write(text)
        console.write("\n")
    patient_barrier(comm)
