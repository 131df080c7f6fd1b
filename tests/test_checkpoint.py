"""Reading, writing, lineage and scores of checkpoint directories."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hybridize.checkpoint.atomic import AtomicDirectory
from hybridize.checkpoint.manifest import Manifest, descend, read_manifest, root_of
from hybridize.checkpoint.reader import INDEX, CheckpointReader, fingerprint, resolve_checkpoint
from hybridize.checkpoint.scores import LayerScore, Scores, read_scores
from hybridize.checkpoint.writer import CheckpointWriter, check_output
from hybridize.errors import InputError, WorkError

NOTE = Manifest({"path": "p", "hash": "h"}, {"path": "p", "hash": "h"}, "test", {}, 0, [])


def write(path: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 10**9, overwrite: bool = False) -> CheckpointReader:
    with AtomicDirectory(path, overwrite) as folder:
        writer = CheckpointWriter(folder, shard_bytes)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close({"model_type": "llama"}, NOTE, None)
    return CheckpointReader(path)


TENSORS = {
    "a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3), "d": torch.zeros(0, 2),
}  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(sorted(TENSORS)), shard=st.integers(1, 64))
def test_order_and_sharding_change_nothing(tmp_path_factory: pytest.TempPathFactory, order: list[str], shard: int) -> None:
    plain = write(tmp_path_factory.mktemp("x") / "plain", TENSORS)
    other = write(tmp_path_factory.mktemp("x") / "other", {name: TENSORS[name] for name in order}, shard)
    assert other.hash == plain.hash
    for name, tensor in other.tensors():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_hash_sees_every_change(tmp_path: Path) -> None:
    base = write(tmp_path / "base", TENSORS).hash
    flipped = TENSORS | {"a": TENSORS["a"].clone()}
    flipped["a"].view(torch.int32)[1, 2] ^= 1
    assert write(tmp_path / "bit", flipped).hash != base
    assert write(tmp_path / "shape", TENSORS | {"a": TENSORS["a"].view(3, 2)}).hash != base
    assert write(tmp_path / "name", {("z" if k == "a" else k): v for k, v in TENSORS.items()}).hash != base
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    assert CheckpointReader(tmp_path / "base").hash == base
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"rope_theta": 9}))
    assert CheckpointReader(tmp_path / "base").hash != base


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "out", TENSORS, 8)
    finally:
        os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "out").iterdir()} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_weights_that_share_memory_are_written_twice(tmp_path: Path) -> None:
    one = torch.ones(3, 3)
    found = write(tmp_path / "out", {"a": one, "b": one})
    assert torch.equal(found.tensor("a"), found.tensor("b"))


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    old = write(tmp_path / "out", TENSORS).hash
    with pytest.raises(RuntimeError, match="half-way"), AtomicDirectory(tmp_path / "out", overwrite=True) as folder:
        (folder / "junk").write_text("x")
        raise RuntimeError("half-way")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert CheckpointReader(tmp_path / "out").hash == old
    new = write(tmp_path / "out", {"a": torch.ones(1)}, overwrite=True)
    assert new.names == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_what_another_has_made_meanwhile_is_not_replaced(tmp_path: Path, there: bool) -> None:
    """overwrite means what was there at the beginning."""
    if there:
        write(tmp_path / "out", TENSORS)
    with (
        pytest.raises(WorkError, match="created by another command"),
        AtomicDirectory(tmp_path / "out", overwrite=True) as folder,
    ):
        (folder / "config.json").write_text("{}")
        write(tmp_path / "out", {"a": torch.ones(1)}, overwrite=True)
    assert CheckpointReader(tmp_path / "out").names == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_killed_writer_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import time, torch
        from pathlib import Path
        from hybridize.checkpoint.atomic import AtomicDirectory
        from hybridize.checkpoint.writer import CheckpointWriter
        with AtomicDirectory(Path({str(tmp_path / "out")!r})) as folder:
            CheckpointWriter(folder).add("a", torch.ones(3))
            (folder / "config.json").write_text("{{}}")
            print("there", flush=True)
            time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    (alive,) = tmp_path.iterdir()
    with pytest.raises(RuntimeError, match="another"), AtomicDirectory(tmp_path / "out"):
        raise RuntimeError("another writer of the same output, which must leave the first one's work alone")
    assert alive.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    write(tmp_path / "out", TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_outputs_are_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists"):
        check_output(tmp_path / "there", False)
    with pytest.raises(InputError, match="is a file"):
        check_output(tmp_path / "file", True)
    for inside in (tmp_path / "there", tmp_path / "there/deep/model"):
        with pytest.raises(InputError, match="is or contains the input"):
            check_output(tmp_path / "there", True, inside)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("")
    with pytest.raises(InputError, match="is a directory but not a checkpoint"):
        check_output(tmp_path / "thesis", True)
    with pytest.raises(InputError, match="is the current directory"):
        check_output(Path(), True)
    check_output(tmp_path / "there", True)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: (p / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is not readable JSON"),
        (lambda p: (p / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda p: next(p.glob("*-of-*")).unlink(), "is missing, though the index names it"),
        (lambda p: next(p.glob("*-of-*")).write_bytes(b"1234567890"), "is not a readable safetensors file"),
        (lambda p: (p / INDEX).unlink(), "has no model.safetensors"),
        (lambda p: (p / INDEX).write_text('{"weight_map": {"a": "../x"}}'), "not a file of this directory"),
        (lambda p: (p / INDEX).write_text('{"weight_map": {}}'), "has no weight_map"),
        (lambda p: save_file({"zz": torch.ones(1)}, next(p.glob("*-of-*"))), "disagree about tensor"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, says: str) -> None:
    write(tmp_path / "out", TENSORS, 8)
    damage(tmp_path / "out")
    with pytest.raises(InputError, match=says) as caught:
        CheckpointReader(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)


def test_a_local_path_is_never_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert resolve_checkpoint("here") == Path("here")
    for name in ("./nothing", "/nothing", "nothing/", "a/b/c"):
        with pytest.raises(InputError, match="does not exist"):
            resolve_checkpoint(name)


def test_lineage_through_two_steps(tmp_path: Path) -> None:
    first = write(tmp_path / "teacher", TENSORS)
    (tmp_path / "teacher/hybridize.json").unlink()
    for source, output in (("teacher", "deep/h1"), ("deep/h1", "h2")):
        reader = CheckpointReader(tmp_path / source)
        note = descend(reader, str(tmp_path / source), tmp_path / output, "replace", {}, 0)
        with AtomicDirectory(tmp_path / output) as folder:
            writer = CheckpointWriter(folder)
            writer.add("a", torch.ones(1))
            writer.close({}, note, None)
    found = read_manifest(tmp_path / "h2")
    assert found is not None
    assert found["parent"]["path"] == "../deep/h1"
    assert found["root"] == {"path": "../teacher", "hash": first.hash}
    assert Path(str(root_of(tmp_path / "h2"))).resolve() == tmp_path / "teacher"
    os.rename(tmp_path / "h2", tmp_path / "deep/h2")
    assert root_of(tmp_path / "deep/h2") == "../teacher"  # moved away from its teacher: says so by its name


def test_scores_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "loo.json"
    scores = Scores("loo", "h", None, None, "kl", {}, 1.0, [LayerScore(0, 1.0), LayerScore(1, 0.5, 0.1), LayerScore(2, 0.5)])
    scores.write(path)
    assert read_scores(path) == scores
    assert scores.ranking() == [1, 2, 0]
    found = json.loads(path.read_text())
    for change, says in [
        ({"format": 2}, "format 1"),
        ({"layers": [{"layer": 0, "score": None}]}, "not a score file"),
        ({"layers": [{"layer": 0, "score": "nan"}]}, "is nan"),
        ({"layers": [{"layer": 0, "score": 1}] * 2}, "twice"),
        ({"layers": 3}, "not a score file"),
    ]:
        path.write_text(json.dumps(found | change))
        with pytest.raises(InputError, match=says):
            read_scores(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_what_is_not_finite_is_found_whatever_its_bits(dtype: torch.dtype) -> None:
    """Every pattern of the narrow types by itself, and one in the midst of many."""
    width = dtype.itemsize
    if width <= 2:
        values = torch.arange(256**width).to({1: torch.uint8, 2: torch.uint16}[width]).view(dtype)
    else:
        g = torch.Generator().manual_seed(0)
        values = torch.randint(0, 256, (4000 * width,), generator=g, dtype=torch.uint8).view(dtype)
        values = torch.cat(
            [values, torch.tensor([torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max, -0.0], dtype=dtype)]
        )

    def passes(tensor: torch.Tensor) -> bool:
        try:
            fingerprint("x", tensor, "file")
        except InputError:
            return False
        return True

    wanted = torch.isfinite(values.float() if width == 1 else values).tolist()
    chosen = range(0, len(values), 7) if width == 2 else range(len(values))
    assert [passes(values[i : i + 1]) for i in chosen] == [wanted[i] for i in chosen]
    assert False in [wanted[i] for i in chosen]
    many = torch.zeros((1 << 20) + 3, dtype=dtype)
    assert passes(many)
    many[-1] = torch.nan
    with pytest.raises(InputError, match=r"^file: tensor x holds values that are not finite$"):
        fingerprint("x", many, "file")
    assert passes(many[:0])
