import pytest
import torch

from mpillm.errors import UsageError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import GenerationCache, PartModule, WithoutValues, create, initialise
from mpillm.models.spec import Part

TIED = DecoderConfig(layers=2, width=16, heads=2, context=8, vocab_size=20, tied=True)


def test_tied_weights_of_one_part_are_one_parameter() -> None:
    model = create(TIED, seed=3)
    assert model.head.weight is model.embedding.weight
    names = [name for name, _ in model.named_weights()]
    assert names.count("embedding.weight") == 1
    assert "head.weight" not in names


def test_a_part_with_one_end_keeps_a_leaf_of_its_own() -> None:
    first, last = create(TIED, 3, part=Part(0, 1)), create(TIED, 3, part=Part(1, 2))
    # The head's copy has the name of the weight that is saved, and so the same values.
    weights = dict(last.named_weights())
    assert "head.weight" not in weights
    assert torch.equal(weights["embedding.weight"], first.embedding.weight)


def test_untied_weights_have_values_of_their_own() -> None:
    model = create(TIED.replace(tied=False), seed=3)
    assert not torch.equal(model.head.weight, model.embedding.weight)


def test_set_weight_replaces_a_parameter_by_name() -> None:
    model = create(TIED, seed=3)
    weight = torch.nn.Parameter(torch.ones(16, 16))
    model.set_weight("layers.1.attention.query.weight", weight)
    assert model.layers["1"].attention.query.weight is weight
    assert dict(model.named_parameters())["layers.1.attention.query.weight"] is weight
    model.set_weight("head.weight", torch.nn.Parameter(torch.zeros(20, 16)))
    model.tie()
    assert model.head.weight is model.embedding.weight


def test_initial_values_do_not_depend_on_the_part() -> None:
    whole = dict(create(TIED, seed=5).named_weights())
    for part in (Part(0, 1), Part(1, 2)):
        for name, weight in create(TIED, 5, part=part).named_weights():
            assert torch.equal(weight, whole[name]), name


def test_modules_are_built_without_values() -> None:
    with WithoutValues():
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        layer = torch.nn.Linear(4, 4)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert layer.weight.shape == (4, 4)


def test_biases_start_at_zero_and_norms_at_one() -> None:
    model = create(TIED.replace(bias=True, norm="layernorm"), seed=1)
    initialise(model, 2)
    assert not model.layers["0"].attention.query.bias.any()
    assert (model.layers["0"].attention_norm.weight == 1).all()


def test_an_architecture_that_does_not_generate_says_so() -> None:
    class Scorer(PartModule):
        pass

    with pytest.raises(UsageError, match="'decoder' does not continue text"):
        Scorer(TIED).make_cache(1)
    with pytest.raises(NotImplementedError):
        Scorer(TIED).next_logits(torch.zeros(1, 1), GenerationCache())
    with pytest.raises(NotImplementedError):
        Scorer(TIED).forward_part({}, ())


def test_buffers_are_on_the_device_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # As torch before 2.8, whose default device is not that of a `with`.
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cpu"))
    model = create(TIED, 3, torch.device("meta"))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model.head.weight is model.embedding.weight
