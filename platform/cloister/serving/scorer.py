"""One ONNX Runtime session over bytes that were verified before.

Guarantees: the model comes from memory, never from a path (a path lets ONNX Runtime follow links to other files, and
external tensors escape the signature); its one input and one output have the shape that the manifest implies, or it
does not load. Not guaranteed: that a graph cannot burn processor time; gates check that before release.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime

from cloister.errors import CloisterError, IntegrityError

INPUT_NAME, OUTPUT_NAME = "features", "probabilities"


class Scorer:
    """`features` float32 [N, D] → `probabilities` [N, C]. Safe to share between threads."""

    def __init__(self, model_onnx: bytes, *, width: int, classes: int) -> None:
        """Load.

        Raises:
            IntegrityError: not ONNX, or not a model of this width and number of classes.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # one replica a core; more threads only fight over it
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # its warnings go to standard error and may quote the graph
        try:
            self._session = onnxruntime.InferenceSession(model_onnx, options, providers=["CPUExecutionProvider"])
        except Exception:  # noqa: BLE001  (the runtime's exceptions share no base class; the text quotes the graph)
            raise IntegrityError("the model does not load", "export and release the model again") from None
        sides = (self._session.get_inputs(), self._session.get_outputs())
        found = [
            (item.name, len(item.shape), item.shape[-1] if item.shape else None) for side in sides for item in side
        ]
        if found != [(INPUT_NAME, 2, width), (OUTPUT_NAME, 2, classes)]:
            raise IntegrityError("the model's inputs or outputs are not those of its manifest", "export it again")
        self._classes = classes

    def probabilities(self, features_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:  # noqa: N803  (shapes)
        """One row of class probabilities per row of features.

        Raises:
            CloisterError: the runtime failed, or the answer is not a finite number per row and class.
        """
        try:
            (answer,) = self._session.run([OUTPUT_NAME], {INPUT_NAME: features_ND})
        except Exception:  # noqa: BLE001  (as above; the text may quote values)
            raise CloisterError("the model failed on this request") from None
        probabilities_NC = np.asarray(answer, dtype=np.float64)  # noqa: N806  (shapes)
        if probabilities_NC.shape != (len(features_ND), self._classes) or not np.isfinite(probabilities_NC).all():
            raise CloisterError("the model gave no usable answer to this request")
        return probabilities_NC
