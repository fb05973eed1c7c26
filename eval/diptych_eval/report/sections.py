"""What the report says of each task: its table, and the drawing that says it best."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from diptych.log import read_metrics
from diptych_eval.folders import Evaluated
from diptych_eval.report import plots
from diptych_eval.report.bars import Chart
from diptych_eval.report.plots import COLOURS, Series
from diptych_eval.report.tables import Column, Figures, Row
from diptych_eval.result import Result

_ZEROSHOT = (
    Column("top-1", "top1"),
    Column("top-5", "top5"),
    Column("mean per class", "mean_per_class"),
    Column("calibration error", "calibration_error"),
)
_RETRIEVAL = tuple(
    Column(name, f"{way}/{metric}", group)
    for way, group in (("image_to_text", "picture → text"), ("text_to_image", "text → picture"))
    for name, metric in (
        ("R@1", "recall@1"),
        ("R@5", "recall@5"),
        ("R@10", "recall@10"),
        ("median rank", "median_rank"),
    )
)
_CAPTIONING = (
    Column("CIDEr", "cider"),
    *(Column(f"BLEU-{order}", f"bleu_{order}") for order in (1, 2, 3, 4)),
    Column("ROUGE-L", "rouge_l"),
)
_PROBES = _ZEROSHOT[:3]
_PAIRS = (
    Column("AUC", "auc"),
    Column("harmonic mean", "harmonic_mean"),
    Column("trained", "trained"),
    Column("untrained", "untrained"),
)
_OWN = (
    "zeroshot",
    "retrieval",
    "composition",
    "unseen_pairs",
    "captioning",
    "linear_probe",
    "knn",
    "few_shot",
    "robustness",
    "geometry",
)


@dataclass(frozen=True)
class Plot:
    """A drawing with what the page writes over it."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Block:
    """One set of a section."""

    title: str
    detail: str = ""
    columns: tuple[Column, ...] = ()
    """Of a table with a row per model; none: a row per metric."""
    rows: tuple[Row, ...] = ()
    chart: Chart | None = None
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True)
class Section:
    """A kind of task."""

    heading: str
    note: str
    blocks: tuple[Block, ...]
    is_joined: bool = False
    """Whether the blocks are one table."""
    plots: tuple[Plot, ...] = ()


def sections(figures: Figures) -> list[Section]:
    """Those of which there is something to say."""
    found = [
        _zeroshot(figures),
        _retrieval(figures),
        _composition(figures),
        _unseen_pairs(figures),
        _captioning(figures),
        _probes(figures),
        _few_shot(figures),
        _robustness(figures),
        _geometry(figures),
        _other(figures),
    ]
    return [one for one in found if one.blocks]


def training(models: Sequence[Evaluated]) -> list[Plot]:
    """The curves of runs over each other."""
    logs = [rows_of(model) for model in models]
    wanted = [
        ("Loss", "train/loss/contrastive", False),
        ("Logit scale", "train/logit_scale", False),
        ("Samples per second", "train/samples_per_second", True),
        ("Learning rate", "train/lr", True),
    ]
    drawn = []
    for title, key, from_zero in wanted:
        lines = [line for number, rows in enumerate(logs) if (line := _series(rows, key, COLOURS[number % 10])).x]
        if lines:
            drawn.append(Plot(title, Markup(plots.curve(title, lines, from_zero=from_zero))))
    return drawn


def rows_of(model: Evaluated) -> list[dict[str, float]]:
    """What a run logged; nothing for a model that is no run."""
    return read_metrics(model.run.metrics) if model.run is not None and model.run.metrics.is_file() else []


def _series(rows: Sequence[dict[str, float]], key: str, colour: str) -> Series:
    points = [
        (row["train/samples_seen"], row[key])
        for row in rows
        if row.get(key) is not None and "train/samples_seen" in row
    ]
    return Series([x for x, _ in points], [y for _, y in points], colour)


