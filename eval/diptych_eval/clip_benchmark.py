"""Results as clip-benchmark writes its own, so that `clip_benchmark build` makes one table of both.

    {"dataset": …, "model": …, "pretrained": …, "task": …, "metrics": {…}, "language": "en"}     a file per result

Its names of the figures, and what they are here:

    acc1, acc5, mean_per_class_recall             zeroshot: top1, top5, mean_per_class
    mean_average_precision                        zeroshot, several labels
    text_retrieval_recall@k                       retrieval: image_to_text/recall@k
    image_retrieval_recall@k                      retrieval: text_to_image/recall@k
    lp_acc1, lp_acc5, lp_mean_per_class_recall    linear_probe; few_shot as a row for each number of shots (fewshot_k)
    image_acc, text_acc, acc                      composition: image, text, group; with one picture, text_acc
    CIDEr, Bleu_1 … Bleu_4, ROUGE_L               captioning: cider, bleu_1 … bleu_4, rouge_l

The probes are learned by another protocol than its own (`diptych_eval.tasks.linear_probe`), and captions of one picture
with several forms are ours; other tasks have no name there and are left out.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diptych.runfolder import write_text
from diptych_eval.folders import Evaluated
from diptych_eval.result import Result

_CLASSES = {"top1": "acc1", "top5": "acc5", "mean_per_class": "mean_per_class_recall"}
_WAYS = {"image_to_text": "text_retrieval", "text_to_image": "image_retrieval"}
_SELECTION = {"image": "image_acc", "text": "text_acc", "group": "acc"}
_CAPTIONS = {"cider": "CIDEr", "rouge_l": "ROUGE_L"} | {f"bleu_{order}": f"Bleu_{order}" for order in (1, 2, 3, 4)}


def rows(model: Evaluated) -> list[dict[str, Any]]:
    """One for each result that has a name there."""
    name, pretrained = _names(model)
    return [
        {
            "dataset": one.dataset,
            "model": name,
            "pretrained": pretrained,
            "task": task,
            "metrics": metrics,
            "language": _language(one),
        }
        for one in model.results
        for task, metrics in _renamed(one)
    ]


def write(models: Sequence[Evaluated], folder: Path) -> list[Path]:
    """The rows of all models as files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for row in (row for model in models for row in rows(model)):
        shots = f"{row['metrics']['fewshot_k']}-shot" if row["metrics"].get("fewshot_k", -1) > 0 else ""
        parts = [row["dataset"], row["pretrained"], row["model"], row["language"], row["task"], shots]
        name = "_".join(re.sub(r"[^\w@.-]+", "-", part) for part in parts if part)
        taken = sum(name == other.stem.split("~")[0] for other in written)  # names that differ in other characters only
        path = folder / f"{name}{f'~{taken + 1}' if taken else ''}.json"
        write_text(path, json.dumps(row, ensure_ascii=False))
        written.append(path)
    return written


def _names(model: Evaluated) -> tuple[str, str]:
    """Architecture and weights: of `open_clip:NAME:TAG` its own, else the folder's name and the weights' checksum."""
    kind, _, rest = model.folder.name.partition(":")
    if model.run is None and kind == "open_clip" and rest:
        name, _, tag = rest.partition(":")
        return name, tag
    return model.name, model.results[0].model[:12] if model.results else ""


def _language(one: Result) -> str:
    """That of an annotation file in several languages; else its default."""
    return str(one.protocol.get("language", "en")) if one.protocol.get("annotations") else "en"


def _renamed(one: Result) -> Iterator[tuple[str, dict[str, float]]]:
    """Task and figures by their names there."""
    match one.task:
        case "zeroshot":
            names = _class_names(one) | {"mean_average_precision": "mean_average_precision"}
            yield "zeroshot_classification", _pick(one, names)
        case "retrieval":
            names = {f"{way}/recall@{k}": f"{name}_recall@{k}" for way, name in _WAYS.items() for k in (1, 5, 10)}
            yield "zeroshot_retrieval", _pick(one, names)
        case "linear_probe":
            names = {ours: f"lp_{theirs}" for ours, theirs in _class_names(one).items()}
            yield "linear_probe", _pick(one, names) | {"fewshot_k": -1}
        case "few_shot":
            for shots in sorted({int(name.split("/")[0].removeprefix("shots_")) for name in one.metrics}):
                names = {f"shots_{shots}/{ours}": f"lp_{theirs}" for ours, theirs in _class_names(one).items()}
                yield "linear_probe", _pick(one, names) | {"fewshot_k": shots}
        case "captioning":
            yield "captioning", _pick(one, _CAPTIONS)
        case "composition" if "group" in one.metrics:
            yield "image_caption_selection", _pick(one, _SELECTION)
        case "composition":
            right = one.metrics["accuracy"]
            yield "image_caption_selection", {"image_acc": 1.0, "text_acc": right, "acc": right}


def _class_names(one: Result) -> dict[str, str]:
    """Without the first five of fewer than five classes, which it does not count either."""
    classes = one.protocol.get("num_candidates", one.protocol.get("classes", 5))
    return {ours: theirs for ours, theirs in _CLASSES.items() if ours != "top5" or classes >= 5}


def _pick(one: Result, names: dict[str, str]) -> dict[str, float]:
    return {theirs: one.metrics[ours] for ours, theirs in names.items() if ours in one.metrics}
