"""Asking an endpoint, for programs: columns in, a label and its probability per row out.

Guarantees: the server's certificate is checked against `ca_path` and nothing else, over TLS 1.3; redirects are not
followed and no proxy from the environment is used, so the token goes to the named server only; a refusal is raised as
the very error that the server described.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import numpy.typing as npt

from cloister.errors import CloisterError, InputError, QuotaExceededError, UnavailableError, from_dict

TIMEOUT_S = 30.0

Values = Sequence[object] | npt.NDArray[np.generic]
"""A column: strings or numbers [N], or tensors [N, …] as an array or as nested lists."""


def infer(url: str, model: str, columns: Mapping[str, Values], token: str, ca_path: Path) -> list[tuple[str, float]]:
    """One request. For many, keep an `InferenceClient`: a TLS handshake costs more than an answer.

    Raises:
        CloisterError: as `InferenceClient.infer`.
    """
    with InferenceClient(url, token, ca_path) as client:
        return client.infer(model, columns)


class InferenceClient:
    """A kept-alive connection to one endpoint under one access token."""

    def __init__(self, url: str, token: str, ca_path: Path) -> None:
        """Prepare; nothing is sent yet.

        Raises:
            InputError: the URL is not HTTPS, or `ca_path` is not a certificate.
        """
        if not url.startswith("https://"):
            raise InputError("an endpoint speaks HTTPS only", "write https:// in the URL")
        try:
            context = ssl.create_default_context(cafile=ca_path)
        except (OSError, ssl.SSLError) as error:
            raise InputError("the certificate authority's file is not usable", "name a PEM file") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._client = httpx.Client(
            base_url=url,
            verify=context,
            timeout=TIMEOUT_S,
            trust_env=False,
            headers={"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"},
        )

    def __enter__(self) -> InferenceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def infer(self, model: str, columns: Mapping[str, Values]) -> list[tuple[str, float]]:
        """The label of each row and that label's probability.

        Raises:
            InputError: the columns cannot be sent: no finite numbers or strings, or mixed.
            UnavailableError: nobody answers, or not with the expected certificate.
            CloisterError: what the server refused with.
        """
        tensors = [_tensor(name, values) for name, values in columns.items()]
        answer = self._send("POST", f"/v2/models/{quote(model, safe='')}/infer", {"inputs": tensors})
        try:
            outputs = {output["name"]: output["data"] for output in answer["outputs"]}
            return list(zip(outputs["label"], outputs["probability"], strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise UnavailableError("the endpoint's answer is not one of Cloister's", "check the URL") from error

    def metadata(self, model: str) -> dict[str, Any]:
        """What the model takes and gives.

        Raises:
            UnavailableError, CloisterError: as `infer`.
        """
        return self._send("GET", f"/v2/models/{quote(model, safe='')}", None)

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body)
        except httpx.ConnectError as error:
            raise UnavailableError(
                "the endpoint does not answer, or not with a certificate that is trusted here",
                "check that it runs and which CA signed its certificate: cloister serve status",
            ) from error
        except httpx.HTTPError as error:
            raise UnavailableError("the connection to the endpoint broke", "try again") from error
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.status_code == 200 and isinstance(answer, dict):
            return answer
        raise _refusal(response, answer if isinstance(answer, dict) else {})


def _refusal(response: httpx.Response, body: dict[str, Any]) -> CloisterError:
    error = from_dict(body, response.status_code)
    if isinstance(error, QuotaExceededError):
        wait_s = response.headers.get("retry-after", "1")
        return QuotaExceededError(error.message, error.hint, int(wait_s) if wait_s.isdecimal() else 1)
    return error


def _tensor(name: str, values: Values) -> dict[str, Any]:
    if not isinstance(values, np.ndarray):
        if not len(values) or not isinstance(values[0], list | tuple | np.ndarray):
            return {"name": name, "shape": [len(values)], "datatype": _datatype(name, values), "data": list(values)}
        try:
            values = np.asarray(values)
        except ValueError:  # the text may quote values
            values = np.zeros(0, dtype=object)
    if values.ndim == 1 and values.dtype.kind != "O":
        return _tensor(name, values.tolist())
    if values.ndim == 0 or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise InputError(f"column `{name}` is not a tensor of finite numbers", "send rows of one shape")
    datatype = "FP64" if values.dtype.kind == "f" else "INT64"
    return {"name": name, "shape": list(values.shape), "datatype": datatype, "data": values.reshape(-1).tolist()}


def _datatype(name: str, values: Sequence[object]) -> str:
    kinds = {type(value) for value in values}
    if kinds == {str}:
        return "BYTES"
    if kinds == {int}:
        return "INT64"
    if kinds and kinds <= {int, float} and all(math.isfinite(value) for value in values):  # type: ignore[arg-type]  # numbers
        return "FP64"
    raise InputError(
        f"column `{name}` is neither all strings nor all finite numbers", "send one kind of value per column"
    )
