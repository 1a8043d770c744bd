"""Cut long texts for a tokenizer: the library takes about 140 bytes of memory for each of a text.

Where the pre-tokenizer splits anyway, a cut changes no id. A text that is never split (a line of
gigabytes without a space) is cut at a fixed length.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Threads share the parts of a long text.
PART_CHARACTERS = 1 << 16
# No part is longer: BPE takes some 100 MB for it.
LONGEST_PART = 1 << 20
# GPT-2's pre-tokenizer splits before each space or line end that follows text, and before
# punctuation that follows a letter or a digit. Only signs are named that are such in any version
# of Unicode.
GPT2_CUT = re.compile(
    r"\S(?=[ \n])|[A-Za-z0-9\u4e00-\u9fa5\u3041-\u3093\u30a1-\u30f3](?=[.,;:。，])"
)
# Most pre-tokenizers split between words: a line's end, else a space between letters.
LIKELY_CUT = re.compile(r"\S\n(?=\S)|\w(?= \w)")
# Training merges within each word, in time that grows with its square.
LONGEST_TRAINED_WORD = 1024
LONG_RUN = re.compile(rf"\S{{{LONGEST_TRAINED_WORD}}}|\s{{{LONGEST_TRAINED_WORD}}}")


@dataclass
class TextCutter:
    """Cuts texts into parts for the library. `exact`: the pre-tokenizer splits as GPT-2's does.

    `n_forced` counts the cuts at which ids may differ from those of the whole text.
    """

    exact: bool
    n_forced: int = 0

    def parts(self, blocks: Iterable[str]) -> Iterator[str]:
        """Yield a text, given in blocks of any size, in parts that do not depend on the blocks."""
        text, start = "", 0
        for block in blocks:
            text, start = text[start:] + block, 0
            while (stop := self._cut(text, start)) is not None:
                yield text[start:stop]
                start = stop
        yield text[start:]

    def _cut(self, text: str, start: int) -> int | None:
        """Find the end of the part that begins at `start`; None while more text decides it."""
        left = len(text) - start
        if left <= (PART_CHARACTERS if self.exact else LONGEST_PART):
            return None
        if self.exact:
            found = GPT2_CUT.search(text, start + PART_CHARACTERS, start + LONGEST_PART)
            if found:
                return found.end()
            if left <= LONGEST_PART:
                return None
        else:
            found = LIKELY_CUT.search(text, start + LONGEST_PART // 2, start + LONGEST_PART)
        self.n_forced += 1
        return found.end() if found else start + LONGEST_PART


def training_parts(text: str) -> Iterator[str]:
    """Cut a text for the training of a BPE: it has the same words, but for those of thousands of
    characters.
    """
    for part in TextCutter(exact=True).parts([text]):
        start = 0
        for run in LONG_RUN.finditer(part):
            yield part[start : run.end()]
            start = run.end()
        yield part[start:]
