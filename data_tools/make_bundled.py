"""Makes the bundled pictures and captions again from the published npm packages.

    pip install resvg-py
    python data_tools/make_bundled.py WORK_FOLDER

downloads the packages named in `PACKAGES` into WORK_FOLDER with `npm pack` (those already there are used as is) and
 writes `diptych_data/bundled/`. Archive members are read by name and never extracted to disk. The splits are drawn by a
hash of the concept, so they do not depend on the order or the versions of the packages.
"""

import argparse
import csv
import hashlib
import io
import json
import logging
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

log = logging.getLogger("make_bundled")

PACKAGES = {
    "noto": ("emoji-datasource-google", "16.0.0"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0"),
    "openmoji": ("openmoji", "17.0.0"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "cldr": ("cldr-annotations-full", "48.2.0"),
    "cldr_derived": ("cldr-annotations-derived-full", "48.2.0"),
}
OUT = Path(__file__).parent / "diptych_data" / "bundled"
SIDE = 64
HELD_OUT = 0.1
NUM_BASES = 50
TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points, its texts and its place in the splits."""

    code: str
    name: str
    keywords: tuple[str, ...]
    name_zh: str
    keywords_zh: tuple[str, ...]
    group: str
    tone: str
    base: str
    split: str


def main() -> int:
    """Downloads what is missing, draws every picture, writes the bundle."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Make the bundled pictures and captions again.")
    parser.add_argument("work", type=Path, help="folder for the npm packages")
    archives = {name: _archive(parser.parse_args().work, *package) for name, package in PACKAGES.items()}
    artists = {
        "noto": _png_artist(archives["noto"], "google"),
        "twemoji": _png_artist(archives["twemoji"], "twitter"),
        "openmoji": _openmoji(archives["openmoji"]),
        "fluent": _fluent(archives["fluent"]),
    }
    concepts = _concepts(archives, artists)
    OUT.mkdir(parents=True, exist_ok=True)
    _write_table(OUT / "concepts.csv", concepts)
    for artist, draw in artists.items():
        _write_pictures(OUT / f"{artist}.zip", draw, concepts)
    return 0


# --- packages ----------------------------------------------------------------------------------------------------


def _archive(work: Path, package: str, version: str) -> tarfile.TarFile:
    name = f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not (work / name).is_file():
        work.mkdir(parents=True, exist_ok=True)
        log.info("npm pack %s@%s", package, version)
        subprocess.run(["npm", "pack", f"{package}@{version}", "--silent"], cwd=work, check=True)
    return tarfile.open(work / name)  # read by member until the program ends


def _read(archive: tarfile.TarFile, member: str) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise FileNotFoundError(f"{member} is no file · {archive.name}")
    return file.read()


def _read_json(archive: tarfile.TarFile, member: str) -> Any:
    return json.loads(_read(archive, member))


# --- artists: code points to a picture, None where the artist has not drawn it ------------------------------------

Draw = Callable[[str], Image.Image | None]


def _png_artist(archive: tarfile.TarFile, folder: str) -> Draw:
    files = {
        Path(name).stem.upper(): name for name in archive.getnames() if name.startswith(f"package/img/{folder}/64/")
    }

    def draw(code: str) -> Image.Image | None:
        return Image.open(io.BytesIO(_read(archive, files[code]))) if code in files else None

    return draw


def _openmoji(archive: tarfile.TarFile) -> Draw:
    files = {_plain(Path(name).stem): name for name in archive.getnames() if name.startswith("package/color/svg/")}

    def draw(code: str) -> Image.Image | None:
        return _render(_read(archive, files[_plain(code)]).decode()) if _plain(code) in files else None

    return draw


def _fluent(archive: tarfile.TarFile) -> Draw:
    icons = _read_json(archive, "package/icons.json")
    names = {_plain(code.upper()): name for code, name in _read_json(archive, "package/chars.json").items()}
    size = f'viewBox="0 0 {icons["width"]} {icons["height"]}"'

    def draw(code: str) -> Image.Image | None:
        icon = icons["icons"].get(names.get(_plain(code), ""))
        return _render(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{icon["body"]}</svg>') if icon else None

    return draw


def _plain(code: str) -> str:
    """Without the variation selector, which artists name their files with or without."""
    return code.upper().replace("-FE0F", "")


def _render(svg: str) -> Image.Image:
    try:
        import resvg_py
    except ImportError:
        sys.exit("make_bundled: drawing SVG pictures needs resvg-py · pip install resvg-py")
    side = 4 * SIDE
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))))


# --- texts and splits ---------------------------------------------------------------------------------------------


