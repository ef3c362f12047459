"""Tables in the JSON of the Open Inference Protocol v2: one tensor per feature column, strict on the way in.

Guarantees: `read_request` returns exactly the columns that the model takes, all with the same 1 to `MAX_ROWS` rows,
every value of the JSON type that its datatype promises, every number finite. A refusal names the column, never a
value. Not checked here: bounds and categories; the feature encoder does that. A column whose rows are tensors
themselves may be sent as [N, its shape…] or [N, its number of elements], flat or nested.

Spec: https://github.com/open-inference/open-inference-protocol, `specification/protocol/inference_rest.md`. Of the
extensions none is implemented; a request with binary tensors is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from cloister.errors import InputError

MAX_BODY_BYTES = 1 << 20
MAX_ROWS = 1024
MAX_TEXT_CHARS = 1024
OUTPUTS = {"label": "BYTES", "probability": "FP64"}

_INTEGERS = {
    "UINT8": (0, 2**8), "INT8": (-(2**7), 2**7), "INT16": (-(2**15), 2**15), "INT32": (-(2**31), 2**31),
    "INT64": (-(2**63), 2**63),
}  # fmt: skip
_FLOATS = frozenset({"FP32", "FP64"})

Values = Sequence[object] | npt.NDArray[np.generic]
"""One column: a list [N], or an array [N, elements] where its rows are tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRequest:
    """A request whose form is right. `columns` are in the model's order."""

    id: str | None
    rows: int
    columns: Mapping[str, Values]
    outputs: tuple[str, ...]


def read_request(
    body: bytes, datatypes: Mapping[str, frozenset[str]], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> TableRequest:
    """Read a body. `datatypes` says for every column which datatypes it may be sent as, `shapes` which are tensors.

    Raises:
        InputError: the body breaks a rule; the message names the column where there is one.
    """
    try:
        request = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError):
        raise InputError("the body is not JSON", "send an Open Inference Protocol v2 request") from None
    _fields(request, "the request", required={"inputs"}, optional={"id", "outputs", "parameters"})
    request_id = request.get("id")
    if request_id is not None and not (isinstance(request_id, str) and 0 < len(request_id) <= 128):
        raise InputError("`id` must be a string of 1 to 128 characters")
    _no_parameters(request, "the request", allowed={"binary_data_output"})
    if not isinstance(request["inputs"], list):
        raise InputError("`inputs` must be a list of tensors, one per column")
    columns: dict[str, Values] = {}
    for tensor in request["inputs"]:
        name, values = _column(tensor, datatypes, shapes or {})
        if name in columns:
            raise InputError(f"column `{name}` is sent twice")
        columns[name] = values
    missing = [name for name in datatypes if name not in columns]
    if missing:
        raise InputError(f"column `{missing[0]}` is missing", "GET the model's metadata to see its inputs")
    sizes = {name: len(values) for name, values in columns.items()}
    rows = next(iter(sizes.values()), 0)
    for name, size in sizes.items():
        if size != rows:
            raise InputError(f"column `{name}` has {size} rows, others have {rows}")
    if not 1 <= rows <= MAX_ROWS:
        raise InputError(f"a request holds 1 to {MAX_ROWS} rows, not {rows}", "send several requests")
    ordered = {name: columns[name] for name in datatypes}
    return TableRequest(id=request_id, rows=rows, columns=ordered, outputs=_outputs(request.get("outputs")))


def write_response(
    request: TableRequest, *, model: str, version: str, labels: Sequence[str], probabilities: Sequence[float]
) -> dict[str, Any]:
    """The response to `request`: the label of each row and that label's probability, as far as asked for."""
    tensors: dict[str, dict[str, Any]] = {
        "label": {"shape": [request.rows], "data": list(labels)},
        "probability": {"shape": [request.rows, 1], "data": list(probabilities)},
    }
    response: dict[str, Any] = {
        "model_name": model,
        "model_version": version,
        "outputs": [{"name": name, "datatype": OUTPUTS[name], **tensors[name]} for name in request.outputs],
    }
    if request.id is not None:
        response["id"] = request.id
    return response


