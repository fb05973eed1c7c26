"""W ranks equal one process: losses, all gradients, state; one-sided, two-sided, grouped; and what they send."""

from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diptych.config import from_tree
from diptych.distributed.groups import GatherConfig, make_groups, partition
from diptych.errors import DistributedError
from diptych.losses import tiles
from diptych.losses.batch import Moment, Pairs
from diptych.losses.contrastive import contrastive_loss
from diptych.losses.objective import Objective, ObjectiveConfig
from diptych.testing import run_ranks

SIZE, WIDTH = 16, 12
TWO_SIDED = {"form": "two_sided"}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip two-sided": {"gather": TWO_SIDED},
    "siglip": {"normaliser": "sigmoid"},
    "siglip same caption": {"normaliser": "sigmoid", "targets": "same_caption"},
    "same caption": {"targets": "same_caption", "label_smoothing": 0.1, "weight": 2.0},
    "same caption two-sided": {"targets": "same_caption", "label_smoothing": 0.1, "gather": TWO_SIDED},
    "cwcl": {"targets": "cwcl"},
    "cwcl two-sided": {"targets": "cwcl", "gather": TWO_SIDED},
    "soft labels": {"targets": "soft_labels"},
    "momentum": {"targets": "momentum"},
    "weighted decoupled": {"weights": ["decoupled"], "targets": "weighted_positive"},
    "not same caption": {"weights": ["not_same_caption"]},
    "repulsion": {"weights": ["repulsion"]},
    "unime": {"weights": [{"type": "false_negatives", "keep": 3}]},
    "unime two-sided": {"weights": [{"type": "false_negatives", "keep": 3}], "gather": TWO_SIDED},
    "clusters": {"weights": [{"type": "clusters", "numbers": [3, 5]}]},
    "propensity": {"weights": ["inverse_propensity"]},
    "decoupled softmax": {"normaliser": "decoupled_softmax", "targets": "same_caption"},
    "soft top-k": {"normaliser": {"type": "soft_topk", "k": 3}, "targets": "same_caption"},
    "hard captions": {"candidates": ["hard_captions"]},
    "own hard captions": {"candidates": ["own_hard_captions"]},
    "hard captions, same caption": {"candidates": ["hard_captions"], "targets": "same_caption"},
    "counter pairs": {"candidates": ["counter_pairs"]},
    "counter pairs two-sided": {"candidates": ["counter_pairs"], "targets": "same_caption", "gather": TWO_SIDED},
    "positive captions": {"candidates": ["positive_captions", "own_hard_captions"]},
    "queue": {"candidates": [{"type": "queue", "size": 20}], "targets": "momentum"},
    "mochi": {"candidates": [{"type": "mochi", "hardest": 4, "mixed": 3, "queried": 2}]},
    "mochi two-sided": {"candidates": [{"type": "mochi", "hardest": 4, "mixed": 3, "queried": 2}], "gather": TWO_SIDED},
    "interpolated": {"candidates": ["interpolated"]},
    "interpolated two-sided": {"candidates": ["interpolated"], "gather": TWO_SIDED},
    "heads": {"similarity": "heads"},
    "extrapolated": {"similarity": "extrapolated"},
    "per anchor": {"temperature": "per_anchor"},
    "adaptive": {"temperature": {"type": "adaptive", "penalty_weight": 0.1}},
    "loss based": {"sample_weight": "loss_based"},
    "sogclr": {"denominator": {"type": "sogclr", "num_samples": 24}},
    "isogclr": {"denominator": {"type": "isogclr", "num_samples": 24, "step_size": 0.01}},
}


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def batch(rows: slice, step: int) -> Pairs:
    """One rank's rows of batch `step`."""

    def mine(tensor: Tensor) -> Tensor:
        return tensor[rows]

    seed = 100 * step
    ids = torch.tensor([0, 1, 2, 0, 3, 1, 4, 5, 0, 6, 7, 1, 8, 9, 2, 10])
    known = {
        "caption_ids": mine(ids),
        "sample_ids": mine((torch.arange(SIZE) + 5 * step) % 24),
        "label_features": mine(unit(SIZE, 5, seed=seed + 1)),
        "surface_features": mine(unit(SIZE, 8, seed=seed + 2).abs()),
        "temperatures": mine(torch.linspace(0.05, 0.2, SIZE, dtype=torch.float64)),
        "hard_ids": mine(torch.arange(2 * SIZE).view(SIZE, 2) % 13),
        "counter_ids": mine(torch.arange(SIZE) % 7),
        "counter_present": mine(torch.arange(SIZE) % 5 > 1),
    }
    return Pairs(
        mine(unit(SIZE, WIDTH, seed=seed + 3)).requires_grad_(),
        mine(unit(SIZE, WIDTH, seed=seed + 4)).requires_grad_(),
        torch.tensor(9.0, dtype=torch.float64, requires_grad=True),
        torch.tensor(-3.0, dtype=torch.float64, requires_grad=True),
        known,
        {"teacher_features": mine(unit(SIZE, WIDTH, seed=seed + 5))},
        {"teacher_features": mine(unit(SIZE, WIDTH, seed=seed + 6))},
        mine(unit(SIZE, 2, WIDTH, seed=seed + 7)).requires_grad_(),
        mine(unit(SIZE, 3, WIDTH, seed=seed + 8)).requires_grad_(),
        counter_images=mine(unit(SIZE, WIDTH, seed=seed + 9)).requires_grad_(),
        counter_texts=mine(unit(SIZE, WIDTH, seed=seed + 10)).requires_grad_(),
    )


