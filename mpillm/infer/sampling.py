"""How a token is drawn from the logits. Checked without torch, before anything is loaded."""

from dataclasses import asdict, dataclass

from mpillm.errors import UsageError

# Below the first the likeliest token takes all, and 32-bit logits would overflow.
COLDEST, HOTTEST = 1e-6, 1e6
MOST_TOKENS = 1_000_000_000
# Of beams, and of the exponent of their lengths: beyond, scores would overflow.
MOST_BEAMS, MOST_PENALTY = 1024, 10.0


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


@dataclass(frozen=True)
class Decoding:
    """Settings by which texts of unequal length are written together: greedy, sampled, by beams.

    `max_tokens`: of each text; None: 256, or what the model's context allows. Scores of beams are
    divided by length ^ `length_penalty`. Raises UsageError, which names the option.
    """

    sampling: Sampling
    max_tokens: int | None = None
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.beams <= MOST_BEAMS:
            raise UsageError(f"--beams is a number from 1 to {MOST_BEAMS:,}, and not {self.beams}")
        if self.beams > 1 and not self.sampling.greedy:
            raise UsageError(
                f"--beams {self.beams} finds the likeliest text, and --temperature "
                f"{self.sampling.temperature:g} draws one by chance; leave one of them out"
            )
        if not abs(self.length_penalty) <= MOST_PENALTY:
            raise UsageError(
                f"--length-penalty is a number from -{MOST_PENALTY:g} to {MOST_PENALTY:g}, and not "
                f"{self.length_penalty}"
            )
        if self.beams == 1 and self.length_penalty != 1:
            raise UsageError(
                "--length-penalty compares beams, and there is one alone; give --beams 4, or "
                "leave it out"
            )

    def describe(self) -> str:
        """Say how a token is chosen."""
        if self.beams > 1:
            return f"{self.beams} beams, length penalty {self.length_penalty:g}"
        sampling = self.sampling
        if sampling.greedy:
            return "greedy"
        parts = [f"temperature {sampling.temperature:g}"]
        parts += [f"top-k {sampling.top_k}"] if sampling.top_k else []
        parts += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
        return ", ".join([*parts, f"seed {sampling.seed}"])

    def to_json(self) -> dict[str, object]:
        settings = {**asdict(self.sampling), "max_tokens": self.max_tokens}
        return {**settings, "beams": self.beams, "length_penalty": self.length_penalty}


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
