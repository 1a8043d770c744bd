"""Reward an answer that equals the data's."""


def exact_answer(prompt: str, answer: str, reference: str) -> float:
    """Return 1 for an answer that is the reference, white space at both ends apart, else 0."""
    return float(answer.strip() == reference.strip())
