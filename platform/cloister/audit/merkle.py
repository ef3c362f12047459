"""The Merkle tree over the log: RFC 6962, section 2.1; the proof checks follow RFC 9162, sections 2.1.3.2 and 2.1.4.2.

Guarantees: a root commits to every entry and to their order; `verify_inclusion` and `verify_consistency` return only
when the proof is right. Leaves and nodes are hashed under different prefixes, so one never passes for the other.

Does not guarantee: that the root is the one that other people saw. Checkpoints, kept by somebody else, do that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from cloister.errors import InputError, IntegrityError

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()  # RFC 6962, section 2.1: MTH({}) = SHA-256()

# The root of a perfect subtree: (height, index) covers the leaves index * 2**height up to (index + 1) * 2**height.
Node = tuple[int, int]
NodeHash = Callable[[int, int], bytes]


def leaf_hash(entry: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class CompactTree:
    """The right edge of a tree: enough to append to it and to know its root, in O(log n) space and time.

    `peaks` are the roots of the perfect subtrees that make up the tree, the largest (leftmost) first: one for each
    1 bit of `size`. To keep it in a database row, store `size` and `to_hex()`.
    """

    __slots__ = ("_peaks", "_size")

    def __init__(self, size: int = 0, peaks: Sequence[bytes] = ()) -> None:
        if size < 0 or len(peaks) != size.bit_count() or any(len(peak) != HASH_BYTES for peak in peaks):
            raise IntegrityError("this is not the state of a tree of that size", "rebuild it from the log's entries")
        self._size = size
        self._peaks = list(peaks)

    @property
    def size(self) -> int:
        return self._size

    def append(self, entry: bytes) -> int:
        """Add an entry; return its index, counted from 0."""
        return self.append_hash(leaf_hash(entry))

    def append_hash(self, leaf: bytes, completed: Callable[[int, int, bytes], None] | None = None) -> int:
        """Add an entry of which only the leaf hash is known; return its index.

        `completed(height, index, hash)` is called for each subtree above the leaf that this entry makes perfect.
        """
        if len(leaf) != HASH_BYTES:
            raise InputError("a leaf hash has 32 bytes", "make it with leaf_hash(entry)")
        node, index, peaks = leaf, self._size, self._peaks
        for height in range(1, _trailing_ones(index) + 1):
            node = node_hash(peaks.pop(), node)
            if completed is not None:
                completed(height, index >> height, node)
        peaks.append(node)
        self._size += 1
        return index

    def root(self) -> bytes:
        if not self._peaks:
            return EMPTY_ROOT
        node = self._peaks[-1]
        for peak in reversed(self._peaks[:-1]):
            node = node_hash(peak, node)
        return node

    def nodes(self) -> dict[Node, bytes]:
        """The perfect subtrees that make up the tree, with their hashes."""
        return dict(zip(_perfect(0, self._size), self._peaks, strict=True))

    def to_hex(self) -> list[str]:
        return [peak.hex() for peak in self._peaks]

    @classmethod
    def from_hex(cls, size: int, peaks: Sequence[str]) -> CompactTree:
        """Rebuild the tree that had `size` and `to_hex()`.

        Raises:
            IntegrityError: the two do not fit together.
        """
        try:
            return cls(size, [bytes.fromhex(peak) for peak in peaks])
        except ValueError:
            raise IntegrityError("the stored tree is not hexadecimal", "rebuild it from the log's entries") from None


def root_of(leaf_hashes: Iterable[bytes]) -> bytes:
    """The root of the tree with these leaf hashes (not entries: see `leaf_hash`)."""
    tree = CompactTree()
    for leaf in leaf_hashes:
        tree.append_hash(leaf)
    return tree.root()


def perfect_root(hashes: Sequence[bytes]) -> bytes:
    """The root of as many leaves, or of nodes of one height, as a power of two."""
    while len(hashes) > 1:
        hashes = [node_hash(left, right) for left, right in zip(hashes[::2], hashes[1::2], strict=True)]
    return hashes[0]


def root_from(size: int, node: NodeHash) -> bytes:
    """The root of the first `size` leaves, from the hashes of O(log n) perfect subtrees."""
    return _fold(_perfect(0, size), node)


def inclusion_proof(index: int, size: int, node: NodeHash) -> list[bytes]:
    """RFC 6962, section 2.1.1: that entry `index` is in the tree of the first `size` leaves.

    `node(height, index)` is asked for the hashes of O(log n) perfect subtrees.

    Raises:
        InputError: there is no such entry.
    """
    if not 0 <= index < size:
        raise InputError("the log has no entry with that index", "indexes run from 0 to size - 1")
    siblings: list[list[Node]] = []
    start, stop = 0, size
    while stop - start > 1:
        middle = start + _split(stop - start)
        if index < middle:
            siblings.append(_perfect(middle, stop))
            stop = middle
        else:
            siblings.append(_perfect(start, middle))
            start = middle
    return [_fold(nodes, node) for nodes in reversed(siblings)]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Return only if the entry with leaf hash `leaf` is entry `index` of the tree with this `size` and `root`.

    Raises:
        IntegrityError: it is not, or the proof does not show it.
    """
    refused = IntegrityError("the inclusion proof does not hold", "ask for a proof against the latest checkpoint")
    if not 0 <= index < size or not _are_hashes([leaf, root, *proof]):
        raise refused
    first, last, node = index, size - 1, leaf  # fn, sn, r of RFC 9162, section 2.1.3.2
    for sibling in proof:
        if last == 0:
            raise refused
        if first & 1 or first == last:
            node = node_hash(sibling, node)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        first, last = first >> 1, last >> 1
    if last != 0 or node != root:
        raise refused


