"""State to disk and back, bit for bit; publication, choice and pruning in one process."""

from __future__ import annotations

import json
import math
import os
import random
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tunesmith.checkpoint import manifest as manifests
from tunesmith.checkpoint.publication import publish
from tunesmith.checkpoint.store import clean_leftovers, find_latest, prune, verify
from tunesmith.checkpoint.tensors import load_state, save_state
from tunesmith.errors import MachineError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), where
        assert bits(a) == bits(b), where
    elif isinstance(a, dict):
        assert [(type(key), key) for key in a] == [(type(key), key) for key in b], where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}[{i}]")
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b)), where
    else:
        assert a == b, where


def random_tensor(rng: random.Random) -> torch.Tensor:
    dtype = rng.choice(DTYPES)
    shape = tuple(rng.randrange(4) for _ in range(rng.randrange(4)))
    count = math.prod(shape) * dtype.itemsize
    raw = bytes(rng.choices(range(2 if dtype is torch.bool else 256), k=count))
    tensor = (
        torch.frombuffer(bytearray(raw), dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
    )
    tensor = tensor.view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if len(shape) > 1 and rng.random() < 0.5 else tensor


def random_state(rng: random.Random, depth: int) -> Any:
    text = "".join(rng.choices('aZ09 ./\\"\n\0é漢\U0001f600\ud800', k=rng.randrange(6)))
    scalars = [
        *(None, True, False, text, rng.randrange(-9, 9), rng.getrandbits(200), -(2**63)),
        *(rng.uniform(-1, 1), 0.1 + 0.2, -0.0, 5e-324, 1e308, math.inf, -math.inf, math.nan, 3.0),
        random_tensor(rng),
    ]
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(scalars)
    items = [random_state(rng, depth - 1) for _ in range(rng.randrange(5))]
    match rng.randrange(3):
        case 0:
            return items
        case 1:
            return tuple(items)
        case _:
            return {rng.choice([i, str(i), f"tensor{i}", -i]): item for i, item in enumerate(items)}


@pytest.mark.parametrize("seed", range(60))
def test_random_nestings_come_back_bit_for_bit(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    state = {"state": random_state(rng, 5), "tuple": random_state(rng, 3), 0: random_state(rng, 4)}
    save_state(tmp_path / "s", state)
    assert_same(load_state(tmp_path / "s"), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (2, 3)], ids=str)
def test_every_dtype_and_shape_also_reads_with_the_safetensors_package(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = (torch.arange(math.prod(shape)) % 2).reshape(shape).to(dtype)
    paths = save_state(tmp_path / "s", [torch.ones(3, dtype=torch.int8), tensor, torch.ones(1).double()])
    assert [path.name for path in paths] == ["s.json", "s.safetensors"]
    assert_same(load_state(tmp_path / "s")[1], tensor)
    assert_same(load_file(paths[1])["1"], tensor)
    # readers that map the file need every tensor aligned: the three bytes come last
    raw = paths[1].read_bytes()
    length = int.from_bytes(raw[:8], "little")
    start, _ = json.loads(raw[8 : 8 + length])["1"]["data_offsets"]
    assert length % 8 == 0
    assert start % dtype.itemsize == 0


def test_one_tensor_in_two_places_stays_one_and_views_of_one_memory_part(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"a": base, "b": [base], "row": base.view(3, 4)[1], "column": base.view(3, 4)[:, 1]}
    save_state(tmp_path / "s", state)
    loaded = load_state(tmp_path / "s")
    assert_same(loaded, state)
    assert loaded["a"] is loaded["b"][0]
    loaded["a"].zero_()
    assert loaded["row"].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert len(load_file(tmp_path / "s.safetensors")) == 3


def test_loaded_state_does_not_stay_tied_to_the_file(tmp_path: Path) -> None:
    _, path = save_state(tmp_path / "s", [torch.arange(5000.0)])
    (loaded,) = load_state(tmp_path / "s")
    with path.open("r+b") as file:
        file.seek(200)
        file.write(b"\xff" * 10000)
    assert torch.equal(loaded, torch.arange(5000.0))


def test_map_location(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"x": torch.ones(2)})
    assert load_state(tmp_path / "s", torch.device("cpu"))["x"].device.type == "cpu"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float64(1), r"state\['a'\]\[0\]: cannot save a numpy.float64"),
        (np.zeros(2), r"state\['a'\]\[0\]: cannot save a numpy.ndarray"),
        (OrderedDict(), r"state\['a'\]\[0\]: cannot save a collections.OrderedDict"),
        ({1, 2}, r"state\['a'\]\[0\]: cannot save a builtins.set"),
        (b"x", r"state\['a'\]\[0\]: cannot save a builtins.bytes"),
        (torch.float32, r"state\['a'\]\[0\]: cannot save a torch.dtype"),
        (torch.Size([1]), r"state\['a'\]\[0\]: cannot save a torch.Size"),
        (torch.nn.Parameter(torch.ones(1)), r"state\['a'\]\[0\]: cannot save a torch.nn.parameter.Parameter"),
        (torch.ones(1, requires_grad=True), "requires a gradient"),
        (torch.ones(1, device="meta"), "without data"),
        (torch.ones(1, dtype=torch.complex128), "complex128"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        ({1.5: 0}, r"state\['a'\]\[0\]: cannot save the key 1.5 of type builtins.float"),
        ({True: 0}, "cannot save the key True"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_come_back_changed_is_refused_by_its_place(
    tmp_path: Path, value: Any, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        save_state(tmp_path / "s", {"a": [value]})
    assert not list(tmp_path.iterdir())


def test_random_generators(tmp_path: Path) -> None:
    python, numpy, generator = random.Random(3), np.random.default_rng(4), torch.Generator().manual_seed(5)
    python.gauss(0, 1)
    save_state(
        tmp_path / "s",
        {
            "python": python.getstate(),
            "numpy": numpy.bit_generator.state,
            "torch": generator.get_state(),
        },
    )
    expected = [python.gauss(0, 1), numpy.random(), torch.rand(2, generator=generator).tolist()]
    state = load_state(tmp_path / "s")
    python, numpy, generator = random.Random(0), np.random.default_rng(0), torch.Generator()
    python.setstate(state["python"])
    numpy.bit_generator.state = state["numpy"]
    generator.set_state(state["torch"])
    assert [python.gauss(0, 1), numpy.random(), torch.rand(2, generator=generator).tolist()] == expected


def bitsandbytes(name: str, **settings: Any) -> Callable[[Any], torch.optim.Optimizer]:
    def make(parameters: Any) -> torch.optim.Optimizer:
        package = pytest.importorskip("bitsandbytes")
        return getattr(package.optim, name)(parameters, lr=1e-3, **settings)

    return make


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw_foreach_amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw_tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, lr_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "adamw8bit": bitsandbytes("AdamW8bit"),
    "lion8bit": bitsandbytes("Lion8bit"),
    "sgd8bit": bitsandbytes("SGD8bit", momentum=0.9),
    "ademamix8bit": bitsandbytes("AdEMAMix8bit", t_alpha=100, t_beta3=100),
}


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    # 8-bit optimizers keep tensors under 4096 elements in fp32: one of each
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 8))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_from_a_saved_optimizer(tmp_path: Path, name: str) -> None:
    model = small_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(4))
    save_state(tmp_path / "optim", optimizer.state_dict())
    save_state(tmp_path / "weights", dict(model.state_dict()))
    assert_same(load_state(tmp_path / "optim"), optimizer.state_dict())
    train(model, optimizer, range(4, 9))

    resumed = small_model()
    optimizer = OPTIMIZERS[name](resumed.parameters())
    resumed.load_state_dict(load_state(tmp_path / "weights"))
    optimizer.load_state_dict(load_state(tmp_path / "optim"))
    train(resumed, optimizer, range(4, 9))
    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))