def trained_steps(rank: int, world: int, tree: dict[str, Any], steps: int = 2) -> dict[str, Any]:
    """What one rank of `world` finds for its part of two batches, and the state that it is left with."""
    tiles.ROW_BLOCK, tiles.COLUMN_BLOCK = 3, 5
    torch.manual_seed(0)
    regularisers = tree.get("regularisers", [])
    contrastive = {key: value for key, value in tree.items() if key != "regularisers"}
    config = from_tree(ObjectiveConfig, {"contrastive": contrastive, "regularisers": regularisers})
    objective = Objective(config, embed_dim=WIDTH).double()
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for step in range(steps):
        pairs = batch(slice(rank * SIZE // world, (rank + 1) * SIZE // world), step)
        moment = Moment(step, 100 * step, seed=7)
        total = objective(pairs, moment).total
        more = (pairs.hard_captions, pairs.positive_captions, pairs.counter_images, pairs.counter_texts)
        of_rows = [pairs.image_features, pairs.text_features, *(part for part in more if part is not None)]
        leaves = [*of_rows, pairs.logit_scale, pairs.logit_bias, *objective.parameters()]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        found["losses"].append(total.item())
        found["gradients"].append(gradients)
        objective.after_step(pairs)
    found["state"] = objective.whole_state()
    return found


def equal_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    world = len(ranks)
    for step, expected in enumerate(alone["losses"]):
        assert sum(rank["losses"][step] for rank in ranks) / world == pytest.approx(expected, abs=1e-10)
        for place, right in enumerate(alone["gradients"][step]):
            parts = [rank["gradients"][step][place] for rank in ranks]
            if right is None:
                assert all(part is None or not part.any() for part in parts)
                continue
            parts = [torch.zeros_like(right) if part is None else part for part in parts]
            # each rank differentiates the sum of all losses, of which training takes the mean
            together = torch.cat(parts) if place < 6 else torch.stack(parts).sum(0)
            torch.testing.assert_close(together / world, right, atol=1e-10, rtol=1e-8)
    for name, right in alone["state"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["state"][name], right, atol=1e-6, rtol=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_equal_one_process(world: int, name: str) -> None:
    tree = OBJECTIVES[name]
    equal_one_process(run_ranks(trained_steps, world, world, tree), trained_steps(0, 1, tree))


REGULARISERS = [
    {"type": "uniformity", "weight": 0.3, "cross": 0.5},
    {"type": "alignment", "weight": 0.3},
    {"type": "image_grounded", "weight": 0.3},
    {"type": "text_grounded", "weight": 0.3},
    {"type": "distillation", "weight": 0.3},
]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_regularisers_on_ranks(world: int) -> None:
    tree = {"regularisers": REGULARISERS}
    equal_one_process(run_ranks(trained_steps, world, world, tree), trained_steps(0, 1, tree))


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["clip", "clip two-sided", "siglip", "same caption", "queue", "sogclr"])
def test_four_ranks_equal_one_process(name: str) -> None:
    equal_one_process(run_ranks(trained_steps, 4, 4, OBJECTIVES[name]), trained_steps(0, 1, OBJECTIVES[name]))


# --- groups ------------------------------------------------------------------------------------------------------


def group_loss(rank: int, world: int, tree: dict[str, Any], step: int) -> tuple[float, Tensor, Tensor, Tensor]:
    objective = Objective(from_tree(ObjectiveConfig, {"contrastive": tree}), embed_dim=WIDTH)
    pairs = batch(slice(rank * SIZE // world, (rank + 1) * SIZE // world), step)
    total = objective(pairs, Moment(step)).total
    gradients = torch.autograd.grad(total, [pairs.image_features, pairs.text_features, pairs.logit_scale])
    return total.item(), *gradients


def rows_of(ranks: list[int], world: int) -> Tensor:
    width = SIZE // world
    return torch.cat([torch.arange(rank * width, (rank + 1) * width) for rank in ranks])


@pytest.mark.distributed
@pytest.mark.parametrize("form", ["one_sided", "two_sided"])
@pytest.mark.parametrize(
    ("gather", "step", "members"),
    [
        ({"scope": "group", "group_size": 2}, 0, [[0, 1], [2, 3]]),
        ({"scope": "group", "group_size": 2, "pattern": "strided"}, 0, [[0, 2], [1, 3]]),
        ({"scope": "group", "group_size": 2, "pattern": "alternating"}, 0, [[0, 1], [2, 3]]),
        ({"scope": "group", "group_size": 2, "pattern": "alternating"}, 1, [[0, 2], [1, 3]]),
        ({"scope": "rank"}, 0, [[0], [1], [2], [3]]),
        ({"scope": "group", "group_size": 4}, 0, [[0, 1, 2, 3]]),
    ],
    ids=["pairs", "strided", "alternating, even", "alternating, odd", "rank", "all"],
)
@pytest.mark.parametrize("targets", ["identity", "same_caption"])
def test_a_groups_loss_is_that_of_its_rows(
    gather: dict[str, Any], step: int, members: list[list[int]], form: str, targets: str
) -> None:
    tree = {"gather": {**gather, "form": form}, "targets": targets}
    found = run_ranks(group_loss, 4, 4, tree, step)
    whole = batch(slice(0, SIZE), step)
    for ranks in members:
        rows = rows_of(ranks, 4)
        image, text = (side.detach()[rows].requires_grad_() for side in (whole.image_features, whole.text_features))
        scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        known = {"caption_ids": whole.known["caption_ids"][rows]}
        expected = contrastive_loss(image, text, scale, targets=targets, known=known)
        size = len(ranks)
        assert sum(found[rank][0] for rank in ranks) / size == pytest.approx(expected.item(), abs=1e-12)
        for place, right in enumerate(torch.autograd.grad(expected, (image, text, scale))):
            parts = [found[rank][1 + place] for rank in ranks]
            together = torch.cat(parts) if place < 2 else torch.stack(parts).sum(0)
            torch.testing.assert_close(together / size, right, atol=1e-12, rtol=1e-9)


WITHOUT_STATE = [name for name in OBJECTIVES if name not in ("queue", "sogclr", "isogclr", "adaptive")]


def step_in_groups(rank: int, world: int, name: str) -> tuple[Tensor, ...]:
    tiles.ROW_BLOCK, tiles.COLUMN_BLOCK = 3, 5
    gather = {"scope": "group", "group_size": world // 2, **OBJECTIVES[name].get("gather", {})}
    objective = Objective(
        from_tree(ObjectiveConfig, {"contrastive": OBJECTIVES[name] | {"gather": gather}}), embed_dim=WIDTH
    )
    return loss_and_gradients(objective, batch(slice(rank * SIZE // world, (rank + 1) * SIZE // world), 0))


def loss_and_gradients(objective: Objective, pairs: Pairs) -> tuple[Tensor, ...]:
    total = objective(pairs, Moment(0, 100, seed=7)).total
    leaves = [pairs.image_features, pairs.text_features, pairs.logit_scale]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return total.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("name", WITHOUT_STATE)
def test_plugs_see_their_group_only(name: str) -> None:
    """Four ranks in two groups: each group is one process with its half of the rows."""
    found = run_ranks(step_in_groups, 4, 4, name)
    for group in range(2):
        objective = Objective(from_tree(ObjectiveConfig, {"contrastive": OBJECTIVES[name]}), embed_dim=WIDTH)
        expected = loss_and_gradients(objective, batch(slice(group * SIZE // 2, (group + 1) * SIZE // 2), 0))
        first, second = found[2 * group : 2 * group + 2]
        torch.testing.assert_close((first[0] + second[0]) / 2, expected[0], atol=1e-10, rtol=1e-10)
        for place in (1, 2):
            together = torch.cat([first[place], second[place]]) / 2
            torch.testing.assert_close(together, expected[place], atol=1e-10, rtol=1e-8)
        torch.testing.assert_close((first[3] + second[3]) / 2, expected[3], atol=1e-10, rtol=1e-8)


def test_groups_cover_the_world_once() -> None:
    for world in range(1, 25):
        for size in (n for n in range(1, world + 1) if world % n == 0):
            for pattern in ("contiguous", "strided"):
                members = [rank for ranks in partition(world, size, pattern=pattern) for rank in ranks]
                assert sorted(members) == list(range(world))


def uneven(rank: int) -> str:
    try:
        make_groups(from_tree(GatherConfig, {"scope": "group", "group_size": 2}))
    except DistributedError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_a_remainder_is_a_clear_error() -> None:
    for message in run_ranks(uneven, 3):
        assert "3 ranks cannot be divided into groups of 2 (1 would remain)" in message
        assert "use one of 1, 3" in message


def uneven_nodes(rank: int) -> str:
    import os

    os.environ["LOCAL_WORLD_SIZE"] = "2" if rank < 2 else "1"
    try:
        make_groups(from_tree(GatherConfig, {"scope": "node"}))
    except DistributedError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_uneven_nodes_are_refused_on_every_rank() -> None:
    assert all("nodes of 1, 2 ranks" in message for message in run_ranks(uneven_nodes, 3))


def gathers_left(rank: int, sigmoid: bool) -> int:
    """How many gathers of five steps are still in memory."""
    import gc
    import weakref

    from diptych.losses import contrastive

    made = []

    class Watched(contrastive.PendingGather):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    contrastive.PendingGather = Watched
    for step in range(5):
        pairs = batch(slice(rank * SIZE // 2, (rank + 1) * SIZE // 2), step)
        options = {"normaliser": "sigmoid", "logit_bias": -3.0} if sigmoid else {}
        contrastive_loss(pairs.image_features, pairs.text_features, pairs.logit_scale, **options).backward()
    del pairs
    gc.collect()
    assert len(made) == 5
    return sum(reference() is not None for reference in made)


@pytest.mark.distributed
@pytest.mark.parametrize("sigmoid", [False, True])
def test_steps_leave_nothing_in_memory(sigmoid: bool) -> None:
    assert run_ranks(gathers_left, 2, sigmoid) == [0, 0]


def by_node(rank: int) -> tuple[int, int]:
    import os

    os.environ["LOCAL_WORLD_SIZE"] = "2"
    group = make_groups(from_tree(GatherConfig, {"scope": "node"})).at(0)
    return group.rank, group.size


@pytest.mark.distributed
def test_a_node_is_a_group() -> None:
    assert run_ranks(by_node, 4) == [(0, 2), (1, 2), (0, 2), (1, 2)]


# --- open_clip on the same ranks -------------------------------------------------------------------------------


def beside_open_clip(rank: int, world: int, sigmoid: bool) -> dict[str, Any]:
    """One rank's loss and gradients by both; open_clip in its local form, which ours corresponds to."""
    found = {}
    for name in ("ours", "theirs"):
        pairs = batch(slice(rank * SIZE // world, (rank + 1) * SIZE // world), 0)
        image, text, scale, bias = pairs.image_features, pairs.text_features, pairs.logit_scale, pairs.logit_bias
        if name == "ours":
            options = {"logit_bias": bias, "normaliser": "sigmoid"} if sigmoid else {}
            loss = contrastive_loss(image, text, scale, **options)
        elif sigmoid:
            loss = open_clip.loss.SigLipLoss(rank=rank, world_size=world, dist_impl="gather")(image, text, scale, bias)
        else:
            peer = open_clip.loss.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
            loss = peer(image, text, scale)
        leaves = (image, text, scale, bias) if sigmoid else (image, text, scale)
        found[name] = (loss.detach(), torch.autograd.grad(loss, leaves))
    return found


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:torch.distributed.nn:FutureWarning")
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_it_is_open_clips_on_ranks(world: int, sigmoid: bool) -> None:
    ranks = run_ranks(beside_open_clip, world, world, sigmoid)
    ours, theirs = ([rank[name] for rank in ranks] for name in ("ours", "theirs"))
    torch.testing.assert_close(sum(loss for loss, _ in ours), sum(loss for loss, _ in theirs), atol=1e-10, rtol=1e-10)
    for place in range(4 if sigmoid else 3):
        mine, right = ([gradients[place] for _, gradients in side] for side in (ours, theirs))
        if place < 2:
            torch.testing.assert_close(mine, right, atol=1e-10, rtol=1e-8)
        else:  # what the ranks share is averaged in training
            torch.testing.assert_close(sum(mine), sum(right), atol=1e-10, rtol=1e-8)


# --- traffic -----------------------------------------------------------------------------------------------------


class Received(TorchDispatchMode):
    """Bytes that a rank receives from the others, by collective, counted from what torch is asked to move."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            world = next(dist.ProcessGroup.unbox(a).size() for a in args if isinstance(a, torch.ScriptObject))
            tensors = tree_leaves(args[:2])  # outputs and inputs: on one of the two sides a part for every rank
            size = max(sum(t.nbytes for t in tensors if isinstance(t, Tensor)) // (world + 1), 1)
            if name == "alltoall_base_":
                size = args[0].nbytes // world
            self.by_name[name] = self.by_name.get(name, 0) + (world - 1) * size
        return func(*args, **(kwargs or {}))


def traffic(rank: int, world: int, gather: dict[str, Any], width: int, rows: int) -> dict[str, int]:
    objective = Objective(from_tree(ObjectiveConfig, {"contrastive": {"gather": gather}}), embed_dim=width)
    image, text = (unit(rows, width, seed=rank * 10 + i).float().requires_grad_() for i in (0, 1))
    with Received() as received:
        total = objective(Pairs(image, text, torch.tensor(9.0))).total
        total.backward()
    return received.by_name


@pytest.mark.distributed
def test_one_sided_moves_half_the_features() -> None:
    rows, width = 8, 512
    share = rows * width * 4
    one = run_ranks(traffic, 4, 4, {}, width, rows)
    two = run_ranks(traffic, 4, 4, TWO_SIDED, width, rows)
    grouped = run_ranks(traffic, 4, 4, {"scope": "group", "group_size": 2}, width, rows)
    for found, sides, others in ((one, 1, 3), (two, 2, 3), (grouped, 1, 1)):
        for rank in found:
            # Statistics of columns: one number per column to its owner, and two back with the gradients.
            statistics = 0 if sides == 2 else others * rows * 4
            expected = {
                "reduce_scatter_": sides * others * share,
                "allgather_": sides * others * share + 2 * statistics,
            }
            assert rank == expected | ({"alltoall_base_": statistics} if statistics else {})
    total = [sum(found[0].values()) for found in (one, two, grouped)]
    assert total[0] / total[1] < 0.5 + 1 / width
    assert total[2] / total[0] == pytest.approx(1 / 3)  # of g ranks g − 1 send: (g − 1) / (W − 1)