def _zeroshot(figures: Figures) -> Section:
    pairs = figures.pairs(lambda task: task == "zeroshot")
    many = [pair for pair in pairs if "mean_average_precision" in figures.metrics(*pair)]
    blocks = [_by_model(figures, pair, _ZEROSHOT) for pair in pairs if pair not in many]
    blocks += [_by_model(figures, pair, (Column("mAP", "mean_average_precision"),)) for pair in many]
    return Section(
        "Zero-shot classification",
        "The class whose prompts lie nearest to the picture, among all names. In brackets the 95% bootstrap interval. "
        "Below, how often a model is right (upwards) that is this sure (to the right): the larger a mark, the more "
        "pictures; on the dashed line a model is as often right as it believes.",
        tuple(blocks),
        is_joined=not many,
        plots=tuple(plot for pair in pairs if (plot := _reliability(figures, pair))),
    )


def _reliability(figures: Figures, pair: tuple[str, str]) -> Plot | None:
    lines = []
    for number, one in enumerate(figures.of(*pair)):
        bins = one.protocol.get("calibration") if one is not None else None
        if bins:
            counts = np.array(bins["counts"], dtype=float)
            kept = counts > 0
            x, y = np.array(bins["confidence"])[kept].tolist(), np.array(bins["accuracy"])[kept].tolist()
            sizes = (counts[kept] / counts.max()).tolist()
            lines.append(Series(x, y, COLOURS[number % 10], sizes=sizes))
    return Plot(pair[1], Markup(plots.reliability(f"reliability of {pair[1]}", lines))) if lines else None


def _retrieval(figures: Figures) -> Section:
    pairs = figures.pairs(lambda task: task == "retrieval")
    return Section(
        "Image-text retrieval",
        "Recall at 1, 5 and 10 among all candidates of the set. A tie counts against the model.",
        tuple(_by_model(figures, pair, _RETRIEVAL) for pair in pairs),
        is_joined=True,
    )


def _composition(figures: Figures) -> Section:
    blocks = []
    for pair in figures.pairs(lambda task: task == "composition"):
        names = figures.metrics(*pair)
        whole = "group" if "group" in names else "accuracy"
        parts = [name for name in names if name.startswith(f"{whole}/") and not name.endswith("/mean_of_groups")]
        named = [(whole, "all"), *((name, name.removeprefix(f"{whole}/")) for name in parts)]
        blocks.append(_by_metric(figures, pair, chart=figures.bars(*pair, named)))
    return Section(
        "Composition",
        "A true caption against foils that say nearly the same; a tie is wrong. With two pictures and two captions "
        "(Winoground): “group”, each picture prefers its own caption and each caption its own picture. "
        "Bars: by kind of foil.",
        tuple(blocks),
    )


def _unseen_pairs(figures: Figures) -> Section:
    pairs = figures.pairs(lambda task: task == "unseen_pairs")
    return Section(
        "Unseen pairs",
        "Compositions of which some were trained. AUC: the area under accuracy on untrained ones over accuracy on "
        "trained ones, while the bias for untrained candidates goes from none to all; with it the best harmonic mean "
        "of the two, and each at its best.",
        tuple(_by_model(figures, pair, _PAIRS) for pair in pairs),
        is_joined=True,
    )


def _captioning(figures: Figures) -> Section:
    pairs = figures.pairs(lambda task: task == "captioning")
    return Section(
        "Captioning",
        "What a model writes against all that people wrote about the same picture. CIDEr (CIDEr-D) lies between 0 and "
        "10; papers often give 100 times as much.",
        tuple(_by_model(figures, pair, _CAPTIONING) for pair in pairs),
        is_joined=True,
    )


def _probes(figures: Figures) -> Section:
    pairs = figures.pairs(lambda task: task in ("linear_probe", "knn"))
    names = {"linear_probe": "linear probe", "knn": "nearest neighbours"}
    blocks = [_by_model(figures, pair, _PROBES, title=f"{pair[1]}, {names[pair[0]]}") for pair in pairs]
    return Section(
        "Probes",
        "Classes learned from the features of other pictures, the model frozen.",
        tuple(blocks),
        is_joined=True,
    )


def _few_shot(figures: Figures) -> Section:
    blocks = []
    for pair in figures.pairs(lambda task: task == "few_shot"):
        lines = [_shots(one, COLOURS[number % 10]) for number, one in enumerate(figures.of(*pair)) if one is not None]
        drawn = plots.shares(f"few shots of {pair[1]}", lines, x_label="pictures per class", doubling=True)
        blocks.append(_by_metric(figures, pair, drawn=(Plot("top-1", Markup(drawn)),)))
    return Section(
        "Few shots",
        "The linear probe learned from few pictures of each class: the mean over several draws of them. Bands: the "
        "95% interval over draws, not over the pictures it is measured on.",
        tuple(blocks),
    )


