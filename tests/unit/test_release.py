"""A replica's own verification: each step has a test that fails if the step is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cloister.canonical import sha256_hex
from cloister.errors import ApprovalMissingError, InputError, IntegrityError
from cloister.models.manifest import MANIFEST_FILE, MODEL_FILE
from cloister.models.release import APPROVAL_PREDICATE, APPROVERS_PREDICATE, PROVENANCE_PREDICATE
from cloister.serving.release import Release, VerifiedModel, verify_release
from cloister.signing import dsse, keys, oms
from serving_world import (
    ANA,
    BEN,
    CY,
    MODEL,
    NOW,
    RELEASE_KEY,
    Person,
    approval,
    changed,
    directory,
    manifest,
    onnx_model,
    root_of,
    signed_release,
    statement,
)

GOOD = signed_release()
ROOT = root_of(GOOD.model_onnx, GOOD.manifest)
OTHER_ROOT = sha256_hex(b"another model")
RELEASE_PEM = keys.public_to_pem(RELEASE_KEY.public_key())
FOREIGN = keys.generate_p256()


def verify(release: Release, *, required: int = 2, name: str = MODEL, key: bytes = RELEASE_PEM) -> VerifiedModel:
    return verify_release(release, name=name, release_key_pem=key, required_approvals=required, now=NOW)


def flip(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


def resigned(model_onnx: bytes | None = None, manifest_bytes: bytes | None = None) -> Release:
    return signed_release(model_onnx, manifest_bytes)


def test_a_good_release_is_returned_with_what_it_proved() -> None:
    model = verify(GOOD)
    assert (model.root_digest, model.author, model.approved_by) == (ROOT, "ana", ("ben", "cy"))
    assert model.provenance["run"] == "run-1"
    features = np.zeros((1, model.encoder.width), dtype=np.float32)
    assert model.scorer.probabilities(features).argmax() == 0


class TestModelSignature:  # step 1
    @pytest.mark.parametrize("index", [0, 40, -1])
    def test_a_changed_model_byte(self, index: int) -> None:
        with pytest.raises(IntegrityError):
            verify(changed(GOOD, model_onnx=flip(GOOD.model_onnx, index % len(GOOD.model_onnx))))

    def test_a_changed_manifest(self) -> None:
        with pytest.raises(IntegrityError):
            verify(changed(GOOD, manifest=GOOD.manifest.replace(b'"yes"', b'"yep"')))
        with pytest.raises(IntegrityError):
            verify(changed(GOOD, manifest=GOOD.manifest + b"\n"))

    def test_a_bundle_by_a_foreign_key(self) -> None:
        files = {MODEL_FILE: sha256_hex(GOOD.model_onnx), MANIFEST_FILE: sha256_hex(GOOD.manifest)}
        with pytest.raises(IntegrityError):
            verify(changed(GOOD, bundle=oms.sign_model(MODEL, files, FOREIGN)))

    @pytest.mark.parametrize("extra", [{}, {"run.py": sha256_hex(b"evil")}])
    def test_a_bundle_over_other_files(self, extra: dict[str, str]) -> None:
        files = {MODEL_FILE: sha256_hex(GOOD.model_onnx)} | extra
        with pytest.raises(IntegrityError):
            verify(changed(GOOD, bundle=oms.sign_model(MODEL, files, RELEASE_KEY)))

    def test_an_old_bundle_with_a_new_model(self) -> None:
        newer = resigned(manifest_bytes=manifest(run="run-2"))
        with pytest.raises(IntegrityError):
            verify(changed(newer, bundle=GOOD.bundle))

    def test_all_of_it_by_a_foreign_key(self) -> None:
        with pytest.raises(IntegrityError):
            verify(GOOD, key=keys.public_to_pem(FOREIGN.public_key()))


@pytest.mark.parametrize("what", ["provenance", "directory"])
class TestStatementsOfTheReleaseKey:  # steps 2 and 3
    def predicate(self, what: str) -> tuple[str, dict[str, Any]]:
        if what == "provenance":
            return PROVENANCE_PREDICATE, {"author": "ana"}
        return APPROVERS_PREDICATE, {"author": ANA.entry, "approvers": [BEN.entry, CY.entry]}

    def test_by_a_foreign_key(self, what: str) -> None:
        kind, predicate = self.predicate(what)
        with pytest.raises(IntegrityError):
            verify(changed(GOOD, **{what: statement(kind, ROOT, predicate, FOREIGN)}))

    def test_by_an_approvers_key(self, what: str) -> None:
        kind, predicate = self.predicate(what)
        with pytest.raises(IntegrityError):
            verify(changed(GOOD, **{what: statement(kind, ROOT, predicate, BEN.key)}))

    def test_about_another_digest(self, what: str) -> None:
        kind, predicate = self.predicate(what)
        with pytest.raises(IntegrityError):
            verify(changed(GOOD, **{what: statement(kind, OTHER_ROOT, predicate)}))

    def test_of_another_kind(self, what: str) -> None:
        _, predicate = self.predicate(what)
        with pytest.raises(IntegrityError):
            verify(changed(GOOD, **{what: statement("https://cloister.dev/other/v1", ROOT, predicate)}))

    @pytest.mark.parametrize("envelope", [{}, {"payload": "e30=", "signatures": []}])
    def test_missing(self, what: str, envelope: dict[str, Any]) -> None:
        with pytest.raises(IntegrityError):
            verify(changed(GOOD, **{what: envelope}))


class TestDirectory:  # step 3
    def test_another_author_than_in_the_provenance(self) -> None:
        """Else a directory that swaps two names lets the author approve."""
        swapped = directory(ROOT, (ANA, CY), author=BEN)
        with pytest.raises(IntegrityError, match="different authors"):
            verify(changed(GOOD, directory=swapped, approvals=[approval(ROOT, ANA), approval(ROOT, CY)]))

    @pytest.mark.parametrize(
        "predicate",
        [
            {},
            {"author": ANA.entry},
            {"author": ANA.entry, "approvers": [{"person": "ben"}]},
            {"author": ANA.entry, "approvers": [BEN.entry | {"person": ""}]},
            {"author": ANA.entry, "approvers": [BEN.entry | {"public_key": "no key"}]},
            {"author": ANA.entry, "approvers": [BEN.entry | {"public_key": RELEASE_PEM.decode()}]},
            {"author": ANA.entry, "approvers": 7},
        ],
    )
    def test_that_is_not_usable(self, predicate: dict[str, Any]) -> None:
        with pytest.raises(IntegrityError):
            verify(changed(GOOD, directory=statement(APPROVERS_PREDICATE, ROOT, predicate)))


class TestApprovals:  # step 4
    def test_missing(self) -> None:
        with pytest.raises(ApprovalMissingError, match="0 of 2"):
            verify(changed(GOOD, approvals=[]))
        with pytest.raises(ApprovalMissingError, match="1 of 2"):
            verify(changed(GOOD, approvals=GOOD.approvals[:1]))
        with pytest.raises(ApprovalMissingError):
            verify(changed(GOOD, directory=directory(ROOT, ()), approvals=[]), required=1)

    def test_the_authors_own(self) -> None:
        with pytest.raises(ApprovalMissingError, match="1 of 2"):
            verify(changed(GOOD, approvals=[approval(ROOT, BEN), approval(ROOT, ANA)]))
        with pytest.raises(IntegrityError):  # nor can the directory make an approver of the author
            verify(changed(GOOD, directory=directory(ROOT, (BEN, ANA)), approvals=[approval(ROOT, ANA)]), required=1)
        alias = Person("ana-too", ANA.key)
        with pytest.raises(IntegrityError):
            verify(changed(GOOD, directory=directory(ROOT, (alias,)), approvals=[approval(ROOT, alias)]), required=1)

    def test_the_same_person_twice(self) -> None:
        with pytest.raises(ApprovalMissingError, match="1 of 2"):
            verify(changed(GOOD, approvals=[approval(ROOT, BEN), approval(ROOT, BEN, approval="apr-2")]))

    def test_the_same_person_with_two_keys(self) -> None:
        second = Person("ben")
        release = changed(
            GOOD, directory=directory(ROOT, (BEN, second)), approvals=[approval(ROOT, BEN), approval(ROOT, second)]
        )
        with pytest.raises(IntegrityError, match="one key"):
            verify(release)

    def test_the_same_key_under_two_names(self) -> None:
        alias = Person("ben-too", BEN.key)
        release = changed(
            GOOD, directory=directory(ROOT, (BEN, alias)), approvals=[approval(ROOT, BEN), approval(ROOT, alias)]
        )
        with pytest.raises(IntegrityError):
            verify(release)

    @pytest.mark.parametrize(
        "fault",
        [
            {"expires": int(NOW)},
            {"expires": int(NOW) - 1},
            {"expires": None},
            {"expires": "9999999999"},
            {"expires": True},
            {"decision": "deny"},
            {"decision": None},
            {"about": {"stage": "staging"}},
            {"about": {"stage": None}},
            {"kind": "training"},
            {"kind": None},
            {"details": None},
            {"details": ["production"]},
            {"person": "ben"},
            {"person": "ana"},
            {"person": None},
            {"about": {"provenance": "0" * 64}},
            {"about": {"provenance": None}},
        ],
    )
    def test_expired_or_saying_something_else(self, fault: dict[str, Any]) -> None:
        with pytest.raises(ApprovalMissingError, match="1 of 2"):
            verify(changed(GOOD, approvals=[approval(ROOT, BEN), approval(ROOT, CY, **fault)]))

    def test_for_another_digest(self) -> None:
        with pytest.raises(ApprovalMissingError):
            verify(changed(GOOD, approvals=[approval(ROOT, BEN), approval(OTHER_ROOT, CY)]))

    def test_of_another_kind(self) -> None:
        said = dsse.strict_json(dsse.unb64(approval(ROOT, CY)["payload"]))["predicate"]
        with pytest.raises(ApprovalMissingError):
            verify(changed(GOOD, approvals=[approval(ROOT, BEN), statement(PROVENANCE_PREDICATE, ROOT, said, CY.key)]))

    def test_by_somebody_who_is_not_in_the_directory(self) -> None:
        with pytest.raises(ApprovalMissingError):
            verify(changed(GOOD, approvals=[approval(ROOT, BEN), approval(ROOT, Person("eve"))]))

    def test_by_the_release_key_in_an_approvers_name(self) -> None:
        said = dsse.strict_json(dsse.unb64(approval(ROOT, CY)["payload"]))["predicate"]
        forged = statement(APPROVAL_PREDICATE, ROOT, said)
        with pytest.raises(ApprovalMissingError):
            verify(changed(GOOD, approvals=[approval(ROOT, BEN), forged]))

    def test_a_second_signature_does_not_speak_for_another_person(self) -> None:
        mine = approval(ROOT, BEN)
        payload = dsse.unb64(mine["payload"])
        both = mine | {"signatures": [*mine["signatures"], *dsse.sign(payload, CY.key)["signatures"]]}
        with pytest.raises(ApprovalMissingError, match="1 of 2"):
            verify(changed(GOOD, approvals=[both]))

    def test_garbage_among_them_spoils_nothing(self) -> None:
        assert verify(changed(GOOD, approvals=[{}, *GOOD.approvals, {"payload": 7}])).approved_by == ("ben", "cy")

    @pytest.mark.parametrize("required", [0, -1])
    def test_none_required_is_refused(self, required: int) -> None:
        with pytest.raises(InputError):
            verify(GOOD, required=required)


class TestModel:  # step 5
    def test_of_another_name(self) -> None:
        with pytest.raises(IntegrityError):
            verify(GOOD, name="another")

    @pytest.mark.parametrize("model_onnx", [b"not onnx", onnx_model(3), onnx_model(4, classes=3)])
    def test_that_does_not_load_or_fit_the_manifest(self, model_onnx: bytes) -> None:
        with pytest.raises(IntegrityError):
            verify(resigned(model_onnx))

    @pytest.mark.parametrize(
        "change",
        [
            {"labels": ["no"]},
            {"labels": ["no", "no"]},
            {"features": []},
            {"features": [{"name": "x"}]},
            {"features": [{"name": "x", "type": "text", "class": "public"}]},
            {"features": [{"name": "x", "type": "category", "class": "public", "values": ["a", "b"]}] * 2},
        ],
    )
    def test_with_a_manifest_that_makes_no_sense(self, change: dict[str, Any]) -> None:
        with pytest.raises(IntegrityError):
            verify(resigned(manifest_bytes=manifest(**change)))

    def test_whose_weights_lie_in_another_file(self, tmp_path: Any) -> None:
        import onnx

        model = onnx.load_from_string(GOOD.model_onnx)
        onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
        with pytest.raises(IntegrityError):
            verify(resigned((tmp_path / "m.onnx").read_bytes()))
