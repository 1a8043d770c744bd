"""How well a model foretells text: loss, perplexity and bits per byte over a whole split, shared by the ranks."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from mpillm.console import Console
from mpillm.models.decoder import Decoder, loss_sum
from mpillm.tokens.evaluation import EvaluationBatch, evaluation_batches, read_evaluation
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


def evaluate(
    model: Decoder, reader: TokenReader, comm: "MPI.Intracomm", console: Console, autocast: torch.dtype | None = None
) -> Score:
    """Score each token of the split but the first, in windows of the model's context.

    Every rank calls it and gets the same score. The batches are the same at any number of ranks and their losses are
    added in the same order, so the score is too. `autocast`: the type of the products, where not the weights'.
    """
    config = model.config
    batches = evaluation_batches(reader.n_tokens, config.context, max(1, BATCH_TOKENS // config.context))
    mine = range(comm.rank, len(batches), comm.size)
    losses: dict[int, float] = {}
    was_training = model.training
    model.eval()
    with torch.inference_mode(), console.progress("evaluate", len(mine), "batches") as progress:
        for index in mine:
            losses[index] = _batch_loss(model, reader, batches[index], autocast)
            progress.advance()
    model.train(was_training)
    every = {index: loss for part in comm.allgather(losses) for index, loss in part.items()}
    targets = reader.n_tokens - 1
    total = math.fsum(every[index] for index in range(len(batches)))
    return Score(total / targets, targets, reader.split.n_bytes)


def _batch_loss(model: Decoder, reader: TokenReader, batch: EvaluationBatch, autocast: torch.dtype | None) -> float:
    tokens_BT = torch.from_numpy(read_evaluation(reader, batch).tokens_BT.astype("int64"))
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        logits_BTV = model(tokens_BT[:, :-1])
    return float(loss_sum(logits_BTV, tokens_BT[:, 1:]))
