"""The rows of a decoder that reads a source: its inputs are the targets after a start token."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpillm.errors import RecipeError
from mpillm.tasks.task_catalog import TaskSettings
from mpillm.tasks.vocabulary import Vocabulary

Array = np.ndarray[Any, np.dtype[Any]]


def start_id(settings: TaskSettings, vocabulary: Vocabulary) -> int:
    """Return the id of the decoder's first token. Raises RecipeError for an unknown text."""
    if settings.start_token:
        return added_id(vocabulary, settings.start_token, "start_token")
    padding = vocabulary.padding
    return vocabulary.end_of_text if padding is None else padding


def added_id(vocabulary: Vocabulary, text: str, setting: str) -> int:
    """Return the id of an added token. Raises RecipeError where the tokenizer lacks it."""
    if text not in vocabulary.special:
        known = ", ".join(list(vocabulary.special)[:12]) or "none"
        raise RecipeError(
            f"task.{setting} = {text!r} is no added token of the tokenizer, which has {known}; "
            f"name one of them, or leave task.{setting} out"
        )
    return vocabulary.special[text]


def decoder_fields(target_BT: Array, lengths_B: Array, start: int) -> dict[str, Tensor]:
    """Make `ids`, `targets` (B, T), int64, and `counts` (B, T) of targets padded after `lengths_B`.

    Padding has the count 0. A causal decoder's real positions read none of it.
    """
    targets_BT = torch.from_numpy(target_BT.astype(np.int64))
    ids_BT = targets_BT.roll(1, 1)
    ids_BT[:, 0] = start
    counts_BT = np.arange(target_BT.shape[1]) < lengths_B[:, None]
    return {"ids": ids_BT, "targets": targets_BT, "counts": torch.from_numpy(counts_BT)}
