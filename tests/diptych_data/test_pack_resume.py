"""Several processes, kill and resume, a full disk: the shards are those of an undisturbed pack by one process."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from diptych.config import from_tree
from diptych.data import index
from diptych.errors import DataError
from diptych_data import parallel
from diptych_data.pack import PackOptions, PackSummary, pack
from diptych_data.packing.workfolder import opened

PER_SHARD = 10
PROGRAM = """
import signal
import sys
from pathlib import Path
from diptych_data.pack import PackOptions, pack

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started deaf to it
    source, out = sys.argv[1:]
    pack(PackOptions(source=Path(source), out=Path(out), samples_per_shard=10, workers=2, on_bad="skip"))
"""


def run(source: Path, out: Path, **options: object) -> PackSummary:
    given = {"source": str(source), "out": str(out), "samples_per_shard": PER_SHARD, "on_bad": "skip"}
    return pack(from_tree(PackOptions, given | options))


def table(path: Path, count: int, *, side: int = 16) -> Path:
    path.parent.mkdir(exist_ok=True)
    for colour in range(5):
        Image.effect_noise((side, side), 10 * colour + 10).convert("RGB").save(path.parent / f"{colour}.png")
    (path.parent / "bad.png").write_bytes(b"<html>")
    names = ["bad.png" if number % 17 == 3 else f"{number % 5}.png" for number in range(count)]
    path.write_text("image,caption\n" + "".join(f"{name},caption {n}\n" for n, name in enumerate(names)))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    source = table(tmp_path / "in" / "t.csv", 65)
    for name, number in (("one", 1), ("three", 3)):
        summary = run(source, tmp_path / name, workers=number, shuffle_seed=7)
        assert (summary.rows, summary.samples, summary.shards, summary.skipped) == (65, 61, 7, 4)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert len(contents(tmp_path / "one")) == 7 * 2 + 2
    assert not list(tmp_path.glob(".*"))


def test_the_first_bad_row_is_named_whoever_found_it(tmp_path: Path) -> None:
    source = table(tmp_path / "in" / "t.csv", 65)
    source.write_text(source.read_text().replace("0.png,caption 40", "gone.png,caption 40"))
    for number in (1, 3):
        with pytest.raises(DataError, match=r"unreadable picture.*bad\.png"):
            run(source, tmp_path / "out", workers=number, on_bad="stop")
        assert not list(tmp_path.glob(".*"))


def killed(source: Path, out: Path, *, at: int) -> Path:
    """Packs in another process and kills it without warning when `at` shards are complete; returns what it left."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(source, out), kwargs={"workers": 1})
    process.start()
    left = _wait_for_shards(out, at, process.is_alive)
    process.kill()
    process.join()
    return left


def killed_with_workers(source: Path, out: Path, *, at: int) -> Path:
    """The same for a process that has workers, which end with it."""
    with program(source, out) as process:
        left = _wait_for_shards(out, at, alive(process))
        process.kill()
    _wait_for_orphans(left)
    return left


def _wait_for_shards(out: Path, count: int, alive: Callable[[], bool]) -> Path:
    left = out.with_name(f".{out.name}.tmp")
    deadline = time.monotonic() + 60
    while len(list(left.glob("*.tar.index.jsonl"))) < count:
        assert alive(), "it was done before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return left


def _wait_for_orphans(folder: Path) -> None:
    """Workers end with the process that started them: nothing is written any more after a moment."""
    deadline = time.monotonic() + 20
    while _writers(folder):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.02)


