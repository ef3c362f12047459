"""The training spec: what an engineer asks for, before anybody has approved it.

Guarantees: a spec is complete, within ranges and frozen. It names
data sets and columns, never values.

Not promised: that it is permitted or affordable. The authority decides that.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from cloister.errors import InputError
from cloister.privacy.evaluation import DEFAULT_EPSILON
from cloister.validation import first_problem

MAX_EPSILON = 20.0  # beyond, it promises nothing
MIN_DELTA = 1e-10
"""Below, what accountants round is no longer far less than delta: at 1e-12 both certified too little."""
_DATASET = r"^[a-z][a-z0-9-]{0,62}@[1-9][0-9]{0,8}$"
_Column = Annotated[StrictStr, Field(min_length=1, max_length=128)]
_Term = Annotated[StrictStr, Field(min_length=1, max_length=300)]
_Width = Annotated[int, Field(ge=1, le=8192)]
_Side = Annotated[int, Field(ge=11, le=512)]  # pixels; see `cloister.training.scattering`
Activation = Literal["tanh", "relu", "silu"]
_HINT = "see jobs/examples/adult/train.yaml for a whole one"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MlpSpec(_Part):
    """Layers over all inputs. See `cloister.training.architectures` for what each architecture builds."""

    architecture: Literal["mlp"]
    hidden: tuple[_Width, ...] = Field(min_length=1, max_length=16)
    activation: Activation = "tanh"


class ScatteringSpec(_Part):
    """Layers over fixed features of pictures; without `hidden`, a linear classifier."""

    architecture: Literal["scattering"]
    image: tuple[_Side, _Side]
    hidden: tuple[_Width, ...] = Field(default=(), max_length=16)
    activation: Activation = "tanh"


ModelSpec = Annotated[MlpSpec | ScatteringSpec, Field(discriminator="architecture")]
_ARCHITECTURES = frozenset({"mlp", "scattering"})


class PrivacySpec(_Part):
    """The target. `make_plan` finds the noise for it."""

    epsilon: Annotated[float, Field(gt=0.0, le=MAX_EPSILON)]
    delta: Annotated[float, Field(ge=MIN_DELTA, lt=1.0)]
    max_grad_norm: Annotated[float, Field(gt=1e-6, le=1e6)] = 1.0
    engine: Literal["bookkeeping", "opacus"] = "bookkeeping"
    evaluation_epsilon: Annotated[float, Field(ge=0.001, le=MAX_EPSILON)] | None = None
    """Of the evaluation on rows that are held out; `evaluation.DEFAULT_EPSILON`, or a smaller epsilon, by default."""
    rows_per_unit: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """How many rows of each unit are used at most, in training and in evaluation; as many as the schema allows, by
    default. The noise falls about in proportion."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.evaluation_epsilon is not None and self.evaluation_epsilon > self.epsilon:
            raise ValueError("evaluation_epsilon is not more than epsilon")
        return self

    @property
    def evaluation(self) -> float:
        return self.evaluation_epsilon or min(DEFAULT_EPSILON, self.epsilon)


class OptimizationSpec(_Part):
    epochs: Annotated[float, Field(gt=0.0, le=1e6)]
    expected_batch_size: Annotated[int, Field(ge=1, le=1_000_000_000)]
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0.0, le=1e3)]
    retries: Annotated[int, Field(ge=0, le=20)] = 3
    """How many attempts may follow the first when workers die: each may run a block of steps again."""


class ResourcesSpec(_Part):
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    min_workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """With how many an attempt may go on when machines are lost; all of them by default."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=16)] = 0
    region: _Term

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.least > self.workers:
            raise ValueError("min_workers is not more than workers")
        return self

    @property
    def least(self) -> int:
        """The fewest workers that an attempt may have."""
        return self.min_workers or self.workers


class TrainingSpec(_Part):
    """One training run. Without `features`, all columns that are neither restricted nor have a role are inputs."""

    name: Annotated[StrictStr, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")] | None = None
    dataset: Annotated[StrictStr, Field(pattern=_DATASET)]
    label: _Column
    features: Annotated[tuple[_Column, ...], Field(max_length=10_000)] | None = None
    model: ModelSpec
    privacy: PrivacySpec
    training: OptimizationSpec
    resources: ResourcesSpec
    purpose: _Term

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.features is not None:
            if not self.features or len(set(self.features)) != len(self.features):
                raise ValueError("features are distinct and there is at least one")
            if self.label in self.features:
                raise ValueError("the label is not a feature")
        return self

    @classmethod
    def from_yaml_text(cls, text: str) -> Self:
        """Read `train.yaml`.

        Raises:
            InputError: not YAML, or not a complete spec.
        """
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = "" if mark is None else f" at line {mark.line + 1}"
            raise InputError(f"the spec is not YAML{where}", "check the indentation and the quotes") from None
        return cls.parse(value)

    @classmethod
    def parse(cls, value: object) -> Self:
        """Validate a plain map.

        Raises:
            InputError: not a complete spec; the message names the field, never its value.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            # Below `model`, pydantic also names the architecture, which is no field.
            found = first_problem(error, silent=_ARCHITECTURES)
            place, reason = found.place, found.reason
            if found.kind.startswith("union_tag"):
                place, reason = f"{place}.architecture", "it is one of " + ", ".join(sorted(_ARCHITECTURES))
        raise InputError(f"the training spec is not valid: {place}: {reason}", _HINT)

    @property
    def model_name(self) -> str:
        """The name under which the model is registered: `name`, or the dataset's."""
        return self.name or self.dataset.partition("@")[0]

    def to_dict(self) -> dict[str, Any]:
        """The plain map that is stored, hashed and approved."""
        return self.model_dump(mode="json", exclude_none=True)
