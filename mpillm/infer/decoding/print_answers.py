"""Write the answers of a trained model, or of two, and print their scores: the work of `evaluate
--generate`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.infer.candidates import (
    NAMES,
    Candidate,
    facts_of,
    open_candidates,
    record_scores,
    title_of,
    warn_if_moved,
)
from mpillm.infer.chat_prompt import ends_of
from mpillm.infer.decoding.prompts import Questions, answer_tokens, check_writes
from mpillm.infer.decoding.write_answers import Answer, write_answers
from mpillm.infer.loading import open_of
from mpillm.infer.sampling import Decoding
from mpillm.infer.scores.compare import ScoreDifference, compare
from mpillm.infer.scores.print_scores import print_scores
from mpillm.infer.scores.score import Score
from mpillm.infer.scores.score_texts import make_text_metrics, score_texts
from mpillm.machine.node_map import map_nodes
from mpillm.models.part_module import torch_explained
from mpillm.parallel.devices import choose_device
from mpillm.system.atomic import check_new_file, write_new_file
from mpillm.system.console import Console, counted
from mpillm.system.json_text import to_json, to_json_lines
from mpillm.tasks.task_catalog import read_settings
from mpillm.tokens.pairs.pair_reader import PairReader

if TYPE_CHECKING:
    from mpi4py import MPI

EXAMPLES, SHOWN = 3, 400
# Of texts there is no loss, and a row is a text.
NOT_OF_TEXTS = ("loss", "tokens", "text_bytes")


@dataclass(frozen=True)
class AnswerOptions:
    """What is asked of `evaluate --generate`. `outputs`: a file for all texts."""

    decoding: Decoding
    metrics: Sequence[str] = ()
    outputs: Path | None = None
    as_json: bool = False


def print_answers(
    trained: Sequence[Path],
    data: Path | None,
    options: AnswerOptions,
    comm: "MPI.Intracomm",
    console: Console,
    device: str = "auto",
) -> None:
    """Write the answers to the validation pairs of `data` (None: of its own), and print scores.

    `trained`: one model, or two that are compared. Every rank calls it. Raises UsageError for a
    task without references, a metric that compares no texts, and an outputs file that exists.
    """
    place, _ = choose_device(device, comm, map_nodes(comm), option="--device")
    on_root(comm, lambda: check_new_file(options.outputs, "--outputs"))
    found = open_candidates(trained, data, comm, console)
    check_writes([each.task for each in found])
    names = options.metrics or found[0].task.text_metrics
    metrics = make_text_metrics(names)
    # One JSON object is all that --json prints.
    quiet = Console(speaks=False) if options.as_json else console
    scores, written = {}, []
    with torch_explained():
        for name, each in zip(NAMES, found, strict=False):
            own = _write(each, options.decoding, place, comm, quiet)
            texts, known = [one.output for one in own], [[one.reference] for one in own]
            scores[name] = score_texts(texts, known, names, comm, [one.number for one in own])
            written.append(own)
    rows = _gathered(written, comm)
    differences = compare(scores["model"], scores["other"]) if len(found) > 1 else None
    if options.as_json:
        facts = _json(found, scores, differences, options)
        console.write(to_json(facts | {"examples": rows[:EXAMPLES]}) + "\n")
    else:
        for each in found:
            warn_if_moved(each.loaded.checkpoint, console)
        print_scores(_title(found, scores, options), scores, metrics, console, differences)
        for signature in scores["model"].signatures.values():
            console.say(signature)
        _print_examples(rows[:EXAMPLES], console)
    on_root(comm, lambda: record_scores(found, scores, quiet))
    text = to_json_lines(rows)
    on_root(comm, lambda: write_new_file(options.outputs, text, "--outputs"))


def _write(
    candidate: Candidate,
    decoding: Decoding,
    place: str,
    comm: "MPI.Intracomm",
    console: Console,
) -> list[Answer]:
    loaded = candidate.loaded
    model, spec = loaded.model.to(place), loaded.model.spec
    settings = read_settings(loaded.checkpoint.facts["recipe"].get("task", {}))
    most = answer_tokens(spec, decoding.max_tokens)
    with open_of(candidate.manifest, "validation") as reader:
        assert isinstance(reader, PairReader)
        given = reader, candidate.task, spec, loaded.tokenizer, settings, most, ends_of(loaded)
        questions = Questions(*given)
        if cuts := on_root(comm, questions.describe_cuts):
            console.warn(cuts)
        return write_answers(model, questions, decoding, comm, console)


def _gathered(
    written: Sequence[Sequence[Answer]], comm: "MPI.Intracomm"
) -> list[dict[str, object]]:
    """Collect the texts of all ranks on rank 0, in the order of the questions."""
    of_models = []
    for own in written:
        parts = comm.gather(own) or []
        of_models.append(sorted((one for part in parts for one in part), key=lambda a: a.number))
    rows: list[dict[str, object]] = []
    for same in zip(*of_models, strict=True):
        first = same[0]
        row = {"number": first.number, "source": first.source, "reference": first.reference}
        rows.append({**row, "output": first.output})
        if len(same) > 1:
            rows[-1]["other_output"] = same[1].output
    return rows


def _print_examples(rows: Sequence[Mapping[str, object]], console: Console) -> None:
    for row in rows:
        shown = {name: _short(str(text)) for name, text in row.items() if name != "number"}
        console.facts(f"example {row['number']}", shown)


def _title(found: Sequence[Candidate], scores: Mapping[str, Score], options: AnswerOptions) -> str:
    texts = counted(scores["model"].rows, "text")
    return f"{title_of(found)}: n = {texts}, {options.decoding.describe()}, with 95% intervals"


def _json(
    found: Sequence[Candidate],
    scores: Mapping[str, Score],
    differences: Mapping[str, ScoreDifference] | None,
    options: AnswerOptions,
) -> dict[str, object]:
    spec = found[0].loaded.model.spec
    tokens = answer_tokens(spec, options.decoding.max_tokens)
    decoding = {"decoding": replace(options.decoding, max_tokens=tokens).to_json()}
    values = {
        name: {key: value for key, value in score.to_json().items() if key not in NOT_OF_TEXTS}
        for name, score in scores.items()
    }
    return facts_of(found, values, differences) | decoding


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"
