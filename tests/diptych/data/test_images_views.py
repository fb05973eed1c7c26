"""Training views: the box, and the fast way against the slow one."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.data import crop
from diptych.data.augment import AugmentConfig, augment_all, draw
from diptych.data.images import ImageConfig, decode, training_view
from diptych.seeding import generator

uniform = st.floats(0, 1, exclude_max=True)
sides = st.integers(1, 3000)


def encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {"compress_level": 1}))
    return buffer.getvalue()


def photo(width: int, height: int) -> Image.Image:
    """Noise at several scales with edges, about as much in each octave: what photographs are like."""
    rng = np.random.default_rng(1)
    total = np.full((height, width, 3), 128.0)
    for cells in (3, 6, 12, 24, 48):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += 0.3 * (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float) - 128)
    total[: height // 3, : width // 5] += 60
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


@given(sides, sides, st.floats(0.01, 1), st.floats(1, 4), st.lists(uniform, min_size=4, max_size=4))
def test_a_box_keeps_its_promises(
    width: int, height: int, min_crop: float, max_aspect: float, draws: list[float]
) -> None:
    left, top, right, bottom = crop.random_box((width, height), min_crop, max_aspect, draws)
    tiny = 1e-6 * max(width, height)
    assert left >= 0
    assert top >= 0
    assert right <= width + tiny
    assert bottom <= height + tiny
    aspect = (right - left) / (bottom - top)
    assert 1 / max_aspect - 1e-6 <= aspect <= max_aspect + 1e-6
    largest = min(width, height * max_aspect) * min(height, width * max_aspect)
    assert (right - left) * (bottom - top) >= min_crop * largest * (1 - 1e-6)


def test_boxes_reach_every_corner_and_both_aspects() -> None:
    rng = generator(0)
    boxes = np.array([crop.random_box((400, 300), 0.25, 1.333, rng.random(4).tolist()) for _ in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    for place, free in ((boxes[:, 0], 400 - width), (boxes[:, 1], 300 - height)):
        share = (place / free)[free > 20]
        assert share.min() < 0.02
        assert share.max() > 0.98
    aspect = np.log(width / height) / math.log(1.333)
    assert aspect.min() < -0.9
    assert aspect.max() > 0.9
    # Uniform from a quarter to all; the largest of these boxes have less choice of aspect, so no tighter.
    assert abs((width * height / 120_000).mean() - 0.625) < 0.05


@given(st.integers(1, 8), st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
def test_cutting_the_stored_picture_is_cutting_the_upright_one(
    orientation: int, left: int, top: int, width: int, height: int
) -> None:
    stored = np.arange(7 * 9 * 3).reshape(7, 9, 3)
    upright = crop.upright(stored, orientation)
    size = crop.upright_size(9, 7, orientation)
    assert size == (upright.shape[1], upright.shape[0])
    box = (left, top, left + width, top + height)
    x, y, right, bottom = crop.on_pixels(crop.as_stored(box, size, orientation), (9, 7))
    expected = upright[top : top + height, left : left + width]
    assert np.array_equal(crop.upright(stored[y:bottom, x:right], orientation), expected)


@given(sides, sides, st.floats(0.01, 1), st.sampled_from(["JPEG", "PNG", "RGBA"]), st.sampled_from([1, 17, 224]))
@settings(max_examples=25, deadline=None)  # a picture of nine megapixels takes its time to be made
def test_every_size_gives_a_view(width: int, height: int, min_crop: float, kind: str, size: int) -> None:
    picture = Image.new(
        "RGBA" if kind == "RGBA" else "RGB", (width, height), (200, 10, 60, 128)[: 3 + (kind == "RGBA")]
    )
    data = encoded(picture, "PNG" if kind == "RGBA" else kind)
    view = training_view(data, size, ImageConfig(min_crop), generator(width, height))
    assert view.shape == (4 if kind == "RGBA" else 3, size, size)
    assert view.dtype == np.uint8
    assert np.abs(view[:3].astype(int) - np.array([200, 10, 60])[:, None, None]).max() <= 3  # JPEG's rounding


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20_000, 1), (1, 20_000), (65_000, 2)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_needles_and_points_are_pictures(width: int, height: int, kind: str) -> None:
    view = training_view(
        encoded(Image.new("RGB", (width, height), (9, 99, 199)), kind), 32, ImageConfig(), generator(0)
    )
    assert np.abs(view.astype(int) - np.array([9, 99, 199])[:, None, None]).max() <= 3


@pytest.mark.parametrize(("width", "height"), [(120, 90), (500, 375), (1024, 768), (2100, 1400), (301, 2000)])
@pytest.mark.parametrize("min_crop", [0.9, 0.2, 1.0])
def test_the_fast_way_is_the_slow_way(width: int, height: int, min_crop: float) -> None:
    """The whole picture by Pillow, the same box on whole pixels, Pillow's bicubic: mean error below 1.5 grey levels."""
    data = encoded(photo(width, height), "JPEG")
    config = ImageConfig(min_crop)
    fast = training_view(data, 224, config, generator(5))
    box = crop.whole((width, height))
    if min_crop < 1:
        box = crop.random_box((width, height), min_crop, config.max_aspect, generator(5).random(4).tolist())
    cut = crop.on_pixels(box, (width, height))
    with Image.open(io.BytesIO(data)) as picture:
        slow = np.asarray(picture.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC, box=cut))
    # Whole pixels of a reduced picture move the box by up to half of one, and its transform filters a little otherwise.
    assert np.abs(fast.astype(int) - slow.transpose(2, 0, 1)).mean() < 1.5


