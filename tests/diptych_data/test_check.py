import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest

import diptych.testing as make
from diptych.cli import main
from diptych.data import index
from diptych.testing import TinySample, tiny_sample
from diptych_data.check import CheckOptions, CheckSummary, check


def found(folder: Path, **options: object) -> CheckSummary:
    return check(CheckOptions(str(folder), workers=1, **options))  # type: ignore[arg-type]


def counts(folder: Path, **options: object) -> dict[str, int]:
    return {reason: problem.count for reason, problem in found(folder, **options).problems.items()}


def add_member(shard: Path, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    """Appends a member and writes the index again, so that nothing else is wrong."""
    with tarfile.open(shard, "a") as tar:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.size = kind, link, len(data)
        tar.addfile(entry, io.BytesIO(data))
    index.write(shard, index.scan(shard))


def test_clean_shards_are_clean(shards: Path) -> None:
    summary = found(shards)
    assert (summary.shards, summary.samples, summary.problems) == (6, 40, {})
    assert summary.is_clean


def test_workers_find_the_same(shards: Path) -> None:
    os.truncate(shards / "000003.tar", 9000)
    assert check(CheckOptions(str(shards), workers=2)) == found(shards)
    assert not found(shards).is_clean


def test_samples(tmp_path: Path) -> None:
    good = tiny_sample("a").members
    make.write_shard(
        tmp_path / "0.tar",
        [
            TinySample("good", good),
            TinySample("no_picture", {"txt": b"x"}),
            TinySample("no_caption", {"png": good["png"], "txt": b" \n"}),
            TinySample("cut", {"png": good["png"][:60], "txt": b"x"}),
            TinySample("latin1", {"png": good["png"], "txt": b"caf\xe9"}),
            TinySample("long", {"png": good["png"], "txt": b"x" * 101}),
        ],
    )
    expected = {"no_picture": 1, "no_caption": 1, "undecodable": 1, "bad_caption": 1, "caption_too_long": 1}
    assert counts(tmp_path, max_caption_chars=100) == expected
    problem = found(tmp_path).problems["undecodable"]
    assert problem.examples == (f"{tmp_path / '0.tar'} cut",)
    assert problem.worst_shards == ((str(tmp_path / "0.tar"), 1),)
    assert "undecodable" not in counts(tmp_path, fast=True)  # its header is whole


def test_indexes(tmp_path: Path) -> None:
    make.write_shards(tmp_path, [2, 2, 2])
    index.sidecar(tmp_path / "000000.tar").unlink()
    sidecar = index.sidecar(tmp_path / "000001.tar")
    sidecar.write_text(sidecar.read_text().replace("s0002", "other"))
    assert counts(tmp_path) == {"missing_index": 1, "stale_index": 1}


def test_damaged_tars(tmp_path: Path) -> None:
    make.write_shards(tmp_path, [4, 4], indexed=False)
    os.truncate(tmp_path / "000000.tar", 6000)
    (tmp_path / "000001.tar").write_bytes(b"no tar at all " * 200)
    assert {"truncated", "broken_tar", "missing_index"} == set(counts(tmp_path))
    assert found(tmp_path).samples == 1  # of the second sample the picture is there, and perhaps not all of the rest


def test_keys_that_occur_twice_over_the_set(tmp_path: Path) -> None:
    make.write_shard(tmp_path / "0.tar", [tiny_sample("a"), tiny_sample("b")])
    make.write_shard(tmp_path / "1.tar", [tiny_sample("b"), tiny_sample("c"), tiny_sample("a")])
    make.write_shard(tmp_path / "2.tar", [tiny_sample("a")])
    problem = found(tmp_path).problems["duplicate_key"]
    assert problem.count == 3
    assert problem.worst_shards == ((str(tmp_path / "1.tar"), 2), (str(tmp_path / "2.tar"), 1))
    assert [example.split()[-1] for example in problem.examples] == ["b", "a", "a"]


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("/etc/cron.d/x.txt", tarfile.REGTYPE, "unsafe_name"),
        ("../../x.txt", tarfile.REGTYPE, "unsafe_name"),
        ("a/../b.txt", tarfile.REGTYPE, "unsafe_name"),
        ("a\x1b[2Jb.txt", tarfile.REGTYPE, "unsafe_name"),
        ("link.txt", tarfile.SYMTYPE, "link"),
        ("hard.txt", tarfile.LNKTYPE, "link"),
        ("null.txt", tarfile.CHRTYPE, "device"),
        ("pipe.txt", tarfile.FIFOTYPE, "device"),
        ("weights.pt", tarfile.REGTYPE, "pickle"),
        ("s0000.pyd", tarfile.REGTYPE, "pickle"),
    ],
)
def test_suspicious_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: bytes, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shard = make.write_shard(tmp_path / "0.tar", [tiny_sample("s0000")])
    data = pickle.dumps(_Bomb()) if reason == "pickle" else b""
    add_member(shard, name, data, kind, link="/etc/passwd" if reason == "link" else "")
    assert reason in counts(tmp_path)
    assert not (tmp_path / "unpickled").exists()


def test_tars_made_of_a_folder_are_clean(tmp_path: Path) -> None:
    """`tar cf x.tar ./` has folders as members, and names that begin with `./`."""
    source = tmp_path / "source"
    source.mkdir()
    for extension, data in tiny_sample("a").members.items():
        (source / f"a.{extension}").write_bytes(data)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(source, arcname=".")
    index.write(tmp_path / "0.tar", index.scan(tmp_path / "0.tar"))
    assert counts(tmp_path) == {}


def test_command(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "check", str(shards), "--quiet", "--workers", "1"]
    assert main(command) == 0
    assert "nothing wrong" in capsys.readouterr().out
    add_member(shards / "000000.tar", "evil\x1b[31m/../x.pkl", b"x")
    assert main(command) == 2
    shown = capsys.readouterr().out
    assert "unsafe_name" in shown
    assert "\x1b" not in shown
    assert main([*command, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"]["unsafe_name"]["count"] == 1
