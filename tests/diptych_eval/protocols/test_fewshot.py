"""A comparison on few pictures: right numbers, nothing twice, nothing learned from what is measured."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import diptych.testing as make
from diptych.cli import main
from diptych.config import from_tree
from diptych.data.stages import Stage
from diptych.encoder import ModelEncoder, load
from diptych.errors import ConfigError, DataError
from diptych.export.to_open_clip import export
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.testing import TINY_MODEL, tiny_sample
from diptych_eval.embedder import Embedder
from diptych_eval.labelled import Labelled
from diptych_eval.protocols import between, fewshot
from diptych_eval.protocols.baselines import Cache, harmonic_mean, mean_and_interval, top1
from diptych_eval.protocols.page import tables, write_page
from diptych_eval.protocols.plan import BASELINES, Cell, FewShotPlan
from diptych_eval.protocols.shots import draw, hold_out
from diptych_eval.tasks.zeroshot import ZeroShot

NAMES = ["red fox", "wild cat", "guinea pig", "blue whale"]
COOP = {
    "name": "CoOp",
    "recipe": {
        "model": {"adapters": [{"type": "context", "length": 2}]},
        "objective": {"contrastive": {"weight": 0.0}, "regularisers": [{"type": "classification"}]},
    },
}
FULL = {"name": "FLYP", "recipe": {"objective": {"contrastive": {"targets": "same_caption"}}}, "tuned_share": 0.5}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, count in (("train", 4), ("test", 5)):
        samples = [tiny_sample(f"{part}-{i}-{label}", label=label) for i in range(count) for label in range(4)]
        make.write_shard(tmp_path / "root" / part / "0.tar", samples)
    (tmp_path / "root" / "classnames.txt").write_text("\n".join(NAMES))
    (tmp_path / "root" / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    export(dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=0), tmp_path / "base")
    return tmp_path / "root"


def plan(root: Path, **keys: Any) -> FewShotPlan:
    towers = {"type": "open_clip", "name": str(root.parent / "base")}
    recipe = {"model": {"towers": towers}, "precision": "fp32", "data": {"captions": {"views": [{}]}}}
    tree = {"root": str(root), "out": str(root.parent / "out"), "recipe": recipe, "methods": [COOP], "epochs": 2}
    return from_tree(FewShotPlan, tree | {"shots": [1, 2], "seeds": [0, 1]} | keys)


def test_all_cells_are_measured_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fewshot.run(plan(root, methods=[COOP, FULL]))
    methods = {"zero-shot": 1} | dict.fromkeys((*BASELINES[1:], "CoOp", "FLYP"), 4)
    counts = {name: sum(one.cell.method == name for one in first) for name in methods}
    assert counts == methods
    assert all(0 <= one.figures["top1"] <= 1 for one in first)
    monkeypatch.setattr(fewshot, "train", None)  # nothing is trained again
    assert fewshot.run(plan(root, methods=[COOP, FULL])) == first
    assert next(one.cell.method for one in fewshot.run(plan(root, methods=[]))) == "zero-shot"
    with pytest.raises(TypeError):
        fewshot.run(plan(root, methods=[COOP | {"epochs": 3}]))


def test_other_pictures_at_the_same_place_are_measured_again(root: Path) -> None:
    few = plan(root, methods=[], shots=[1], seeds=[0])
    first = fewshot.run(few)[0].figures["top1"]
    shard = root / "test" / "0.tar"
    shard.with_name("0.tar.index.jsonl").unlink(missing_ok=True)
    make.write_shard(shard, [tiny_sample(f"test-{i}", label=0) for i in range(20)])  # right for all, or for none
    again = fewshot.run(few)[0].figures["top1"]
    afresh = fewshot.run(plan(root, methods=[], shots=[1], seeds=[0], out=str(root.parent / "afresh")))
    assert again == afresh[0].figures["top1"] != first


def test_what_an_interrupted_plan_left_is_no_beginning_of_another(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fewshot, "open_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fewshot.run(plan(root, shots=[1], seeds=[0]))
    longer = plan(root, shots=[1], seeds=[0], epochs=3)
    expected = fewshot.run(plan(root, shots=[1], seeds=[0], epochs=3, out=str(root.parent / "afresh")))
    assert fewshot.run(longer) == expected


def test_zero_shot_is_the_task_of_that_name(root: Path) -> None:
    measured = fewshot.run(plan(root, methods=[], shots=[1], seeds=[0]))
    expected = ZeroShot("x", str(root)).run(Embedder(load(f"open_clip:{root.parent / 'base'}")))
    assert measured[0].figures["top1"] == expected.metrics["top1"]


def test_base_to_new_learns_from_half_of_the_classes(root: Path) -> None:
    other = {"name": "elsewhere", "root": str(root)}
    measured = fewshot.run(plan(root, split="base_to_new", shots=[1], seeds=[0], others=[other]))
    assert {name for one in measured for name in one.figures} == {"base", "new", "harmonic_mean", "elsewhere"}
    for one in measured:
        assert one.figures["harmonic_mean"] == pytest.approx(harmonic_mean(one.figures["base"], one.figures["new"]))
    by_method = {one.cell.method: one.figures for one in measured}
    assert by_method["linear probe"]["new"] == by_method["zero-shot"]["new"]  # it knows no other classes
    index = (root.parent / "out" / "shards" / "1-0" / "000000.tar.index.jsonl").read_text().splitlines()
    assert len(index) - 1 == 2


LP_FT = {
    "name": "LP-FT",
    "frozen_first": ["image_tower"],
    "recipe": {
        "model": {"adapters": [{"type": "classifier", "templates": ["a photo of a {}."]}], "unfrozen": ["image_tower"]},
        "objective": {"contrastive": {"weight": 0.0}, "regularisers": [{"type": "classification"}]},
    },
}


def test_the_head_first_for_half_of_the_run(root: Path) -> None:
    given = plan(root, methods=[LP_FT])
    recipe = given.recipe_of(given.methods[0], tuple(NAMES), Cell("LP-FT", 2, 0), root / "shards", root / "run")
    assert (recipe.total_samples, recipe.global_batch) == (16, 8)
    assert recipe.stages == (Stage(8, frozen=("image_tower",)),)
    least = given.recipe_of(given.methods[0], ("one",), Cell("LP-FT", 1, 0), root / "shards", root / "run")
    assert least.stages[0].until_samples == 1
    figures = fewshot.run(plan(root, methods=[LP_FT], shots=[1], seeds=[0], split="base_to_new"))[-1].figures
    assert set(figures) == {"base", "new", "harmonic_mean"}  # new ones are read by their names


def test_further_sets_of_the_same_classes_are_read_with_what_was_learned(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other classes, one of them new, by the names alone."""
    shutil.copytree(root, root.parent / "strange")
    (root.parent / "strange" / "classnames.txt").write_text("\n".join([*NAMES[:3], "grey wolf"]))
    others = [{"name": name, "root": str(folder)} for name, folder in (("shift", root), ("x", root.parent / "strange"))]
    seen, read = {}, fewshot.against_classes

    def watched(embedder: Embedder, found: Any, names: tuple[str, ...], templates: tuple[str, ...]) -> Any:
        seen[names] = read(embedder, found, names, templates)[1]
        return read(embedder, found, names, templates)

    monkeypatch.setattr(fewshot, "against_classes", watched)
    faster = {**LP_FT, "recipe": {**LP_FT["recipe"], "optim": {"peak_lr": 0.1}}}
    measured = fewshot.run(plan(root, methods=[faster], shots=[4], seeds=[0], others=others))
    assert all(one.figures["shift"] == one.figures["top1"] for one in measured)
    figures = {one.cell.method: one.figures for one in measured}
    assert figures["linear probe"]["x"] == figures["zero-shot"]["x"]
    rows, by_name = seen[tuple(NAMES)], seen[(*NAMES[:3], "grey wolf")]
    base = load(f"open_clip:{root.parent / 'base'}").encode_text([f"a photo of a {name}." for name in NAMES])
    torch.testing.assert_close(by_name[:3], base[:3])
    assert (rows - base).abs().max() > 0.03


