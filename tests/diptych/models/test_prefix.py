"""A language model that foretells captions: behind the picture, one word at a time, beside features that see none."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.diptych.models.language_models import VOCABULARY, build, folder, gemma, gpt2, llama, tree, trimmed

import diptych.testing as make
from diptych import checkpoint
from diptych.config import dump, from_tree
from diptych.encoder import load
from diptych.errors import CheckpointError, ConfigError
from diptych.log import read_metrics
from diptych.models import dual_encoder, speed
from diptych.models.dual_encoder import ModelConfig
from diptych.models.matching import DecoderTexts
from diptych.models.speed import SpeedConfig
from diptych.testing import TINY_MODEL
from diptych.train import loop
from diptych.train.recipe import Recipe
from diptych.vocabulary import IGNORED, TokenLoss

TEXTS = ["a red fox", "cat", "", "the cat of the red fox in the snow of the cat !"]
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
EXACT = {"atol": 1e-5, "rtol": 1e-5}  # other kernels for other lengths: rounding
KINDS = pytest.mark.parametrize("kind", [gpt2, llama])


# --- losses ----------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("prefix_tokens", [1, 3])
def test_losses_are_those_of_transformers_own_logits(kind: Any, prefix_tokens: int, tmp_path: Path) -> None:
    path = folder(tmp_path / "lm", kind())
    model, theirs = build(path, towers={"prefix_tokens": prefix_tokens}), type(kind()).from_pretrained(path).eval()
    with torch.no_grad():
        found = model(IMAGES, trimmed(model, TEXTS), None, TokenLoss())
        features = model.encode_image(IMAGES)
        for row, text in enumerate(TEXTS):
            ids = torch.tensor([*[VOCABULARY.index(word) for word in text.split()], 1])
            prefix = model.text_decoder.prefix(features[row]).view(prefix_tokens, 16)
            inputs = torch.cat([prefix, theirs.get_input_embeddings()(ids)])[None]
            logits = theirs(inputs_embeds=inputs).logits[0, prefix_tokens - 1 : -1]
            dense = F.cross_entropy(logits.double(), ids, reduction="sum")
            torch.testing.assert_close(found.caption_losses[row].double(), dense, **EXACT)
    assert found.caption_lengths.tolist() == [4, 2, 1, 14]


@KINDS
def test_logits_are_those_that_the_losses_are_made_of(kind: Any, tmp_path: Path) -> None:
    model = build(folder(tmp_path / "lm", kind()))
    tokens = trimmed(model, TEXTS)
    logits, targets = model.next_word_logits(IMAGES, tokens), model.targets(tokens)
    dense = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED).sum(1)
    torch.testing.assert_close(model(IMAGES, tokens, None, TokenLoss()).caption_losses, dense, **EXACT)


@KINDS
def test_padding_changes_nothing(kind: Any, tmp_path: Path) -> None:
    model = build(folder(tmp_path / "lm", kind()))
    short, whole = trimmed(model, TEXTS), model.tokenizer(TEXTS)
    one, other = (model(IMAGES, tokens, None, TokenLoss()) for tokens in (short, whole))
    alone = model(IMAGES[:1], trimmed(model, TEXTS[:1]), None, TokenLoss())
    for name in ("text_features", "caption_losses", "caption_lengths"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **EXACT)
        torch.testing.assert_close(getattr(one, name)[:1], getattr(alone, name), **EXACT)


def test_what_all_texts_share_is_not_foretold(tmp_path: Path) -> None:
    path = folder(tmp_path / "lm", llama(), starts=True)
    model = build(path, towers={"template": "the {} in snow"})
    fox, snow, end, none = VOCABULARY.index("fox"), VOCABULARY.index("in"), VOCABULARY.index("<e>"), IGNORED
    tokens = trimmed(model, ["red fox", ""])
    assert tokens[1].tolist() == [1, VOCABULARY.index("the") + 1, snow + 1, VOCABULARY.index("snow") + 1, end + 1, 0, 0]
    found = [[none, none, VOCABULARY.index("red"), fox, snow, none, none], [none, none, snow, *4 * [none]]]
    assert model.targets(tokens).tolist() == found
    plain = build(path).targets(trimmed(model, ["red fox"]))
    assert plain.tolist() == [[none, *(n - 1 for n in trimmed(model, ["red fox"])[0, 1:].tolist())]]


def test_a_start_that_is_an_end_stands_before_texts_without_words_too(tmp_path: Path) -> None:
    model = build(folder(tmp_path / "opt", llama(), starts=True, start="<e>"))
    end, fox = VOCABULARY.index("<e>"), VOCABULARY.index("fox")
    tokens = trimmed(model, ["fox", ""])
    assert tokens.tolist() == [[end + 1, fox + 1, end + 1], [end + 1, end + 1, 0]]
    assert model.targets(tokens).tolist() == [[IGNORED, fox, end], [IGNORED, end, IGNORED]]
    assert model.spelling is not None
    assert model.spelling.start == (end,)
    assert end not in model.spelling.banned


# --- no peeking ------------------------------------------------------------------------------------------------------


@KINDS
def test_no_word_is_seen_before_it_is_foretold(kind: Any, tmp_path: Path) -> None:
    model = build(folder(tmp_path / "lm", kind()))
    tokens = trimmed(model, TEXTS[3:])
    before = model.next_word_logits(IMAGES[:1], tokens)
    for place in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 4) % 12 + 1
        after = model.next_word_logits(IMAGES[:1], changed)
        torch.testing.assert_close(after[:, : place + 1], before[:, : place + 1], **EXACT)
        assert place + 1 == tokens.shape[1] or (after - before)[:, place + 1].abs().max() > 1e-3


@KINDS
def test_the_picture_is_seen_before_captions_and_not_by_features(kind: Any, tmp_path: Path) -> None:
    path = folder(tmp_path / "lm", kind())
    model, plain = build(path), build(path, towers={"prefix_tokens": 0})
    tokens = trimmed(model, TEXTS[:1])
    ours, theirs = (model(image[None], tokens, None, TokenLoss()) for image in IMAGES[:2])
    assert ours.text_features.equal(theirs.text_features)
    assert (ours.caption_losses - theirs.caption_losses).abs() > 1e-4
    assert ours.text_features.equal(plain.encode_text(tokens))  # one seed, one tower


@KINDS
def test_other_captions_are_foretold_than_features_are_of(kind: Any, tmp_path: Path) -> None:
    model = build(folder(tmp_path / "lm", kind()))
    short, long = trimmed(model, ["fox", "cat", "a", "red"]), trimmed(model, TEXTS)
    found, alone = (
        model(IMAGES, short, None, TokenLoss(), None, DecoderTexts(long)),
        model(IMAGES, long, None, TokenLoss()),
    )
    assert found.caption_losses.equal(alone.caption_losses)
    assert found.caption_lengths.equal(alone.caption_lengths)
    assert found.text_features.equal(model.encode_text(short))
    found.caption_losses.sum().backward()
    assert model.text_tower.model.get_input_embeddings().weight.grad[VOCABULARY.index("snow")].any()


# --- parameters ------------------------------------------------------------------------------------------------------


@KINDS
def test_all_parameters_learn_and_each_is_saved_once(kind: Any, tmp_path: Path) -> None:
    model = build(folder(tmp_path / "lm", kind())).train()
    found = model(IMAGES, trimmed(model, TEXTS), None, TokenLoss(0.1, 1e-3))
    (found.image_features.sum() + found.text_features.sum() + found.logit_scale + found.caption_losses.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert len({value.data_ptr() for value in model.state_dict().values()}) == len(model.state_dict())
    decoders = {name for name, _ in model.text_decoder.named_parameters()}
    assert decoders == {"prefix.weight", "prefix.bias"} | ({"head.weight"} if kind is llama else set())


@KINDS
def test_the_caption_alone_teaches_the_layers_of_the_text_tower(kind: Any, tmp_path: Path) -> None:
    model = build(folder(tmp_path / "lm", kind()), frozen=["image_tower", "text_tower.projection"])
    model(IMAGES, trimmed(model, TEXTS), None, TokenLoss()).caption_losses.sum().backward()
    graded = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert "text_decoder.prefix.weight" in graded
    assert {name for name, p in model.named_parameters() if p.requires_grad} - graded == {"logit_scale"}


def test_a_frozen_language_model_lets_the_prefix_learn(tmp_path: Path) -> None:
    model = build(folder(tmp_path / "lm", llama()), frozen=["image_tower", "text_tower", "text_decoder.head"]).train()
    model(IMAGES, trimmed(model, TEXTS), None, TokenLoss()).caption_losses.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "text_decoder.prefix.weight",
        "text_decoder.prefix.bias",
    ]


def test_a_copy_foretells_with_its_own_layers(tmp_path: Path) -> None:
    model = build(folder(tmp_path / "lm", gpt2()))
    tokens, twin = trimmed(model, TEXTS), copy.deepcopy(model)
    before = twin(IMAGES, tokens, None, TokenLoss()).caption_losses
    with torch.no_grad():
        for parameter in model.text_tower.parameters():
            parameter.zero_()
    assert twin(IMAGES, tokens, None, TokenLoss()).caption_losses.equal(before)


@KINDS
def test_activations_computed_again_change_nothing(kind: Any, tmp_path: Path) -> None:
    keys = tree(folder(tmp_path / "lm", kind()))
    image = TINY_MODEL["towers"] | {"vision": TINY_MODEL["towers"]["vision"] | {"layers": 2}}
    found = []
    for again in (False, True):
        model = dual_encoder.build(
            from_tree(ModelConfig, {"towers": keys["towers"] | {"image": image}}), seed=0
        ).train()
        speed.prepare(model, SpeedConfig(checkpoint_activations=again))
        model(IMAGES, trimmed(model, TEXTS), None, TokenLoss()).caption_losses.sum().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(found[1], found[0], **EXACT)


# --- training --------------------------------------------------------------------------------------------------------


CAPTION = {"regularisers": [{"type": "caption", "weight": 1.0}]}


SECOND = {"regularisers": [{"type": "caption", "weight": 1.0, "view": "second"}]}


def second(shards: Path) -> dict[str, Any]:
    """What is foretold stays, and something else is contrasted."""
    captions = {"views": [{"columns": ["name"], "templates": ["the red {}"]}], "second_views": [{"columns": ["name"]}]}
    return {"objective": SECOND, "data": {"shards": str(shards), "lanes": 4, "workers": 0, "captions": captions}}


def recipe(shards: Path, run: Path, model: dict[str, Any], **changes: Any) -> Recipe:
    keys = {"total_samples": 64, "model": model, "objective": CAPTION, "optim": {"peak_lr": 3e-3}}
    return make.tiny_recipe(shards, run, **(keys | changes))


def column(run: Path, name: str) -> list[float]:
    return [row[f"train/loss/{name}"] for row in read_metrics(run / "metrics.jsonl")]


@KINDS
def test_it_trains_in_micro_batches_and_its_run_opens(kind: Any, shards: Path, tmp_path: Path) -> None:
    keys = tree(folder(tmp_path / "lm", kind()))
    run = loop.train(recipe(shards, tmp_path / "run", keys, ema_decay=0.5, micro_batch=3))
    found = column(run.root, "caption")
    assert found[-1] < found[0] - 0.3  # of the same few words in all captions, much is learned in eight steps
    keys["towers"]["weights"] = "random"  # all of them are in the checkpoint
    opened = dual_encoder.build(from_tree(ModelConfig, keys), seed=1)
    opened.load_state_dict(checkpoint.load_weights(run.checkpoints))
    tokens = opened.tokenizer(["a red fox"])
    torch.testing.assert_close(load(str(run.root)).encode_text(["a red fox"]), opened.eval().encode_text(tokens))
    on = dual_encoder.build(from_tree(ModelConfig, {"towers": {"type": "run", "run": str(run.root)}}), seed=2).eval()
    losses = [model(IMAGES[:1], tokens, None, TokenLoss()).caption_losses for model in (opened, on)]
    torch.testing.assert_close(*losses)


def test_lora_learns_from_both_losses(shards: Path, tmp_path: Path) -> None:
    adapters = [{"type": "lora", "tower": "text", "rank": 2}]
    unfrozen = ["text_tower.projection", "text_decoder.prefix"]
    keys = tree(folder(tmp_path / "lm", llama()), adapters=adapters, unfrozen=unfrozen)
    model = dual_encoder.build(from_tree(ModelConfig, keys), seed=0).eval()
    model(IMAGES, trimmed(model, TEXTS), None, TokenLoss()).caption_losses.sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)
    run = loop.train(recipe(shards, tmp_path / "run", keys))
    assert column(run.root, "caption")[-1] < column(run.root, "caption")[0]
    tuned = dual_encoder.build(from_tree(ModelConfig, keys), seed=0).eval()
    tuned.load_state_dict(checkpoint.load_weights(run.checkpoints))
    merged = dual_encoder.build(from_tree(ModelConfig, {"towers": {"type": "run", "run": str(run.root)}}), seed=2)
    tokens = trimmed(tuned, TEXTS)
    losses = [each(IMAGES, tokens, None, TokenLoss()).caption_losses for each in (tuned, merged.eval())]
    torch.testing.assert_close(*losses, **EXACT)
    assert (losses[0] - model(IMAGES, tokens, None, TokenLoss()).caption_losses).abs().max() > 1e-2


@KINDS
def test_second_captions_are_foretold_in_micro_batches(kind: Any, shards: Path, tmp_path: Path) -> None:
    keys = tree(folder(tmp_path / "lm", kind()))
    loop.train(recipe(shards, tmp_path / "first", keys))
    loop.train(recipe(shards, tmp_path / "whole", keys, **second(shards)))
    loop.train(recipe(shards, tmp_path / "parts", keys, micro_batch=3, **second(shards)))
    assert column(tmp_path / "whole", "caption")[0] == pytest.approx(column(tmp_path / "first", "caption")[0], abs=1e-5)
    assert abs(column(tmp_path / "whole", "contrastive")[0] - column(tmp_path / "first", "contrastive")[0]) > 1e-3
    for name in ("total", "caption"):
        torch.testing.assert_close(
            column(tmp_path / "parts", name), column(tmp_path / "whole", name), atol=1e-4, rtol=1e-4
        )


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("other", [False, True], ids=["first", "second"])
@KINDS
@pytest.mark.parametrize(
    ("configuration", "options"),
    [
        ("cpu", ()),
        ("cpu_fsdp2", ()),
        ("cpu_zero", ("--deepspeed_config_file", "configs/deepspeed/zero3.json")),
    ],
    ids=["ddp", "fsdp2", "zero3"],
)
def test_two_processes_train_like_one(
    kind: Any,
    other: bool,
    configuration: str,
    options: tuple[str, ...],
    shards: Path,
    tmp_path: Path,
    launch: Any,
) -> None:
    keys, changes = tree(folder(tmp_path / "lm", kind())), second(shards) if other else {}
    loop.train(recipe(shards, tmp_path / "one", keys, **changes))
    (tmp_path / "two.yaml").write_text(dump(recipe(shards, tmp_path / "two", keys, **changes)))
    launch(tmp_path / "two.yaml", configuration, *options)
    for name in ("total", "caption"):
        torch.testing.assert_close(column(tmp_path / "two", name), column(tmp_path / "one", name), atol=1e-4, rtol=1e-4)


# --- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"prefix_tokens": -1}, "prefix_tokens must be at least 0, not -1"),
        ({"context_length": 3, "template": "a red {} in snow"}, "3 tokens have no room for a caption"),
        ({"context_length": 30}, "captions cannot have 30 tokens behind 3 of the picture, at most 29"),
    ],
)
def test_wrong_settings_are_one_line(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build(folder(tmp_path / "lm", llama()), towers=keys)
    assert "\n" not in str(caught.value)


def test_what_foretells_no_words_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="logits of 'gemma2' are more than states times a matrix"):
        build(folder(tmp_path / "gemma", gemma()))
    headless = folder(tmp_path / "headless", llama().model)
    with pytest.raises(CheckpointError, match=r"1 weights are absent, lm_head\.weight the first"):
        build(headless)
    folder(tmp_path / "lm", llama())
    with pytest.raises(ConfigError, match="nothing in the objective teaches text_decoder"):
        loop.train(recipe(shards, tmp_path / "run", tree(tmp_path / "lm"), objective={}))
