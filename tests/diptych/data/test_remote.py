"""Shards over the network: what arrives is complete, or it is counted."""

import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import diptych.testing as make
from diptych.config import from_tree
from diptych.data import index
from diptych.data.loader import build_loader
from diptych.data.reader import Feed
from diptych.data.remote import RemoteConfig, Unreachable, fetch
from diptych.data.shards import ShardStore, read_shard
from diptych.data.sources import DataConfig
from diptych.errors import DataError

QUICK = RemoteConfig(attempts=4, timeout_seconds=0.4, backoff_seconds=0.01)
Answer = Callable[[http.server.BaseHTTPRequestHandler, bytes], None]


class Server:
    """Serves the files of a folder; `answers[name]` is a list of ways to misbehave, one per request, then good ones."""

    def __init__(self, folder: Path) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[tuple[str, str]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                server.requests.append((name, self.headers.get("Range", "")))
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
