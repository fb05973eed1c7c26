"""Where pictures, classes and captions come from: layouts and annotation files as they are published."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.diptych_eval.fakes import benchmark

import diptych.testing as make
from diptych.errors import DataError
from diptych.testing import tiny_sample
from diptych_eval.annotated import read_captions
from diptych_eval.classes import open_class_set
from diptych_eval.pictures import ShardPictures, open_pictures


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
    return path


def folders(root: Path, names: list[str]) -> Path:
    for name in names:
        picture(root / name / "a.png")
    return root


def labels(found: Any) -> list[tuple[int, ...]]:
    return [found.pictures.read(i).labels for i in range(len(found.pictures))]


def test_clip_benchmarks_layout(tmp_path: Path) -> None:
    root = benchmark(tmp_path)
    (root / "test" / "nshards.txt").write_text("1\n")
    found = open_class_set(str(root), None, None, "test")
    assert found.names == tuple(f"k{i}" for i in range(12))
    assert found.templates == ("{c}", "a photo of {c}")
    assert labels(found) == [(i,) for i in range(12)]
    (root / "test" / "nshards.txt").write_text("2\n")
    with pytest.raises(DataError, match=r"1 shards, and nshards.txt says 2"):
        open_class_set(str(root), None, None, "test")


def test_a_template_without_its_place_is_refused(tmp_path: Path) -> None:
    root = benchmark(tmp_path)
    (root / "zeroshot_classification_templates.txt").write_text("a photo\n")
    with pytest.raises(DataError, match=r"template without \{c\} \('a photo'\)"):
        open_class_set(str(root), None, None, "test")


def test_a_folder_per_class(tmp_path: Path) -> None:
    found = open_class_set(str(folders(tmp_path, ["red_fox", "cat"])), None, None, "test")
    assert found.names == ("cat", "red fox")
    assert found.templates == ("{c}",)
    assert labels(found) == [(0,), (1,)]
    assert len(open_pictures(str(tmp_path))) == 2


def test_folders_of_imagenet_and_its_relatives(tmp_path: Path) -> None:
    some = open_class_set(str(folders(tmp_path / "r", ["n01443537", "n01440764"])), "imagenet", "imagenet", "test")
    assert some.names == ("tench", "goldfish")  # of 1,000, those that have a folder
    assert len(some.templates) == 80
    assert len(open_class_set(str(tmp_path / "r"), "imagenet", "imagenet_simple", "test").templates) == 7
    assert labels(some) == [(0,), (1,)]
    v2 = open_class_set(str(folders(tmp_path / "v2", ["0", "10", "2"])), "imagenet", None, "test")
    assert len(v2.names) == 1000
    assert labels(v2) == [(0,), (10,), (2,)]  # by number, not by place
    with pytest.raises(DataError, match=r"1 folders are no classes of ImageNet-1k \(n99999999\)"):
        open_class_set(str(folders(tmp_path / "x", ["n01440764", "n99999999"])), "imagenet", None, "test")


def test_objectnet_by_the_maps_that_come_with_it(tmp_path: Path) -> None:
    root = folders(tmp_path / "objectnet", ["air_freshener", "alarm_clock", "backpack"])
    with pytest.raises(DataError, match="no `mappings` of ObjectNet"):
        open_class_set(str(root), "imagenet", None, "test")
    maps = tmp_path / "mappings"
    maps.mkdir()
    names = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "backpack": "Backpack"}
    (maps / "folder_to_objectnet_label.json").write_text(json.dumps(names))
    (maps / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Backpack": "backpack", "Alarm clock": "clock"}))
    found = open_class_set(str(root), "imagenet", None, "test")
    assert found.names == ("Alarm clock", "Backpack")
    assert labels(found) == [(0,), (1,)]
    assert found.pictures.read(0).key == "alarm_clock/a.png"


def test_labels_of_several_classes(tmp_path: Path) -> None:
    sample = tiny_sample("k")
    marks = tmp_path / "marks.npy"
    np.save(marks, np.array([0, 1, 1, 0]))
    make.write_shard(tmp_path / "0.tar", [make.TinySample("k", sample.members | {"npy": marks.read_bytes()})])
    assert ShardPictures(str(tmp_path)).read(0).labels == (1, 2)


def test_captions_a_line_each(tmp_path: Path) -> None:
    make.write_shard(tmp_path / "0.tar", [make.TinySample("k", tiny_sample("k").members | {"txt": b"one\ntwo\n"})])
    assert ShardPictures(str(tmp_path)).read(0).captions["txt"] == ("one", "two")


def karpathy() -> dict[str, Any]:
    sentences = [{"raw": "a fox"}, {"raw": "one fox"}]
    image = {"filepath": "val2014", "filename": "1.png", "split": "test", "sentences": sentences}
    return {"images": [image, image | {"filename": "2.png", "split": "train"}], "dataset": "coco"}


def coco() -> dict[str, Any]:
    captions = [{"image_id": 7, "caption": "a fox"}, {"image_id": 7, "caption": "one fox"}]
    return {"images": [{"id": 7, "file_name": "1.png"}, {"id": 8, "file_name": "2.png"}], "annotations": captions}


def blip() -> list[dict[str, Any]]:
    return [{"image": "val2014/1.png", "caption": ["a fox", "one fox"]}]


@pytest.mark.parametrize("tree", [karpathy(), coco(), blip()])
@pytest.mark.parametrize("folder", [".", "val2014"])
def test_cocos_annotations(tmp_path: Path, tree: Any, folder: str) -> None:
    picture(tmp_path / folder / "1.png")
    (tmp_path / "a.json").write_text(json.dumps(tree))
    images = tmp_path if "dataset" in tree else tmp_path / folder
    found = read_captions(tmp_path / "a.json", images, split="test", language="en")
    assert found.captions == (("a fox", "one fox"),)
    assert len(found.pictures) == 1


def test_xm3600(tmp_path: Path) -> None:
    rows = [{"image/key": "1", "de": {"caption": ["ein Fuchs"]}, "en": {"caption": ["a fox"]}}, {"image/key": "2"}]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    picture(tmp_path / "1.jpg")
    found = read_captions(tmp_path / "c.jsonl", tmp_path, split="test", language="de")
    assert found.captions == (("ein Fuchs",),)
    with pytest.raises(DataError, match=r"no captions of split 'test' in 'fr'"):
        read_captions(tmp_path / "c.jsonl", tmp_path, split="test", language="fr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(karpathy())[:-40], "not an annotation file that can be read"),
        ("[]", "no captions of split 'test'"),
        ('[{"image": "1.png"}]', "not an annotation file that can be read"),
        ('{"images": [{"filename": "1.png"}]}', "not an annotation file that can be read"),
        (json.dumps(karpathy()).replace("a fox", " "), r"1 pictures have an empty caption \(val2014/1.png\)"),
        (json.dumps(karpathy()).replace("1.png", "3.png"), r"1 pictures are missing \(.*3.png\)"),
        (json.dumps(karpathy()).replace('"test"', '"val"'), "no captions of split 'test'"),
    ],
)
def test_bad_annotations_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_captions(tmp_path / "a.json", tmp_path, split="test", language="en")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a.json") in str(caught.value)
