"""Beam search and greedy rows equal `generate` of transformers on the same weights."""

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.infer.decoding.beam_search import search_beams
from mpillm.infer.decoding.token_rows import TokenRows, continue_rows
from mpillm.infer.sampling import Sampling
from mpillm.models.part_module import PartModule
from tests.models.families.oracle import adopt, perturb
from tests.pretrained import peer

if MPI.COMM_WORLD.size > 1:
    # Before the library is imported, which takes seconds on each rank.
    pytest.skip("no messages: serial pass only", allow_module_level=True)
transformers = peer("transformers")

VOCABULARY, MOST, START = 31, 10, 0
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": START, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": START,
    "tie_word_embeddings": False,
}
# Beams, length penalty, and how many tokens end a text.
CASES = [(1, 1.0, 1), (3, 1.0, 1), (4, 0.2, 1), (4, 3.0, 1), (2, 1.0, 2)]


@cache
def models(kind: str) -> tuple[Any, PartModule]:
    """Make a model of theirs, whose weights choose between tokens, and ours of its weights."""
    torch.manual_seed(3)
    if kind == "llama":
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, **LLAMA))
    else:
        theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**COMMON, **T5))
    with torch.no_grad():
        for weight in perturb(theirs).parameters():
            if weight.dim() == 2:
                weight.mul_(5 if kind == "llama" else 2)
    *_, ours = adopt(theirs.config.to_dict(), theirs.state_dict())
    return theirs.eval(), ours.eval()


def questions() -> list[list[int]]:
    chance = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (7,), generator=chance).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=chance).tolist() for n in lengths]


def theirs_of(model: Any, ids: list[int], beams: int, penalty: float, ends: Any) -> list[int]:
    given = torch.tensor([ids])
    found = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        num_beams=beams,
        length_penalty=penalty if beams > 1 else None,
        max_new_tokens=MOST,
        eos_token_id=list(ends),
    )[0].tolist()
    new = found[1:] if model.config.is_encoder_decoder else found[len(ids) :]
    return new[: next((place for place, token in enumerate(new) if token in ends), len(new))]


def rows_of(kind: str) -> TokenRows:
    """Begin a row for each question."""
    ours, asked = models(kind)[1], questions()
    if kind == "llama":
        return TokenRows(ours, asked)
    lengths = torch.tensor([len(ids) for ids in asked])
    padded = [ids + [START] * (int(lengths.max()) - len(ids)) for ids in asked]
    source = {"source": torch.tensor(padded), "source_lengths": lengths}
    return TokenRows(ours, [[START]] * len(asked), source)


def greedy(kind: str, ends: frozenset[int]) -> list[list[int]]:
    count = len(questions())
    chances = [torch.Generator() for _ in range(count)]
    return continue_rows(rows_of(kind), Sampling(temperature=0), chances, ends, [MOST] * count)


@cache
def likely_ends(kind: str, count: int) -> frozenset[int]:
    """Take the tokens that come most often after the first, so that texts end."""
    seen = Counter(token for text in greedy(kind, frozenset()) for token in text[1:])
    return frozenset(token for token, _ in seen.most_common(count))


@pytest.mark.parametrize(("beams", "penalty", "count"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_texts_are_those_of_transformers(kind: str, beams: int, penalty: float, count: int) -> None:
    theirs, ends = models(kind)[0], likely_ends(kind, count)
    wanted = [theirs_of(theirs, ids, beams, penalty, ends) for ids in questions()]
    if beams == 1:
        found = greedy(kind, ends)
    else:
        found = search_beams(rows_of(kind), beams, penalty, ends, [MOST] * len(wanted))
    assert found == wanted
    if penalty <= 1:
        assert min(map(len, found)) < MOST


def test_more_beams_than_candidates_of_the_first_token() -> None:
    """All texts of two tokens are candidates: the best of all of them is found."""
    theirs, ours = models("llama")
    found = search_beams(TokenRows(ours, [[4, 7]]), VOCABULARY, 1.0, frozenset(), [2])
    with torch.no_grad():
        first = theirs(torch.tensor([[4, 7]])).logits[0, -1].log_softmax(-1)
        texts = torch.tensor([[4, 7, token] for token in range(VOCABULARY)])
        both = first[:, None] + theirs(texts).logits[:, -1].log_softmax(-1)
    assert found == [list(divmod(int(both.argmax()), VOCABULARY))]
