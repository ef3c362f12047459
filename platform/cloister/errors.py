"""Every error that Cloister raises on purpose.

    CloisterError
    ├── InputError             400  the caller's file, schema, spec or request is wrong
    ├── AuthenticationError    401  nobody, or not who they say they are
    │   └── TokenExpiredError       a token that was good once
    ├── PermissionDeniedError  403  somebody, but not allowed
    │   └── ApprovalMissingError    allowed once enough other people have approved
    ├── NotFoundError          404  no such dataset, run, model, identity
    ├── ConflictError          409  the state forbids it: taken version, run already ended
    │   └── BudgetError             not enough privacy budget left
    ├── IntegrityError         422  bytes, signature, proof or tag do not match: never use the thing
    ├── QuotaExceededError     429  try again after `retry_after_s` seconds
    └── UnavailableError       503  a service or a port that is needed cannot be had
        └── KeyServiceError         the key service is sealed, slow, gone, or refuses the authority

Guarantees: each error carries a sentence for a person and the next thing to type (`hint`); neither ever
contains a key, a token or a data value; every error survives pickling, since Ray moves errors between processes.
Rendering happens at the edge: the command line prints `error:` and `hint:`, HTTP sends `status` and `to_dict()`.
"""

from __future__ import annotations

from typing import Any


class CloisterError(Exception):
    """Base of the tree. `message` says what is wrong, `hint` what to do next; both may be shown to anybody."""

    status = 500

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def to_dict(self) -> dict[str, Any]:
        """The body of an HTTP error. `error` is a string because Open Inference Protocol clients expect one."""
        return {"error": self.message, "hint": self.hint, "kind": type(self).__name__}


class InputError(CloisterError):
    status = 400


class AuthenticationError(CloisterError):
    status = 401


class TokenExpiredError(AuthenticationError):
    pass


class PermissionDeniedError(CloisterError):
    status = 403


class ApprovalMissingError(PermissionDeniedError):
    pass


class NotFoundError(CloisterError):
    status = 404


class ConflictError(CloisterError):
    status = 409


class BudgetError(ConflictError):
    pass


class IntegrityError(CloisterError):
    status = 422


class QuotaExceededError(CloisterError):
    """Refused for now. `retry_after_s` is the number of seconds until the next window opens."""

    status = 429

    def __init__(self, message: str, hint: str = "", retry_after_s: int = 1) -> None:
        super().__init__(message, hint)
        self.args = (message, hint, retry_after_s)
        self.retry_after_s = retry_after_s


class UnavailableError(CloisterError):
    status = 503


class KeyServiceError(UnavailableError):
    pass


def _tree(root: type[CloisterError]) -> dict[str, type[CloisterError]]:
    kinds = {root.__name__: root}
    for child in root.__subclasses__():
        kinds |= _tree(child)
    return kinds


def from_dict(body: dict[str, Any], status: int = 500) -> CloisterError:
    """Rebuild the error that `to_dict` described; an unknown kind becomes the base class with that status."""
    kind = _tree(CloisterError).get(str(body.get("kind")), CloisterError)
    error = kind(str(body.get("error", f"the server answered {status}")), str(body.get("hint", "")))
    if kind is CloisterError:
        error.status = status
    return error
