"""Training and the data commands with shards, plans and tokenizer behind http:// and s3:// URLs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from buckets import bucket
from commands import CONFIG, SEQ_LEN, losses, train_alone, write_corpus
from http_with_faults import FaultyServer, serving, short, status
from typer.testing import CliRunner

from data_tools.app import app
from roformer_dist.data.documents import TextOptions, read_texts
from roformer_dist.data.errors import DataError
from roformer_dist.data.inputs import find_inputs
from roformer_dist.data.packing import make_plan
from roformer_dist.data.shards import write_shards
from roformer_dist.data.store import ShardStore
from roformer_dist.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, shards, plans and the configuration that names them on the disk."""
    folder = tmp_path_factory.mktemp("remote")
    write_corpus(folder / "speeches")
    for split in ("train", "validation"):
        files = find_inputs([str(folder / "speeches" / split)])[:20]
        if split == "train":
            (folder / "tokenizer.model").write_bytes(train_tokenizer(read_texts(files, TextOptions()), 512))
        write_shards(
            files, Tokenizer(folder / "tokenizer.model"), folder / "shards" / split, shard_bytes=8192
        )
        with ShardStore(folder / "shards" / split) as store:
            make_plan(store, SEQ_LEN).save(folder / f"{split}.npz")
    (folder / "local.toml").write_text(CONFIG.format(folder=folder, seq_len=SEQ_LEN))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[FaultyServer]:
    with serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that finds the folder at ``s3://speeches``."""
    with bucket("speeches", folder / "shards", folder / "train.npz") as endpoint:
        yield {
            "FSSPEC_S3_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }


THREE_STEPS = (
    "train.num_steps=3",
    "schedule.warmup_steps=0",
    "parallel.sp_size=1",
    "validation.every_steps=3",
)


def train(config: Path, run_dir: Path, *extra: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Three steps and a validation in one process, with a cache beside the run."""
    environment["XDG_CACHE_HOME"] = str(run_dir.parent / "cache")
    return train_alone(config, run_dir, *THREE_STEPS, *extra, **environment)


def validation_losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [point["validation_loss"] for point in map(json.loads, lines) if "validation_loss" in point]


def test_a_training_from_urls_is_the_training_from_the_disk(folder, server, s3, tmp_path):
    local, remote = tmp_path / "local", tmp_path / "remote"
    urls = {
        folder / "tokenizer.model": f"{server.url}/tokenizer.model",
        folder / "shards/train": "s3://speeches/shards/train",
        folder / "train.npz": "s3://speeches/train.npz",
        folder / "shards/validation": f"{server.url}/shards/validation",
        folder / "validation.npz": f"{server.url}/validation.npz",
    }
    text = (folder / "local.toml").read_text()
    for path, url in urls.items():
        assert f'"{path}"' in text
        text = text.replace(f'"{path}"', f'"{url}"')
    (tmp_path / "remote.toml").write_text(text)
    server.faults["validation.npz"] = [status(503)]
    server.faults["shard-000000.tar"] = [short]
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(train, folder / "local.toml", local),
            pool.submit(train, tmp_path / "remote.toml", remote, **s3),
        ]
    for done in (run.result() for run in runs):
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(remote) == losses(local)
    assert len(losses(local)) == 3
    assert validation_losses(remote) == validation_losses(local)
    assert validation_losses(local)
    assert not server.faults["validation.npz"]
    assert not server.faults["shard-000000.tar"]


def test_a_plan_that_is_not_there_ends_a_training_with_one_line(folder, server, tmp_path):
    url = f"{server.url}/absent.npz"
    train_source = f'data.train={{shards="{server.url}/shards/train", plan="{url}"}}'
    done = train(folder / "local.toml", tmp_path / "run", train_source)
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stderr
    assert said == [f"error: {url}: 404 Not Found; check the URL and the credentials"]
    assert "Traceback" not in done.stderr


def command(*arguments: str, code: int = 0) -> dict[str, object]:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/roformer_dist"


def test_the_commands_take_urls(folder, server, cache):
    shards, plan = "/shards/train", "/train.npz"
    on_disk, behind_url = (
        {
            "folder": command("inspect", f"{root}{shards}"),
            "document": command("inspect", f"{root}{shards}", "--document", "3"),
            "plan": command("inspect", f"{root}{plan}"),
            "row": command("inspect", f"{root}{plan}", "--row", "2", "--shards", f"{root}{shards}"),
        }
        for root in (folder, server.url)
    )
    assert behind_url == on_disk
    assert cache.is_dir()
    for arguments in ((f"{shards}",), (f"{plan}", "--shards", f"{server.url}{shards}")):
        found = command("verify", f"{server.url}{arguments[0]}", *arguments[1:])
        assert found["problems"] == []
        assert found["checks"] == command("verify", f"{folder}{arguments[0]}", *arguments[1:])["checks"]


def test_verify_names_what_is_wrong_behind_a_url(server, cache):
    def flipped(request, data):
        middle = len(data) // 2
        body = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    url = f"{server.url}/shards/train"
    server.always["shard-000001.tar"] = flipped
    server.always["shard-000000.idx.npy"] = status(404)
    server.always["train.npz"] = flipped
    try:
        problems = command("verify", url, code=1)["problems"]
        assert problems[0].startswith(f"{url}/shard-000000.idx.npy: 404 Not Found")
        assert problems[1].startswith(f"{url}/shard-000001.tar: sha256")
        (problem,) = command("verify", f"{server.url}/train.npz", code=1)["problems"]
        assert problem.startswith(f"{server.url}/train.npz: ")
        for name in ("inspect", "verify"):
            with pytest.raises(DataError, match=rf"^{server.url}/absent/manifest\.json: 404 Not Found"):
                command(name, f"{server.url}/absent")
    finally:
        server.always.clear()
