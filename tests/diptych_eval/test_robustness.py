"""Corruptions one by one, and zero-shot classification under them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.diptych_eval.fakes import ColourEncoder, benchmark, coloured

import diptych.testing as make
from diptych.config import from_tree
from diptych.errors import ConfigError, DataError
from diptych_eval import corruptions, items
from diptych_eval.corruptions import KINDS, SEVERITIES, SIDE, Corruption, Kind
from diptych_eval.embedder import Embedder
from diptych_eval.result import Result
from diptych_eval.suite import EvalConfig, evaluate
from diptych_eval.tasks.robustness import Robustness

RANDOM: tuple[Kind, ...] = ("gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "fog")


def grey(value: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (value, value, value))


def texture() -> Image.Image:
    """Smooth shapes and sharp edges in all three channels."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    channels = [np.sin(9 * x) * np.cos(7 * y), (x + y > 1) * 1.0 - 0.5, np.sin(31 * x * y)]
    return Image.fromarray((127.5 + 100 * np.stack(channels, -1)).clip(0, 255).astype(np.uint8))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_grows_with_its_degree_and_repeats_itself(kind: Kind) -> None:
    picture = texture()
    damage = []
    for severity in SEVERITIES:
        made = Corruption(kind, severity)(picture, "a key")
        assert (made.size, made.mode) == ((SIDE, SIDE), "RGB")
        assert np.array_equal(pixels(made), pixels(Corruption(kind, severity)(picture, "a key")))
        damage.append(float(np.abs(pixels(made) - pixels(picture)).mean()))
    assert damage[0] > 0.3
    # motion's direction and the fog's shape are drawn anew for each degree
    assert damage[4] > damage[0]
    assert damage == sorted(damage) or kind in ("motion_blur", "fog", "zoom_blur")
    assert len({Corruption(kind, severity).name for severity in SEVERITIES}) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_random_depends_on_the_key_alone(kind: Kind) -> None:
    made = [pixels(Corruption(kind, 3)(texture(), f"key {number}")) for number in range(8)]
    different = len({one.tobytes() for one in made})
    expected = 8 if kind in RANDOM else 2 if kind == "rotation" else 1
    assert different == expected


@pytest.mark.parametrize("kind", KINDS)
def test_any_picture_will_do(kind: Kind) -> None:
    for picture in (
        Image.new("RGBA", (7, 300), (200, 0, 0, 0)),
        Image.new("RGB", (1, 1), (0, 0, 0)),
        Image.new("RGB", (500, 240), (255, 255, 255)),
    ):
        assert Corruption(kind, 5)(picture, "k").size == (SIDE, SIDE)


def test_transparency_is_white_as_without_corruption() -> None:
    clear = Image.new("RGBA", (SIDE, SIDE), (10, 20, 30, 0))
    assert pixels(Corruption("gaussian_blur", 1)(clear, "k")).min() == 255


@pytest.mark.parametrize(("severity", "deviation"), [(1, 0.08), (3, 0.18)])
def test_gaussian_noise_has_its_deviation(severity: int, deviation: float) -> None:
    noise = pixels(Corruption("gaussian_noise", severity)(grey(128), "k")) / 255 - 128 / 255
    # of 150,528 draws a deviation is known to 0.2%; clipping beyond 2.7 deviations costs up to 1%
    assert noise.std() == pytest.approx(deviation, rel=0.015)
    assert abs(noise.mean()) < 4 * deviation / np.sqrt(noise.size) + 1e-3
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02


def test_shot_noise_is_poissons() -> None:
    noise = pixels(Corruption("shot_noise", 1)(grey(102), "k")) / 255
    assert noise.mean() == pytest.approx(0.4, abs=2e-3)
    assert noise.var() == pytest.approx(0.4 / 60, rel=0.03)


def test_impulse_noise_hits_its_share() -> None:
    hit = pixels(Corruption("impulse_noise", 5)(grey(100), "k"))
    assert set(np.unique(hit)) == {0, 100, 255}
    assert (hit != 100).mean() == pytest.approx(0.27, abs=0.005)
    assert (hit == 255).sum() == pytest.approx((hit == 0).sum(), rel=0.05)


def test_a_convolution_is_its_sum() -> None:
    rng = np.random.default_rng(0)
    picture, kernel = rng.random((9, 8, 3)), rng.random((5, 3))
    found = corruptions._convolved(picture, kernel)
    padded = np.pad(picture, ((2, 2), (1, 1), (0, 0)), "reflect")
    for row in range(9):
        for column in range(8):
            window = padded[row : row + 5, column : column + 3]
            right = (window * kernel[::-1, ::-1, None]).sum((0, 1)) / kernel.sum()
            assert found[row, column] == pytest.approx(right)


