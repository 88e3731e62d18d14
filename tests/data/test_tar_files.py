"""Pictures in tars, and in the tars within them: found, read in place by threads, refused when damaged."""

import io
import tarfile
from pathlib import Path

import pytest

from erdfast.data.containers import open_container
from erdfast.data.tar_files import list_tar
from tests.data.test_formats import write

FILES = {f"n0000000{c}/n0000000{c}_{i}.JPEG": f"{c}{i}".encode() * (99 + 413 * i) for c in (2, 1) for i in range(3)}


def tar_bytes(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def write_tar(place: Path, files: dict[str, bytes]) -> Path:
    place.write_bytes(tar_bytes(files))
    return place


def nested(files: dict[str, bytes]) -> dict[str, bytes]:
    """A tar for each folder, as ILSVRC2012_img_train.tar has them."""
    folders = dict.fromkeys(name.partition("/")[0] for name in files)
    return {
        f"{folder}.tar": tar_bytes({n.partition("/")[2]: c for n, c in files.items() if n.startswith(f"{folder}/")})
        for folder in folders
    }


def read_all(path: Path) -> dict[str, bytes]:
    container = open_container(path)
    files = container.choose(range(len(container.names)))
    assert [files.name(index) for index in range(len(files))] == container.names
    return {name: files.read(index) for index, name in enumerate(container.names)}


def test_all_containers_hold_the_same(tmp_path):
    extra = {"README.txt": b"x", ".hidden/a.jpg": b"x", "__MACOSX/a.jpg": b"x"}
    places = [
        write(tmp_path / "folder", FILES | extra),
        write(tmp_path / "a.zip", FILES | extra),
        write_tar(tmp_path / "a.tar", FILES | extra),
        write_tar(tmp_path / "dots.tar", {f"./{name}": content for name, content in FILES.items()}),
        write_tar(tmp_path / "nested.tar", nested(FILES) | extra),
    ]
    for place in places:
        found = read_all(place)
        assert found == FILES, place
        assert list(found) == sorted(FILES)
    container = open_container(tmp_path / "nested.tar")
    assert container.choose([4, 0]).read(0) == FILES[container.names[4]]


def test_cut_tars(tmp_path):
    whole = tar_bytes(nested(FILES))
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 - 300])
    with pytest.raises(
        ValueError, match=r"cut.tar: cannot be read: it is no tar that can be read in place: n0+1.tar in it: unexpected"
    ):
        open_container(tmp_path / "cut.tar")
    container = open_container(write_tar(tmp_path / "a.tar", FILES))
    files = container.choose([len(FILES) - 1])
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="the tar ends within it"):
        files.read(0)


def test_a_damaged_tar_within_the_tar_is_named(tmp_path):
    for damaged, message in ((b"", "empty file"), (b"no tar" * 999, "invalid header")):
        path = write_tar(tmp_path / "a.tar", nested(FILES) | {"n00000002.tar": damaged})
        with pytest.raises(ValueError, match=rf"a.tar: cannot be read: .* n00000002.tar in it: {message}"):
            open_container(path)
    whole = nested(FILES)
    path = write_tar(tmp_path / "a.tar", whole | {"n00000001.tar": whole["n00000001.tar"][:700]})
    with pytest.raises(ValueError, match=r"n00000001.tar in it: unexpected end of data"):
        open_container(path)


def test_bad_containers(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("no tar" * 999)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(tmp_path / "text.tar", "a.jpg")
    (tmp_path / "pictures.rar").write_bytes(b"x")
    (tmp_path / "bad.zip").write_bytes(b"PK")
    cases = {
        "gone": "no such file or folder",
        "empty": r"holds no pictures \(.png, .jpg",
        "text.tar": "no tar that can be read in place",
        "packed.tar": r"no tar that can be read in place.*is it compressed\?",
        "pictures.rar": "unknown file type '.rar', expected a folder, .zip or .tar",
        "bad.zip": "cannot be read",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            open_container(tmp_path / name)


def test_members_that_are_no_files(tmp_path):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        for name in ("n01440764/a.jpg", "n01440764.tar"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            with tarfile.open(tmp_path / "a.tar", "w") as archive:
                archive.addfile(entry)
            with pytest.raises(ValueError, match=f"{name} is no ordinary file"):
                list_tar(tmp_path / "a.tar")
    write_tar(tmp_path / "hollow.tar", nested(FILES) | {"n00000003.tar": tar_bytes({"a.txt": b"x"})})
    with pytest.raises(ValueError, match=r"n00000003.tar holds no picture"):
        list_tar(tmp_path / "hollow.tar")
