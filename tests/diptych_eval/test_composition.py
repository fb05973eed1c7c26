"""Composition tests in their published forms, with an encoder that knows what it should."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import diptych.testing as make
from diptych.config import from_tree
from diptych.data.images import EvaluationView
from diptych.errors import DataError
from diptych.testing import tiny_sample
from diptych_eval.embedder import Embedder
from diptych_eval.tasks.composition import Composition
from diptych_eval.tasks.family import Outcome

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}


class Painter:
    """Knows colours: a picture by its pixel, a text by the colour it ends with."""

    view, logit_scale, fingerprint = EvaluationView(8), 10.0, "painter"

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(images[:, :, 0, 0].float(), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(torch.tensor([COLOURS[text.split()[-1]] for text in texts]).float(), dim=-1)


def paint(path: Path, *colours: str) -> str:
    """Stripes from left to right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (8 * len(colours), 8))
    for number, colour in enumerate(colours):
        picture.paste(COLOURS[colour], (8 * number, 0, 8 * number + 8, 8))
    picture.save(path)
    return path.name


def run(annotations: Path | None, images: Path, **keys: Any) -> Outcome:
    tree = {"dataset": "d", "path": str(images)} | ({"annotations": str(annotations)} if annotations else {}) | keys
    return from_tree(Composition, tree).run(Embedder(Painter()))


def write(path: Path, tree: Any) -> Path:
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def test_sugarcrepe(tmp_path: Path) -> None:
    rows = {
        "0": {"filename": paint(tmp_path / "0.png", "red"), "caption": "it is red", "negative_caption": "it is blue"},
        "1": {"filename": paint(tmp_path / "1.png", "red"), "caption": "it is blue", "negative_caption": "it is red"},
        "2": {"filename": "0.png", "caption": "a red", "negative_caption": "some red"},  # a tie is wrong
        "3": {"filename": "0.png", "caption": "a red", "negative_caption": "a grey"},
    }
    found = run(write(tmp_path / "swap_att.json", rows), tmp_path)
    assert found.metrics == {"accuracy": 0.5}
    assert found.items[0].columns["accuracy"].tolist() == [1, 0, 0, 1]
    assert found.items[0].keys == ("0", "1", "2", "3")


def test_valse_keeps_what_its_readers_agreed_on(tmp_path: Path) -> None:
    paint(tmp_path / "0.png", "red")
    row = {"image_file": "0.png", "caption": "red", "foil": "blue", "linguistic_phenomena": "counting"}
    rows = {
        "a": row | {"mturk": {"caption": 3, "foil": 0}},
        "b": row | {"mturk": {"caption": 1, "foil": 2}, "caption": "blue"},
        "c": row | {"mturk": {"caption": 2, "foil": 1}, "caption": "green", "foil": "red"},
    }
    assert run(write(tmp_path / "counting.json", rows), tmp_path).metrics == {"accuracy": 0.5}


@pytest.mark.parametrize("group", ["relation_name", "attributes"])
def test_aro_looks_at_the_box_and_averages_groups(tmp_path: Path, group: str) -> None:
    paint(tmp_path / "0.png", "red", "blue")

    def row(left: int, true: str, false: str, name: str) -> dict[str, Any]:
        box = {"bbox_x": left, "bbox_y": 0, "bbox_w": 8, "bbox_h": 8}
        of = {"relation_name": name} if group == "relation_name" else {"attributes": [name, "x"]}
        return {"image_path": "0.png", "true_caption": true, "false_caption": false} | box | of

    rows = [
        row(0, "red", "blue", "on"),
        row(8, "blue", "red", "on"),
        row(8, "blue", "red", "on"),
        row(0, "blue", "red", "by"),
    ]
    found = run(write(tmp_path / "vg.json", rows), tmp_path)
    on, by = ("on", "by") if group == "relation_name" else ("on_x", "by_x")
    assert found.metrics == {
        "accuracy": 0.75,
        f"accuracy/{on}": 1.0,
        f"accuracy/{by}": 0.0,
        "accuracy/mean_of_groups": 0.5,
    }


def test_a_caption_must_beat_all_its_foils(tmp_path: Path) -> None:
    """ARO's order sets, and What'sUp."""
    paint(tmp_path / "0.png", "red")
    rows = [
        {"image": "0.png", "caption_options": ["red", "grey", "blue", "green"]},
        {"image": "0.png", "caption_options": ["grey", "blue", "red", "green"]},
        {"image_path": "data/set/0.png", "caption_options": ["red", "blue"]},
    ]
    found = run(write(tmp_path / "order.json", rows), tmp_path)
    assert found.metrics == {"accuracy": pytest.approx(2 / 3)}
    assert found.items[0].columns["accuracy"].tolist() == [1, 0, 1]


