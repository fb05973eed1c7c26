import csv
import io
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

from diptych.errors import DataError
from diptych_data import emoji


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji") / "pictures"
    emoji.extract(folder)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_it_fits_into_the_package_with_its_licences() -> None:
    files = [path for path in emoji.bundled().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    licences = {path.name for path in files if path.parent.name == "LICENSES"}
    assert licences == {"Apache-2.0.txt", "CC-BY-4.0.txt", "CC-BY-SA-4.0.txt", "MIT-fluent.txt", "Unicode-3.0.txt"}
    attribution = (emoji.bundled() / "ATTRIBUTION.md").read_text()
    assert all(name in attribution for name in (*licences, "noto.zip", "twemoji.zip", "openmoji.zip", "fluent.zip"))


@pytest.mark.parametrize("artist", [*emoji.TRAIN_ARTISTS, *emoji.TEST_ARTISTS])
def test_every_picture_opens_at_64_pixels_with_transparency(artist: str) -> None:
    with zipfile.ZipFile(emoji.bundled() / f"{artist}.zip") as archive:
        for name in archive.namelist():
            with Image.open(io.BytesIO(archive.read(name))) as picture:
                assert picture.size == (64, 64)
                assert picture.convert("RGBA").getchannel("A").getextrema()[1] > 0, name


def test_splits_are_what_the_documentation_says() -> None:
    splits = Counter(concept.split for concept in emoji.concepts())
    assert splits == {"seen": 1721, "unseen": 190, "tone_seen": 150, "tone_unseen": 100}
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for concept in emoji.concepts():
        if not concept.tone:
            groups[concept.group][concept.split] += 1
    for counts in groups.values():
        assert abs(counts["unseen"] - 0.1 * counts.total()) <= 0.5


def test_every_tone_and_every_person_is_trained_but_not_the_held_out_combinations() -> None:
    trained = {(c.base, c.tone) for c in emoji.concepts() if c.split == "tone_seen"}
    held_out = {(c.base, c.tone) for c in emoji.concepts() if c.split == "tone_unseen"}
    assert not trained & held_out
    assert Counter(Counter(base for base, _ in held_out).values()) == {2: 50}
    assert {base for base, _ in trained} == {base for base, _ in held_out}
    assert min(Counter(tone for _, tone in trained).values()) >= 25
    plain = {concept.name: concept.split for concept in emoji.concepts() if not concept.tone}
    assert all(plain[base] == "seen" for base, _ in held_out)


def test_tables_hold_the_splits_and_name_pictures_that_are_there(out: Path) -> None:
    sizes = {path.stem: len(rows(path)) for path in out.glob("*.csv")}
    assert sizes == {
        "train": 3742,
        "openmoji_seen": 1721,
        "openmoji_unseen": 190,
        "fluent_seen": 1435,
        "fluent_unseen": 159,
        "composition": 200,
    }
    names = (out / "classnames.txt").read_text(encoding="utf-8").splitlines()
    assert len(names) == len(set(names)) == 1911
    for table in out.glob("*.csv"):
        for row in rows(table):
            assert (out / row["image"]).is_file()
            assert row["name"]
            assert row["name_zh"]
            if row["label"] and table.stem != "composition":
                assert names[int(row["label"])] == row["name"]


def test_training_never_sees_a_held_out_concept_or_artist(out: Path) -> None:
    trained = {row["code"] for row in rows(out / "train.csv")}
    assert {row["artist"] for row in rows(out / "train.csv")} == set(emoji.TRAIN_ARTISTS)
    for artist in emoji.TEST_ARTISTS:
        assert not trained & {row["code"] for row in rows(out / f"{artist}_unseen.csv")}
        assert trained >= {row["code"] for row in rows(out / f"{artist}_seen.csv")}
    assert not trained & {row["code"] for row in rows(out / "composition.csv")}


def test_a_folder_with_something_in_it_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not empty"):
        emoji.extract(out)
    (tmp_path / "old.txt").touch()
    emoji.extract(tmp_path, overwrite=True)
    assert not (tmp_path / "old.txt").exists()
