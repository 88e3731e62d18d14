"""Files of pictures and features to rows: streaming, references, warnings, wrong contents."""

import io
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file

from erdfast.evaluation.features import Wanted, own_batches, summarise_images
from erdfast.evaluation.files import open_features, open_images
from erdfast.evaluation.inception_score import inception_score
from erdfast.evaluation.measure import _of_first, check_metrics
from erdfast.evaluation.measurement import Measurement
from erdfast.evaluation.precision_recall import precision_recall
from tests.evaluation.inception_files import SmallNetwork, save_pictures, use_small_network

ALL = ("fid", "sfid", "is", "precision", "recall")
EVERYTHING = Wanted(pool=True, spatial=True, score=True, features=True)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    use_small_network(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"made up")
    save_pictures(tmp_path / "samples.npz", 41, seed=0)
    save_pictures(tmp_path / "real.npz", 37, seed=1)
    return tmp_path


def measured(folder, reference="real.npz", metrics=ALL, samples="samples.npz", batch_size=8, **options):
    said: list[str] = []
    measurement = Measurement(batch_size=batch_size, device=torch.device("cpu"), warn=said.append)
    arguments = [folder / samples], folder / reference, folder / "weights.pth", tuple(metrics)
    (row,) = measurement.pictures(*arguments, **options)
    return row.values, said


def whole_features(path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pooled, spatial, probabilities of all pictures at once."""
    network = SmallNetwork()
    features = network(torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2))
    return features.pool, features.spatial, network.logits_unbiased(features.pool).double().softmax(1)


def adm_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """As in ADM's evaluator."""
    a, b = x.double().numpy(), y.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2.0 * np.real(root)))


@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_metrics_are_those_of_the_whole(folder, batch_size):
    (pool, spatial, p), (real, real_spatial, _) = map(whole_features, (folder / "samples.npz", folder / "real.npz"))
    values, said = measured(folder, batch_size=batch_size)
    assert list(values) == list(ALL)
    assert values["fid"] == pytest.approx(adm_distance(pool, real), rel=1e-6)
    assert values["sfid"] == pytest.approx(adm_distance(spatial, real_spatial), rel=1e-6)
    assert values["is"] == pytest.approx(inception_score(p), rel=1e-6)
    assert (values["precision"], values["recall"]) == pytest.approx(precision_recall(pool, real))
    assert said == []


