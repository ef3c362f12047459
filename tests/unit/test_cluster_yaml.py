"""`cluster.yaml`: Ray's launcher takes it, and what it starts is as hardened as `cloister.cluster`."""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml
from ray.autoscaler._private.commands import _set_up_config_for_head_node
from ray.autoscaler._private.local.node_provider import LocalNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.sdk import bootstrap_config

from cloister.cluster import RAY_ENVIRONMENT, SYSTEM_CONFIG

PATH = Path(__file__).parents[2] / "cluster.yaml"
SECRETS = "/etc/cloister/ray"
MEMORY = "/dev/shm/cloister-ray"  # noqa: S108
DOCUMENTATION = ipaddress.ip_network("192.0.2.0/24")  # RFC 5737
NEEDED_HERE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}  # only for a cluster on loopback: workers refuse to start with it
ROLES = ("head", "worker")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded = yaml.safe_load(PATH.read_text())
    assert isinstance(loaded, dict)
    return loaded


def start(config: dict[str, Any], role: str) -> str:
    commands: list[str] = config[f"{role}_start_ray_commands"]
    (command,) = [command for command in commands if re.search(r"\bray start\b", command)]
    return command


def words(config: dict[str, Any], role: str) -> list[str]:
    return shlex.split(start(config, role).replace("\\\n", " "))


def environment(config: dict[str, Any], role: str) -> dict[str, str]:
    inside = words(config, role)
    inside = inside[inside.index("env") : inside.index("ray")]
    return dict(word.split("=", 1) for word in inside if re.match(r"[A-Z_]+=", word))


def options(config: dict[str, Any], role: str) -> dict[str, str]:
    inside = words(config, role)
    return dict(word[2:].partition("=")[::2] for word in inside[inside.index("ray") :] if word.startswith("--"))


def initialize(config: dict[str, Any], etc: Path, memory: Path) -> subprocess.CompletedProcess[str]:
    """Run the initialization commands as `ray up` would, on other paths."""
    last = subprocess.CompletedProcess[str]([], 0)
    for command in config["initialization_commands"]:
        here = command.replace(SECRETS, str(etc)).replace(MEMORY, str(memory))
        assert here != command
        # command_runner._with_interactive wraps a command like this
        last = subprocess.run(
            ["bash", "-c", f"export OMP_NUM_THREADS=1 && ({here})"], capture_output=True, text=True, check=False
        )
        if last.returncode:
            break
    return last


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    directory = tmp_path / "etc"
    directory.mkdir()
    for name, mode in (("token", 0o600), ("tls.key", 0o600), ("tls.crt", 0o644), ("ca.crt", 0o644)):
        (directory / name).write_text("x" * 64)
        (directory / name).chmod(mode)
    return directory


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "memory"


