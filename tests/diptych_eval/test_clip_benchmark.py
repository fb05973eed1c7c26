import json
from pathlib import Path

import pytest
from tests.diptych_eval.evaluations import Made, write

from diptych_eval import clip_benchmark
from diptych_eval.folders import open_folders

CLASSES = {"top1": 0.5, "top5": 0.75, "mean_per_class": 0.25}


def rows(folder: Path) -> dict[str, dict[str, object]]:
    (model,) = open_folders([folder])
    return {f"{row['dataset']} {row['task']}": row for row in clip_benchmark.rows(model)}


def test_figures_get_the_names_they_have_there(tmp_path: Path) -> None:
    recalls = {f"{way}/recall@{k}": 0.1 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    retrieval = recalls | {"image_to_text/recall@5": 0.9, "mean_recall": 0.2}
    shots = {f"shots_{k}/{name}": value for k in (2, 16) for name, value in CLASSES.items()}
    pair = {"text": 0.1, "image": 0.2, "group": 0.05, "text/x": 1.0}
    found = rows(
        write(
            tmp_path / "a",
            Made("zeroshot", "birds", CLASSES | {"calibration_error": 0.1}, protocol={"num_candidates": 9}),
            Made("zeroshot", "two", CLASSES, protocol={"num_candidates": 2}),
            Made("zeroshot", "many", {"mean_average_precision": 0.3}),
            Made("retrieval", "xm", retrieval, protocol={"annotations": "captions.jsonl", "language": "de"}),
            Made("linear_probe", "birds", CLASSES),
            Made("few_shot", "shots", shots),
            Made("composition", "pairs", pair),
            Made("composition", "foils", {"accuracy": 0.4, "accuracy/x": 1.0}),
            Made("geometry", "birds", {"alignment": 1.0}),
        )
    )
    zeroshot = found["birds zeroshot_classification"]
    assert zeroshot.keys() == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert zeroshot["metrics"] == {"acc1": 0.5, "acc5": 0.75, "mean_per_class_recall": 0.25}
    assert found["two zeroshot_classification"]["metrics"] == {"acc1": 0.5, "mean_per_class_recall": 0.25}
    assert found["many zeroshot_classification"]["metrics"] == {"mean_average_precision": 0.3}
    there = found["xm zeroshot_retrieval"]
    assert there["language"] == "de"
    assert isinstance(there["metrics"], dict)
    assert there["metrics"]["text_retrieval_recall@5"] == 0.9  # a picture looks for its text
    assert there["metrics"]["image_retrieval_recall@5"] == 0.1
    probe = {"lp_acc1": 0.5, "lp_acc5": 0.75, "lp_mean_per_class_recall": 0.25}
    assert found["birds linear_probe"]["metrics"] == probe | {"fewshot_k": -1}
    assert found["shots linear_probe"]["metrics"] == probe | {"fewshot_k": 16}
    selection = "image_caption_selection"
    assert found[f"pairs {selection}"]["metrics"] == {"text_acc": 0.1, "image_acc": 0.2, "acc": 0.05}
    assert found[f"foils {selection}"]["metrics"] == {"text_acc": 0.4, "image_acc": 1.0, "acc": 0.4}
    assert not [name for name in found if name.startswith("birds geometry")]


@pytest.mark.parametrize(
    ("name", "model", "pretrained"),
    [("open_clip:ViT-B-32:laion2b", "ViT-B-32", "laion2b"), ("mine", "mine", "weights of m")],
)
def test_models_of_open_clip_keep_their_names(tmp_path: Path, name: str, model: str, pretrained: str) -> None:
    row = rows(write(tmp_path / name, Made("zeroshot", "birds", CLASSES)))["birds zeroshot_classification"]
    assert (row["model"], row["pretrained"]) == (model, pretrained)


def test_every_row_is_a_file_also_where_names_look_alike(tmp_path: Path) -> None:
    made = [Made("zeroshot", name, CLASSES) for name in ("a/b", "a b", "a-b")]
    models = open_folders([write(tmp_path / "x", *made), write(tmp_path / "y", *made)])
    written = clip_benchmark.write(models, tmp_path / "out")
    assert len(written) == len(set(written)) == 6
    found = sorted((row["model"], row["dataset"]) for row in map(json.loads, (path.read_text() for path in written)))
    assert found == [(model, name) for model in ("x", "y") for name in ("a b", "a-b", "a/b")]
