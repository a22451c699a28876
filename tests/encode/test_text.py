"""Class names and templates to prototypes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from transclip_fast.encode.text import ClassPrompts, class_names, encode_text, templates
from transclip_fast.errors import InputError


def test_known_templates_and_names():
    assert len(templates("openai")("cat")) == 80
    assert len(templates("simple")("cat")) == 7
    assert all("cat" in prompt for prompt in templates("simple")("cat"))
    assert len(class_names("imagenet")) == 1000


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


def test_no_names(tmp_path):
    (tmp_path / "names.txt").write_text("\n \n")
    with pytest.raises(InputError, match="holds no class names"):
        class_names(str(tmp_path / "names.txt"))
