"""A damaged document that one of two ranks reads: both end, or both leave it out and go on alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spawn import run_ranks

from roformer_dist.config import derive, parse_config
from roformer_dist.data.inputs import find_inputs
from roformer_dist.data.packing import make_plan
from roformer_dist.data.shards import write_shards
from roformer_dist.data.stages import Source, Stage, Timeline
from roformer_dist.data.store import ShardStore
from roformer_dist.data.tokenizer import Tokenizer, train_tokenizer

STEPS, SEQ_LEN, ROWS, SEED = 8, 32, 4, 0
FOUND = 4  # the step, from 0, that first reads the damaged document; its checkpoint is of step 4


def run(rank: int, root: Path, name: str, **changes: Any) -> str | None:
    """A training of two processes in ``root / name``; what it failed with, or None."""
    from roformer_dist.engine.ranks import Ranks
    from roformer_dist.engine.signals import StopFlag
    from roformer_dist.engine.startup import build_trainer
    from roformer_dist.parity.preflight import preflight

    values: dict[str, Any] = {
        "name": "damaged",
        "model": {"vocab_size": 280, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
        | {"intermediate_size": 24, "hidden_dropout": 0.1},
        "data": {
            "tokenizer": str(root / "tokenizer.model"),
            "train": {"shards": str(root / "damaged"), "plan": str(root / "plan.npz")},
            "validation": {"shards": str(root / "shards"), "plan": str(root / "plan.npz")},
        },
        "parallel": {},
        "train": {"seq_len": SEQ_LEN, "tokens_per_step": ROWS * SEQ_LEN, "num_steps": STEPS}
        | {"precision": "fp32", "seed": SEED},
        "optimizer": {"lr": 1e-2},
        "schedule": {"kind": "cosine", "warmup_steps": 1},
        "checkpoint": {"every_steps": 2, "keep": 10},
        "validation": {"every_steps": STEPS, "rows": 4},
        "logging": {"every_steps": 1},
    }
    for key, value in changes.items():
        section, option = key.split("__")
        values[section][option] = value
    config = parse_config(values, source="test")
    ranks = Ranks(rank, rank, 2, "localhost", 0, "test")  # the group is joined already
    device = torch.device("cpu")
    trainer = build_trainer(config, derive(config, 2), ranks, root / name, device, StopFlag(), preflight)
    try:
        trainer.run()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        trainer.engine.deepspeed.destroy()
        if trainer.context.lock:
            trainer.context.lock.close()
    return None


def all_runs(rank: int, world_size: int, root: Path) -> dict[str, str | None]:
    """Everything in one group of processes, one after another."""
    del world_size
    ended = {"raise": run(rank, root, "raise")}
    keep = {"data__on_corrupt": "quarantine", "data__workers": 1}
    ended["quarantine"] = run(rank, root, "quarantine", **keep)
    torch.distributed.barrier()
    if rank == 0:
        for name, step in (("before", 4), ("after", 6)):
            shutil.copytree(root / "quarantine", root / name)
            for checkpoint in (root / name / "checkpoints").glob("step_*"):
                if int(checkpoint.name[5:]) > step:
                    shutil.rmtree(checkpoint)
    torch.distributed.barrier()
    ended["before"] = run(rank, root, "before", **keep)
    ended["after"] = run(rank, root, "after", **keep, parallel__sp_size=2)
    ended["other mesh"] = run(rank, root, "other mesh", **keep, parallel__sp_size=2)
    return ended


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a plan, and a copy of the shards with one byte changed."""
    root = tmp_path_factory.mktemp("damaged_data")
    texts = [" ".join(f"word{(i * 7 + j * j) % 50}" for j in range(8 + i % 5 * 6)) for i in range(60)]
    (root / "text").mkdir()
    for number, text in enumerate(texts):
        (root / "text" / f"{number:03d}.txt").write_text(text)
    (root / "tokenizer.model").write_bytes(train_tokenizer(iter(texts), 280))
    files = find_inputs([str(root / "text")])
    write_shards(files, Tokenizer(root / "tokenizer.model"), root / "shards", shard_bytes=2048)
    store = ShardStore(root / "shards")
    plan = make_plan(store, SEQ_LEN)
    plan.save(root / "plan.npz")
    shutil.copytree(root / "shards", root / "damaged")
    document = first_read_by_rank_1(store, plan)
    shard = int(store.shard_of(np.array(document)))
    record = document - sum(s.documents for s in store.manifest.shards[:shard])
    name = root / "damaged" / store.manifest.shards[shard].name
    data = bytearray(name.read_bytes())
    data[int(np.load(root / "damaged" / f"shard-{shard:06d}.idx.npy")["offset"][record])] ^= 1
    name.write_bytes(data)
    (root / "where.txt").write_text(f"{name}: document {store.key(document)} is damaged")
    return root


def first_read_by_rank_1(store: ShardStore, plan: Any) -> int:
    """A document that is read for the first time in step FOUND, by the second half of its rows only."""
    timeline = Timeline([Stage((Source(store, (plan,)),))], seed=SEED, seq_len=SEQ_LEN, global_batch=ROWS)

    def documents(step: int, rows: slice) -> set[int]:
        (part,) = timeline.parts(step)
        return {int(d) for row in part.rows.ravel()[rows] for d in plan.document[plan.pieces(int(row))]}

    before = {d for step in range(FOUND) for d in documents(step, slice(None))}
    own = documents(FOUND, slice(ROWS // 2, None)) - documents(FOUND, slice(ROWS // 2)) - before
    return min(own)


def points(run_dir: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def state_of(run_dir: Path, step: int) -> dict[str, Any]:
    from roformer_dist.engine.checkpoint import CheckpointReader

    return CheckpointReader(run_dir / "checkpoints" / f"step_{step:06d}").state["data"]


def test_one_damaged_document_on_two_ranks(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended = run_ranks(2, all_runs, root, timeout_s=280.0)
    said = capfd.readouterr().out
    where = (root / "where.txt").read_text()
    # raise: the rank that met it says where, the other ends with it.
    assert ended[1]["raise"].startswith(f"DamageFound: {where}")
    assert "\n" not in ended[1]["raise"]
    assert ended[0]["raise"] == "PeerError: rank 1 failed"
    assert max(points(root / "raise")) <= FOUND
    # quarantine: all go on.
    for name in ("quarantine", "before", "after", "other mesh"):
        assert [rank[name] for rank in ended] == [None, None], name
    document = int(where.split("document ")[1].split()[0])
    whole = points(root / "quarantine")
    expected = {step: float(step > FOUND) for step in range(1, STEPS + 1)}
    assert {step: point["quarantined"] for step, point in whole.items()} == expected
    assert state_of(root / "quarantine", FOUND)["quarantined"] == [[]]
    assert state_of(root / "quarantine", STEPS)["quarantined"] == [[document]]
    lines = [line for line in said.splitlines() if "quarantined" in line and "is damaged" in line]
    # Told when it is found: in the run, in the one resumed before, on the other mesh; not where it is known.
    assert len(lines) == 3, said
    assert all(where in line and f"step {FOUND + 1} " in line for line in lines)
    # The same losses after a stop before or after it was found, and on the other mesh.
    for name in ("before", "after", "other mesh"):
        found = points(root / name)
        assert {s: p["quarantined"] for s, p in found.items()} == expected
        for step in whole:
            assert found[step]["loss"] == pytest.approx(whole[step]["loss"], rel=1e-5), (name, step)
    assert state_of(root / "after", STEPS) == state_of(root / "other mesh", STEPS)
    assert state_of(root / "before", STEPS) == state_of(root / "quarantine", STEPS)
