"""Operations of a model, and the most that a device does of them in a second."""

import re
import time

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diptych.models.dual_encoder import DualEncoder

# Dense bf16 with float32 sums, as NVIDIA's data sheets give it; the first name that occurs counts.
_DATA_SHEETS = {
    r"B200": 2250e12,
    r"H200": 989e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H100": 989e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"L4": 121e12,
    r"A10": 125e12,
    r"RTX 4090": 165e12,
}
_REPEATS = 20


def per_sample(model: DualEncoder, images: UInt8[Tensor, "B 3 height width"], tokens: Int[Tensor, "B L"]) -> float:
    """Operations of one pair, forward and backward, a multiplication and an addition being two.

    Of both towers as they are executed (patches that are dropped, positions that are cut and gradients that nobody
    needs are not counted), without the loss, and without what checkpointed activations compute again.
    """
    # The other ways to attend are one operation each, which the counter does not know everywhere.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        found = model(images, tokens)
        (found.image_features.sum() + found.text_features.sum()).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(images)


def published_peak(device_name: str) -> float | None:
    """Operations per second in bf16 by the data sheet; None for a device that is not in the table."""
    found = (rate for pattern, rate in _DATA_SHEETS.items() if re.search(rf"\b{pattern}\b", device_name))
    return next(found, None)


def measured_peak(device: str, dtype: torch.dtype) -> float:
    """Operations per second of the best of a few products of large square matrices."""
    side = 8192 if device == "cuda" else 2048
    left = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        (left @ left)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
