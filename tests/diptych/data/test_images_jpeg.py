"""The fast decoder against Pillow, and what it must refuse."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from diptych.data import jpeg
from diptych.data.faults import UnusableSample
from diptych.data.images import ImageConfig, decode, training_view
from diptych.seeding import generator

ORIENTATION = 0x0112


def photo(width: int, height: int) -> Image.Image:
    """Smooth noise with an edge; no two sides alike."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    picture.paste((250, 20, 20), (0, 0, width // 3, height // 4))
    return picture


def jpeg_bytes(picture: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB")).astype(int)


def reason(data: bytes) -> str:
    """Why a picture is refused, alike in both uses."""
    reasons = set()
    for use in (decode, lambda data: training_view(data, 32, ImageConfig(), generator(0))):
        with pytest.raises(UnusableSample) as caught:
            use(data)
        reasons.add(caught.value.reason)
    assert len(reasons) == 1
    return reasons.pop()


WHOLE = jpeg_bytes(photo(150, 101))
PROGRESSIVE = jpeg_bytes(photo(150, 101), progressive=True)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_whole_picture_is_pillows(mode: str, progressive: bool, subsampling: str) -> None:
    data = jpeg_bytes(photo(151, 99).convert(mode), progressive=progressive, subsampling=subsampling)
    # The same bits with the same libjpeg-turbo; another version may round another way.
    assert np.abs(np.asarray(decode(data)).astype(int) - by_pillow(data)).max() <= 1
    assert jpeg.read_header(data) == jpeg.Header(151, 99, 1)


@pytest.mark.parametrize("options", [{"keep_rgb": True}, {"restart_marker_blocks": 3}, {"comment": b"\xff\xda" * 99}])
def test_rarer_forms_are_pillows(options: dict[str, object]) -> None:
    data = jpeg_bytes(photo(151, 99), **options)
    assert np.abs(np.asarray(decode(data)).astype(int) - by_pillow(data)).max() <= 1


def test_scales_are_halvings_that_still_cover() -> None:
    assert [jpeg.shrink_for(1024, side, at_least=224) for side in (100, 447, 448, 895, 896, 5000)] == [1, 1, 2, 2, 4, 4]
    header = jpeg.read_header(WHOLE)
    assert header is not None
    for shrink, shape in ((1, (101, 150, 3)), (2, (51, 75, 3)), (4, (26, 38, 3)), (8, (13, 19, 3))):
        pixels = jpeg.pixels(WHOLE, header, shrink=shrink)
        assert pixels is not None
        assert pixels.shape == shape
    assert decode(WHOLE, at_least=50).size == (75, 51)


@pytest.mark.parametrize("profile", [None, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_a_colour_profile_changes_nothing(profile: bytes | None) -> None:
    assert np.array_equal(
        np.asarray(decode(jpeg_bytes(photo(64, 48), icc_profile=profile))), by_pillow(jpeg_bytes(photo(64, 48)))
    )


def test_four_inks_are_left_to_pillow() -> None:
    cmyk = jpeg_bytes(photo(64, 48).convert("CMYK"))  # as Adobe writes it: inverted
    assert jpeg.read_header(cmyk) is None
    assert np.array_equal(np.asarray(decode(cmyk)), by_pillow(cmyk))
    assert np.abs(np.asarray(decode(cmyk)).astype(int) - np.asarray(photo(64, 48))).mean() < 8  # JPEG's own loss
    ycck = bytearray(cmyk)
    place = cmyk.index(b"Adobe")
    ycck[place + 11] = 2
    assert np.array_equal(np.asarray(decode(bytes(ycck))), by_pillow(bytes(ycck)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_rotation_is_pillows(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = jpeg_bytes(photo(150, 101), exif=exif)
    assert np.abs(np.asarray(decode(data)).astype(int) - by_pillow(data)).max() <= 1
    upright = io.BytesIO()
    Image.fromarray(by_pillow(data).astype(np.uint8)).save(upright, "PNG")
    turned, straight = (training_view(d, 64, ImageConfig(0.5), generator(3)) for d in (data, upright.getvalue()))
    # Boxes fall on whole pixels counted from either end: half a pixel apart at most, in smooth noise with one edge.
    assert np.abs(turned.astype(int) - straight).mean() < 2


def test_a_rotation_that_only_xmp_tells_is_pillows() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    data = jpeg_bytes(photo(150, 101), xmp=xmp)
    assert decode(data).size == (101, 150)


@pytest.mark.parametrize(
    "note", [b"", b"MM", b"MM\x00\x2a\x00\x00\xff\xff", b"II*\x00\x08\x00\x00\x00\xff\xff", b"\xff" * 99]
)
def test_a_broken_note_beside_a_picture_costs_nothing(note: bytes) -> None:
    segment = b"\xff\xe1" + struct.pack(">H", len(note) + 8) + b"Exif\x00\x00" + note
    data = WHOLE[:2] + segment + WHOLE[2:]
    assert np.array_equal(np.asarray(decode(data)), np.asarray(decode(WHOLE)))


@pytest.mark.parametrize("data", [WHOLE, PROGRESSIVE], ids=["sequential", "progressive"])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_what_is_cut_off_is_refused_even_with_an_end_put_on(data: bytes, kept: float) -> None:
    part = data[: int(len(data) * kept)]
    assert reason(part) == "undecodable"
    if len(part) > data.index(b"\xff\xda"):
        assert reason(part + b"\xff\xd9") == "undecodable"


@pytest.mark.parametrize("data", [WHOLE + b"junk" * 9, WHOLE[:-2] + b"\x00junk" + WHOLE[-2:]], ids=["after", "before"])
def test_stray_bytes_at_the_end_do_no_harm(data: bytes) -> None:
    assert np.array_equal(np.asarray(decode(data)), np.asarray(decode(WHOLE)))
    view, expected = (training_view(d, 64, ImageConfig(), generator(0)).astype(int) for d in (data, WHOLE))
    assert np.abs(view - expected).max() <= 1  # one of them was left to Pillow


def test_size_is_judged_by_the_header() -> None:
    place = WHOLE.index(b"\xff\xc0") + 5
    assert reason(WHOLE[:place] + struct.pack(">HH", 10_000, 10_000) + WHOLE[place + 4 :]) == "too_large"


def test_scans_without_end_are_refused() -> None:
    first = PROGRESSIVE.index(b"\xff\xda")
    second = PROGRESSIVE.index(b"\xff\xc4", first)  # the next scan's table follows the first scan
    assert decode(PROGRESSIVE).size == (150, 101)
    assert reason(PROGRESSIVE[:second] + PROGRESSIVE[first:second] * 99 + PROGRESSIVE[second:]) == "undecodable"


def test_segments_without_end_come_to_an_end() -> None:
    data = WHOLE[:2] + b"\xff\xe5\x00\x02" * 5000 + WHOLE[2:]
    assert np.array_equal(np.asarray(decode(data)), np.asarray(decode(WHOLE)))
    assert reason(WHOLE[:2] + b"\xff\xe5\x00\x00" * 5000) == "undecodable"
