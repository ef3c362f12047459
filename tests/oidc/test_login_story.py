"""People and services of a real OpenID Connect provider at a real authority, through the command line."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cloister.client import oidc
from cloister.signing import tokens
from command_line import ROOT, CommandLine
from oidc.provider import AUDIENCE, CLIENT_ID, OTHER_AUDIENCE, Provider
from ports import free_port
from waiting import PATIENCE_S

GROUPS = {"claim": "groups", "map": {"ml-reviewers": ["reviewer"], "pipelines": ["engineer"]}}


@pytest.fixture(scope="module")
def provider(provider_modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    """One that lets people be quick."""
    with Provider(provider_modules, tmp_path_factory.mktemp("provider") / "run", interval_s=1) as running:
        yield running


@pytest.fixture(scope="module")
def line(provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """An authority that trusts the provider."""
    line = CommandLine(tmp_path_factory.mktemp("oidc") / "cloister")
    issuer = {
        "issuer": provider.issuer, "audience": AUDIENCE, "client_id": CLIENT_ID, "ca_file": str(provider.ca),
        "roles": GROUPS,
    }  # fmt: skip
    line.home.mkdir(mode=0o700)
    (line.home / "config.yaml").write_text(yaml.safe_dump({"authority": {"issuers": [issuer]}}))
    try:
        line.json("up", "--port", str(free_port()))
        yield line
    finally:
        line.run("down")


def log_in(
    line: CommandLine, provider: Provider, person: str, *, agrees: bool = True
) -> subprocess.CompletedProcess[str]:
    """`cloister login --issuer`, by device code: the person opens what the command shows."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CLOISTER_")}
    command = [
        sys.executable,
        "-m",
        "cloister.cli",
        "login",
        "--issuer",
        provider.issuer,
        "--issuer-ca",
        str(provider.ca),
    ]
    with subprocess.Popen(
        [*command, "--json"], env=environment | {"CLOISTER_HOME": str(line.home)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        shown = process.stderr.readline()
        url = re.search(r"https://\S+", shown)
        assert url, shown
        provider.person(person, agrees=agrees).visit(url[0])
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, out, shown + err)


def name_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return str(json.loads(done.stdout)["identity"])


def exchange(line: CommandLine, token: str) -> httpx.Response:
    facts = json.loads((line.home / "client" / "authority.json").read_text())
    form = {
        "grant_type": tokens.TOKEN_EXCHANGE, "subject_token": token, "subject_token_type": tokens.JWT_TYPE,
        "resource": tokens.AUTHORITY_AUDIENCE,
    }  # fmt: skip
    context = ssl.create_default_context(cafile=line.home / "client" / "ca.pem")
    return httpx.post(f"{facts['url']}/v1/token", data=form, verify=context, trust_env=False, timeout=PATIENCE_S)


def test_a_person_of_a_group_gets_its_role_and_a_session_that_renews_itself(
    line: CommandLine, provider: Provider
) -> None:
    name = name_of(log_in(line, provider, "rita"))
    assert re.fullmatch(r"u-[0-9a-f]{12}", name)
    (known,) = [row for row in line.json("identity", "list") if row["name"] == name]
    assert known["roles"] == ["reviewer"]
    session = line.home / "identities" / f"{name}.session"
    assert session.stat().st_mode & 0o077 == 0
    before = session.read_text()
    assert line.json("approvals", "list", who=name) == []
    assert session.read_text() != before, "a refresh token is used once"
    line.refused("identity", "add", "mallory", "--role", "operator", who=name)


def test_who_votes_registers_a_key_of_their_own_first(line: CommandLine, provider: Provider) -> None:
    name = name_of(log_in(line, provider, "rita"))
    line.json("identity", "key", who=name)
    key = line.home / "identities" / f"{name}.key"
    first = key.read_bytes()
    assert key.stat().st_mode & 0o077 == 0
    key.unlink()
    assert "no key" in line.refused("identity", "key", who=name), "a session alone replaces no key"
    key.write_bytes(first)
    key.chmod(0o600)
    line.json("identity", "key", who=name)  # with the old one's word for it
    assert key.read_bytes() != first
    assert not key.with_suffix(".key.new").exists()
    name_of(log_in(line, provider, "rita"))
    (line.home / "identities" / f"{name}.session").unlink()
    assert "does not know" in line.refused("approvals", "list", who=name), (
        "the key signs; the issuer says who may log in"
    )


def test_a_person_without_group_or_registration_gets_nothing(line: CommandLine, provider: Provider) -> None:
    done = log_in(line, provider, "wanda")
    assert done.returncode == 1
    assert "nobody has given you access" in json.loads(done.stdout)["error"]
    assert not list((line.home / "identities").glob("wanda*"))


def test_a_person_who_was_registered_by_subject_has_the_roles_of_their_registration(
    line: CommandLine, provider: Provider
) -> None:
    line.json("identity", "add", "carla", "--role", "auditor", "--issuer", provider.issuer, "--subject", "carla")
    assert name_of(log_in(line, provider, "carla")) == "carla"
    assert len(line.json("audit", "search", who="carla")) > 0


def test_who_does_not_agree_is_not_logged_in(line: CommandLine, provider: Provider) -> None:
    done = log_in(line, provider, "rita", agrees=False)
    assert done.returncode == 1
    assert "refused" in json.loads(done.stdout)["error"]


def test_a_stolen_refresh_token_ends_the_session_for_both(line: CommandLine, provider: Provider) -> None:
    line.json("identity", "add", "rosa", "--role", "auditor", "--issuer", provider.issuer, "--subject", "rosa")
    name_of(log_in(line, provider, "rosa"))
    session = line.home / "identities" / "rosa.session"
    stolen = session.read_text()
    line.json("identity", "list", who="rosa")  # uses it, and keeps its successor
    successor = session.read_text()
    session.write_text(stolen)
    assert "session is over" in line.refused("identity", "list", who="rosa")
    session.write_text(successor)
    assert "session is over" in line.refused("identity", "list", who="rosa")


def test_logging_out_ends_the_session_at_the_authority_too(line: CommandLine, provider: Provider) -> None:
    line.json("identity", "add", "lou", "--role", "auditor", "--issuer", provider.issuer, "--subject", "lou")
    name_of(log_in(line, provider, "lou"))
    session = line.home / "identities" / "lou.session"
    kept = session.read_text()
    line.json("logout", who="lou")
    assert not session.exists()
    session.write_text(kept)
    assert "session is over" in line.refused("identity", "list", who="lou")


def test_revoking_somebody_ends_their_session_and_a_new_login_is_refused(line: CommandLine, provider: Provider) -> None:
    line.json("identity", "add", "otis", "--role", "auditor", "--issuer", provider.issuer, "--subject", "otis")
    name_of(log_in(line, provider, "otis"))
    line.json("identity", "revoke", "otis")
    line.refused("identity", "list", who="otis")
    assert log_in(line, provider, "otis").returncode == 1


def test_a_service_of_the_provider_works_by_private_key_jwt(line: CommandLine, provider: Provider) -> None:
    private, _ = provider.services["nightly-es256"]
    given = oidc.client_credentials(
        provider.issuer, "nightly-es256", private_key_pem=private, resource=AUDIENCE, ca=provider.ca
    )
    answer = exchange(line, given.access_token)
    assert answer.status_code == 200, answer.text
    assert re.fullmatch(r"u-[0-9a-f]{12}", answer.json()["name"])


def test_a_token_for_another_audience_or_of_nobody_is_refused(line: CommandLine, provider: Provider) -> None:
    private, _ = provider.services["nightly-es256"]
    given = oidc.client_credentials(
        provider.issuer, "nightly-es256", private_key_pem=private, resource=OTHER_AUDIENCE, ca=provider.ca
    )
    assert exchange(line, given.access_token).status_code == 401
    assert exchange(line, "a.b.c").status_code == 401
    signed, _, signature = given.access_token.rpartition(".")
    other = "B" if signature.startswith("A") else "A"
    assert exchange(line, f"{signed}.{other}{signature[1:]}").status_code == 401


def test_a_service_with_a_key_here_works_by_private_key_jwt_too(line: CommandLine, tmp_path: Path) -> None:
    """RFC 7523 section 2.2, at the authority itself."""
    line.json("identity", "add", "cron", "--role", "engineer", "--service")
    facts = json.loads((line.home / "client" / "authority.json").read_text())
    private = (line.home / "identities" / "cron.key").read_bytes()
    form: dict[str, Any] = {
        "grant_type": "client_credentials", "client_assertion_type": tokens.CLIENT_ASSERTION,
        "client_assertion": tokens.issue_assertion(private, subject="cron", audience=facts["url"], now=time.time()),
        "resource": tokens.AUTHORITY_AUDIENCE,
    }  # fmt: skip
    context = ssl.create_default_context(cafile=line.home / "client" / "ca.pem")
    answer = httpx.post(f"{facts['url']}/v1/token", data=form, verify=context, trust_env=False, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    again = httpx.post(f"{facts['url']}/v1/token", data=form, verify=context, trust_env=False, timeout=PATIENCE_S)
    assert again.status_code == 401, "an assertion works once"


def test_with_the_provider_gone_who_has_a_session_goes_on_and_nobody_logs_in(
    line: CommandLine, provider_modules: Path, tmp_path: Path
) -> None:
    """A provider of its own, for it is stopped."""
    with Provider(provider_modules, tmp_path / "provider") as own:
        issuer = {
            "issuer": own.issuer, "audience": AUDIENCE, "client_id": CLIENT_ID, "ca_file": str(own.ca), "roles": GROUPS,
        }  # fmt: skip
        other = CommandLine(tmp_path / "cloister")
        other.home.mkdir(mode=0o700)
        (other.home / "config.yaml").write_text(yaml.safe_dump({"authority": {"issuers": [issuer]}}))
        try:
            other.json("up", "--port", str(free_port()))
            name = name_of(log_in(other, own, "rita"))
            own.stop()
            assert other.json("approvals", "list", who=name) == []
            said = other.refused("login", "--issuer", own.issuer, "--issuer-ca", own.ca)
            assert "issuer" in said
        finally:
            other.run("down")
