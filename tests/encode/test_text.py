"""Class names and templates to prototypes."""

from __future__ import annotations

import json
import unicodedata
import warnings

import numpy as np
import open_clip
import pytest
import torch

from transclip_fast.encode.text import ClassPrompts, encode_text, templates
from transclip_fast.errors import InputError


def test_known_templates():
    assert len(templates("openai")("cat")) == 80
    assert len(templates("simple")("cat")) == 7
    assert all("cat" in prompt for prompt in templates("simple")("cat"))


def test_templates_from_a_file(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {}.\n\nthe {c}, {c}\n")
    assert templates(str(file))("cat") == ["a photo of a cat.", "the cat, cat"]


def test_prompts_written_out(tmp_path):
    file = tmp_path / "cupl.json"
    file.write_text(json.dumps({"cat": ["a cat purrs", "a cat"], "dog": ["a dog"]}))
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    text = ClassPrompts.read(str(tmp_path / "names.txt"), str(file))
    assert text.names == ["dog", "cat"]
    assert text.prompts == [["a dog"], ["a cat purrs", "a cat"]]


def test_prototypes_are_unit_means_of_unit_embeddings(backbone):
    text = ClassPrompts(["a", "b"], [["x", "yy", "z"], ["w"]], "here")
    prototypes = encode_text(backbone, text)
    weights = backbone.model.text.detach().double().numpy()

    def embed(prompt):
        row = sum(weights[ord(c)] for c in prompt.ljust(2, "\0"))
        return row / np.linalg.norm(row)

    expected = np.stack([np.mean([embed(p) for p in of_class], 0) for of_class in text.prompts])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(prototypes, expected, atol=1e-6)


def test_identity_follows_the_prompts():
    same = ClassPrompts(["a"], [["x"]], "file").identity()
    assert ClassPrompts(["a"], [["x"]], "file").identity() == same
    assert ClassPrompts(["a"], [["y"]], "file").identity() != same


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", "a photo of a {}\na photo\n", "line 2 has no {} for the class name"),
        ("t.txt", "\n", "holds no templates"),
        ("t.json", "{", "is not JSON"),
        ("t.json", "[]", "expected an object"),
        ("t.json", '{"dog": ["x"]}', "no list of prompts for class 'cat'"),
        ("t.json", '{"cat": []}', "no list of prompts for class 'cat'"),
        ("t.json", '{"cat": ["a cat", " "]}', "has an empty prompt for class 'cat'; take it out"),
        ("t.json", '{"cat": ["a {}."]}', r"has braces in a prompt of class 'cat' \('a \{\}.'\)"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_bad_templates(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(InputError, match=message) as error:
        ClassPrompts.read(str(tmp_path / "names.txt"), str(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lambda c: f'a photo of a {c}.'", "is code"),
        ("lambda c: f'a photo of a {c}.',", "is code"),
        ("f'a photo of a {c}.'", "is code"),
        ("['a photo of a {}.', 'a {}.']", "is code"),
        ("templates = [lambda c: f'a {c}.']", "is code"),
        ("'a photo of a {}.',", "has a mark of lists or tables"),
        ("a photo of a {}.,", "has a mark of lists or tables"),
        ("- a photo of a {}.", "has a mark of lists or tables"),
        ('"a photo of a {}."', "is in quotes"),
        ("# of {}", "begins as a comment does ('# of {}') and is a template; take it out if it"),
        ("# general", "begins as a comment does ('# general') and is a template"),
        ("a {} in {place}", "has other braces than {} and {c} ('a {} in {place}'), which go into"),
        ("a \t{}", "has characters that do not show, or a tab"),
        ("a {}\u2028the {}", "has characters that do not show, or a tab"),
        ("a {}\x0cthe {}", "has characters that do not show, or a tab"),
    ],
)
def test_what_is_no_template_is_refused(line, message, tmp_path):
    file = tmp_path / "t.txt"
    file.write_text(f"the {{}}.\n\n{line}\n")
    with pytest.raises(InputError) as error:
        templates(str(file))
    assert str(error.value).startswith(f"{file}: line 3 {message}")
    assert "\n" not in str(error.value)


def test_numbered_templates_are_refused(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("1. a photo of a {}.\n2. a {}.\n")
    with pytest.raises(InputError, match="each line begins with another number"):
        templates(str(file))


def test_templates_that_are_not_odd(tmp_path):
    file = tmp_path / "t.txt"
    lines = ["{}", "3D {c}!", "{}: a kind of bird", "(a {})", "full-size {}", "a 'real' {}"]
    file.write_text("\n".join(lines))
    assert templates(str(file))("cat") == [
        "cat",
        "3D cat!",
        "cat: a kind of bird",
        "(a cat)",
        "full-size cat",
        "a 'real' cat",
    ]


def test_prompts_go_to_the_same_name(tmp_path):
    file = tmp_path / "cupl.json"
    decomposed = unicodedata.normalize("NFD", "Crème_Brûlée")
    file.write_text(json.dumps({decomposed: ["a dessert"], "dog": ["a dog"], "Dog": ["another"]}))
    with pytest.warns(UserWarning, match="not in the list") as warned:
        assert ClassPrompts.read(["crème brûlée"], str(file)).prompts == [["a dessert"]]
    assert [str(warning.message) for warning in warned] == [
        f"{file}: has prompts of classes that are not in the list, and are not used: 2 (dog, Dog)"
    ]
    with pytest.raises(
        InputError, match=r"cupl\.json: has several lists of prompts for class 'dog'"
    ):
        ClassPrompts.read(["dog"], str(file))


def test_doubtful_names(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("polar_bear\ncrane\ndog\nCrane\nblue_jay\n")
    with pytest.warns(UserWarning, match="names.txt") as warned:
        ClassPrompts.read(str(file), "simple")
    assert [str(warning.message) for warning in warned] == [
        f"{file}: line 1 has '_' ('polar_bear'), which goes into the prompts, as 1 more do; write "
        "spaces",
        f"{file}: line 4 has the name of line 2 ('Crane'); rename it or take it out: it gets "
        "no images",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("# birds", "begins as a comment does ('# birds') and is a class; take it out if it is"),
        ("// birds", "begins as a comment does ('// birds') and is a class; take it out if it is"),
        ("a {} owl", "has the braces of a template ('a {} owl'), which go into the prompts; take"),
        ("owl,", "has a mark of lists or tables ('owl,'), which goes into the prompts; take it"),
        ("- owl", "has a mark of lists or tables ('- owl'), which goes into the prompts; take it"),
        ('"owl"', "is in quotes ('\"owl\"'), which go into the prompts; take them off"),
        ("owl\tbird of prey", r"has characters that do not show, or a tab ('owl\tbird of prey'), "),
        ("owl\u200b", r"has characters that do not show, or a tab ('owl\u200b'), which go into"),
        ("\ufeffowl", r"has characters that do not show, or a tab ('\ufeffowl'), which go into"),
    ],
)
def test_odd_names(name, message):
    with pytest.warns(UserWarning, match="class names") as warned:
        found = ClassPrompts.read(["hawk", name], "simple")
    assert found.names[1] == name
    assert len(warned) == 1
    assert str(warned[0].message).startswith(f"class names: class 1 {message}")


def test_names_that_are_not_odd(recwarn):
    names = ["rock 'n' roll", "C#", "नमस्ते", "क्\u200dष", "cafe\u0301", '5" disk', "日本"]
    assert ClassPrompts.read(names, "simple").names == names
    assert not recwarn.list


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["id,name", "0,cat"], "class 0 ('id,name') looks like a header and is the first class"),
        (["Name", "cat"], "class 0 ('Name') looks like a header and is the first class"),
        (["5 cat", "7 dog"], "all names begin with another number ('5 cat'), which goes into"),
        (["1- cat", "2- dog"], "all names begin with another number ('1- cat'), which goes into"),
        (["/a/airfield 0", "/a/alley 1"], "all names end with another number ('/a/airfield 0'),"),
    ],
)
def test_what_seems_to_be_no_list_of_names(names, message):
    with pytest.warns(UserWarning, match="class names") as warned:
        assert ClassPrompts.read(names, "simple").names == names
    assert len(warned) == 1
    assert message in str(warned[0].message)


@pytest.mark.parametrize(
    "names", [["Audi S5 2012", "BMW M3 2012"], ["7 up", "cola"], ["number", "letter"], ["id"]]
)
def test_lists_that_are_not_odd(names, recwarn):
    ClassPrompts.read(names, "simple")
    assert not recwarn.list


def test_names_of_a_list_are_checked_too():
    with pytest.raises(InputError, match="class names: class 1 is empty"):
        ClassPrompts.read(["cat", " "], "simple")


def test_equal_prompts(tmp_path):
    file = tmp_path / "cupl.json"
    file.write_text(json.dumps({"cat": ["A pet", "x"], "car": ["a car"], "dog": ["x", "a  pet"]}))
    with pytest.warns(UserWarning, match="class names") as warned:
        ClassPrompts.read(["cat", "car", "dog"], str(file))
    assert [str(warning.message) for warning in warned] == [
        "class names: class 2 ('dog') has the prompts of class 0 ('cat'); such classes cannot be "
        "told apart"
    ]


def test_classes_that_the_tokenizer_makes_equal(backbone):
    names = ["its", "it's", "it\u2019s", "b&amp;b", "b&b"]
    read = open_clip.get_tokenizer("ViT-B-32")
    backbone.model.text = torch.nn.Parameter(torch.rand(read.vocab_size, 5))
    backbone.tokenizer = lambda texts: read(texts, context_length=9)
    text = ClassPrompts.read(names, "simple")
    with pytest.warns(UserWarning, match="tokens of class") as warned:
        prototypes = encode_text(backbone, text)
    assert [str(warning.message) for warning in warned] == [
        "class 2 ('it\u2019s') has the tokens of class 1 (\"it's\"), as 1 more do; such classes "
        "cannot be told apart"
    ]
    np.testing.assert_allclose(prototypes[[1, 3]], prototypes[[2, 4]], atol=1e-6)
    others = ClassPrompts(names, [[f"a {name}", str(k)] for k, name in enumerate(names)], "here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_text(backbone, others)  # equal in their first prompt alone