def test_summary_by_batches():
    """Batches of several processes are disjoint and complete, and in one summary features keep their order."""
    from dataclasses import dataclass

    from erdfast.data.rows import ByteRows

    @dataclass
    class Number:
        rank: int
        size: int = 3

        def all_reduce(self, tensor):
            return tensor

    taken = [torch.cat(list(own_batches(25, 4, Number(rank)))) for rank in range(3)]
    assert torch.cat(taken).sort().values.tolist() == list(range(25))
    assert list(own_batches(2, 4, Number(2))) == []
    data = torch.randint(0, 256, (10, 4 * 4 * 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows, told = ByteRows(data, torch.uint8, (4, 4, 3)), []
    summary = summarise_images(rows, SmallNetwork(), EVERYTHING, batch_size=3, progress=told.append)
    assert told == [3, 3, 3, 1]
    assert summary.features is not None
    pictures = data.view(10, 4, 4, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(summary.features, SmallNetwork()(pictures).pool)
    nothing = summarise_images(rows, SmallNetwork(), Wanted(), batch_size=3)
    assert (nothing.pool, nothing.spatial, nothing.score, nothing.features) == (None, None, None, None)


def test_samples_equal_to_the_reference(folder):
    values, _ = measured(folder, samples="real.npz")
    assert values["fid"] < 1e-10
    assert values["sfid"] < 1e-10
    assert (values["precision"], values["recall"]) == (1.0, 1.0)


# ---------------------------------------------------------------------- references


def test_statistics_of_adm(folder):
    """mu and sigma go before the pictures, which serve for precision and recall."""
    pool, spatial, _ = whole_features(folder / "samples.npz")
    statistics = {"mu": pool.numpy().mean(0), "sigma": np.cov(pool.numpy().T)}
    statistics |= {"mu_s": spatial.numpy().mean(0), "sigma_s": np.cov(spatial.numpy().T)}
    save_pictures(folder / "adm.npz", 37, seed=1, **statistics)
    values, _ = measured(folder, "adm.npz")
    of_pictures, _ = measured(folder)
    assert values["fid"] == pytest.approx(0.0, abs=1e-6)
    assert values["sfid"] == pytest.approx(0.0, abs=1e-6)
    assert (values["precision"], values["recall"]) == (of_pictures["precision"], of_pictures["recall"])


def test_a_saved_reference_gives_the_same(folder):
    expected, _ = measured(folder, save=folder / "saved.npz")
    with np.load(folder / "saved.npz") as saved:
        assert sorted(saved) == ["count", "inception_crc32", "mu", "mu_s", "pool", "sigma", "sigma_s"]
    values, _ = measured(folder, "saved.npz")
    assert values == pytest.approx(expected, rel=1e-12)
    (folder / "weights.pth").write_bytes(b"others")
    with pytest.raises(ValueError, match=r"saved.npz: was computed with other Inception weights \(CRC-32 "):
        measured(folder, "saved.npz")


def test_what_a_reference_lacks(folder):
    np.savez(folder / "fid_only.npz", mu=np.zeros(6), sigma=np.eye(6))
    assert measured(folder, "fid_only.npz", ["fid"])[0]["fid"] > 0.0
    with pytest.raises(ValueError, match=r"fid_only.npz: sfid needs 'mu_s' and 'sigma_s', but it holds only mu, sigma"):
        measured(folder, "fid_only.npz", ["fid", "sfid"])
    with pytest.raises(ValueError, match=r"fid_only.npz: precision and recall needs pictures 'arr_0' or features"):
        measured(folder, "fid_only.npz", ["recall"])


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"mu": np.zeros(7), "sigma": np.eye(7)}, "'mu' must be 6, it is 7"),
        ({"mu": np.zeros(6), "sigma": np.eye(7)}, "'sigma' must be 6x6, it is 7x7"),
        ({"mu": np.zeros(6), "sigma": np.full((6, 6), np.nan)}, "'sigma' holds values that are not finite"),
        ({"mu": np.zeros(6), "sigma": -np.eye(6)}, "a matrix is no covariance"),
        ({"mu": np.array([None] * 6), "sigma": np.eye(6)}, "Python objects"),
        ({"other": np.zeros(6)}, "fid needs 'mu' and 'sigma', but it holds only other"),
    ],
)
def test_wrong_references(folder, arrays, part):
    np.savez(folder / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=f"wrong.npz: .*{part}"):
        measured(folder, "wrong.npz", ["fid"])


# ---------------------------------------------------------------------- samples


def test_too_few_samples(folder):
    save_pictures(folder / "few.npz", 5)
    _, said = measured(folder, samples="few.npz", metrics=["fid", "sfid"])
    assert len(said) == 2
    assert "few.npz: FID: 5 samples for 6 features: the covariance is singular" in said[0]
    save_pictures(folder / "one.npz", 1)
    with pytest.raises(ValueError, match=r"one.npz: a covariance needs at least 2 samples"):
        measured(folder, samples="one.npz", metrics=["fid"])
    save_pictures(folder / "three.npz", 3)
    with pytest.raises(ValueError, match=r"three.npz: precision and recall need more than 3 samples, got 3"):
        measured(folder, samples="three.npz", metrics=["precision"])


def test_features_that_are_not_finite(folder, monkeypatch):
    from erdfast.evaluation import measurement

    class Damaged(SmallNetwork):
        def forward(self, images):
            features = super().forward(images)
            features.pool[-1] = float("nan")
            return features

    monkeypatch.setattr(measurement, "load_inception", lambda _path, _device: Damaged())
    with pytest.raises(ValueError, match=r"samples.npz: features of pictures 0 to 7 are not finite: the weights"):
        measured(folder, metrics=["is"])


