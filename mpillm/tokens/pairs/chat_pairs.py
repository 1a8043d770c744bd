"""What a dataset of conversations needs beyond other pairs: its chat template, and a preview."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.errors import DataError, UsageError
from mpillm.system.console import Console, counted
from mpillm.system.messages import one_line
from mpillm.tokens.chat.answer_spans import end_of_turn
from mpillm.tokens.chat.chat_encoder import ChatEncoder
from mpillm.tokens.chat.chat_formats import FORMATS, words_of
from mpillm.tokens.chat.chat_preview import EXAMPLES, check_template, print_example
from mpillm.tokens.chat.chat_template import ChatTemplate, find_template
from mpillm.tokens.chat.preference_formats import COLUMNS as COLUMNS_OF_PREFERENCES
from mpillm.tokens.pairs.pair_records import PairRecord, read_records
from mpillm.tokens.pairs.pair_shards import PAIR_KINDS
from mpillm.tokens.pairs.pair_survey import COLUMNS, PairSurvey
from mpillm.tokens.text.records import RecordError
from mpillm.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mpillm.tokens.prepare import PrepareOptions

COLUMNS_OF = {name: form.columns for name, form in FORMATS.items()} | COLUMNS_OF_PREFERENCES
# Tokenizers that are made here have no folder.
MADE = ("bpe", "bytes")


def template_of(
    options: "PrepareOptions", tokenizer_json: str | None, form: str
) -> tuple[ChatTemplate | None, str | None]:
    """Find the template of a dataset of conversations, and the token that ends a turn, at which a
    model stops. No template where all are texts, no token where the tokenizer names its own.

    Raises UsageError where a template is needed and there is none.
    """
    folder = None
    special: list[str] = []
    texts_of: dict[int, str] = {}
    end = options.end_of_text or ""
    if options.tokenizer not in MADE:
        given = Path(options.tokenizer)
        folder = given if given.is_dir() else given.parent
    if tokenizer_json is not None:
        tokenizer = Tokenizer.from_json(tokenizer_json, "", options.end_of_text)
        texts_of = {number: text for text, number in tokenizer.vocabulary.special.items()}
        end, special = tokenizer.end_of_text, tokenizer.special_texts
    template = find_template(folder, options.chat_template, texts_of, end)
    if template is None and form != "text":
        where = "" if folder is None else f" in {one_line(folder)}"
        raise UsageError(
            f"--task {options.task} writes conversations by the chat template of the tokenizer, "
            f"and there is none{where}; give --tokenizer the folder of a chat model, or "
            "--chat-template FILE"
        )
    if template is None or options.end_of_text:
        return template, options.end_of_text
    return template, end_of_turn(template, special)


def chat_facts(template: ChatTemplate | None) -> dict[str, Any]:
    """Describe a template for the manifest: its hash, and the special tokens it may write."""
    if template is None:
        return {}
    digest = hashlib.sha256(template.text.encode()).hexdigest()
    return {"chat": {"template_sha256": digest, "special_tokens": template.tokens}}


def preview(
    found: PairSurvey, encoder: ChatEncoder, tokenizer: Tokenizer, console: Console
) -> None:
    """Print the format, and some conversations with the learnt tokens marked. Rank 0 calls it.

    Raises DataError for one that cannot be encoded, UsageError for a template of another tokenizer.
    """
    template = found.template
    columns = ", ".join(found.fields) if found.form == COLUMNS else COLUMNS_OF[found.form]
    records = counted(found.n_pairs, "record")
    console.say(f"format: {found.form} ({columns}), {records}")
    for number, record in enumerate(islice(_all_records(found), EXAMPLES)):
        given = record.conversations
        try:
            tokens = [encoder.tokens(each) for each in given]
            if template is not None and not number and "messages" in given[0]:
                words = "\n".join(words_of(given[0]))
                check_template(template, encoder.render(given[0]).text, words, tokenizer)
        except RecordError as failure:
            raise DataError(f"{record.place} {failure}") from failure
        if template is not None and given[0].get("tools") and not template.knows_tools:
            console.warn(f"{template.place} writes no tools, and {record.place} has some")
        for each, side in zip(tokens, _sides_of(record, found.kind), strict=True):
            console.say(f"{record.place}{side}, learnt is what is marked:")
            print_example(each, tokenizer, console)


def _sides_of(record: PairRecord, kind: str) -> list[str]:
    """Name each conversation of a record; "" for a chat."""
    if not PAIR_KINDS[kind].is_preference:
        return [""]
    named = {", chosen": record.source, ", rejected": record.target}
    return [name for name, conversation in named.items() if conversation]


def _all_records(found: PairSurvey) -> Iterator[PairRecord]:
    for piece in found.pieces:
        yield from read_records(piece, found.kind, found.fields, found.form)
