"""Log-likelihoods and texts of a model, as lm-evaluation-harness asks for them, shared by ranks.

Requests are encoded by their numbers, and cut into batches of alike lengths. Both are functions of
all requests, whatever the ranks, so that each result has the same bits at any number of ranks.

Shapes: B rows of a batch, T tokens, C features, V vocabulary, N positions that are scored.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from mpillm.comm.failure import on_all
from mpillm.errors import CheckpointError, DataError, MismatchError, UsageError
from mpillm.infer.decoding.token_rows import TokenRows, continue_rows
from mpillm.infer.harness.harness_encoder import HarnessEncoder, Ids
from mpillm.infer.harness.task_file import TextSettings
from mpillm.infer.loading import Loaded, load_trained
from mpillm.infer.sampling import Sampling
from mpillm.machine.node_map import map_nodes
from mpillm.models.linear_head import LinearHead
from mpillm.parallel.devices import choose_device
from mpillm.system.console import Console
from mpillm.tokens.order import task_keys

if TYPE_CHECKING:
    from mpi4py import MPI

# Of a batch, padding included: matrices large enough for a core, keys and values of a few hundred
# megabytes.
BATCH_TOKENS, MOST_ROWS = 4096, 64
# A batch has no larger share of the rows, so that many ranks have some.
BATCHES = 16
# Logits at once: 64 MB.
LOGITS_AT_ONCE = 1 << 24

Given = TypeVar("Given")
Found = TypeVar("Found")


class Likelihood(NamedTuple):
    """The natural logarithm of a continuation's probability after its context."""

    value: float
    greedy: bool
    """Whether the likeliest token each time gives the continuation."""


@dataclass(frozen=True)
class _ScoredRow:
    """Ids that the model reads, and the continuations at their end by the number of the request.

    Continuations that differ in their last token alone have the same ids.
    """

    ids: tuple[int, ...]
    endings: list[tuple[int, Ids]]