def write_wrong(path, kind: str) -> None:
    pictures = np.zeros((4, 8, 8, 3), np.uint8)
    contents = {
        "float": {"arr_0": pictures.astype(np.float32)},
        "channels first": {"arr_0": pictures.transpose(0, 3, 1, 2)},
        "grey": {"arr_0": pictures[..., :1]},
        "latents": {"latents": np.zeros((4, 4, 8, 8), np.float32)},
        "objects": {"arr_0": np.array([None, {}])},
        "empty": {"arr_0": pictures[:0]},
    }
    if kind == "text":
        path.write_text("Not Found")
    elif kind == "cut":
        buffer = io.BytesIO()
        np.savez(buffer, arr_0=pictures)
        path.write_bytes(buffer.getvalue()[:300])
    elif kind == "short":
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as stream:
            np.lib.format.write_array_header_1_0(
                stream, {"descr": "|u1", "fortran_order": False, "shape": (4, 8, 8, 3)}
            )
            stream.write(b"1234")
    else:
        np.savez(path, **contents[kind])


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("float", r"'arr_0' must be uint8 \(N, H, W, 3\) pictures, it is float32 \(4, 8, 8, 3\)"),
        ("channels first", r"it is uint8 \(4, 3, 8, 8\)"),
        ("grey", r"it is uint8 \(4, 8, 8, 1\)"),
        ("latents", "expected an array 'arr_0' of pictures, found latents"),
        ("objects", "Python objects"),
        ("empty", "'arr_0' is empty"),
        ("text", "cannot be read"),
        ("cut", "cannot be read"),
        ("short", "the file ends early"),
    ],
)
def test_wrong_files_of_pictures(tmp_path, kind, part):
    write_wrong(tmp_path / "wrong.npz", kind)
    with pytest.raises(ValueError, match=f"wrong.npz: .*{part}"):
        open_images(tmp_path / "wrong.npz")


def test_other_files_of_pictures(tmp_path):
    with pytest.raises(ValueError, match=r"none.npz: no such file"):
        open_images(tmp_path / "none.npz")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.zip: unknown file type '.zip', expected .npz"):
        open_images(tmp_path / "a.zip")


def test_metric_names():
    check_metrics(ALL)
    check_metrics(["recall", "fd", "precision"], "features")
    check_metrics(["accuracy", "fd"], "digits")
    with pytest.raises(ValueError, match="unknown metric 'kid'; choose from fid, sfid, is, precision, recall, fd"):
        check_metrics(["kid"])
    for wrong, kind in ((["fd"], "pictures"), (["fd", "fid"], "features"), (["sfid"], "digits")):
        with pytest.raises(ValueError, match=rf"is not of {kind}: .*Measure them apart"):
            check_metrics(wrong, kind)
    for wrong in ([], ["is", "is"]):
        with pytest.raises(ValueError, match="name each once"):
            check_metrics(wrong)


class Pair:
    """The group of two processes, as one of them sees it that gets `found` from every sum."""

    size = 2

    def __init__(self, rank: int, found: list[float] | None = None) -> None:
        self.rank, self.found = rank, found

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.found is None else torch.tensor(self.found, dtype=tensor.dtype)


def test_no_process_waits_for_a_distance_that_cannot_be_computed():
    def fail() -> float:
        raise ValueError("no covariance")

    with pytest.raises(ValueError, match="no covariance"):
        _of_first(Pair(0), fail)  # after the sum, in which the others learn of it
    with pytest.raises(ValueError, match="the first process could not compute"):
        _of_first(Pair(1, [0.0, 1.0]), fail)
    assert _of_first(Pair(1, [2.5, 0.0]), fail) == 2.5
    assert _of_first(Pair(0), lambda: 2.5) == 2.5


# ---------------------------------------------------------------------- features of any network


def features(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 9, generator=torch.Generator().manual_seed(seed)) * (seed + 1.0)


def distance_of(samples, reference) -> tuple[float, list[str]]:
    said: list[str] = []
    (row,) = Measurement(device=torch.device("cpu"), warn=said.append).features([samples], reference)
    return row.values["fd"], said


