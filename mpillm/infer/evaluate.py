"""How well a model foretells text: loss, perplexity and bits per byte over a whole split, shared by the ranks."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mpillm.models.config import DecoderConfig
from mpillm.models.decoder import Decoder
from mpillm.parallel.pipeline.stage import ScoringStage
from mpillm.system.console import Console
from mpillm.tokens.evaluation_windows import evaluation_batches, read_evaluation
from mpillm.tokens.reader import TokenReader

if TYPE_CHECKING:
    from mpi4py import MPI

# Tokens in a batch: enough to fill the products, few enough for the logits of a large vocabulary.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Score:
    """`loss` in nats a token, over `tokens` targets; `bits_per_byte` of the split's text, free of the tokenizer."""

    loss: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """The nats of all tokens (ends of documents too), in bits, over the bytes of the text."""
        return self.loss * self.tokens / math.log(2) / max(1, self.text_bytes)

    def to_json(self) -> dict[str, float]:
        return {**asdict(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


def rows_at_once(config: DecoderConfig) -> int:
    """Sequences in a batch of the evaluation."""
    return max(1, BATCH_TOKENS // config.context)


class Scorer(Protocol):
    """A model that can be scored, whole or in stages."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def share(self) -> tuple[int, int]:
        """(i, n): which of n shares of the batches is this rank's; ranks that hold stages of one model have one."""

    def score(
        self,
        count: int,
        read: Callable[[int], Tensor],
        shape_of: Callable[[int], tuple[int, int]],
        done: Callable[[], None],
    ) -> dict[int, float]:
        """The summed loss of each of `count` batches, on the rank that knows it; `read(number)` gives the ids
        (B, T + 1), and `shape_of` (B, T). `done` is called once a batch, on some rank.
        """


@dataclass(frozen=True)
class WholeModel:
    """Each rank of `comm` has all of the model. `autocast`: the type of the products, where not the weights'."""

    model: Decoder
    comm: "MPI.Intracomm"
    autocast: torch.dtype | None = None

    @property
    def config(self) -> DecoderConfig:
        return self.model.config

    @property
    def share(self) -> tuple[int, int]:
        return self.comm.rank, self.comm.size

    def score(
        self,
        count: int,
        read: Callable[[int], Tensor],
        shape_of: Callable[[int], tuple[int, int]],
        done: Callable[[], None],
    ) -> dict[int, float]:
        stage = ScoringStage(self.model, read, self.autocast, done)
        for number in range(count):
            stage.forward(number, None)
        return stage.losses


def evaluate(scorer: Scorer, reader: TokenReader, comm: "MPI.Intracomm", console: Console) -> Score:
    """Score each token of the split but the first, in windows of the model's context.

    Every rank calls it and gets the same score. The batches are the same at any number of ranks and their losses are
    added exactly, so the score is too.
    """
    config = scorer.config
    batches = evaluation_batches(reader.n_tokens, config.context, rows_at_once(config))
    share, shares = scorer.share
    mine = batches[share::shares]

    def read(number: int) -> Tensor:
        return torch.from_numpy(read_evaluation(reader, mine[number]).tokens_BT.astype("int64"))

    with console.progress("evaluate", len(mine), "batches") as progress:
        losses = scorer.score(
            len(mine),
            read,
            lambda number: (mine[number].rows, mine[number].length),
            progress.advance,
        )
    total = math.fsum(loss for part in comm.allgather(list(losses.values())) for loss in part)
    targets = reader.n_tokens - 1
    return Score(total / targets, targets, reader.split.n_bytes)