def _shots(one: Result, colour: str) -> Series:
    names = [name for name in one.metrics if name.startswith("shots_") and name.endswith("/top1")]
    x = [float(name.split("/")[0].removeprefix("shots_")) for name in names]
    bounds = [one.intervals[name] for name in names if name in one.intervals]
    return Series(x, [one.metrics[name] for name in names], colour, bounds if len(bounds) == len(x) else ())


def _robustness(figures: Figures) -> Section:
    blocks = []
    for pair in figures.pairs(lambda task: task == "robustness"):
        kinds = [name for name in figures.metrics(*pair) if name.startswith("corrupted/")]
        named = [("clean", "as they are"), ("corrupted", "mean over kinds")]
        named += [(name, name.removeprefix("corrupted/").replace("_", " ")) for name in kinds]
        lines = [
            line
            for number, one in enumerate(figures.of(*pair))
            if one is not None and len((line := _degrees(one, COLOURS[number % 10])).x) > 1
        ]
        drawn = plots.shares(f"robustness of {pair[1]}", lines, x_label="degree of corruption") if lines else ""
        plot = (Plot("top-1, mean over kinds", Markup(drawn)),) if drawn else ()
        blocks.append(_by_metric(figures, pair, chart=figures.bars(*pair, named), drawn=plot))
    return Section(
        "Robustness",
        "Zero-shot top-1 on pictures that were made worse, the mean over degrees; “relative”: what is left of the "
        "figure on the pictures as they are.",
        tuple(blocks),
    )


def _degrees(one: Result, colour: str) -> Series:
    """Means over kinds at each degree; degree 0 are the pictures as they are."""
    of_degree: dict[float, list[float]] = {0.0: [one.metrics["clean"]]} if "clean" in one.metrics else {}
    for name, value in (one.protocol.get("top1_by_degree") or {}).items():
        of_degree.setdefault(float(name.rsplit("/", 1)[1]), []).append(value)
    degrees = sorted(of_degree)
    return Series(degrees, [sum(of_degree[d]) / len(of_degree[d]) for d in degrees], colour)


def _geometry(figures: Figures) -> Section:
    return Section(
        "Geometry",
        "How pictures and texts lie on the sphere. No figure is good or bad by itself, so none is marked as best.",
        tuple(_by_metric(figures, pair) for pair in figures.pairs(lambda task: task == "geometry")),
    )


def _other(figures: Figures) -> Section:
    pairs = figures.pairs(lambda task: task not in _OWN)
    return Section(
        "Other tasks",
        "Of other packages, as they gave their figures.",
        tuple(_by_metric(figures, pair, title=f"{pair[0]}: {pair[1]}") for pair in pairs),
    )


def _by_model(
    figures: Figures, pair: tuple[str, str], columns: tuple[Column, ...], *, title: str | None = None
) -> Block:
    return Block(title or pair[1], _detail(figures, pair), columns, figures.by_model(*pair, columns))


def _by_metric(
    figures: Figures,
    pair: tuple[str, str],
    *,
    title: str | None = None,
    chart: Chart | None = None,
    drawn: tuple[Plot, ...] = (),
) -> Block:
    return Block(title or pair[1], _detail(figures, pair), rows=figures.by_metric(*pair), chart=chart, plots=drawn)


def _detail(figures: Figures, pair: tuple[str, str]) -> str:
    """How much was measured, and what guessing would get."""
    one = next(one for one in figures.of(*pair) if one is not None)
    parts = [f"{one.num_items:,} {'examples' if one.task == 'composition' else 'pictures'}"]
    candidates = one.protocol.get("num_candidates")
    if isinstance(candidates, int) and candidates > 0:
        parts.append(f"{candidates:,} {'texts' if one.task == 'retrieval' else 'names'}")
        if one.task in ("zeroshot", "robustness"):
            parts.append(f"chance {100 / candidates:.2g}%")
    return ", ".join(parts)
