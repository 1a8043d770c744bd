"""Encode contexts and continuations to token ids as lm-evaluation-harness does by transformers.

Unlike the house's own encoding of data, special tokens in a text are obeyed, and the tokens that a
post-processor adds ahead of a text are kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from mpillm.errors import DataError
from mpillm.infer.loading import Loaded
from mpillm.system.json_text import from_json
from mpillm.tokens.chat.chat_template import NAMING

Ids = list[int]


class HarnessEncoder:
    """The encoding of a model's tokenizer. `prefix`: the id ahead of a text without a context."""

    def __init__(self, loaded: Loaded) -> None:
        self._inner = tokenizers.Tokenizer.from_str(loaded.tokenizer.to_json())
        self._inner.no_truncation()
        self._inner.no_padding()
        self.prefix = prefix_id(loaded)
        self._prefix_text = self._inner.decode([self.prefix], skip_special_tokens=False)

    def texts(self, texts: Sequence[str]) -> list[Ids]:
        """Encode whole texts with the tokens that the post-processor adds.

        It adds none to a text that begins with the prefix.
        """
        begun = [bool(self._prefix_text) and each.startswith(self._prefix_text) for each in texts]
        found: list[Ids] = [[] for _ in texts]
        for plain in (False, True):
            numbers = [number for number, own in enumerate(begun) if own == plain]
            if numbers:
                some = [texts[number] for number in numbers]
                for number, ids in zip(numbers, self._encoded(some, not plain), strict=True):
                    found[number] = ids
        return found

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Ids, Ids]]:
        """Encode contexts with continuations: a pair is encoded as one text, and cut.

        Spaces at the end of a context are part of the continuation. Without a context the prefix
        is one. Raises DataError for a continuation without tokens.
        """
        moved = [_moved(context, continuation) for context, continuation in pairs]
        wholes = self.texts([context + rest for context, rest in moved if context])
        # A question is the context of each of its choices.
        distinct = list(dict.fromkeys(context for context, _ in moved if context))
        lengths = dict(zip(distinct, map(len, self.texts(distinct)), strict=True))
        alone = self._encoded([rest for context, rest in moved if not context], False)
        left, without = iter(wholes), iter(alone)
        found = []
        for (context, _), given in zip(moved, pairs, strict=True):
            if context:
                ids = next(left)
                cut = ids[: lengths[context]], ids[lengths[context] :]
            else:
                ids = next(without)
                own = ids[:1] == [self.prefix]
                cut = (ids[:1], ids[1:]) if own else ([self.prefix], ids)
            if not cut[0] or not cut[1]:
                raise DataError(
                    f"the continuation {given[1]!r:.80} has no token of its own after its context, "
                    f"which ends in {given[0][-80:]!r}; correct the templates or target_delimiter"
                )
            found.append(cut)
        return found

    def _encoded(self, texts: Sequence[str], marks: bool) -> list[Ids]:
        try:
            found = self._inner.encode_batch_fast(list(texts), add_special_tokens=marks)
        except BaseException as failure:
            raise DataError(
                f"the model's tokenizer cannot encode the text: {failure}; take its characters out"
            ) from failure
        return [each.ids for each in found]


def _moved(context: str, continuation: str) -> tuple[str, str]:
    """Move the spaces at the end of a context to its continuation: words begin with theirs."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def prefix_id(loaded: Loaded) -> int:
    """Return the id of the token that begins texts, where the model's files name one, else that of
    the end of text: what transformers does.
    """
    checkpoint, vocabulary = loaded.checkpoint, loaded.tokenizer.vocabulary
    known: list[Mapping[str, Any]] = [checkpoint.facts.get("special_tokens") or {}]
    for name in NAMING:
        if name in checkpoint.texts:
            value = from_json(checkpoint.text(name))
            known.insert(0, value if isinstance(value, dict) else {})
    for named in known:
        token = named.get("bos_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in vocabulary.special:
            return vocabulary.special[text]
    return loaded.tokenizer.eot_id
