"""Classic classifiers: padding changes nothing, parts are the whole, and they learn."""

import pytest
import torch
from torch.nn import functional as F

from mpillm.bench.tensor_peak import peak_tensor_bytes
from mpillm.errors import RecipeError
from mpillm.models.model_catalog import named_shapes, spec_class
from mpillm.models.part_module import create, weight_shapes
from mpillm.models.spec import Part
from mpillm.parallel.pipeline.split_backward import SplitBackward
from tests.models.saved_bytes import saved_bytes

KINDS = {
    "lstm": {},
    "cnn": {},
    "mlp": {},
    "cnn of images": {"image_size": 6, "channels": 2},
    "mlp of images": {"image_size": 6, "channels": 2},
}
LENGTHS = [7, 2, 10]


def make_spec(kind, **settings):
    known = {"layers": 3, "width": 16, "context": 10, "vocab_size": 20, "classes": 4}
    return spec_class(kind.split()[0])(**{**known, **KINDS[kind], **settings})


def make_fields(spec, rows=3):
    generator = torch.Generator().manual_seed(1)
    if spec.image_size:
        shape = rows, spec.channels, spec.image_size, spec.image_size
        return {"pixels": torch.randn(shape, generator=generator)}
    ids = torch.randint(spec.vocab_size, (rows, spec.context), generator=generator)
    return {"ids": ids, "lengths": torch.tensor(LENGTHS[:rows])}


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_counts(kind):
    spec = make_spec(kind)
    weights = sum(weight.numel() for weight in create(spec, 0).parameters())
    assert spec.parameters == weights
    assert sum(torch.Size(shape).numel() for _, shape in weight_shapes(spec).values()) == weights
    assert all(flops > 0 for flops in spec.block_flops)


@pytest.mark.parametrize("kind", ["lstm", "cnn", "mlp"])
def test_padding_changes_nothing(kind):
    spec = make_spec(kind, layers=1)
    model, fields = create(spec, 0), make_fields(spec)
    whole = model.forward_part(fields, ()).outputs[0]
    places = torch.arange(spec.context)
    padding = places >= fields["lengths"][:, None]
    if kind == "cnn":
        # A convolution reads one token beyond the end: that one is left as it is.
        padding &= places > fields["lengths"][:, None]
    changed = {**fields, "ids": torch.where(padding, 3, fields["ids"])}
    assert torch.equal(model.forward_part(changed, ()).outputs[0], whole)
    shorter = {**fields, "lengths": torch.tensor([1, 1, 1])}
    assert not torch.equal(model.forward_part(shorter, ()).outputs[0], whole)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_split_backward_passes_give_the_whole(kind):
    spec = make_spec(kind, dropout=0.3)
    fields = {**make_fields(spec), "dropout_keys": torch.arange(3)}
    whole = create(spec, 5)
    F.cross_entropy(whole.forward_part(fields, ()).outputs[0], torch.tensor([1, 2, 3])).backward()
    wanted = {name: weight.grad for name, weight in whole.named_weights()}
    parts = [create(spec, 5, part=Part(first, first + 1)) for first in range(3)]
    streams, passes = (), []
    for part in parts:
        made = part.forward_part(fields, streams)
        outputs = made.outputs
        assert part.ends or tuple(outputs[0].shape[1:]) == spec.streams_ahead(1)[0]
        if part.ends:
            outputs = (F.cross_entropy(outputs[0], torch.tensor([1, 2, 3])),)
        passes.append(SplitBackward(outputs, made.pivots))
        streams = tuple(each.detach().requires_grad_() for each in outputs)
    gradients = (None,)
    for split in reversed(passes):
        gradients = split.input(gradients)
    for split in passes:
        split.weights()
    found = {name: weight.grad for part in parts for name, weight in part.named_weights()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name])


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_its_inputs_show(kind):
    """The class: a token that the text has, or a corner of the image that is lit."""
    spec = make_spec(kind, width=32, layers=2)
    fields, generator = make_fields(spec, 3), torch.Generator().manual_seed(2)
    classes = torch.randint(4, (64,), generator=generator)
    if spec.image_size:
        pixels = torch.rand(64, 2, 6, 6, generator=generator) * 0.5
        pixels[torch.arange(64), :, (classes // 2) * 5, (classes % 2) * 5] = 3.0
        # The place is told by one channel: a convolution knows none.
        pixels[:, 1] = torch.linspace(0, 1, 36).view(6, 6) * (pixels[:, 0] > 1)
        fields = {"pixels": pixels}
    else:
        ids = torch.randint(4, spec.vocab_size, (64, spec.context), generator=generator)
        ids[torch.arange(64), torch.randint(5, (64,), generator=generator)] = classes
        fields = {"ids": ids, "lengths": torch.full((64,), 8)}
    model = create(spec, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model.forward_part(fields, ()).outputs[0], classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (model.forward_part(fields, ()).outputs[0].argmax(-1) == classes).float().mean()
    assert right > 0.9


def test_the_names_of_their_shapes():
    shapes = named_shapes()
    assert {"lstm", "cnn", "mlp"} <= set(shapes)
    assert not any(shapes[name].generates for name in ("lstm", "cnn", "mlp"))


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("lstm", {"image_size": 8}, "an LSTM reads texts"),
        ("mlp", {"dropout": 1.0}, "dropout = 1 is the probability"),
    ],
)
def test_wrong_settings_are_refused(kind, settings, words):
    with pytest.raises(RecipeError, match=words):
        make_spec(kind, **settings)


@pytest.mark.parametrize("kind", ["lstm", "cnn", "mlp"])
def test_a_text_without_tokens_has_finite_logits(kind):
    spec = make_spec(kind)
    fields = {**make_fields(spec), "lengths": torch.tensor([0, 1, 10])}
    found = create(spec, 0).forward_part(fields, ()).outputs[0]
    assert found.isfinite().all()
    one = create(spec, 0).forward_part({**fields, "lengths": torch.tensor([1, 1, 10])}, ())
    assert torch.equal(found, one.outputs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_holds_what_its_settings_count(kind):
    sizes = {"image_size": 12} if "images" in kind else {"context": 128}
    spec, rows = make_spec(kind, width=64, dropout=0.1, **sizes), 24
    fields = {**make_fields(spec, rows), "dropout_keys": torch.arange(rows)}
    if "ids" in fields:
        fields["lengths"] = torch.full((rows,), 100)
    model = create(spec, 0)

    def step():
        model.forward_part(fields, ()).outputs[0].sum().backward()

    step()  # gradients of weights stay, and belong to no step
    counted = spec.activation_bytes(spec.whole, rows)
    if kind != "mlp of images":
        peak = peak_tensor_bytes(step)
        assert counted + spec.working_bytes(rows) == pytest.approx(peak, rel=0.3)
    if not kind.startswith("mlp"):
        assert counted == pytest.approx(saved_bytes(model, fields, ()), rel=0.15)
