"""Every way in which another issuer's token or key set can be wrong. Named after the attack or the fault."""

from __future__ import annotations

import base64
import hmac
import json
import pickle
from typing import Any

import pytest
from joserfc import jws
from joserfc.jwk import ECKey, OKPKey, RSAKey

from cloister.errors import AuthenticationError, CloisterError, InputError, TokenExpiredError
from cloister.signing import foreign
from cloister.signing.foreign import ALGORITHMS, ForeignClaims, KeySet

NOW = 1_800_000_000.0
ISSUER, AUDIENCE, CLIENT = "https://login.test", "urn:cloister:authority", "cloister-cli"
KEYS: dict[str, Any] = {
    "RS256": RSAKey.generate_key(2048, {"kid": "RS256"}),
    "PS256": RSAKey.generate_key(2048, {"kid": "PS256"}),
    "ES256": ECKey.generate_key("P-256", {"kid": "ES256"}),
    "ES384": ECKey.generate_key("P-384", {"kid": "ES384"}),
    "Ed25519": OKPKey.generate_key("Ed25519", {"kid": "Ed25519"}),
    "EdDSA": OKPKey.generate_key("Ed25519", {"kid": "EdDSA"}),
}
GOOD_CLAIMS = {
    "iss": ISSUER, "sub": "rita", "aud": AUDIENCE, "client_id": CLIENT, "iat": int(NOW), "exp": int(NOW) + 300,
    "jti": "j1", "groups": ["ml-reviewers", 7],
}  # fmt: skip
ID_CLAIMS = {"iss": ISSUER, "sub": "rita", "aud": CLIENT, "nonce": "n", "iat": int(NOW), "exp": int(NOW) + 300}