def test_what_is_forgotten_stands_beside_the_figure() -> None:
    def cell(method: str, shots: int, seed: int, other: float) -> fewshot.Measured:
        return fewshot.Measured(Cell(method, shots, seed), {"top1": 0.5, "sketches": other})

    measured = [cell("zero-shot", 0, 0, 0.4), *(cell("a", 1, seed, 0.1 * seed) for seed in (1, 2, 3))]
    own, others = tables([*measured, *(cell("b", 1, seed, 0.5) for seed in (1, 2))])
    assert "(" not in own.markdown()
    assert others.markdown().splitlines()[2:] == [
        "| zero-shot | 40.0 |",
        "| a | 20.0 ± 24.8 (-20.0) |",
        "| b | 50.0 ± 0.0 (+10.0) |",
    ]


CHOSEN = FULL | {"name": "WiSE-FT", "tuned_share": "chosen"}


@pytest.mark.parametrize("split", ["all", "base_to_new"])
def test_a_share_is_chosen_on_pictures_that_are_held_out(
    root: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    """Of a stand-in 0.3 is the best: the figures are those of that share."""
    keys: dict[str, Any] = {"split": split, "shots": [1], "seeds": [0]}
    of_base = []

    def stand_in(base: DualEncoder, _: DualEncoder, figure: Callable[[ModelEncoder], float]) -> dict[float, float]:
        of_base.append(figure(ModelEncoder(base)))
        return {share: -abs(share - 0.3) for share in between.SHARES}

    with monkeypatch.context() as patch:
        patch.setattr(between, "sweep", stand_in)
        chosen = fewshot.run(plan(root, methods=[CHOSEN], **keys))[-1].figures
    expected = fewshot.run(plan(root, methods=[CHOSEN | {"tuned_share": 0.3}], **keys))[-1].figures
    assert chosen == expected | {"tuned_share": 0.3}
    afresh = fewshot.run(plan(root, methods=[CHOSEN], out=str(root.parent / "afresh"), **keys))[-1].figures
    assert afresh["tuned_share"] in between.SHARES
    learned, held = (pixels(root.parent / "out" / kind / "1-0" / "000000.tar") for kind in ("shards", "held_out"))
    assert len(held) == len(learned) == (4 if split == "all" else 2)
    assert not set(held) & set(learned)
    assert set(held) < set(pixels(root / "train" / "0.tar"))
    (root / "names.txt").write_text("\n".join(NAMES[: len(held)]))
    texts = {"classes": str(root / "names.txt"), "templates": str(root / "zeroshot_classification_templates.txt")}
    task = ZeroShot("x", str(root.parent / "out" / "held_out" / "1-0"), **texts)
    assert of_base == [task.run(Embedder(load(f"open_clip:{root.parent / 'base'}"))).metrics["top1"]]


def test_the_part_val_is_for_choosing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"methods": [CHOSEN], "shots": [4], "seeds": [0]}
    with pytest.raises(DataError, match=r"nothing is left to choose tuned_share on \(4 classes, 'red fox' the first\)"):
        fewshot.run(plan(root, **keys))
    make.write_shard(root / "val" / "0.tar", [tiny_sample(f"val-{n}", label=n % 4) for n in range(8)])
    first = fewshot.run(plan(root, **keys))
    assert sorted(pixels(root.parent / "out/held_out/4-0/000000.tar")) == sorted(pixels(root / "val/0.tar"))
    with monkeypatch.context() as patch:
        patch.setattr(fewshot, "train", None)  # nothing is trained again
        assert fewshot.run(plan(root, **keys)) == first
        (root / "val" / "0.tar.index.jsonl").unlink(missing_ok=True)
        make.write_shard(root / "val" / "0.tar", [tiny_sample(f"other-{n}", label=n % 4) for n in range(8)])
        with pytest.raises(TypeError):
            fewshot.run(plan(root, **keys))