def text_writer(name: str = "a.txt", content: str = "hello") -> Callable[[Path], list[Path]]:
    def write(folder: Path) -> list[Path]:
        (folder / name).write_text(content)
        return [folder / name]

    return write


def put(run: Path, step: int, content: str = "hello", **settings: Any) -> Path:
    writers = [text_writer("a.txt", content), text_writer("b.txt", f"{step}")]
    return publish(run, step, writers, recipe_sha256="r", meta={"step": step}, **settings)[0]


def steps(run: Path) -> list[str]:
    return sorted(os.listdir(run))


def test_a_published_checkpoint_is_found_with_its_facts(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    meta: Any = {"samples": 7, "best": {"loss": 0.1 + 0.2, "none": None}, "list": [1, 2.5, "x"]}
    path, pruned = publish(run, 12, [text_writer()], recipe_sha256="abc", meta=meta)
    assert path == run / "checkpoint-12"
    assert pruned.deleted == pruned.left == ()
    assert steps(path) == ["a.txt", "manifest.json"]
    found = find_latest(run)
    assert found.latest is not None
    assert found.skipped == ()
    manifest = found.latest.manifest
    assert (manifest.step, manifest.world_size, manifest.recipe_sha256) == (12, 1, "abc")
    assert manifest.meta == meta
    assert manifest.versions.keys() == {"tunesmith", "torch", "transformers"}
    assert manifest.versions["torch"] == torch.__version__
    # the sha256 of "hello"
    hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert manifest.files == {"a.txt": manifests.FileRecord(size=5, sha256=hello)}


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "absent").latest is None
    assert clean_leftovers(tmp_path / "absent") == ()