def part(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def public(key: Any, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (key.as_dict(private=False) | changes).items() if value is not None}


def published(*keys: dict[str, Any]) -> KeySet:
    return KeySet.parse(json.dumps({"keys": list(keys)}).encode())


ALL = published(*(public(key) for key in KEYS.values()))


def signed(payload: bytes, algorithm: str = "ES256", key: Any = None, **header: Any) -> str:
    """Signed by the right key, whatever it says: only the rule under test can refuse it."""
    names = {"alg": algorithm, "typ": "at+jwt", "kid": algorithm} | header
    text = f"{part({name: value for name, value in names.items() if value is not None})}.{part(payload)}"
    if algorithm == "HS256":
        return f"{text}.{part(hmac.digest(key, text.encode(), 'sha256'))}"
    # The library makes the signature alone: it would refuse to write some of these headers.
    model = jws.JWSRegistry.algorithms["Ed25519" if algorithm == "EdDSA" else algorithm]
    return f"{text}.{part(model.sign(text.encode(), key or KEYS[algorithm]))}"


def token(algorithm: str = "ES256", *, header: dict[str, Any] | None = None, key: Any = None, **claims: Any) -> str:
    body = {name: value for name, value in (GOOD_CLAIMS | claims).items() if value is not None}
    return signed(json.dumps(body).encode(), algorithm, key, **(header or {}))


def check(text: str, keys: KeySet = ALL, **changes: Any) -> ForeignClaims:
    arguments = {
        "issuer": ISSUER, "audience": AUDIENCE, "algorithms": tuple(ALGORITHMS), "now": NOW, "max_age_s": 3600,
        "clients": (CLIENT,),
    }  # fmt: skip
    return foreign.verify(text, keys, **(arguments | changes))


def refused(text: str, keys: KeySet = ALL, **changes: Any) -> str:
    with pytest.raises(AuthenticationError) as caught:
        check(text, keys, **changes)
    assert not any(len(piece) > 8 and piece in str(caught.value.args) for piece in str(text).split("."))
    return str(caught.value)


@pytest.mark.parametrize("alg", list(ALGORITHMS))
def test_a_good_token_of_every_algorithm(alg: str) -> None:
    claims = check(token(alg))
    assert (claims.issuer, claims.subject, claims.audience) == (ISSUER, "rita", (AUDIENCE,))
    assert (claims.client_id, claims.token_id) == (CLIENT, "j1")
    assert (claims.issued_at, claims.expires_at) == (int(NOW), int(NOW) + 300)
    assert claims.values("groups") == {"ml-reviewers"}
    assert claims.values("sub") == {"rita"}
    assert claims.values("absent") == claims.values("iat") == frozenset()
    assert "ml-reviewers" not in repr(claims)
    assert pickle.loads(pickle.dumps(claims)) == claims  # noqa: S301  (our own bytes)


def test_an_algorithm_that_was_not_asked_for() -> None:
    for alg in ALGORITHMS:
        refused(token(alg), algorithms=[other for other in ALGORITHMS if other != alg])


@pytest.mark.parametrize("algorithms", [(), ("none",), ("HS256",), ("ES256", "HS256"), ("RS512",)])
def test_no_list_of_algorithms_lets_a_weak_one_in(algorithms: tuple[str, ...]) -> None:
    with pytest.raises(InputError):
        check(token(), algorithms=algorithms)


@pytest.mark.parametrize("alg", ["none", "None", "HS256", "HS512", "RS512", "ES512", "RS1", "", 7, None, ["ES256"]])
def test_other_algorithms_in_the_header(alg: Any) -> None:
    _, body, signature = token().split(".")
    for last in (signature, ""):
        refused(".".join((part({"alg": alg, "typ": "at+jwt", "kid": "ES256"}), body, last)))


def test_public_key_used_as_a_mac_key() -> None:
    for alg in ("RS256", "ES256", "Ed25519"):
        for secret in (KEYS[alg].as_pem(private=False), KEYS[alg].as_der(), json.dumps(public(KEYS[alg])).encode()):
            refused(token("HS256", key=secret, header={"kid": alg}))


@pytest.mark.parametrize("alg", list(ALGORITHMS))
def test_key_of_another_kind_or_curve(alg: str) -> None:
    for other, key in KEYS.items():
        if ALGORITHMS[other] != ALGORITHMS[alg]:
            refused(token(alg, header={"kid": other}))
            refused(token(other, key=key, header={"alg": alg, "kid": other}))


@pytest.mark.parametrize(
    "header",
    [
        {"jwk": public(KEYS["ES256"])},
        {"jku": "https://login.test/jwks"},
        {"x5u": "https://login.test/chain"},
        {"x5c": ["MIIB"]},
        {"crit": ["exp"], "exp": 1},
        {"crit": []},
        {"b64": False, "crit": ["b64"]},
        {"b64": True},
        {"zip": "DEF"},
        {"cty": "JWT"},
        {"enc": "A256GCM"},
        {"nonce": "n"},
    ],
    ids=lambda header: "+".join(header),
)
def test_header_that_brings_keys_or_rules(header: dict[str, Any]) -> None:
    refused(token(header=header))


def test_embedded_key_of_an_attacker() -> None:
    mine = ECKey.generate_key("P-256", {"kid": "ES256"})
    refused(token(key=mine, header={"jwk": public(mine)}))
    refused(token(key=mine))


@pytest.mark.parametrize("kid", [None, "", "unknown", "../../dev/null", "' OR 1=1", 1, ["ES256"], {"ES256": 1}])
def test_key_id_that_is_absent_unknown_or_injected(kid: Any) -> None:
    refused(token(header={"kid": kid}))


def test_thumbprints_are_hints_and_do_not_matter() -> None:
    assert check(token(header={"x5t": "AAAA", "x5t#S256": "AAAA"})).subject == "rita"


@pytest.mark.parametrize(
    "typ", ["JWT", None, "", "id_token+jwt", "dpop+jwt", "logout+jwt", "secevent+jwt", 3, ["at+jwt"]]
)
def test_other_kinds_of_token(typ: Any) -> None:
    refused(token(header={"typ": typ}))


@pytest.mark.parametrize("typ", ["at+jwt", "AT+JWT", "application/at+jwt"])
def test_spellings_of_the_type(typ: str) -> None:
    assert check(token(header={"typ": typ})).subject == "rita"


@pytest.mark.parametrize("claim", ["nonce", "at_hash", "c_hash", "s_hash", "events"])
def test_id_token_and_logout_token_where_an_access_token_is_wanted(claim: str) -> None:
    lenient = {"types": ("at+jwt", "jwt", "")}
    assert check(token(header={"typ": "JWT"}), **lenient).subject == "rita"
    assert check(token(header={"typ": None}), **lenient).subject == "rita"
    refused(token(header={"typ": "JWT"}, **{claim: "x"}), **lenient)


def test_token_that_is_bound_to_its_holders_key() -> None:
    assert "bound" in refused(token(cnf={"jkt": "x"}))


@pytest.mark.parametrize("issuer", ["https://evil.test", ISSUER + "/", ISSUER.upper(), None, "", [ISSUER]])
def test_another_issuer(issuer: Any) -> None:
    refused(token(iss=issuer))


@pytest.mark.parametrize(
    "audience",
    [None, "", "urn:other", AUDIENCE + "x", [], ["urn:other"], [AUDIENCE, 1], [AUDIENCE] * 17, {"a": AUDIENCE}, 1],
)
def test_another_audience(audience: Any) -> None:
    refused(token(aud=audience, azp=CLIENT))


def test_several_audiences_need_a_known_client() -> None:
    both = [AUDIENCE, "account"]
    assert check(token(aud=both, azp=CLIENT)).audience == tuple(both)
    for azp in (None, "other-cli", [CLIENT], {"x": 1}):
        refused(token(aud=both, azp=azp))
    refused(token(aud=both, azp=CLIENT), clients=())


@pytest.mark.parametrize(
    "times",
    [
        {"exp": None},
        {"iat": None},
        {"exp": str(int(NOW) + 300)},
        {"exp": True},
        {"iat": [int(NOW)]},
        {"exp": 2**53},
        {"exp": 10**400},
        {"iat": -(10**400)},
        {"nbf": "soon"},
        {"nbf": True},
        {"iat": int(NOW) + 6},
        {"nbf": int(NOW) + 6},
    ],
    ids=str,
)
def test_times_that_are_absent_malformed_or_ahead(times: dict[str, Any]) -> None:
    refused(token(**times))


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_times_that_are_no_number(text: bytes) -> None:
    for name in ("exp", "iat", "nbf"):
        body = (
            json.dumps(GOOD_CLAIMS | {name: 0})
            .encode()
            .replace(b'"%b": 0' % name.encode(), b'"%b": %b' % (name.encode(), text))
        )
        assert text in body
        refused(signed(body))


def test_clocks_may_differ_by_five_seconds() -> None:
    check(token(iat=int(NOW) + 5, nbf=int(NOW) + 5.0))
    check(token(exp=int(NOW) - 4))
    with pytest.raises(TokenExpiredError):
        check(token(exp=int(NOW) - 5))


def test_a_token_that_is_too_old_although_its_issuer_allows_more() -> None:
    long = {"iat": int(NOW) - 3000, "exp": int(NOW) + 10**8}
    assert check(token(**long)).expires_at == int(NOW) + 600
    with pytest.raises(TokenExpiredError):
        check(token(**long), max_age_s=2900)


@pytest.mark.parametrize("subject", [None, "", 7, ["rita"], "ri\nta", "rita\x1b[2J", "r" * 257])
def test_subject_that_cannot_be_a_name(subject: Any) -> None:
    refused(token(sub=subject))


def test_an_odd_client_or_token_id_is_left_out() -> None:
    claims = check(token(client_id=["x"], jti=5))
    assert (claims.client_id, claims.token_id) == (None, None)
    assert check(token(client_id=None, azp="portal")).client_id == "portal"


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "...",
        "a.b.c",
        "é.é.é",
        "\ud800",
        None,
        7,
        b"a.b.c",
        "a" * 9000,
        {},
        part({"alg": "ES256"}) + "..",
    ],
)
def test_what_is_not_a_token(text: Any) -> None:
    refused(text)
    with pytest.raises(AuthenticationError):
        foreign.unverified(text)


