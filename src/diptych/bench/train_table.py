"""The report of `diptych bench train` as Markdown."""

from collections.abc import Sequence

from diptych.bench.machine import processor
from diptych.bench.train_plan import PEER
from diptych.bench.train_rows import Report, Row, Saving
from diptych.bench.train_split import Split

_FLOOR = "bare"


def table(report: Report) -> str:
    """The command, hardware and versions, and a table for each thing that was measured."""
    lines = [*_header(report), "", *_speed(report.rows)]
    if report.saving is not None:
        lines += ["", _of_saving(report.saving)]
    if report.problem:
        lines += ["", f"The time of a step could not be split: {report.problem}"]
    if report.split is not None:
        lines += ["", *_of_split(report.split)]
    return "\n".join(lines)


def _header(report: Report) -> list[str]:
    facts = report.facts
    device = facts["device_name"] or f"{facts['threads']} threads of {processor()}"
    peak = "by its data sheet" if facts["peak_is_published"] else "measured with a product of large matrices"
    alike: dict[str, list[str]] = {}
    for name, found in report.versions.items():
        alike.setdefault(", ".join(f"{package} {number}" for package, number in found.items()), []).append(name)
    versions = "; ".join(f"{', '.join(names)}: {packages}" for packages, names in alike.items())
    return [
        "```console",
        f"$ {report.command}",
        "```",
        "",
        f"{device}, {facts['peak_flops'] / 1e12:.3g} TFLOP/s in {facts['precision']} ({peak}); {versions}. "
        f"{facts['parameters'] / 1e6:.1f} million parameters, batches of {report.batch}, views of "
        f"{facts['image_size']} px. Operations are those of the towers as executed; memory is that of the training "
        f"process ({'its tensors on the GPU' if facts['device_name'] else 'all of it'}).",
    ]


def _speed(rows: Sequence[Row]) -> list[str]:
    peer, floor = (next((row for row in rows if row.implementation == name), None) for name in (PEER, _FLOOR))
    lines = [
        "| | samples/s, median (least, most) | of open_clip's | of bare's | s per step | tokens | GFLOP per sample "
        "| MFU | peak MiB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.problem:
            lines.append(f"| {row.implementation} | {row.problem} | | | | | | | |")
            continue
        rate = f"{_short(row.samples_per_second)} ({_short(row.spread[0])}, {_short(row.spread[1])})"
        lines.append(
            f"| {row.implementation} | {rate} | {_ratio(row, peer)} | {_ratio(row, floor)} | "
            f"{row.seconds_per_step:.3g} | {row.tokens} | {row.flops_per_sample / 1e9:.3g} | {row.mfu:.1%} | "
            f"{row.peak_bytes / 2**20:,.0f} |"
        )
    return lines


def _ratio(row: Row, other: Row | None) -> str:
    return f"{row.samples_per_second / other.samples_per_second:.2f}" if other and not other.problem else ""


def _of_saving(saving: Saving) -> str:
    figures = (saving.written_seconds, saving.stall_seconds, saving.lost_seconds)
    written, stall, lost = (f"{median:.2f} s ({least:.2f}, {most:.2f})" for median, least, most in figures)
    return (
        f"A checkpoint is written during {written} of training, and costs the loop {lost}, of which the first window "
        f"{stall}: {saving.share:.2%} of the time of a run that saves every five minutes."
    )


def _of_split(split: Split) -> list[str]:
    """Phases in the order of a step; what the device alone has (copies, waiting) comes last."""
    lines = [
        f"A step of ours in a profiled run ({split.wall_ms:.1f} ms, the mean of {split.steps}):",
        "",
        "| | ms | share |" + (" ms on the GPU | share |" if split.device_ms else ""),
        "|---|--:|--:|" + ("--:|--:|" if split.device_ms else ""),
    ]
    for name in dict.fromkeys((*split.host_ms, *split.device_ms)):
        cells = [_share(split.host_ms.get(name), split.wall_ms)]
        cells += [_share(split.device_ms.get(name), split.wall_ms)] if split.device_ms else []
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    if split.communication_ms:
        lines += ["", f"Collectives took {split.communication_ms:.1f} ms of a step, in part at the same time."]
    return lines


def _share(milliseconds: float | None, wall: float) -> str:
    return f"{milliseconds:.2f} | {milliseconds / wall:.1%}" if milliseconds is not None else " | "


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
