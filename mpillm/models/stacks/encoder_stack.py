"""The encoder on one device: from tokens, images or sound to a head; or a part of its blocks.

Shapes: B sequences, T positions, C width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from mpillm.errors import RecipeError
from mpillm.models.encoder import EncoderConfig
from mpillm.models.layers.block import Balances
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.dropout import (
    EMBEDDING,
    EMBEDDING_LAYER,
    HEAD,
    HEAD_LAYER,
    drop,
)
from mpillm.models.layers.norm import make_norm
from mpillm.models.layers.patch_embedding import PatchEmbedding
from mpillm.models.layers.sinusoidal import sinusoidal_positions
from mpillm.models.layers.sound_embedding import SoundEmbedding
from mpillm.models.linear_head import LinearHead, Outputs, plain_outputs
from mpillm.models.part_module import Fields, PartOutput, Streams
from mpillm.models.spec import Part
from mpillm.models.stacks.encoder_head import activate, pool
from mpillm.models.stacks.layer_stack import LayerStack


class Encoder(LayerStack):
    """A Transformer encoder, or a part of it."""

    config: EncoderConfig
    table_TC: Tensor | None

    def __init__(self, config: EncoderConfig, part: Part | None = None) -> None:
        super().__init__(config, part)
        self.config = config
        self._add_embeddings()
        self._add_layers(causal=False)
        self._add_head()
        self.tie()

    def _add_embeddings(self) -> None:
        config, width, begins = self.config, self.config.width, self.begins
        tokens, images = begins and config.reads_tokens, begins and config.image_size > 0
        self.embedding = nn.Embedding(config.vocab_size, width) if tokens else None
        size = config.image_size, config.patch_size, config.channels, width
        self.patches = PatchEmbedding(*size) if images else None
        self.sound = SoundEmbedding(config.mels, width) if begins and config.mels else None
        learned = begins and config.positions == "learned" and not images
        rows = config.position_offset + config.context
        self.position = nn.Embedding(rows, width) if learned else None
        kinds = begins and config.token_types
        self.token_type = nn.Embedding(config.token_types, width) if kinds else None
        sinusoidal = begins and config.positions == "sinusoidal"
        table_TC = sinusoidal_positions(config.context, width, ends=True) if sinusoidal else None
        self.register_buffer("table_TC", table_TC, persistent=False)
        self.embedding_norm = make_norm(config) if begins and config.embedding_norm else None

    def _add_head(self) -> None:
        config, width, ends = self.config, self.config.width, self.ends
        if ends and config.head in ("sequence", "token") and not config.classes:
            raise RecipeError(
                f'model.head = "{config.head}" needs model.classes, the number of classes; '
                "data without labels has none"
            )
        self.norm = make_norm(config) if ends and config.ends_in_norm else None
        dense, normed = ends and config.head_layer != "none", ends and config.head_layer == "norm"
        self.head_dense = nn.Linear(width, width, bias=config.bias) if dense else None
        self.head_norm = make_norm(config) if normed else None
        rows = config.head_rows if ends else 0
        self.head = nn.Linear(width, rows, bias=config.head_bias) if rows else None

    def additions(self, name: str) -> int:
        return 1 if self.config.norm_place == "post" else super().additions(name)

    def forward_part(self, fields: Fields, streams: Streams) -> PartOutput:
        """Compute the part. Fields: where it begins `ids` (B, T) with `token_types` (B, T), 0
        without, or `pixels` (B, channels, height, width), or `frames` (B, 2 T, mels); everywhere
        `documents` (B, T), `lengths` (B,), best in host memory, and `dropout_keys` (B,), optional.

        A position attends to its document. Those from `lengths` on are padding: none attends to
        them. Raises ValueError when the positions exceed the context.
        """
        pivot_BTC, x_BTC, balance = self._states(fields, streams)
        outputs = self._outputs(x_BTC, fields) if self.ends else (x_BTC,)
        return PartOutput(outputs, (pivot_BTC,), balance)

    def hidden_states(self, fields: Fields) -> Tensor:
        return self._states(fields, ())[1]

    def _states(self, fields: Fields, streams: Streams) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the pivot, the stream after the last block and its norm, and the balance."""
        pivot_BTC = self._embed(fields) if self.begins else streams[0]
        x_BTC = self._summed(pivot_BTC, fields) if self.begins else pivot_BTC
        spans, rotations = self._spans(fields, x_BTC), self._rotations(0, x_BTC)
        balances = Balances()
        for number, block in self.numbered_blocks():
            rotation = rotations[self.config.slides(number)]
            given = x_BTC, rotation, spans, None, 0, self._keys(fields, number)
            x_BTC = self._run(block, number, balances, *given)
        x_BTC = x_BTC if self.norm is None else self.norm(x_BTC)
        return pivot_BTC, x_BTC, balances.total(self.config)

    def _embed(self, fields: Fields) -> Tensor:
        """Return what a split backward pass stops at, ahead of all sums."""
        name, module = self._input
        x_BTC: Tensor = module(fields[name])
        return x_BTC

    @property
    def _input(self) -> tuple[str, nn.Module]:
        """The field that the model reads, and the module that embeds it."""
        made = {"ids": self.embedding, "pixels": self.patches, "frames": self.sound}
        return next((name, module) for name, module in made.items() if module is not None)

    def _summed(self, x_BTC: Tensor, fields: Fields) -> Tensor:
        """Add the other embeddings, then norm and drop."""
        if self.patches is not None:
            x_BTC = self.patches.with_positions(x_BTC)
        length = x_BTC.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} positions exceed the context of {self.config.context}")
        if self.token_type is not None:
            kinds_BT = fields.get("token_types")
            weight = self.token_type.weight
            x_BTC = x_BTC + (weight[0] if kinds_BT is None else self.token_type(kinds_BT))
        if self.position is not None:
            first = self.config.position_offset
            x_BTC = x_BTC + self.position.weight[first : first + length]
        if self.table_TC is not None:
            x_BTC = x_BTC + self.table_TC[:length].to(x_BTC.dtype)
        if self.embedding_norm is not None:
            x_BTC = self.embedding_norm(x_BTC)
        keys_B = self._keys(fields, EMBEDDING_LAYER)
        return drop(x_BTC, self.config.embedding_dropout, keys_B, EMBEDDING)

    def _spans(self, fields: Fields, x_BTC: Tensor) -> DocumentSpans | None:
        """Find the documents of the rows; the padding of a row is one of its own."""
        document_BT, lengths_B = fields.get("documents"), fields.get("lengths")
        shape = x_BTC.shape[:2]
        if lengths_B is not None and (document_BT is not None or int(lengths_B.min()) < shape[1]):
            lengths_B = lengths_B.cpu()
            document_BT = torch.zeros(shape) if document_BT is None else document_BT.cpu()
            document_BT = document_BT.masked_fill(torch.arange(shape[1]) >= lengths_B[:, None], -1)
        return None if document_BT is None else DocumentSpans(document_BT, x_BTC.device)

    def _outputs(self, x_BTC: Tensor, fields: Fields) -> Outputs:
        """Return what the head gives: see `EncoderSettings.head`."""
        config = self.config
        if config.head == "none":
            pooled = self.head_dense is not None
            return (x_BTC, self._layer(self._pooled(x_BTC, fields))) if pooled else (x_BTC,)
        assert self.head is not None
        x = self._layer(self._pooled(x_BTC, fields) if config.head == "sequence" else x_BTC)
        if config.head == "lm":
            return (LinearHead.of(x, self.head),)
        logits = self.head(drop(x, config.head_dropout, self._keys(fields, HEAD_LAYER), HEAD))
        return (logits.transpose(1, 2) if config.head == "span" else logits,)

    def _pooled(self, x_BTC: Tensor, fields: Fields) -> Tensor:
        return pool(x_BTC, self.config.pooling, fields.get("lengths"))

    def _layer(self, x: Tensor) -> Tensor:
        """Apply the layer ahead of the head's product."""
        if self.head_dense is not None:
            x = activate(self.head_dense(x), self.config)
        return x if self.head_norm is None else self.head_norm(x)

    def forward(self, given: Tensor, **fields: Tensor) -> Tensor:
        """Return the first output of the ids, pixels or frames `given`; the rest as in
        `forward_part`. A part that does not begin the model takes the stream of the part before.
        """
        own = {self._input[0]: given} if self.begins else {}
        return plain_outputs(self.forward_part({**own, **fields}, (given,)).outputs)[0]