@dataclass
class HarnessModel:
    """A decoder that each rank of `comm` has all of. Every rank calls each method with the same
    requests, and gets all results in their order.
    """

    loaded: Loaded
    comm: "MPI.Intracomm"
    console: Console
    cut: int = 0
    """The requests whose left part was cut off so far, as they are longer than the context."""

    def __post_init__(self) -> None:
        check_continues(self.loaded)
        self._encoder = HarnessEncoder(self.loaded)
        self._model = self.loaded.model
        self._device = next(self._model.parameters()).device
        self._context = self._model.spec.context

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Score continuations after their contexts. Raises DataError for one without tokens, and
        for one that is longer than the model's context.
        """
        encoded = self._shared(pairs, self._encoder.pairs)
        for (_, ids), (_, text) in zip(encoded, pairs, strict=True):
            if len(ids) > self._context:
                raise DataError(
                    f"the continuation {text!r:.80} has {len(ids):,} tokens, and the model's "
                    f"context {self._context:,}; shorten it"
                )
        self.cut += sum(len(ahead) + len(ids) > self._context + 1 for ahead, ids in encoded)
        return self._scored(encoded)

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Score all tokens of texts, each in windows as long as the context.

        The last window has a full context, of which only the tokens not scored before count.
        """
        encoded = self._shared(texts, self._encoder.texts)
        windows = [list(windows_of(ids, self._encoder.prefix, self._context)) for ids in encoded]
        scores = iter(self._scored([pair for some in windows for pair in some]))
        return [sum(next(scores).value for _ in some) for some in windows]

    def texts(self, contexts: Sequence[str], settings: TextSettings) -> list[str]:
        """Continue contexts up to a text of `settings.until`. Raises UsageError where the context
        has no room for as many tokens.
        """
        room = self._context - settings.max_tokens
        if room <= 0:
            raise UsageError(
                f"max_gen_toks is {settings.max_tokens:,}, and must be less than the model's "
                f"context of {self._context:,} tokens; lower it in generation_kwargs"
            )
        encoded = self._shared(contexts, self._encoder.texts)
        self.cut += sum(len(ids) > room for ids in encoded)
        prompts = [ids[-room:] or [self._encoder.prefix] for ids in encoded]
        lengths = [len(ids) + settings.max_tokens for ids in prompts]

        def work(numbers: Sequence[int]) -> list[tuple[int, str]]:
            return self._continued([prompts[each] for each in numbers], numbers, settings)

        return self._over_ranks("generate", lengths, work)

    def _shared(
        self, given: Sequence[Given], encode: Callable[[Sequence[Given]], list[Found]]
    ) -> list[Found]:
        """Encode this rank's share, and gather all in their order."""
        rank, size = self.comm.rank, self.comm.size
        own = on_all(self.comm, lambda: encode(given[rank::size]))
        parts = self.comm.allgather(own)
        return [parts[number % size][number // size] for number in range(len(given))]

    def _over_ranks(
        self,
        what: str,
        lengths: Sequence[int],
        work: Callable[[Sequence[int]], list[tuple[int, Found]]],
    ) -> list[Found]:
        """Let ranks take turns at batches of rows of these `lengths`; gather the results by row."""

        def own() -> list[tuple[int, Found]]:
            mine = share_of(list(batches_of(lengths)), self.comm.rank, self.comm.size)
            found = []
            with self.console.progress(what, sum(map(len, mine)), "requests") as progress:
                for numbers in mine:
                    found += work(numbers)
                    progress.advance(len(numbers))
            return found

        parts = self.comm.allgather(on_all(self.comm, own))
        by_number = dict(each for part in parts for each in part)
        return [by_number[number] for number in range(len(by_number))]

    def _scored(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Likelihood]:
        rows = _rows_of(pairs, self._context)

        def work(numbers: Sequence[int]) -> list[tuple[int, list[tuple[int, Likelihood]]]]:
            some = [rows[number] for number in numbers]
            return list(zip(numbers, self._likelihoods(some), strict=True))

        found = self._over_ranks("score", [len(row.ids) for row in rows], work)
        by_request = dict(each for some in found for each in some)
        return [by_request[number] for number in range(len(pairs))]

    def _likelihoods(self, rows: Sequence[_ScoredRow]) -> list[list[tuple[int, Likelihood]]]:
        """Score the continuations of a batch of rows."""
        places, wanted = _places(rows)
        head = self._head(rows, places)
        values, best = self._log_probabilities(head, wanted)
        found: list[list[tuple[int, Likelihood]]] = []
        first = 0
        for row in rows:
            found.append([])
            for request, ids in row.endings:
                last = first + len(ids)
                value = float(values[first:last].sum())
                found[-1].append((request, Likelihood(value, bool(best[first:last].all()))))
                first = last
        return found

    def _head(self, rows: Sequence[_ScoredRow], places: Tensor) -> "LinearHead | Tensor":
        """Compute the outputs at `places`, (row, position) each: a head of them, or logits."""
        longest = max(len(row.ids) for row in rows)
        ids_BT = torch.zeros((len(rows), longest), dtype=torch.int64)
        for own, row in zip(ids_BT, rows, strict=True):
            own[: len(row.ids)] = torch.tensor(row.ids)
        at = places.to(self._device)
        with torch.inference_mode():
            # Padding follows a row, and no position reads a later one.
            made = self._model.forward_part({"ids": ids_BT.to(self._device)}, ()).outputs[0]
            if not isinstance(made, LinearHead):
                return made[at[:, 0], at[:, 1]]
            hidden_NC = made.hidden_BTC[at[:, 0], at[:, 1]]
        return made._replace(hidden_BTC=hidden_NC)

    def _log_probabilities(
        self, head: "LinearHead | Tensor", wanted: Sequence[tuple[int, int]]
    ) -> tuple[Any, Any]:
        """Return the log-probability of each wanted (place, token), and whether it is the largest.

        The softmax is in float32, as the harness's.
        """
        places = torch.tensor([place for place, _ in wanted], device=self._device)
        tokens = torch.tensor([token for _, token in wanted], device=self._device)
        values = torch.empty(len(wanted), dtype=torch.float64, device=self._device)
        best = torch.empty(len(wanted), dtype=torch.bool, device=self._device)
        total = len(head.hidden_BTC if isinstance(head, LinearHead) else head)
        step = max(1, LOGITS_AT_ONCE // self._model.spec.vocab_size)
        for first in range(0, total, step):
            chunk = slice(first, first + step)
            with torch.inference_mode():
                if isinstance(head, LinearHead):
                    logits_NV = head._replace(hidden_BTC=head.hidden_BTC[chunk]).logits()
                else:
                    logits_NV = head[chunk]
                _check_finite(logits_NV)
                logarithms_NV = logits_NV.float().log_softmax(-1)
                here = ((places >= first) & (places < first + step)).nonzero()[:, 0]
                rows = places[here] - first
                values[here] = logarithms_NV[rows, tokens[here]].double()
                best[here] = logarithms_NV.argmax(-1)[rows] == tokens[here]
        return values.cpu().numpy(), best.cpu().numpy()

    def _continued(
        self, prompts: Sequence[Ids], numbers: Sequence[int], settings: TextSettings
    ) -> list[tuple[int, str]]:
        """Continue the prompts of a batch. `numbers`: of the requests, the seeds of draws."""
        tokenizer = self.loaded.tokenizer
        special = tokenizer.vocabulary.special
        ends = frozenset({tokenizer.eot_id, *(special[t] for t in settings.until if t in special)})
        stops = _Stops(settings.until, [tokenizer.stream() for _ in prompts])
        sampling = Sampling(
            settings.max_tokens, settings.temperature, settings.top_k, settings.top_p
        )
        keys = task_keys(sampling.seed, np.array(numbers, np.int64)).tolist()
        generators = [torch.Generator().manual_seed(key & ((1 << 63) - 1)) for key in keys]
        rows = TokenRows(self._model, prompts)
        most = [settings.max_tokens] * len(prompts)
        found = continue_rows(rows, sampling, generators, ends, most, stops.reached)
        texts = [_ended(tokenizer.decode(ids), settings.until) for ids in found]
        return list(zip(numbers, texts, strict=True))


class _Stops:
    """The ends of texts that are generated: each row's newest text is searched for them."""

    def __init__(self, until: Sequence[str], streams: Sequence[Any]) -> None:
        self._until, self._streams = until, streams
        self._kept = max((len(text) for text in until), default=0)
        self._tails = [""] * len(streams)

    def reached(self, row: int, token: int) -> bool:
        """Take a row's next token; return whether its text holds an end."""
        if not self._until:
            return False
        piece = self._streams[row].push(token)
        text = self._tails[row] + piece
        self._tails[row] = text[-self._kept :]
        return any(end in text for end in self._until)


def _ended(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end)[0]
    return text


def open_model_for_harness(
    path: Path, comm: "MPI.Intracomm", console: Console, device: str = "auto"
) -> HarnessModel:
    """Load the model of a run or a checkpoint on each rank's device. Every rank calls it."""
    place, _ = choose_device(device, comm, map_nodes(comm), option="--device")
    loaded = load_trained(path, comm, console)
    loaded.model.to(place)
    return HarnessModel(loaded, comm, console)


def check_continues(loaded: Loaded) -> None:
    """Raise MismatchError for a model that gives no probabilities of next tokens."""
    spec, folder = loaded.model.spec, loaded.checkpoint.folder
    if spec.source_field or spec.output_kind not in ("any", "next tokens") or not spec.generates:
        raise MismatchError(
            f"--harness asks a decoder for the probability of next tokens, and the model of "
            f"{folder} is one of the task {loaded.task.name}; give a run of causal-lm, chat, dpo "
            "or kto"
        )


def windows_of(ids: Ids, prefix: int, length: int) -> Iterator[tuple[Ids, Ids]]:
    """Yield the windows of a text as contexts and continuations, each token scored once.

    Lengths are at most `length` without the last token. The rule is the harness's: the first
    window begins with `prefix`, and the last one has as long a context as fits.
    """
    if not ids:
        return
    yield [prefix], ids[:length]
    done = min(length, len(ids))
    while done < len(ids):
        count = min(len(ids) - done, length)
        last = done + count
        # The context is what a full window has ahead of the tokens that count.
        yield ids[last - length - 1 : last - count], ids[last - count : last]
        done = last


def batches_of(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut rows into batches of alike lengths, the longest first; yield their numbers."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    most = min(MOST_ROWS, -(-len(order) // BATCHES))
    first = 0
    while first < len(order):
        rows = max(1, min(most, BATCH_TOKENS // max(1, lengths[order[first]])))
        yield order[first : first + rows]
        first += rows


def share_of(batches: Sequence[list[int]], rank: int, ranks: int) -> list[list[int]]:
    """Return the batches of a rank: dealt back and forth, as the first ones are the longest."""
    turn = [*range(ranks), *reversed(range(ranks))]
    return [batch for number, batch in enumerate(batches) if turn[number % (2 * ranks)] == rank]


def _rows_of(pairs: Sequence[tuple[Ids, Ids]], context: int) -> list[_ScoredRow]:
    """Join requests whose ids differ in the last token alone; cut long ones on the left."""
    rows: dict[tuple[int, ...], _ScoredRow] = {}
    for number, (ahead, ids) in enumerate(pairs):
        read = tuple((ahead + ids)[-(context + 1) : -1])
        rows.setdefault(read, _ScoredRow(read, [])).endings.append((number, ids))
    return list(rows.values())


def _places(rows: Sequence[_ScoredRow]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the places to compute, (row, position) each, and what each continuation reads: the
    number of a place, and the token.
    """
    places: dict[tuple[int, int], int] = {}
    wanted = []
    for number, row in enumerate(rows):
        for _, ids in row.endings:
            start = len(row.ids) - len(ids)
            for offset, token in enumerate(ids):
                place = places.setdefault((number, start + offset), len(places))
                wanted.append((place, token))
    return torch.tensor(list(places)), wanted


def _check_finite(logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise CheckpointError(
            "the model's outputs are NaN or infinite, so no continuation can be scored: the run "
            "diverged; name an earlier checkpoint"
        )
