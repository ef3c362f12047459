"""Settings, from `config.yaml` in Cloister's home: `authority: {…}`, as `cloister.authority.settings` describes it."""

from __future__ import annotations

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cloister.authority.settings import AuthoritySettings
from cloister.errors import InputError
from cloister.stores.home import Home
from cloister.validation import first_problem

__all__ = ["AuthoritySettings", "Settings"]


class Settings(BaseModel):
    """All settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    authority: AuthoritySettings = AuthoritySettings()

    @classmethod
    def load(cls, home: Home) -> Settings:
        """Read `config.yaml`; without one, the defaults.

        Raises:
            InputError: unknown or wrong settings, by name.
        """
        try:
            return cls.model_validate(yaml.safe_load(home.config_file.read_text()) or {})
        except FileNotFoundError:
            return cls()
        except (yaml.YAMLError, UnicodeDecodeError):
            wrong = "this is not YAML"
        except ValidationError as error:
            found = first_problem(error, silent=("embedded", "vault", "token", "approle", "jwt", "kubernetes"))
            wrong = f"{found.place}: {found.reason}"
        raise InputError(f"{home.config_file} is not valid: {wrong}", "see the README's settings")
