"""Span corruption: a decoder writes the spans that its encoder does not see (Raffel et al. 2020).

Each hidden span is one sentinel in the source. The target is each sentinel and its span.
"""

from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from mpillm.errors import RecipeError
from mpillm.models.spec import OutputKind
from mpillm.tasks.cross_entropy import CrossEntropyTask
from mpillm.tasks.decoder_rows import decoder_fields, start_id
from mpillm.tasks.row_draws import row_draws
from mpillm.tasks.task import RawArrays
from mpillm.tasks.task_catalog import TaskSettings
from mpillm.tasks.vocabulary import Lengths, Vocabulary

Array = np.ndarray[Any, np.dtype[Any]]
# T5's number; its tokenizers name them <extra_id_0> to <extra_id_99>.
SENTINELS = 100


class SpanCorruption(CrossEntropyTask):
    """Span corruption. Fields: `source` (B, S), `source_lengths` (B,), and `ids`, `targets`,
    `counts`, each (B, T). Every row of as many tokens hides as many, in as many spans.
    """

    name: ClassVar[str] = "span-corruption"
    output_kind: ClassVar[OutputKind] = "next tokens of a target"
    field_names: ClassVar[tuple[str, ...]] = (
        "source",
        "source_lengths",
        "ids",
        "targets",
        "counts",
    )
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity")

    def __init__(self, settings: TaskSettings, vocabulary: Vocabulary, lengths: Lengths) -> None:
        super().__init__(settings.label_smoothing, settings.z_loss)
        self.share, self.span_length, self.lengths = (
            settings.masked_share,
            settings.span_length,
            lengths,
        )
        self.start, self.end = start_id(settings, vocabulary), vocabulary.end_of_text
        self.padding = vocabulary.padding or 0
        self.sentinels = sentinel_ids(vocabulary)
        self.tokens = self._longest_row()

    @classmethod
    def make(cls, settings: TaskSettings, vocabulary: Vocabulary, lengths: Lengths) -> Self:
        return cls(settings, vocabulary, lengths)

    def model_settings(self, vocabulary: Vocabulary) -> dict[str, int]:
        return {"vocab_size": max(vocabulary.size, int(self.sentinels.max()) + 1)}

    def row_tokens(self, lengths: Lengths) -> int:
        return self.tokens

    def positions(self, tokens: int) -> int:
        return self.lengths.context

    def fixed_weight(self, rows: int, context: int) -> float:
        hidden, spans = self._hidden(self.tokens)
        return float(rows * (hidden + spans + 1))

    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        tokens_BW = raw["tokens"].astype(np.int64)
        rows, count = tokens_BW.shape
        hidden, spans = self._hidden(count)
        chance = row_draws(raw["keys"], count)
        sizes = self.lengths.source_context, self.lengths.context
        source_BS, target_BT = (np.full((rows, size), self.padding) for size in sizes)
        source, target = count - hidden + spans + 1, hidden + spans + 1
        for row in range(rows):
            lengths = _composition(count - hidden, spans, chance[row, hidden:])
            lengths_of_hidden = _composition(hidden, spans, chance[row, :hidden])
            source_BS[row, :source], target_BT[row, :target] = self._corrupted(
                tokens_BW[row], np.stack([lengths, lengths_of_hidden], 1).reshape(-1)
            )
        made = {
            "source": torch.from_numpy(source_BS),
            "source_lengths": torch.full((rows,), source),
        }
        return {**made, **decoder_fields(target_BT, np.full(rows, target), self.start)}

    def _corrupted(self, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        """Return the source and the target of a row whose kept and hidden spans alternate."""
        piece = np.repeat(np.arange(len(lengths)), lengths)
        hidden = piece % 2 == 1
        first = hidden & np.diff(piece, prepend=0).astype(bool)
        sentinels = self.sentinels[: len(lengths) // 2]
        source = tokens.copy()
        source[first] = sentinels
        places = np.flatnonzero(first[hidden])
        target = np.insert(tokens[hidden], places, sentinels)
        return np.append(source[~hidden | first], self.end), np.append(target, self.end)

    def _hidden(self, tokens: int) -> tuple[int, int]:
        """Return how many of a row's tokens are hidden, and in how many spans."""
        hidden = min(max(round(tokens * self.share), 1), tokens - 1)
        spans = min(max(round(hidden / self.span_length), 1), hidden, tokens - hidden)
        return hidden, spans

    def _longest_row(self) -> int:
        """Return the tokens of which source and target fit the model. Raises RecipeError."""

        def fits(tokens: int) -> bool:
            hidden, spans = self._hidden(tokens)
            source, target = tokens - hidden + spans + 1, hidden + spans + 1
            return source <= self.lengths.source_context and target <= self.lengths.context

        tokens = 1
        while fits(tokens + 1):
            tokens += 1
        if tokens < 2 or self._hidden(tokens)[1] > len(self.sentinels):
            raise RecipeError(
                f"span corruption of sources of {self.lengths.source_context:,} tokens and targets "
                f"of {self.lengths.context:,} needs 1 to {SENTINELS} spans a row; "
                "set other lengths of the model, or a longer task.span_length"
            )
        return tokens


def sentinel_ids(vocabulary: Vocabulary) -> Array:
    """Return the ids of the sentinels: the tokenizer's own, else ids after its vocabulary."""
    own = [vocabulary.special.get(f"<extra_id_{number}>") for number in range(SENTINELS)]
    known = [number for number in own if number is not None]
    return np.array(known or range(vocabulary.size, vocabulary.size + SENTINELS), np.int64)


def _composition(total: int, parts: int, chance: Array) -> Array:
    """Cut `total` into `parts` lengths of 1 or more, by `total` random numbers: uniformly."""
    cuts = np.sort(np.argsort(chance[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))