def _column(
    tensor: Any, datatypes: Mapping[str, frozenset[str]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, Values]:
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
        raise InputError("every input must be a tensor with a `name`")
    name = tensor["name"]
    if name not in datatypes:  # the name is the caller's text and may be a value by mistake: it is not repeated
        raise InputError("an input is not a column of this model", "GET the model's metadata to see its inputs")
    what = f"column `{name}`"
    _no_parameters(tensor, what, allowed=set())
    _fields(tensor, what, required={"name", "shape", "datatype", "data"}, optional={"parameters"})
    datatype, shape, data = tensor["datatype"], tensor["shape"], tensor["data"]
    if not isinstance(datatype, str) or datatype not in datatypes[name]:
        raise InputError(f"{what} must be sent as {' or '.join(sorted(datatypes[name]))}")
    if not isinstance(data, list):
        raise InputError(f"{what}: `data` must be a list")
    if name in shapes:
        return name, _tensors(what, shape, datatype, data, shapes[name])
    if not isinstance(shape, list) or not 1 <= len(shape) <= 2 or any(type(size) is not int for size in shape):
        raise InputError(f"{what}: `shape` must be [N] or [N, 1]")
    if shape[1:] not in ([], [1]):
        raise InputError(f"{what}: `shape` must be [N] or [N, 1]")
    if len(shape) == 2 and data and all(type(row) is list and len(row) == 1 for row in data):
        data = [row[0] for row in data]  # the protocol allows nested as well as flat data
    if len(data) != shape[0]:
        raise InputError(f"{what}: `shape` says {shape[0]} rows, `data` holds {len(data)}")
    if not all(_fits(value, datatype) for value in data):
        raise InputError(f"{what} holds a value that is not {datatype}")
    return name, data


def _tensors(what: str, shape: Any, datatype: str, data: list[Any], row: tuple[int, ...]) -> Values:
    """The rows of a tensor column: [N, elements], float64 for floating-point datatypes, else int64."""
    elements = math.prod(row)
    if not isinstance(shape, list) or any(type(size) is not int for size in shape) or shape[1:] not in (
        [elements], list(row)
    ):  # fmt: skip
        raise InputError(f"{what}: `shape` must be [N, {', '.join(map(str, row))}] or [N, {elements}]")
    for index, size in enumerate(shape):
        if index and data and type(data[0]) is not list:
            break  # the protocol allows nested as well as flat data
        if index:
            if any(type(inner) is not list or len(inner) != size for inner in data):
                raise InputError(f"{what}: `data` is not nested as `shape` says")
            data = [value for inner in data for value in inner]
    if len(data) != shape[0] * elements:
        raise InputError(f"{what}: `shape` says {shape[0] * elements} values, `data` holds {len(data)}")
    kinds = set(map(type, data))  # a loop over values in Python would take most of the time of a request
    if kinds <= {int, float} and (float not in kinds or datatype in _FLOATS):
        try:
            values = np.array(data, dtype=np.float64 if datatype in _FLOATS else np.int64).reshape(shape[0], elements)
        except OverflowError:
            values = np.array([[math.inf]])
        low, high = _INTEGERS.get(datatype, (-math.inf, math.inf))
        if values.size == 0 or (np.isfinite(values).all() and low <= values.min() and values.max() < high):
            return values
    raise InputError(f"{what} holds a value that is not {datatype}")


def _fits(value: object, datatype: str) -> bool:
    if datatype == "BYTES":
        return type(value) is str and len(value) <= MAX_TEXT_CHARS
    if datatype in _FLOATS:
        return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) <= 2**53)
    low, high = _INTEGERS[datatype]
    return type(value) is int and low <= value < high


def _outputs(asked: Any) -> tuple[str, ...]:
    if asked is None:
        return tuple(OUTPUTS)
    if not isinstance(asked, list) or not asked:
        raise InputError("`outputs` must be a list of outputs")
    for output in asked:
        _fields(output, "an output", required={"name"}, optional={"parameters"})
        _no_parameters(output, "an output", allowed={"binary_data"})
        if not isinstance(output["name"], str) or output["name"] not in OUTPUTS:
            raise InputError(f"an output is not one of {', '.join(OUTPUTS)}")
    names = [output["name"] for output in asked]
    if len(set(names)) != len(names):
        raise InputError("an output is asked for twice")
    return tuple(names)


def _fields(value: Any, what: str, *, required: set[str], optional: set[str]) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a JSON object")
    missing = sorted(required - value.keys())
    if missing:
        raise InputError(f"{what} has no `{missing[0]}`")
    if value.keys() - required - optional:
        raise InputError(f"{what} has a field that the protocol does not know")


def _no_parameters(value: dict[str, Any], what: str, *, allowed: set[str]) -> None:
    """Triton clients always say which encoding of the *outputs* they prefer; JSON is a permitted answer."""
    parameters = value.get("parameters", {})
    if not isinstance(parameters, dict) or parameters.keys() - allowed:
        raise InputError(f"{what} has `parameters` that are not supported", "send tensors as JSON, not as binary")


def _no_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name appears twice")
    return dict(pairs)