def test_pictures_by_number(tmp_path: Path) -> None:
    for name in ("000000000042.jpg", "7.jpg"):
        paint(tmp_path / name, "red")
    found = run(write(tmp_path / "qa.json", [[42, "red", "blue"], ["7", "blue", "red"]]), tmp_path)
    assert found.items[0].columns["accuracy"].tolist() == [1, 0]
    assert found.items[0].clusters == ("000000000042.jpg", "7.jpg")


def test_examples_of_a_picture_are_a_cluster(tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        paint(tmp_path / name, "red")
    row = {"caption": "red", "negative_caption": "blue"}
    rows = {str(i): row | {"filename": name} for i, name in enumerate(("1.png", "0.png", "1.png"))}
    (table,) = run(write(tmp_path / "a.json", rows), tmp_path).items
    assert table.clusters == ("1.png", "0.png", "1.png")
    assert table.cluster_numbers is not None
    assert table.cluster_numbers.tolist() == [0, 1, 0]


def test_winoground_by_hand(tmp_path: Path) -> None:
    for name in ("red", "green", "grey"):
        paint(tmp_path / f"{name}.png", name)

    def row(number: int, first: str, second: str, captions: tuple[str, str]) -> str:
        tree = {"id": number, "image_0": first, "image_1": second, "caption_0": captions[0], "caption_1": captions[1]}
        return json.dumps(tree)

    rows = [
        row(0, "red", "green", ("red", "green")),  # all right
        row(1, "red", "green", ("green", "red")),  # all wrong
        # grey is as near to both texts: a tie for the picture, while each text has a nearest picture or not
        row(2, "red", "grey", ("red", "green")),
    ]
    found = run(write(tmp_path / "examples.jsonl", "\n".join(rows)), tmp_path)
    columns = found.items[0].columns
    assert columns["text"].tolist() == [1, 0, 0]
    assert columns["image"].tolist() == [1, 0, 1]
    assert columns["group"].tolist() == [1, 0, 0]


def test_mmvp_counts_pairs_of_which_both_texts_find_their_picture(tmp_path: Path) -> None:
    for number, colour in enumerate(("red", "green", "red", "blue"), 1):
        paint(tmp_path / "Colour" / f"{number}.jpg", colour)
    lines = ["Question ID,Type,Statement", "1,Colour,red", "2,Colour,green", "3,Colour,blue", '4,Colour,"so, red"']
    found = run(write(tmp_path / "Questions.csv", "\n".join(lines)), tmp_path)
    assert found.metrics["image"] == 0.5
    assert found.items[0].keys == ("1-2", "3-4")


def test_foils_in_shards(tmp_path: Path) -> None:
    samples = [tiny_sample(f"k{i}", caption="is red", hard=["is blue", "is grey"][: i % 3]) for i in range(6)]
    make.write_shard(tmp_path / "0.tar", samples)
    found = run(None, tmp_path)
    assert found.num_items == 4  # two have none
    assert found.items[0].keys == ("k1", "k2", "k4", "k5")
    with pytest.raises(DataError, match="no sample has foils in 'other'"):
        run(None, tmp_path, foil_column="other")
    with pytest.raises(DataError, match="sample 'k1' has no 'other'"):
        run(None, tmp_path, true_column="other")


def one(**changes: str) -> dict[str, Any]:
    return {"0": {"filename": "0.png", "caption": "red", "negative_caption": "blue"} | changes}


def no_picture(root: Path) -> None:
    (root / "0.png").unlink()


def broken_picture(root: Path) -> None:
    (root / "0.png").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("tree", "prepare", "message"),
    [
        ("{", None, "not a composition test that can be read"),
        ({}, None, "no examples"),
        ({"0": {"filename": "0.png"}}, None, "not a composition test that can be read"),
        ([[1, "red"]], None, "not a composition test that can be read"),
        ([{"image": "0.png", "caption_options": ["red", ""]}], None, r"1 examples have an empty caption \(0\)"),
        (one(negative_caption=" "), None, r"1 examples have an empty caption \(0\)"),
        (one(), no_picture, r"1 pictures are missing \(.*0.png\)"),
        (one(), broken_picture, r"1 undecodable"),
        (one() | {"1": one()["0"] | {"filename": "1.png"}}, broken_picture, r"pictures cannot be read \(1 of 2"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, tree: Any, prepare: Callable[[Path], None] | None, message: str
) -> None:
    paint(tmp_path / "0.png", "red")
    paint(tmp_path / "1.png", "blue")
    if prepare is not None:
        prepare(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        run(write(tmp_path / "a.json", tree), tmp_path)
    assert "\n" not in str(caught.value)
