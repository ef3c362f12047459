from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from cloister.errors import ConflictError, InputError, IntegrityError
from cloister.sealing.lease import OneTimeKey, ReceivingKey, seal_to

INFO = b"lease 7"
SECRET = b"\x5a" * 32


def test_a_one_time_key_opens_one_message() -> None:
    key = OneTimeKey.generate()
    sealed = seal_to(key.public, SECRET, INFO)
    assert SECRET not in sealed
    assert key.open(sealed, INFO) == SECRET
    with pytest.raises(ConflictError):
        key.open(sealed, INFO)


def test_a_message_that_does_not_open_does_not_use_the_key_up() -> None:
    key = OneTimeKey.generate()
    with pytest.raises(IntegrityError):
        key.open(seal_to(OneTimeKey.generate().public, SECRET, INFO), INFO)
    assert key.open(seal_to(key.public, SECRET, INFO), INFO) == SECRET


def test_two_threads_cannot_both_open() -> None:
    key = OneTimeKey.generate()
    sealed = seal_to(key.public, SECRET, INFO)

    def attempt(_: int) -> bool:
        try:
            return key.open(sealed, INFO) == SECRET
        except ConflictError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(64))) == 1


def test_other_info_is_refused() -> None:
    key = OneTimeKey.generate()
    with pytest.raises(IntegrityError):
        key.open(seal_to(key.public, SECRET, INFO), b"lease 8")


def test_every_flipped_bit_and_every_cut_is_refused() -> None:
    key = ReceivingKey.generate()
    sealed = seal_to(key.public, SECRET, INFO)
    for bit in range(len(sealed) * 8):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            key.open(bytes(changed), INFO)
    for size in range(len(sealed)):
        with pytest.raises(IntegrityError):
            key.open(sealed[:size], INFO)


@pytest.mark.parametrize("public", [b"", bytes(32), b"\x01" + bytes(31), bytes(31), bytes(33)])
def test_sealing_to_a_point_that_gives_the_secret_away_is_refused(public: bytes) -> None:
    with pytest.raises(InputError):
        seal_to(public, SECRET, INFO)


def test_a_receiving_key_comes_back_from_its_seed_and_opens_many() -> None:
    key = ReceivingKey.generate()
    again = ReceivingKey.from_seed(key.private_bytes())
    assert again.public == key.public
    for _ in range(3):
        assert again.open(seal_to(key.public, SECRET, INFO), INFO) == SECRET
    with pytest.raises(InputError):
        ReceivingKey.from_seed(bytes(31))


@pytest.mark.parametrize("key", [OneTimeKey.generate(), ReceivingKey.generate()])
def test_private_keys_are_neither_pickled_nor_copied_nor_shown(key: OneTimeKey | ReceivingKey) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError):
            pickle.dumps(key, protocol)
    with pytest.raises(TypeError):
        copy.copy(key)
    with pytest.raises(TypeError):
        copy.deepcopy([key])
    assert not hasattr(key, "__dict__")
    if isinstance(key, ReceivingKey):
        assert key.private_bytes().hex() not in repr(key)
    assert key.public.hex() in repr(key)
