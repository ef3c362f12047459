"""The tree against the vectors of RFC 6962's reference implementation, and against every small tree."""

from __future__ import annotations

import json

import pytest

from cloister.audit import merkle
from cloister.errors import InputError, IntegrityError

LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
# certificate-transparency-go and certificate-transparency, merkletree tests: the root after each leaf.
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
# The same tests' audit paths (leaf, size) and consistency proofs (first, second).
PATHS = {
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
}
CONSISTENCY = {
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
HASHES = [merkle.leaf_hash(bytes.fromhex(leaf)) for leaf in LEAVES]
MANY = [merkle.leaf_hash(str(index).encode()) for index in range(40)]


def nodes(leaves: list[bytes]) -> merkle.NodeHash:
    """The naive hashes of perfect subtrees; there is none beyond the leaves."""

    def node(height: int, index: int) -> bytes:
        covered = leaves[index << height : (index + 1) << height]
        assert len(covered) == 1 << height
        return merkle.root_of(covered)

    return node


def inclusion_proof(leaves: list[bytes], index: int) -> list[bytes]:
    return merkle.inclusion_proof(index, len(leaves), nodes(leaves))


def consistency_proof(leaves: list[bytes], first: int) -> list[bytes]:
    return merkle.consistency_proof(first, len(leaves), nodes(leaves))


def test_the_empty_tree_has_the_root_of_the_specification() -> None:
    assert merkle.CompactTree().root().hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_the_roots_are_those_of_the_reference() -> None:
    tree = merkle.CompactTree()
    for index, (leaf, root) in enumerate(zip(LEAVES, ROOTS, strict=True)):
        assert tree.append(bytes.fromhex(leaf)) == index
        assert tree.root().hex() == root == merkle.root_of(HASHES[: index + 1]).hex()
    assert tree.size == 8


@pytest.mark.parametrize(("place", "path"), PATHS.items())
def test_the_audit_paths_are_those_of_the_reference(place: tuple[int, int], path: list[str]) -> None:
    assert [node.hex() for node in inclusion_proof(HASHES[: place[1]], place[0])] == path


@pytest.mark.parametrize(("sizes", "path"), CONSISTENCY.items())
def test_the_consistency_proofs_are_those_of_the_reference(sizes: tuple[int, int], path: list[str]) -> None:
    assert [node.hex() for node in consistency_proof(HASHES[: sizes[1]], sizes[0])] == path


def test_a_stored_tree_goes_on_where_it_stopped() -> None:
    tree = merkle.CompactTree()
    for size, leaf in enumerate(MANY):
        tree = merkle.CompactTree.from_hex(size, json.loads(json.dumps(tree.to_hex())))
        tree.append_hash(leaf)
        assert tree.root() == merkle.root_of(MANY[: size + 1])
        assert len(tree.to_hex()) == (size + 1).bit_count()


@pytest.mark.parametrize(
    ("size", "peaks"), [(1, []), (0, ["00" * 32]), (3, ["00" * 32]), (1, ["00"]), (1, ["zz"]), (-1, [])]
)
def test_a_stored_tree_that_does_not_fit_its_size_is_refused(size: int, peaks: list[str]) -> None:
    with pytest.raises(IntegrityError):
        merkle.CompactTree.from_hex(size, peaks)


def test_every_inclusion_proof_holds_and_no_changed_one_does() -> None:
    for size in range(1, 20):
        hashes, root = MANY[:size], merkle.root_of(MANY[:size])
        for index in range(size):
            proof = inclusion_proof(hashes, index)
            merkle.verify_inclusion(hashes[index], index, size, proof, root)
            wrong: list[tuple[bytes, int, int, list[bytes], bytes]] = [
                (MANY[size], index, size, proof, root),
                (hashes[index], index, size, [*proof, root], root),
                (hashes[index], index, size, [root, *proof], root),
                (hashes[index], index, size, proof, merkle.EMPTY_ROOT),
                (hashes[index], size, size, proof, root),
                (hashes[index], -1, size, proof, root),
                (hashes[index][:31], index, size, proof, root),
            ]
            wrong += [(hashes[index], other, size, proof, root) for other in range(size) if other != index]
            wrong += [(hashes[index], index, size, proof[:cut], root) for cut in range(len(proof))]
            wrong += [
                (hashes[index], index, size, [*proof[:at], MANY[30], *proof[at + 1 :]], root)
                for at in range(len(proof))
            ]
            for arguments in wrong:
                with pytest.raises(IntegrityError):
                    merkle.verify_inclusion(*arguments)


def test_every_consistency_proof_holds_and_no_changed_one_does() -> None:
    roots = [merkle.root_of(MANY[:size]) for size in range(20)]
    for second in range(20):
        for first in range(second + 1):
            proof = consistency_proof(MANY[:second], first)
            merkle.verify_consistency(first, second, roots[first], roots[second], proof)
            wrong: list[tuple[int, int, bytes, bytes, list[bytes]]] = [
                (first, second, MANY[30], roots[second], proof),
                (first, second, roots[first], roots[second], [*proof, MANY[30]]),
                (second + 1, second, roots[first], roots[second], proof),
                (-1, second, roots[first], roots[second], proof),
            ]
            if first:
                wrong += [(first, second, roots[first], MANY[30], proof)]
            wrong += [(first, second, roots[first], roots[second], proof[:cut]) for cut in range(len(proof))]
            wrong += [
                (first, second, roots[first], roots[second], [*proof[:at], MANY[30], *proof[at + 1 :]])
                for at in range(len(proof))
            ]
            for arguments in wrong:
                with pytest.raises(IntegrityError):
                    merkle.verify_consistency(*arguments)


def test_a_proof_for_one_size_does_not_pass_for_a_larger_one() -> None:
    roots = {size: merkle.root_of(MANY[:size]) for size in (4, 8)}
    proof = consistency_proof(MANY[:8], 4)
    merkle.verify_consistency(4, 8, roots[4], roots[8], proof)
    with pytest.raises(IntegrityError):
        merkle.verify_consistency(4, 16, roots[4], roots[8], proof)
    path = inclusion_proof(MANY[:8], 0)
    with pytest.raises(IntegrityError):
        merkle.verify_inclusion(MANY[0], 0, 16, path, roots[8])


def test_a_node_does_not_pass_for_a_leaf() -> None:
    with pytest.raises(IntegrityError):
        merkle.verify_inclusion(merkle.leaf_hash(HASHES[0] + HASHES[1]), 0, 1, [], merkle.root_of(HASHES[:2]))


def test_there_is_no_proof_of_what_is_not_there() -> None:
    for index in (-1, 8):
        with pytest.raises(InputError):
            inclusion_proof(HASHES, index)
    for size in (-1, 9):
        with pytest.raises(InputError):
            consistency_proof(HASHES, size)


def test_the_root_of_every_beginning_comes_from_perfect_subtrees() -> None:
    for size in range(len(MANY) + 1):
        assert merkle.root_from(size, nodes(MANY)) == merkle.root_of(MANY[:size])


def test_each_perfect_subtree_is_told_of_once_when_it_is_complete() -> None:
    told: dict[tuple[int, int], bytes] = {}
    tree = merkle.CompactTree()
    for leaf in MANY:
        before = len(told)
        tree.append_hash(leaf, lambda height, index, value: told.update({(height, index): value}))
        assert len(told) - before == (tree.size & -tree.size).bit_length() - 1
    assert told == {
        (height, index): nodes(MANY)(height, index) for height in range(1, 6) for index in range(len(MANY) >> height)
    }
