"""The costs of a Transformer's blocks: parameters, FLOPs and bytes, counted from the settings."""

from collections import Counter
from dataclasses import dataclass

from mpillm.models.block_settings import BlockSettings
from mpillm.models.head_chunks import chunk_bytes, head_bytes
from mpillm.models.spec import LayerRecompute, Part, Recompute, recompute_counts, recompute_of


@dataclass(frozen=True)
class BlockCosts(BlockSettings):
    """What the blocks of these settings cost; an architecture adds its ends."""

    def _block_products(self, experts: int) -> int:
        """Count the weights of one block's matrix products, with so many of its experts."""
        attention = 2 * self.width * (self.query_width + self.key_value_width)
        hidden = self.hidden_width * (experts or 1) + self.shared_hidden
        router = self.width * (self.experts + self.shared_gate)
        return attention + router + (3 if self.gated else 2) * hidden * self.width

    def _block_vectors(self) -> int:
        """Count the norms' and biases' numbers of one block."""
        norms = self._block_norms * self._norm_parameters(self.width)
        biases = 0
        if self.bias:
            biases = self.width + self.hidden_width * (2 if self.gated else 1)
        return norms + biases + self._attention_vectors

    @property
    def _attention_vectors(self) -> int:
        """The biases of an attention, and the norms of its queries and keys."""
        norms = 2 * self._norm_parameters(self.head_features) if self.query_key_norm else 0
        biases = self.width if self.bias else 0
        if self.bias or self.qkv_bias:
            biases += self.query_width + (1 + self.key_bias) * self.key_value_width
        return norms + biases

    @property
    def _active(self) -> int:
        """The experts that a position passes; 0 without experts."""
        return self.experts_per_token if self.experts else 0

    @property
    def _block_norms(self) -> int:
        return 4 if self.norm_place == "sandwich" else 2

    def _norm_parameters(self, features: int) -> int:
        return features * (2 if self.norm == "layernorm" else 1)

    def _block_parameters(self, part: Part) -> int:
        blocks = part.count * (self._block_products(self.experts) + self._block_vectors())
        skips = part.first == 0 < part.last and not self.norms_input(0)
        return blocks - skips * self._norm_parameters(self.width)

    def _parameters_of_block(self, block: int) -> int:
        return self._block_parameters(Part(block, block + 1))

    def block_parameters_of(self, part: Part) -> tuple[int, int]:
        blocks = [self._parameters_of_block(block) for block in range(part.first, part.last)]
        return self.parameters_of(part) - sum(blocks), max(blocks)

    def expert_parameters_of(self, part: Part) -> int:
        matrices = 3 if self.gated else 2
        return part.count * self.experts * matrices * self.hidden_width * self.width

    @property
    def block_flops(self) -> tuple[float, ...]:
        """6 for each weight of a product, and 12 · width · context for the attention.

        Source: PaLM, Chowdhery et al. 2022, appendix B. That counts twice the positions that a
        position attends to on average, and so does the count for a window. Those without `causal`
        are counted once.
        """
        products, reach = 6 * self._block_products(self._active), min(self.window, self.context)
        windowed = 2 * reach - reach * reach / self.context
        if not self.causal:
            side = min(self.window // 2, self.context - 1)
            windowed = 2 * side + 1 - side * (side + 1) / self.context
        return tuple(
            products + 12 * self.query_width * (windowed if self.slides(block) else self.context)
            for block in range(self.layers)
        )

    # What autograd saves of one token in a block, tensor by tensor: these counts follow
    # layers/attention.py and layers/block.py. tests/models/test_saved_bytes.py compares both.

    def _norm_saved(self, element_bytes: int, features: int = 0) -> int:
        """Count a norm: its input. In 16 bits RMSNorm keeps it in float32, with the normalised
        values.
        """
        features = features or self.width
        if self.norm.startswith("layernorm"):
            return element_bytes * features + 2 * 4
        return (1 if element_bytes == 4 else 2) * 4 * features + 4

    @property
    def _is_unfused(self) -> bool:
        """Whether the attention holds its probabilities, as no fused kernel does."""
        return bool(self.attention_dropout or self.attention_soft_cap)

    def _attention_saved(self, element_bytes: int, slides: bool) -> float:
        """Count an attention: the results of norm, query, key, value and of the attention, and the
        logarithm of each head's sum. Without a fused kernel the probabilities instead.
        """
        query, key_value = self.query_width, self.key_value_width
        heads = self.heads + self.key_value_heads
        norms = heads * self._norm_saved(element_bytes, self.head_features)
        features = self.width + 2 * query
        saved = norms if self.query_key_norm else 0
        if self._is_unfused:
            # Grouped heads are repeated: that path has no kernel for groups.
            features += 2 * query
            saved += self.heads * self.context * self._probability_saved(element_bytes)
        elif slides and self._is_cut:
            # Keys and values are copied into pairs of windows, or into triples of halves, and
            # results are joined.
            features += query + 2 * key_value * (2 if self.causal else 3)
            saved += 4 * self.heads
        else:
            features += 2 * key_value
            saved += 4 * self.heads
        return element_bytes * features + saved

    def _probability_saved(self, element_bytes: int) -> int:
        """Count what is saved of a probability: itself in float32, and in the values' dtype.

        With dropout a mask, and what it leaves; with a soft cap the hyperbolic tangent.
        """
        dropped = 1 + element_bytes if self.attention_dropout else 0
        other = element_bytes if element_bytes != 4 and not dropped else 0
        return 4 + dropped + other + (4 if self.attention_soft_cap else 0)

    def _window_mask_bytes(self, element_bytes: int) -> int:
        """Count the masks of a layer with a window: of its queries and two windows of keys.

        To both sides they are three: of the first half, of those inside, and of the last ones.
        """
        if self._is_unfused:
            return 0
        if self.causal:
            return element_bytes * 2 * self.window**2 if self._is_cut else 0
        half = max(self.window // 2, 1)
        if not self._is_cut:
            return element_bytes * self.context**2 if self.context > self.window // 2 + 1 else 0
        rest = self.context % half
        return element_bytes * ((2 + 3) * half**2 + (half + rest) * (2 * half + rest))

    @property
    def _is_cut(self) -> bool:
        """Whether an attention with a window cuts the positions, as window_attention.py does."""
        if self.causal:
            return self.window < self.context
        return self.context // max(self.window // 2, 1) > 3

    def _feed_forward_saved(self, element_bytes: int) -> int:
        """Count a feed-forward: the norm's result; gate, its activation, up and their product where
        it has a gate, up and its activation else; of ReLU the latter alone.
        """
        inside = 4 if self.gated else 1 if self.activation == "relu" else 2
        if not self.experts:
            return element_bytes * (self.width + self.hidden_width * inside)
        return self._mixture_saved(element_bytes, inside)

    def _mixture_saved(self, element_bytes: int, inside: int) -> int:
        """Count a mixture: the norm's result, the router's shares, and of each chosen expert its
        input, inside and output, with its share and number.
        """
        chosen = self.experts_per_token
        features = self.width + chosen * (2 * self.width + self.hidden_width * inside)
        features += self.shared_hidden * inside + (self.width + 2) * self.shared_gate
        return element_bytes * features + 4 * self.experts + 40 * chosen

    def _block_saved(
        self, element_bytes: int, recompute: LayerRecompute, slides: bool = False
    ) -> tuple[float, float]:
        """Return the bytes of one token and block that are kept, and that are computed again."""
        stream, mask = element_bytes * self.width, self.width if self.dropout else 0
        norms = self._block_norms // 2 * self._norm_saved(element_bytes)
        attention = norms + self._attention_saved(element_bytes, slides)
        feed_forward = norms + self._feed_forward_saved(element_bytes)
        if recompute == "full":
            return stream, attention + feed_forward + 2 * mask - stream
        if recompute == "attention":
            # Those of the feed-forward are freed before the attention runs again.
            again = attention + self._attention_working(element_bytes) - feed_forward
            # A norm after it is outside of what is computed again.
            after = norms if self.norm_place == "post" else 0
            return stream + feed_forward + after + 2 * mask, max(0, again - after)
        return attention + feed_forward + 2 * mask, 0

    def _attention_working(self, element_bytes: int) -> int:
        """Count a token's temporary results in the backward pass of an attention."""
        probabilities = self.heads * self.context * 8 if self._is_unfused else 0
        return 2 * element_bytes * self.width + probabilities

    def _kinds(self, part: Part, recompute: Recompute) -> dict[tuple[LayerRecompute, bool], int]:
        """Count the blocks of `part` by what is computed again and whether they have a window."""
        if not self.window:
            return {(kind, False): n for kind, n in recompute_counts(recompute, part).items()}
        return Counter(
            (recompute_of(recompute, block), self.slides(block))
            for block in range(part.first, part.last)
        )

    def _block_bytes(
        self, part: Part, rows: int, element_bytes: int, recompute: Recompute
    ) -> tuple[float, float]:
        """Return the bytes of one token that the blocks of `part` keep, and the largest block's
        that are computed again.
        """
        kept, again = 0.0, 0.0
        mask = self._window_mask_bytes(element_bytes) / (rows * self.context)
        for (kind, slides), count in self._kinds(part, recompute).items():
            saved, once_more = self._block_saved(element_bytes, kind, slides)
            masked = mask if slides else 0
            kept += count * (saved + (masked if kind == "none" else 0))
            again = max(again, once_more + (0 if kind == "none" else masked))
        if isinstance(recompute, int):
            # The backward pass has freed the blocks after the last one that is computed again.
            after = part.last % recompute
            again = max(0, again - after * self._block_saved(element_bytes, "none")[0])
        if part.first == 0 and not self.norms_input(0) and recompute_of(recompute, 0) == "none":
            kept -= self._norm_saved(element_bytes)
        return kept, again

    def activation_bytes(self, part: Part, rows: int, element_bytes: int = 4) -> int:
        return self.recompute_bytes(part, rows, element_bytes, "none")[0]

    def working_bytes(self, rows: int, element_bytes: int = 4) -> int:
        """Count the gradients of the stream and inside the feed-forward."""
        features = 2 * self.width + 2 * self.hidden_width
        if not self.gated:
            features = 3 * self.width + self.hidden_width
        # Sorted by expert and not, a position's chosen ones have a gradient each.
        features += 3 * self._active * self.width
        nbytes = element_bytes * features
        if self._is_unfused:
            nbytes = max(nbytes, self._attention_working(element_bytes))
        return rows * self.context * nbytes

    def scoring_bytes(self, rows: int, element_bytes: int = 4) -> int:
        """Count the streams and the insides of the feed-forward, or of an attention with rotary
        positions.
        """
        inside = self.hidden_width * (3 if self.gated else 2)
        attention = 9 * max(self.width, self.query_width)
        nbytes = element_bytes * max(4 * self.width + inside, attention)
        if self.attention_soft_cap:
            # Scores, their tangents and their probabilities, in float32.
            nbytes += 3 * 4 * self.heads * self.context
        return rows * self.context * nbytes

    def output_bytes(self, rows: int, device: str = "cpu") -> int:
        """Count a loss in chunks with the gradients that it holds: of hidden states and head.

        A task that reads plain logits takes more: 3 times their bytes in float32.
        """
        return head_bytes(rows * self.context, self.width, self.vocab_size, device)

    def logits_bytes(self, rows: int, device: str = "cpu") -> int:
        """Count one chunk of logits."""
        return chunk_bytes(rows * self.context, self.vocab_size, device)