def test_ray_up_takes_the_file(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    resolved = bootstrap_config(config, no_config_cache=True)  # all that `ray up` does before it contacts a host
    (node_type,) = resolved["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(config["provider"]["worker_ips"])
    for role in ROLES:  # none of these falls back to Ray's defaults
        assert resolved[f"{role}_start_ray_commands"] == config[f"{role}_start_ray_commands"]


def test_the_schema_check_would_have_seen_a_mistake(config: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        bootstrap_config(config | {"initialisation_commands": []}, no_config_cache=True)


def test_every_option_is_one_that_this_ray_has(config: dict[str, Any]) -> None:
    from ray.scripts.scripts import start as ray_start

    known = {name for parameter in ray_start.params for name in parameter.opts}
    for role in ROLES:
        assert {f"--{name}" for name in options(config, role)} <= known


def test_complete_node_passes_its_checks(config: dict[str, Any], etc: Path, memory: Path) -> None:
    for _ in range(2):  # a second `ray up` finds the directory there
        result = initialize(config, etc, memory)
        assert result.returncode == 0, result.stderr
    assert memory.stat().st_mode & 0o777 == 0o700


def test_cluster_without_token_file_does_not_start(config: dict[str, Any], etc: Path, memory: Path) -> None:
    (etc / "token").unlink()
    result = initialize(config, etc, memory)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert not memory.exists()


@pytest.mark.parametrize("name", ["token", "tls.key"])
def test_cluster_with_a_secret_that_others_can_read_does_not_start(
    config: dict[str, Any], etc: Path, memory: Path, name: str
) -> None:
    (etc / name).chmod(0o640)
    assert initialize(config, etc, memory).returncode == 1


def test_cluster_with_a_guessable_token_does_not_start(config: dict[str, Any], etc: Path, memory: Path) -> None:
    (etc / "token").write_text("short")
    assert initialize(config, etc, memory).returncode == 1


def test_cluster_with_a_linked_token_does_not_start(config: dict[str, Any], etc: Path, memory: Path) -> None:
    (etc / "token").rename(etc / "elsewhere")
    (etc / "token").symlink_to(etc / "elsewhere")
    assert initialize(config, etc, memory).returncode == 1


@pytest.mark.parametrize("name", ["ca.crt", "tls.crt", "tls.key"])
def test_cluster_without_certificates_does_not_start(
    config: dict[str, Any], etc: Path, memory: Path, name: str
) -> None:
    (etc / name).unlink()
    assert initialize(config, etc, memory).returncode == 1


def test_cluster_that_would_write_to_a_disk_does_not_start(config: dict[str, Any], etc: Path, memory: Path) -> None:
    on_disk = [command.replace("/dev/shm)", "/proc)") for command in config["initialization_commands"]]  # noqa: S108
    assert on_disk != config["initialization_commands"]
    assert initialize({"initialization_commands": on_disk}, etc, memory).returncode == 1
    assert not memory.exists()


def test_cluster_below_a_directory_that_others_can_enter_does_not_start(
    config: dict[str, Any], etc: Path, memory: Path
) -> None:
    memory.mkdir()
    memory.chmod(0o755)
    assert initialize(config, etc, memory).returncode == 1


def test_cluster_below_a_link_that_somebody_else_planted_does_not_start(
    config: dict[str, Any], etc: Path, memory: Path
) -> None:
    elsewhere = memory.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    memory.symlink_to(elsewhere)
    assert initialize(config, etc, memory).returncode == 1


@pytest.mark.parametrize("role", ROLES)
def test_checks_are_not_skipped_when_ray_believes_a_node_is_up_to_date(config: dict[str, Any], role: str) -> None:
    checks = config["initialization_commands"]
    assert config[f"{role}_start_ray_commands"][: len(checks)] == checks


@pytest.mark.parametrize("role", ROLES)
def test_hardening_does_not_fall_behind_that_of_one_machine(config: dict[str, Any], role: str) -> None:
    set_here = environment(config, role)
    for name in RAY_ENVIRONMENT.keys() - NEEDED_HERE:
        assert set_here[name] == RAY_ENVIRONMENT[name]
    assert not NEEDED_HERE & set_here.keys()
    assert set_here["AUTOSCALER_METRIC_PORT"] == "-1"
    module, _, function = set_here["RAY_START_HOOK"].rpartition(".")
    assert callable(getattr(sys.modules[module], function))
    assert "disable-usage-stats" in options(config, role)
    assert options(config, role)["include-log-monitor"] == "false"


def test_plaintext_is_not_spilled_and_metrics_are_not_served(config: dict[str, Any]) -> None:
    assert json.loads(options(config, "head")["system-config"]) == SYSTEM_CONFIG


@pytest.mark.parametrize("role", ROLES)
def test_token_and_key_are_named_by_path_only(config: dict[str, Any], role: str) -> None:
    set_here = environment(config, role)
    assert set_here["RAY_AUTH_TOKEN_PATH"] == f"{SECRETS}/token"
    assert "RAY_AUTH_TOKEN" not in set_here
    assert {Path(value).parent for name, value in set_here.items() if name.startswith("RAY_TLS_")} == {Path(SECRETS)}
    assert {name for name in set_here if name.startswith("RAY_TLS_")} == {
        "RAY_TLS_CA_CERT",
        "RAY_TLS_SERVER_CERT",
        "RAY_TLS_SERVER_KEY",
    }


@pytest.mark.parametrize("role", ROLES)
def test_files_of_ray_are_private_and_in_memory(config: dict[str, Any], role: str) -> None:
    lines = start(config, role).splitlines()
    assert lines[0] == "set -e; umask 077; ulimit -c 0"
    assert f"cd {MEMORY}; rm -rf r home tmp spill; mkdir home tmp spill" in lines
    for name in ("temp-dir", "plasma-directory", "object-spilling-directory"):
        assert re.fullmatch(r"\$PWD(/\w+)?", options(config, role)[name])
    assert {environment(config, role)[name] for name in ("HOME", "TMPDIR")} == {"$PWD/home", "$PWD/tmp"}
    longest = f"{MEMORY}/r/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
    assert len(longest) <= 107  # unix(7)


@pytest.mark.parametrize("role", ROLES)
def test_login_shells_secrets_do_not_reach_the_jobs(config: dict[str, Any], role: str, tmp_path: Path) -> None:
    """Run the command with a `ray` that prints its environment, and the kind of variables that Ray needs to get in."""
    (tmp_path / "ray").write_text("#!/bin/sh\nenv\nulimit -c\numask\n")
    (tmp_path / "ray").chmod(0o755)
    out = subprocess.run(
        ["bash", "-c", start(config, role).replace(MEMORY, str(tmp_path))],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "AWS_SECRET_ACCESS_KEY": "planted",
            "RAY_AUTH_TOKEN": "planted",
            "RAY_NODE_TYPE_NAME": "local.cluster.node",
            "RAY_CLOUD_INSTANCE_ID": "192.0.2.11",
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "planted" not in out
    assert "RAY_NODE_TYPE_NAME=local.cluster.node\n" in out
    assert "RAY_CLOUD_INSTANCE_ID=192.0.2.11\n" in out
    assert out.endswith("0\n0077\n")


def test_api_server_is_not_offered_to_the_network(config: dict[str, Any]) -> None:
    assert options(config, "head")["dashboard-host"] == "127.0.0.1"
    for role in ROLES:
        assert "ray-client-server-port" not in options(config, role)  # the hook leaves it out; Ray refuses a zero
        assert "ray-debugger-external" not in options(config, role)


def test_head_does_not_choose_an_outside_interface(config: dict[str, Any]) -> None:
    head = config["provider"]["head_ip"]
    assert options(config, "head")["node-ip-address"] == head
    assert options(config, "worker")["address"] == f"{head}:{options(config, 'head')['port']}"


@pytest.mark.parametrize("role", ROLES)
def test_no_port_is_random_so_that_a_firewall_can_name_them(config: dict[str, Any], role: str) -> None:
    given = options(config, role)
    names = ["node-manager-port", "object-manager-port", "runtime-env-agent-port", "dashboard-agent-listen-port"]
    ports = [int(given[name]) for name in [*names, "dashboard-agent-grpc-port", "min-worker-port", "max-worker-port"]]
    assert len(set(ports)) == len(ports)
    assert min(ports) > 0


def test_ray_up_copies_no_key_and_no_secret_to_the_head(config: dict[str, Any]) -> None:
    resolved = bootstrap_config(config, no_config_cache=True)
    assert resolved["cluster_synced_files"] == []
    provider = LocalNodeProvider.__new__(LocalNodeProvider)  # its constructor writes to /tmp/ray
    sent, file = _set_up_config_for_head_node(resolved, provider, no_restart=False)
    file.close()
    assert list(sent["file_mounts"]) == ["~/ray_bootstrap_config.yaml"]


def test_file_holds_no_secret_and_no_real_machine() -> None:
    text = PATH.read_text()
    for address in re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text):
        assert address == "127.0.0.1" or ipaddress.ip_address(address) in DOCUMENTATION
    assert "-----BEGIN" not in text
    # A run of letters and digits as long as a token or key, other than a name in words.
    for run in re.findall(r"[A-Za-z0-9+=]{24,}", text):
        assert not re.search(r"\d", run), run
    assert not re.search(r"(?i)(password|secret|token|api_?key)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{8,}", text)


def test_exclusions_cover_what_must_never_be_copied(config: dict[str, Any]) -> None:
    assert config["file_mounts"] == {}
    assert {"**/token", "**/*.key", "**/*.pem", "**/.ssh/**"} <= set(config["rsync_exclude"])
