"""Downloads, against a server on this machine that can cut connections, change its file and refuse."""

import hashlib
import http.server
import io
import re
import socket
import threading
import zipfile

import pytest

from recrl_lib import data, download
from recrl_lib.data import amazon
from recrl_lib.download import Origin, Remote, fetch

CONTENT = bytes(range(256)) * 12_000  # 3 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` with ETags and ranges. ``cuts``: bytes after which each of the next answers breaks off; ``errors``: codes first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.errors: list[int] = []
        self.ranges = True
        self.log: list[tuple[str, str | None, int]] = []  # path, Range, status

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        content = server.files.get(self.path[1:])
        status = server.errors.pop(0) if server.errors else 404 if content is None else 200
        if status != 200:
            return self.answer(status, {}, b"")
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range") == tag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(content):
                return self.answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            status = 206
        headers = {"ETag": tag} | (
            {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            if status == 206
            else {}
        )
        self.answer(status, headers, content[start:], server.cuts.pop(0) if server.cuts else None)

    def answer(self, status, headers, body, cut=None):
        self.server.log.append((self.path[1:], self.headers.get("Range"), status))
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as running:
        threading.Thread(
            target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        running.files["a.bin"] = CONTENT
        yield running
        running.shutdown()


def test_fetched_once_and_kept(server, tmp_path):
    remote = Remote(server.url("a.bin"), SHA256)
    path = fetch(remote, tmp_path / "new")
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["a.bin"]
    assert fetch(remote, tmp_path / "new") == path and len(server.log) == 1


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    server.cuts = [2_500_000, 400_000]
    path = fetch(Remote(server.url("a.bin"), SHA256), tmp_path, waits=(0, 0))
    assert path.read_bytes() == CONTENT
    assert [status for _, _, status in server.log] == [200, 206, 206]
    starts = [int(asked[6:-1]) for _, asked, _ in server.log[1:]]
    assert 0 < starts[0] < starts[1] < len(CONTENT)


def test_a_download_killed_and_started_again_goes_on(server, tmp_path):
    server.cuts = [2_000_000]
    with pytest.raises(
        RuntimeError,
        match=r"could not fetch .*a.bin in 1 tries: .*Remedy: .* fetch http.*a.bin by hand, put it in",
    ):
        fetch(Remote(server.url("a.bin"), SHA256), tmp_path, waits=())
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "a.bin.part",
        "a.bin.part.etag",
    ]
    assert fetch(Remote(server.url("a.bin"), SHA256), tmp_path, waits=()).read_bytes() == CONTENT
    assert server.log[1][1] is not None and server.log[1][2] == 206


def test_a_file_that_changed_at_the_origin_is_fetched_anew(server, tmp_path):
    server.cuts = [2_000_000]
    with pytest.raises(RuntimeError):
        fetch(Remote(server.url("a.bin")), tmp_path, waits=())
    server.files["a.bin"] = CONTENT[::-1]
    assert fetch(Remote(server.url("a.bin")), tmp_path, waits=()).read_bytes() == CONTENT[::-1]
    assert server.log[1][2] == 200


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.ranges, server.cuts = False, [2_000_000]
    assert fetch(Remote(server.url("a.bin"), SHA256), tmp_path, waits=(0,)).read_bytes() == CONTENT
    assert [status for _, _, status in server.log] == [200, 200]


def test_a_part_that_is_whole_already_is_used(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    (tmp_path / "a.bin.part.etag").write_text(f'"{hashlib.md5(CONTENT).hexdigest()}"')
    assert fetch(Remote(server.url("a.bin"), SHA256), tmp_path, waits=()).read_bytes() == CONTENT
    assert [status for _, _, status in server.log] == [416]


def test_a_part_that_is_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    (tmp_path / "a.bin.part.etag").write_text(f'"{hashlib.md5(CONTENT).hexdigest()}"')
    assert fetch(Remote(server.url("a.bin"), SHA256), tmp_path, waits=(0,)).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_the_file_deleted(server, tmp_path):
    server.files["a.bin"] = b"tampered"
    with pytest.raises(
        RuntimeError,
        match=f"sha256 is {hashlib.sha256(b'tampered').hexdigest()}, expected {SHA256}. What was fetched has been deleted",
    ):
        fetch(Remote(server.url("a.bin"), SHA256), tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []
    (tmp_path / "a.bin").write_bytes(b"by hand, and another file")
    with pytest.raises(RuntimeError, match="a.bin: sha256 is .* Remedy: delete it"):
        fetch(Remote(server.url("a.bin"), SHA256), tmp_path)


def test_the_md5_that_an_origin_publishes_is_checked(server, tmp_path):
    remote = Remote(server.url("a.bin"), md5_url=server.url("a.bin.md5"))
    server.files["a.bin.md5"] = f"MD5 (a.bin) = {hashlib.md5(CONTENT).hexdigest()}\n".encode()
    assert fetch(remote, tmp_path / "good").read_bytes() == CONTENT
    server.files["a.bin.md5"] = b"0" * 32 + b"  a.bin\n"
    with pytest.raises(RuntimeError, match="md5 is .*, expected 0000"):
        fetch(remote, tmp_path / "bad")
    server.files["a.bin.md5"] = b"<html>"
    with pytest.raises(RuntimeError, match="states no md5"):
        fetch(remote, tmp_path / "none")


def test_what_is_not_there_is_not_asked_for_again(server, tmp_path):
    with pytest.raises(
        RuntimeError,
        match="gone.zip: HTTP 404 Not Found. Remedy: check the network, or fetch .* by hand, put it in .* as gone.zip",
    ):
        fetch(Remote(server.url("gone.zip")), tmp_path, waits=(0, 0))
    assert len(server.log) == 1


def test_a_server_that_is_busy_is_asked_again(server, tmp_path):
    server.errors = [503, 429]
    assert (
        fetch(Remote(server.url("a.bin"), SHA256), tmp_path, waits=(0, 0)).read_bytes() == CONTENT
    )
    server.errors = [503, 503]
    with pytest.raises(RuntimeError, match="HTTP 503"):
        fetch(Remote(server.url("a.bin"), SHA256), tmp_path / "again", waits=(0,))


def test_a_host_that_cannot_be_reached_is_named_with_the_folder(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(
        RuntimeError,
        match=rf"in 2 tries: .*refused.*put it in {re.escape(str(tmp_path))} as x.zip, and start again",
    ):
        fetch(Remote(f"http://127.0.0.1:{port}/x.zip"), tmp_path, waits=(0,))


def zipped(members: dict[str, str]) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return out.getvalue()


def test_a_zipped_data_set_is_unpacked_once(server, monkeypatch):
    server.files["ml-25m.zip"] = zipped(
        {"ml-25m/ratings.csv": "R", "ml-25m/movies.csv": "M", "ml-25m/tags.csv": "T"}
    )
    monkeypatch.setitem(
        download.ORIGINS,
        "ml-25m",
        Origin((Remote(server.url("ml-25m.zip")),), ("ratings.csv", "movies.csv")),
    )
    folder = data.folder_of("ml-25m")
    assert {p.name: p.read_text() for p in folder.iterdir()} == {
        "ratings.csv": "R",
        "movies.csv": "M",
    }
    assert data.folder_of("ml-25m") == folder and len(server.log) == 1


def test_a_zip_without_the_wanted_files_is_named(server, monkeypatch):
    server.files["ml-25m.zip"] = zipped({"ml-25m/ratings.csv": "R"})
    monkeypatch.setitem(
        download.ORIGINS,
        "ml-25m",
        Origin((Remote(server.url("ml-25m.zip")),), ("ratings.csv", "movies.csv")),
    )
    with pytest.raises(
        RuntimeError, match="holds nothing under 'ml-25m/', or not all of ratings.csv, movies.csv"
    ):
        data.folder_of("ml-25m")


def test_a_data_set_of_single_files_needs_all_of_them(server, monkeypatch):
    server.files |= {"meta.gz": b"m", "reviews.gz": b"r"}
    monkeypatch.setitem(
        download.ORIGINS,
        "amazon-books",
        Origin((Remote(server.url("meta.gz")), Remote(server.url("reviews.gz")))),
    )
    monkeypatch.setattr(download, "WAITS", ())
    folder = data.folder_of("amazon-books")
    (folder / "meta.gz").unlink()
    assert data.folder_of("amazon-books") == folder
    assert [name for name, _, _ in server.log] == ["meta.gz", "reviews.gz", "meta.gz"]


def test_origins_are_verified_and_their_files_known_to_the_loaders():
    for name, origin in download.ORIGINS.items():
        for remote in origin.files:
            assert remote.url.startswith("https://") and (
                remote.sha256 or remote.md5_url or name in data.AMAZON
            )
            assert not remote.sha256 or re.fullmatch("[0-9a-f]{64}", remote.sha256)
    for name in data.AMAZON:
        metadata, reviews = (remote.name for remote in download.ORIGINS[name].files)
        assert (
            metadata.removesuffix(".gz") in amazon.METADATA
            and reviews.removesuffix(".gz") in amazon.REVIEWS
        )
