"""A real OpenID Connect provider (npm's `oidc-provider`) on loopback, and a person with a browser.

`install` puts the package, as locked, into a folder outside the tree; a run that cannot have it skips, and says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Self
from urllib.parse import urljoin

import httpx
import pytest
from joserfc.jwk import ECKey, OKPKey, RSAKey

from cloister.signing import certificates
from ports import free_port
from waiting import PATIENCE_S

HERE = Path(__file__).parent
CLIENT_ID = "cloister-cli"
AUDIENCE = "urn:cloister:authority"
AUDIENCE_RS256 = "urn:cloister:authority:rs256"  # the same provider, signing with its RSA key
OTHER_AUDIENCE = "urn:other:system"
GROUPS = {"rita": ["ml-reviewers", "everyone"], "nightly-es256": ["pipelines"]}


def install(cache: Path) -> Path:
    """A folder with `node_modules`, made once for each lock file.

    Skips the test where Node.js or npm is missing or the package cannot be had.
    """
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("no OpenID Connect provider: Node.js 20 or newer, with npm, is not installed")
    locked = [HERE / "package.json", HERE / "package-lock.json"]
    folder = cache / hashlib.sha256(b"".join(path.read_bytes() for path in locked)).hexdigest()[:16]
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=cache))
    for path in locked:
        shutil.copy(path, fresh)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(command, cwd=fresh, capture_output=True, text=True, check=False, timeout=800)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if line.startswith("npm error")), "npm ci failed")
            pytest.skip(f"no OpenID Connect provider: {reason}")
        with contextlib.suppress(OSError):  # another run was faster
            fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def signing_keys(generation: int = 1) -> list[dict[str, Any]]:
    """Private JWKs: the provider signs ES256 with the first and RS256 with the second."""
    elliptic = ECKey.generate_key("P-256", {"kid": f"es-{generation}", "use": "sig", "alg": "ES256"})
    rsa = RSAKey.generate_key(2048, {"kid": f"rs-{generation}", "use": "sig", "alg": "RS256"})
    return [elliptic.as_dict(private=True), rsa.as_dict(private=True)]


def service_keys() -> dict[str, tuple[bytes, dict[str, Any]]]:
    """For each service: its private key (PEM) and its public JWK."""
    keys: dict[str, ECKey | RSAKey | OKPKey] = {
        "nightly-es256": ECKey.generate_key("P-256"),
        "nightly-rs256": RSAKey.generate_key(2048),
        "nightly-eddsa": OKPKey.generate_key("Ed25519"),
    }
    return {name: (key.as_pem(private=True), dict(key.as_dict(private=False))) for name, key in keys.items()}


@dataclass
class Provider:
    """The running provider. `ca` is the file of the CA that vouches for its certificate."""

    modules: Path
    folder: Path
    device_code_s: int = 600
    interval_s: int = 5
    keys: list[dict[str, Any]] = field(default_factory=signing_keys, repr=False)
    services: dict[str, tuple[bytes, dict[str, Any]]] = field(default_factory=service_keys, repr=False)
    port: int = field(default_factory=free_port)
    issuer: str = ""
    _tls: tuple[bytes, bytes] = field(default=(b"", b""), repr=False)
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "provider.mjs", self.folder)
        (self.folder / "node_modules").symlink_to(self.modules / "node_modules")
        ca_key, key = certificates.new_private_key(), certificates.new_private_key()
        ca = certificates.new_ca(ca_key, "a provider's CA")
        self.ca.write_bytes(ca)
        request = certificates.signing_request(key, "provider")
        self._tls = (key, certificates.issue(ca_key, ca, request, hosts=("127.0.0.1",)))
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start, or start again on the same port with the keys that `keys` holds now."""
        with (self.folder / "provider.log").open("a") as log:
            self._process = subprocess.Popen(
                ["node", "provider.mjs"],
                cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(self._settings()) + "\n")
        self._process.stdin.flush()
        said = self._process.stdout.readline()
        assert said, (self.folder / "provider.log").read_text()
        self.issuer = json.loads(said)["issuer"]
        self.port = int(self.issuer.rpartition(":")[2])

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def person(self, name: str, *, agrees: bool = True) -> Person:
        return Person(name, self.ca, agrees=agrees)

    def _settings(self) -> dict[str, Any]:
        key, certificate = self._tls
        device = "urn:ietf:params:oauth:grant-type:device_code"
        people = {
            "client_id": CLIENT_ID,
            "application_type": "native",
            "token_endpoint_auth_method": "none",
            "grant_types": ["authorization_code", device],
            "response_types": ["code"],
            "redirect_uris": ["http://127.0.0.1/callback"],
        }
        services = [
            {
                "client_id": name,
                "token_endpoint_auth_method": "private_key_jwt",
                "grant_types": ["client_credentials"],
                "response_types": [],
                "redirect_uris": [],
                "jwks": {"keys": [public]},
            }
            for name, (_, public) in self.services.items()
        ]
        return {
            "key": key.decode(),
            "certificate": certificate.decode(),
            "port": self.port,
            "jwks": self.keys,
            "clients": [people, *services],
            "resources": {AUDIENCE: "ES256", AUDIENCE_RS256: "RS256", OTHER_AUDIENCE: "ES256"},
            "groups": GROUPS,
            "device_code_s": self.device_code_s,
            "interval_s": self.interval_s,
        }


@pytest.fixture(scope="session")
def provider_modules(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is installed: kept from run to run in pytest's cache."""
    cache = getattr(request.config, "cache", None)
    return install(cache.mkdir("oidc-provider") if cache else tmp_path_factory.mktemp("oidc-provider"))


@pytest.fixture(scope="session")
def provider(provider_modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    """One provider for all tests that leave it as it is."""
    with Provider(provider_modules, tmp_path_factory.mktemp("provider") / "run") as running:
        yield running


class Person:
    """Somebody with a browser: reads the provider's pages and answers their forms."""

    def __init__(self, name: str, ca: Path, *, agrees: bool = True) -> None:
        self._name = name
        self._agrees = agrees
        context = ssl.create_default_context(cafile=ca)
        self._browser = httpx.Client(verify=context, follow_redirects=True, trust_env=False, timeout=PATIENCE_S)

    def visit(self, url: str) -> str:
        """Open `url`, log in, agree (or not), and return the text of the last page."""
        page = self._browser.get(url)
        for _ in range(8):
            form = _Form(page.text)
            if form.action is None:
                return page.text
            if not self._agrees and form.cancel:
                return self._browser.get(urljoin(str(page.url), form.cancel)).text
            if not self._agrees and "confirm" in form.fields:
                del form.fields["confirm"]
                return self._browser.post(urljoin(str(page.url), form.action), data=form.fields | {"abort": "yes"}).text
            # The development pages have a field for a password, and look at nothing in it.
            answers = {"login": self._name, "password": "-"}
            form.fields.update({name: answers[name] for name in form.fields.keys() & answers.keys()})
            page = self._browser.post(urljoin(str(page.url), form.action), data=form.fields)
        raise AssertionError("the provider's pages do not end")


class _Form(HTMLParser):
    """The only form of a page, and the link to cancel."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self.cancel = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.action = named["action"]
        elif tag == "input" and "name" in named:
            self.fields[named["name"]] = named.get("value", "")
        elif tag == "a" and named.get("href", "").endswith("/abort"):
            self.cancel = named["href"]
