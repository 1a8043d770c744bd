"""The split of the documents into training and validation: a pure function of keys and sizes.

The hash of a text decides, so the split stays the same when documents are added. Where the hash
misses the share that was asked for, by a fifth of the documents or half of the bytes, whole
documents are chosen in the order of the hash until the share of bytes is as near as they allow.
Where few documents allow no share near it, each is cut in two.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm.failure import on_root
from mpillm.errors import UsageError
from mpillm.tokens.order import mix

if TYPE_CHECKING:
    from mpi4py import MPI

TRAIN, VALIDATION = 0, 1
# The shard follows from the key itself; the split must not, or validation would fill the first
# shards only.
SPLIT_SALT = np.uint64(0x7E57)
# How far from what was asked for the hash's share of documents and of bytes may be, relative to the
# smaller split. Sizes differ more than numbers: one long document moves the bytes.
DOCUMENT_TOLERANCE, TOLERANCE = 0.2, 0.5
# With fewer documents each is a tenth of the text or more: cutting them comes nearer.
FEW_DOCUMENTS = 10
# Rank 0 holds 16 bytes for each of so many documents. With more, the hash is near the share unless
# a few documents have most of the text.
MOST_CHOSEN_FROM = 1 << 22

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class SplitPlan:
    """How documents are split for the share `validation`; the same on every rank.

    `cut`: each document in two. Else `chosen`: the keys of the documents for validation, ascending,
    or None where the hash alone decides.
    """

    validation: float
    cut: bool = False
    chosen: Array | None = None

    def of(self, keys: Array) -> Array:
        """Return each key's split, u1 (n,)."""
        if self.chosen is None:
            return split_of(keys, self.validation)
        return np.isin(keys, self.chosen).astype(np.uint8)


def plan_split(
    keys: Array,
    nbytes: Array,
    validation: float,
    comm: "MPI.Intracomm",
    fold: tuple[int, int] = (0, 0),
) -> SplitPlan:
    """Plan the split of the documents of all ranks; `keys` and `nbytes` (n,) are this rank's.

    Every rank calls it. No share, no validation; else neither split is left empty. `fold`: (i, K),
    the i-th of K folds from 1 is for validation, in place of a share.
    """
    if fold[0]:
        return plan_fold(keys, *fold, comm)
    by_hash = SplitPlan(validation)
    chosen = by_hash.of(keys) == VALIDATION
    own = [len(keys), int(nbytes.sum()), int(chosen.sum()), int(nbytes[chosen].sum())]
    n_docs, total, docs_out, bytes_out = np.sum(comm.allgather(own), axis=0).tolist()
    near = is_near(docs_out / max(n_docs, 1), validation, DOCUMENT_TOLERANCE)
    near = near and is_near(bytes_out / max(total, 1), validation)
    if validation == 0 or (0 < docs_out < n_docs and near):
        return by_hash
    if n_docs > MOST_CHOSEN_FROM and 0 < docs_out < n_docs:
        return by_hash
    table = comm.gather((keys, nbytes))

    def choose() -> SplitPlan:
        assert table is not None
        everything = [np.concatenate(column) for column in zip(*table, strict=True)]
        return choose_split(everything[0], everything[1], validation)

    return on_root(comm, choose)


