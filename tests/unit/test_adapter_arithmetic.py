"""Arithmetic on task vectors and on LoRA's files, by hand in fp64 and against PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import Tensor, nn

from tunesmith.adapters.arithmetic import combination, merge_adapters, ranks_of, read_lora, up_of
from tunesmith.ensemble import task_vectors
from tunesmith.errors import UserError

torch.set_default_dtype(torch.float32)


def vectors(count: int = 3, shape: tuple[int, ...] = (7, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:The density .* is greater than or equal to 1:UserWarning")
def test_ties_is_pefts_on_every_density(density: float) -> None:
    weights = [0.7, 1.3, -0.4]
    found = task_vectors.merge("ties", vectors(), weights, density, ())
    expected = merge_utils.ties(vectors(), torch.tensor(weights, dtype=torch.float64), density)
    assert torch.allclose(found, expected, atol=1e-14)


def test_ties_by_hand() -> None:
    a = torch.tensor([4.0, -1.0, 3.0, 0.1], dtype=torch.float64)
    b = torch.tensor([-1.0, -2.0, 5.0, 0.2], dtype=torch.float64)
    # half of each is kept: a = [4, 0, 3, 0], b = [0, −2, 5, 0]; signs + − + +; means of those that agree
    found = task_vectors.merge("ties", [a, b], [1.0, 1.0], 0.5, ())
    assert found.tolist() == [4.0, -2.0, 4.0, 0.0]
    scaled = task_vectors.merge("ties", [a, b], [0.5, 0.5], 0.5, ())
    assert scaled.tolist() == [2.0, -1.0, 2.0, 0.0]


def test_dare_drops_at_random_keeps_the_mean_and_is_a_function_of_its_key() -> None:
    vector = torch.ones(200, 100)
    found = task_vectors.drop(vector, 0.3, (0, "w", 0))
    assert set(found.unique().tolist()) == {0.0, 1 / 0.3}
    assert float((found != 0).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(found, task_vectors.drop(vector, 0.3, (0, "w", 0)))
    assert not torch.equal(found, task_vectors.drop(vector, 0.3, (1, "w", 0)))
    given = vectors()
    dropped = [task_vectors.drop(v, 0.4, ("k", i)) for i, v in enumerate(given)]
    assert torch.allclose(task_vectors.merge("dare_linear", given, [1, 2, 3], 0.4, ("k",)),
                          sum((i + 1) * d for i, d in enumerate(dropped)))  # fmt: skip
    elected = task_vectors.elected_mean(dropped, [1.0, 1.0, 1.0])
    assert torch.equal(task_vectors.merge("dare_ties", given, [1.0] * 3, 0.4, ("k",)), elected)


def test_the_nearest_of_low_rank() -> None:
    (product,) = vectors(1, (9, 6))
    a, b = task_vectors.low_rank(product, 2)
    s = torch.linalg.svdvals(product)
    assert (a.shape, b.shape) == ((2, 6), (9, 2))
    assert float((product - b @ a).square().sum()) == pytest.approx(float(s[2:].square().sum()))


# files of LoRA


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 6)
        self.one = nn.Linear(6, 8)
        self.two = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(self.words(x))))


def adapter(folder: Path, seed: int, **settings: Any) -> Path:
    """A trained-looking LoRA of `Net`, saved by PEFT."""
    values = {"r": 2, "lora_alpha": 3.0, "target_modules": ["words", "one", "two"]} | settings
    model: Any = get_peft_model(Net(), LoraConfig(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return folder


def deltas(folder: Path) -> dict[str, Tensor]:
    """ΔW = s·B·A by module, in fp64, as PEFT itself scales it."""
    model: Any = PeftModel.from_pretrained(Net(), str(folder))
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach().double()
    assert len(found) == 3
    return found


def test_a_sum_is_exact_whatever_the_ranks_and_scales(tmp_path: Path) -> None:
    folders = [
        adapter(tmp_path / "a", 1),
        adapter(tmp_path / "b", 2, r=3, lora_alpha=5.0, use_rslora=True),
        adapter(tmp_path / "c", 3, rank_pattern={"two": 4}, alpha_pattern={"one": 7.0}),
    ]
    weights = [0.5, -1.0, 2.0]
    how = combination("task", ranks_of(folders))
    assert how == "cat"
    merge_adapters(folders, weights, how, tmp_path / "out")
    expected = [deltas(folder) for folder in folders]
    for name, delta in deltas(tmp_path / "out").items():
        by_hand = sum(w * one[name] for w, one in zip(weights, expected, strict=True))
        assert torch.allclose(delta, torch.as_tensor(by_hand), atol=1e-4), name
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (9, 9)
    assert config["rank_pattern"] == {"words": 7, "one": 7}


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_merges_of_equal_rank_are_pefts(tmp_path: Path, method: Any) -> None:
    folders = [adapter(tmp_path / name, seed) for seed, name in enumerate("abc")]
    weights = [0.5, 0.8, -0.3]
    how = combination(method, ranks_of(folders))
    assert how == method
    merge_adapters(folders, weights, how, tmp_path / "out", 0.6)
    theirs: Any = PeftModel.from_pretrained(Net(), str(folders[0]), adapter_name="a")
    for name, folder in zip("bc", folders[1:], strict=True):
        theirs.load_adapter(str(folder), name)
    theirs.add_weighted_adapter(list("abc"), weights, "sum", method, density=0.6)
    for name, delta in deltas(tmp_path / "out").items():
        assert torch.allclose(
            delta, theirs.get_submodule(name).get_delta_weight("sum").double(), atol=1e-5
        ), name


def test_merges_of_other_ranks_are_pefts_by_svd(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, r=4)]
    assert combination("linear", ranks_of(folders)) == "cat"
    how = combination("ties", ranks_of(folders))
    assert how == "ties_svd"
    merge_adapters(folders, [1.0, 0.5], how, tmp_path / "out", 0.5)
    theirs: Any = PeftModel.from_pretrained(Net(), str(folders[0]), adapter_name="a")
    theirs.load_adapter(str(folders[1]), "b")
    theirs.add_weighted_adapter(["a", "b"], [1.0, 0.5], "sum", "ties_svd", density=0.5)
    for name, delta in deltas(tmp_path / "out").items():
        assert torch.allclose(
            delta, theirs.get_submodule(name).get_delta_weight("sum").double(), atol=1e-4
        ), name


def test_dare_on_files_is_seeded(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    merged = []
    for name, seed in (("x", 0), ("y", 0), ("z", 1)):
        merge_adapters(folders, [0.5, 0.5], "dare_linear", tmp_path / name, 0.5, seed)
        merged.append(read_lora(tmp_path / name))
    downs = merged[0].downs
    assert all(torch.equal(merged[0].tensors[d], merged[1].tensors[d]) for d in downs)
    assert any(not torch.equal(merged[0].tensors[d], merged[2].tensors[d]) for d in downs)
    a = [read_lora(f).tensors[downs[0]].double() for f in folders]
    root = (0.5 * 1.5) ** 0.5
    by_hand = sum(root * task_vectors.drop(v, 0.5, (0, downs[0], "A", i)) for i, v in enumerate(a))
    assert torch.allclose(merged[0].tensors[downs[0]].double(), torch.as_tensor(by_hand), atol=1e-6)


def test_heads_are_averaged_in_the_proportion_of_the_weights(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target_modules": ["one"], "modules_to_save": ["two"]}
    folders = [adapter(tmp_path / name, seed, **settings) for seed, name in enumerate("ab")]
    merge_adapters(folders, [3.0, 1.0], "cat", tmp_path / "out")
    a, b, out = (read_lora(f).tensors for f in (*folders, tmp_path / "out"))
    heads = [name for name in out if "two" in name]
    assert len(heads) == 2
    for name in heads:
        assert torch.allclose(out[name], 0.75 * a[name] + 0.25 * b[name], atol=1e-6)
    assert all(up_of(down) in out for down in read_lora(tmp_path / "out").downs)


def test_what_is_no_plain_lora_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use_dora"):
        read_lora(adapter(tmp_path / "dora", 1, use_dora=True, target_modules=["one"]))
    with pytest.raises(UserError, match="holds no adapter called default"):
        read_lora(tmp_path)
    one, other = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 1, target_modules=["one"])
    with pytest.raises(UserError, match=r"does not change what .* alone has"):
        merge_adapters([one, other], [0.5, 0.5], "cat", tmp_path / "out")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"LORA"', '"IA3"'), encoding="utf-8")
    with pytest.raises(UserError, match="is of IA3"):
        read_lora(one)