def test_the_newest_is_the_highest_step_not_the_last_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        put(tmp_path, step)
    for name in ("checkpoint-0300", "checkpoint-x", "checkpoint-1e9", "checkpoints"):
        (tmp_path / name).mkdir()
    found = find_latest(tmp_path)
    assert found.latest is not None
    assert found.latest.path.name == "checkpoint-100"
    assert found.skipped == ()


def test_publishing_a_step_again_replaces_it(tmp_path: Path) -> None:
    put(tmp_path, 1, "old")
    put(tmp_path, 1, "new")
    assert (tmp_path / "checkpoint-1" / "a.txt").read_text() == "new"
    (tmp_path / "checkpoint-1" / "a.txt").write_text("damaged")
    put(tmp_path, 1, "newest")
    assert verify(tmp_path / "checkpoint-1") == []
    assert steps(tmp_path) == ["checkpoint-1"]


def test_a_failed_last_rename_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1, "old")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if ".tmp-" in source.name:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(MachineError, match="rank 0: Input/output error"):
        put(tmp_path, 1, "new")
    assert (tmp_path / "checkpoint-1" / "a.txt").read_text() == "old"
    assert steps(tmp_path) == ["checkpoint-1"]


def test_too_little_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    put(tmp_path, 1)
    message = r"checkpoint-2 was not saved in .*: rank 0: 1,000,000,000,000,000 bytes needed, [\d,]+ free$"
    with pytest.raises(MachineError, match=message):
        put(tmp_path, 2, bytes_needed=10**15)
    assert steps(tmp_path) == ["checkpoint-1"]


def test_a_fault_of_ours_keeps_its_type_and_leaves_nothing(tmp_path: Path) -> None:
    def wrong(folder: Path) -> list[Path]:
        (folder / "half").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        publish(tmp_path, 1, [text_writer(), wrong], recipe_sha256="r", meta={})
    assert steps(tmp_path) == []


def test_a_writer_that_hides_a_file_or_leaves_the_folder_is_caught(tmp_path: Path) -> None:
    def hides(folder: Path) -> list[Path]:
        (folder / "c.txt").write_text("x")
        return []

    def leaves(folder: Path) -> list[Path]:
        (folder / "deep").mkdir()
        return text_writer()(folder / "deep")

    for writer, message in [(hides, "c.txt"), (leaves, "is not directly in")]:
        with pytest.raises(AssertionError, match=message):
            publish(tmp_path, 1, [writer], recipe_sha256="r", meta={})
    with pytest.raises(AssertionError, match="written twice"):
        publish(tmp_path, 1, [text_writer(), text_writer()], recipe_sha256="r", meta={})
    assert steps(tmp_path) == []


