# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""What leaves a training run: the model as ONNX, and one number about the holdout rows.

Guarantees: the ONNX file is self-contained (no external data), maps `features` float32 [N, D] to `probabilities`
float32 [N, C], and was run by onnxruntime and compared with torch before it is returned. `private_accuracy` is
epsilon-differentially private for the holdout's units; as no unit has rows in both the holdout and the training set,
the two figures together cost the larger of the two epsilons (parallel composition), not their sum.

Not promised: anything about `evaluate`, which is the exact, private figure: it never leaves the worker.
"""

from __future__ import annotations

import contextlib
import io
import logging
import secrets
import warnings
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import nn

from cloister.errors import IntegrityError

OPSET = 18
INPUT_NAME = "features"
OUTPUT_NAME = "probabilities"
# Largest difference of a probability between torch and onnxruntime, both float32.
PARITY_TOLERANCE = 1e-5
_ROWS_AT_ONCE = 256  # a model of pictures may hold megabytes of channels for each row


class RandomBits(Protocol):
    """`secrets.SystemRandom` and, in tests, `random.Random`."""

    def random(self) -> float: ...


def to_onnx(model: nn.Module, width: int) -> bytes:
    """The bytes of `model.onnx`, softmax included.

    Raises:
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
    if got.shape != expected.shape or float(np.abs(got - expected).max()) > PARITY_TOLERANCE:
        raise IntegrityError("the exported model differs from the trained one", "do not release this model")
    return bytes(content)


def evaluate(model: nn.Module, x_ND: torch.Tensor, y_N: torch.Tensor) -> int:
    """The exact number of rows that the model gets right: private, see `private_accuracy`."""
    model.eval()
    batches = zip(torch.split(x_ND, _ROWS_AT_ONCE), torch.split(y_N, _ROWS_AT_ONCE), strict=True)
    with torch.no_grad():
        return sum(int((model(x_BD).argmax(dim=1) == y_B).sum()) for x_BD, y_B in batches)


def private_accuracy(
    correct: int, rows: int, epsilon: float, random: RandomBits | None = None, *, rows_per_unit: int = 1
) -> float:
    """The share of rows that are right, with two-sided geometric noise on the count; `rows` is public.

    One unit changes the count by at most its k = `rows_per_unit` rows, so the noise P[Z = z] ~ exp(-epsilon·|z|/k) is
    epsilon-DP for it (k = 1: Ghosh, Roughgarden and Sundararajan, "Universally Utility-Maximizing Privacy Mechanisms",
    STOC 2009). Drawn by inversion of 53-bit uniforms: probabilities are off by about 2**-53, which is a delta and not
    part of epsilon.

    Raises:
        ValueError: a parameter outside its range.
    """
    if not 0 <= correct <= rows or rows < 1 or rows_per_unit < 1 or not 0.0 < epsilon < float("inf"):
        raise ValueError("correct, rows, epsilon or the rows of a unit are out of range")
    source = random if random is not None else secrets.SystemRandom()
    scaled = epsilon / rows_per_unit
    noisy = correct + _geometric(scaled, source) - _geometric(scaled, source)
    return min(max(noisy, 0), rows) / rows


def _geometric(epsilon: float, source: RandomBits) -> int:
    """The number of failures before the first success with probability 1 - exp(-epsilon), by inversion."""
    uniform = 1.0 - source.random()
    return int(np.floor(np.log(uniform) / -epsilon))


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
