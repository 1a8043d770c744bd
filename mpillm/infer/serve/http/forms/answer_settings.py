"""How a text is to be continued: the fields that completions and chats share."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mpillm.infer.sampling import MOST_TOKENS, Sampling
from mpillm.infer.serve.http.forms.api_error import ApiError, wrong_field
from mpillm.infer.serve.http.forms.body_fields import (
    BodyFields,
    check_integer,
    check_number,
    check_text,
    shown,
    wrong_type,
)

# Of clients that keep books; OpenAI's API answers the same with and without them.
IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# What the engine does not compute, with the value that changes nothing.
NEUTRAL: Mapping[str, float] = MappingProxyType(
    {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "min_p": 0}
)
MOST_CHOICES = 128
"""Of one prompt: OpenAI's bound of `n`."""
# Each token is compared with each stop string: bounded, so that no request slows the others.
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_BIASES, LARGEST_BIAS = 1024, 100.0
# A nucleus of 0 holds the likeliest token alone, and Sampling asks for more than 0.
SMALLEST_TOP_P = 1e-9
SEEDS = 1 << 63


@dataclass(frozen=True)
class AnswerSettings:
    """The settings of a request. `max_tokens` None: as many as the route says."""

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int
    n: int
    stop: tuple[str, ...]
    bias: Mapping[int, float]
    stream: bool
    include_usage: bool

    def sampling(self, max_tokens: int, choice: int) -> Sampling:
        """Return how the text number `choice` is drawn; the first one has the seed itself."""
        seed = (self.seed + choice) % SEEDS
        return Sampling(max_tokens, self.temperature, self.top_k, self.top_p, seed)


def read_answer_settings(
    body: BodyFields, vocab_size: int, names: tuple[str, ...] = ("max_tokens",)
) -> AnswerSettings:
    """Read the shared fields. `names`: of the number of tokens, the one that counts first.

    Raises ApiError, which names the field.
    """
    for name, neutral in NEUTRAL.items():
        if body.number(name, -LARGEST_BIAS, LARGEST_BIAS, neutral) != neutral:
            raise wrong_field(name, f"is not computed here; leave it out, or give {neutral:g}")
    counts = [body.integer(name, 0, MOST_TOKENS) for name in names]
    stream = body.flag("stream")
    return AnswerSettings(
        max_tokens=next((count for count in counts if count is not None), None),
        temperature=body.number("temperature", 0, 2, 1.0),
        top_p=max(body.number("top_p", 0, 1, 1.0), SMALLEST_TOP_P),
        # OpenAI has none; -1 is vLLM's word for all tokens.
        top_k=max(0, body.integer("top_k", -1, MOST_TOKENS) or 0),
        seed=_seed(body),
        n=body.integer("n", 1, MOST_CHOICES) or 1,
        stop=_stops(body.value("stop")),
        bias=_bias(body.table("logit_bias"), body.value("logit_bias"), vocab_size),
        stream=stream,
        include_usage=_include_usage(body, stream),
    )


def _seed(body: BodyFields) -> int:
    seed = body.integer("seed", -SEEDS, SEEDS - 1)
    return secrets.randbelow(SEEDS) if seed is None else seed % SEEDS


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list):
        raise wrong_type("stop", "a text or a list of texts", value)
    if len(listed) > MOST_STOPS:
        raise wrong_field("stop", f"has {len(listed):,} texts, and at most {MOST_STOPS} are taken")
    texts = [check_text("stop", each) for each in listed]
    for text in texts:
        if not 0 < len(text) <= LONGEST_STOP:
            rule = f"takes texts of 1 to {LONGEST_STOP} characters, and not {len(text):,}"
            raise wrong_field("stop", rule)
    return tuple(texts)


def _bias(table: BodyFields | None, values: Any, vocab_size: int) -> dict[int, float]:
    if table is None:
        return {}
    if len(values) > MOST_BIASES:
        rule = f"has {len(values):,} tokens, and at most {MOST_BIASES:,} are taken"
        raise wrong_field("logit_bias", rule)
    found: dict[int, float] = {}
    for name, value in values.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise wrong_field(
                "logit_bias", f"has numbers of tokens as names, and not {shown(name)}"
            )
        token = check_integer("logit_bias", int(name), 0, vocab_size - 1)
        found[token] = check_number("logit_bias", value, -LARGEST_BIAS, LARGEST_BIAS)
    return found


def _include_usage(body: BodyFields, stream: bool) -> bool:
    options = body.table("stream_options")
    if options is None:
        return False
    if not stream:
        raise wrong_field("stream_options", "is for streams; give stream: true, or leave it out")
    found = options.flag("include_usage")
    # Padding against attackers who measure packets: a server of one's own needs none.
    options.flag("include_obfuscation")
    options.refuse_others()
    return found


def room_for(prompt: int, asked: int | None, usual: int | None, context: int, name: str) -> int:
    """Return how many tokens may follow a prompt of `prompt` tokens.

    `usual`: where none were asked for; None: as many as there is room for. Raises ApiError where
    the context is too small.
    """
    room = context - prompt
    count = asked if asked is not None else room if usual is None else min(usual, room)
    if prompt > context or count > room or (asked is None and room < 1):
        wanted = f"{prompt:,} tokens of the prompt" + (
            f" and {asked:,} of the text" if asked is not None else ""
        )
        raise ApiError(
            400,
            f"the model's context is {context:,} tokens, and the request has {wanted}; "
            f"shorten the prompt, or lower {name}",
            name if prompt < context and asked is not None else "prompt",
            "context_length_exceeded",
        )
    return count
