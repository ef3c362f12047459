"""The exported model is the trained one, whole and clean."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from cloister.errors import IntegrityError
from cloister.training import export
from cloister.training.architectures import build_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model({"architecture": "mlp", "hidden": [16, 8], "activation": "silu"}, 11, 3, seed=4).eval()


@pytest.fixture(scope="module")
def content(model: nn.Module) -> bytes:
    return export.to_onnx(model, 11)


def test_the_file_is_one_valid_self_contained_model(content: bytes) -> None:
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto, full_check=True)
    assert [opset.version for opset in proto.opset_import if opset.domain == ""] == [export.OPSET]
    assert [value.name for value in proto.graph.input] == ["features"]
    assert [value.name for value in proto.graph.output] == ["probabilities"]
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in proto.graph.initializer)


def test_the_file_shows_nothing_of_the_machine_that_made_it(content: bytes) -> None:
    for trace in (b".py", b"site-packages", b"/home", b"Traceback"):
        assert trace not in content


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_onnxruntime_and_torch_agree(model: nn.Module, content: bytes, rows: int) -> None:
    x = np.random.default_rng(rows).random((rows, 11), dtype=np.float32)
    got = onnxruntime.InferenceSession(content).run(None, {"features": x})[0]
    with torch.no_grad():
        expected = torch.softmax(model(torch.from_numpy(x)), dim=1).numpy()
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() <= 1e-5
    np.testing.assert_allclose(got.sum(axis=1), 1.0, atol=1e-6)


def test_a_file_that_computes_something_else_is_not_returned(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_run", lambda _content, x: np.full((len(x), 3), 1 / 3, dtype=np.float32))
    with pytest.raises(IntegrityError, match="differs"):
        export.to_onnx(model, 11)
