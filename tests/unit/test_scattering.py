"""Fixed features of pictures: what they are, that rows stay rows, that training and the served model see the same."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from cloister.errors import InputError
from cloister.privacy.spec import TrainingSpec
from cloister.training.architectures import build_model, fixed_features, trainable_part
from cloister.training.export import INPUT_NAME, OUTPUT_NAME, to_onnx
from cloister.training.rehearsal import rehearse
from cloister.training.scattering import CHANNELS, Scattering

torch.set_num_threads(1)

LINEAR = {"architecture": "scattering", "image": [12, 16]}


def pictures(count: int, height: int = 12, width: int = 16) -> torch.Tensor:
    return torch.rand((count, height * width), generator=torch.Generator().manual_seed(3))


def model() -> nn.Module:
    return build_model(LINEAR | {"hidden": [8]}, 12 * 16, 3, seed=1)


def test_a_digit_has_the_published_number_of_features() -> None:
    assert CHANNELS == 81
    assert Scattering(28, 28)(pictures(2, 28, 28)).shape == (2, 3969)


def test_the_features_are_wavelet_moduli_of_moduli() -> None:
    """Every channel before normalisation, at one inner position, by sums over complex wavelets in double precision."""
    side, at = 64, 32  # nothing that is kept at `at` comes near the border
    picture = np.random.default_rng(0).random((side, side))

    def wavelet(octave: int, turn: int) -> np.ndarray:
        deviation, reach = 0.8 * 2**octave, math.ceil(3 * 0.8 * 2**octave / 0.5)
        rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        position = np.exp(-1j * np.pi * turn / 8) * (rows + 1j * columns)  # turned: along, across
        envelope = np.exp(-(position.real**2 + 0.25 * position.imag**2) / (2 * deviation**2))
        wave = np.exp(1j * 0.75 * np.pi / 2**octave * position.real)
        waves = envelope * (wave - (envelope * wave).sum() / envelope.sum())
        return np.asarray(waves * 0.5 / (2 * np.pi * deviation**2))

    def blurred(image: np.ndarray, step: int = 1) -> float:
        deviation, reach, centre = 1.6 / step, math.ceil(3 * 1.6 / step), at // step
        rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        weights = np.exp(-(rows**2 + columns**2) / (2 * deviation**2))
        window = slice(centre - reach, centre + reach + 1)
        return float((image[::step, ::step][window, window] * weights / weights.sum()).sum())

    def modulus(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        reach = len(kernel) // 2
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, reach, mode="reflect"), kernel.shape)
        return np.abs(np.einsum("ijkl,kl->ij", windows, kernel))

    coarse = [wavelet(1, turn) for turn in range(8)]
    fine = [modulus(picture, wavelet(0, turn)) for turn in range(8)]
    expected = [blurred(picture), *map(blurred, fine)]  # moduli of octave 1 are kept at every second pixel
    expected += [blurred(modulus(image, kernel), step=2) for image in (picture, *fine) for kernel in coarse]
    features = Scattering(side, side)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "group_norm", lambda x, *_args, **_kwargs: x)
        got = features(torch.from_numpy(picture.reshape(1, -1)).float()).reshape(CHANNELS, 16, 16)[:, at // 4, at // 4]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-3)


def test_a_picture_has_the_same_features_in_any_company() -> None:
    x = pictures(300)  # more than are computed at once
    together = fixed_features(model(), x)
    changed = x.clone()
    changed[1:] = 1.0 - changed[1:]
    torch.testing.assert_close(fixed_features(model(), changed)[0], together[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(fixed_features(model(), x[299:]), together[299:], rtol=0, atol=1e-5)
    assert not torch.allclose(fixed_features(model(), changed)[1], together[1], atol=0.1)


def test_normalisation_takes_no_statistics_of_the_data_set() -> None:
    """An average over rows would carry them into each feature, outside of epsilon: scale and shift do not matter."""
    x = pictures(4)
    groups = fixed_features(model(), x).reshape(4, 27, -1)
    torch.testing.assert_close(groups.mean(2), torch.zeros(4, 27), rtol=0, atol=1e-4)
    assert torch.equal(fixed_features(model(), torch.zeros(1, 192)), torch.zeros(1, 972))  # empty, and finite


def test_training_on_fixed_features_is_training_the_model() -> None:
    whole, x = model(), pictures(5)
    head = trainable_part(whole)
    torch.testing.assert_close(head(fixed_features(whole, x)), whole(x))
    assert {id(p) for p in whole.parameters()} == {id(p) for p in head.parameters()}
    assert list(whole.state_dict()) == [f"head.{name}" for name in head.state_dict()]
    rehearse(head, fixed_features(whole, x))


def test_a_model_without_fixed_features_is_trained_as_it_is() -> None:
    plain, x = build_model({"architecture": "mlp", "hidden": [4]}, 192, 3), pictures(2)
    assert trainable_part(plain) is plain
    assert fixed_features(plain, x) is x


def test_the_served_model_holds_the_features() -> None:
    whole, x = model(), pictures(7)
    session = onnxruntime.InferenceSession(to_onnx(whole, 192), providers=["CPUExecutionProvider"])
    (got,) = session.run([OUTPUT_NAME], {INPUT_NAME: x.numpy()})
    np.testing.assert_allclose(got, whole(x).softmax(1).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image": [16, 16]}, "is not the 192 inputs"),
        ({"image": [8, 24]}, "at least 11 pixels"),
        ({"image": 192}, "height and width"),
        ({"image": None}, "height and width"),
        ({"hidden": [0]}, "list of layer widths"),
        ({"octaves": 3}, "takes `hidden`"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        build_model(LINEAR | change, 192, 3)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"architecture": "scattering"}, "model.image"),
        ({"architecture": "scattering", "image": [28, 8]}, "model.image"),
        ({"architecture": "mlp", "hidden": [8], "image": [28, 28]}, "model.image"),
        ({"architecture": "wavelets", "image": [28, 28]}, "one of mlp, scattering"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused_by_field(model: dict[str, object], told: str) -> None:
    spec = {
        "dataset": "mnist@1", "label": "label", "purpose": "digit-research", "resources": {"region": "eu"},
        "privacy": {"epsilon": 3.0, "delta": 1e-5},
        "training": {"epochs": 1, "expected_batch_size": 16, "learning_rate": 0.1},
    }  # fmt: skip
    TrainingSpec.parse(spec | {"model": {"architecture": "scattering", "image": [28, 28]}})
    with pytest.raises(InputError, match=told):
        TrainingSpec.parse(spec | {"model": model})
