"""Cut a part of a model from outside: weights to a rank's pieces, and the stream between them.

The layers compute with the rank's heads and hidden features as with any number of them. Ahead of
attention and feed-forward a hook gathers the stream; their last products give the own tokens.
"""

from typing import Any

from torch import Tensor, nn

from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.attention import Attention
from mpillm.models.layers.block import BlockLayers
from mpillm.models.layers.dropout import of_rows
from mpillm.models.layers.feed_forward import FeedForward
from mpillm.models.linear_head import LinearHead, VocabularyShard
from mpillm.models.part_module import Fields, PartModule, PartOutput, Streams, WeightPiece
from mpillm.parallel.tensor.cut_modules import HeadsLinear, RowLinear, VocabularyEmbedding
from mpillm.parallel.tensor.stream import TensorStream
from mpillm.parallel.tensor.vocabulary_shard import ShardExchange
from mpillm.parallel.tensor.weight_cuts import WeightCut, cut_of, own_key_value_heads

# The places of the stream and the dropout keys among the arguments of a block and an attention.
STREAM, KEYS = 0, 5


def cut_part(part: PartModule, stream: TensorStream, shards: ShardExchange) -> dict[str, WeightCut]:
    """Cut `part`, whose weights have no values yet, for a rank of `stream`; return the cut weights
    by their names in the whole model.

    Names of weights stay as they are. Where the part does not begin or end the model, it then takes
    and gives the own tokens of streams. Gradients of weights that are not cut are those of the own
    tokens and heads: they must be summed over the ranks.
    """
    cuts = _cut_weights(part, stream.size, stream.rank)
    part.pieces = {name: WeightPiece(cut.shape, cut.index) for name, cut in cuts.items()}
    blocks = [block for block in part.modules() if isinstance(block, BlockLayers)]
    for block in blocks:
        _cut_block(block, part, stream)
    blocks[0].register_forward_pre_hook(lambda _, given: (stream.own(given[STREAM]), *given[1:]))
    if "embedding.weight" in cuts and part.begins:
        cut, weight = cuts["embedding.weight"], part.get_parameter("embedding.weight")
        part.embedding = VocabularyEmbedding(weight, cut.first, cut.shape[0], stream)
    head = cuts.get(part.spec.tied_weights.get("head.weight", "head.weight"))
    _pass_own_tokens(part, stream, shards.shard(head) if head else None)
    return cuts


def _cut_weights(part: PartModule, size: int, rank: int) -> dict[str, WeightCut]:
    """Replace the weights that are cut; a tied weight by one Parameter."""
    cuts: dict[str, WeightCut] = {}
    pieces: dict[nn.Parameter, nn.Parameter] = {}
    for name, weight in list(part.named_parameters(remove_duplicate=False)):
        cut = cut_of(part.spec, name, tuple(weight.shape), size, rank)
        if cut is None:
            continue
        if weight not in pieces:
            piece = weight.new_empty(weight[cut.index].shape)
            pieces[weight] = nn.Parameter(piece, weight.requires_grad)
        part.set_weight(name, pieces[weight])
        cuts[part.spec.tied_weights.get(name, name)] = cut
    return cuts


def _cut_block(block: BlockLayers, part: PartModule, stream: TensorStream) -> None:
    """Let the layers of a block compute the rank's heads and features of all tokens."""
    attention, feed_forward = block.attention, block.feed_forward
    assert isinstance(attention, Attention)
    assert isinstance(feed_forward, FeedForward)
    spec = part.spec
    assert isinstance(spec, BlockSettings)
    if spec.key_value_heads % stream.size:
        heads = own_key_value_heads(spec.heads, spec.key_value_heads, stream.size, stream.rank)
        for name in ("key", "value"):
            setattr(
                attention, name, HeadsLinear(getattr(attention, name), heads, spec.head_features)
            )
    for layer, name in ((attention, "output"), (feed_forward, "down")):
        setattr(layer, name, RowLinear(getattr(layer, name), stream))
    first_head = stream.rank * spec.heads // stream.size
    attention.pattern = attention.pattern._replace(first_head=first_head)

    def enter_block(block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pass the own rows' keys on, or note where the own positions begin."""
        split, keys_B = stream.split, given[KEYS]
        assert isinstance(block, BlockLayers)
        block.first_position = split.first(stream.rank) if split.dim else 0
        own_B = keys_B if keys_B is None or split.dim else of_rows(keys_B, stream.own)
        return *given[:KEYS], own_B, *given[KEYS + 1 :]

    def enter_attention(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        keys_B = given[KEYS]
        if keys_B is not None:
            # Probabilities of all rows are dropped, where there is dropout of them.
            keys_B = stream.all_keys(keys_B) if attention.pattern.dropout else None
        return stream.gathered(given[STREAM]), *given[1:KEYS], keys_B, *given[KEYS + 1 :]

    block.register_forward_pre_hook(enter_block)
    attention.register_forward_pre_hook(enter_attention)
    feed_forward.register_forward_pre_hook(lambda _, given: (stream.gathered(given[STREAM]),))


def _pass_own_tokens(part: PartModule, stream: TensorStream, shard: VocabularyShard | None) -> None:
    """Let `forward_part` take the own tokens of streams, and give heads the hidden states of all.

    Where the part begins, it sees streams of the whole shape, with zeros for other ranks' tokens:
    positions and documents are those of the whole batch. Its first block takes the own tokens.
    """
    whole = part.forward_part

    def forward_part(fields: Fields, streams: Streams, *others: Any) -> PartOutput:
        made = whole(fields, tuple(map(stream.padded, streams)), *others)
        outputs = tuple(_with_all(output, stream, shard) for output in made.outputs)
        # A split backward pass stops at what was received, not at its padded form.
        return PartOutput(outputs, streams or made.pivots, made.balance)

    part.forward_part = forward_part  # type: ignore[method-assign]


def _with_all(
    output: Tensor | LinearHead, stream: TensorStream, shard: VocabularyShard | None
) -> Tensor | LinearHead:
    if isinstance(output, Tensor):
        return output
    return output._replace(hidden_BTC=stream.gathered(output.hidden_BTC), shard=shard)
