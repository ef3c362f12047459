"""What all benchmarks share: their options, their rows, and how these are shown."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

Row = dict[str, object]


def row(name: str, value: float, unit: str, goal: str = "", holds: bool | None = None) -> Row:
    """One figure, to as many places as a reader can use; `goal` in words, and whether it `holds`."""
    return {
        "name": name,
        "value": round(value, 3 if abs(value) < 100 else None),
        "unit": unit,
        "goal": goal,
        "holds": holds,
    }


def options(description: str | None, quick: str, devices: tuple[str, ...] = ("cpu",)) -> argparse.ArgumentParser:
    """A parser of what every benchmark takes; `quick` says what `--quick` does."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--device", choices=devices, default=devices[0], help="where to run it")
    return parser


def report(question: str, arguments: argparse.Namespace, measure: Callable[[], list[Row]]) -> None:
    """Measure, and print a table, or with `--json` the object that a program reads."""
    results = measure()
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    if arguments.json:
        print(json.dumps({"question": question, "date": today, "hardware": hardware(), "results": results}))
        return
    print(f"# {question}, {today}\n\nHardware: {hardware()}\n")
    print("| | value | unit | goal | holds |\n|---|---|---|---|---|")
    for result in results:
        holds = {True: "yes", False: "NO", None: ""}[result["holds"]]  # type: ignore[index]
        print(f"| {result['name']} | {result['value']:,} | {result['unit']} | {result['goal']} | {holds} |")


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} × {models[0] if models else platform.processor() or platform.machine()}, no GPU used"