def test_everything_is_synced_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def log_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".tmp-")[0])
        fsync(descriptor)

    def log_rename(source: Path, target: Path) -> None:
        events.append(f"-> {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    put(tmp_path, 1)
    assert sorted(events[:2]) == ["a.txt", "b.txt"]
    assert events[2:] == ["manifest.json", ".checkpoint-1", "-> checkpoint-1", tmp_path.name]


def test_pruning_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        put(tmp_path, step)
    assert prune(tmp_path, None).deleted == ()
    put(tmp_path, 5, keep=2, protect={tmp_path / "checkpoint-2"})
    assert steps(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    pruned = prune(tmp_path, 1)
    assert pruned.deleted == (tmp_path / "checkpoint-4", tmp_path / "checkpoint-2")
    assert steps(tmp_path) == ["checkpoint-5"]


def test_pruning_after_publication_never_deletes_what_was_published(tmp_path: Path) -> None:
    for step in (300, 400):
        put(tmp_path, step)
    put(tmp_path, 100, keep=1)
    assert steps(tmp_path) == ["checkpoint-100", "checkpoint-400"]


def test_broken_checkpoints_do_not_count_as_kept_and_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step)
    # the same size: only the hash tells
    (tmp_path / "checkpoint-2" / "a.txt").write_text("hellp")
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    _, pruned = publish(tmp_path, 4, [text_writer()], recipe_sha256="r", meta={}, keep=2)
    assert steps(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert [(broken.path.name, broken.reason) for broken in pruned.left] == [
        ("checkpoint-3", "manifest.json: missing"),
        ("checkpoint-2", "a.txt: damaged (its sha256 does not match)"),
    ]


def test_a_folder_that_is_not_ours_is_never_pruned(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_text("x")
    put(tmp_path, 2, keep=1)
    assert steps(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_leftovers_are_cleaned_and_a_checkpoint_set_aside_comes_back(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    os.rename(tmp_path / "checkpoint-2", tmp_path / ".checkpoint-2.old-00ff")
    for name in (".checkpoint-3.tmp-0a1b", ".checkpoint-1.old-0a1b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / ".checkpoint-3.tmp-mine").mkdir()
    assert len(clean_leftovers(tmp_path)) == 3
    assert steps(tmp_path) == [".checkpoint-3.tmp-mine", "checkpoint-1", "checkpoint-2"]
    assert verify(tmp_path / "checkpoint-2") == []


@pytest.fixture
def signed(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], Any]], list[str]]:
    """Edits the manifest of a whole checkpoint, signs it anew as an attacker would, and verifies."""

    def edit(change: Callable[[dict[str, Any]], Any]) -> list[str]:
        path = put(tmp_path, 1)
        (tmp_path / "outside.txt").write_text("hello")
        body = json.loads((path / "manifest.json").read_text())
        del body["sha256"]
        change(body)
        body["sha256"] = manifests._digest(body)  # pyright: ignore[reportPrivateUsage]
        (path / "manifest.json").write_text(json.dumps(body))
        return verify(path)

    return edit


@pytest.mark.parametrize(
    "name",
    [
        "../outside.txt",
        "/etc/passwd",
        "..",
        ".",
        "",
        "x/../a.txt",
        "..\\outside.txt",
        "C:a.txt",
        "manifest.json",
        "a\0",
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(signed: Any, name: str) -> None:
    (problem,) = signed(lambda body: body["files"].update({name: body["files"]["a.txt"]}))
    assert "is not a plain file name" in problem


def test_a_signed_manifest_without_a_change_verifies(signed: Any) -> None:
    assert signed(lambda body: None) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda body: body.update(format=2), "manifest.json: format: Input should be 1"),
        (lambda body: body.update(step=2), "manifest.json: belongs to step 2"),
        (lambda body: body.update(world_size=0), "manifest.json: world_size: "),
        (lambda body: body.update(extra=1), "manifest.json: extra: "),
        (lambda body: body.pop("files"), "manifest.json: files: Field required"),
        (
            lambda body: body["files"]["a.txt"].pop("sha256"),
            "manifest.json: files.a.txt.sha256: Field required",
        ),
        (lambda body: body["files"]["a.txt"].update(size="5"), "manifest.json: files.a.txt.size: "),
    ],
)
def test_a_manifest_that_is_not_of_this_format_is_refused(signed: Any, change: Any, problem: str) -> None:
    (line,) = signed(change)
    assert line.startswith(problem)


def test_symbolic_links_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path, 1)
    (tmp_path / "outside.txt").write_text("hello")
    (path / "a.txt").unlink()
    (path / "a.txt").symlink_to(tmp_path / "outside.txt")
    assert verify(path) == ["a.txt: not a regular file"]
    os.rename(path / "manifest.json", tmp_path / "manifest.json")
    (path / "manifest.json").symlink_to(tmp_path / "manifest.json")
    assert verify(path) == ["manifest.json: not a regular file"]
    (tmp_path / "checkpoint-2").symlink_to(put(tmp_path, 3))
    assert verify(tmp_path / "checkpoint-2") == ["checkpoint-2: not a folder"]
    put(tmp_path, 4, keep=1)
    assert steps(tmp_path)[:3] == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("meta", [{"x": (1, 2)}, {"x": math.nan}, {"x": {1: 2}}, {"x": object()}])
def test_meta_that_json_would_change_is_refused(tmp_path: Path, meta: Any) -> None:
    with pytest.raises(ValueError, match=r"meta|JSON"):
        publish(tmp_path, 1, [text_writer()], recipe_sha256="r", meta=meta)
    assert steps(tmp_path) == []