def test_a_token_that_is_too_long() -> None:
    assert check(token(padding="x" * 5000)).subject == "rita"
    refused(token(padding="x" * 8000))


def test_payloads_that_are_no_claims() -> None:
    twice = json.dumps(GOOD_CLAIMS).encode()[:-1] + b', "sub": "admin"}'
    for payload in (b"", b"[]", b'"x"', b"\xff", b"[" * 4000, twice):
        refused(signed(payload))


def test_a_changed_byte_anywhere() -> None:
    good = token()
    for at in range(0, len(good), 7):
        changed = good[:at] + ("A" if good[at] != "A" else "B") + good[at + 1 :]
        with pytest.raises(AuthenticationError):
            check(changed)


def test_what_a_token_claims_before_it_is_checked() -> None:
    assert foreign.unverified(token()) == (ISSUER, "ES256")
    for text in (token(iss=None), token(iss=3), token(header={"kid": None})):
        with pytest.raises(AuthenticationError):
            foreign.unverified(text)


# Key sets.


@pytest.mark.parametrize(
    "changes",
    [
        {"use": "enc"},
        {"use": 5},
        {"alg": "RS256"},
        {"alg": "ES384"},
        {"alg": ["ES256"]},
        {"key_ops": ["sign"]},
        {"key_ops": "verify"},
        {"key_ops": []},
        {"kty": "RSA"},
        {"kty": ["EC"]},
        {"kty": None},
        {"kid": None},
        {"kid": 3},
        {"kid": "E\nS"},
        {"crv": "P-384"},
        {"crv": "secp256k1"},
        {"x": "AAAA"},
        {"x": "A" * 5000},
        {"y": None},
        {"y": 5},
        {"x": "not base64!"},
    ],
    ids=str,
)
def test_a_key_that_may_not_or_cannot_sign_is_not_there(changes: dict[str, Any]) -> None:
    odd = public(KEYS["ES256"], **changes)
    with pytest.raises(InputError):
        published(odd)
    refused(token(), published(odd, public(KEYS["RS256"])))


