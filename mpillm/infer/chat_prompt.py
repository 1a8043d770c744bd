"""The prompt of a chat model: a user's turn, written by the template that its checkpoint keeps."""

from typing import NamedTuple

from mpillm.errors import UsageError
from mpillm.infer.generate import end_ids
from mpillm.infer.loading import Loaded
from mpillm.tokens.chat.answer_spans import end_of_turn
from mpillm.tokens.chat.chat_template import TEMPLATE, ChatTemplate, find_template
from mpillm.tokens.text.records import RecordError
from mpillm.tokens.tokenizer import Tokenizer
from mpillm.weights.checkpoint import Checkpoint


class ChatPrompt(NamedTuple):
    """The ids that a model answers."""

    ids: list[int]
    ends: frozenset[int]
    """The ids that end an answer."""


def template_of(loaded: Loaded) -> ChatTemplate | None:
    """Return the template of a model that was trained or imported; None without."""
    return template_at(loaded.checkpoint, loaded.tokenizer)


def template_at(checkpoint: Checkpoint, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the template that a checkpoint keeps; None without."""
    tokens = checkpoint.facts.get("special_tokens")
    if tokens is not None and TEMPLATE in checkpoint.texts:
        place = str(checkpoint.folder / TEMPLATE)
        return ChatTemplate(checkpoint.text(TEMPLATE), tokens, place)
    texts_of = {number: text for text, number in tokenizer.vocabulary.special.items()}
    return find_template(checkpoint.folder, None, texts_of, tokenizer.end_of_text)


def ends_of(loaded: Loaded) -> frozenset[int]:
    """Return the ids that end what a model writes: the end of text, of a target or of a turn."""
    return answer_ends(loaded.tokenizer, template_of(loaded), bool(loaded.model.spec.source_field))


def answer_ends(
    tokenizer: Tokenizer, template: ChatTemplate | None, reads_source: bool = False
) -> frozenset[int]:
    """Return the ids that end an answer of a model with this tokenizer and template."""
    ends = end_ids(tokenizer, reads_source)
    turn = None if template is None else end_of_turn(template, tokenizer.special_texts)
    return ends if turn is None else ends | {tokenizer.vocabulary.special[turn]}


def chat_prompt(loaded: Loaded, text: str) -> ChatPrompt:
    """Write `text` as a user's turn, with the beginning of an answer.

    Raises UsageError where the model has no template, or the template refuses the text.
    """
    folder = loaded.checkpoint.folder
    if loaded.model.spec.source_field:
        raise UsageError(
            f"--chat is for decoders, and the model of {folder} reads the prompt as a source; "
            "leave --chat out"
        )
    template = template_of(loaded)
    if template is None:
        raise UsageError(
            f"--chat writes the prompt by the chat template of a model, and {folder} has none; "
            "leave --chat out, or train on data of the task chat"
        )
    try:
        written = template.render([{"role": "user", "content": text}], prompt=True)
    except RecordError as failure:
        raise UsageError(f"--prompt {failure}; --plain continues the text as it is") from failure
    [(ids, _)] = loaded.tokenizer.encode_rendered([written])
    return ChatPrompt(ids.tolist(), ends_of(loaded))
