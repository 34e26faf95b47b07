"""Weights that are not the model's: each kind is refused, and what is at fault is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wispprof.engines.loading import load_model, random_model
from wispprof.engines.model_shapes import PRESETS
from wispprof.engines.model_weights import weights_digest
from wispprof.engines.tensor_parallel import Ranks
from wispprof.errors import ModelError

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A model with an output head of its own, and one whose head is tied, by ``tied``."""
    made = {}
    for tied in (False, True):
        made[tied] = tmp_path_factory.mktemp("model")
        config = {**PRESETS["tiny-qwen3"], "tie_word_embeddings": tied}
        random_model(config, seed=2, device="cpu").model.save_pretrained(made[tied])
    return made


def copy(source: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    file = target / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return target


def without(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(prefix)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n.replace(old, new, 1): t for n, t in tensors.items()}


def plus(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {n.replace("__", "."): t for n, t in more.items()}


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name])}


def poisoned(place: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        spoiled = tensor.clone()
        spoiled.view(-1)[place] = value
        return spoiled

    return change


Q = LAYER + "self_attn.q_proj.weight"
CORRUPTIONS = {
    "no head": (False, without("lm_head"), r"needs lm_head\.weight"),
    "no embedding": (False, without("model.embed"), r"needs model\.embed_tokens\.weight"),
    "no tied embedding": (True, without("model.embed"), r"needs model\.embed_tokens\.weight"),
    "no layer": (False, without(LAYER), r"needs model\.layers\.1\..* and 7 more"),
    "no projection": (False, without(Q), r"needs model\.layers\.1\.self_attn\.q_proj\.weight"),
    "no norm": (False, without("model.norm"), r"needs model\.norm\.weight"),
    "other prefix": (False, renamed("model.", "transformer."), r"hold transformer\..*"),
    "one layer more": (
        False,
        lambda t: t | {n.replace("s.1.", "s.2."): v.clone() for n, v in t.items() if ".1." in n},
        r"hold model\.layers\.2\.",
    ),
    "a bias more": (False, plus(lm_head__bias=torch.ones(96)), r"hold lm_head\.bias"),
    "an adapter": (False, plus(lora_A=torch.ones(2, 2)), "hold lora_A"),
    "other shape": (
        False,
        put(Q, lambda t: t[:40].clone()),
        r"q_proj\.weight \(40, 48\) instead of \(48, 48\)",
    ),
    "transposed": (
        False,
        put(LAYER + "mlp.up_proj.weight", lambda t: t.T.contiguous()),
        r"\(48, 80\) instead of \(80, 48\)",
    ),
    "packed": (False, put(Q, lambda t: t.to(torch.int8)), "stores weights as I8"),
    "other tied head": (True, plus(lm_head__weight=torch.ones(96, 48)), "different lm_head"),
    "NaN": (False, put(Q, poisoned(1234, torch.nan)), r"not finite: model\.layers\.1\.self_attn\.q_proj"),
    "infinite": (True, put("model.norm.weight", poisoned(47, torch.inf)), r"not finite: model\.norm"),
    "minus infinity": (False, put("lm_head.weight", poisoned(-1, -torch.inf)), r"not finite: lm_head"),
}


@pytest.mark.parametrize("ranks", [None, Ranks(1, 2, torch.device("cpu"), None)], ids=["whole", "rank"])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_wrong_weights_are_refused_by_name(
    kind: str, ranks: Ranks | None, folders: dict[bool, Path], tmp_path: Path
) -> None:
    tied, change, message = CORRUPTIONS[kind]
    folder = copy(folders[tied], tmp_path, change)
    with pytest.raises(ModelError, match=message):
        load_model(folder, device="cpu", ranks=ranks)


@pytest.mark.parametrize("tied", [False, True])
def test_harmless_extras_load_and_change_nothing(
    tied: bool, folders: dict[bool, Path], tmp_path: Path
) -> None:
    whole = load_model(folders[tied], device="cpu").model

    def extras(tensors: Tensors) -> Tensors:
        more = {LAYER + "self_attn.rotary_emb.inv_freq": torch.ones(4)}
        if tied:
            more["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        return tensors | more

    loaded = load_model(copy(folders[tied], tmp_path, extras), device="cpu")
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == tied
    for (name, a), (_, b) in zip(whole.named_parameters(), loaded.model.named_parameters(), strict=True):
        assert a.equal(b), name


def test_float16_that_overflows_is_refused(folders: dict[bool, Path], tmp_path: Path) -> None:
    folder = copy(folders[True], tmp_path, put("model.norm.weight", poisoned(3, 1e6)))
    load_model(folder, "bfloat16", device="cpu")
    with pytest.raises(ModelError, match=r"norm\.weight.*bfloat16"):
        load_model(folder, "float16", device="cpu")


def shard(folder: Path) -> None:
    """Two files and their index, as large models have."""
    file = folder / "model.safetensors"
    tensors = sorted(load_file(file).items())
    names = {}
    for number, part in enumerate((tensors[:9], tensors[9:])):
        name = f"model-{number}.safetensors"
        save_file(dict(part), folder / name, {"format": "pt"})
        names.update({n: name for n, _ in part})
    file.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize("ranks", [None, Ranks(0, 2, torch.device("cpu"), None)], ids=["whole", "rank"])
def test_shards(ranks: Ranks | None, folders: dict[bool, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders[False], tmp_path / "m"))
    shard(folder)
    # A second copy of the weights, as Mistral's repositories hold, is not looked at.
    (folder / "consolidated.safetensors").write_bytes(b"torn")
    load_model(folder, device="cpu", ranks=ranks)
    second = folder / "model-1.safetensors"
    whole = second.read_bytes()
    for torn, message in (
        (whole[:-5], "model-1.safetensors: it is torn"),
        (whole[:20], "torn"),
        (b"", "torn"),
        (b"\xff" * 64, "torn"),
        (len(b"[1]     ").to_bytes(8, "little") + b"[1]     ", "AttributeError"),
        (
            (folder / "model-0.safetensors").read_bytes(),
            "is in model-0.safetensors and in model-1.safetensors",
        ),
    ):
        second.write_bytes(torn)
        with pytest.raises(ModelError, match=message) as caught:
            load_model(folder, device="cpu", ranks=ranks)
        assert "\n" not in str(caught.value)
    second.unlink()
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing \(model-1"):
        load_model(folder, device="cpu", ranks=ranks)
    for index in ("{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ModelError, match="cannot be read"):
            load_model(folder, device="cpu", ranks=ranks)


# --- digest -----------------------------------------------------------------------------------------


def digests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """All bytes; samples, as of a large model."""
    files = [folder / "model.safetensors"]
    whole = weights_digest(files, full=True)
    assert whole == weights_digest(files)
    with monkeypatch.context() as patch:
        patch.setattr("wispprof.engines.model_weights._MAX_FULLY_HASHED", 0)
        assert weights_digest(files, full=True) == whole
        sampled = weights_digest(files)
    return whole, sampled


def test_the_digest_knows_every_tensor(
    folders: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {digests(folders[False], monkeypatch)}
    duplicate = copy(folders[False], tmp_path / "duplicate", lambda tensors: tensors)
    assert digests(duplicate, monkeypatch) in seen
    names = list(load_file(folders[False] / "model.safetensors"))
    for number, name in enumerate(names):
        changed = copy(folders[False], tmp_path / str(number), put(name, lambda t: t * 1.01))
        found = digests(changed, monkeypatch)
        assert all(a not in pair for a in found for pair in seen), name
        seen.add(found)


def test_samples_are_few_bytes_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: dict[str, Any] = {f"layer.{i}": torch.randn(512, 512) for i in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    whole, sampled = digests(tmp_path, monkeypatch)
    tensors["layer.2"].view(-1)[3000] += 1.0  # between two samples
    save_file(tensors, tmp_path / "model.safetensors")
    again, same = digests(tmp_path, monkeypatch)
    assert (whole != again, sampled == same) == (True, True)