def test_a_key_for_one_algorithm_of_its_type() -> None:
    keys = published(public(KEYS["RS256"], alg="RS256"))
    check(token("RS256"), keys)
    refused(token("PS256", key=KEYS["RS256"], header={"kid": "RS256"}), keys)


def test_both_names_of_ed25519_are_one_algorithm() -> None:
    for meant in ("EdDSA", "Ed25519"):
        keys = published(public(KEYS["EdDSA"], alg=meant))
        for name in ("EdDSA", "Ed25519"):
            check(token(name, key=KEYS["EdDSA"], header={"kid": "EdDSA"}), keys)


def test_other_curves_of_the_same_key_type() -> None:
    for curve in ("X25519", "Ed448"):
        with pytest.raises(InputError):
            published(public(OKPKey.generate_key(curve, {"kid": "k"})))


@pytest.mark.filterwarnings("ignore:Key size")
def test_rsa_keys_that_are_too_small_too_large_or_odd() -> None:
    number = KEYS["RS256"].public_key.public_numbers()

    def encoded(value: int) -> str:
        return part(value.to_bytes((value.bit_length() + 7) // 8, "big"))

    good = public(KEYS["RS256"])
    published(good)
    small = public(RSAKey.generate_key(1024, {"kid": "RS256"}))
    large = good | {"n": encoded((1 << 8200) + 1)}
    for bad in (
        small,
        large,
        good | {"e": encoded(3)},
        good | {"e": encoded(65538)},
        good | {"n": encoded(number.n >> 8)},
    ):
        with pytest.raises(InputError):
            published(bad)


@pytest.mark.parametrize("alg", ["RS256", "ES256", "Ed25519"])
def test_a_key_set_with_a_private_key(alg: str) -> None:
    with pytest.raises(InputError, match="secret"):
        published(public(KEYS["ES384"]), KEYS[alg].as_dict(private=True))


def test_a_key_set_with_a_shared_secret() -> None:
    with pytest.raises(InputError, match="secret"):
        published(public(KEYS["ES256"]), {"kty": "oct", "kid": "s", "k": "c2VjcmV0"})


def test_two_keys_with_one_name_are_both_not_there() -> None:
    other = ECKey.generate_key("P-256", {"kid": "ES256"})
    keys = published(public(KEYS["ES256"]), public(other), public(KEYS["RS256"]))
    refused(token(), keys)
    refused(token(key=other), keys)
    check(token("RS256"), keys)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": []}',
        b'{"keys": [1]}',
        b'{"keys": null}',
        b"\xff",
        b"[" * 9999,
        b'{"keys": [], "keys": []}',
        json.dumps({"keys": [public(KEYS["ES256"])] + [{}] * 100}).encode(),
    ],
)
def test_what_is_not_a_key_set(document: bytes) -> None:
    with pytest.raises(InputError):
        KeySet.parse(document)


# ID tokens, which only the one who logs in reads.


def id_check(text: str, **changes: Any) -> ForeignClaims:
    arguments = {
        "issuer": ISSUER, "client_id": CLIENT, "nonce": "n", "algorithms": ("ES256",), "now": NOW, "max_age_s": 600,
    }  # fmt: skip
    return foreign.verify_id_token(text, ALL, **(arguments | changes))


def id_token(typ: Any = None, **claims: Any) -> str:
    body = {name: value for name, value in (ID_CLAIMS | claims).items() if value is not None}
    return signed(json.dumps(body).encode(), typ=typ)


def test_good_id_tokens() -> None:
    for text in (id_token(), id_token("JWT"), id_token(aud=[CLIENT]), id_token(aud=[CLIENT, "x"], azp=CLIENT)):
        assert id_check(text).subject == "rita"
    assert id_check(id_token(nonce=None), nonce=None).subject == "rita"


@pytest.mark.parametrize(
    "claims",
    [
        {"nonce": None},
        {"nonce": "other"},
        {"aud": "other-client"},
        {"aud": [CLIENT, "x"]},
        {"azp": "other-client"},
        {"iss": "https://evil.test"},
        {"exp": int(NOW) - 10},
        {"iat": int(NOW) - 700},
        {"sub": None},
        {"typ": "at+jwt"},
    ],
    ids=str,
)
def test_id_tokens_of_another_login_client_or_time(claims: dict[str, Any]) -> None:
    with pytest.raises(CloisterError) as caught:
        id_check(id_token(**claims))
    assert isinstance(caught.value, AuthenticationError)
