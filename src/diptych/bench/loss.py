"""`diptych bench loss`: time and memory of a contrastive loss, forward and backward, against peers in the same run.

Every measurement has a process of its own, so that no allocator remembers another's peak; implementations alternate, so
that a machine's moods meet all of them. The floor is 8·B²·D operations (each pair multiplied once forward, once again,
twice for gradients) at the matmul rate measured in the same run.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diptych.bench.isolated import PeakMeter, hardware, in_process
from diptych.errors import ConfigError, DiptychError

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
_CHUNK = 1024


@dataclass(frozen=True)
class Setting:
    """One measurement."""

    implementation: str
    rows: int
    width: int
    device: str
    dtype: str
    repeats: int = 1


@dataclass(frozen=True)
class Measurement:
    """What one process found."""

    seconds: float
    """Forward and backward, median of the repeats."""
    extra_bytes: int
    """Peak above what was there when both sides' features were: gradients included."""
    loss: float


@dataclass(frozen=True)
class Row:
    """One implementation at one size, over all rounds."""

    implementation: str
    rows: int
    seconds: float
    spread: tuple[float, float]
    extra_bytes: int
    floor_seconds: float
    loss: float
    problem: str = ""


def implementations() -> dict[str, Callable[[], Loss]]:
    """What can be measured, by name."""
    return {
        "ours": _ours,
        "ours-sigmoid": _ours_sigmoid,
        "ours-plugs": _ours_with_plugs,
        "open_clip": _open_clip,
        "open_clip-sigmoid": _open_clip_sigmoid,
        "open_clip-compiled": lambda: torch.compile(_open_clip()),
        "chunked": lambda: _chunked,
    }


def measure_all(
    settings: Setting, sizes: Sequence[int], names: Sequence[str], *, rounds: int, progress: Callable[[str], None]
) -> list[Row]:
    """One row for each size and name.

    Raises:
        ConfigError: a name is unknown, or there is no such device.
    """
    unknown = [name for name in names if name not in implementations()]
    if unknown:
        raise ConfigError(f"unknown implementation {unknown[0]!r} · bench loss · use {', '.join(implementations())}")
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"there is no CUDA device for {settings.device!r} · bench loss · use --device cpu")
    rows = []
    for size in sizes:
        found: dict[str, list[Measurement]] = {name: [] for name in names}
        problems: dict[str, str] = {}
        rates = []
        for number in range(rounds):
            rates.append(in_process(_matmul_rate, replace(settings, rows=size)))
            for name in names:
                if name in problems:
                    continue
                progress(f"{size} rows, round {number + 1} of {rounds}: {name}")
                try:
                    found[name].append(in_process(_measure, replace(settings, rows=size, implementation=name)))
                except DiptychError as error:
                    problems[name] = str(error)
        floor = 8 * size**2 * settings.width / statistics.median(rates)
        rows += [_row(name, size, floor, found[name], problems.get(name, "")) for name in names]
    return rows


def table(rows: Sequence[Row], settings: Setting, *, peer: str) -> str:
    """The rows as Markdown, with hardware and versions above."""
    lines = [
        f"{hardware(settings.device)}, torch {torch.__version__}; D = {settings.width}, {settings.dtype}; forward and "
        "backward; seconds: median (least, most)",
        "",
        "| B | | seconds | of the peer's | floor | floor / seconds | extra MiB | of the peer's | loss |",
        "|--:|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        reference = next((r for r in rows if r.rows == row.rows and r.implementation == peer and not r.problem), None)
        if row.problem:
            lines.append(f"| {row.rows:,} | {row.implementation} | {row.problem} | | {row.floor_seconds:.2f} | | | | |")
            continue
        times = f"{row.seconds:.2f} ({row.spread[0]:.2f}, {row.spread[1]:.2f})"
        share = f"{row.seconds / reference.seconds:.2f}" if reference else "–"
        memory = f"{row.extra_bytes / max(reference.extra_bytes, 1):.1%}" if reference else "–"
        lines.append(
            f"| {row.rows:,} | {row.implementation} | {times} | {share} | {row.floor_seconds:.2f} | "
            f"{row.floor_seconds / row.seconds:.0%} | {row.extra_bytes / 2**20:,.0f} | {memory} | {row.loss:.6f} |"
        )
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(row) for row in rows]


