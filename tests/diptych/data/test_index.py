"""The sidecar says what the tar says, and is not believed when it does not."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

import diptych.testing as make
from diptych.data import index
from diptych.data.faults import UnusableSample
from diptych.data.shards import ShardStore, read_shard
from diptych.testing import tiny_sample


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return make.write_shard(tmp_path / "000000.tar", [tiny_sample(f"s{i}", label=i) for i in range(5)])


def tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as file:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


def test_what_is_written_is_read_again(shard: Path) -> None:
    scanned = index.scan(shard)
    assert index.read(shard) == scanned
    assert index.count(shard) == 5
    with shard.open("rb") as file:
        for sample in scanned.samples:
            for member in sample.members:
                file.seek(member.offset)
                assert (
                    file.read(member.size)
                    == tiny_sample(sample.key, label=int(sample.key[1:])).members[member.extension]
                )


def test_the_format_is_the_documented_one(shard: Path) -> None:
    import json

    header, *lines = index.sidecar(shard).read_text().splitlines()
    assert json.loads(header).keys() == {"format", "shard_bytes", "layout", "lines", "samples", "fault"}
    assert json.loads(header)["format"] == 2
    assert json.loads(lines[0])[0] == "s0"
    assert [part[0] for part in json.loads(lines[0])[1:]] == ["png", "json", "txt", "cls"]


@pytest.mark.parametrize("damage", ["", "{", "[]\n", '{"format": 1}\n', "null\n", "cut", "negative"])
def test_a_damaged_sidecar_is_ignored_with_a_warning(
    shard: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = index.sidecar(shard).read_text()
    damaged = {"cut": text[: len(text) // 2], "negative": text.replace("512", "-512")}.get(damage, damage)
    index.sidecar(shard).write_text(damaged)
    assert index.read(shard) is None
    assert "unreadable index ignored" in caplog.text
    assert index.count(shard) == 5


def test_another_size_is_stale(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = index.sidecar(shard).read_text()
    make.write_shard(shard, [tiny_sample("a"), tiny_sample("b" * 90)], indexed=False)
    index.sidecar(shard).write_text(text)
    assert index.read(shard) is None
    assert "stale index ignored" in caplog.text
    assert index.count(shard) == 2


def test_a_younger_shard_is_checked_by_its_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = tar(tmp_path / "x.tar", [(f"s{i}.txt", b"text") for i in range(5)])
    index.write(shard, index.scan(shard))
    later = index.sidecar(shard).stat().st_mtime_ns + 10**9
    os.utime(shard, ns=(later, later))
    assert index.read(shard) is not None  # copied, say
    assert index.count(shard) == 5
    size = shard.stat().st_size
    tar(shard, [(f"x{i}.txt", b"text") for i in range(5)])
    assert shard.stat().st_size == size
    os.utime(shard, ns=(later, later))
    assert index.read(shard) is None
    assert "stale index ignored" in caplog.text
    assert [raw.key for raw in read_shard(str(shard))] == [f"x{i}" for i in range(5)]


@given(st.text("ab./_", min_size=1, max_size=12))
def test_names_divide_as_webdatasets_do(name: str) -> None:
    theirs = base_plus_ext(name)
    ours = index.split_name(name)
    # Ours wants a name and an extension of at least one character; theirs takes `a.` and `/.a` as well.
    assert ours == (theirs if theirs[0] and theirs[1] and not theirs[0].endswith("/") else None)


def test_samples_are_webdatasets(tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    members = [("a/b.jpg", b"1"), ("a/b.seg.png", b"22"), ("a/c.jpg", b"3" * 600), ("d.txt", b""), ("README", b"no")]
    path = tar(tmp_path / "x.tar", members)
    with path.open("rb") as file:
        records = [record | {"__url__": "x"} for record in tar_file_iterator(file)]
    theirs = [
        (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
        for sample in group_by_keys(iter(records))
        if "__key__" in sample
    ]
    assert [(raw.key, raw.members) for raw in read_shard(str(path))] == theirs


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_forms_of_tar(tmp_path: Path, format: int) -> None:
    name = "folder/" * 12 + "k" * 60 + ".txt"  # too long for the plain header of old
    path = tar(tmp_path / "x.tar", [(name, b"text"), ("é.txt", b"accent")], format=format)
    index.write(path, index.scan(path))
    assert index.read(path) == index.scan(path)
    assert [(raw.key, raw.members["txt"]) for raw in read_shard(str(path))] == [(name[:-4], b"text"), ("é", b"accent")]


def test_an_extension_that_comes_again_begins_a_new_sample(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", [("a.txt", b"1"), ("a.jpg", b"2"), ("a.txt", b"3"), ("a.jpg", b"4")])
    assert [raw.members for raw in read_shard(str(path))] == [{"txt": b"1", "jpg": b"2"}, {"txt": b"3", "jpg": b"4"}]


@given(cut=st.integers(0, 20480))
def test_a_tar_cut_anywhere_gives_its_whole_samples_and_one_fault(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.tar"
    whole = tar(path, [(f"{i}.{e}", bytes([i]) * (300 * i)) for i in range(6) for e in ("jpg", "txt")]).read_bytes()
    intact = index.scan(path)
    path.write_bytes(whole[:cut])
    found = index.scan(path)
    end = intact.samples[-1].members[-1].offset + intact.samples[-1].members[-1].size
    assert found.samples == intact.samples[: len(found.samples)]
    assert bool(found.fault) == (cut < end + 512)
    if found.fault:
        usable = [sample for sample in intact.samples if sample.members[-1].offset + sample.members[-1].size <= cut]
        # The last whole sample may be given up with the cut one: nobody knows that no member was to follow.
        assert len(usable) - 1 <= len(found.samples) <= len(usable)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda data: data[:512] + b"\xff" * 100 + data[612:], ""),  # content is not looked at
        (lambda data: b"\x1f\x8b" + data[2:], "broken_tar"),
        (lambda data: data.replace(b"s2.png\0", b"s9.png\0"), "broken_tar"),  # its checksum is wrong
        (lambda data: data + b"more than zeros", "trailing_data"),
        (lambda data: data + data, "trailing_data"),
        (lambda data: b"", "broken_tar"),
        (lambda data: b"\0" * 10240, ""),
    ],
)
def test_damage_has_a_name(shard: Path, change: object, fault: str) -> None:
    index.sidecar(shard).unlink()
    shard.write_bytes(change(shard.read_bytes()))
    assert index.scan(shard).fault == fault
    index.write(shard, index.scan(shard))
    assert index.read(shard) == index.scan(shard)
    opened = ShardStore().open(str(shard))
    assert opened.num_entries == index.count(shard) == len(index.scan(shard).samples) + bool(fault)


def with_lines(shard: Path, header: dict[str, object], *lines: str) -> None:
    """A sidecar that is consistent in itself, and says what it likes."""
    import hashlib
    import json

    text = "".join(f"{line}\n" for line in lines)
    whole = json.loads(index.sidecar(shard).read_text().splitlines()[0])
    whole |= {"samples": len(lines), "lines": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()} | header
    index.sidecar(shard).write_text(json.dumps(whole) + "\n" + text)


@pytest.mark.parametrize(
    "header",
    [{"samples": "1"}, {"samples": -1}, {"samples": 2**70}, {"fault": ["x"]}, {"fault": "odd"}, {"shard_bytes": None}],
)
def test_a_header_without_sense_is_ignored(shard: Path, header: dict[str, object]) -> None:
    with_lines(shard, header, '["a", ["txt", 512, 1]]')
    assert index.read(shard) is None
    assert index.count(shard) == 5


@pytest.mark.parametrize(
    "line",
    [
        '["a", ["txt", 1, 1]]',
        '["a", ["txt", 512, 99999999]]',
        f'["a", ["txt", {2**70}, 1]]',
        '["a", ["txt", 512, -1]]',
        '["a"]',
        '["a", 5]',
        '[7, ["txt", 512, 1]]',
        "{}",
        "[" * 100_000,
        "no json",
    ],
)
def test_a_line_without_sense_costs_its_sample_alone(shard: Path, line: str) -> None:
    with_lines(shard, {}, line, '["good", ["jpg", 1024, 3], ["txt", 512, 4]]')
    opened = ShardStore().open(str(shard))
    with pytest.raises(UnusableSample, match="unreadable"):
        opened.read(0)
    assert opened.key(0) == ""
    data = shard.read_bytes()
    assert opened.read(1).members == {"jpg": data[1024:1027], "txt": data[512:516]}


def test_members_that_overlap_are_not_copied_without_end(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    with shard.open("wb") as file:
        file.truncate(30 << 20)
    index.write(shard, index.ShardIndex(30 << 20, "", ()))
    with_lines(shard, {}, str(["a", *([f"x{i}", 512, 29 << 20] for i in range(50))]).replace("'", '"'))
    with pytest.raises(UnusableSample, match="too_large"):
        ShardStore().open(str(shard)).read(0)


def extended(kind: bytes, size: int, data: bytes = b"") -> bytes:
    entry = tarfile.TarInfo("long")
    entry.type, entry.size = kind, size
    return entry.tobuf(tarfile.USTAR_FORMAT) + data


@pytest.mark.parametrize(
    "data",
    [
        extended(tarfile.XHDTYPE, 1 << 20, b"1" * (1 << 20)),  # Python takes minutes for these digits
        extended(tarfile.GNUTYPE_LONGNAME, 1 << 30),
        extended(tarfile.GNUTYPE_LONGLINK, 1 << 20, b"n" * (1 << 20)),
        extended(tarfile.GNUTYPE_SPARSE, 5)[:482] + b"\1" * 30,
    ],
)
def test_extended_headers_of_absurd_size_are_not_read(tmp_path: Path, data: bytes) -> None:
    path = tar(tmp_path / "x.tar", [("a.txt", b"text")])
    whole = path.read_bytes()[:1024]
    path.write_bytes(whole + data)
    found = index.scan(path)
    assert [sample.key for sample in found.samples] in (["a"], [])
    assert found.fault in ("broken_tar", "truncated")


def test_sparse_members_and_odd_types_are_passed_over(tmp_path: Path) -> None:
    holes = tmp_path / "1.bin"
    with holes.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    for name in ("0.txt", "2.txt", "3.txt"):
        (tmp_path / name).write_text(name)
    for form in ("gnu", "posix"):
        path = tmp_path / f"{form}.tar"
        names = ["0.txt", "1.bin", "2.txt", "3.txt"]
        subprocess.run(["tar", "--sparse", f"--format={form}", "-cf", path, *names], cwd=tmp_path, check=True)
        found = index.scan(path)
        assert [sample.key for sample in found.samples] == ["0", "2", "3"]
        assert found.fault == ""


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    opened = ShardStore().open(str(tmp_path / "x.tar"))
    with pytest.raises(UnusableSample, match="missing_shard"):
        opened.read(0)
