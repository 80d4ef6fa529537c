"""The results of `make gpu-check`: those that are committed are whole, no document quotes absent or stale ones, and the
program that makes them runs to its end, in all its parts, on the CPU in a GPU's place."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import gpu_check as program  # noqa: E402 - the folder must be on the path
from gpu import parts, record, results  # noqa: E402 - the folder must be on the path


def test_committed_results_are_whole() -> None:
    for path in results.files():
        result = results.load(path)
        assert results.faults(result) == [], path.name
        assert result["device"]["slug"] == path.stem, path.name


def test_no_document_quotes_absent_or_stale_results() -> None:
    assert results.quote_faults() == []
    if all(results.stale(path) for path in results.files()):
        assert not list(results.quotes())


def whole() -> dict[str, Any]:
    row = {"case": "8192 tokens", "name": "ours ÷ GEMMs", "value": 1.07, "least": 1.05, "unit": "×"}
    part = {"date": "2026-01-01", "seconds": 3.0, "quick": False, "failures": [], "notes": ["a note"]}
    return {
        "format": results.FORMAT,
        "device": {"name": "Some GPU", "slug": "some-gpu", "driver": "1"},
        "versions": {"torch": "2", "triton": "3"},
        "commit": "unknown",
        "source_hash": "",
        "parts": {"cross_entropy": {**part, "rows": [{**row, "limit": "<= 1.1"}]}},
    }


@pytest.mark.parametrize(
    "broken",
    [
        lambda result: result.pop("source_hash"),
        lambda result: result.update(format=0),
        lambda result: result["parts"]["cross_entropy"].pop("notes"),
        lambda result: result["parts"]["cross_entropy"]["rows"][0].update(value="1.07"),
        lambda result: result["parts"]["cross_entropy"]["rows"][0].update(limit="about 1"),
    ],
)
def test_broken_results_are_seen(broken: Callable[[dict[str, Any]], Any]) -> None:
    result = whole()
    assert results.faults(result) == []
    broken(result)
    assert len(results.faults(result)) == 1


def test_a_limit_that_is_missed_and_a_failure_are_told() -> None:
    result = whole()
    assert results.missed(result) == []
    part = result["parts"]["cross_entropy"]
    part["failures"].append("Liger: it raised")
    part["rows"] += [{**part["rows"][0], "value": 1.2}, {**part["rows"][0], "limit": ">= 1.07"}]
    limit = "cross_entropy: 8192 tokens: ours ÷ GEMMs: 1.2 ×, limit <= 1.1"
    assert results.missed(result) == [limit, "cross_entropy: Liger: it raised"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one source, fresh results, and a README that has a place for them."""
    source = tmp_path / "kernels" / "tunesmith_kernels" / "rows.py"
    source.parent.mkdir(parents=True)
    source.write_text("a = 1\n")
    result = {**whole(), "source_hash": results.source_hash(tmp_path)}
    results.save(tmp_path / "kernels" / "results" / "some-gpu.json", result)
    begin, end = "<!-- gpu-results:begin some-gpu cross_entropy -->", "<!-- gpu-results:end -->"
    (tmp_path / "README.md").write_text(f"# One\n\n{begin}\n{end}\nand text\n\n    {begin}\n    {end}\n")
    return tmp_path


def test_a_quotation_is_what_its_file_says(checkout: Path) -> None:
    assert results.quote_faults(checkout) == ["README.md: some-gpu: not what some-gpu.json says"]
    assert results.write_docs(checkout) == [checkout / "README.md"]
    assert results.quote_faults(checkout) == []
    assert results.write_docs(checkout) == []
    readme = (checkout / "README.md").read_text()
    assert "| 8192 tokens | ours ÷ GEMMs | 1.07 | 1.05 | × | <= 1.1 |" in readme
    (checkout / "README.md").write_text(readme.replace("1.07", "1.01"))
    assert results.quote_faults(checkout) == ["README.md: some-gpu: not what some-gpu.json says"]


def test_results_are_stale_once_the_sources_change(checkout: Path) -> None:
    results.write_docs(checkout)
    (checkout / "kernels" / "tunesmith_kernels" / "rows.py").write_text("a = 2\n")
    assert results.quote_faults(checkout) == ["README.md: some-gpu: some-gpu.json is stale"]
    with pytest.raises(ValueError, match="stale"):
        results.write_docs(checkout)
    (checkout / "kernels" / "results" / "some-gpu.json").unlink()
    assert results.quote_faults(checkout) == ["README.md: some-gpu: there is no some-gpu.json"]


def test_the_hash_is_of_names_and_contents(checkout: Path) -> None:
    package = checkout / "kernels" / "tunesmith_kernels"
    hashes = {results.source_hash(checkout)}
    (package / "rows.py").rename(package / "lines.py")
    hashes.add(results.source_hash(checkout))
    (package / "more.cpp").write_text("")
    hashes.add(results.source_hash(checkout))
    (package / "notes.txt").write_text("not a source")
    assert results.source_hash(checkout) in hashes
    assert len(hashes) == 3


