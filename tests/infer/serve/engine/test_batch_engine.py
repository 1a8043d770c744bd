"""Many texts at once are those of `generate`, each as if it were alone."""

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mpillm.errors import UsageError
from mpillm.infer.generate import sample_tokens
from mpillm.infer.sampling import Sampling
from mpillm.infer.serve.engine.batch_engine import BatchEngine
from mpillm.infer.serve.engine.page_pool import PagePool
from mpillm.infer.serve.engine.scheduler import SchedulerSettings, Wanted
from mpillm.infer.serve.engine.step_runner import StepRunner
from mpillm.infer.serve.plain_engine import PlainEngine
from mpillm.infer.serve.requests import (
    Finished,
    PromptRead,
    QueueFull,
    TextEngine,
    TextRequest,
    TokenDrawn,
)
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import create
from mpillm.models.stacks.decoder_stack import Decoder

CONFIG = DecoderConfig(layers=2, width=32, heads=4, kv_heads=2, context=96, vocab_size=60)
GREEDY = Sampling(24, temperature=0.0)
WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def model() -> Decoder:
    made = create(CONFIG, 7).eval()
    assert isinstance(made, Decoder)
    return made


def engine_of(model: Decoder, pages: int = 64, **settings: Any) -> BatchEngine:
    pool, runner = PagePool(pages, 4), StepRunner(model, pages, 4)
    waiting = settings.pop("most_waiting", 256)
    bounds = SchedulerSettings(**settings)
    return BatchEngine(runner, pool, CONFIG.context, CONFIG.vocab_size, waiting, bounds)


@pytest.fixture
def engine(model: Decoder) -> Iterator[BatchEngine]:
    made = engine_of(model)
    yield made
    made.close()


@dataclass
class Heard:
    """The events of one text."""

    events: list[Any] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, Finished):
            self.ended.set()

    def wait(self) -> "Heard":
        assert self.ended.wait(WAIT_SECONDS)
        return self

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if isinstance(event, TokenDrawn)]

    @property
    def reason(self) -> str:
        return str(self.events[-1].reason)


def ask(engine: TextEngine, prompt: Sequence[int], sampling: Sampling, **more: Any) -> Heard:
    heard = Heard()
    engine.submit(TextRequest(tuple(prompt), sampling, **more), heard)
    return heard


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    draw = random.Random(4)
    return [draw.choices(range(60), k=draw.randint(1, longest)) for _ in range(count)]


def test_texts_side_by_side_are_those_of_generate(model: Decoder) -> None:
    """With few pages texts are preempted; chunks of prompts come next to texts that decode."""
    asked = prompts(24)
    given = [replaced(n) for n in range(len(asked))]
    expected = [
        list(sample_tokens(model, list(prompt), sampling))
        for prompt, sampling in zip(asked, given, strict=True)
    ]
    for pages, chunk in ((64, 8), (40, 64)):
        engine = engine_of(model, pages, chunk_tokens=chunk, step_tokens=48)
        heard = [ask(engine, p, s) for p, s in zip(asked, given, strict=True)]
        assert [each.wait().tokens for each in heard] == expected
        counts = engine.counts()
        engine.close()
        assert counts.generated_tokens == sum(map(len, expected))
        assert (counts.pages_used, counts.running, counts.waiting) == (0, 0, 0)
        assert counts.finished == {"length": len(asked)}
    assert counts.preempted > 0


def replaced(number: int) -> Sampling:
    """Return greedy settings, or others, with another seed each."""
    if number % 3:
        return Sampling(8 + number, temperature=0.0)
    return Sampling(16, temperature=0.9, top_k=7, top_p=0.9, seed=number)


def test_log_probabilities_are_those_of_the_plain_engine(
    model: Decoder, engine: BatchEngine
) -> None:
    plain = PlainEngine(model)
    more = {"top_logprobs": 3, "prompt_logprobs": True, "bias": {5: 4.0, 9: -100.0}}
    found = [ask(each, prompts(3)[2], GREEDY, **more).wait() for each in (engine, plain)]
    plain.close()
    ours, theirs = (each.events for each in found)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        pairs = [(one, other)]
        if isinstance(one, PromptRead):
            assert one.logprobs
            pairs = list(zip(one.logprobs, other.logprobs, strict=True))
            assert pairs.pop(0)[0].logprob is None
        elif isinstance(one, TokenDrawn):
            pairs = [(one.logprob, other.logprob)]
        else:
            pairs = []
        for mine, theirs_ in pairs:
            assert mine.token == theirs_.token
            assert mine.logprob == pytest.approx(theirs_.logprob, abs=1e-5)
            assert [n for n, _ in mine.top] == [n for n, _ in theirs_.top]


