"""Embeddings of texts by an encoder: one vector a text, for search and comparison.

Shapes: N texts, B texts at once, T positions, C width.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import torch

from mpillm.comm.failure import on_all
from mpillm.errors import UsageError
from mpillm.infer.loading import Loaded
from mpillm.models.stacks.encoder_head import POOLINGS, pool

if TYPE_CHECKING:
    from mpi4py import MPI

Vectors = np.ndarray[Any, np.dtype[np.float32]]
# Positions of a batch: its activations stay near a second-level cache.
POSITIONS_AT_ONCE = 1 << 12


def embed_texts(
    loaded: Loaded,
    texts: Sequence[str],
    pooling: str = "mean",
    normalised: bool = True,
    comm: "MPI.Intracomm | None" = None,
) -> Vectors:
    """Return the embeddings (N, C) of `texts`, in their order.

    `pooling`: of the hidden states, `mean`, `first` or `last`; `normalised`: to a 2-norm of 1.
    With a `comm` its ranks call it with the same texts, share them out, and each gets all vectors.
    Special tokens are added as the tokenizer says, and longer texts are cut to the model's context.
    Raises UsageError for a model without hidden states or an unknown pooling.
    """
    if pooling not in POOLINGS:
        raise UsageError(f"pooling = {pooling!r} is none of {', '.join(POOLINGS)}; take one")
    if loaded.model.spec.input_field not in ("", "ids"):
        raise UsageError(
            f"the model reads {loaded.model.spec.input_field} and embeds no text; take an encoder "
            "of text"
        )

    def embed(share: int, shares: int) -> list[tuple[list[int], Vectors]]:
        own = []
        for numbers, fields in islice(_batches(loaded, texts), share, None, shares):
            with torch.inference_mode():
                states_BTC = loaded.model.hidden_states(fields)
                vectors_BC = pool(states_BTC, pooling, fields["lengths"]).float()
                if normalised:
                    vectors_BC = torch.nn.functional.normalize(vectors_BC, dim=-1)
            own.append((numbers, vectors_BC.cpu().numpy()))
        return own

    if comm is None:
        parts = embed(0, 1)
    else:
        # Batches do not depend on the number of ranks, nor do the bits of their vectors.
        mine = on_all(comm, lambda: embed(comm.rank, comm.size))
        parts = [part for rank in comm.allgather(mine) for part in rank]
    found = np.empty((len(texts), parts[0][1].shape[1] if parts else 0), np.float32)
    for numbers, vectors_BC in parts:
        found[numbers] = vectors_BC
    return found


def _batches(
    loaded: Loaded, texts: Sequence[str]
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield the numbers and the fields of texts of similar length."""
    context = loaded.model.spec.context
    device = next(loaded.model.parameters()).device
    encoder = tokenizers.Tokenizer.from_str(loaded.tokenizer.to_json())
    encoder.no_padding()
    encoder.enable_truncation(context)
    # A special token's name in a text is text.
    encoder.encode_special_tokens = True
    encoded = encoder.encode_batch(list(texts))
    order = sorted(range(len(texts)), key=lambda number: -len(encoded[number].ids))
    first = 0
    while first < len(order):
        # The longest is the first one. A text without tokens is one padded position.
        length = max(1, len(encoded[order[first]].ids))
        numbers = order[first : first + max(1, POSITIONS_AT_ONCE // length)]
        first += len(numbers)
        ids_BT = torch.zeros((len(numbers), length), dtype=torch.int64)
        kinds_BT = torch.zeros_like(ids_BT)
        for row, number in enumerate(numbers):
            each = encoded[number]
            ids_BT[row, : len(each.ids)] = torch.tensor(each.ids)
            kinds_BT[row, : len(each.ids)] = torch.tensor(each.type_ids)
        lengths_B = torch.tensor([max(1, len(encoded[number].ids)) for number in numbers])
        yield (
            numbers,
            {"ids": ids_BT.to(device), "token_types": kinds_BT.to(device), "lengths": lengths_B},
        )
