"""Train the tokenizer of a dataset, on a sample that does not depend on the number of ranks."""

from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm.failure import on_root
from mpillm.comm.waiting import patient_barrier
from mpillm.system.console import Console
from mpillm.tokens.order import mix
from mpillm.tokens.sources import Document, parts_of
from mpillm.tokens.survey import Survey
from mpillm.tokens.tokenizer import Tokenizer, byte_tokenizer, train_bpe

if TYPE_CHECKING:
    from mpi4py import MPI

SAMPLE_SALT = np.uint64(0x5A3F1E)
# Bins of the histogram over hashes that decides the sample: 512 KiB a rank, fine enough for it.
BINS = 1 << 16

Array = np.ndarray[Any, np.dtype[Any]]


def load_or_make(spec: str, end_of_text: str | None) -> Tokenizer | None:
    """Make or load the tokenizer that `spec` names; None for "bpe", which is to be trained.

    Raises UsageError, DataError.
    """
    if spec == "bpe":
        return None
    return byte_tokenizer() if spec == "bytes" else Tokenizer.load(spec, end_of_text)


def train_together(
    survey: Survey, vocab_size: int, sample_bytes: int, comm: "MPI.Intracomm", console: Console
) -> str:
    """Train a BPE on rank 0 on about `sample_bytes` of all ranks' documents; return its JSON.

    Every rank calls it.
    """
    gathered = comm.gather(_own_sample(survey, sample_bytes, comm))
    patient_barrier(comm)

    def train() -> str:
        assert gathered is not None
        sample = sorted(item for own in gathered for item in own)
        texts, left = [], sample_bytes
        for _, _, text in sample:
            texts.append(text[: max(left, 0)])
            left -= len(text)
        console.say(
            f"training a BPE of {vocab_size:,} tokens on {sum(map(len, texts)):,} characters"
        )
        tokenizer = train_bpe(texts, vocab_size)
        if tokenizer.vocab_size < vocab_size:
            console.say(
                f"the text has pairs for {tokenizer.vocab_size:,} tokens only; "
                "the vocabulary has no more"
            )
        return tokenizer.to_json()

    return on_root(comm, train)


def _own_sample(
    survey: Survey, sample_bytes: int, comm: "MPI.Intracomm"
) -> list[tuple[int, int, str]]:
    """Take this rank's documents with the smallest mixed keys: (mixed key, ordinal, text).

    All ranks sum a histogram of bytes over the mixed keys, which gives the last bin to take: no
    rank ever holds the keys of all documents. That bin is taken whole; rank 0 cuts the sorted
    sample to size.
    """
    mixed = mix(survey.documents["key"] ^ SAMPLE_SALT)
    bins = (mixed >> np.uint64(48)).astype(np.int64)
    own, histogram = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    np.add.at(own, bins, survey.documents["nbytes"])
    comm.Allreduce(own, histogram)
    last_bin = int(np.searchsorted(np.cumsum(histogram), sample_bytes))
    chosen = bins <= last_bin
    sample: list[tuple[int, int, str]] = []
    for number in survey.mine:
        rows = survey.of_piece(number)
        wanted = chosen[np.searchsorted(survey.documents["ordinal"], rows["ordinal"])]
        if wanted.any():
            [(texts, _)] = survey.read([number], threads=1)
            sample += [
                (
                    int(mix(rows["key"][i : i + 1] ^ SAMPLE_SALT)[0]),
                    int(rows["ordinal"][i]),
                    _beginning(texts.documents[i], sample_bytes),
                )
                for i in np.flatnonzero(wanted).tolist()
            ]
    return sample


def _beginning(document: Document, most: int) -> str:
    """Return the first `most` characters: no more of a long text is read."""
    text = ""
    for part in parts_of(document):
        text += part[: most - len(text)]
        if len(text) == most:
            break
    return text