@pytest.mark.parametrize("reads", [Wanted.ALL_LOGITS, Wanted.STATES])
def test_a_prompt_that_is_preempted_is_read_again(model: Decoder, reads: Wanted) -> None:
    """Each position's log-probability is found once, and each state summed once."""
    prompt, found = tuple(random.Random(3).choices(range(60), k=28)), []
    for pages in (64, 13):
        engine = engine_of(model, pages, chunk_tokens=2, step_tokens=2)
        heard, request = Heard(), TextRequest(prompt, Sampling(1), top_logprobs=2)
        # At once, so that the others need more pages while the prompt is read.
        with engine._lock:
            others = [ask(engine, (n, 2, 3), Sampling(40, temperature=0.0)) for n in range(3)]
            text = engine._texts[engine._submit(request, heard, reads, 0)]
        for each in (heard, *others):
            each.wait()
        assert (engine.counts().preempted > 0) == (pages < 64)
        engine.close()
        found.append((text.logprobs, text.states_C))
    (logprobs, states_C), (again, states_again_C) = found
    if reads == Wanted.ALL_LOGITS:
        assert len(logprobs) == len(again) == len(prompt) - 1
        expected = [each.logprob for each in logprobs]
        assert [each.logprob for each in again] == pytest.approx(expected, abs=1e-5)
    else:
        torch.testing.assert_close(states_again_C, states_C)


def test_an_embedding_that_ends_early_is_none(model: Decoder) -> None:
    engine = engine_of(model, step_tokens=4)
    run, read = engine._runner.run, threading.Event()

    def slow(rows: Any) -> Any:
        found = run(rows)
        read.set()
        assert closing.wait(WAIT_SECONDS)
        return found

    closing = threading.Event()
    engine._runner.run = slow  # type: ignore[method-assign]
    closer = threading.Thread(target=lambda: (read.wait(), closing_soon()))

    def closing_soon() -> None:
        threading.Timer(0.2, closing.set).start()
        engine.close()

    closer.start()
    with pytest.raises(UsageError, match="cancelled"):
        engine.embed([(1, 2, 3) * 8])
    closer.join()


def test_a_shared_prefix_is_computed_once(engine: BatchEngine) -> None:
    prefix = random.Random(8).choices(range(60), k=40)
    first = ask(engine, [*prefix, 1], GREEDY).wait()
    second = ask(engine, [*prefix, 2], GREEDY).wait()
    assert first.events[0] == PromptRead(0)
    assert second.events[0] == PromptRead(40)
    assert engine.counts().cached_tokens == 40


def test_ends_and_embeddings(model: Decoder, engine: BatchEngine) -> None:
    whole = ask(engine, [3, 1, 4], GREEDY).wait()
    end = whole.tokens[5]
    cut = ask(engine, [3, 1, 4], GREEDY, end_ids=frozenset({end})).wait()
    assert cut.tokens == whole.tokens[: whole.tokens.index(end)]
    assert (cut.reason, whole.reason) == ("stop", "length")
    [short, long] = engine.embed([(3, 1), tuple(prompts(9)[8] * 2)])
    with torch.inference_mode():
        head = model.forward_part({"ids": torch.tensor([[3, 1]])}, ()).outputs[0]
        mean_C = head.hidden_BTC[0].mean(0)
    expected = torch.nn.functional.normalize(mean_C, dim=0).tolist()
    assert short == pytest.approx(expected, abs=1e-5)
    assert sum(each * each for each in long) == pytest.approx(1)


def test_a_cancelled_text_gives_back_its_pages(engine: BatchEngine) -> None:
    heard, draw = [], random.Random(1)
    for prompt in prompts(60):
        each = Heard()
        number = engine.submit(TextRequest(tuple(prompt), Sampling(40, temperature=0.0)), each)
        heard.append(each)
        if draw.random() < 0.6:
            engine.cancel(number)
            engine.cancel(number + 1000)
    reasons = {each.wait().reason for each in heard}
    assert reasons == {"cancelled", "length"}
    assert engine.counts().pages_used == 0


