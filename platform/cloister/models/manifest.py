"""What a model is: the public facts that travel with its weights and are signed together with them.

A model is two files, `model.onnx` and `manifest.json`. The manifest says what goes in (the columns, through the
same encoder that training used), what comes out, and which run made it. It holds nothing about single rows.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cloister.canonical import canonical_json
from cloister.errors import InputError

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"


class ModelManifest(BaseModel):
    """`features` are dataset-schema columns as plain maps: `cloister.datasets.encoding` turns them into inputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["cloister.dev/model/v1"] = "cloister.dev/model/v1"
    name: str
    run: str
    dataset: str
    label: str
    labels: tuple[str, ...]
    features: tuple[dict[str, object], ...]
    architecture: dict[str, object]

    def to_bytes(self) -> bytes:
        """The bytes of `manifest.json`: canonical, so that they can be hashed and signed."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes) -> ModelManifest:
        """Read `manifest.json`.

        Raises:
            InputError: not a manifest of this format.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise InputError("this is not a Cloister model manifest", "export the model again") from error
