"""X.509 certificates of an internal authority (RFC 5280), P-256 throughout.

Guarantees: a leaf is never a CA, names only what it was issued for, and lives no longer than was asked; the caller
keeps every private key, since requests arrive as CSRs (PKCS #10).
Not guaranteed: revocation lists. Short lives take their place.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloister.errors import InputError

LEAF_LIFETIME = timedelta(days=90)  # an endpoint's; what the authority and its nodes have lives a day, and is renewed
CA_LIFETIME = timedelta(days=3650)
_CLOCK_SKEW = timedelta(minutes=5)


def new_private_key() -> bytes:
    """A fresh P-256 private key as PKCS #8 PEM, unencrypted: the caller stores it sealed or under mode 0600."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def new_ca(private_key: bytes, common_name: str) -> bytes:
    """A self-signed CA certificate (PEM) that may sign leaves and nothing deeper."""
    key = _load(private_key)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    builder = (
        _builder(name, name, CA_LIFETIME)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def signing_request(private_key: bytes, common_name: str) -> bytes:
    """A CSR (PEM) that proves possession of the key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(_load(private_key), hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def issue(
    ca_key: bytes,
    ca_certificate: bytes,
    request: bytes,
    *,
    hosts: tuple[str, ...],
    lifetime: timedelta = LEAF_LIFETIME,
) -> bytes:
    """A leaf certificate (PEM) for the CSR's key, valid for `hosts` as TLS server and client.

    Raises:
        InputError: not a CSR, its own signature fails, or its key is not P-256.
    """
    try:
        csr = x509.load_pem_x509_csr(request)
        valid = csr.is_signature_valid
        public_key = csr.public_key()
    except (ValueError, InvalidSignature) as error:
        raise InputError("this is not a certificate signing request", "send a PKCS #10 request as PEM") from error
    if not valid or not isinstance(public_key, ec.EllipticCurvePublicKey) or public_key.curve.name != "secp256r1":
        raise InputError("the signing request must be self-signed by a P-256 key", "make it with a P-256 key")
    issuer = x509.load_pem_x509_certificate(ca_certificate)
    builder = (
        _builder(csr.subject, issuer.subject, lifetime)
        .public_key(public_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)  # type: ignore[arg-type]  # the CA is ours: EC
    )
    return builder.sign(_load(ca_key), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def remaining(certificate: bytes) -> float:
    """Which part of a certificate's (PEM) life is left: 1 when new, 0 or less when it has expired.

    Raises:
        InputError: not a certificate.
    """
    try:
        parsed = x509.load_pem_x509_certificate(certificate)
    except ValueError as error:
        raise InputError("this is not a certificate", "give a PEM certificate") from error
    end = parsed.not_valid_after_utc
    return (end - datetime.now(UTC)) / (end - parsed.not_valid_before_utc)


def covers(certificate: bytes, host: str) -> bool:
    """Whether a certificate (PEM) names `host`; a wildcard is not accepted.

    Raises:
        InputError: not a certificate.
    """
    try:
        names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except (ValueError, x509.ExtensionNotFound) as error:
        raise InputError(
            "this is not a certificate with subject alternative names", "give a PEM certificate"
        ) from error
    return _general_name(host) in list(names.value)


def _builder(subject: x509.Name, issuer: x509.Name, lifetime: timedelta) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + lifetime)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _load(private_key: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(private_key, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError("this private key is not a P-256 key", "make one with new_private_key()")
    return key
