import json
import os
from pathlib import Path

import pytest

import diptych.testing as make
from diptych.cli import main
from diptych.data import index
from diptych.errors import DataError
from diptych_data.index import check_indexes, write_indexes


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Three shards without indexes."""
    return make.write_shards(tmp_path / "shards", [3, 2, 1], indexed=False)


def test_every_shard_gets_an_index_once(bare: Path) -> None:
    first = write_indexes(str(bare), workers=1)
    assert (first.shards, first.fresh, first.written) == (3, 0, 3)
    assert [Path(shard).name for shard in first.missing] == ["000000.tar", "000001.tar", "000002.tar"]
    stamps = {path: path.stat().st_mtime_ns for path in bare.glob("*.jsonl")}
    again = write_indexes(str(bare), workers=1)
    assert (again.fresh, again.written) == (3, 0)
    assert {path: path.stat().st_mtime_ns for path in bare.glob("*.jsonl")} == stamps
    assert write_indexes(str(bare), overwrite=True, workers=1).written == 3


def test_an_interrupted_run_goes_on(bare: Path) -> None:
    shard = bare / "000001.tar"
    index.write(shard, index.scan(shard))
    inode = index.sidecar(shard).stat().st_ino
    assert write_indexes(str(bare), workers=1).written == 2
    assert index.sidecar(shard).stat().st_ino == inode


def test_a_replaced_shard_makes_its_index_stale(bare: Path) -> None:
    write_indexes(str(bare), workers=1)
    make.write_shard(bare / "000001.tar", [make.tiny_sample("x", caption="another " * 400)], indexed=False)
    found = check_indexes(str(bare), workers=1)
    assert [Path(shard).name for shard in found.stale] == ["000001.tar"]
    assert found.written == 0
    assert write_indexes(str(bare), workers=1).written == 1
    known = index.read(bare / "000001.tar")
    assert known is not None
    assert [sample.key for sample in known.samples] == ["x"]


def test_workers_do_the_same(bare: Path) -> None:
    """Two processes, real ones: their start takes a moment, so this is the only test of an index that has them."""
    write_indexes(str(bare), workers=1)
    alone = {path.name: path.read_bytes() for path in bare.glob("*.jsonl")}
    assert write_indexes(str(bare), overwrite=True, workers=2).written == 3
    assert {path.name: path.read_bytes() for path in bare.glob("*.jsonl")} == alone


def test_a_damaged_shard_is_named_and_indexed_as_far_as_it_goes(bare: Path) -> None:
    shard = bare / "000000.tar"
    os.truncate(shard, 4000)
    found = write_indexes(str(bare), workers=1)
    assert [(Path(name).name, fault) for name, fault in found.damaged] == [("000000.tar", "truncated")]
    assert found.written == 3


def test_remote_shards_are_refused() -> None:
    with pytest.raises(DataError, match="local shards"):
        write_indexes("https://example.org/000000.tar")


def test_command(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = ["data", "index", str(bare), "--check", "--quiet", "--workers", "1"]
    assert main(check) == 2
    assert "no index" in capsys.readouterr().out
    assert not list(bare.glob("*.jsonl"))
    assert main(["data", "index", str(bare), "--json", "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 3
    assert main(check) == 0
