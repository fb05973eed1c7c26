import contextlib
import io
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.config import from_tree
from diptych.data.augment import DRAWS, AugmentConfig, augment, augment_all, draw
from diptych.data.faults import UnusableSample
from diptych.data.images import EvaluationView, ImageConfig, decode, evaluation_view, picture_extension, training_view
from diptych.seeding import generator


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, (x + y) / 2], -1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (50, 37), (37, 50), (200, 64), (31, 200), (32, 32), (32, 90)])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_evaluation_view_is_open_clips(width: int, height: int, mode: str, interpolation: Any) -> None:
    transform = open_clip.image_transform(
        32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, interpolation=interpolation
    )
    theirs = (transform(photo(width, height)) * 255).round().to(torch.uint8)
    ours = EvaluationView(32, squash=mode == "squash", interpolation=interpolation)(photo(width, height))
    assert ours.equal(theirs)


def test_a_thread_is_open_clips_to_one_grey_level() -> None:
    theirs = open_clip.image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(photo(31, 300))
    assert (evaluation_view(photo(31, 300), 32).float() - theirs * 255).abs().max() <= 1


def test_a_view_may_be_cut_from_a_larger_one() -> None:
    view = EvaluationView(24, before_crop=32)(photo(50, 37))
    assert view.equal(evaluation_view(photo(50, 37), 32)[:, 4:28, 4:28])


MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "P", "1", "LA", "RGBA"),
    "WEBP": ("RGB", "L", "P", "RGBA"),
    "TIFF": ("RGB", "L", "P", "1", "CMYK", "LA", "RGBA"),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_evaluation_from_bytes_is_open_clips_for_every_mode(kind: str, mode: str) -> None:
    picture = photo(90, 61, mode)  # opaque: open_clip drops alpha where we lay it on white
    data = encoded(picture, kind)
    rgb = Image.open(io.BytesIO(data)).convert("RGB")  # as webdataset and torchvision hand pictures over
    theirs = open_clip.image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(rgb)
    assert (evaluation_view(decode(data), 32).float() - theirs * 255).abs().max() <= 1  # libjpeg's versions differ


def test_transparency_lies_on_white_in_evaluation() -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.putpixel((3, 3), (0, 0, 255, 255))
    view = evaluation_view(decode(encoded(picture, "PNG")), 8)
    assert view[:, 0, 0].tolist() == [255, 255, 255]
    assert view[:, 3, 3].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_odd_modes_come_out_as_rgb_or_rgba(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode(encoded(photo(12, 9, mode), kind)).mode in ("RGB", "RGBA")


def test_sixteen_bits_are_scaled_not_cut() -> None:
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    pixels = np.asarray(decode(encoded(ramp, "PNG")))
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert abs(float(pixels.mean()) - 127.5) < 2


def test_sixteen_bits_of_tiff_are_scaled_too() -> None:
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    assert np.array_equal(np.asarray(decode(encoded(ramp, "TIFF"))), np.asarray(decode(encoded(ramp, "PNG"))))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_in_other_formats(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(photo(20, 10), kind, exif=exif)).size == (10, 20)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_a_moving_picture_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    red, _, blue = np.asarray(decode(data))[4, 4].tolist()
    assert red > 250  # WebP loses a little
    assert blue < 5


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "GIF", "PNG", "WEBP"])
def test_formats_that_lose_nothing_come_back_as_they_were(kind: str) -> None:
    picture = photo(23, 17, "L" if kind == "GIF" else "RGB")
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(np.asarray(decode(encoded(picture, kind, **options))), np.asarray(picture.convert("RGB")))


def test_the_palette_may_be_transparent() -> None:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((0, 0), 0)
    decoded = decode(encoded(picture, "PNG", transparency=0))
    assert decoded.getpixel((0, 0))[3] == 0
    assert decoded.getpixel((4, 4)) == (0, 0, 255, 255)


def test_the_picture_is_found_by_its_extension() -> None:
    assert picture_extension({"txt": b"", "png": b"", "jpg": b""}) == "jpg"
    assert picture_extension({"txt": b""}) is None


@pytest.mark.parametrize("data", [b"", b"<html></html>", encoded(photo(9, 9), "PNG")[:50]])
def test_what_is_no_picture_is_undecodable(data: bytes) -> None:
    with pytest.raises(UnusableSample) as caught:
        decode(data)
    assert caught.value.reason == "undecodable"


@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF"]), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)))
)
@settings(max_examples=150)
def test_damaged_bytes_give_a_picture_or_a_reason(kind: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(photo(40, 30), kind))
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    for use in (decode, lambda data: training_view(data, 16, ImageConfig(), generator(0))):
        with contextlib.suppress(UnusableSample):
            use(bytes(data))


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA"])
def test_only_formats_of_the_list_are_opened(kind: str) -> None:
    """Pillow would hand EPS to Ghostscript; the other two it reads itself, so that they show that nobody asks it."""
    with pytest.raises(UnusableSample) as caught:
        decode(encoded(photo(9, 9), kind))
    assert caught.value.reason == "undecodable"


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = encoded(Image.new("1", (20000, 20000)), "PNG")
    with pytest.raises(UnusableSample) as caught:
        decode(bomb)
    assert caught.value.reason == "too_large"


