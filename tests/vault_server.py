"""A Vault for tests: HTTPS on loopback, the part of transit, KV v2 and the token, AppRole, JWT and Kubernetes logins
that Cloister uses, with real AES-GCM, ECDSA and HMAC.

It is strict: what Vault refuses it refuses, with Vault's status and in Vault's words. A field that is not known is a
400, so that nothing is asked for that a real server would silently ignore. `fault` says what goes wrong next.
"""

from __future__ import annotations

import asyncio
import base64
import fnmatch
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hmac import HMAC
from starlette.requests import Request
from starlette.responses import Response

from cloister.signing import certificates
from waiting import wait_for

# What the README tells an administrator to grant.
POLICY = {
    "transit/keys": {"list"},
    "transit/keys/cloister-*": {"create", "read", "update"},
    "transit/encrypt/cloister-*": {"update"},
    "transit/decrypt/cloister-*": {"update"},
    "transit/sign/cloister-release": {"update"},
    "transit/hmac/cloister-derive-*": {"update"},
    "secret/data/cloister/*": {"create", "read", "update"},
}
DEFAULT = {
    "auth/token/lookup-self": {"read"},
    "auth/token/renew-self": {"update"},
    "auth/token/revoke-self": {"update"},
}
CAPABILITY = {"GET": "read", "LIST": "list", "POST": "update", "PUT": "update"}
Policy = dict[str, set[str]]


class RefusedError(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, *errors: str, data: Any = None) -> None:
        super().__init__(status, *errors)
        self.status, self.errors, self.data = status, list(errors), data


@dataclass
class Token:
    policy: Policy
    ttl_s: float
    expires: float
    renewable: bool


@dataclass
class Key:
    """A transit key: `versions` by number, each its secret and when it was made."""

    kind: str
    versions: dict[int, tuple[Any, float]] = field(default_factory=dict)
    latest: int = 0
    min_decryption: int = 1
    min_encryption: int = 0
    min_available: int = 0

    def rotate(self) -> None:
        self.latest += 1
        made = ec.generate_private_key(ec.SECP256R1()) if self.kind == "ecdsa-p256" else secrets.token_bytes(32)
        self.versions[self.latest] = (made, time.time())

    def hmac_key(self, version: int) -> bytes:
        made = self.versions[version][0]
        return made if isinstance(made, bytes) else made.private_numbers().private_value.to_bytes(32, "big")


@dataclass
class Namespace:
    keys: dict[str, Key] = field(default_factory=dict)
    values: dict[str, list[Any]] = field(default_factory=dict)  # KV version n is at n - 1
    tokens: dict[str, Token] = field(default_factory=dict)
    roles: dict[str, dict[str, Any]] = field(default_factory=dict)  # by "auth/MOUNT", how to log in there


