# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""What leaves a training run: the model as ONNX.

Guarantees: the ONNX file is self-contained (no external data), maps `features` float32 [N, D] to `probabilities`
float32 [N, C], and was run by onnxruntime and compared with torch before it is returned.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import nn

from cloister.errors import InputError, IntegrityError

OPSET = 18
INPUT_NAME = "features"
OUTPUT_NAME = "probabilities"
# Largest difference of a probability between torch and onnxruntime, both float32.
PARITY_TOLERANCE = 1e-5


def to_onnx(model: nn.Module, width: int) -> bytes:
    """The bytes of `model.onnx`, softmax included.

    Raises:
        InputError: the model's numbers are not finite.
        IntegrityError: onnxruntime computes something else than torch.
    """
    wrapped = nn.Sequential(model, nn.Softmax(dim=1)).eval()
    probe_ND = torch.rand((3, width), generator=torch.Generator().manual_seed(0))
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            wrapped,
            (probe_ND,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim("rows")},),
            verbose=False,
        )
        expected = wrapped(probe_ND).numpy()
    if program is None:
        raise IntegrityError("the export produced no model", "report this with the architecture of the spec")
    proto = program.model_proto
    for node in proto.graph.node:
        # The exporter writes stack traces, with paths of the machine that trained, into every node.
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.graph.metadata_props[:], proto.metadata_props[:]
    content = proto.SerializeToString(deterministic=True)
    got = _run(content, probe_ND.numpy())
    if not np.isfinite(expected).all():
        raise InputError("the model diverged: what it says is no number", "lower training.learning_rate")
    if got.shape != expected.shape or not float(np.abs(got - expected).max()) <= PARITY_TOLERANCE:
        raise IntegrityError("the exported model differs from the trained one", "do not release this model")
    return bytes(content)


def _run(content: bytes, features_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    outputs: list[npt.NDArray[np.float32]] = session.run([OUTPUT_NAME], {INPUT_NAME: features_ND})
    return outputs[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
