"""The tree keeps its shape: who may know Ray, what an import costs, and whether a hint names a command that exists."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from cloister.cli import COMMANDS, cloister

PLATFORM = Path(__file__).parents[2] / "platform"
SOURCES = sorted((PLATFORM / "cloister").rglob("*.py"))
KNOW_RAY = {"cloister.training.worker", "cloister.training.driver", "cloister.serving.deployment"}
MAX_LINES = 500
NOT_A_COMMAND = {"cluster"}  # "cloister cluster …" is the common name in a cluster's certificate
WITHOUT_RAY = """
import importlib.util, pkgutil, sys
sys.modules["ray"] = None  # an import of it, or of anything in it, raises ImportError
import cloister.privacy
names = [f"cloister.privacy.{each.name}" for each in pkgutil.iter_modules(cloister.privacy.__path__)]
assert names
if importlib.util.find_spec("triton") is None:
    names.remove("cloister.privacy.noise_cuda")  # the one module that needs it; only a GPU asks for it
for name in ["cloister", "cloister.cli", "cloister.training.loop", *names]:
    importlib.import_module(name)
"""
HELP = """
import sys
from cloister.cli import main
sys.argv = ["cloister", "--help"]
main()
heavy = {name.partition(".")[0] for name in sys.modules} & {"torch", "ray", "pyarrow"}
print("heavy:", *sorted(heavy))
"""


def module(source: Path) -> str:
    return ".".join(source.relative_to(PLATFORM).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def tree(source: Path) -> ast.Module:
    return ast.parse(source.read_text())


def imported(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=str(name), level=0):
            yield name
        case ast.Call(func=ast.Name(id="__import__") | ast.Attribute(attr="import_module"), args=[first, *_]):
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def strings(source: Path) -> Iterator[str]:
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def complaint(name: str, sub: str) -> str | None:
    """Why `cloister NAME SUB` is no command, or None. A second word after a plain command is its argument."""
    if name in NOT_A_COMMAND:
        return None
    if name not in COMMANDS:
        return f"cloister {name}"
    # Looked up only where a second word follows: that imports the command's module.
    command = cloister.get_command(click.Context(cloister), name) if sub else None
    if isinstance(command, click.Group) and sub not in command.commands:
        return f"cloister {name} {sub}"
    return None


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(PLATFORM)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_source_root_does_not_shadow_the_standard_library() -> None:
    assert not (PLATFORM / "__init__.py").exists()


def test_ray_is_known_to_the_named_modules_only() -> None:
    found = {
        module(source)
        for source in SOURCES
        for node in ast.walk(tree(source))
        for name in imported(node)
        if name.partition(".")[0] == "ray"
    }
    assert found == KNOW_RAY


def test_no_module_grows_beyond_reading() -> None:
    assert [module(source) for source in SOURCES if len(source.read_text().splitlines()) > MAX_LINES] == []


def test_every_module_says_what_it_is() -> None:
    assert [module(source) for source in SOURCES if not ast.get_docstring(tree(source))] == []


def test_gpu_code_and_command_line_import_without_ray() -> None:
    run(WITHOUT_RAY)


def test_help_does_not_import_what_is_heavy() -> None:
    out = run(HELP.replace("main()\n", "try:\n    main()\nexcept SystemExit as error:\n    assert not error.code\n", 1))
    assert "Commands" in out
    assert out.splitlines()[-1].strip() == "heavy:"


def test_hints_name_commands_that_exist() -> None:
    wrong = [
        f"{module(source)}: {why!r} in {text!r}"
        for source in SOURCES
        for text in strings(source)
        for name, sub in re.findall(r"\bcloister ([a-z]+)(?: ([a-z]+))?", text)
        if (why := complaint(name, sub))
    ]
    assert wrong == []


def test_every_command_in_the_help_exists() -> None:
    found = {name: cloister.get_command(click.Context(cloister), name) for name in COMMANDS}
    assert [name for name, command in found.items() if not isinstance(command, click.Command)] == []
