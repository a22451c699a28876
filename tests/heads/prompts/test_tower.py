"""A prompt whose vectors are those of words is the prompt of these words, in every tower."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.heads.prompts.conftest import NAMES, TOWERS, WRITTEN, tiny
from transclip_fast.errors import InputError
from transclip_fast.heads import text_tower as tower_module
from transclip_fast.heads.prompting import POSITIONS
from transclip_fast.heads.prompts import ContextSettings, Prompting
from transclip_fast.heads.prompts.context import (
    class_prompts,
    first_context,
    nearest_words,
)

START = "a photo of the"


def by_the_tower_itself(tower, texts):
    with torch.no_grad():
        tokens = tower.backbone.tokenizer(texts)
        return F.normalize(tower.backbone.model.encode_text(tokens), dim=1)


def prompted(tower, position="end", names=NAMES, start=START):
    """Prompts around the words of `start`, and their vectors."""
    context = first_context(tower, ContextSettings(start=start), len(names), 0)
    return class_prompts(tower, names, len(context), position), context


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("position", POSITIONS)
def test_words_as_vectors(name, position):
    tower = tiny(name)
    written = WRITTEN[position]
    expected = by_the_tower_itself(tower, [written.format(name) for name in NAMES])
    found = tower.encode(*prompted(tower, position))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    cosines = expected @ expected.T
    assert cosines.fill_diagonal_(-1).max() < 1 - 1e-4  # or any prompt would do


@pytest.mark.parametrize("name", TOWERS)
def test_vectors_reach_the_embedding(name):
    tower = tiny(name)
    prompts, context = prompted(tower)
    changed = tower.encode(prompts, context.flip(0))
    assert (changed - tower.encode(prompts, context)).abs().max() > 1e-4


def test_prompts_are_cut_behind_their_ends_where_nothing_reads_there():
    def length(name):
        return prompted(tiny(name))[0].tokens.shape[1]

    # Start, four words, three of a name, a full stop, end: 10 of 16.
    assert {length(name) for name in ("ViT-B-32", "EVA02-B-16", "ViT-H-14-worldwide")} == {10}
    others = ("coca_ViT-B-32", "ViT-B-16-SigLIP", "ViT-H-14-CLIPA", "MobileCLIP-S1")
    assert {length(name) for name in others} == {16}


@pytest.mark.parametrize("pooling", ["first", "last"])
def test_poolings_that_no_model_has_behind_a_causal_mask(pooling):
    tower = tiny(pool_type=pooling)
    prompts, context = prompted(tower)
    expected = by_the_tower_itself(tower, [f"a photo of the {name}." for name in NAMES])
    torch.testing.assert_close(tower.encode(prompts, context), expected, atol=2e-6, rtol=0)


def test_contexts_of_their_own(tower):
    prompts, context = prompted(tower)
    draw = torch.Generator().manual_seed(1)
    each = context + torch.randn(len(NAMES), *context.shape, generator=draw)
    found = tower.encode(prompts, each)
    for k in range(len(NAMES)):
        one = prompts.rows(torch.tensor([k]))
        torch.testing.assert_close(found[k : k + 1], tower.encode(one, each[k]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("each", [False, True])
def test_chunks_change_nothing(tower, each, monkeypatch):
    prompts, context = prompted(tower)
    context = context.repeat(len(NAMES), 1, 1) if each else context
    weights = torch.randn(len(NAMES), 12, generator=torch.Generator().manual_seed(1))

    def gradient():
        leaf = context.clone().requires_grad_()
        value = (tower.encode(prompts, leaf) * weights).sum()
        return value.detach(), *torch.autograd.grad(value, leaf)

    whole = gradient()
    monkeypatch.setattr(tower_module, "ACTIVATION_BYTES", 1)
    assert tower.chunk(prompts.tokens.shape[1]) == 1
    torch.testing.assert_close(gradient(), whole)


def test_a_chunk_is_as_large_as_its_activations_allow(tower, monkeypatch):
    """Memory that autograd saves for n prompts grows by the size that `chunk` assumes."""
    length = prompted(tower)[0].tokens.shape[1]
    a_row = tower_module.ACTIVATION_BYTES // tower.chunk(length)
    kept = [tower._saved_bytes(rows, length) for rows in (5, 25)]
    assert (kept[1] - kept[0]) / 20 == pytest.approx(a_row, rel=0.1)


def test_many_prompts_keep_the_activations_of_none(tower, monkeypatch):
    names = [f"{a} {b}" for a in NAMES for b in NAMES] * 4
    prompts, context = prompted(tower, names=names)
    saved = []

    def note(tensor):
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    def bytes_of_a_pass():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            tower.encode(prompts, context.clone().requires_grad_())
        return sum(saved)

    whole = bytes_of_a_pass()
    row = tower_module.ACTIVATION_BYTES // tower.chunk(prompts.tokens.shape[1])
    monkeypatch.setattr(tower_module, "ACTIVATION_BYTES", 8 * row)
    assert bytes_of_a_pass() < whole / 20


def test_bfloat16_products_on_request(tower):
    prompts, context = prompted(tower)
    exact = tower.encode(prompts, context)
    tower.precision = "bf16"
    mixed = tower.encode(prompts, context)
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - exact).abs().max() < 0.05


def test_the_tower_is_as_before_afterwards(tower):
    model, texts = tower.backbone.model, ["a photo of a cat."]
    before = by_the_tower_itself(tower, texts)
    prompts, context = prompted(tower)
    tower.encode(prompts, context.requires_grad_()).sum().backward()
    with pytest.raises(IndexError):
        tower.encode(type(prompts)(prompts.tokens, prompts.places + 90), context)
    assert torch.equal(by_the_tower_itself(tower, texts), before)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("position", "places"), [("end", 0), ("middle", 2), ("front", 4)])
def test_places_around_names_of_any_length(tower, position, places):
    prompts, _ = prompted(tower, position)
    encode = tower.backbone.tokenizer.encode
    (words,) = [encode("a a a a")]
    for k, name in enumerate(NAMES):
        named, row = encode(name), prompts.tokens[k].tolist()
        before = {"end": 4, "middle": 2, "front": 0}[position]
        assert row[1 + before : 1 + before + len(named)] == named
        columns = [c for c in range(1, 1 + 4 + len(named)) if not 0 <= c - 1 - before < len(named)]
        assert prompts.places[k].tolist() == columns
        assert [row[c] for c in columns] == words


def test_underscores_are_blanks(tower):
    assert torch.equal(
        class_prompts(tower, ["red_fox"], 4, "end").tokens,
        class_prompts(tower, ["red fox"], 4, "end").tokens,
    )


def test_a_prompt_may_be_as_long_as_the_tower_reads(tower):
    assert class_prompts(tower, ["cat"], 12, "end").tokens.shape == (1, 16)
    expected = "class 'cat': its prompt has 15 tokens with 13 of context, the model reads 14"
    with pytest.raises(InputError, match=expected):
        class_prompts(tower, ["cat"], 13, "end")
    with pytest.raises(InputError, match="the model reads 14"):
        class_prompts(tower, ["cat " * 40], 4, "end")


def test_random_starts(tower):
    shared = first_context(tower, ContextSettings(n_ctx=5), 3, 7)
    each = first_context(tower, ContextSettings(n_ctx=400, class_specific=True), 3, 7)
    assert (shared.shape, each.shape) == ((5, 16), (3, 400, 16))
    assert each.std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(shared, first_context(tower, ContextSettings(n_ctx=5), 3, 7))
    assert not torch.equal(shared, first_context(tower, ContextSettings(n_ctx=5), 3, 8))


def test_worded_starts(tower):
    settings = ContextSettings(start="a photo", class_specific=True)
    tokens = torch.tensor(tower.backbone.tokenizer.encode("a photo"))
    vectors = tower.embedding.weight[tokens]
    assert torch.equal(first_context(tower, settings, 3, 0), vectors.repeat(3, 1, 1))
    with pytest.raises(InputError, match="start '': holds no words"):
        first_context(tower, ContextSettings(start=""), 3, 0)


def test_nearest_words(tower):
    words = ["tree", "photo", "fox"]
    tokens = torch.tensor([tower.backbone.tokenizer.encode(word)[0] for word in words])
    vectors = tower.embedding.weight[tokens]
    draw = torch.Generator().manual_seed(0)
    near = vectors + 0.2 * vectors.std() * torch.randn(vectors.shape, generator=draw)
    assert nearest_words(tower, near) == words
    assert nearest_words(tower, near.repeat(2, 1, 1)) == words * 2
    # By hand, over the whole vocabulary but the marks of start, end and padding.
    far = torch.randn(3, 16, generator=draw)
    distances = (far[:, None] - tower.embedding.weight).square().sum(2)
    distances[:, [0, *tower.backbone.tokenizer.all_special_ids]] = torch.inf
    decode = tower.backbone.tokenizer.decode
    assert nearest_words(tower, far) == [decode([int(k)]).strip() for k in distances.argmin(1)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"position": "back"}, "choose one of end, middle, front"), ({"n_ctx": 0}, "at least one")],
)
def test_settings_that_make_no_sense(settings, expected):
    with pytest.raises(InputError, match=expected):
        Prompting(None, NAMES, ContextSettings(**settings)).check(len(NAMES))
