from dataclasses import dataclass

import pytest

from mpillm.errors import RecipeError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.spec import ModelSpec, Part


@dataclass(frozen=True)
class Plain(ModelSpec):
    """An architecture that overrides only what it must."""

    architecture: str = "plain"
    context: int = 8
    vocab_size: int = 10

    def build(self, part=None):
        raise NotImplementedError

    def describe(self) -> str:
        return "plain"

    @property
    def blocks(self) -> int:
        return 3

    @property
    def stream_widths(self) -> tuple[int, ...]:
        return (4,)

    @property
    def block_flops(self) -> tuple[float, ...]:
        return (1.0, 2.0, 3.0)

    @property
    def end_flops(self) -> tuple[float, float]:
        return 10.0, 20.0

    def parameters_of(self, part: Part) -> int:
        return 100 * part.count + self.begins(part) + 2 * self.ends(part)

    def activation_bytes(self, part: Part, rows: int, element_bytes: int = 4) -> int:
        return 0

    def output_bytes(self, rows: int, device: str = "cpu") -> int:
        return 0


def test_the_first_part_begins_the_model_and_the_last_ends_it() -> None:
    spec = Plain()
    parts = [Part(0, 1), Part(1, 2), Part(2, 3), spec.whole]
    assert [spec.begins(part) for part in parts] == [True, False, False, True]
    assert [spec.ends(part) for part in parts] == [False, False, True, True]
    assert [part.count for part in parts] == [1, 1, 1, 3]


def test_totals_follow_from_parts_and_blocks() -> None:
    spec = Plain()
    assert spec.parameters == 303
    assert spec.flops_per_token == 36.0


def test_an_architecture_ties_and_cuts_nothing_unless_it_says_so() -> None:
    spec = Plain()
    assert spec.tied_weights == {}
    assert spec.cut_dims == {}
    assert spec.shared_inputs == spec.host_inputs == ()
    assert Plain.shapes() == {}


def test_documents_stay_in_host_memory_for_every_part() -> None:
    assert DecoderConfig.host_inputs == DecoderConfig.shared_inputs == ("documents",)


def test_replacing_a_setting_checks_all_of_them_again() -> None:
    assert DecoderConfig().replace(vocab_size=77).vocab_size == 77
    with pytest.raises(RecipeError, match="not divisible by 7 heads"):
        DecoderConfig().replace(heads=7)


def test_a_spec_that_lacks_a_number_cannot_be_made() -> None:
    class Half(ModelSpec):
        blocks = 3

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]
