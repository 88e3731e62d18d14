import subprocess
import sys

import numpy as np
import pytest
import torch

from erdfast.data import Digits, GaussianMixture, open_dataset


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    data = open_dataset("digits", shape=(1, 8, 8), num_classes=10)
    assert (len(data), data.shape, data.num_classes) == (1797, (1, 8, 8), 10)
    batch = data.gather(torch.arange(1797))
    assert batch.x.dtype == torch.float32
    assert batch.y.dtype == torch.int64
    assert batch.moments_scale is None
    pixels, labels = load_digits(return_X_y=True)
    np.testing.assert_array_equal((batch.x.flatten(1).double().numpy() + 1) * 8, pixels)
    np.testing.assert_array_equal(batch.y.numpy(), labels)
    assert data.describe() == "1,797 images 1x8x8, 10 classes, scaled to [-1, 1] (embedded digits)"
    assert data.class_names == [str(digit) for digit in range(10)]


def test_digits_become_pictures_exactly():
    data = Digits()
    batch = data.gather(torch.tensor([5, 5, 0]))
    images = data.to_images(batch.x)
    assert images.shape == (3, 8, 8, 1)
    assert images.dtype == np.uint8
    expected = np.rint((batch.x[0, 0].double().numpy() + 1) / 2 * 255)
    np.testing.assert_array_equal(images[0, :, :, 0], expected)
    np.testing.assert_array_equal(images[0], images[1])


def test_pictures_clip_and_survive_nan():
    x = torch.full((1, 1, 8, 8), 7.0)
    x[0, 0, 0, 0] = -7.0
    x[0, 0, 0, 1] = float("nan")
    image = Digits().to_images(x)[0, :, :, 0]
    assert (image[0, 0], image[0, 1], image[1, 1]) == (0, 0, 255)


def test_mixture_specs():
    assert open_dataset("mixture").shape == (4, 32, 32)
    assert open_dataset("mixture", shape=(2, 4, 6)).shape == (2, 4, 6)
    data = open_dataset("mixture:4x8x8", shape=(4, 8, 8), num_classes=3, seed=7)
    assert isinstance(data, GaussianMixture)
    assert (data.shape, data.num_classes, data.seed, len(data)) == ((4, 8, 8), 3, 7, 50_000)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("digit", {}, "unknown data 'digit'.*'digits', 'mixture'"),
        ("", {}, "unknown data ''"),
        ("nowhere.npz", {}, "nowhere.npz: no such file"),
        ("no/such/folder", {}, "no/such/folder: no such file"),
        ("digits", {"shape": (4, 32, 32)}, "1x8x8, but 4x32x32"),
        ("digits", {"num_classes": 1000}, "10 classes, but 1000"),
        ("mixture:4x8", {}, "mixture:4x32x32"),
        ("mixture:0x8x8", {}, "cannot read the shape '0x8x8'"),
        ("mixture:4x8x8", {"shape": (4, 32, 32)}, "4x8x8, but 4x32x32"),
        ("mixture", {"num_classes": 0}, "num_classes=0"),
    ],
)
def test_bad_specs_name_value_and_choices(spec, options, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(spec, **options)


@pytest.mark.parametrize("spec", ["digits", "mixture:1x4x4"])
def test_bad_indices(spec):
    data = open_dataset(spec)
    with pytest.raises(ValueError, match="int64"):
        data.gather(torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match="one-dimensional"):
        data.gather(torch.tensor(0))
    with pytest.raises(IndexError, match=f"0..{len(data) - 1}"):
        data.gather(torch.tensor([len(data)]))
    with pytest.raises(IndexError, match="-1"):
        data.gather(torch.tensor([-1]))
    assert data.gather(torch.tensor([], dtype=torch.int64)).x.shape == (0, *data.shape)


def test_pictures_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\)"):
        Digits().to_images(torch.zeros(2, 1, 8, 9))


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        open_dataset("digits")


def test_import_is_light():
    code = (
        "import sys, erdfast.data; "
        "print(sorted({'sklearn', 'PIL', 'h5py', 'matplotlib', 'safetensors', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