@pytest.mark.parametrize("kind", ["gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "pixelate", "contrast"])
def test_a_plain_picture_stays_what_it_is(kind: Kind) -> None:
    assert np.array_equal(pixels(Corruption(kind, 5)(grey(77), "k")), pixels(grey(77)))


def point() -> Image.Image:
    picture = grey(0)
    picture.putpixel((112, 112), (255, 255, 255))
    return picture


@pytest.mark.parametrize(("severity", "radius"), [(1, 3), (5, 10)])
def test_defocus_spreads_a_point_over_a_disk(severity: int, radius: int) -> None:
    x = np.zeros((SIDE, SIDE, 3))
    x[112, 112] = 1
    spread = corruptions._defocus_blur(x, radius, np.random.default_rng(0))[..., 0]
    assert spread.sum() == pytest.approx(1)
    assert 1 / spread.max() == pytest.approx(np.pi * radius**2, rel=0.02)
    assert np.allclose(spread, spread.T)
    rows = np.flatnonzero(spread.max(1) > 1e-9)
    assert (rows.min(), rows.max()) == (112 - radius, 112 + radius)


def test_gaussian_blur_has_its_deviation() -> None:
    x = np.zeros((SIDE, SIDE, 3))
    x[112, 112] = 1
    spread = corruptions._gaussian_blur(x, 3, np.random.default_rng(0))[..., 0]
    places = np.arange(SIDE) - 112
    assert np.sqrt((spread.sum(0) * places**2).sum()) == pytest.approx(3, rel=0.01)


def test_motion_leaves_a_tail_of_its_length_on_one_side() -> None:
    x = np.zeros((SIDE, SIDE, 3))
    x[112, 112] = 1
    for seed in range(5):
        angle = np.deg2rad(np.random.default_rng(seed).uniform(-45, 45))
        spread = corruptions._motion_blur(x, (10, 3), np.random.default_rng(seed))[..., 0]
        assert spread.sum() == pytest.approx(1)
        assert np.nonzero(spread > 1e-12)[1].min() == 112
        down, across = (spread.sum(1) * (np.arange(SIDE) - 112)).sum(), (spread.sum(0) * (np.arange(SIDE) - 112)).sum()
        assert down / across == pytest.approx(np.tan(angle), abs=1e-6)
        steps = np.arange(21)
        weights = np.exp(-(steps**2) / 18)
        assert np.hypot(down, across) == pytest.approx((weights * steps).sum() / weights.sum(), abs=1e-6)


def test_light_by_hand() -> None:
    colour = Image.new("RGB", (SIDE, SIDE), (100, 50, 0))
    brighter = pixels(Corruption("brightness", 1)(colour, "k"))[0, 0]
    assert brighter.tolist() == [round(125.5), round(62.75), 0]  # value 100 → 125.5, hue and saturation kept
    assert pixels(Corruption("brightness", 5)(grey(0), "k"))[0, 0].tolist() == [round(127.5)] * 3
    halves = grey(0)
    halves.paste((200, 100, 0), (0, 0, SIDE // 2, SIDE))
    lower = pixels(Corruption("contrast", 1)(halves, "k"))
    assert lower[0, 0].tolist() == [140, 70, 0]
    assert lower[0, -1].tolist() == [60, 30, 0]


def test_pixelate_leaves_blocks() -> None:
    made = pixels(Corruption("pixelate", 5)(texture(), "k"))  # a quarter: blocks of 4
    assert np.array_equal(made, np.kron(made[::4, ::4], np.ones((4, 4, 1))))
    right = pixels(texture()).reshape(56, 4, 56, 4, 3).mean((1, 3))
    assert np.abs(made[::4, ::4] - right).max() <= 1  # rounding


def test_rotation_turns_by_its_degrees() -> None:
    picture = grey(255)
    picture.paste((0, 0, 0), (172, 107, 182, 117))
    made = 255 - pixels(Corruption("rotation", 5)(picture, "k"))[..., 0]
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    angle = np.rad2deg(np.arctan2((made * y).sum(), (made * x).sum()))
    assert abs(angle) == pytest.approx(45, abs=1)


def test_clouds_are_fractal_in_both_directions() -> None:
    roughness = {}
    for decay in (1.4, 2.0):
        clouds = [corruptions._plasma(decay, np.random.default_rng(seed)) for seed in range(20)]
        assert all((one.shape, one.min(), one.max()) == ((256, 256), 0, 1) for one in clouds)
        down, across = (np.mean([np.abs(np.diff(one, axis=axis)).mean() for one in clouds]) for axis in (0, 1))
        assert down == pytest.approx(across, rel=0.15)  # of twenty, each direction's mean is known to some 5%
        roughness[decay] = down / np.mean([one.std() for one in clouds])
    assert roughness[2.0] < roughness[1.4] < 0.5  # neighbours are alike


def test_fog_lies_within_the_brightness_there_was() -> None:
    made = pixels(Corruption("fog", 5)(texture(), "k"))
    assert made.max() <= pixels(texture()).max() + 1
    assert made.std() < pixels(texture()).std()


# --- the task ----------------------------------------------------------------------------------------------------


def run(root: Path, out: Path | None = None, **options: Any) -> tuple[ColourEncoder, list[Result]]:
    tasks = [
        {"type": "zeroshot", "dataset": "colours", "root": str(root)},
        {"type": "robustness", "dataset": "colours", "root": str(root), **options},
    ]
    encoder = ColourEncoder()
    return encoder, evaluate(encoder, from_tree(EvalConfig, {"tasks": tasks}), out=out)


def test_figures_are_means_of_what_was_seen(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "data")
    encoder, (zeroshot, found) = run(
        root, tmp_path / "out", corruptions=["contrast", "gaussian_noise"], severities=[1, 5]
    )
    assert encoder.num_images == 12 * (1 + 2 * 2)
    assert found.metrics["clean"] == zeroshot.metrics["top1"] == 1.0
    single = found.protocol["top1_by_degree"]
    assert single.keys() == {"contrast/1", "contrast/5", "gaussian_noise/1", "gaussian_noise/5"}
    for kind in ("contrast", "gaussian_noise"):
        assert found.metrics[f"corrupted/{kind}"] == pytest.approx((single[f"{kind}/1"] + single[f"{kind}/5"]) / 2)
    both = (found.metrics["corrupted/contrast"] + found.metrics["corrupted/gaussian_noise"]) / 2
    assert found.metrics["corrupted"] == pytest.approx(both)
    assert found.metrics["relative"] == pytest.approx(both)
    assert found.metrics["corrupted/contrast"] == 1.0  # a plain picture has no contrast to lose
    assert single["gaussian_noise/5"] < 1.0
    (table,) = items.read(tmp_path / "out" / "items", found)
    assert {name: float(values.mean()) for name, values in table.columns.items()} == pytest.approx(
        {name: value for name, value in found.metrics.items() if name != "relative"}
    )
    assert found.intervals.keys() == table.columns.keys()


def test_changed_pictures_are_not_kept_in_memory(tmp_path: Path) -> None:
    embedder = Embedder(ColourEncoder())
    task = Robustness("colours", str(benchmark(tmp_path)), corruptions=("jpeg",), severities=(1, 2))
    task.run(embedder)
    assert len(embedder._sets) == 1


def test_nothing_is_relative_to_nothing(tmp_path: Path) -> None:
    root = benchmark(tmp_path, 3)
    samples = [coloured(f"k{n}", (128, 128, 128), cls=b"0") for n in range(3)]
    make.write_shard(root / "test" / "0.tar", samples)
    (root / "classnames.txt").write_text("k0\nk0\nk0\n")
    _, (_, found) = run(root, corruptions=["contrast"], severities=[1])
    assert found.metrics["clean"] == 0.0  # all class names are the same
    assert "relative" not in found.metrics


def test_several_labels_and_none_are_refused(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "a", labels=False)
    task = Robustness("d", str(root))
    with pytest.raises(DataError, match="no label of sample 'k0'"):
        task.run(Embedder(ColourEncoder()))
    several = benchmark(tmp_path / "b")
    marks = (tmp_path / "marks.npy").open("wb")
    np.save(marks, np.array([1, 1, 0]))
    marks.close()
    make.write_shard(several / "test" / "0.tar", [coloured("x", (1, 2, 3), npy=(tmp_path / "marks.npy").read_bytes())])
    with pytest.raises(DataError, match=r"sample 'x' has 2 labels · .* · one each is needed"):
        Robustness("d", str(several)).run(Embedder(ColourEncoder()))


def test_files_are_zeroshots(tmp_path: Path) -> None:
    root = benchmark(tmp_path)
    names = {Path(name).name for name in Robustness("d", str(root)).files()}
    assert names == {"0.tar", "classnames.txt", "zeroshot_classification_templates.txt"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"corruptions": ["snow"]}, "snow"),
        ({"corruptions": []}, "at least one"),
        ({"corruptions": ["jpeg", "jpeg"]}, "different kinds"),
        ({"severities": []}, "severities"),
        ({"severities": [0]}, "severities"),
        ({"severities": [2, 2]}, "severities"),
    ],
)
def test_settings_that_mean_nothing(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_tree(EvalConfig, {"tasks": [{"type": "robustness", "dataset": "d", "root": "r", **wrong}]})
