"""Synsets go to the classes that have their names, whatever the order of the list."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
from timm.data.imagenet_info import ImageNetInfo

from transclip_fast.data.synsets import imagenet_synsets, synset_positions

ORDER = imagenet_synsets()
WORDNET = ImageNetInfo("imagenet-1k").label_descriptions()
LISTS = {
    "open_clip": list(open_clip.IMAGENET_CLASSNAMES),
    "WordNet": WORDNET,
    "first name": [names.split(",")[0].replace(" ", "_") for names in WORDNET],
}


def test_the_order_is_that_of_the_labels():
    assert ORDER[0] == "n01440764"
    assert ORDER[-1] == "n15075141"  # toilet tissue
    assert len(ORDER) == len(set(ORDER)) == 1000


@pytest.mark.parametrize("names", LISTS.values(), ids=LISTS)
def test_in_the_order_of_imagenet(names):
    assert synset_positions(ORDER, names) == {synset: k for k, synset in enumerate(ORDER)}


@pytest.mark.parametrize("names", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("kept", [1000, 100])
def test_in_another_order(names, kept):
    chosen = np.random.default_rng(0).permutation(1000)[:kept]
    subset = [names[k] for k in chosen]
    found = synset_positions([ORDER[k] for k in chosen], subset)
    wrong = {s: k for s, k in found.items() if k is not None and ORDER[chosen[k]] != s}
    assert wrong == {}
    assert list(found.values()).count(None) <= kept // 80  # names that two classes have


def test_two_classes_that_were_swapped():
    names = list(LISTS["open_clip"])
    names[3], names[700] = names[700], names[3]
    found = synset_positions(ORDER, names)
    assert (found[ORDER[3]], found[ORDER[700]]) == (700, 3)


def test_names_that_nobody_knows():
    found = synset_positions(ORDER[:3], [f"class {k}" for k in range(1000)])
    assert set(found.values()) == {None}


def test_some_unknown_names_in_the_order_of_imagenet():
    names = [f"class {k}" if k % 4 == 1 else name for k, name in enumerate(LISTS["open_clip"])]
    assert synset_positions(ORDER, names) == {synset: k for k, synset in enumerate(ORDER)}
    by_name = sorted(names)
    found = synset_positions(ORDER[:2], by_name)
    assert found == {ORDER[0]: by_name.index("tench"), ORDER[1]: None}


def test_one_name_is_not_for_two_synsets():
    cranes = ["n02012849", "n03126707"]  # the bird and the machine
    assert synset_positions(cranes, ["crane", "dog"]) == dict.fromkeys(cranes)
    assert synset_positions(cranes[:1], ["crane", "dog"]) == {cranes[0]: 0}
    assert synset_positions(["n99999999"], ["crane"]) == {"n99999999": None}
