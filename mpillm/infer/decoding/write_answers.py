"""Write the answers to all questions of a split, shared out over the ranks.

A batch is a function of the data and the settings, and random numbers of the seed and the number of
the question. So the texts are the same at any number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mpillm.comm.failure import on_all
from mpillm.infer.decoding.beam_search import search_beams
from mpillm.infer.decoding.prompts import Int64s, Questions
from mpillm.infer.decoding.token_rows import TokenRows, continue_rows
from mpillm.infer.sampling import Decoding
from mpillm.models.part_module import PartModule
from mpillm.system.console import Console
from mpillm.tokens.order import task_keys

if TYPE_CHECKING:
    from mpi4py import MPI

# Of the keys and values of a batch: one of a hundred million parameters takes half a gigabyte.
BATCH_POSITIONS = 16384
MOST_ROWS, LEAST_ROWS = 64, 4
# A batch has no larger share of the questions, so that many ranks have some.
BATCHES = 16


@dataclass(frozen=True)
class Answer:
    """A question, its reference, and what the model wrote. `number`: of the question, from 0."""

    number: int
    source: str
    reference: str
    output: str


def write_answers(
    model: PartModule,
    questions: Questions,
    decoding: Decoding,
    comm: "MPI.Intracomm",
    console: Console,
) -> list[Answer]:
    """Return this rank's answers: each question is answered by one rank. Every rank calls it.

    Raises CheckpointError on every rank where outputs are not finite, DataError for odd data.
    """

    def work() -> list[Answer]:
        batches = list(_batches(questions, decoding.beams))[comm.rank :: comm.size]
        with console.progress("generate", sum(map(len, batches)), "texts") as progress:
            found = []
            for numbers in batches:
                found += _answers(model, questions, decoding, numbers)
                progress.advance(len(numbers))
        return found

    return on_all(comm, work)


def _batches(questions: Questions, beams: int) -> Iterator[Int64s]:
    """Cut the questions into batches of alike lengths, the longest first."""
    spec = questions.spec
    lengths = np.minimum(questions.lengths(), max(spec.context, spec.source_context))
    order = np.argsort(-lengths, kind="stable")
    most = min(MOST_ROWS, max(LEAST_ROWS, -(-len(order) // BATCHES)))
    first = 0
    while first < len(order):
        positions = beams * (int(lengths[order[first]]) + questions.max_tokens)
        rows = max(1, min(most, BATCH_POSITIONS // positions))
        yield order[first : first + rows].astype(np.int64)
        first += rows


def _answers(
    model: PartModule,
    questions: Questions,
    decoding: Decoding,
    numbers: Int64s,
) -> list[Answer]:
    prompts = questions.prompts(numbers)
    device = next(model.parameters()).device
    source = prompts.source
    if source is not None:
        # Lengths stay in host memory.
        source = {
            name: field if name == "source_lengths" else field.to(device)
            for name, field in source.items()
        }
    ends = questions.ends
    rows, most = TokenRows(model, prompts.ids, source), [questions.max_tokens] * len(numbers)
    if decoding.beams > 1:
        texts = search_beams(rows, decoding.beams, decoding.length_penalty, ends, most)
    else:
        generators = [
            torch.Generator().manual_seed(key & ((1 << 63) - 1))
            for key in task_keys(decoding.sampling.seed, numbers).tolist()
        ]
        texts = continue_rows(rows, decoding.sampling, generators, ends, most)
    return [
        Answer(number, *questions.texts(number), questions.tokenizer.decode(ids).strip())
        for number, ids in zip(numbers.tolist(), texts, strict=True)
    ]
