"""The command line: thin commands over the client. Each module is imported only when its command runs."""

from __future__ import annotations

import importlib
import os
import sys

import click

from cloister.cli import output
from cloister.errors import CloisterError, InputError, UnavailableError

# name: (module, one line of help). The help is here so that `cloister --help` imports nothing.
COMMANDS = {
    "demo": ("demo", "The whole story on real data, one command."),
    "up": ("platform", "Start the authority on this machine."),
    "down": ("platform", "Stop everything that this Cloister started."),
    "doctor": ("platform", "Explain what runs and how well it is protected."),
    "login": ("identity", "Choose who you are on this machine."),
    "token": ("identity", "Print a short-lived access token."),
    "logout": ("identity", "End your session on this machine."),
    "identity": ("identity", "Register, change, revoke and list identities."),
    "access": ("access", "Ask for a role for a while."),
    "node": ("access", "Register the machines that data is opened on."),
    "key": ("key", "List, rotate and destroy keys."),
    "data": ("data", "Seal, list, show, verify and erase datasets."),
    "budget": ("budget", "Set and show a dataset's privacy budget."),
    "train": ("train", "Plan, submit and watch training runs."),
    "approvals": ("approvals", "List and show what waits for approval."),
    "approve": ("approvals", "Approve a request, signed with your own key."),
    "deny": ("approvals", "Refuse a request."),
    "model": ("model", "List, show, verify, promote and export models."),
    "serve": ("serve", "Deploy, list and stop endpoints."),
    "infer": ("serve", "Ask a served model."),
    "policy": ("policy", "Validate, test, explain and change the rules: who may do what."),
    "audit": ("audit", "Search, export and verify the audit log."),
    "backup": ("backup", "Back the authority up, sealed under its key service."),
    "restore": ("backup", "Restore the authority from a backup."),
    "fsck": ("backup", "Check that log, state, keys and sealed files fit together."),
}


class Commands(click.Group):
    """Finds a command by name and imports its module then."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"cloister.cli.{COMMANDS[cmd_name][0]}")
        return getattr(module, cmd_name)  # type: ignore[no-any-return]  # by construction a click.Command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cloister", message="%(version)s")
def cloister() -> None:
    """Confidential training and serving on Ray.

    Seal a table, train on it with differential privacy without holding it, release a signed model after review, serve
    it behind authenticated replicas. Start with `cloister demo` or `cloister up`.
    """


def main() -> None:
    """Entry point. Exit code 0: done; 1: refused or failed; 2: wrong usage."""
    os.umask(0o077)
    as_json = "--json" in sys.argv
    try:
        cloister.main(standalone_mode=False)
    except CloisterError as error:
        output.error(error, as_json=as_json)
        sys.exit(1)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "cloister"
        output.error(InputError(error.format_message().removesuffix("."), f"{command} --help"), as_json=as_json)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        refused = UnavailableError(f"{error.strerror or type(error).__name__}{place}", "check that path and its disk")
        output.error(refused, as_json=as_json)
        sys.exit(1)
    except Exception as error:  # the edge: no traceback, no foreign text
        if os.environ.get("CLOISTER_DEBUG"):
            raise
        name = type(error).__name__
        hint = "run it again with CLOISTER_DEBUG=1 for the details; they may contain data"
        output.error(CloisterError(f"an unexpected {name}; this is a fault in Cloister", hint), as_json=as_json)
        sys.exit(1)
