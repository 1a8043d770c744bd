"""Print how well a model's embeddings find documents: the work of `evaluate --retrieval`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.infer.candidates import NAMES
from mpillm.infer.loading import Loaded, load_trained
from mpillm.infer.scores.compare import compare
from mpillm.infer.scores.print_scores import print_scores
from mpillm.infer.scores.retrieval_set import RetrievalSet, read_retrieval_set
from mpillm.infer.scores.score import Score
from mpillm.infer.scores.score_retrieval import METRICS, ranked, score_retrieval
from mpillm.infer.sentence_embeddings import Vectors, embed_texts
from mpillm.machine.node_map import map_nodes
from mpillm.models.part_module import torch_explained
from mpillm.parallel.devices import choose_device
from mpillm.system.atomic import check_new_file, write_new_file
from mpillm.system.console import Console
from mpillm.system.json_text import to_json, to_json_lines
from mpillm.tasks.metrics.metric import Array
from mpillm.tasks.metrics.metric_catalog import check_metrics, make_metrics
from mpillm.tasks.metrics.retrieval import RANKINGS

if TYPE_CHECKING:
    from mpi4py import MPI

# Documents of a query in the file of outputs.
LISTED = 10


@dataclass(frozen=True)
class RetrievalOptions:
    """What is asked of `evaluate --retrieval`. `outputs`: a file for the list of each query."""

    split: str = "test"
    metrics: Sequence[str] = ()
    pooling: str = "mean"
    outputs: Path | None = None
    as_json: bool = False


def print_retrieval(
    trained: Sequence[Path],
    data: Path,
    options: RetrievalOptions,
    comm: "MPI.Intracomm",
    console: Console,
    device: str = "auto",
) -> None:
    """Score the retrieval of a set's documents by the embeddings of a model, or of two.

    Every rank calls it. Raises DataError for a faulty set. Raises UsageError for a metric that
    reads no ranking, a model that embeds no text, and an outputs file that exists.
    """
    place, _ = choose_device(device, comm, map_nodes(comm), option="--device")
    names = options.metrics or METRICS
    check_metrics(names, "of retrieval", RANKINGS[0])
    on_root(comm, lambda: check_new_file(options.outputs, "--outputs"))
    # Rank 0 alone reads the files; a set is some hundred megabytes of text at most.
    given = comm.bcast(on_root(comm, lambda: read_retrieval_set(data, options.split)))
    scores: dict[str, Score] = {}
    facts: dict[str, dict[str, object]] = {}
    lists: list[Array] = []
    with torch_explained():
        for name, path in zip(NAMES, trained, strict=False):
            loaded = load_trained(path, comm, console)
            vectors = _embed(loaded, given, options.pooling, place, comm)
            scores[name] = score_retrieval(*vectors, given.relevant, comm, names)
            checkpoint = loaded.checkpoint
            facts[name] = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step}
            if options.outputs and comm.rank == 0:
                lists.append(ranked(*vectors, LISTED))
    differences = compare(scores["model"], scores["other"]) if len(scores) > 1 else None
    if options.as_json:
        table = _json(data, given, options, {n: facts[n] | _values(scores[n]) for n in scores})
        if differences is not None:
            table["difference"] = {name: each.to_json() for name, each in differences.items()}
        console.write(to_json(table) + "\n")
    else:
        title = (
            f"{data}, {options.split}: n = {len(given.queries):,} queries, "
            f"{len(given.documents):,} documents, with 95% intervals"
        )
        print_scores(title, scores, make_metrics(names), console, differences)
        if given.unjudged:
            console.say(
                f"left out, without a relevant document in {options.split}: {given.unjudged:,} of "
                f"{given.unjudged + len(given.queries):,} queries"
            )
    on_root(
        comm,
        lambda: write_new_file(options.outputs, to_json_lines(_lines(given, lists)), "--outputs"),
    )


def _values(score: Score) -> dict[str, object]:
    return {"values": score.values, "intervals": score.intervals}


def _json(
    data: Path,
    given: RetrievalSet,
    options: RetrievalOptions,
    models: Mapping[str, Mapping[str, object]],
) -> dict[str, object]:
    return {
        "data": str(data),
        "split": options.split,
        "pooling": options.pooling,
        "queries": len(given.queries),
        "queries_left_out": given.unjudged,
        "documents": len(given.documents),
        **models,
    }


def _embed(
    loaded: Loaded, given: RetrievalSet, pooling: str, place: str, comm: "MPI.Intracomm"
) -> tuple[Vectors, Vectors]:
    """Return the embeddings of the queries and of the documents."""
    loaded.model.to(place)
    queries = embed_texts(loaded, given.queries, pooling, comm=comm)
    return queries, embed_texts(loaded, given.documents, pooling, comm=comm)


def _lines(given: RetrievalSet, lists: Sequence[Array]) -> list[dict[str, object]]:
    """Write the best documents of each query by their names, for each model."""
    return [
        {
            "query": name,
            "relevant": {given.document_names[n]: gain for n, gain in given.relevant[row].items()},
            **{
                model: [given.document_names[int(number)] for number in found[row]]
                for model, found in zip(NAMES, lists, strict=False)
            },
        }
        for row, name in enumerate(given.query_names)
    ]