def _concepts(archives: dict[str, tarfile.TarFile], artists: dict[str, Draw]) -> list[Concept]:
    entries = _read_json(archives["noto"], "package/emoji.json")
    entries = [entry for entry in entries if entry["has_img_google"] and entry["has_img_twitter"]]
    english, chinese = _texts(archives, "en"), _texts(archives, "zh")
    plain = [_concept(entry["unified"], entry["category"], english, chinese) for entry in entries]
    plain = _assign_held_out(_unique_names(plain))
    toned = list(_toned(entries, {concept.code: concept for concept in plain}, artists, (english, chinese)))
    return plain + toned


def _texts(archives: dict[str, tarfile.TarFile], language: str) -> dict[str, dict[str, list[str]]]:
    """Characters without variation selector → CLDR's `tts` (name) and `default` (keywords)."""
    basic = _read_json(archives["cldr"], f"package/annotations/{language}/annotations.json")
    derived = _read_json(archives["cldr_derived"], f"package/annotationsDerived/{language}/annotations.json")
    joined = basic["annotations"]["annotations"] | derived["annotationsDerived"]["annotations"]
    return {characters.replace("\ufe0f", ""): texts for characters, texts in joined.items()}


def _concept(code: str, group: str, english: dict[str, Any], chinese: dict[str, Any]) -> Concept:
    characters = "".join(chr(int(point, 16)) for point in code.split("-")).replace("\ufe0f", "")
    texts, texts_zh = english[characters], chinese.get(characters, {})
    name = texts["tts"][0]
    keywords = tuple(word for word in texts.get("default", []) if word != name)
    names_zh = texts_zh.get("tts", [""])
    keywords_zh = tuple(word for word in texts_zh.get("default", []) if word != names_zh[0])
    return Concept(code, name, keywords, names_zh[0], keywords_zh, group, "", name, "")


def _unique_names(concepts: list[Concept]) -> list[Concept]:
    """Names are class names, so they must differ; a repeated one gets its code points in brackets."""
    seen: set[str] = set()
    unique = []
    for concept in concepts:
        name = concept.name if concept.name not in seen else f"{concept.name} ({concept.code.lower()})"
        seen.add(name)
        unique.append(replace(concept, name=name, base=name))
    return unique


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "big")


def _assign_held_out(concepts: list[Concept]) -> list[Concept]:
    """Holds out a tenth of every group: those with the smallest hashes."""
    held_out = set()
    for group in {concept.group for concept in concepts}:
        codes = sorted((c.code for c in concepts if c.group == group), key=lambda code: _hash("concept", code))
        held_out.update(codes[: round(HELD_OUT * len(codes))])
    return [replace(concept, split="unseen" if concept.code in held_out else "seen") for concept in concepts]


def _toned(
    entries: list[dict[str, Any]], plain: dict[str, Concept], artists: dict[str, Draw], texts: tuple[Any, Any]
) -> Iterable[Concept]:
    """Skin tone × person: of each person's five tones, two are held out (which two rotates from person to person)."""
    usable = []
    for entry in entries:
        codes = {tone: variation["unified"] for tone, variation in entry.get("skin_variations", {}).items()}
        drawn = all(draw(code) is not None for code in codes.values() for draw in artists.values())
        if set(codes) == set(TONES) and plain[entry["unified"]].split == "seen" and drawn:
            usable.append((entry, codes))
    usable.sort(key=lambda pair: _hash("base", pair[0]["unified"]))
    for number, (entry, codes) in enumerate(usable[:NUM_BASES]):
        held_out = {number % 5, (number + 1 + number // 5 % 4) % 5}
        for place, (tone, tone_name) in enumerate(TONES.items()):
            concept = _concept(codes[tone], entry["category"], *texts)
            split = "tone_unseen" if place in held_out else "tone_seen"
            yield replace(concept, tone=tone_name, base=plain[entry["unified"]].name, split=split)


# --- writing ------------------------------------------------------------------------------------------------------


def _write_table(path: Path, concepts: list[Concept]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["code", "name", "keywords", "name_zh", "keywords_zh", "group", "tone", "base", "split"])
        for c in concepts:
            row = [c.code.lower(), c.name, " | ".join(c.keywords), c.name_zh, " | ".join(c.keywords_zh)]
            writer.writerow([*row, c.group, c.tone, c.base, c.split])
    log.info("%s: %d concepts", path.name, len(concepts))


def _write_pictures(path: Path, draw: Draw, concepts: list[Concept]) -> None:
    count = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for concept in concepts:
            picture = draw(concept.code)
            if picture is not None:
                count += 1
                archive.writestr(zipfile.ZipInfo(f"{concept.code.lower()}.webp"), _webp(picture))
    log.info("%s: %d pictures, %.2f MB", path.name, count, path.stat().st_size / 1e6)


def _webp(picture: Image.Image) -> bytes:
    """64 x 64 RGBA, the drawing centred, as WebP with transparency."""
    picture = picture.convert("RGBA")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    buffer = io.BytesIO()
    canvas.save(buffer, "WEBP", quality=80, alpha_quality=75, method=4)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
