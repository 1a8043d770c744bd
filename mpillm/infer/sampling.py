"""How a token is drawn from the logits. Checked without torch, before anything is loaded."""

from dataclasses import dataclass

from mpillm.errors import UsageError

# Below the first the likeliest token takes all, and 32-bit logits would overflow.
COLDEST, HOTTEST = 1e-6, 1e6
MOST_TOKENS = 1_000_000_000


@dataclass(frozen=True)
class Sampling:
    """Settings by which the next token is drawn from the logits.

    `temperature` 0 takes the likeliest; `top_k` 0 and `top_p` 1 are off. Raises UsageError, which
    names the option and its range.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, fits, rule in (
            (
                "max-tokens",
                self.max_tokens,
                0 < self.max_tokens <= MOST_TOKENS,
                f"a number from 1 to {MOST_TOKENS:,}",
            ),
            (
                "temperature",
                self.temperature,
                0 <= self.temperature <= HOTTEST,
                f"a number from 0 to {HOTTEST:,.0f}",
            ),
            ("top-k", self.top_k, self.top_k >= 0, "a number from 0"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            # The generators of torch take 64 bits.
            ("seed", self.seed, 0 <= self.seed < 1 << 63, "a number from 0 to 2^63 − 1"),
        ):
            if not fits:
                raise UsageError(f"--{name} is {rule}, and not {value}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < COLDEST


def check_prompt(prompt: str) -> None:
    """Raise UsageError where the bytes of the prompt were no UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as failure:
        place = len(prompt[: failure.start].encode())
        raise UsageError(
            f"--prompt holds bytes that are no UTF-8 (the first is byte {place:,}); "
            "convert the text to UTF-8, such as with iconv"
        ) from None
