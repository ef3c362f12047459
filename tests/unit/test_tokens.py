"""Every way in which a token can be wrong. Named after the attack or the fault."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.errors import AuthenticationError, InputError, TokenExpiredError
from cloister.signing import tokens

NOW = 1_800_000_000.0
ISSUER, AUDIENCE = "https://authority.test", tokens.INFERENCE_AUDIENCE


def pem_pair(key: Any = None) -> tuple[bytes, bytes]:
    key = key or Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private, public


PRIVATE, PUBLIC = pem_pair()
KEYS = {"k1": PUBLIC}


def good(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "issuer": ISSUER, "subject": "ana", "audience": AUDIENCE, "roles": ["client", "auditor"],
        "lifetime_s": 300, "now": NOW, "key_id": "k1",
    }  # fmt: skip
    return tokens.issue(PRIVATE, **(arguments | changes))


def check(token: str, now: float = NOW, keys: dict[str, bytes] = KEYS) -> tokens.Claims:
    return tokens.verify(token, keys, issuer=ISSUER, audience=AUDIENCE, now=now)


def part(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forged(header: dict[str, Any] | None = None, claims: dict[str, Any] | None = None, drop: str = "") -> str:
    """A token that is signed by the right key whatever it says: only the rule under test can refuse it."""
    base = {"iss": ISSUER, "sub": "ana", "aud": AUDIENCE, "client_id": "ana", "roles": ["client"],
            "kind": "person", "epoch": 0, "iat": int(NOW), "exp": int(NOW) + 300, "jti": "j1"}  # fmt: skip
    body = {name: value for name, value in (base | (claims or {})).items() if name != drop}
    top = {"alg": "Ed25519", "typ": "at+jwt", "kid": "k1"} | (header or {})
    signed = part({name: value for name, value in top.items() if name != drop}) + "." + part(body)
    key = serialization.load_pem_private_key(PRIVATE, None)
    assert isinstance(key, Ed25519PrivateKey)
    return signed + "." + part(key.sign(signed.encode()))


def test_a_good_token_gives_its_claims() -> None:
    claims = check(good(token_id="t1", client_id="cli"))
    assert claims == tokens.Claims(
        subject="ana", roles=frozenset({"client", "auditor"}), client_id="cli", kind="person", epoch=0, thumbprint=None,
        issued_at=int(NOW), expires_at=int(NOW) + 300, token_id="t1",
    )  # fmt: skip
    bound = check(good(kind="run", epoch=7, thumbprint="x" * 43))
    assert (bound.kind, bound.epoch, bound.thumbprint) == ("run", 7, "x" * 43)
    assert check(forged()).subject == "ana"  # the forger below is right in everything but the one fault


def test_two_tokens_never_share_an_id() -> None:
    assert check(good()).token_id != check(good()).token_id


def test_expiry_is_sharp_and_has_its_own_error() -> None:
    assert check(good(), now=NOW + 299.9)
    with pytest.raises(TokenExpiredError, match="the access token has expired") as caught:
        check(good(), now=NOW + 300)
    assert caught.value.hint


ONE_FAULT = [
    forged(header={"alg": "none"}),
    forged(header={"alg": "EdDSA"}),
    forged(header={"alg": "ES256"}),
    forged(header={"alg": ["Ed25519"]}),
    forged(header={"typ": "JWT"}),
    forged(header={"typ": tokens.ASSERTION_TYPE}),
    forged(header={"kid": "k2"}),
    forged(header={"kid": ["k1"]}),
    forged(header={"jwk": {"kty": "OKP", "crv": "Ed25519", "x": "AA"}}),
    forged(header={"jku": "https://attacker.test/keys"}),
    forged(header={"x5u": "https://attacker.test/cert"}),
    forged(header={"x5c": ["AA"]}),
    forged(header={"crit": ["exp"]}),
    forged(header={"crit": ["b64"], "b64": False}),
    forged(drop="alg"),
    forged(drop="typ"),
    forged(drop="kid"),
    *(forged(drop=name) for name in ("iss", "sub", "aud", "client_id", "roles", "iat", "exp", "jti")),
    *(forged(drop=name) for name in ("kind", "epoch")),
    forged(claims={"iss": "https://attacker.test"}),
    forged(claims={"aud": "urn:cloister:authority"}),
    forged(claims={"aud": [AUDIENCE, "urn:other"]}),
    forged(claims={"sub": ""}),
    forged(claims={"sub": 7}),
    forged(claims={"sub": "x" * 257}),
    forged(claims={"roles": "client"}),
    forged(claims={"roles": ["client", 7]}),
    forged(claims={"kind": ""}),
    forged(claims={"kind": ["person"]}),
    forged(claims={"epoch": -1}),
    forged(claims={"epoch": "0"}),
    forged(claims={"epoch": True}),
    forged(claims={"epoch": 0.0}),
    forged(claims={"cnf": {}}),
    forged(claims={"cnf": "x" * 43}),
    forged(claims={"cnf": {"x5t#S256": ""}}),
    forged(claims={"cnf": {"x5t#S256": 7}}),
    forged(claims={"cnf": {"jkt": "x" * 43}}),  # a binding that nobody here checks is not taken for none
    forged(claims={"cnf": {"x5t#S256": "x" * 43, "jkt": "x" * 43}}),
    forged(claims={"exp": str(int(NOW) + 300)}),
    forged(claims={"exp": NOW + 300.5}),
    forged(claims={"exp": True}),
    forged(claims={"exp": int(NOW) + 601}),
    forged(claims={"exp": int(NOW) + 10**9}),
    forged(claims={"iat": int(NOW) + 60, "exp": int(NOW) + 120}),
    forged(claims={"nbf": int(NOW) + 60}),
    forged(claims={"nbf": "soon"}),
]  # fmt: skip


def test_a_rightly_signed_token_with_one_fault_is_refused(subtests: pytest.Subtests) -> None:
    for token in ONE_FAULT:
        with subtests.test(token=[base64.urlsafe_b64decode(piece + "==") for piece in token.split(".")[:2]]):
            with pytest.raises(AuthenticationError) as caught:
                check(token)
            assert type(caught.value) is AuthenticationError
            assert not any(piece and piece in str(caught.value.args) for piece in token.split("."))


@pytest.mark.parametrize(
    "token",
    ["", ".", "..", "a.b.c", "a.b", "é.é.é", part({}) + "..", part(b"[]") + ".e30.AA", part(b"\xff") + ".e30.AA",
     part(b"[" * 2000) + ".e30.AA", "x" * 5000, forged()[:-6], forged() + "A" * 4, forged() + ".e30"],
)  # fmt: skip
def test_garbage_is_refused(token: str) -> None:
    with pytest.raises(AuthenticationError):
        check(token)
    with pytest.raises(AuthenticationError):
        tokens.verify_assertion(token, PUBLIC, subject="w", audience="a", now=NOW)


def test_a_token_without_signature_is_refused() -> None:
    unsigned = part({"alg": "none", "typ": "at+jwt", "kid": "k1"}) + "." + forged().split(".")[1] + "."
    with pytest.raises(AuthenticationError):
        check(unsigned)


def test_a_mac_keyed_with_the_public_key_is_refused() -> None:
    signed = part({"alg": "HS256", "typ": "at+jwt", "kid": "k1"}) + "." + forged().split(".")[1]
    with pytest.raises(AuthenticationError):
        check(signed + "." + part(hmac.digest(PUBLIC, signed.encode(), "sha256")))


def test_changed_claims_are_refused() -> None:
    header, _, signature = good().split(".")
    with pytest.raises(AuthenticationError, match="signature"):
        check(f"{header}.{forged(claims={'roles': ['admin']}).split('.')[1]}.{signature}")


def test_a_foreign_key_under_the_same_id_is_refused() -> None:
    with pytest.raises(AuthenticationError, match="signature"):
        check(good(), keys={"k1": pem_pair()[1]})
    with pytest.raises(AuthenticationError, match="not trusted"):
        check(good(), keys={})


def test_a_registered_key_of_another_kind_is_refused() -> None:
    ec_private, ec_public = pem_pair(generate_private_key(SECP256R1()))
    with pytest.raises(AuthenticationError):
        check(good(), keys={"k1": ec_public})
    with pytest.raises(AuthenticationError):
        check(good(), keys={"k1": b"not a key"})
    with pytest.raises(InputError):
        tokens.issue_assertion(ec_private, subject="w", audience="a", now=NOW)
    with pytest.raises(InputError):
        tokens.issue_assertion(b"not a key", subject="w", audience="a", now=NOW)


@pytest.mark.parametrize("lifetime_s", [0, -1, 601])
def test_no_token_is_issued_for_longer_than_the_limit(lifetime_s: int) -> None:
    with pytest.raises(InputError):
        good(lifetime_s=lifetime_s)


class TestVerifier:
    def test_a_cached_token_dies_when_it_expires(self) -> None:
        verifier = tokens.TokenVerifier(KEYS, issuer=ISSUER, audience=AUDIENCE)
        token = good()
        assert verifier.verify(token, NOW) is verifier.verify(token, NOW + 299)
        with pytest.raises(TokenExpiredError):
            verifier.verify(token, NOW + 300)
        assert len(verifier) == 0

    def test_a_cached_token_does_not_let_a_changed_one_pass(self) -> None:
        verifier = tokens.TokenVerifier(KEYS, issuer=ISSUER, audience=AUDIENCE)
        token = good()
        verifier.verify(token, NOW)
        with pytest.raises(AuthenticationError):
            verifier.verify(token[:-10] + "A" * 10, NOW)
        assert len(verifier) == 1

    def test_a_key_that_is_not_trusted_any_more_takes_its_remembered_tokens_along(self) -> None:
        verifier = tokens.TokenVerifier(KEYS, issuer=ISSUER, audience=AUDIENCE)
        private, public = pem_pair()
        token = good()
        remembered = verifier.verify(token, NOW)
        verifier.trust(dict(KEYS))  # the same keys: nothing is forgotten
        assert verifier.verify(token, NOW) is remembered
        verifier.trust({"k1": PUBLIC, "k2": public})
        assert verifier.verify(token, NOW) == remembered
        verifier.trust({"k2": public})
        with pytest.raises(AuthenticationError):
            verifier.verify(token, NOW)
        newer = tokens.issue(
            private, issuer=ISSUER, subject="ana", audience=AUDIENCE, roles=[], lifetime_s=9, now=NOW, key_id="k2"
        )
        assert verifier.verify(newer, NOW).subject == "ana"

    def test_the_memory_is_bounded(self) -> None:
        verifier = tokens.TokenVerifier(KEYS, issuer=ISSUER, audience=AUDIENCE, max_tokens=3)
        for number in range(8):
            verifier.verify(good(token_id=f"t{number}"), NOW)
        assert len(verifier) == 3


class TestAssertion:
    def make(self, **changes: Any) -> str:
        return tokens.issue_assertion(PRIVATE, **({"subject": "worker-1", "audience": "aud", "now": NOW} | changes))

    def check(self, token: str, now: float = NOW, public: bytes = PUBLIC) -> str:
        return tokens.verify_assertion(token, public, subject="worker-1", audience="aud", now=now)

    def test_a_good_assertion_gives_an_id_that_is_its_own(self) -> None:
        assert self.check(self.make()) != self.check(self.make())
        assert tokens.unverified_subject(self.make()) == "worker-1"

    def test_expired(self) -> None:
        with pytest.raises(TokenExpiredError):
            self.check(self.make(), now=NOW + tokens.ASSERTION_LIFETIME_S)

    def test_from_the_future(self) -> None:
        with pytest.raises(AuthenticationError):
            self.check(self.make(now=NOW + 30))

    def test_another_subject_audience_or_key(self) -> None:
        for token in (self.make(subject="worker-2"), self.make(audience="other")):
            with pytest.raises(AuthenticationError):
                self.check(token)
        with pytest.raises(AuthenticationError):
            self.check(self.make(), public=pem_pair()[1])

    def test_an_access_token_is_no_assertion_and_the_other_way_round(self) -> None:
        with pytest.raises(AuthenticationError):
            tokens.verify_assertion(good(), PUBLIC, subject="ana", audience=AUDIENCE, now=NOW)
        with pytest.raises(AuthenticationError):
            check(self.make())

    @pytest.mark.parametrize("header", [{"typ": "at+jwt"}, {"typ": "JWT"}, {"kid": "k1"}, {"jwk": {}}])
    def test_only_the_header_of_an_assertion_will_do(self, header: dict[str, Any]) -> None:
        """Else an identity whose key also signs something else could have that replayed as a log-in."""
        names = {"iss": "worker-1", "sub": "worker-1", "aud": "aud", "exp": int(NOW) + 60}
        base = forged(
            header={"typ": tokens.ASSERTION_TYPE} | header, claims=names, drop="" if "kid" in header else "kid"
        )
        with pytest.raises(AuthenticationError):
            self.check(base)
        assert self.check(forged(header={"typ": tokens.ASSERTION_TYPE}, claims=names, drop="kid")) == "j1"

    @pytest.mark.parametrize("token", ["", "a.b.c", part({"alg": "Ed25519"}) + "." + part(b"[]") + ".AA"])
    def test_no_subject_in_garbage(self, token: str) -> None:
        with pytest.raises(AuthenticationError):
            tokens.unverified_subject(token)


def test_the_cache_key_is_the_whole_token() -> None:
    """A prefix or the `jti` would let a re-signed token ride on a good one."""
    verifier = tokens.TokenVerifier(KEYS, issuer=ISSUER, audience=AUDIENCE)
    token = good()
    verifier.verify(token, NOW)
    assert list(verifier._good) == [hashlib.sha256(token.encode()).digest()]
