"""The bundled pictures with captions: emoji by four artists, with Unicode's names and keywords in English and Chinese.

`extract(out)` writes them in the form in which anybody keeps pictures: folders of files and tables that name them.

out/
  pictures/ARTIST/CODE.webp        64 x 64, transparent background
  train.csv                        noto and twemoji, without the held-out concepts and combinations
  ARTIST_seen.csv ARTIST_unseen.csv   openmoji and fluent, never trained on; concepts that training has, and has not
  composition.csv                  noto and twemoji: skin tone x person in combinations that training has not
  classnames.txt templates.txt     the names among which zero-shot classification chooses, and its prompts
  composition/classnames.txt …     the same for the combinations
  LICENSES/ ATTRIBUTION.md

Columns: image, name, keywords (separated by ` | `), name_zh, keywords_zh, code, artist, group, tone, base, label.
"""

import csv
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from diptych.errors import DataError

TRAIN_ARTISTS = ("noto", "twemoji")
TEST_ARTISTS = ("openmoji", "fluent")
TEMPLATES = ("{c}",)
_COLUMNS = ("image", "name", "keywords", "name_zh", "keywords_zh", "code", "artist", "group", "tone", "base", "label")


@dataclass(frozen=True)
class Concept:
    """One line of `bundled/concepts.csv`."""

    code: str
    name: str
    keywords: str
    name_zh: str
    keywords_zh: str
    group: str
    tone: str
    base: str
    split: str


def bundled() -> Path:
    """The folder that ships with the package."""
    return Path(str(resources.files("diptych_data"))) / "bundled"


def concepts() -> list[Concept]:
    """All bundled concepts, in Unicode's order, toned ones last."""
    with (bundled() / "concepts.csv").open(encoding="utf-8", newline="") as file:
        return [Concept(**row) for row in csv.DictReader(file)]


def extract(out: Path, *, overwrite: bool = False) -> dict[str, int]:
    """Writes pictures and tables; returns the number of rows of each table.

    Raises:
        DataError: `out` is not empty and `overwrite` is off.
    """
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise DataError(f"output folder is not empty · {out} · choose another, or add --overwrite")
        shutil.rmtree(out)
    everything = concepts()
    drawn = {artist: _unzip(artist, out / "pictures" / artist) for artist in (*TRAIN_ARTISTS, *TEST_ARTISTS)}
    plain = [concept for concept in everything if not concept.tone]
    toned = [concept for concept in everything if concept.tone]
    labels = {concept.name: number for number, concept in enumerate(plain)}
    tone_labels = {concept.name: number for number, concept in enumerate(toned)}

    def table(name: str, artists: Sequence[str], splits: set[str], classes: dict[str, int]) -> int:
        rows = [
            _row(concept, artist, classes)
            for artist in artists
            for concept in everything
            if concept.split in splits and concept.code in drawn[artist]
        ]
        return _write(out / f"{name}.csv", rows)

    counts = {"train": table("train", TRAIN_ARTISTS, {"seen", "tone_seen"}, labels)}
    for artist in TEST_ARTISTS:
        for split in ("seen", "unseen"):
            counts[f"{artist}_{split}"] = table(f"{artist}_{split}", [artist], {split}, labels)
    counts["composition"] = table("composition", TRAIN_ARTISTS, {"tone_unseen"}, tone_labels)
    _write_classes(out, [concept.name for concept in plain])
    _write_classes(out / "composition", [concept.name for concept in toned])
    shutil.copytree(bundled() / "LICENSES", out / "LICENSES")
    shutil.copy(bundled() / "ATTRIBUTION.md", out / "ATTRIBUTION.md")
    return counts


def _unzip(artist: str, folder: Path) -> set[str]:
    """Writes an artist's pictures; returns their codes."""
    folder.mkdir(parents=True)
    codes = set()
    with zipfile.ZipFile(bundled() / f"{artist}.zip") as archive:
        for name in archive.namelist():
            (folder / Path(name).name).write_bytes(archive.read(name))
            codes.add(Path(name).stem)
    return codes


def _row(concept: Concept, artist: str, classes: dict[str, int]) -> list[str]:
    label = classes.get(concept.name)
    return [
        f"pictures/{artist}/{concept.code}.webp",
        concept.name,
        concept.keywords,
        concept.name_zh,
        concept.keywords_zh,
        concept.code,
        artist,
        concept.group,
        concept.tone,
        concept.base,
        "" if label is None else str(label),
    ]


def _write(path: Path, rows: list[list[str]]) -> int:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(rows)
    return len(rows)


def _write_classes(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (folder / "templates.txt").write_text("\n".join(TEMPLATES) + "\n", encoding="utf-8")