def fill(engine: BatchEngine, heard: list[Heard]) -> None:
    """Ask until a text is refused; keep the listeners of the others."""
    for number, each in enumerate(heard):
        try:
            engine.submit(TextRequest((1,) * 8, GREEDY), each)
        except QueueFull:
            del heard[number:]
            raise


def test_refusals(model: Decoder) -> None:
    engine = engine_of(model, pages=8, most_waiting=2)
    for prompt, most, words in (
        ((), 1, "empty"),
        ((1,) * 90, 10, "context is 96"),
        ((1,) * 30, 10, "room for 32"),
        ((1, 99), 1, "99 is not in the vocabulary"),
    ):
        with pytest.raises(UsageError, match=words):
            ask(engine, prompt, Sampling(most))
    for more, words in (({"bias": {60: 1.0}}, "60 is not"), ({"top_logprobs": 61}, "61 are asked")):
        with pytest.raises(UsageError, match=words):
            ask(engine, (1,), GREEDY, **more)
    heard = [Heard() for _ in range(50)]
    with pytest.raises(QueueFull) as full:
        fill(engine, heard)
    assert full.value.retry_after_seconds >= 1
    threading.Thread(target=engine.close).start()
    assert {each.wait().reason for each in heard} <= {"cancelled", "length"}
    with pytest.raises(QueueFull):
        ask(engine, (1,), GREEDY)


class Choice:
    """Allows two tokens, and fails at the third."""

    def __init__(self) -> None:
        self.left = 3

    def allowed(self) -> bytes | None:
        return bytes([0b0101_0000, 0])

    def accept(self, token: int) -> None:
        self.left -= 1
        if not self.left:
            raise ValueError("no more")


class NoChoice(Choice):
    """Allows no token."""

    def allowed(self) -> bytes | None:
        return bytes(8)


def test_a_constraint_ends_its_text_alone(engine: BatchEngine) -> None:
    other = ask(engine, [8, 9], GREEDY)
    held = ask(engine, [3, 1, 4], GREEDY, constraint=Choice()).wait()
    assert (set(held.tokens) <= {4, 6}, len(held.tokens), held.reason) == (True, 3, "failed")
    none = ask(engine, [3, 1, 4], GREEDY, constraint=NoChoice()).wait()
    assert (none.tokens, none.reason) == ([], "failed")
    assert other.wait().reason == "length"


def test_a_text_that_is_not_finite_leaves_nothing_behind() -> None:
    """Its pages are read again by others, where they are masked."""
    odd = create(CONFIG.replace(tied=False), 7).eval()
    assert isinstance(odd, Decoder)
    assert odd.embedding is not None
    odd.embedding.weight.data[7] = torch.nan
    engine = engine_of(odd, pages=12)
    asked = [[3, 1, 4, 1, 5], [2, 7, 1, 8] * 5, [9, 2, 6, 5] * 4, [11] * 6]
    for _ in range(2):
        with pytest.raises(UsageError, match="not finite"):
            engine.embed([(7,) * 47])
        heard = [ask(engine, prompt, Sampling(6, temperature=0.0)) for prompt in asked]
        reasons = [each.wait().reason for each in heard]
        assert reasons == ["length", "failed", "length", "length"]
        for prompt, each in zip(asked, heard, strict=True):
            if each.reason == "length":
                expected = sample_tokens(odd, prompt, Sampling(6, temperature=0.0))
                assert each.tokens == list(expected)
    assert engine.counts().pages_used == 0
    engine.close()


def test_a_fault_ends_every_text(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model)
    monkeypatch.setattr(engine._runner, "run", lambda rows: 1 // 0)
    ended: list[None] = []
    # Other ranks may wait within the step: nobody waits for them in turn.
    monkeypatch.setattr(engine._runner, "end", lambda: ended.append(None))
    heard = ask(engine, (1, 2), GREEDY).wait()
    assert heard.reason == "failed"
    assert "ZeroDivisionError" in engine.counts().failure
    engine.drain()
    engine.close()
    assert not ended
