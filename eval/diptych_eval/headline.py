"""What is known of the metrics of our tasks: which stands for a task, which way is better, how a figure is written.

Metrics of other packages' tasks are shown as they are, and no model is called better for them.
"""

from collections.abc import Iterable

from diptych_eval.result import Result

_HEADLINES = {
    "zeroshot": ("top1", "mean_average_precision"),
    "retrieval": ("image_to_text/recall@1", "text_to_image/recall@1"),
    "composition": ("group", "accuracy"),
    "unseen_pairs": ("auc",),
    "captioning": ("cider",),
    "linear_probe": ("top1",),
    "knn": ("top1",),
    "robustness": ("corrupted",),
}
_LOWER_IS_BETTER = ("calibration_error", "median_rank")
_NO_SHARES = ("median_rank", "cider")


def headlines(result: Result) -> tuple[str, ...]:
    """The metrics that stand for a task, all of which have intervals; none for geometry and tasks that are not ours."""
    if result.task == "few_shot":
        return tuple(name for name in result.metrics if name.endswith("/top1"))[-1:]
    found = tuple(name for name in _HEADLINES.get(result.task, ()) if name in result.metrics)
    return found if result.task == "retrieval" else found[:1]


def is_share(task: str, metric: str) -> bool:
    """Whether a figure lies between 0 and 1 and is written as a percentage."""
    return (task in _HEADLINES or task == "few_shot") and not metric.endswith(_NO_SHARES)


def direction(task: str, metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where nobody can say."""
    if task not in _HEADLINES and task != "few_shot":
        return 0
    return -1 if metric.endswith(_LOWER_IS_BETTER) else 1


def best(task: str, metric: str, values: Iterable[float | None]) -> float | None:
    """The best of several; None where there is none, or where only one is known."""
    known = [value for value in values if value is not None and value == value]
    way = direction(task, metric)
    if way == 0 or len(known) < 2:
        return None
    return max(known) if way > 0 else min(known)


def written(task: str, metric: str, value: float) -> str:
    """A figure for people."""
    if is_share(task, metric):
        return f"{100 * value:.1f}%"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