def test_features_in_every_form(tmp_path):
    x, y = features(40, 0), features(30, 1)
    shards = tmp_path / "shards"
    shards.mkdir()
    np.save(tmp_path / "x.npy", x.numpy())
    np.savez(tmp_path / "x.npz", arr_0=x.numpy())
    save_file({"features": x.reshape(40, 3, 3).contiguous()}, tmp_path / "x.safetensors")
    for number, part in enumerate(x.split(17)):
        np.savez_compressed(shards / f"{number}.npz", features=part.numpy())
    np.savez(tmp_path / "y.npz", mu=y.numpy().mean(0), sigma=np.cov(y.numpy().T))
    np.save(tmp_path / "y.npy", y.numpy())
    for name in ("x.npy", "x.npz", "x.safetensors", "shards"):
        for reference in ("y.npz", "y.npy"):
            found, said = distance_of(tmp_path / name, tmp_path / reference)
            assert found == pytest.approx(adm_distance(x, y), rel=1e-5)
            assert said == []


def test_precision_and_recall_of_features(tmp_path):
    x, y = features(40, 0), features(30, 1)
    np.save(tmp_path / "x.npy", x.reshape(40, 3, 3).numpy())
    np.save(tmp_path / "y.npy", y.numpy())
    paths = [tmp_path / "x.npy"], tmp_path / "y.npy"
    (row,) = Measurement(device=torch.device("cpu")).features(*paths, ("recall", "precision", "fd"))
    assert list(row.values) == ["recall", "precision", "fd"]
    expected = precision_recall(x, y)
    assert (row.values["precision"], row.values["recall"]) == tuple(expected)
    assert row.values["fd"] == pytest.approx(adm_distance(x, y), rel=1e-5)
    (row,) = Measurement(device=torch.device("cpu")).features(*paths, ("recall",))
    assert row.values == {"recall": expected.recall}
    np.savez(tmp_path / "y.npz", mu=y.numpy().mean(0), sigma=np.cov(y.numpy().T))
    with pytest.raises(ValueError, match=r"y.npz: expected an array 'features' or 'arr_0', found mu, sigma"):
        Measurement(device=torch.device("cpu")).features(paths[0], tmp_path / "y.npz", ("fd", "recall"))


def test_few_features_and_wrong_ones(tmp_path):
    np.save(tmp_path / "few.npy", features(9, 0).numpy())
    np.save(tmp_path / "y.npy", features(30, 1).numpy())
    assert "few.npy: FD: 9 samples for 9 features" in distance_of(tmp_path / "few.npy", tmp_path / "y.npy")[1][0]
    broken = features(30, 1)
    broken[7, 2] = float("nan")
    np.save(tmp_path / "nan.npy", broken.numpy())
    with pytest.raises(ValueError, match=r"nan.npy: features must be finite"):
        distance_of(tmp_path / "nan.npy", tmp_path / "y.npy")
    np.save(tmp_path / "narrow.npy", features(30, 1)[:, :4].numpy())
    with pytest.raises(ValueError, match=r"narrow.npy: 4 features cannot be compared with 9"):
        distance_of(tmp_path / "narrow.npy", tmp_path / "y.npy")


def test_wrong_files_of_features(tmp_path):
    with pytest.raises(ValueError, match=r"holds no features: expected files of type \.npy"):
        open_features(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((3, 4), np.int32))
    with pytest.raises(ValueError, match=r"a.npy: features must be floating-point \(N, D\)"):
        open_features(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((3, 4), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((3, 5), np.float32))
    with pytest.raises(ValueError, match=r"b.npy: its features are .*\(5,\), those of a.npy"):
        open_features(tmp_path)
    np.savez(tmp_path / "c.npz", other=np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"c.npz: expected an array 'features' or 'arr_0', found other"):
        open_features(tmp_path / "c.npz")
    with pytest.raises(ValueError, match=r"d.pt: no such file"):
        open_features(tmp_path / "d.pt")
