"""What two reviews of the whole found: each stays found."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
import torch
from torch import nn

from authority_world import Person, World, adult_schema, blocks_of_adult, training_spec
from cloister.authority.core import Caller
from cloister.client.seal import seal_dataset, signed_manifest
from cloister.errors import CloisterError, InputError, IntegrityError, PermissionDeniedError, UnavailableError
from cloister.privacy.grid import SLACK, Grid
from cloister.privacy.opacus_engine import OpacusGradients
from cloister.privacy.spec import TrainingSpec
from cloister.signing import certificates


def seal_again(world: World, client: Any, holdout: float = 0.2) -> dict[str, Any]:
    return seal_dataset(
        client, world.people["olga"].private, blocks_of_adult(), adult_schema(), shards=2, holdout=holdout,
        receiving_key=world.authority.receiving_public,
    )  # fmt: skip


def test_a_lost_answer_does_not_lose_a_registered_dataset(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    client = world.client("olga")
    post = client.post

    def post_and_lose_the_answer(path: str, body: Any = None) -> Any:
        answer = post(path, body)
        if path == "/v1/datasets":
            raise UnavailableError("the connection broke", "try again")
        return answer

    monkeypatch.setattr(client, "post", post_and_lose_the_answer)
    assert seal_again(world, client)["dataset"] == "adult@2"
    manifest = world.get("olga", "/v1/datasets/adult/versions/2")["manifest"]
    blobs = world.directory / "blobs"
    assert all((blobs / file["path"]).is_file() for file in manifest["files"])


def test_a_refused_dataset_leaves_no_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    client = world.client("olga")
    before = sorted((world.directory / "blobs").rglob("*.parquet"))
    monkeypatch.setattr("cloister.client.upload.new_key", lambda: b"k" * 32)  # one key for all files: refused
    with pytest.raises(CloisterError):
        seal_again(world, client)
    assert sorted((world.directory / "blobs").rglob("*.parquet")) == before


def test_a_dataset_without_holdout_is_not_planned_for(world: World) -> None:
    seal_again(world, world.client("olga"), holdout=0.0)
    with world.still("failure"):
        answer = world.ask("ed", "POST", "/v1/plans", {"spec": training_spec(dataset="adult@2")})
        assert answer.status_code == 400
        assert "holdout" in answer.json()["error"]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("purpose", {"purpose": "marketing"}),
        ("region", {"resources": {"workers": 2, "region": "us"}}),
        ("GPUs", {"resources": {"workers": 2, "region": "eu", "gpus_per_worker": 1}}),
        ("epsilon", {"privacy": {"epsilon": 1000.0, "delta": 1e-5}}),
        ("delta", {"privacy": {"epsilon": 1.0, "delta": 1e-300}}),
    ],
)
def test_a_plan_that_the_dataset_or_the_accountants_cannot_bear_is_refused(
    world: World, field: str, changes: dict[str, Any]
) -> None:
    answer = world.ask("ed", "POST", "/v1/plans", {"spec": training_spec(**changes)})
    assert answer.status_code == 400
    assert field in answer.json()["error"]


def test_epsilon_has_an_upper_end() -> None:
    with pytest.raises(InputError):
        TrainingSpec.parse(training_spec(privacy={"epsilon": 20.1, "delta": 1e-5}))


def test_an_endpoint_cannot_pass_for_the_authority(world: World) -> None:
    """Its certificate does not chain to the CA that clients of the authority trust."""
    world.train()
    world.release()
    workload = Person("endpoint", [])
    given = world.post("operator", "/v1/endpoints", world.deploy_body(workload))
    leaf = ssl.PEM_cert_to_DER_cert(given["certificate"])
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    certificate = x509.load_der_x509_certificate(leaf)
    for pem, good in ((world.authority.endpoint_ca, True), (world.authority.ca_certificate, False)):
        public = x509.load_pem_x509_certificate(pem).public_key()
        try:
            public.verify(  # type: ignore[union-attr,call-arg]
                certificate.signature,
                certificate.tbs_certificate_bytes,
                ECDSA(certificate.signature_hash_algorithm),  # type: ignore[arg-type]
            )
            held = True
        except Exception:  # noqa: BLE001  (whatever says no)
            held = False
        assert held is good
    assert certificates.covers(given["certificate"].encode(), "127.0.0.1")


def test_a_manifest_that_its_owner_did_not_sign_is_not_used(world: World) -> None:
    shown = world.get("olga", "/v1/datasets/adult/versions/1")
    assert signed_manifest(shown["envelope"], shown["owner_key"]).version == 1
    with pytest.raises(IntegrityError):
        signed_manifest(shown["envelope"], world.people["ed"].public)


@pytest.mark.parametrize("block", ["action", "unlogged"])
def test_a_block_that_asks_no_policy_commits_nothing(world: World, block: str) -> None:
    ed = Caller(name="ed", roles=frozenset({"engineer"}))
    with (
        pytest.raises(PermissionDeniedError, match="asked no policy"),
        getattr(world.authority.core, block)(ed, "run:read"),
    ):
        pass


def test_one_row_among_thousands_moves_the_sum_by_no_more_than_the_noise_allows_for() -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 2)
    x, y = torch.rand(1, 40).repeat(3000, 1) * 50, torch.zeros(3000, dtype=torch.int64)
    y[:] = int(model(x[:1]).argmin())  # all wrong, all alike: every gradient is clipped and points the same way
    clipped = OpacusGradients(model, Grid.of(1.0, 3000))
    moved = (clipped(x, y) - clipped(x[1:], y[1:])).norm()
    assert 0.99 < float(moved) <= 1.0 + SLACK