def test_half_a_block_is_refused(checkout: Path) -> None:
    with (checkout / "README.md").open("a") as file:
        file.write("<!-- gpu-results:begin some-gpu -->\n")
    with pytest.raises(ValueError, match="other half"):
        results.quote_faults(checkout)


def test_stale_is_of_this_repository(tmp_path: Path) -> None:
    path = tmp_path / "some-gpu.json"
    assert results.stale(path)
    results.save(path, whole())
    assert results.stale(path)
    results.save(path, {**whole(), "source_hash": results.source_hash()})
    assert not results.stale(path)


def test_what_is_raised_is_a_line_and_the_rest_runs(tmp_path: Path) -> None:
    lines = record.Record(tmp_path / "lines", 100)
    with lines.attempt("one"):
        raise KeyError("missing")
    with lines.attempt("two"):
        lines.row("two", "time", 1.0, "ms")
    with pytest.raises(record.OutOfTime, match="three: not run"), lines.attempt("three", needs=1000):
        raise AssertionError
    with pytest.raises(record.DeviceLost), lines.attempt("four"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with lines.path.open("a") as file:
        file.write('{"row": {"case": "cut o')
    found = record.read(lines.path)
    assert [row["case"] for row in found["rows"]] == ["two"]
    assert found["failures"][0] == "one: KeyError: 'missing'"
    assert len(found["failures"]) == 2


def test_what_is_there_is_not_run_again() -> None:
    part = {"failures": [], "quick": False}
    result = {"parts": {"memory": part, "adamw": {**part, "quick": True}, "tune": {"failures": ["one"]}}}
    plain = argparse.Namespace(again=False, only=None, quick=False)

    def done(name: str, **other: Any) -> bool:
        return program._done(result, name, argparse.Namespace(**{**vars(plain), **other}))

    assert done("memory")
    assert not done("memory", again=True)
    assert not done("memory", only=["memory"])
    assert not done("cross_entropy")
    assert not done("tune")
    assert not done("adamw")
    assert done("adamw", quick=True)


def test_shards_are_put_together() -> None:
    count = {"case": "all", "name": "cases", "value": 3, "least": None, "unit": "cases", "limit": None}
    time = {**count, "case": "one", "unit": "ms"}
    shard = {"rows": [count, time], "failures": ["a"], "notes": ["n"], "facts": []}
    other = {"rows": [{**count, "value": 4}], "failures": ["b"], "notes": ["n"], "facts": []}
    found = program._merged([shard, other])
    assert found["rows"] == [{**count, "value": 7}, time]
    assert found["failures"] == ["a", "b"]
    assert found["notes"] == ["n"]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in a copy of what it reads: nobody changes a source while it runs, which would make its results
    stale."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("bench", "kernels", "tests/kernels", "trainer"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(BENCH.parent / folder, root / folder, ignore=ignored)
    return root / "bench" / "gpu_check.py"


def gpu_check(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_says_so(script: Path) -> None:
    done = gpu_check(script, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3
    assert done.stderr.startswith("gpu-check: torch sees no CUDA device")


def test_every_part_runs_on_the_cpu_and_is_kept(tmp_path: Path, script: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200)
    names = [part.name for part in parts.PARTS if part.name != "end_to_end_trainer"]
    only = ("--dry", "--only", ",".join(names))
    done = gpu_check(script, *only, "--out", str(tmp_path), "--text", str(text))
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "dry.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert results.faults(result) == []
    assert list(result["parts"]) == names
    for name, part in result["parts"].items():
        assert part["failures"] == [], name
        assert part["rows"] or name == "sanitizer", name
    assert "tokens of text.txt" in result["parts"]["end_to_end_full"]["notes"][0]


@pytest.mark.slow
def test_this_trainer_is_measured_where_it_is_installed(tmp_path: Path, script: Path) -> None:
    done = gpu_check(script, "--dry", "--only", "end_to_end_trainer", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = results.load(tmp_path / "dry.json")["parts"]["end_to_end_trainer"]["rows"]
    assert row["name"] == "tunesmith's trainer: speed"
    assert row["value"] > 0


def test_a_part_runs_in_processes_of_its_own_and_is_kept(tmp_path: Path, script: Path) -> None:
    only = ("--dry", "--only", "memory", "--out", str(tmp_path))
    done = gpu_check(script, *only, "--processes")
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "dry.json"
    before = results.load(path)["parts"]
    assert list(before) == ["device", "memory"]
    assert before["memory"]["rows"]
    done = gpu_check(script, "--dry", "--only", "sanitizer", "--minutes", "0.2", "--out", str(tmp_path))
    after = results.load(path)["parts"]
    assert list(after) == ["device", "memory", "sanitizer"]
    assert after["memory"] == before["memory"]
    assert "dry.json: fresh" in gpu_check(script, "--status", "--out", str(tmp_path)).stdout


def test_out_of_time_is_a_failure(tmp_path: Path, script: Path) -> None:
    done = gpu_check(script, "--dry", "--only", "memory", "--minutes", "0.17", "--out", str(tmp_path))
    assert done.returncode == 1
    assert results.load(tmp_path / "dry.json")["parts"]["memory"]["failures"] == ["not run: out of time"]
