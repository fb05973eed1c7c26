"""A 64-bit hash that pictures share with their resized, recompressed, slightly edited copies; pairs of near ones."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations, pairwise
from math import comb
from typing import NamedTuple

import numpy as np
from PIL import Image

from diptych.data.images import decode, flatten
from diptych_data.pictures import header

_SIDE, _LOW = 32, 8
BITS = 64
_MAX_RADIUS = 16


class Print(NamedTuple):
    """What is remembered of a picture."""

    hash: int
    """64 bits."""
    colour: tuple[int, int, int]
    """Its mean, RGB."""
    pixels: int
    """Of the picture as it is, not as it was hashed."""


def fingerprint(data: bytes) -> Print:
    """The DCT hash of a picture: signs of its 64 lowest frequencies, measured from their median.

    The hash knows no colour and says little of plain surfaces; the mean colour tells those apart. Transparency counts
    as white, and the shape is squeezed to a square.

    Raises:
        UnusableSample: `undecodable` or `too_large`.
    """
    pixels = header(data).pixels
    picture = flatten(decode(data, at_least=2 * _SIDE))
    small = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)
    red, green, blue = small.mean((0, 1)).round().astype(int).tolist()
    grey = small @ (0.299, 0.587, 0.114)
    # Rounded, so that the noise of a plain surface has no signs.
    low = (_dct() @ grey @ _dct().T).round(3)
    bits = (low > np.median(low)).ravel()
    return Print(int(np.packbits(bits).view(">u8")[0]), (red, green, blue), pixels)


@lru_cache(maxsize=1)
def _dct() -> np.ndarray:
    """The first eight rows of the orthonormal DCT-II of length 32."""
    n, k = np.arange(_SIDE), np.arange(_LOW)[:, None]
    rows = np.sqrt(2 / _SIDE) * np.cos(np.pi * (n + 0.5) * k / _SIDE)
    rows[0] /= np.sqrt(2)
    return rows


class Pairs(NamedTuple):
    """Pairs of places, and the bits in which their hashes differ."""

    first: np.ndarray
    second: np.ndarray
    distance: np.ndarray


def near_pairs(hashes: np.ndarray, radius: int) -> Iterator[Pairs]:
    """All pairs of places whose 64-bit hashes differ in at most `radius` bits; a pair may come more than once.

    The 64 bits are cut into b blocks. Two hashes that differ in r bits agree on at least b - r blocks entirely, so it
    is enough to compare those that agree on some b - r of them: sorted by those blocks they stand side by side. Exact
    for any b > r; a larger b makes more orders to sort, and fewer strangers side by side in each.
    """
    if not 0 <= radius <= _MAX_RADIUS:
        raise ValueError(f"radius must lie in [0, {_MAX_RADIUS}], not {radius}")
    blocks = _num_blocks(len(hashes), radius)
    edges = [BITS * i // blocks for i in range(blocks + 1)]
    masks = [sum(1 << bit for bit in range(low, high)) for low, high in pairwise(edges)]
    for kept in combinations(masks, blocks - radius):
        yield from _side_by_side(hashes, np.uint64(sum(kept)), radius)


def _num_blocks(count: int, radius: int) -> int:
    """The cheapest number of blocks: sorting against comparing strangers, were the bits random."""

    def cost(blocks: int) -> float:
        strangers = count * count / 2 ** (1 + BITS * (blocks - radius) / blocks)
        return comb(blocks, radius) * (count * np.log2(count + 2) + strangers)

    return min(range(radius + 1, radius + 5), key=cost)


def _side_by_side(hashes: np.ndarray, mask: np.uint64, radius: int) -> Iterator[Pairs]:
    """Pairs within the radius among those whose masked bits are equal."""
    masked = hashes & mask
    order = np.argsort(masked, kind="stable")
    masked, ordered = masked[order], hashes[order]
    places = np.arange(len(hashes))
    for step in range(1, len(hashes)):
        places = places[places + step < len(hashes)]
        places = places[masked[places] == masked[places + step]]
        if not len(places):
            return
        distance = num_bits(ordered[places] ^ ordered[places + step])
        near = distance <= radius
        if near.any():
            one, other = order[places[near]], order[places[near] + step]
            yield Pairs(np.minimum(one, other), np.maximum(one, other), distance[near])


def num_bits(words: np.ndarray) -> np.ndarray:
    """The number of ones in each 64-bit word, counted in pairs, fours and bytes at a time."""
    pairs = words - ((words >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + ((pairs >> np.uint64(2)) & np.uint64(0x3333333333333333))
    eights = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (eights * np.uint64(0x0101010101010101)) >> np.uint64(56)