@pytest.mark.parametrize("min_crop", [0.9, 1.0])
def test_bytes_of_another_format_give_the_same_view(min_crop: float) -> None:
    """The box comes from the random numbers alone, not from how the picture is decoded."""
    data = encoded(photo(1024, 768), "JPEG")
    views = [training_view(d, 96, ImageConfig(min_crop), generator(2)) for d in (data, encoded(decode(data), "PNG"))]
    assert np.abs(views[0].astype(int) - views[1]).mean() < 1.5


def test_a_view_is_a_function_of_bytes_and_numbers() -> None:
    data = encoded(photo(300, 200), "JPEG")
    first, again, other = (training_view(data, 64, ImageConfig(0.3), generator(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_what_is_transparent_does_not_shine_through() -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :, 0] = 255  # red, and invisible
    pixels[16:48, 16:48] = (0, 0, 255, 255)
    view = training_view(encoded(Image.fromarray(pixels), "PNG"), 24, ImageConfig(1.0), generator(0))
    assert view.shape == (4, 24, 24)
    batch = augment_all([view], draw(generator(0))[None], AugmentConfig())[0].int()
    # Only white and blue, and what lies between: red never exceeds green, whatever the edges.
    assert (batch[0] - batch[1]).abs().max() <= 1
    assert batch[:, 12, 12].tolist() == [0, 0, 255]


def test_an_alpha_channel_that_hides_nothing_is_left_out() -> None:
    plain = photo(80, 60)
    opaque, rgb = (
        training_view(encoded(p, "PNG"), 32, ImageConfig(), generator(0)) for p in (plain.convert("RGBA"), plain)
    )
    assert np.array_equal(opaque, rgb)


@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig(flip=0.5, hue=0.3, rotate=20, blur=0.5, erase=0.5)])
def test_views_do_not_depend_on_their_neighbours(config: AugmentConfig) -> None:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (3 + i % 2, 32, 32), dtype=np.uint8) for i in range(5)]
    draws = np.stack([draw(generator(0, i)) for i in range(5)])
    together = augment_all(pixels, draws, config)
    for i, alone in enumerate(pixels):
        assert torch.equal(augment_all([alone], draws[i : i + 1], config)[0], together[i])
