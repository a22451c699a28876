"""`convert`: checkpoints of every form to one file, tensor by tensor."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.encode.plain_eva import embeddings, made_checkpoint, register_tiny
from transclip_fast.cli.convert import command
from transclip_fast.encode import eva
from transclip_fast.encode.models import load_backbone
from transclip_fast.encode.networks import match_weights
from transclip_fast.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The name of a registered EVA-CLIP of small sizes."""
    return register_tiny(tmp_path_factory.mktemp("configs"), post_norm=False)


@pytest.fixture(scope="module")
def weights():
    return made_checkpoint()


@pytest.mark.parametrize("kind", ["safetensors", "pt", "bin index", "safetensors index"])
def test_convert(tiny, weights, tmp_path, succeeds, kind):
    checkpoint = tmp_path / "official.pt"
    if kind == "safetensors":
        checkpoint = tmp_path / "official.safetensors"
        save_file(weights, checkpoint)
    elif kind == "pt":
        torch.save({"module": weights, "epoch": 3}, checkpoint)
    else:
        suffix = kind.split()[0]
        checkpoint = tmp_path / f"model.{suffix}.index.json"
        names = sorted(weights)
        files = {n: f"part-{i % 2}.{suffix}" for i, n in enumerate(names)}
        checkpoint.write_text(json.dumps({"weight_map": files}))
        for file in set(files.values()):
            part = {n: weights[n] for n in names if files[n] == file}
            (save_file if suffix == "safetensors" else torch.save)(part, tmp_path / file)
    out = tmp_path / "new" / "tiny.safetensors"
    summary = json.loads(succeeds("convert", checkpoint, "--model", tiny, "--out", out, "--json"))
    written = load_file(out)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert summary["n_parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert summary["bytes"] == out.stat().st_size
    for official, tensor in weights.items():
        torch.testing.assert_close(
            written[eva.open_clip_name(official)], tensor.bfloat16(), atol=0, rtol=0
        )
    assert sorted(file.name for file in out.parent.iterdir()) == ["tiny.safetensors"]
    images, tokens = torch.zeros(1, 3, 28, 28), torch.ones(1, 77, dtype=torch.int64)
    first = embeddings(load_backbone(tiny, str(checkpoint), CPU, "bf16"), images.bfloat16(), tokens)
    again = embeddings(load_backbone(tiny, str(out), CPU, "bf16"), images.bfloat16(), tokens)
    assert torch.equal(first[0], again[0])
    assert first[0].dtype == torch.bfloat16
    # Norms of the text tower are kept in float32 of what the file has: bf16 after conversion.
    torch.testing.assert_close(first[1], again[1], atol=0.05, rtol=0.05)


def test_a_pickle_is_refused(tiny, weights, tmp_path, refused):
    class Evil:
        def __reduce__(self):
            return print, ("unpickled",)

    torch.save({"state_dict": weights, "config": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}))
    for name in ("evil.pt", "plain.pt"):
        message = refused(
            "convert", tmp_path / name, "--model", tiny, "--out", tmp_path / "out.safetensors"
        )
        assert f"{name}: damaged, or holds" in message
        assert "pickled Python objects" in message


def test_convert_refuses(weights, tmp_path, refused):
    save_file(weights, tmp_path / "official.safetensors")
    checkpoint = tmp_path / "official.safetensors"
    out = tmp_path / "out.safetensors"
    assert "in other shapes" in refused(
        "convert", checkpoint, "--model", "EVA-CLIP-8B", "--out", out
    )
    assert "no such file" in refused("convert", tmp_path / "a.pt", "--model", "RN50", "--out", out)
    assert "unknown model 'EVA-CLIP-9B'; nearest: EVA-CLIP-8B" in refused(
        "convert", checkpoint, "--model", "EVA-CLIP-9B", "--out", out
    )
    assert "ends in .safetensors" in refused(
        "convert", checkpoint, "--model", "EVA-CLIP-8B", "--out", tmp_path / "out.pt"
    )


def test_only_a_converted_checkpoint_is_replaced(tiny, weights, tmp_path, refused, succeeds):
    """Not the checkpoint, by any of its names, nor other tensors."""
    checkpoint, out = tmp_path / "official.safetensors", tmp_path / "out.safetensors"
    save_file(weights, checkpoint)
    (tmp_path / "link.safetensors").symlink_to(checkpoint)
    save_file({"image_features": torch.eye(3)}, tmp_path / "features.safetensors")
    command = "convert", checkpoint, "--model", tiny, "--out"
    for name in ("official", "link"):
        message = refused(*command, tmp_path / f"{name}.safetensors")
        assert f"{name}.safetensors: is the checkpoint itself; name another file" in message
    message = refused(*command, tmp_path / "features.safetensors")
    assert "features.safetensors: is there and is no converted checkpoint" in message
    succeeds(*command, out)
    first = out.read_bytes()
    succeeds(*command, out)
    assert out.read_bytes() == first
    again = "convert", out, "--model", tiny, "--dtype", "fp16", "--out", out
    assert "is the checkpoint itself" in refused(*again)


@pytest.mark.parametrize("change", ["written", "cut"])
def test_a_checkpoint_that_changes_is_refused(change, tiny, weights, tmp_path, monkeypatch):
    file = tmp_path / "official.safetensors"
    save_file(weights, file)

    def then_changed(*arguments):
        found = match_weights(*arguments)
        if change == "cut":
            os.truncate(file, 0)
        else:
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return found

    monkeypatch.setattr("transclip_fast.cli.convert.match_weights", then_changed)
    out = tmp_path / "new/out.safetensors"
    arguments = [file, "--model", tiny, "--out", out]
    with pytest.raises(InputError, match="official.safetensors: changed while it was in use"):
        command.main([*map(str, arguments)], standalone_mode=False)
    assert not list(out.parent.iterdir())


def test_a_damaged_record_is_refused(tiny, weights, tmp_path, refused):
    """Torch does not check the checksums in its archives."""
    torch.save(weights, tmp_path / "official.pt")
    content = bytearray((tmp_path / "official.pt").read_bytes())
    largest = max(weights.values(), key=torch.numel)
    content[content.index(largest.numpy().tobytes()[:64]) + 6] ^= 1
    (tmp_path / "official.pt").write_bytes(content)
    command = "convert", tmp_path / "official.pt", "--model", tiny
    assert "is damaged" in refused(*command, "--out", tmp_path / "tiny.safetensors")


def test_complex_weights_are_refused(tiny, weights, tmp_path, refused):
    name = next(iter(weights))
    torch.save({**weights, name: weights[name].to(torch.complex64)}, tmp_path / "official.pt")
    command = "convert", tmp_path / "official.pt", "--model", tiny
    assert "torch.complex64" in refused(*command, "--out", tmp_path / "tiny.safetensors")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "../up.bin", "/dev/zero", ""])
def test_parts_that_an_index_should_not_name(name, tiny, tmp_path, refused):
    (tmp_path / "w.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    command = "convert", tmp_path / "w.index.json", "--model", tiny
    assert str(tmp_path) in refused(*command, "--out", tmp_path / "tiny.safetensors")
