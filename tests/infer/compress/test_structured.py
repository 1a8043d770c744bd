"""Heads and columns: a smaller model of the same architecture, fitted to the outputs."""

from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import MismatchError
from mpillm.infer.compress.compress_model import CompressionRequest, compress_model
from mpillm.infer.compress.compression_method import CompressionOptions
from mpillm.infer.compress.method_catalog import make_method
from mpillm.infer.compress.structured import fitted, kept_of
from mpillm.infer.loading import load_trained
from tests.infer.compress.layer_problems import output_error, problem, statistics
from tests.infer.compress.small_model import QUIET
from tests.published import SPEC


@pytest.mark.parametrize(
    ("method", "sizes"),
    [("heads", {"heads": 2, "kv_heads": 1, "head_width": 8}), ("columns", {"hidden": 48})],
)
def test_a_smaller_model_is_written(
    small: Path, folder: Path, comm: MPI.Intracomm, method: str, sizes: dict[str, int]
) -> None:
    request = CompressionRequest(small / "run", folder / "out", method, rows=8, held_out=8)
    made = compress_model(request, comm, QUIET)
    loaded = load_trained(folder / "out", comm, QUIET)
    settings = {name: getattr(loaded.model.spec, name) for name in sizes}
    assert settings == sizes
    assert made.after.nbytes < 0.95 * made.before.nbytes
    assert made.before.loss is not None
    assert made.after.loss == pytest.approx(made.before.loss, abs=1.0)


def test_weights_that_stay_are_fitted_to_the_outputs() -> None:
    weight_OI, x_NI = problem()
    products_II = statistics(x_NI).products_II
    kept_K = torch.arange(0, 64, 2)
    assert products_II is not None
    found_OI, cut_OI = torch.zeros_like(weight_OI), torch.zeros_like(weight_OI)
    found_OI[:, kept_K] = fitted(weight_OI, products_II, kept_K)
    cut_OI[:, kept_K] = weight_OI[:, kept_K]
    assert output_error(found_OI, weight_OI, x_NI) < output_error(cut_OI, weight_OI, x_NI)
    every_I = torch.arange(64)
    torch.testing.assert_close(fitted(weight_OI, products_II, every_I), weight_OI)


def test_one_head_or_column_stays() -> None:
    assert kept_of(3, 0.99, 1) == 1
    assert kept_of(64, 0.5, 8) == 32
    assert kept_of(63, 0.5, 8) == 32


def test_models_without_heads_to_spare_are_refused() -> None:
    method = make_method("heads", CompressionOptions())
    with pytest.raises(MismatchError, match="the model has 1, with rotary positions"):
        method.check_model(SPEC.replace(kv_heads=1))
