"""`cloister data inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from cloister.cli import output
from cloister.cli.context import Context, common
from cloister.errors import ConflictError, InputError


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--output", "draft_file", type=click.Path(path_type=Path), help="Write the draft of a schema here.")
@click.option("--rows", type=click.IntRange(1, 1_000_000), default=10_000, show_default=True, help="Rows to look at.")
@common
def inspect(context: Context, file: Path, draft_file: Path | None, rows: int) -> None:
    """Look at the first rows of FILE, here, and propose a schema. Shows names and counts, and no value."""
    from cloister.client.source import open_source
    from cloister.datasets import inspect as inspection
    from cloister.stores.files import write_atomic

    if draft_file is not None and draft_file.exists():
        raise _exists(draft_file)
    with open_source(file) as source:
        report = inspection.inspect(source.stream, rows)
    if draft_file is not None:
        try:
            write_atomic(draft_file, inspection.draft(report, file.name).encode(), replace=False)
        except FileExistsError as error:
            raise _exists(draft_file) from error
        except OSError as error:
            raise InputError(f"{draft_file} cannot be written: {error.strerror}", "check the path") from error
    if context.json:
        output.value(report.to_dict() | {"draft": None if draft_file is None else str(draft_file)})
        return
    cells = [
        (
            each.name if report.headed else f"column {each.position}",
            each.type,
            each.sensitivity,
            each.role,
            [f"{name} ({count:,})" for name, count in each.findings.items()] or None,
            each.state or None,
            each.note or None,
        )
        for each in report.columns
    ]
    columns = ("column", "type", "class", "role", "findings (cells)", "you state", "note")
    output.table(columns, cells, empty="The file has no column.")
    looked = f"all {report.rows:,}" if report.whole else f"the first {report.rows:,}"
    output.say(f"Looked at {looked} rows of {file.name} ({report.kind}), on this machine. Nothing left it.")
    if not report.headed:
        output.say("The first line looks like data, not like names: no name is shown. Give the file a header.")
    output.say("This is a proposal. Recognisers miss personal data, and count what only looks like it; rows that were")
    output.say("not looked at may differ. The classes are yours to judge, bounds and values yours to state.")
    if draft_file is None:
        output.say(f"Next: cloister data inspect {file} --output schema.yaml")
    else:
        output.say(f"Wrote {draft_file}. Complete its empty fields, then: cloister data seal {file} "
                   f"--schema {draft_file}")  # fmt: skip


def _exists(path: Path) -> ConflictError:
    return ConflictError(f"{path} is there already", "name another file: a draft never overwrites one")
