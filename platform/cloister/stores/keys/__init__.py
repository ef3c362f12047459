"""Key services: the one interface (`service`), our own in a folder (`embedded`), and Vault or OpenBao (`vault`)."""

from cloister.stores.keys.embedded import EmbeddedKeys
from cloister.stores.keys.service import KeyService, KeyState, Secrets, version_of

__all__ = ["EmbeddedKeys", "KeyService", "KeyState", "Secrets", "version_of"]