def pixels(shard: Path) -> list[bytes]:
    with tarfile.open(shard) as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith(".png")]  # type: ignore[union-attr]


def test_what_is_held_out_lies_behind_the_draw() -> None:
    labels = torch.tensor([0] * 5 + [1] * 3)
    part = Labelled(torch.eye(8), labels, tuple("abcdefgh"), ("x", "y"), "here")
    drawn, held = draw(part, 2, 0), hold_out(part, 2, 0, behind=2)
    assert part.labels[held].tolist() == [0, 0, 1]  # as many as there are
    assert not set(held.tolist()) & set(drawn.tolist())
    assert hold_out(part, 2, 0, behind=0).equal(drawn)
    with pytest.raises(
        DataError, match=r"nothing is left to choose tuned_share on \(1 classes, 'y' the first\) · here"
    ):
        hold_out(part, 3, 0, behind=3)


def test_among_equal_shares_the_base_is_nearer() -> None:
    assert between.best({1.0: 0.5, 0.2: 0.5, 0.3: 0.5, 0.0: 0.4}) == 0.2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"shots": [5]}, r"5 shots, but 4 classes have fewer pictures \('red fox': 4\)"),
        ({"recipe": {}}, r"no base · recipe\.model\.towers"),
        ({"methods": [COOP, COOP]}, "methods must have different names"),
        ({"others": [{"name": "new", "root": "x"}]}, "another set must not be called 'new'"),
        ({"shots": [0]}, "shots must be at least 1"),
        ({"methods": [COOP | {"tuned_share": 2}]}, r"tuned_share must lie in \[0, 1\]"),
        ({"methods": [COOP | {"tuned_share": "chose"}]}, "tuned_share: 'chose' is not number | one of chosen"),
        ({"methods": [COOP | {"recipe": {"optm": {}}}]}, "unknown key 'optm'; did you mean 'optim'"),
    ],
)
def test_wrong_plans_are_one_line(root: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said) as caught:
        fewshot.run(plan(root, **keys))
    assert "\n" not in str(caught.value)


