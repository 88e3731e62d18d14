"""The Inception network: published outputs, its resize, its weight file."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from erdfast.evaluation.inception import (
    InceptionNetwork,
    average_3x3,
    full_precision,
    maximum_3x3,
    resize_tf1,
)
from erdfast.evaluation.inception_weights import load_inception
from tests.evaluation.inception_files import made_up_weights, published_outputs, save_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inception")


@pytest.fixture(scope="module")
def weights(folder):
    return save_weights(folder / "inception.pth")


@pytest.fixture(scope="module")
def network(weights):
    return load_inception(weights)


def outputs(network: InceptionNetwork, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        features = network(images)
        return {
            **features._asdict(),
            "logits": network.logits(features.pool),
            "logits_unbiased": network.logits_unbiased(features.pool),
        }


@pytest.mark.parametrize("folded", [False, True])
def test_published_outputs(network, folded):
    if not folded:
        network = InceptionNetwork().eval()
        network.load_state_dict(made_up_weights(), strict=False)
    found = outputs(network, torch.from_numpy(published_outputs()["images"]))
    for name, value in found.items():
        expected = torch.from_numpy(published_outputs()[name])
        assert value.shape == expected.shape
        assert float((value - expected).norm() / expected.norm()) < 1e-5, name
        assert float((value - expected).abs().max()) < 1e-4 * float(expected.abs().max()), name


def test_published_names():
    own = {name for name in InceptionNetwork().state_dict() if not name.endswith("num_batches_tracked")}
    assert own == made_up_weights().keys()


def test_pictures_are_independent_and_of_any_size(network):
    """As float or uint8, alone or in a batch."""
    images = torch.randint(0, 256, (3, 3, 40, 52), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together = outputs(network, images)
    alone = outputs(network, images[1:2].float())
    for name in together:
        torch.testing.assert_close(together[name][1:2], alone[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 1, 8, 8\)"):
        network(torch.zeros(1, 1, 8, 8))


def resize_by_loop(image: np.ndarray, size: int) -> np.ndarray:
    """The definition, pixel by pixel, in float64."""
    height, width = image.shape
    out = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            y, x = row * height / size, column * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dx = y - top, x - left
            upper = image[top, left] * (1 - dx) + image[top, right] * dx
            lower = image[bottom, left] * (1 - dx) + image[bottom, right] * dx
            out[row, column] = upper * (1 - dy) + lower * dy
    return out


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 11), (16, 8, 5), (1, 3, 4), (9, 9, 9)])
def test_resize(height, width, size):
    images = np.random.RandomState(0).rand(2, 3, height, width)
    found = resize_tf1(torch.from_numpy(images), size)
    for image, channel in np.ndindex(2, 3):
        np.testing.assert_allclose(found[image, channel], resize_by_loop(images[image, channel], size), atol=1e-6)


def test_pools_at_the_rim():
    x = torch.arange(9.0).reshape(1, 1, 3, 3) - 20.0
    assert float(average_3x3(x)[0, 0, 0, 0]) == pytest.approx(-20.0 + (0 + 1 + 3 + 4) / 4)
    assert float(maximum_3x3(x)[0, 0, 0, 0]) == -16.0  # the padding's zeros do not count


def test_folded_norms_are_the_same_function():
    from erdfast.evaluation.inception import ConvNorm

    layer = ConvNorm(3, 4, 3, padding=1).double().eval()
    assert isinstance(layer.bn, nn.BatchNorm2d)
    for parameter in (layer.bn.weight, layer.bn.bias, layer.bn.running_mean):
        assert parameter is not None
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = layer(x)
    layer.fold_norm()
    layer.fold_norm()  # once is enough
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(before, F.relu(before))


def test_full_precision_is_put_back():
    before = torch.backends.cudnn.allow_tf32
    with full_precision():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before

    def fail() -> None:
        with full_precision():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.backends.cudnn.allow_tf32 == before


# ---------------------------------------------------------------------- weight files


def test_weights_from_safetensors(folder, network):
    save_file(made_up_weights(), folder / "inception.safetensors")
    other = load_inception(folder / "inception.safetensors")
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert torch.equal(outputs(network, images)["pool"], outputs(other, images)["pool"])


def test_a_missing_file_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"none.pth: no such file.*never downloads.*2015-12-05.*91 MiB.*pytorch-fid"):
        load_inception(tmp_path / "none.pth")


def test_counters_of_newer_files_are_ignored(folder):
    state = made_up_weights() | {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
    torch.save(state, folder / "counted.pt")
    load_inception(folder / "counted.pt")


def write_wrong(path, kind: str) -> None:
    state = dict(made_up_weights())
    if kind == "other names":
        state = {"backbone.weight": torch.zeros(3)}
    elif kind == "few":
        del state["Mixed_7b.branch1x1.conv.weight"]
    elif kind == "extra":
        state["AuxLogits.fc.weight"] = torch.zeros(3)
    elif kind == "shape":
        state["fc.weight"] = torch.zeros(1000, 2048)
    elif kind == "nan":
        state["fc.bias"] = torch.full((1008,), float("nan"))
    elif kind == "list":
        torch.save([1, 2], path)
        return
    elif kind == "code":
        torch.save({"x": nn.Linear(2, 2)}, path)  # would have to be unpickled
        return
    elif kind == "text":
        path.write_text("Not Found")
        return
    torch.save(state, path)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("other names", "lacks 472 of 472 tensors, such as Conv2d_1a_3x3.bn.bias, and has 1 unknown"),
        ("few", "lacks 1 of 472 tensors, such as Mixed_7b.branch1x1.conv.weight"),
        ("extra", "1 unknown ones, such as AuxLogits.fc.weight"),
        ("shape", r"fc.weight is \(1000, 2048\), expected \(1008, 2048\)"),
        ("nan", "fc.bias holds values that are not finite"),
        ("list", "holds no state_dict"),
        ("code", "cannot be read as a state_dict"),
        ("text", "cannot be read as a state_dict"),
    ],
)
def test_wrong_weight_files(tmp_path, kind, part):
    path = tmp_path / "wrong.pth"
    write_wrong(path, kind)
    with pytest.raises(ValueError, match=f"wrong.pth: .*{part}"):
        load_inception(path)


def test_other_kinds_of_files(tmp_path):
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights.onnx: expected a .pth, .pt or .safetensors"):
        load_inception(tmp_path / "weights.onnx")
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"cut.safetensors: cannot be read"):
        load_inception(tmp_path / "cut.safetensors")


def test_a_name_with_a_hash_is_checked(tmp_path, weights):
    content = weights.read_bytes()
    right = tmp_path / f"inception-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    right.write_bytes(content)
    load_inception(right)
    wrong = tmp_path / "inception-00000000.pth"
    wrong.write_bytes(content)
    with pytest.raises(ValueError, match=r"inception-00000000.pth: is damaged or another file.*95,\d+,\d+ bytes"):
        load_inception(wrong)