def _writers(folder: Path) -> list[str]:
    """Processes that were given this folder's name or hold a file in it open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(folder) in str(entry.readlink()) for entry in (process / "fd").iterdir()):
                found.append(process.name)
        except OSError:
            continue
    return found


def program(source: Path, out: Path) -> "subprocess.Popen[bytes]":
    """A process of its own, with two workers of its own."""
    words = [sys.executable, "-c", PROGRAM, str(source), str(out)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, start_new_session=True)


def alive(process: "subprocess.Popen[bytes]") -> Callable[[], bool]:
    return lambda: process.poll() is None


@pytest.mark.parametrize("number", [1, 2])
def test_a_killed_pack_goes_on(tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "diptych_data")
    source = table(tmp_path / "in" / "t.csv", 300, side=64)
    run(source, tmp_path / "whole")
    left = (
        killed(source, tmp_path / "out", at=5) if number == 1 else killed_with_workers(source, tmp_path / "out", at=5)
    )
    (left / ".000029.tar.123.part").write_bytes(b"half a shard")
    before = {tar.name: tar.stat() for tar in left.glob("*.tar") if index.sidecar(tar).exists()}
    assert 5 <= len(before) < 30
    assert not (tmp_path / "out").exists()
    caplog.clear()
    summary = run(source, tmp_path / "out")
    assert f"goes on: {len(before)} of 30 shards are complete" in caplog.text
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (summary.rows, summary.shards) == (300, 30)
    for name, status in before.items():
        now = (tmp_path / "out" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("change", ["options", "source"])
def test_other_options_or_another_source_start_afresh(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = table(tmp_path / "in" / "t.csv", 200)
    killed(source, tmp_path / "out", at=2)
    options = {"samples_per_shard": 50} if change == "options" else {}
    if change == "source":
        with source.open("a") as file:
            file.write("0.png,one more\n")
    caplog.clear()
    run(source, tmp_path / "out", **options)
    assert "thrown away" in caplog.text
    run(source, tmp_path / "whole", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_options_that_change_no_byte_do_not_start_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "diptych_data")
    source = table(tmp_path / "in" / "t.csv", 200)
    killed(source, tmp_path / "out", at=2)
    run(source, tmp_path / "out", workers=None, overwrite=True)
    assert "goes on" in caplog.text
    assert "thrown away" not in caplog.text


def test_a_shard_without_its_index_is_written_again(tmp_path: Path) -> None:
    source = table(tmp_path / "in" / "t.csv", 200)
    left = killed(source, tmp_path / "out", at=3)
    index.sidecar(left / "000000.tar").unlink()
    (left / "000001.tar").write_bytes(b"cut off")
    run(source, tmp_path / "out")
    run(source, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_breaks_nothing(tmp_path: Path) -> None:
    source = table(tmp_path / "in" / "t.csv", 60)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("still here")
    Image.effect_noise((400, 400), 100).save(tmp_path / "in" / "large.png")
    lines = source.read_text().replace("4.png,caption 39", "large.png,caption 39")
    source.write_text(lines)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, limits[1]))  # no file may become larger, as on a full disk
    try:
        with pytest.raises(DataError, match=r"shards not written \(.*\) · .*out · free space") as caught:
            run(source, tmp_path / "out", overwrite=True, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out" / "old.txt").read_text() == "still here"
    left = sorted(path.name for path in (tmp_path / ".out.tmp").glob("*"))
    assert left == sorted(f"{n:06d}.tar{end}" for n in range(3) for end in ("", ".index.jsonl"))
    run(source, tmp_path / "out", overwrite=True)
    run(source, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_was_there_comes_back_after_a_kill_in_the_last_moment(tmp_path: Path) -> None:
    source = table(tmp_path / "in" / "t.csv", 20)
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "old.txt").write_text("still here")
    with pytest.raises(DataError, match="not empty"):
        run(source, tmp_path / "out")
    assert (tmp_path / "out" / "old.txt").read_text() == "still here"
    run(source, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_an_interruption_keeps_what_is_complete(tmp_path: Path) -> None:
    source = table(tmp_path / "in" / "t.csv", 1200, side=64)
    with program(source, tmp_path / "out") as process:
        left = _wait_for_shards(tmp_path / "out", 3, alive(process))
        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does: every process of the group is told
        _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert errors.count(b"KeyboardInterrupt") == 1  # the parent's, which the command line turns into one line
    assert len(list(left.glob("*.tar.index.jsonl"))) >= 3
    assert run(source, tmp_path / "out").shards == 120


def test_two_packs_do_not_share_a_folder(tmp_path: Path) -> None:
    source = table(tmp_path / "in" / "t.csv", 20)
    refused = pytest.raises(DataError, match="another process writes this folder")
    with opened((tmp_path / "out").resolve(), "of another"), refused:
        run(source, tmp_path / "out")
    assert run(source, tmp_path / "out").shards == 2


def die(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_a_worker_that_is_killed_is_reported_as_such() -> None:
    with pytest.raises(parallel.Killed, match=r"a worker process was killed.*2 workers"):
        list(parallel.run(die, range(4), workers=2))


def test_a_consumer_that_stops_ends_the_workers() -> None:
    results = parallel.run(time.sleep, [0, 30, 30], workers=2)
    next(results)
    started = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 25  # far less than the tasks would take