def _row(name: str, size: int, floor: float, found: Sequence[Measurement], problem: str) -> Row:
    if problem or not found:
        return Row(name, size, 0.0, (0.0, 0.0), 0, floor, 0.0, problem or "not measured")
    seconds = [measurement.seconds for measurement in found]
    extra = int(statistics.median(measurement.extra_bytes for measurement in found))
    spread = (min(seconds), max(seconds))
    return Row(name, size, statistics.median(seconds), spread, extra, floor, found[0].loss)


# --- one process -------------------------------------------------------------------------------------------------


def _measure(setting: Setting) -> Measurement:
    loss = implementations()[setting.implementation]()
    _run(loss, *_features(replace(setting, rows=min(setting.rows, 512))))  # what is loaded or compiled once
    image, text = _features(setting)
    if setting.implementation.endswith("compiled"):
        _run(loss, image, text)
    meter = PeakMeter(setting.device)
    seconds, value = [], 0.0
    for _ in range(setting.repeats):
        image.grad = text.grad = None
        start = time.perf_counter()
        value = _run(loss, image, text)
        seconds.append(time.perf_counter() - start)
    return Measurement(statistics.median(seconds), meter.extra_bytes(), value)


def _run(loss: Loss, image: Tensor, text: Tensor) -> float:
    scale = torch.tensor(50.0, device=image.device, requires_grad=True)
    total = loss(image, text, scale)
    total.backward()
    return total.item()  # waits for the device


def _features(setting: Setting) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, setting.dtype)

    def side() -> Tensor:
        drawn = F.normalize(torch.randn(setting.rows, setting.width, generator=generator), dim=1)
        return drawn.to(setting.device, dtype).requires_grad_()

    return side(), side()


def _matmul_rate(setting: Setting) -> float:
    """Operations per second of a large product of the same width and type."""
    side = 16384 if setting.device.startswith("cuda") else 4096
    image, text = (features.detach() for features in _features(replace(setting, rows=side)))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        product = image @ text.T
        product[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * side**2 * setting.width / best


# --- implementations -----------------------------------------------------------------------------------------------


def _ours() -> Loss:
    from diptych.losses.contrastive import contrastive_loss

    return contrastive_loss


def _ours_sigmoid() -> Loss:
    from diptych.losses.contrastive import contrastive_loss

    return lambda image, text, scale: contrastive_loss(image, text, scale, logit_bias=-10.0, normaliser="sigmoid")


def _ours_with_plugs() -> Loss:
    """Decoupled, with equal captions as shared targets: through the engine below every plug."""
    from diptych.losses.contrastive import contrastive_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        known = {"caption_ids": torch.arange(len(image), device=image.device)}
        return contrastive_loss(image, text, scale, targets="same_caption", weights=["decoupled"], known=known)

    return loss


def _open_clip() -> Loss:
    from open_clip.loss import ClipLoss

    return ClipLoss()


def _open_clip_sigmoid() -> Loss:
    from open_clip.loss import SigLipLoss

    peer = SigLipLoss()
    return lambda image, text, scale: peer(image, text, scale, torch.tensor(-10.0, device=image.device))


def _chunked(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of some rows at a time, recomputed in backward: what one writes first."""

    def direction(anchors: Tensor, candidates: Tensor) -> Tensor:
        total = torch.zeros((), device=anchors.device)
        for start in range(0, len(anchors), _CHUNK):
            total = total + checkpoint(_of_rows, anchors, candidates, scale, start, use_reentrant=False)
        return total / len(anchors)

    return (direction(image, text) + direction(text, image)) / 2


def _of_rows(anchors: Tensor, candidates: Tensor, scale: Tensor, start: int) -> Tensor:
    logits = scale * anchors[start : start + _CHUNK] @ candidates.T
    rows = torch.arange(start, start + len(logits), device=logits.device)
    return F.cross_entropy(logits.float(), rows, reduction="sum")
