"""Shards over the network: what arrives is complete, or it is counted."""

import gc
import hashlib
import http.server
import io
import logging
import math
import socket
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import psutil
import pytest
import torch

import diptych.testing as make
from diptych.config import from_tree
from diptych.data import index
from diptych.data.loader import build_loader
from diptych.data.reader import Feed
from diptych.data.remote import RemoteConfig, Unreachable, fetch, sidecar_url, size
from diptych.data.shards import ShardStore, read_shard
from diptych.data.sources import DataConfig
from diptych.errors import ConfigError, DataError

QUICK = RemoteConfig(attempts=4, timeout_seconds=0.4, backoff_seconds=0.01)
Answer = Callable[[http.server.BaseHTTPRequestHandler, bytes], None]


class Server:
    """Serves the files of a folder; `answers[name]` is a list of ways to misbehave, one per request, then good ones."""

    def __init__(self, folder: Path) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[tuple[str, str]] = []
        self.conditions: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = urllib.parse.unquote(self.path.lstrip("/").partition("?")[0])
                server.requests.append((name, self.headers.get("Range", "")))
                server.conditions.append(self.headers.get("If-Range", ""))
                if not (folder / name).is_file():
                    self.send_error(404)
                    return
                answers = server.answers.get(name, [])
                (answers.pop(0) if answers else whole)(self, (folder / name).read_bytes())

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def whole(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    """As a good server does, ranges included."""
    asked = request.headers.get("Range", "")
    start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
    request.send_response(206 if asked else 200)
    if asked:
        request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    request.send_header("Content-Length", str(len(data) - start))
    request.end_headers()
    request.wfile.write(data[start:])


def without_ranges(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def short(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data[: len(data) // 3])


def reset(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data[: len(data) // 2])
    request.wfile.flush()
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    request.connection.close()


def stall(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data[:700])
    request.wfile.flush()
    time.sleep(2)


def trickle(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    """Never silent for long, and never done."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    try:
        for position in range(40):
            request.wfile.write(data[position : position + 1])
            request.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


def busy(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    request.send_error(503)


def wrong_range(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    request.send_response(206)
    request.send_header("Content-Range", f"bytes 7-{len(data) - 1}/{len(data)}")
    request.send_header("Content-Length", str(len(data) - 7))
    request.end_headers()
    request.wfile.write(data[7:])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make.write_shards(tmp_path / "served", [6, 5, 0, 7])


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    running = Server(folder)
    yield running
    running.close()


@pytest.mark.parametrize(
    "answers",
    [
        [short],
        [reset],
        [stall],
        [trickle],
        [busy, busy, busy],
        [short, busy, whole],
        [short, without_ranges],
        [short, wrong_range],
        [reset, stall, short],
    ],
)
def test_a_broken_transfer_is_taken_up_again(
    answers: list[Answer], server: Server, folder: Path, tmp_path: Path
) -> None:
    server.answers["000000.tar"] = list(answers)
    fetch(f"{server.url}/000000.tar", tmp_path / "copy", QUICK)
    assert (tmp_path / "copy").read_bytes() == (folder / "000000.tar").read_bytes()
    assert len(server.requests) == len(answers) + (answers[-1] not in (whole, without_ranges))


def test_it_goes_on_where_it_broke_off(server: Server, folder: Path, tmp_path: Path) -> None:
    server.answers["000000.tar"] = [short]
    fetch(f"{server.url}/000000.tar", tmp_path / "copy", QUICK)
    size = (folder / "000000.tar").stat().st_size
    assert server.requests == [("000000.tar", ""), ("000000.tar", f"bytes={size // 3}-")]


def test_what_is_not_there_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="404"):
        fetch(f"{server.url}/none.tar", tmp_path / "copy", QUICK)
    assert len(server.requests) == 1


def test_the_last_failure_is_named(server: Server, tmp_path: Path) -> None:
    server.answers["000000.tar"] = [busy] * 4
    with pytest.raises(Unreachable, match="503"):
        fetch(f"{server.url}/000000.tar", tmp_path / "copy", QUICK)
    with pytest.raises(Unreachable, match="refused"):
        fetch("http://127.0.0.1:1/x.tar", tmp_path / "copy", QUICK)


def test_commands(folder: Path, tmp_path: Path) -> None:
    shard = folder / "000000.tar"
    fetch(f"pipe:cat {shard}", tmp_path / "copy", QUICK)
    assert (tmp_path / "copy").read_bytes() == shard.read_bytes()
    marker = tmp_path / "tried"
    twice = f"pipe:if [ -e {marker} ]; then cat {shard}; else touch {marker}; head -c 3000 {shard}; exit 3; fi"
    fetch(twice, tmp_path / "copy", QUICK)
    assert (tmp_path / "copy").read_bytes() == shard.read_bytes()
    with pytest.raises(Unreachable, match="stalled"):
        fetch("pipe:sleep 5", tmp_path / "copy", RemoteConfig(attempts=1, timeout_seconds=0.2))


def test_file_systems_of_fsspec(folder: Path, tmp_path: Path) -> None:
    data = (folder / "000000.tar").read_bytes()
    fsspec.filesystem("memory").pipe("/bucket/000000.tar", data)
    fetch("memory://bucket/000000.tar", tmp_path / "copy", QUICK)
    assert (tmp_path / "copy").read_bytes() == data
    with pytest.raises(Unreachable):
        fetch("memory://bucket/none.tar", tmp_path / "copy", QUICK)
    with pytest.raises(DataError, match=r"no installed package opens nosuch://.*pip install"):
        fetch("nosuch://bucket/x.tar", tmp_path / "copy", QUICK)


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def date(data: bytes) -> str:
    return f"Mon, 05 Jan 2026 10:00:{data[-1] % 60:02d} GMT"


def marked(
    request: http.server.BaseHTTPRequestHandler,
    data: bytes,
    *,
    marks: dict[str, Callable[[bytes], str]],
    honest: bool,
    sent: float = 1.0,
) -> None:
    """A server that knows versions. It heeds `If-Range` when `honest`, and sends this share of the file."""
    asked, condition = request.headers.get("Range", ""), request.headers.get("If-Range")
    if honest and condition not in (None, *(mark(data) for mark in marks.values())):
        asked = ""
    start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
    request.send_response(206 if asked else 200)
    if asked:
        request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    for name, mark in marks.items():
        request.send_header(name, mark(data))
    request.send_header("Content-Length", str(len(data) - start))
    request.end_headers()
    request.wfile.write(data[start : int(len(data) * sent)])


VERSIONS: dict[str, tuple[dict[str, Callable[[bytes], str]], bool, bytes]] = {
    "heeds the ETag": ({"ETag": etag, "Last-Modified": lambda _: "never"}, True, b"b" * 9000),
    "heeds Last-Modified": ({"Last-Modified": date}, True, b"b" * 9000),
    "has a weak ETag": ({"ETag": lambda data: "W/" + etag(data), "Last-Modified": date}, True, b"b" * 9000),
    "heeds nothing, tells the ETag": ({"ETag": etag}, False, b"b" * 9000),
    "heeds nothing, tells the size": ({}, False, b"b" * 9001),
    "has a shorter file now": ({}, False, b"b" * 1000),
}


@pytest.mark.parametrize("name", VERSIONS)
def test_a_file_replaced_between_two_tries_is_not_spliced(
    name: str, server: Server, folder: Path, tmp_path: Path
) -> None:
    marks, honest, new = VERSIONS[name]
    (folder / "x.tar").write_bytes(b"a" * 9000)

    def first(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
        (folder / "x.tar").write_bytes(new)
        marked(request, data, marks=marks, honest=honest, sent=0.5)

    server.answers["x.tar"] = [first] + [partial(marked, marks=marks, honest=honest)] * 3
    if name == "has a shorter file now":
        server.answers["x.tar"][1] = lambda request, _: request.send_error(416)
    fetch(f"{server.url}/x.tar", tmp_path / "copy", RemoteConfig(attempts=2, backoff_seconds=0))
    assert (tmp_path / "copy").read_bytes() == new


def test_a_file_that_stays_is_asked_for_with_its_version(server: Server, folder: Path, tmp_path: Path) -> None:
    data = (folder / "000000.tar").read_bytes()
    weak = {"ETag": lambda data: "W/" + etag(data)}
    for marks, condition in (({"ETag": etag}, etag(data)), ({"Last-Modified": date}, date(data)), (weak, "")):
        server.answers["000000.tar"] = [partial(marked, marks=marks, honest=True, sent=part) for part in (0.25, 0.5, 1)]
        server.requests.clear()
        server.conditions.clear()
        fetch(f"{server.url}/000000.tar", tmp_path / "copy", QUICK)
        assert (tmp_path / "copy").read_bytes() == data
        assert [asked for _, asked in server.requests] == ["", *(f"bytes={int(len(data) * p)}-" for p in (0.25, 0.5))]
        assert server.conditions == ["", condition, condition]


def no_number(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "abc")
    request.end_headers()


def nowhere(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    request.send_response(302)
    request.send_header("Location", "http://[bad/")
    request.end_headers()


@pytest.mark.parametrize("answer", [no_number, nowhere])
def test_a_senseless_answer_is_final(answer: Answer, server: Server, tmp_path: Path) -> None:
    server.answers["000000.tar"] = [answer]
    with pytest.raises(Unreachable, match="ValueError"):
        fetch(f"{server.url}/000000.tar", tmp_path / "copy", QUICK)
    assert len(server.requests) == 1
    gc.collect()  # an unclosed connection would be warned of here


def test_names_beyond_ascii(server: Server, folder: Path, tmp_path: Path) -> None:
    (folder / "ü 1%.tar").write_bytes(b"umlaut")
    for name in ("ü 1%25.tar", "%C3%BC%201%25.tar"):
        fetch(f"{server.url}/{name}?sig=a%2Fb", tmp_path / "copy", QUICK)
        assert (tmp_path / "copy").read_bytes() == b"umlaut"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # fsspec leaves the connection to the garbage collector
def test_a_server_that_denies(tmp_path: Path) -> None:
    class Denies(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 hello\r\n")
            while self.rfile.readline():
                self.wfile.write(b"530 denied\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Denies) as ftp:
        ftp.daemon_threads = True
        threading.Thread(target=ftp.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(Unreachable, match="530 denied"):
            fetch(f"ftp://127.0.0.1:{ftp.server_address[1]}/x.tar", tmp_path / "copy", QUICK)
        ftp.shutdown()
    gc.collect()


def test_a_container_that_is_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="BadZipFile"):
        fetch(f"zip://x.tar::file://{folder}/000000.tar", tmp_path / "copy", QUICK)


def test_a_trickle_of_headers_is_given_up_and_its_connection_shut(server: Server, folder: Path, tmp_path: Path) -> None:
    shut = threading.Event()

    def trickles(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: ")
        try:
            for _ in range(200):
                request.wfile.write(b"x")
                time.sleep(0.02)
        except OSError:
            shut.set()
            return
        request.wfile.write(b"\r\n\r\nno")

    server.answers["000000.tar"] = [trickles]
    fetch(f"{server.url}/000000.tar", tmp_path / "copy", QUICK)
    assert (tmp_path / "copy").read_bytes() == (folder / "000000.tar").read_bytes()
    assert shut.wait(3)


class Unsteady(fsspec.AbstractFileSystem):
    """A file system of one file; `openings` are ways to misbehave, one per time that it is opened."""

    protocol = "unsteady"
    data: ClassVar[bytes] = b""
    openings: ClassVar[list[Callable[[bytes], io.BytesIO]]] = []

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": len(self.data), "etag": etag(self.data)}

    def _open(self, path: str, *_: Any, **__: Any) -> io.BytesIO:
        return (self.openings.pop(0) if self.openings else io.BytesIO)(self.data)


class Ends(io.BytesIO):
    """Comes to an end in the middle."""

    def read(self, size: int | None = -1, /) -> bytes:
        half = len(self.getvalue()) // 2
        return super().read(min(size or 0, half - self.tell())) if self.tell() < half else b""


class Hangs(Ends):
    """Stands still in the middle."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size) or str(time.sleep(2)).encode()[:0]


class Slow(io.BytesIO):
    """Brings 100 kB a second, and shows a piece only when all of it is there."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        time.sleep(len(data) / 100_000)
        return data


@pytest.fixture
def unsteady() -> Iterator[type[Unsteady]]:
    fsspec.register_implementation("unsteady", Unsteady, clobber=True)
    Unsteady.data, Unsteady.openings = bytes(range(256)) * 200, []
    yield Unsteady
    Unsteady.openings = []


@pytest.mark.parametrize("opening", [Ends, Hangs])
def test_a_file_system_that_stops_is_asked_again(
    opening: type[io.BytesIO], unsteady: type[Unsteady], tmp_path: Path
) -> None:
    unsteady.openings = [opening]
    fetch("unsteady://x.tar", tmp_path / "copy", QUICK)
    assert (tmp_path / "copy").read_bytes() == unsteady.data


def test_a_slow_file_system_does_not_stall(unsteady: type[Unsteady], tmp_path: Path) -> None:
    unsteady.openings = [Slow] * 4  # the first piece, all 51 kB, takes longer than the time limit; smaller ones do not
    fetch("unsteady://x.tar", tmp_path / "copy", QUICK)
    assert (tmp_path / "copy").read_bytes() == unsteady.data


def test_a_file_replaced_in_a_file_system_is_not_spliced(unsteady: type[Unsteady], tmp_path: Path) -> None:
    def replaced(data: bytes) -> Ends:
        unsteady.data = data[::-1]
        return Ends(data)

    unsteady.openings = [replaced]
    fetch("unsteady://x.tar", tmp_path / "copy", QUICK)
    assert (tmp_path / "copy").read_bytes() == unsteady.data


def is_gone(pid_file: Path) -> bool:
    """Whether the process ends soon; nobody may be there to collect an orphan."""
    try:
        process = psutil.Process(int(pid_file.read_text()))
        for _ in range(100):
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.02)
        process.kill()
    except psutil.NoSuchProcess:
        return True
    return False


@pytest.mark.parametrize("end", ["wait", "exec >&-; wait"])
def test_a_command_that_stalls_ends_with_its_children(end: str, folder: Path, tmp_path: Path) -> None:
    child = tmp_path / "child"
    command = f"pipe:cat {folder}/000000.tar; sleep 20 > /dev/null & echo $! > {child}; {end}"
    with pytest.raises(Unreachable, match="stalled"):
        fetch(command, tmp_path / "copy", RemoteConfig(attempts=1, timeout_seconds=0.3))
    assert is_gone(child)


def test_commands_of_webdataset(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "ais"
    tool.write_text(f'#!/bin/sh\n[ "$2" = ais://bucket/000000.tar ] || exit 4\nexec cat {folder}/000000.tar\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    fetch("ais://bucket/000000.tar", tmp_path / "copy", QUICK)
    assert (tmp_path / "copy").read_bytes() == (folder / "000000.tar").read_bytes()
    with pytest.raises(Unreachable, match="exit code 4"):
        fetch("ais://bucket/none.tar", tmp_path / "copy", QUICK)
    tool.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 20\n")
    with pytest.raises(Unreachable, match="stalled"):
        fetch("ais://bucket/000000.tar", tmp_path / "copy", RemoteConfig(attempts=1, timeout_seconds=0.3))
    assert is_gone(tmp_path / "pid")


def test_our_own_disk_is_not_the_network(server: Server, tmp_path: Path) -> None:
    for target, reason in ((Path("/dev/full"), "No space left"), (tmp_path / "none" / "copy", "No such file")):
        server.requests.clear()
        with pytest.raises(DataError, match=rf"^no room for copies .*{reason}.* · {target.parent} · free space"):
            fetch(f"{server.url}/000000.tar", target, QUICK)
        assert len(server.requests) <= 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attempts", 0),
        ("timeout_seconds", 0.0),
        ("timeout_seconds", math.inf),
        ("timeout_seconds", math.nan),
        ("backoff_seconds", -1.0),
        ("backoff_seconds", math.inf),
        ("backoff_seconds", math.nan),
    ],
)
def test_settings_without_an_end_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        from_tree(RemoteConfig, {key: value})


@pytest.mark.parametrize("url", ["pipe:sleep 20", "pipe:exit 1", "SERVER/000000.tar", "unsteady://x.tar"])
def test_a_transfer_and_a_pause_can_be_stopped(
    url: str, server: Server, unsteady: type[Unsteady], tmp_path: Path
) -> None:
    server.answers["000000.tar"] = [stall]
    unsteady.openings = [Hangs]
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Unreachable, match="stopped"):
        fetch(url.replace("SERVER", server.url), tmp_path / "copy", RemoteConfig(backoff_seconds=60), stop)
    assert time.monotonic() - began < 15  # what is waited for takes 20 s and more, or the time limit of 30 s
    with pytest.raises(Unreachable, match="stopped"):
        fetch(f"{server.url}/000001.tar", tmp_path / "copy", QUICK, stop)
    assert "000001.tar" not in [name for name, _ in server.requests]


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://host/x.tar", "http://host/x.tar.index"),
        ("https://host/x.tar?sig=1&b=?", "https://host/x.tar.index?sig=1&b=?"),
        ("https://host/x.tar#part", "https://host/x.tar.index#part"),
        ("s3://bucket/x.tar", "s3://bucket/x.tar.index"),
        ("s3://bucket/#1.tar", "s3://bucket/#1.tar.index"),
        ("s3://bucket/x.tar?versionId=7", "s3://bucket/x.tar.index?versionId=7"),
        ("zip://x.tar::https://host/a.zip?sig=1", "zip://x.tar.index::https://host/a.zip?sig=1"),
        ("pipe:cat x.tar", None),
    ],
)
def test_the_address_of_a_sidecar(url: str, address: str | None) -> None:
    assert sidecar_url(url, ".index") == address


def test_the_size_is_told_without_the_content(
    server: Server, unsteady: type[Unsteady], folder: Path, tmp_path: Path
) -> None:
    server.answers["000000.tar"] = [busy, stall]
    assert size(f"{server.url}/000000.tar", QUICK) == (folder / "000000.tar").stat().st_size
    unsteady.openings = [Hangs]
    assert size("unsteady://x.tar", QUICK) == len(unsteady.data)
    assert size(f"pipe:touch {tmp_path}/ran", QUICK) is None
    assert not (tmp_path / "ran").exists()
    with pytest.raises(Unreachable, match="404"):
        size(f"{server.url}/none.tar", QUICK)


def test_nothing_from_outside_commands_the_terminal(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def colourful(request: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
        request.send_response(503, "\x1b[31mbusy")
        request.end_headers()

    server.answers["000000.tar"] = [colourful] * 2
    with caplog.at_level(logging.WARNING), pytest.raises(Unreachable) as refused:
        fetch(f"{server.url}/000000.tar?\x1b[2J\n", tmp_path / "copy", RemoteConfig(attempts=2, backoff_seconds=0))
    with pytest.raises(DataError) as unknown:
        fetch("nosuch://\x1b[2J/x.tar", tmp_path / "copy", QUICK)
    texts = [str(refused.value), str(unknown.value), caplog.messages[0]]
    assert all(text.isprintable() and "\\x1b[" in text for text in texts)


def test_copies_live_as_long_as_their_entries(server: Server, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    opened = ShardStore(QUICK, scratch).open(f"{server.url}/000000.tar")
    assert [opened.read(number).key for number in range(6)] == [f"s{i:04d}" for i in range(6)]
    assert len(list(scratch.glob("*.tar"))) == 1
    del opened
    assert not list(scratch.glob("*.tar"))


def test_remote_samples_are_the_local_ones(server: Server, folder: Path) -> None:
    remote = list(read_shard(f"{server.url}/000003.tar"))
    assert [raw._replace(shard="") for raw in remote] == [
        raw._replace(shard="") for raw in read_shard(str(folder / "000003.tar"))
    ]


class Tokenizer:
    context_length = 4

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(text), 9, 0, 0] for text in texts])


def batches(shards: str, tmp_path: Path, *, count: int, workers: int = 0, start: Any = None) -> list[Any]:
    tree = {
        "shards": shards,
        "lanes": 2,
        "shuffle_window": 4,
        "workers": workers,
        "max_bad_fraction": 1.0,
        "remote": {
            "attempts": 3,
            "timeout_seconds": 0.4,
            "backoff_seconds": 0.01,
            "scratch": str(tmp_path / "scratch"),
        },
    }
    feed = Feed(4, 0, 1, seed=0, image_size=16, tokenizer=Tokenizer())
    with build_loader(from_tree(DataConfig, tree), feed).batches(start) as stream:
        return list(islice(stream, count))


def test_training_over_a_bad_line_reads_what_a_good_disk_gives(server: Server, folder: Path, tmp_path: Path) -> None:
    server.answers |= {"000000.tar": [reset, short], "000001.tar": [busy], "000003.tar": [stall, trickle]}
    local = batches(str(folder / "{000000..000003}.tar"), tmp_path, count=12)
    remote = batches(f"{server.url}/{{000000..000003}}.tar", tmp_path, count=12, workers=2)
    assert [batch.keys for batch in remote] == [batch.keys for batch in local]
    assert not any(batch.faults for batch in remote)
    assert not list((tmp_path / "scratch").iterdir())
    resumed = batches(f"{server.url}/{{000000..000003}}.tar", tmp_path, count=7, start=remote[4].cursors)
    assert [batch.keys for batch in resumed] == [batch.keys for batch in local[5:]]


def test_a_shard_that_never_comes_is_counted(server: Server, folder: Path, tmp_path: Path) -> None:
    server.answers["000001.tar"] = [busy] * 1000
    seen = batches(f"{server.url}/{{000000..000003}}.tar", tmp_path, count=10)
    faults = {(fault.reason, fault.shard[-10:]) for batch in seen for fault in batch.faults}
    assert faults == {("unreachable_shard", "000001.tar")}
    assert {key for batch in seen for key in batch.keys} == {f"s{i:04d}" for i in range(18) if not 6 <= i < 11}


def test_nothing_reachable_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shards cannot be read"):
        batches("http://127.0.0.1:1/{000000..000003}.tar", tmp_path, count=1)


def test_a_shard_that_vanishes_in_the_middle_is_counted(folder: Path, tmp_path: Path) -> None:
    tree = {"shards": str(folder), "lanes": 1, "shuffle_window": 4, "workers": 0, "max_bad_fraction": 1.0}
    feed = Feed(6, 0, 1, seed=0, image_size=16, tokenizer=Tokenizer())
    with build_loader(from_tree(DataConfig, tree), feed).batches() as stream:
        first = list(islice(stream, 3))  # one epoch
        (folder / "000000.tar").unlink()
        index.sidecar(folder / "000000.tar").unlink()
        second = list(islice(stream, 5))
    assert {key for batch in first for key in batch.keys} == {f"s{i:04d}" for i in range(18)}
    assert {(f.reason, Path(f.shard).name) for batch in second for f in batch.faults} == {
        ("missing_shard", "000000.tar")
    }
    assert {key for batch in second for key in batch.keys} == {f"s{i:04d}" for i in range(6, 18)}


@pytest.mark.parametrize("broken", ["gone, its index is not", "replaced, its index is stale"])
def test_resuming_counts_as_reading_did(broken: str, server: Server, folder: Path, tmp_path: Path) -> None:
    if broken.startswith("gone"):
        (folder / "000001.tar").unlink()
    else:
        index_before = index.sidecar(folder / "000001.tar").read_text()
        make.write_shard(folder / "000001.tar", [make.tiny_sample(f"new{i}") for i in range(9)])
        index.sidecar(folder / "000001.tar").write_text(index_before)
    shards = f"{server.url}/{{000000..000003}}.tar"
    unbroken = batches(shards, tmp_path, count=12)
    if broken.startswith("gone"):  # known sample by sample
        assert {fault.key for batch in unbroken for fault in batch.faults} == {f"s{i:04d}" for i in range(6, 11)}
    for stop in (2, 5, 9):
        resumed = batches(shards, tmp_path, count=12 - stop, start=unbroken[stop - 1].cursors, workers=2)
        assert [batch.keys for batch in resumed] == [batch.keys for batch in unbroken[stop:]]