class VaultServer:
    """`address`, `ca` (a PEM file), `namespaces`; `sealed`, `fault` and `requests` are for tests."""

    def __init__(self, directory: Path) -> None:
        self.namespaces: dict[str, Namespace] = {"": Namespace()}
        self.sealed = False
        self.fault: Any = None
        """Called as `fault(path)` before each request; may sleep, raise `RefusedError`, or return the raw response."""
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        ca_key, key = certificates.new_private_key(), certificates.new_private_key()
        self.ca, self.certificate, self.key = (directory / name for name in ("ca.pem", "tls.pem", "tls.key"))
        self.ca.write_bytes(certificates.new_ca(ca_key, "Vault's CA"))
        request = certificates.signing_request(key, "vault.test")
        hosts = ("127.0.0.1", "vault.test")
        self.certificate.write_bytes(certificates.issue(ca_key, self.ca.read_bytes(), request, hosts=hosts))
        self.key.write_bytes(key)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"https://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            self._app, interface="asgi3", lifespan="off", log_level="critical", ssl_certfile=str(self.certificate),
            ssl_keyfile=str(self.key),
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> VaultServer:
        self._thread.start()
        wait_for(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join()

    # ---- for tests ----

    def token(self, policy: Policy | None = None, ttl_s: float = 0.0, namespace: str = "") -> str:
        """A new token; with `ttl_s` 0 one that lives for ever."""
        name = "hvs." + secrets.token_urlsafe(24)
        expires = time.monotonic() + ttl_s if ttl_s else float("inf")
        self.space(namespace).tokens[name] = Token(policy or POLICY, ttl_s, expires, bool(ttl_s))
        return name

    def revoke_all(self) -> None:
        for space in self.namespaces.values():
            space.tokens.clear()

    def space(self, name: str) -> Namespace:
        return self.namespaces.setdefault(name, Namespace())

    @contextmanager
    def failing(self, fault: Any) -> Iterator[None]:
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None

    # ---- HTTP ----

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        body = await request.body()
        response = await asyncio.to_thread(self._answer, request, body)
        await response(scope, receive, send)

    def _answer(self, request: Request, body: bytes) -> Response:
        path = request.url.path.removeprefix("/v1/")
        self.requests.append((request.method, path))
        try:
            if self.fault and (raw := self.fault(path)) is not None:
                return raw  # type: ignore[no-any-return]
            if request.headers.get("x-vault-request") != "true":
                raise RefusedError(412, "required 'X-Vault-Request' header is missing")
            if self.sealed:
                raise RefusedError(503, "Vault is sealed")
            try:
                asked = json.loads(body) if body else {}
            except ValueError:
                raise RefusedError(400, "failed to parse JSON input") from None
            with self._lock:
                answer = self._route(request, path, asked)
        except RefusedError as refused:
            content: Any = {"errors": refused.errors} if refused.data is None else {"data": refused.data}
            return Response(json.dumps(content), refused.status, media_type="application/json")
        if answer is None:
            return Response(status_code=204)
        return Response(json.dumps({"request_id": "0"} | answer), 200, media_type="application/json")

    def _route(self, request: Request, path: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        method = "LIST" if request.query_params.get("list") == "true" else request.method
        space = self.namespaces.get(request.headers.get("x-vault-namespace", "").strip("/"))
        if space is None:
            raise RefusedError(404, "no handler for route")
        parts = path.split("/")
        if parts[0] == "auth" and parts[-1] == "login":
            return self._login(space, "/".join(parts[:-1]), asked)
        name = request.headers.get("x-vault-token", "")
        token = space.tokens.get(name)
        if token is None or token.expires < time.monotonic():
            raise RefusedError(403, "permission denied", "invalid token")
        rules = token.policy | DEFAULT
        granted = {each for rule, some in rules.items() if fnmatch.fnmatchcase(path, rule) for each in some}
        new = path.startswith("transit/keys/") and len(parts) == 3 and parts[2] not in space.keys
        wanted = "create" if new and method == "POST" else CAPABILITY[method]
        if wanted not in granted:
            raise RefusedError(403, "1 error occurred:\n\t* permission denied\n\n")
        if parts[:2] == ["auth", "token"]:
            return self._token(space, name, token, parts[2])
        if parts[0] == "secret" and parts[1] == "data":
            return self._value(space, method, "/".join(parts[2:]), asked)
        if parts[0] == "transit":
            return self._transit(space, method, parts[1:], asked)
        raise RefusedError(404, "no handler for route")

    # ---- logins ----

    def _login(self, space: Namespace, mount: str, asked: dict[str, Any]) -> dict[str, Any]:
        role = space.roles.get(mount)
        if role is None:
            raise RefusedError(404, "no handler for route")
        if asked != role["proof"]:
            refusals = {"role_id": (400, "invalid role or secret ID"), "jwt": (403, "permission denied")}
            raise RefusedError(*refusals["role_id" if "role_id" in role["proof"] else "jwt"])
        name = self.token(role.get("policy"), role["ttl_s"])
        space.tokens[name] = self.namespaces[""].tokens.pop(name)
        return {"auth": {"client_token": name, "lease_duration": int(role["ttl_s"]) or role["ttl_s"],
                         "renewable": True, "policies": ["cloister"]}}  # fmt: skip

    def _token(self, space: Namespace, name: str, token: Token, verb: str) -> dict[str, Any] | None:
        if verb == "lookup-self":
            left = max(0.0, token.expires - time.monotonic()) if token.ttl_s else 0
            return {"data": {"ttl": left, "renewable": token.renewable, "id": name}}
        if verb == "renew-self":
            if not token.renewable:
                raise RefusedError(400, "lease is not renewable")
            token.expires = time.monotonic() + token.ttl_s
            return {"auth": {"client_token": name, "lease_duration": token.ttl_s, "renewable": True}}
        del space.tokens[name]
        return None

    # ---- KV version 2 ----

    def _value(self, space: Namespace, method: str, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        versions = space.values.setdefault(path, [])
        if method == "GET":
            if not versions:
                raise RefusedError(404)
            return {"data": {"data": versions[-1], "metadata": {"version": len(versions), "destroyed": False}}}
        _only(asked, {"data", "options"})
        _only(asked.get("options") or {}, {"cas"})
        cas = (asked.get("options") or {}).get("cas")
        if cas is None:
            raise RefusedError(400, "check-and-set parameter required for this call")
        if cas != len(versions):
            raise RefusedError(400, "check-and-set parameter did not match the current version")
        versions.append(asked["data"])
        return {"data": {"version": len(versions)}}

    # ---- transit ----

    def _transit(self, space: Namespace, method: str, parts: list[str], asked: dict[str, Any]) -> Any:
        if method == "LIST":
            if not space.keys:
                raise RefusedError(404)
            return {"data": {"keys": sorted(space.keys)}}
        name, key = parts[1], space.keys.get(parts[1])
        if parts[0] == "keys":
            return self._keys(space, method, name, key, parts[2:], asked)
        if key is None:
            if parts[0] == "encrypt":
                raise RefusedError(403, "1 error occurred:\n\t* permission denied\n\n")  # to make it takes "create"
            raise RefusedError(400, "encryption key not found" if parts[0] == "decrypt" else "signing key not found")
        return {"data": getattr(self, f"_{parts[0]}")(key, asked)}

    def _keys(
        self, space: Namespace, method: str, name: str, key: Key | None, rest: list[str], asked: dict[str, Any]
    ) -> Any:
        if method == "GET":
            if key is None:
                raise RefusedError(404)
            return {"data": _shown(name, key)}
        if not rest:
            _only(asked, {"type", "exportable", "allow_plaintext_backup", "derived"})
            if key is None:
                key = space.keys[name] = Key(asked.get("type", "aes256-gcm96"))
                key.rotate()
            return {"data": _shown(name, key)}
        if key is None:
            raise RefusedError(400, "no existing key named " + name + " could be found")
        if rest == ["rotate"]:
            key.rotate()
        elif rest == ["config"]:
            self._configure(key, asked)
        elif rest == ["trim"]:
            _only(asked, {"min_available_version"})
            wanted = asked["min_available_version"]
            if not key.min_encryption or not key.min_decryption:
                raise RefusedError(
                    400, "minimum available version cannot be set when minimum encryption version is not set"
                )
            if wanted > min(key.min_encryption, key.min_decryption):
                raise RefusedError(400, "minimum available version cannot be greater than the lesser of the minimums")
            key.min_available = wanted
            key.versions = {number: made for number, made in key.versions.items() if number >= wanted}
        else:
            raise RefusedError(404, "unsupported path")
        return {"data": _shown(name, key)}

    def _configure(self, key: Key, asked: dict[str, Any]) -> None:
        _only(asked, {"min_decryption_version", "min_encryption_version"})
        decryption = asked.get("min_decryption_version", key.min_decryption) or 1
        encryption = asked.get("min_encryption_version", key.min_encryption)
        if decryption > key.latest or encryption > key.latest:
            raise RefusedError(400, f"cannot set min version of {max(decryption, encryption)}, latest is {key.latest}")
        if encryption and encryption < decryption:
            raise RefusedError(400, "cannot set min_encryption_version below min_decryption_version")
        if decryption < key.min_available:
            raise RefusedError(400, "min decryption version should not be less than min available version")
        key.min_decryption, key.min_encryption = decryption, encryption

    def _encrypt(self, key: Key, asked: dict[str, Any]) -> dict[str, Any]:
        return _batch(asked, {"plaintext"}, lambda item: {"ciphertext": _sealed(key, item), "key_version": key.latest})

    def _decrypt(self, key: Key, asked: dict[str, Any]) -> dict[str, Any]:
        return _batch(asked, {"ciphertext"}, lambda item: {"plaintext": _b64(_opened(key, item))})

    def _sign(self, key: Key, asked: dict[str, Any]) -> dict[str, Any]:
        _only(asked, {"input", "key_version", "hash_algorithm", "marshaling_algorithm"})
        if key.kind != "ecdsa-p256":
            raise RefusedError(400, f"key type {key.kind} does not support signing")
        if (asked.get("hash_algorithm"), asked.get("marshaling_algorithm")) != ("sha2-256", "asn1"):
            raise RefusedError(400, "unsupported hash or marshaling algorithm")
        version = _version(key, asked)
        signature = key.versions[version][0].sign(_unb64(asked["input"]), ec.ECDSA(hashes.SHA256()))
        return {"signature": f"vault:v{version}:{_b64(signature)}", "key_version": version}

    def _hmac(self, key: Key, asked: dict[str, Any]) -> dict[str, Any]:
        _only(asked, {"input", "key_version", "algorithm"})
        if asked.get("algorithm", "sha2-256") != "sha2-256":
            raise RefusedError(400, "unsupported algorithm")
        version = _version(key, asked)
        mac = HMAC(key.hmac_key(version), hashes.SHA256())
        mac.update(_unb64(asked["input"]))
        return {"hmac": f"vault:v{version}:{_b64(mac.finalize())}"}


def _batch(asked: dict[str, Any], fields: set[str], each: Any) -> dict[str, Any]:
    _only(asked, {*fields, "batch_input"})
    items = asked.get("batch_input")
    if not isinstance(items, list) or not items:
        raise RefusedError(400, "missing batch input to process")
    results: list[dict[str, Any]] = []
    for item in items:
        _only(item, {*fields, "associated_data"})
        try:
            results.append(each(item))
        except RefusedError as refused:
            results.append({"error": refused.errors[0]})
    if any("error" in result for result in results):
        raise RefusedError(400, data={"batch_results": results})
    return {"batch_results": results}


def _sealed(key: Key, item: dict[str, str]) -> str:
    nonce, data = os.urandom(12), _unb64(item.get("associated_data", ""))
    sealed = AESGCM(key.versions[key.latest][0]).encrypt(nonce, _unb64(item["plaintext"]), data)
    return f"vault:v{key.latest}:{_b64(nonce + sealed)}"


def _opened(key: Key, item: dict[str, str]) -> bytes:
    head, number, body = (*item["ciphertext"].split(":"), "", "")[:3]
    if head != "vault" or not number.startswith("v") or not number[1:].isdecimal():
        raise RefusedError(400, "invalid ciphertext: no prefix")
    version = int(number[1:])
    if version > key.latest:
        raise RefusedError(400, "invalid ciphertext: version is too new")
    if version < key.min_decryption or version not in key.versions:
        raise RefusedError(400, "ciphertext or signature version is disallowed by policy (too old)")
    sealed = _unb64(body)
    try:
        return AESGCM(key.versions[version][0]).decrypt(
            sealed[:12], sealed[12:], _unb64(item.get("associated_data", ""))
        )
    except (InvalidTag, ValueError):
        raise RefusedError(400, "invalid ciphertext: unable to decrypt") from None


def _version(key: Key, asked: dict[str, Any]) -> int:
    version = asked.get("key_version") or key.latest
    if version not in key.versions or version < key.min_encryption:
        raise RefusedError(400, "cannot generate with this version: version is too old")
    return int(version)


def _shown(name: str, key: Key) -> dict[str, Any]:
    def of(made: Any, when: float) -> Any:
        if key.kind != "ecdsa-p256":
            return int(when)
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        public = made.public_key().public_bytes(serialization.Encoding.PEM, form).decode()
        return {"creation_time": datetime.fromtimestamp(when, UTC).isoformat().replace("+00:00", "000Z"),
                "name": "P-256", "public_key": public}  # fmt: skip

    shown = {number: of(*made) for number, made in key.versions.items() if number >= key.min_decryption}
    return {
        "name": name, "type": key.kind, "latest_version": key.latest, "min_decryption_version": key.min_decryption,
        "min_encryption_version": key.min_encryption, "min_available_version": key.min_available,
        "keys": {str(number): each for number, each in shown.items()}, "exportable": False, "deletion_allowed": False,
    }  # fmt: skip


def _only(asked: dict[str, Any], fields: set[str]) -> None:
    if unknown := asked.keys() - fields:
        raise RefusedError(400, "unknown fields: " + ", ".join(sorted(unknown)))


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unb64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise RefusedError(400, "failed to base64-decode") from None
