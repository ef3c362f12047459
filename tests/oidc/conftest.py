"""The issuers, for this folder's tests."""

from oidc.provider import provider, provider_modules
from oidc.scripted import scripted

__all__ = ["provider", "provider_modules", "scripted"]
