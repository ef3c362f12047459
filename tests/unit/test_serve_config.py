"""`serve/config.yaml`: Serve takes it, and it opens nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeDeploySchema

SERVE = Path(__file__).parents[2] / "serve"


@pytest.fixture(scope="module")
def schema() -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load((SERVE / "config.yaml").read_text()))


def test_file_says_nothing_that_serve_ignores(schema: ServeDeploySchema) -> None:
    """Serve skips keys that it does not know, so a mistyped one would switch a protection off in silence."""
    raw = yaml.safe_load((SERVE / "config.yaml").read_text())
    assert raw.keys() <= ServeDeploySchema.model_fields.keys()
    (application,) = raw["applications"]
    assert application.keys() <= type(schema.applications[0]).model_fields.keys()


def test_serve_opens_no_proxy_of_its_own(schema: ServeDeploySchema) -> None:
    assert schema.proxy_location == ProxyLocation.Disabled
    (application,) = schema.applications
    assert application.route_prefix is None


def test_import_path_names_a_builder_that_takes_the_arguments(schema: ServeDeploySchema) -> None:
    (application,) = schema.applications
    module, _, function = application.import_path.partition(":")
    tree = ast.parse((SERVE / f"{module}.py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    (arguments,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Arguments"]
    fields = {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)
              and isinstance(node.target, ast.Name)}  # fmt: skip
    assert application.args.keys() == fields


def test_no_secret_is_stored_by_serve(schema: ServeDeploySchema) -> None:
    """Serve keeps the configuration in the GCS and shows it: a directory's name is all that it may know."""
    (application,) = schema.applications
    assert list(application.args) == ["directory"]
    assert not application.runtime_env
