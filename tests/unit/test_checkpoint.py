"""A checkpoint gives back what was trained, holds nothing that could be replayed, and nothing else passes for one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cloister.errors import InputError, IntegrityError
from cloister.privacy.keystream import fresh_secret
from cloister.privacy.plan import PrivacyPlan
from cloister.sealing.envelope import new_key
from cloister.sealing.stream import open_sealed, seal
from cloister.training import checkpoint
from cloister.training.architectures import build_model
from cloister.training.checkpoint import checkpoint_path, restore, save
from cloister.training.loop import make_optimizer, train

torch.set_num_threads(1)

KEY = bytes(range(32))
CONTEXT = {"use": "cloister.dev/checkpoint/v1", "run": "run-1", "blob": checkpoint_path("run-1", 1, 3)}
STEPS = 3
SHAPE = {"architecture": "mlp", "hidden": [5]}


def make(name: str = "adam", seed: int = 1, **shape: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_model(SHAPE | shape, 4, 2, seed)
    return model, make_optimizer(model, name, 0.05)


def trained(name: str = "adam", steps: int = STEPS) -> tuple[nn.Module, torch.optim.Optimizer]:
    """After some private steps of the real loop."""
    model, optimizer = make(name)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((40, 4), generator=generator)
    plan = PrivacyPlan(
        epsilon=3.0, delta=1e-5, epsilon_certified=3.0, noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5,
        steps=steps, rows=40,
    )  # fmt: skip
    train(
        model, optimizer, x, (x[:, 0] > 0).long(), plan, run="run-1", attempt=1, rank=0, world_size=1,
        secret=fresh_secret(), all_reduce=lambda _: None, commit_block=lambda _first, _stop: None,
    )  # fmt: skip
    return model, optimizer


def content(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of both, copied."""
    found = {name: value.clone() for name, value in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        found |= {f"{number}/{part}": value.clone() for part, value in state.items()}
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step with a gradient that is known."""
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
    optimizer.step()


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_what_is_restored_goes_on_as_what_was_saved(name: str) -> None:
    before = trained(name)
    after = make(name, seed=2)
    restore(save(*before, STEPS, key=KEY, context=CONTEXT), *after, STEPS, key=KEY, context=CONTEXT)
    assert same(content(*before), content(*after))
    for each in (before, after):
        step(*each)
    assert same(content(*before), content(*after)), "moments and counts of steps count too"


def test_the_restored_state_is_nobody_elses_memory() -> None:
    before, after = trained(), make(seed=2)
    restore(save(*before, STEPS, key=KEY, context=CONTEXT), *after, STEPS, key=KEY, context=CONTEXT)
    kept = content(*before)
    step(*after)
    assert same(content(*before), kept)


def test_weights_and_the_optimisers_state_are_all_that_is_in_it() -> None:
    """No key, no stream, no counter: what resumes could otherwise repeat noise that has been seen."""
    before = trained()
    plain = open_sealed(KEY, save(*before, STEPS, key=KEY, context=CONTEXT), CONTEXT)
    length = int.from_bytes(plain[:4], "big")
    header = json.loads(plain[4 : 4 + length])
    parameters = ["0.bias", "0.weight", "2.bias", "2.weight"]
    parts = ("exp_avg", "exp_avg_sq", "step")
    names = {f"model/{name}" for name in parameters}
    names |= {f"optimizer/{name}/{part}" for name in parameters for part in parts}
    assert header.keys() == {"format", "optimizer", "step", "tensors"}
    assert (header["step"], header["optimizer"]) == (STEPS, "Adam")
    assert {name for name, _, _ in header["tensors"]} == names
    numbers = 3 * sum(parameter.numel() for parameter in before[0].parameters()) + len(parameters)
    assert len(plain) == 4 + length + 4 * numbers, "every byte is a tensor's"


def test_the_same_state_is_the_same_bytes_under_another_salt() -> None:
    before = trained()
    first, second = (save(*before, STEPS, key=KEY, context=CONTEXT) for _ in range(2))
    assert first != second
    assert open_sealed(KEY, first, CONTEXT) == open_sealed(KEY, second, CONTEXT)


def test_nothing_of_the_weights_can_be_read_without_the_key() -> None:
    before = trained()
    sealed = save(*before, STEPS, key=KEY, context=CONTEXT)
    for value in content(*before).values():
        raw = value.numpy().tobytes()
        assert len(raw) < 16 or raw not in sealed
    assert b"weight" not in sealed


@pytest.mark.parametrize(
    "wrong",
    [{"key": new_key()}, {"context": CONTEXT | {"blob": checkpoint_path("run-1", 2, 3)}},
     {"context": CONTEXT | {"run": "run-2"}}, {"step": STEPS + 1}, {"model": make(hidden=[6])},
     {"model": make(activation="relu", hidden=[5, 5])}, {"model": make("sgd")}],
)  # fmt: skip
def test_another_key_path_run_step_model_or_optimiser_is_refused_and_changes_nothing(wrong: dict[str, object]) -> None:
    options: dict[str, object] = {"key": KEY, "context": CONTEXT, "step": STEPS, "model": make(seed=2)} | wrong
    model, optimizer = options["model"]  # type: ignore[misc]  # a pair, as `make` gives it
    sealed, before = save(*trained(), STEPS, key=KEY, context=CONTEXT), content(model, optimizer)
    with pytest.raises(IntegrityError):
        restore(
            sealed,
            model,
            optimizer,
            options["step"],
            key=options["key"],
            context=options["context"],  # type: ignore[arg-type]
        )
    assert same(content(model, optimizer), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain[:-1],
        lambda plain: plain + b"\0",
        lambda _: b"",
        lambda plain: plain[:3],
        lambda plain: b"\xff\xff\xff\xff" + plain[4:],
        lambda plain: plain.replace(b'"float32"', b'"float64"', 1),
        lambda plain: plain.replace(b'"step":3', b'"step":4', 1),
        lambda plain: plain.replace(b"model/0.bias", b"model/0.bios", 1),
        lambda plain: plain.replace(b"[4,", b"[5,", 1).replace(b",4]", b",5]", 1),
        lambda plain: plain.replace(b"checkpoint/v1", b"checkpoint/v2", 1),
    ],
)
def test_other_content_under_the_right_key_is_refused_and_changes_nothing(change: Callable[[bytes], bytes]) -> None:
    plain = open_sealed(KEY, save(*trained(), STEPS, key=KEY, context=CONTEXT), CONTEXT)
    assert change(plain) != plain
    after = make(seed=2)
    before = content(*after)
    with pytest.raises(IntegrityError):
        restore(seal(KEY, change(plain), CONTEXT), *after, STEPS, key=KEY, context=CONTEXT)
    assert same(content(*after), before)


def test_before_the_first_step_there_is_nothing_to_save() -> None:
    with pytest.raises(InputError, match="state"):
        save(*make(), 0, key=KEY, context=CONTEXT)


def test_an_optimiser_that_keeps_something_else_is_refused() -> None:
    model, _ = make()
    for optimizer in (torch.optim.RMSprop(model.parameters()), torch.optim.Adam(model.parameters(), amsgrad=True)):
        step(model, optimizer)
        with pytest.raises(InputError):
            save(model, optimizer, 1, key=KEY, context=CONTEXT)


def test_the_example_of_the_format_is_what_is_written() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = make_optimizer(model, "sgd", 0.1)
    optimizer.state[model.weight]["momentum_buffer"] = torch.full((1, 1), 0.5)
    plain = open_sealed(KEY, save(model, optimizer, 3, key=KEY, context=CONTEXT), CONTEXT)
    text = (Path(checkpoint.__file__).parent / "FORMAT.md").read_text()
    (header,) = re.findall(r"```json\n(.*)\n```", text)
    (length, value, momentum) = re.findall(r"^((?:[0-9a-f]{2} ){4}) {9}", text, re.MULTILINE)
    assert plain == b"".join([bytes.fromhex(length), header.encode(), bytes.fromhex(value), bytes.fromhex(momentum)])
