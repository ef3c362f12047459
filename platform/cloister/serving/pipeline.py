"""One request, from token to answer. Plain Python: no Ray, no server; clock, network and policy are passed in.

Guarantees: an answer leaves only after every step below, in this order, and each step fails closed. What a caller
learns about the model is a label and a rounded probability per row. No error contains a value of the request.

    1. Authenticate: a good access token for this audience (`signing.tokens`), not revoked since (`watch`).
    2. Authorise: the policy permits this subject to ask this model.
    3. Refuse early who has no quota left, before the body is read.
    4. Read the table strictly, then check it against the public bounds and values.
    5. Pay: one unit a row, from a block that the authority has already debited.
    6. Score.
    7. Filter: label and rounded probability of that label, nothing else.

Not guaranteed: that rounding hides the model. It costs an extraction attack about two points of fidelity; identity
and budgets are the defence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from cloister.datasets.schema import Column
from cloister.errors import AuthenticationError, NotFoundError
from cloister.serving import tables
from cloister.serving.quota import Quota
from cloister.serving.release import VerifiedModel
from cloister.signing.tokens import Claims, TokenVerifier

INFER_ACTION = "model:infer"

DATATYPES: Mapping[str, frozenset[str]] = {
    "category": frozenset({"BYTES"}),
    "integer": frozenset({"INT64", "INT32"}),
    "number": frozenset({"FP64", "FP32", "INT64", "INT32"}),  # a whole number is a number
    "tensor": frozenset({"FP64", "FP32", "INT64", "INT32", "INT16", "INT8", "UINT8"}),
}
_PREFERRED = {"category": "BYTES", "integer": "INT64", "number": "FP64"}
_PREFERRED_OF_TENSORS = {"uint8": "UINT8", "int8": "INT8", "int16": "INT16", "int32": "INT32"}  # others: FP32


class Authorizer(Protocol):
    """The policy. Called for every request, in the event loop: it must not wait for the network."""

    def __call__(self, subject: str, kind: str, roles: frozenset[str], action: str) -> None:
        """Return if `subject`, a person or a service, may do `action` to the model that is served.

        Raises:
            PermissionDeniedError: it may not.
        """
        ...


class Liveness(Protocol):
    """Whether a token that was good when it was given still is. `cloister.serving.watch.Watch` fits."""

    def require_live(self, claims: Claims) -> None:
        """Return if it is.

        Raises:
            AuthenticationError, UnavailableError
        """
        ...


class Pipeline:
    """The decision path of one replica, which serves one model."""

    def __init__(
        self,
        model: VerifiedModel,
        *,
        verifier: TokenVerifier,
        liveness: Liveness,
        authorize: Authorizer,
        quota: Quota,
        decimals: int,
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._verifier = verifier
        self._liveness = liveness
        self._authorize = authorize
        self._quota = quota
        self._decimals = decimals
        self._clock = clock
        self._datatypes = {column.name: DATATYPES[column.type] for column in model.encoder.columns}
        self._shapes = {column.name: column.shape for column in model.encoder.columns if column.shape is not None}

    @property
    def version(self) -> str:
        """The first 16 hex digits of the signed root digest: which release answers."""
        return self._model.root_digest[:16]

    def identify(self, authorization: str | None, model: str) -> Claims:
        """Steps 1 and 2, and that `model` is the one served here; strangers do not learn which models exist.

        Raises:
            AuthenticationError, TokenExpiredError, NotFoundError, PermissionDeniedError
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise AuthenticationError("an access token is needed", "send `Authorization: Bearer …`; cloister login")
        claims = self._verifier.verify(token, self._clock())  # 1
        self._liveness.require_live(claims)
        if model != self._model.manifest.name:
            raise NotFoundError("this endpoint does not serve that model", "cloister serve status")
        self._authorize(claims.subject, claims.kind, claims.roles, INFER_ACTION)  # 2
        return claims

    def admit(self, authorization: str | None, model: str) -> Claims:
        """Steps 1 to 3: everything that can be refused without reading the body.

        Raises:
            AuthenticationError, TokenExpiredError, NotFoundError, PermissionDeniedError, QuotaExceededError
        """
        claims = self.identify(authorization, model)
        self._quota.check(claims.subject)  # 3
        return claims

    async def infer(self, claims: Claims, body: bytes) -> dict[str, Any]:
        """Steps 4 to 7 for whoever `admit` returned.

        Raises:
            InputError, QuotaExceededError, UnavailableError
        """
        encoder = self._model.encoder
        request = tables.read_request(body, self._datatypes, self._shapes)  # 4
        features_ND = encoder.encode(encoder.parse_request(request.columns))  # noqa: N806  (shapes)
        await self._quota.take(claims.subject, request.rows)  # 5
        labels, probabilities = self._filtered(self._model.scorer.probabilities(features_ND))  # 6, 7
        return tables.write_response(
            request,
            model=self._model.manifest.name,
            version=self.version,
            labels=labels,
            probabilities=probabilities,
        )

    def metadata(self) -> dict[str, Any]:
        """The protocol's model metadata: what goes in, what comes out."""
        columns = self._model.encoder.columns
        return {
            "name": self._model.manifest.name,
            "versions": [self.version],
            "platform": "onnx_onnxv1",
            "inputs": [_input(column) for column in columns],
            "outputs": [
                {"name": "label", "datatype": tables.OUTPUTS["label"], "shape": [-1]},
                {"name": "probability", "datatype": tables.OUTPUTS["probability"], "shape": [-1, 1]},
            ],
        }

    def _filtered(self, probabilities_NC: npt.NDArray[np.float64]) -> tuple[list[str], list[float]]:  # noqa: N803
        best_N = probabilities_NC.argmax(axis=1)  # noqa: N806  (shapes)
        rounded = [round(float(value), self._decimals) for value in probabilities_NC.max(axis=1)]
        return [self._model.manifest.labels[index] for index in best_N], rounded

    def __reduce__(self) -> NoReturn:
        raise TypeError("a pipeline holds a decrypted model and never leaves its process")


def _input(column: Column) -> dict[str, Any]:
    """One input in the protocol's model metadata."""
    if column.shape is not None:
        datatype = _PREFERRED_OF_TENSORS.get(str(column.dtype), "FP32")
    else:
        datatype = _PREFERRED[column.type]
    return {"name": column.name, "datatype": datatype, "shape": [-1, *(column.shape or ())]}