def views(config: AugmentConfig, count: int = 6) -> torch.Tensor:
    pixels = training_view(encoded(photo(24, 24), "PNG"), 24, ImageConfig(1.0), generator(0))
    draws = np.stack([draw(generator(1, i)) for i in range(count)])
    return augment_all([pixels] * count, draws, config)


def test_nothing_turned_on_changes_nothing() -> None:
    expected = torch.from_numpy(np.asarray(photo(24, 24)).transpose(2, 0, 1).copy())
    assert all(view.equal(expected) for view in views(AugmentConfig()))


STRONG = {
    "flip": 1.0,
    "rotate": 30.0,
    "enlarge": 0.3,
    "shrink": 0.3,
    "stretch": 0.3,
    "shear": 0.2,
    "shift": 0.2,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.9,
    "hue": 0.4,
    "grey": 1.0,
    "invert": 1.0,
    "outline": 1.0,
    "blur": 1.0,
    "erase": 1.0,
}


def test_nothing_turned_on_copies_and_computes_nothing() -> None:
    """What costs nothing has no floats: the very bytes, laid side by side as they lie in memory."""
    pixels = [training_view(encoded(photo(24, 20 + i), "PNG"), 24, ImageConfig(), generator(i)) for i in range(3)]
    batch = augment_all(pixels, np.zeros((3, DRAWS), np.float32), AugmentConfig())
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert all(np.array_equal(row, picture) for row, picture in zip(batch.numpy(), pixels, strict=True))


def test_transparent_views_lie_on_white_whether_or_not_anything_is_turned_on() -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (4, 24, 24), dtype=np.uint8)
    draws = np.zeros((2, DRAWS), np.float32)
    opaque = np.full((3, 24, 24), 7, np.uint8)
    plain = augment_all([rgba, opaque], draws, AugmentConfig()).int()
    active = augment_all([rgba, opaque], draws, AugmentConfig(blur=1e-9)).int()  # active, and never so for these draws
    assert (plain - active).abs().max() <= 1  # rounded once from integers, once from floats
    assert plain[1].eq(7).all()


@pytest.mark.parametrize("name", STRONG)
def test_each_augmentation_changes_the_view_and_keeps_its_form(name: str) -> None:
    changed = views(from_tree(AugmentConfig, {name: STRONG[name]}))
    assert changed.shape == (6, 3, 24, 24)
    assert changed.dtype == torch.uint8
    assert not changed.equal(views(AugmentConfig()))


def test_a_view_does_not_depend_on_its_neighbours() -> None:
    config = from_tree(AugmentConfig, STRONG | {"background": 1.0})
    assert views(config, 6)[:2].equal(views(config, 2))


def test_a_mirror_is_exact() -> None:
    flipped = views(AugmentConfig(flip=1.0))
    assert (flipped.flip(-1).int() - views(AugmentConfig()).int()).abs().max() <= 1


def test_grey_has_no_colour_and_negative_is_its_own_inverse() -> None:
    grey = views(AugmentConfig(grey=1.0)).int()
    assert (grey[:, 0] - grey[:, 1]).abs().max() <= 1
    negative = views(AugmentConfig(invert=1.0)).int()
    assert (negative + views(AugmentConfig()).int() - 255).abs().max() <= 1


@given(st.integers(0, 1000))
def test_hue_keeps_grey_grey(seed: int) -> None:
    grey = torch.full((1, 4, 4, 4), 128, dtype=torch.uint8)
    grey[:, 3] = 255
    draws = torch.from_numpy(draw(generator(seed)))[None]
    assert (augment(grey, draws, AugmentConfig(hue=0.5)).int() - 128).abs().max() <= 1
    assert draws.shape == (1, DRAWS)


def test_an_outline_inks_edges_and_leaves_plain_areas() -> None:
    pixels = np.full((1, 4, 24, 24), 255, dtype=np.uint8)
    pixels[:, :3, :, 12:] = 100
    view = augment(torch.from_numpy(pixels), torch.full((1, DRAWS), 0.5), AugmentConfig(outline=1.0))[0]
    assert view[:, :, 11:13].max() < 90
    assert view[:, :, :11].eq(255).all()
    assert view[:, :, 13:].eq(100).all()


def test_a_thread_of_a_picture_is_no_gigabyte() -> None:
    """Its whole, brought to the size, would be 200,000 x 32 times as many pixels."""
    view = evaluation_view(Image.new("RGB", (200_000, 1), (1, 2, 3)), 32)
    assert view.shape == (3, 32, 32)
    assert view[:, 5, 5].tolist() == [1, 2, 3]