def consistency_proof(first_size: int, second_size: int, node: NodeHash) -> list[bytes]:
    """RFC 6962, section 2.1.2: that the tree of the first `first_size` leaves is a prefix of that of `second_size`.

    `node(height, index)` is asked for the hashes of O(log n) perfect subtrees.

    Raises:
        InputError: the tree never had that size.
    """
    if not 0 <= first_size <= second_size:
        raise InputError("the log never had that size", "sizes run from 0 to the current size")
    if first_size in (0, second_size):
        return []
    proof: list[list[Node]] = []
    start, stop = 0, second_size
    while first_size != stop:
        middle = start + _split(stop - start)
        if first_size <= middle:
            proof.append(_perfect(middle, stop))
            stop = middle
        else:
            proof.append(_perfect(start, middle))
            start = middle
    if start:  # the subtree is not the whole old tree, whose root the verifier has
        proof.append(_perfect(start, stop))
    return [_fold(nodes, node) for nodes in reversed(proof)]


def verify_consistency(
    first_size: int, second_size: int, first_root: bytes, second_root: bytes, proof: Sequence[bytes]
) -> None:
    """Return only if the tree with `second_root` extends the one with `first_root`.

    Raises:
        IntegrityError: it does not, or the proof does not show it.
    """
    refused = IntegrityError("the consistency proof does not hold: rollback or fork", "keep both checkpoints and ask")
    if not 0 <= first_size <= second_size or not _are_hashes([first_root, second_root, *proof]):
        raise refused
    if first_size == 0 or first_size == second_size:
        expected = EMPTY_ROOT if first_size == 0 else second_root
        if proof or first_root != expected or (second_size == 0 and second_root != EMPTY_ROOT):
            raise refused
        return
    # RFC 9162, section 2.1.4.2, steps 2 to 7.
    path = list(proof) if first_size & (first_size - 1) else [first_root, *proof]
    if not path:
        raise refused
    first, last = first_size - 1, second_size - 1
    while first & 1:
        first, last = first >> 1, last >> 1
    old = new = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise refused
        if first & 1 or first == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        first, last = first >> 1, last >> 1
    if last != 0 or old != first_root or new != second_root:
        raise refused


def _perfect(start: int, stop: int) -> list[Node]:
    """The perfect subtrees that make up the leaves from `start` to `stop`, the largest (leftmost) first.

    `start` is a multiple of the largest power of two in `stop - start`, as every split of the tree has it.
    """
    nodes: list[Node] = []
    while start < stop:
        height = (stop - start).bit_length() - 1
        nodes.append((height, start >> height))
        start += 1 << height
    return nodes


def _fold(nodes: Sequence[Node], node: NodeHash) -> bytes:
    """The root of adjacent perfect subtrees of falling size (RFC 6962, section 2.1, from the right)."""
    if not nodes:
        return EMPTY_ROOT
    root = node(*nodes[-1])
    for height, index in reversed(nodes[:-1]):
        root = node_hash(node(height, index), root)
    return root


def _are_hashes(values: Iterable[bytes]) -> bool:
    return all(len(value) == HASH_BYTES for value in values)


def _split(size: int) -> int:
    """The largest power of two below `size` (RFC 6962, section 2.1)."""
    return 1 << ((size - 1).bit_length() - 1)


def _trailing_ones(number: int) -> int:
    return (~number & (number + 1)).bit_length() - 1
