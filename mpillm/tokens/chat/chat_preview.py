"""Show conversations with the tokens that are learnt marked: in colour on a terminal, else by
brackets. Check that a template and a tokenizer belong together.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from mpillm.errors import UsageError
from mpillm.system.console import Console
from mpillm.tokens.chat.chat_encoder import ChatTokens
from mpillm.tokens.chat.chat_template import ChatTemplate
from mpillm.tokens.tokenizer import Tokenizer

EXAMPLES = 2
# Characters of an example that are shown, of its beginning and of its end.
SHOWN = 600
STYLE = "bold green"
# Tokens of control in the forms of published templates.
CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|<(?:start|end)_of_turn>|</?s>")


def print_example(tokens: ChatTokens, tokenizer: Tokenizer, console: Console) -> None:
    """Print the text of a conversation's tokens; those that are learnt are marked."""
    parts = list(_shortened(marked_parts(tokens, tokenizer)))
    if console.is_terminal:
        console.styled([(text, STYLE if learnt else "") for text, learnt in parts])
    else:
        console.say("".join(f"[[{text}]]" if learnt else text for text, learnt in parts))


def marked_parts(tokens: ChatTokens, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yield the text of each run of tokens that are learnt, and of each run that are not."""
    first = 0
    for learnt, run in groupby(tokens.supervised.tolist()):
        last = first + len(list(run))
        yield tokenizer.decode_rendered(tokens.ids[first:last]), bool(learnt)
        first = last


def _shortened(parts: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Leave out the middle of long parts."""
    for text, learnt in parts:
        if len(text) > SHOWN:
            text = f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
        yield text, learnt


def check_template(template: ChatTemplate, written: str, words: str, tokenizer: Tokenizer) -> None:
    """Raise UsageError where the template writes tokens that the tokenizer does not have.

    `written`: a conversation by the template; `words`: the texts of its messages.
    """
    named = dict.fromkeys(CONTROL.findall(written))
    known = tokenizer.vocabulary.special
    missing = [text for text in named if text not in known and text not in words]
    if missing:
        raise UsageError(
            f"{template.place} writes {', '.join(missing)}, which the tokenizer {tokenizer.name} "
            "does not have as a token: it is a template for another tokenizer; give one of this "
            "tokenizer by --chat-template FILE"
        )
