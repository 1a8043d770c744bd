"""Short templates in the forms of published ones, and a tokenizer with the tokens of all."""

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from mpillm.tokens.chat.chat_template import ChatTemplate
from mpillm.tokens.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "fixtures" / "chat_templates"
NAMES = ("chatml", "llama3", "gemma", "mistral", "qwen3")
SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
# Where each form ends a turn.
ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "qwen3": "<|im_end|>",
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate((FOLDER / f"{name}.jinja").read_text(), TOKENS, f"{name}.jinja")


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE whose tokens cover borders of words, such as a space and its word."""
    inner = Library(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    texts = ["Hello there, how are you?\n\nI am well.", "user\nassistant\nsystem\n1, 2, 3 model"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    )
    inner.add_special_tokens(list(SPECIAL))
    inner.add_tokens([AddedToken(each) for each in ("<think>", "</think>")])
    return Tokenizer.from_json(inner.to_str(), "bpe of templates", "</s>")


def say(*texts: str, system: str = "") -> list[dict[str, str]]:
    """Messages of user and assistant in turns."""
    roles = ("user", "assistant")
    first = [{"role": "system", "content": system}] if system else []
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return [*first, *turns]
