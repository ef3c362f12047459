"""`cloister serve | infer`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from cloister.cli import output
from cloister.cli.context import NAME, Context, authority_address, common, require_free_port
from cloister.errors import CloisterError, InputError, NotFoundError
from cloister.stores.home import Home

DEPLOY_TIMEOUT_S = 120.0
DEFAULT_PORT = 8471


@click.group()
def serve() -> None:
    """Deploy, list and stop endpoints."""


def endpoint_ca(home: Home) -> Path:
    """The CA that endpoints' certificates are checked against."""
    return home.client / "endpoint-ca.pem"


class Quota(click.ParamType[tuple[int, int]]):
    """`ROWS/SECONDSs`, such as 600/60s."""

    name = "quota"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9][0-9]{0,7})/([1-9][0-9]{0,4})s", str(value))
        if not match:
            self.fail("write rows per seconds, such as 600/60s", param, ctx)
        return int(match[1]), int(match[2])


@serve.command()
@click.argument("model", type=NAME)
@click.option("--port", type=click.IntRange(1024, 65535), default=DEFAULT_PORT, show_default=True)
@click.option("--replicas", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--quota", type=Quota(), default="600/60s", show_default=True, help="Rows for each caller per window.")
@common
def deploy(context: Context, model: str, port: int, replicas: int, quota: tuple[int, int]) -> None:
    """Serve the production version of MODEL over HTTPS on loopback."""
    from cloister.process import Daemon
    from cloister.serving.endpoint import write_endpoint
    from cloister.signing import certificates, keys

    require_free_port("127.0.0.1", port)
    client = context.client()
    key, tls_key = keys.generate_ed25519(), certificates.new_private_key()
    body = {
        "model": model,
        "public_key": keys.public_to_pem(key.public_key()).decode(),
        "csr": certificates.signing_request(tls_key, "127.0.0.1").decode(),
        "quota_requests": quota[0],
        "quota_window_s": quota[1],
    }
    shown = client.post("/v1/endpoints", body)
    url, ca = authority_address(context.home)
    directory = context.home.endpoints / shown["endpoint"]
    write_endpoint(
        directory,
        endpoint=shown["endpoint"],
        model=model,
        authority_url=url,
        authority_ca=ca.read_bytes(),
        node=str(context.home.node),
        port=port,
        replicas=replicas,
        quota_block=max(1, min(1000, quota[0] // (4 * replicas))),
        info=context.pinned(),
        endpoint_key=keys.private_to_pem(key),
        tls_certificate=shown["certificate"].encode(),
        tls_key=tls_key,
    )
    daemon = Daemon(directory / "serving")
    daemon.start("cloister.serving.supervisor", [str(directory)])
    try:
        with output.progress(f"starting {replicas} replica(s) of {shown['model']}"):
            daemon.wait_ready(DEPLOY_TIMEOUT_S, what="the endpoint")
    except CloisterError:
        client.post(f"/v1/endpoints/{shown['endpoint']}/stop")
        daemon.stop()
        raise
    result = {"endpoint": shown["endpoint"], "model": shown["model"], "url": f"https://127.0.0.1:{port}",
              "ca": str(endpoint_ca(context.home))}  # fmt: skip
    if context.json:
        output.value(result)
        return
    output.say(f"{shown['model']} answers at {result['url']}/v2/models/{model}/infer")
    output.say(
        "Each replica verified signature, provenance and approval itself; the model is in clear only in its memory."
    )
    output.say(f"Next: cloister infer {model} ROWS.csv --as CONSUMER")


@serve.command()
@common
def status(context: Context) -> None:
    """List endpoints and whether they run on this machine."""
    from cloister.process import Daemon

    rows = context.client().get("/v1/endpoints")
    for row in rows:
        alive = Daemon(context.home.endpoints / row["endpoint"] / "serving").process() is not None
        row["here"] = "running" if alive else "not running"
    if context.json:
        output.value(rows)
    else:
        cells = [(r["endpoint"], r["model"], r["state"], r["quota"], r["here"]) for r in rows]
        output.table(("endpoint", "model", "state", "quota", "here"), cells, empty="No endpoint yet.")


@serve.command()
@click.argument("endpoint", type=NAME)
@common
def stop(context: Context, endpoint: str) -> None:
    """Stop an endpoint: its replicas here, and its right to leases."""
    from cloister.process import Daemon

    context.client().post(f"/v1/endpoints/{endpoint}/stop")
    here = Daemon(context.home.endpoints / endpoint / "serving").stop()
    if context.json:
        output.value({"endpoint": endpoint, "stopped_here": here})
    else:
        output.say(f"{endpoint} is stopped." if here else f"{endpoint} is stopped; it did not run on this machine.")


@click.command()
@click.argument("model", type=NAME)
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("--url", default=f"https://127.0.0.1:{DEFAULT_PORT}", show_default=True)
@click.option("--token-file", type=click.Path(path_type=Path), help="An access token, instead of your key.")
@common
def infer(context: Context, model: str, rows: Path, url: str, token_file: Path | None) -> None:
    """Ask MODEL about ROWS: a CSV with a heading, or JSON of columns."""
    from cloister.client.inference import InferenceClient
    from cloister.client.seal import read_file
    from cloister.signing.tokens import INFERENCE_AUDIENCE

    ca = endpoint_ca(context.home)
    if token_file:
        token = read_file(token_file, "token file").decode(errors="replace").strip()
    else:
        token = context.client().token(INFERENCE_AUDIENCE)
    with InferenceClient(url, token, ca) as client:
        inputs = {tensor["name"]: tensor["datatype"] for tensor in client.metadata(model)["inputs"]}
        columns = _columns(read_file(rows, "file of rows"), rows.suffix, inputs)
        answers = client.infer(model, columns)
    if context.json:
        output.value([{"label": label, "probability": probability} for label, probability in answers])
    else:
        output.table(
            ("row", "label", "probability"), [(n, *answer) for n, answer in enumerate(answers)], empty="No row."
        )


def _columns(content: bytes, suffix: str, inputs: dict[str, str]) -> dict[str, list[object]]:
    """The model's columns out of a file that may have more. Values never show up in an error."""
    import csv
    import io
    import json

    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("the file of rows is not UTF-8 text", "save it as UTF-8 CSV or JSON") from None
    if suffix == ".json":
        try:
            columns = json.loads(text)
        except ValueError:
            raise InputError("the file of rows is not JSON", 'write {"column": [value, …], …}') from None
        if not isinstance(columns, dict) or not all(isinstance(values, list) for values in columns.values()):
            raise InputError("the file of rows is not a map of columns", 'write {"column": [value, …], …}')
        return columns
    try:
        table = list(csv.DictReader(io.StringIO(text), skipinitialspace=True))
    except csv.Error:
        raise InputError("the file of rows is not CSV", "give every row one line with a cell for each column") from None
    if not table:
        raise InputError("the file of rows has no row", "give a heading and at least one row")
    missing = [name for name in inputs if name not in table[0]]
    if missing:
        raise NotFoundError(f"the file of rows has no column {missing[0]}", "columns: " + ", ".join(inputs))
    return {name: [_cell(row[name], kind, name, n) for n, row in enumerate(table)] for name, kind in inputs.items()}


def _cell(text: str | None, kind: str, column: str, row: int) -> object:
    if text is None:
        raise InputError(f"row {row} ends before column {column}", "give every row every column")
    if kind == "BYTES":
        return text.strip()
    try:
        return int(text) if kind.startswith("INT") else float(text)
    except ValueError:
        raise InputError(f"row {row}, column {column} is not a number", "correct that cell") from None
