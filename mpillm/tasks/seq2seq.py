"""Sequence to sequence: a decoder writes the target of the source that its encoder reads."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from mpillm.models.spec import OutputKind
from mpillm.tasks.cross_entropy import CrossEntropyTask
from mpillm.tasks.decoder_rows import decoder_fields, start_id
from mpillm.tasks.task import RawArrays
from mpillm.tasks.task_catalog import TaskSettings
from mpillm.tasks.vocabulary import Lengths, Vocabulary, positions_of


class SequenceToSequence(CrossEntropyTask):
    """Translation, summaries, speech to text. Fields: `source` (B, S), or `frames` (B, 2 S, mels),
    with `source_lengths` (B,), and `ids`, `targets`, `counts`, each (B, T).
    """

    name: ClassVar[str] = "seq2seq"
    output_kind: ClassVar[OutputKind] = "next tokens of a target"
    field_names: ClassVar[tuple[str, ...]] = (
        "source",
        "frames",
        "source_lengths",
        "ids",
        "targets",
        "counts",
    )
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bits-per-byte")
    text_metrics: ClassVar[tuple[str, ...]] = ("bleu", "chrf")
    pair_kinds: ClassVar[tuple[str, ...]] = ("seq2seq", "speech-to-text")

    def __init__(self, start: int, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        """Begin each target with the token `start`."""
        super().__init__(label_smoothing, z_loss)
        self.start = start

    @classmethod
    def make(cls, settings: TaskSettings, vocabulary: Vocabulary, lengths: Lengths) -> Self:
        return cls(start_id(settings, vocabulary), **settings.terms)

    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        given = ("source", "frames", "source_lengths")
        fields = {name: torch.from_numpy(raw[name]) for name in given if name in raw}
        if "frames" in fields:
            fields["source_lengths"] = positions_of(fields["source_lengths"])
        return {**fields, **decoder_fields(raw["target"], raw["target_lengths"], self.start)}