def test_tip_adapter_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn, test, classes = (F.normalize(torch.randn(n, 8, generator=generator).double(), dim=1) for n in (6, 5, 3))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    few = Labelled(drawn, labels, ("",) * 6, ("a", "b", "c"), "")
    cache = Cache(few, classes, 20.0)
    found = cache.scores(test, 2.0, 3.0)
    for row in range(5):
        for column in range(3):
            votes = sum(torch.exp(-3 * (1 - test[row] @ drawn[k])) for k in range(6) if labels[k] == column)
            assert found[row, column] == pytest.approx(20 * float(test[row] @ classes[column]) + 2 * float(votes))
    alone = Cache(few.rows(torch.tensor([0, 1, 2])), classes, 20.0)
    assert alone.chosen() == (1.0, 5.5)
    own = cache.scores(drawn, 2.0, 3.0, left_out=True)
    expected = 20 * drawn[0] @ classes[0] + 2 * torch.exp(-3 * (1 - drawn[0] @ drawn[3]))
    assert own[0, 0] == pytest.approx(float(expected))
    perfect = Labelled(
        torch.eye(3)[[0, 0, 1, 1, 2, 2]], labels[[0, 0, 1, 1, 2, 2]].sort().values, ("",) * 6, ("a",) * 3, ""
    )
    best = Cache(perfect, -torch.eye(3), 5.0)  # texts that are wrong: votes must outweigh them
    assert top1(best.scores(perfect.features, *best.chosen()), perfect.labels) == 1.0


def few_features(count: int, dim: int = 8) -> Cache:
    generator = torch.Generator().manual_seed(1)
    drawn, classes = (F.normalize(torch.randn(n, dim, generator=generator).double(), dim=1) for n in (count, 3))
    return Cache(Labelled(drawn, torch.arange(count) % 3, ("",) * count, ("a", "b", "c"), ""), classes, 5.0)


def test_tip_adapter_f_trains_the_keys_as_its_formulas_say() -> None:
    """Four steps of AdamW in the direction that the derivative by hand gives, all pictures in each."""
    start, alpha, beta = few_features(6), 2.0, 3.0
    pictures, labels, keys = start.drawn.features, start.drawn.labels, start.drawn.features.clone()
    mean, square = torch.zeros_like(keys), torch.zeros_like(keys)
    for step in range(4):
        near = (-beta * (1 - pictures @ keys.T)).exp()
        logits = 5 * pictures @ start.classes.T
        for k in range(6):
            logits[:, labels[k]] += alpha * near[:, k]
        wrong = (logits.softmax(1) - torch.eye(3)[labels]) / 6
        gradient = torch.stack([(wrong[:, labels[k]] * alpha * beta * near[:, k]) @ pictures for k in range(6)])
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        lr = 1e-3 * (1 + torch.cos(torch.tensor(torch.pi * step / 4, dtype=torch.float64))) / 2
        change = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-4)
        keys = keys * (1 - 0.01 * lr) - lr * change
    found = start.trained(alpha, beta, seed=0, epochs=4)
    torch.testing.assert_close(found.drawn.features, keys, atol=1e-12, rtol=0)
    assert found.classes is start.classes


def test_tip_adapter_f_begins_as_tip_adapter_and_its_order_is_of_the_seed() -> None:
    start = few_features(300)  # two batches of an epoch
    assert start.trained(1.0, 5.5, seed=0, epochs=0).drawn.features.equal(start.drawn.features)
    one, again, other = (start.trained(1.0, 5.5, seed=seed, epochs=2).drawn.features for seed in (0, 0, 1))
    assert one.equal(again)
    assert not one.equal(other)
    losses = [
        F.cross_entropy(cache.scores(start.drawn.features, 1.0, 5.5), start.drawn.labels)
        for cache in (start, start.trained(1.0, 5.5, seed=0))
    ]
    assert losses[1] < losses[0]
    assert not start.drawn.features.requires_grad