def plan_fold(keys: Array, fold: int, folds: int, comm: "MPI.Intracomm") -> SplitPlan:
    """Plan the split whose validation is a fold, from 1: of K folds each document is in one.

    Documents in the order of their hash are cut into K parts, whose sizes differ by one at most;
    equal documents are in one fold. Every rank calls it. Raises UsageError on every rank where
    there are fewer different documents than folds.
    """
    table = comm.gather(np.unique(keys))

    def choose() -> SplitPlan:
        assert table is not None
        different = np.unique(np.concatenate(table))
        if len(different) < folds:
            raise UsageError(
                f"--folds {folds:,} needs as many different documents, and there are "
                f"{len(different):,}; lower --folds"
            )
        order = different[np.argsort(mix(different ^ SPLIT_SALT), kind="stable")]
        bounds = [number * len(order) // folds for number in (fold - 1, fold)]
        return SplitPlan(1 / folds, chosen=np.sort(order[slice(*bounds)]))

    return on_root(comm, choose)


def is_near(share: float, asked: float, tolerance: float = TOLERANCE) -> bool:
    """Return whether a share is near what was asked for, on both sides of the split.

    Of 95 % for validation, half of the 5 % for training would be too far, too.
    """
    return abs(share - asked) <= tolerance * min(asked, 1 - asked)


def choose_split(keys: Array, nbytes: Array, validation: float) -> SplitPlan:
    """Choose whole documents for validation, or cut each where they allow no share near it."""
    # Equal texts have equal keys, and stay in one split.
    keys, group = np.unique(keys, return_inverse=True)
    sizes = np.bincount(group, nbytes).astype(np.int64)
    order = np.argsort(mix(keys ^ SPLIT_SALT), kind="stable")
    total = int(sizes.sum())
    if len(keys) == 1:
        return SplitPlan(validation, cut=True)
    # The smaller side is chosen: its documents have the smallest hashes, or the largest.
    smaller = min(validation, 1 - validation)
    in_order = order if validation <= 0.5 else order[::-1]
    taken = in_order[take_nearest(sizes[in_order], round(smaller * total))]
    share = int(sizes[taken].sum()) / total
    near = abs(share - smaller) <= TOLERANCE * smaller
    # Too little, where one document has so much of the text: the others cannot make up the share.
    swamped = share < smaller and int(sizes.max()) > total / FEW_DOCUMENTS
    if not near and (len(keys) < FEW_DOCUMENTS or swamped):
        return SplitPlan(validation, cut=True)
    mask = np.zeros(len(keys), bool)
    mask[taken] = True
    return SplitPlan(validation, chosen=keys[mask if validation <= 0.5 else ~mask])


def take_nearest(sizes: Array, target: int) -> Array:
    """Take sizes (n,) in order whose sum is near `target`: at least one, never all; their places.

    Each that still fits is taken; at last one more where the sum comes nearer with it.
    """
    places: list[int] = []
    total = 0
    for place, size in enumerate(sizes.tolist()):
        if total + size <= target and len(places) < len(sizes) - 1:
            places.append(place)
            total += size
    left = np.setdiff1d(np.arange(len(sizes)), places)
    if len(left) > 1:
        # The smallest is nearest, for none that is left fits; the first of equal ones.
        one = int(left[np.argmin(sizes[left])])
        if not places or total + int(sizes[one]) - target < target - total:
            places.append(one)
    return np.array(places, np.int64)


def split_of(keys: Array, validation: float) -> Array:
    """Decide each key's split by hash, TRAIN or VALIDATION: a fraction `validation` of all keys."""
    largest = np.uint64(min(int(validation * 2.0**64), 2**64 - 1))
    return (mix(keys ^ SPLIT_SALT) < largest).astype(np.uint8)


def cut_tail(text: str, validation: float) -> tuple[str, str]:
    """Cut a text in two, the second part about a fraction `validation` of it.

    The second part begins at the start of a line if one is near, else at a word's if one is.
    """
    place = cut_place([text], validation)
    return text[:place], text[place:]


def cut_place(blocks: Iterable[str], validation: float) -> int:
    """Find the character at which `cut_tail` cuts a text, given in blocks; it is read twice."""
    length = sum(map(len, blocks))
    target = min(length - 1, max(1, round(length * (1 - validation))))
    # For each mark the first place from the target on, and the last before it; 0 for none.
    places = {mark: [0, 0] for mark in "\n "}
    start = 0
    for block in blocks:
        for mark, found in places.items():
            if not found[0]:
                after = block.find(mark, max(target - 1 - start, 0))
                found[0] = start + after + 1 if after >= 0 else 0
            before = block.rfind(mark, 0, max(target - start, 0))
            found[1] = start + before + 1 if before >= 0 else found[1]
        start += len(block)
    for found in places.values():
        for place in found:
            if 0 < place < length and is_near(1 - place / length, validation):
                return place
    return max(0, target)
