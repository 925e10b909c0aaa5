import zipfile

import pytest

from recrl_lib import assets, paths, runs


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip is told to use instead of a package index; an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("RECRL_HOME", str(tmp_path / "home"))
    return folder


def build_wheel(folder, members: dict[str, str], name="toy_asset", version="1.0"):
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in members.items():
            wheel.writestr(member, text)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_fetches_verifies_unpacks_once_and_keeps(index):
    path = build_wheel(
        index,
        {"toy_asset/data/a.txt": "A", "toy_asset/data/sub/b.txt": "B", "toy_asset/code.py": "x"},
    )
    wheel = assets.Wheel("toy-asset", "1.0", runs.sha256_file(path), "toy_asset/data/")
    folder = assets.unpacked(wheel)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == [
        "a.txt",
        "sub/b.txt",
    ]
    path.unlink()
    assert assets.unpacked(wheel) == folder and (folder / "a.txt").read_text() == "A"


def test_another_file_under_the_same_name_is_refused(index):
    build_wheel(index, {"toy_asset/data/a.txt": "tampered"})
    wheel = assets.Wheel("toy-asset", "1.0", "0" * 64, "toy_asset/data/")
    with pytest.raises(RuntimeError, match="expected 0000.*not unpacked"):
        assets.unpacked(wheel)
    assert not list(paths.cache_dir("assets").iterdir())  # nothing half-written


def test_a_package_that_cannot_be_had_names_the_remedy(index):
    with pytest.raises(RuntimeError, match="no-such-asset==9.9.*(?s:.*)PIP_FIND_LINKS"):
        assets.unpacked(assets.Wheel("no-such-asset", "9.9", "0" * 64, "x/"))


@pytest.mark.parametrize("member", ["toy/../../evil.txt", "toy//etc/evil.txt"])
def test_members_that_lead_out_of_the_archive_are_refused(tmp_path, member):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr(member, "evil")
    with pytest.raises(RuntimeError, match="leads out"):
        assets.extract(archive, "toy/", tmp_path / "out")
    assert not (tmp_path / "evil.txt").exists()


def test_an_archive_without_the_wanted_members_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.writestr("other/x", "x")
    with pytest.raises(RuntimeError, match="a.zip: holds nothing under 'toy/'"):
        assets.extract(tmp_path / "a.zip", "toy/", tmp_path / "out")