def test_figures_by_hand() -> None:
    assert harmonic_mean(0.5, 0.25) == pytest.approx(1 / 3)
    assert harmonic_mean(0.0, 0.0) == 0
    mean, half = mean_and_interval([0.1, 0.2, 0.3])
    assert (mean, half) == (pytest.approx(0.2), pytest.approx(4.303 * 0.1 / 3**0.5))
    assert mean_and_interval([0.5])[1] != mean_and_interval([0.5])[1]
    assert mean_and_interval([0.0, 1.0] * 15)[1] == pytest.approx(2.0452 * 0.50855 / 30**0.5, abs=1e-3)
    assert top1(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1])) == 0.5  # equal scores count against


def test_the_page_and_its_tables(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    towers = f"recipe.model.towers={{type: open_clip, name: '{root.parent / 'base'}'}}"
    (root.parent / "plan.yaml").write_text(f"{{root: '{root}', out: '{root.parent / 'out'}', recipe: {{}}}}")
    assert main(["fewshot", str(root.parent / "plan.yaml"), towers, "shots=[1,2]", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert {cell["method"] for cell in cells} == set(BASELINES)
    page = (root.parent / "out" / "fewshot.html").read_text()
    assert "<script" not in page
    assert "linear probe" in page
    write_page([fewshot.Measured(Cell("probe", 1, seed), {"top1": 0.5}) for seed in (3, 7)], "", root / "page.html")
    assert "over 2 draws" in (root / "page.html").read_text()
    measured = [
        fewshot.Measured(Cell("a<b>", shots, seed), {"top1": 0.25 * seed}) for shots in (1, 2) for seed in (0, 1, 2)
    ]
    (table,) = tables([*measured, fewshot.Measured(Cell("zero-shot", 0, 0), {"top1": 0.1})])
    assert table.markdown().splitlines() == [
        "| top-1 | 1 shot | 2 shots |",
        "| --- | --: | --: |",
        "| a<b> | 25.0 ± 62.1 | 25.0 ± 62.1 |",
        "| zero-shot | 10.0 | 10.0 |",
    ]


def test_interpolation_goes_from_one_to_the_other(root: Path, tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    export(dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=1), other)
    for share, expected in ((0.0, base), (1.0, other)):
        command = ["interpolate", str(base), str(other), str(tmp_path / "between"), "--share", str(share)]
        assert main([*command, "--overwrite"]) == 0
        found, wanted = load(str(tmp_path / "between")), load(str(expected))
        torch.testing.assert_close(found.encode_text(["a cat"]), wanted.encode_text(["a cat"]), atol=1e-6, rtol=0)
    wider = TINY_MODEL["towers"] | {"embed_dim": 32}
    export(dual_encoder.build(from_tree(ModelConfig, {"towers": wider}), seed=1), tmp_path / "wider")
    assert main(["interpolate", str(base), str(tmp_path / "wider"), str(tmp_path / "x")]) == 2


def test_the_share_is_chosen_where_it_does_best(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures of a stand-in, highest at 0.3; the real ones at both ends."""
    export(dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=1), tmp_path / "other")
    (tmp_path / "held_out.yaml").write_text(f"tasks: [{{type: zeroshot, dataset: x, root: '{root}'}}]")
    command = ["interpolate", str(tmp_path / "base"), str(tmp_path / "other"), str(tmp_path / "best"), "--json"]
    assert main([*command, "--choose", str(tmp_path / "held_out.yaml")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said["by_share"]) == [f"{share:g}" for share in between.SHARES]
    assert said["by_share"][f"{said['share']:g}"] == max(said["by_share"].values())
    expected = fewshot.run(plan(root, methods=[], shots=[1], seeds=[0]))[0].figures["top1"]
    assert said["by_share"]["0"] == expected
    monkeypatch.setattr(between, "sweep", lambda *_: {share: -abs(share - 0.3) for share in between.SHARES})
    assert main([*command, "--overwrite", "--choose", str(tmp_path / "held_out.yaml")]) == 0
    assert json.loads(capsys.readouterr().out)["share"] == 0.3
