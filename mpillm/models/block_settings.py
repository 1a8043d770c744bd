"""The settings of a Transformer's blocks: keys of [model], their checks and what follows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Le

from mpillm.errors import RecipeError
from mpillm.models.spec import LayerRecompute, ModelSpec

Positive = Annotated[int, Gt(0)]
NotNegative = Annotated[int, Ge(0)]
PositiveNumber = Annotated[float, Gt(0)]
NotNegativeNumber = Annotated[float, Ge(0)]
GATED = ("swiglu", "geglu", "geglu-exact")


def check_dropout(name: str, probability: float) -> None:
    """Raise RecipeError unless the setting `name` is in [0, 1)."""
    if not 0 <= probability < 1:
        raise RecipeError(
            f"{name} = {probability:g} is the probability that a value is set to 0: "
            "0 (none) or more, and less than 1, which would leave nothing; try 0.1"
        )


@dataclass(frozen=True)
class BlockSettings(ModelSpec):
    """The switches of the one block that all Transformers here are made of.

    Lengths are in tokens, widths in features. The defaults are a Llama. docs/architectures.md lists
    the settings of each family.
    """

    shared_inputs: ClassVar[tuple[str, ...]] = ("documents",)
    host_inputs: ClassVar[tuple[str, ...]] = ("documents",)
    recomputes: ClassVar[tuple[LayerRecompute, ...]] = ("attention", "full")
    causal: ClassVar[bool] = True
    """Whether positions attend to none after them, as the costs count them."""

    layers: Positive = 4
    width: Positive = 128
    heads: Positive = 4
    kv_heads: NotNegative = 0
    """Heads of keys and values (grouped-query attention); 0: as many as `heads`."""
    head_width: NotNegative = 0
    """Width of a head; 0: width / heads."""
    hidden: NotNegative = 0
    """Width inside the feed-forward.

    0: 4 × width for GELU; 8/3 × width for gated ones, rounded up to a multiple of 64.
    """
    experts: NotNegative = 0
    """Feed-forwards of which the router chooses a few for each position; 0: one, without router."""
    experts_per_token: Positive = 2
    expert_softmax: Literal["chosen", "all"] = "chosen"
    """The experts whose shares add up to 1."""
    shared_hidden: NotNegative = 0
    """Width inside of an expert that all positions pass; 0: there is none."""
    shared_gate: bool = False
    """Scale what this expert adds by a number from 0 to 1 for each position."""
    balance_loss: NotNegativeNumber = 0.0
    """Factor of a loss that spreads the choices of experts, in training alone; 0: there is none."""
    context: Positive = 256
    vocab_size: NotNegative = 0
    """0: taken from the data."""
    norm: Literal["rmsnorm", "rmsnorm1p", "layernorm", "layernorm-nobias"] = "rmsnorm"
    """`rmsnorm1p` scales by 1 + weight (Gemma)."""
    norm_place: Literal["pre", "sandwich", "post"] = "pre"
    """`sandwich`: norms of the inputs, and of the outputs, of attention and feed-forward. `post`:
    of the stream after each was added.
    """
    first_norm: bool = True
    """False: the first block has no norm ahead of its attention (ModernBERT)."""
    query_key_norm: bool = False
    """Norms of each head's queries and keys, ahead of the rotation."""
    positions: Literal["rotary", "learned", "sinusoidal", "relative", "none"] = "rotary"
    relative_buckets: Positive = 32
    """Of `relative` positions: the classes of distances, with a bias of each head's scores."""
    relative_distance: Positive = 128
    """Larger distances, in tokens, are all of one class."""
    activation: Literal["swiglu", "gelu", "gelu-exact", "geglu", "geglu-exact", "relu", "silu"] = (
        "swiglu"
    )
    """GELU is in its tanh form, but for `exact`."""
    bias: bool = False
    """Biases of all products of a block."""
    qkv_bias: bool = False
    """Biases of query, key and value alone."""
    key_bias: bool = True
    """Whether keys have a bias, where queries and values do."""
    rope_theta: PositiveNumber = 10000.0
    rope_share: Annotated[float, Gt(0), Le(1)] = 1.0
    """The share of a head's features that turn, from the first on."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How angles are made slower for contexts longer than `rope_original_context`."""
    rope_factor: PositiveNumber = 1.0
    """The slowest angles are divided by it."""
    rope_original_context: NotNegative = 0
    """The context before the scaling, of `llama3` and `yarn`; 0: context / rope_factor."""
    rope_low: PositiveNumber = 1.0
    """Angles with fewer turns in the original context are divided by the factor, of `llama3`."""
    rope_high: PositiveNumber = 4.0
    """Angles with more turns in the original context stay as they are, of `llama3`."""
    window: NotNegative = 0
    """Positions that a position attends to, itself and those ahead of it; 0: all. In an encoder
    half of them on each side, next to itself.
    """
    full_every: NotNegative = 0
    """Every so many layers one has no window; 0: all layers have the window."""
    full_first: NotNegative = 0
    """The first layer without a window, counted from 1; 0: that of number `full_every`."""
    window_rope_theta: NotNegativeNumber = 0.0
    """`rope_theta` of layers with a window, which are then not scaled; 0: as in other layers."""
    query_scale_width: NotNegativeNumber = 0.0
    """Attention's scores are divided by its square root; 0: the width of a head."""
    attention_soft_cap: NotNegativeNumber = 0.0
    """Scores become cap × tanh(score / cap), without a fused kernel; 0: as they are."""
    norm_epsilon: PositiveNumber = 1e-5
    dropout: float = 0.0
    """Probability that training sets a value to 0 where attention or feed-forward adds to the
    stream.
    """
    attention_dropout: float = 0.0
    """The same for the attention's probabilities; they are then computed without a fused kernel."""
    embedding_dropout: float = 0.0
    """The same for the embedding's outputs."""

    def __post_init__(self) -> None:
        for name in ("dropout", "attention_dropout", "embedding_dropout"):
            check_dropout(name, getattr(self, name))
        self._check_heads()
        self._check_rope()
        self._check_experts()
        if self.full_every and not self.window:
            raise RecipeError(
                f"full_every = {self.full_every} names the layers without a window, "
                "and there is no window; set window, or drop full_every"
            )
        if self.full_first > self.full_every:
            raise RecipeError(
                f"full_first = {self.full_first} is not one of the first full_every = "
                f"{self.full_every} layers, of which one has no window; choose one of them"
            )

    def _check_heads(self) -> None:
        if self.width % self.heads and not self.head_width:
            raise RecipeError(
                f"width {self.width} is not divisible by {self.heads} heads; "
                f"use a width of {self.width // self.heads * self.heads or self.heads} "
                f"or {(self.width // self.heads + 1) * self.heads}, or another number of heads"
            )
        if self.heads % self.key_value_heads:
            raise RecipeError(
                f"{self.heads} heads are not divisible by {self.key_value_heads} kv_heads; "
                f"use a divisor of {self.heads}"
            )
        if self.positions == "rotary" and self.head_features % 2:
            given = "head_width" if self.head_width else f"{self.width} / {self.heads}"
            raise RecipeError(
                f"rotary positions need an even width a head, and {given} is {self.head_features}"
            )
        pairs = self.rotary_features // 2
        if self.positions == "rotary" and (not pairs or self.rotary_features % 2):
            raise RecipeError(
                f"rope_share = {self.rope_share:g} turns {self.rotary_features} of the "
                f"{self.head_features} features of a head, and they turn in pairs; "
                f"take a share such as {2 * max(1, pairs) / self.head_features:g}"
            )

    def _check_sinusoids(self, ends: bool) -> None:
        # A sine and a cosine for each angle; where the last one is 1/10000, it is not the first.
        least = 4 if ends else 2
        if self.positions == "sinusoidal" and (self.width % 2 or self.width < least):
            raise RecipeError(
                f"sinusoidal positions need an even width of {least} or more, and width is "
                f"{self.width}; set width to {max(least, self.width + self.width % 2)}"
            )

    def _check_rope(self) -> None:
        if self.rope_scaling == "llama3" and not self.rope_low < self.rope_high:
            raise RecipeError(
                f"rope_low = {self.rope_low:g} turns are not less than "
                f"rope_high = {self.rope_high:g}; those between are scaled in part"
            )
        if self.rope_scaling == "none" and self.rope_factor != 1:
            raise RecipeError(
                f"rope_factor = {self.rope_factor:g} scales nothing without rope_scaling; "
                "set it to linear, llama3 or yarn"
            )

    def _check_experts(self) -> None:
        if not self.experts and self.balance_loss:
            raise RecipeError(
                f"balance_loss = {self.balance_loss:g} spreads the choices of experts, and there "
                "are none; set experts, or drop balance_loss"
            )
        if not self.experts and (self.shared_hidden or self.shared_gate):
            raise RecipeError("a shared expert needs others: set experts, or drop shared_hidden")
        if self.shared_gate and not self.shared_hidden:
            raise RecipeError("shared_gate scales a shared expert; set shared_hidden, its width")
        if self.experts and self.experts_per_token > self.experts:
            raise RecipeError(
                f"experts_per_token = {self.experts_per_token} is more than "
                f"experts = {self.experts}; choose fewer, or add some"
            )
        if self.experts and self.bias:
            raise RecipeError("experts have no biases; set qkv_bias in place of bias")

    @property
    def head_features(self) -> int:
        """The width of a head."""
        return self.head_width or self.width // self.heads

    @property
    def rotary_features(self) -> int:
        """The features of a head that turn, where positions are rotary."""
        return int(self.head_features * self.rope_share)

    @property
    def query_width(self) -> int:
        """The width of all heads' queries, and of the attention's result."""
        return self.heads * self.head_features

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def key_value_width(self) -> int:
        """The width of all heads' keys, and of their values."""
        return self.key_value_heads * self.head_features

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        return self.heads, self.key_value_heads, self.head_features

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate."""
        return self.activation in GATED

    @property
    def hidden_width(self) -> int:
        if self.hidden:
            return self.hidden
        # A gated one has three matrices where GELU has two: 8/3 keeps the parameters equal
        # (Shazeer 2020). Multiples of 64 suit vector units and matrix tiles.
        return -(-8 * self.width // (3 * 64)) * 64 if self.gated else 4 * self.width

    def slides(self, block: int) -> bool:
        """Return whether block number `block` (from 0) attends within the window."""
        full = self.full_every and (block + 1 - self.full_first) % self.full_every == 0
        return bool(self.window and not full)

    def norms_input(self, block: int) -> bool:
        """Return whether block number `block` (from 0) has a norm ahead of its attention."""
        return block > 0 or self.first_norm

    def resolved(self) -> Self:
        """Return these settings with numbers in place of each 0 that means a default."""
        return self.replace(
            kv_heads=self.key_value_heads,
            head_width=self.head_features,
            hidden=self.hidden_width,
            query_scale_width=self.query_scale_width or self.head_features,
        )

    @property
    def blocks(self) -> int:
        return self.layers

    @property
    def stream_widths(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def drops(self) -> bool:
        return bool(self.dropout or self.attention_dropout or self.embedding_dropout)

    @property
    def cut_dims(self) -> Mapping[str, int]:
        # Megatron's cut (Shoeybi et al. 2019): columns into heads and hidden features, rows back
        # out of them.
        columns = ("query", "key", "value", "gate", "up")
        rows = ("attention.output.weight", "down.weight")
        return {
            **{f"{name}.{kind}": 0 for name in columns for kind in ("weight", "bias")},
            **dict.fromkeys(rows, 1),
            "embedding.weight": 0,
            "head.weight": 0,
            "head.bias": 0,
        }

    @property
    def cut_units(self) -> Mapping[str, int]:
        heads, key_value = self.heads, self.key_value_heads
        columns = {"query": heads, "key": key_value, "value": key_value}
        return {
            **{f"{name}.{kind}": n for name, n in columns.items() for kind in ("weight", "bias")},
            "attention.output.weight": heads,
        }

    @property
    def uncut_reason(self) -> str:
        if self.experts:
            return f"its layers have {self.experts} experts, which are not cut yet"
        if self.positions == "relative":
            return 'positions = "relative" have a bias of each head, which is not cut yet'
        return super().uncut_reason
