"""The node's cache of shards, shared by real processes: one download, a bound that holds, repair, read-ahead."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
from http_with_faults import other_bytes, serving, silent, status
from test_data_loader import loader
from test_data_tiny import tiny

from roformer_dist.data.cache import ShardCache
from roformer_dist.data.cache_files import CachedFile
from roformer_dist.data.errors import DamagedDocument, DataError
from roformer_dist.data.remote import RetryPolicy
from roformer_dist.data.shards import write_shards
from roformer_dist.data.sources import CachedSource
from roformer_dist.data.store import ShardStore

QUICK = RetryPolicy(stall=5.0, give_up=30.0, first_wait=0.01, longest_wait=0.05)
SHARD = "shard-000001.tar"
SHARDS = tiny().store.manifest.shards
LARGEST = max(shard.bytes for shard in SHARDS)

# Reads all documents a few times in an order of its own, and prints how many files it downloaded.
READER = """
import random, sys
from roformer_dist.data.cache import ShardCache
from roformer_dist.data.cache_files import CachedFile
from roformer_dist.data.remote import RetryPolicy
from roformer_dist.data.shards import write_shards
from roformer_dist.data.sources import CachedSource
from roformer_dist.data.store import ShardStore

url, local, folder, max_bytes, rounds, seed = sys.argv[1:]
cache = ShardCache(folder, int(max_bytes), RetryPolicy(5.0, 60.0, 30.0, 0.01, 0.05))
right = ShardStore(local)
numbers = list(range(len(right)))
print("ready", flush=True)
sys.stdin.readline()
with ShardStore(url, cache=cache) as store:
    for _ in range(int(rounds)):
        random.Random(int(seed)).shuffle(numbers)
        store.prefetch(numbers[:10])
        for number in numbers:
            assert store.read(number).tolist() == right.read(number).tolist(), number
print(cache.downloads)
"""


@pytest.fixture
def server():
    with serving(tiny().root) as it:
        yield it


def start(server, folder, max_bytes, rounds=1, processes=4):
    """Readers that have imported everything and now go at once."""
    arguments = [
        f"{server.url}/shards",
        str(tiny().root / "shards"),
        str(folder),
        str(max_bytes),
        str(rounds),
    ]
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, *arguments, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(processes)
    ]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    for reader in readers:
        reader.stdin.write("\n")
        reader.stdin.flush()
    return readers


def finish(readers):
    """The downloads of each."""
    said = [reader.communicate(timeout=120) for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * len(readers), said
    return [int(out) for out, _ in said]


def of_shards(server):
    return Counter(path.rpartition("/")[2] for path in server.requests if path.endswith(".tar"))


def test_processes_of_a_node_download_a_file_once(server, tmp_path):
    server.body_seconds = 0.02
    downloads = finish(start(server, tmp_path, 2**30))
    assert of_shards(server) == {shard.name: 1 for shard in SHARDS}
    assert sum(downloads) == len(SHARDS)
    others = Counter(path for path in server.requests if path.endswith(".npy"))
    assert set(others.values()) == {1}
    # Threads that certainly ask at the same time, for a small file and a shard.
    server.body_seconds, cache = 0.3, ShardCache(tmp_path / "threads", 2**30, QUICK)
    shard, url = SHARDS[0], f"{server.url}/shards"
    ask = [lambda: cache.read(f"{url}/{shard.index_name}", shard.index_sha256)] * 4
    ask += [lambda: cache.open(f"{url}/{shard.name}", shard.sha256, shard.bytes).release()] * 4
    with ThreadPoolExecutor(8) as pool:
        [future.result() for future in [pool.submit(each) for each in ask]]
    assert [server.count(name) for name in (shard.index_name, shard.name)] == [2, 2]


@pytest.fixture
def many_shards(tmp_path):
    write_shards(tiny().files, tiny().tokenizer, tmp_path / "many/shards", shard_bytes=512)
    with serving(tmp_path / "many") as it:
        yield it


def test_the_bound_holds_while_processes_read_and_evict(many_shards, tmp_path):
    folder, stored = tmp_path / "cache", many_shards.folder / "shards"
    sizes = [path.stat().st_size for path in stored.glob("*.tar")]
    small = sum(path.stat().st_size for path in stored.glob("*.npy"))
    max_bytes = small + 3 * max(sizes)
    assert sum(sizes) > 4 * max(sizes)
    readers = start(many_shards, folder, max_bytes, processes=3)
    cache, most = ShardCache(folder, max_bytes), 0
    while any(reader.poll() is None for reader in readers):
        with cache._mutex("folder"):
            most = max(most, sum(stat.st_size for _, stat in cache._files()))
        time.sleep(0.005)
    finish(readers)
    assert max(sizes) < most <= max_bytes
    assert max(of_shards(many_shards).values()) > 1  # some were evicted and came again
    assert cache.used_bytes() <= max_bytes
    assert not [path for path in folder.iterdir() if path.suffix in (".partial", ".damaged")]


def test_what_is_left_of_a_killed_download_is_used_by_nobody(server, tmp_path):
    server.faults[SHARD] = [silent(server)]
    (reader,) = start(server, tmp_path, 2**30, processes=1)
    while server.faults[SHARD] or not list(tmp_path.glob("*.partial")):
        time.sleep(0.01)
    reader.kill()
    reader.communicate()
    (tmp_path / f"{'0' * 64}.9.partial").write_bytes(b"of an origin that nobody reads any more")
    assert finish(start(server, tmp_path, 2**30, processes=1)) >= [1]
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".partial"]


def poison(folder, shard):
    path = folder / shard.sha256
    data = path.read_bytes()
    path.write_bytes(bytes(byte ^ 1 for byte in data))


@pytest.mark.parametrize("threads", [1, 4])
def test_a_poisoned_file_is_dropped_and_comes_again(server, tmp_path, monkeypatch, threads):
    cache = ShardCache(tmp_path, 2**30, QUICK)
    sha256, renew, mine = CachedFile.sha256, CachedSource.renew, threading.local()
    renewed, all_have_read = [], threading.Barrier(threads)

    def renew_together(source, shard):
        renewed.append(shard.name)
        if not hasattr(mine, "waited"):
            mine.waited = all_have_read.wait(timeout=30)
        return renew(source, shard)

    # While one thread looks at the file and drops it, no other may find it in the cache again.
    monkeypatch.setattr(CachedFile, "sha256", lambda file: time.sleep(0.1) or sha256(file))
    monkeypatch.setattr(CachedSource, "renew", renew_together)
    with ShardStore(f"{server.url}/shards", cache=cache) as store, ThreadPoolExecutor(threads) as pool:
        numbers = [n for n in range(len(store)) if store.shard_of(np.array([n]))[0] == 1]
        store.read(numbers[0])
        poison(tmp_path, SHARDS[1])
        read = pool.map(lambda _: [store.read(number).tolist() for number in numbers], range(threads))
        assert list(read) == [[tiny().store.read(number).tolist() for number in numbers]] * threads
        # A file that is right, because another thread has got it since, stays.
        assert renew(store._source, SHARDS[1])
        store.read(numbers[0])
    assert renewed == [SHARD] * threads
    assert server.count(SHARD) == 2


def test_a_sector_that_the_disk_has_lost_under_the_cache_is_repaired(server, tmp_path):
    with ShardStore(f"{server.url}/shards", cache=ShardCache(tmp_path, 2**30, QUICK)) as store:
        number = SHARDS[0].documents
        store.read(number)
        with open("/proc/self/mem", "rb") as unreadable:
            os.dup2(unreadable.fileno(), store._source._files[SHARDS[1].sha256]._file.fileno())
        assert store.read(number).tolist() == tiny().store.read(number).tolist()


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped index"])
def test_other_damage_of_the_cache_is_repaired(server, tmp_path, damage):
    url = f"{server.url}/shards"
    cache = ShardCache(tmp_path, 2**30, QUICK)
    with ShardStore(url, cache=cache) as store:
        [store.read(number) for number in range(len(store))]
    sha256 = SHARDS[1].index_sha256 if damage == "flipped index" else SHARDS[1].sha256
    path = tmp_path / sha256
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:512], "empty": b"", "flipped index": data}[damage])
    with ShardStore(url, cache=cache) as store:
        for number in range(len(store)):
            assert store.read(number).tolist() == tiny().store.read(number).tolist()
    assert server.count(SHARDS[1].index_name if damage == "flipped index" else SHARD) == 2


def test_a_cache_that_spoils_all_it_is_given_ends(server, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path, 2**30, QUICK)
    fetch = cache._fetch

    def spoil(url, sha256, size):
        file = fetch(url, sha256, size)
        poison(tmp_path, SHARDS[1]) if sha256 == SHARDS[1].sha256 else None
        return file

    monkeypatch.setattr(cache, "_fetch", spoil)
    with ShardStore(f"{server.url}/shards", cache=cache) as store:
        number = int(np.flatnonzero(store.shard_of(np.arange(len(store))) == 1)[0])
        with pytest.raises(DamagedDocument, match=f"{number:012d} is damaged"):
            store.read(number)
    assert server.count(SHARD) <= 3


def test_a_damaged_origin_is_asked_again_by_the_next_training_only(server, tmp_path):
    server.always[SHARD] = other_bytes
    number = int(np.flatnonzero(tiny().store.shard_of(np.arange(41)) == 1)[0])
    for _ in range(2):
        cache = ShardCache(tmp_path, 2**30, QUICK)
        before = server.count(SHARD)
        with ShardStore(f"{server.url}/shards", cache=cache) as store:
            for _ in range(3):
                with pytest.raises(DamagedDocument):
                    store.read(number)
        assert server.count(SHARD) == before + 2
    server.always.clear()
    with ShardStore(f"{server.url}/shards", cache=ShardCache(tmp_path, 2**30, QUICK)) as store:
        assert store.read(number).tolist() == tiny().store.read(number).tolist()


def test_who_waited_for_a_download_that_failed_fails_with_it(server, tmp_path):
    server.always[SHARD] = status(503)
    policy = RetryPolicy(stall=5, give_up=1.0, first_wait=0.05, longest_wait=0.1)
    cache = ShardCache(tmp_path, 2**30, policy)
    errors = []

    def work():
        try:
            cache.open(f"{server.url}/shards/{SHARD}", SHARDS[1].sha256, SHARDS[1].bytes)
        except DataError as error:
            errors.append(str(error))

    workers = [threading.Thread(target=work) for _ in range(4)]
    started = time.monotonic()
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert time.monotonic() - started < 3
    assert len(errors) == 4
    assert len(set(errors)) == 1
    assert "gave up after" in errors[0]
    # A later try is a new one, and what it leaves is no record of a failure.
    server.always.clear()
    cache.open(f"{server.url}/shards/{SHARD}", SHARDS[1].sha256, SHARDS[1].bytes).release()
    assert not list(tmp_path.glob("locks/*.failed"))
    # At most 257 files, whatever is downloaded.
    assert {len(path.stem) for path in tmp_path.glob("locks/*.lock") if path.stem != "folder"} == {2}


def test_old_records_of_failures_go_with_the_next_start(tmp_path):
    ShardCache(tmp_path)
    (tmp_path / "locks/abc.failed").write_text("old")
    os.utime(tmp_path / "locks/abc.failed", (1, 1))
    (tmp_path / "locks/def.failed").write_text("new")
    ShardCache(tmp_path)
    assert [path.name for path in tmp_path.glob("locks/*.failed")] == ["def.failed"]


def test_a_cache_that_is_too_small_says_so(server, tmp_path):
    cache = ShardCache(tmp_path, LARGEST - 1, QUICK)
    large = max(SHARDS, key=lambda shard: shard.bytes)
    with pytest.raises(DataError, match=r"more than the whole cache may hold .*data\.cache_gb"):
        cache.open(f"{server.url}/shards/{large.name}", large.sha256, large.bytes)
    policy = RetryPolicy(stall=5, give_up=0.3)
    full = ShardCache(tmp_path / "full", LARGEST + 100, policy)
    held = full.open(f"{server.url}/shards/{SHARD}", SHARDS[1].sha256, SHARDS[1].bytes)
    with pytest.raises(DataError, match=r"bytes are being read or downloaded.*data\.cache_gb"):
        full.open(f"{server.url}/shards/{SHARDS[0].name}", SHARDS[0].sha256, SHARDS[0].bytes)
    held.release()
    full.open(f"{server.url}/shards/{SHARDS[0].name}", SHARDS[0].sha256, SHARDS[0].bytes).release()
    # What made room is gone for who still has it open, and takes no space.
    assert not held.acquire()
    assert held.size == 0
    with pytest.raises(DataError, match="choose another folder"):
        ShardCache("/proc/nothing")


def test_prefetch_brings_shards_before_they_are_read(server, tmp_path):
    with ShardStore(f"{server.url}/shards", cache=ShardCache(tmp_path, 2**30, QUICK)) as store:
        assert not of_shards(server)
        store.prefetch(range(len(store)))
        wanted = min(8, len(SHARDS))
        deadline = time.monotonic() + 30
        while len([path for path in tmp_path.iterdir() if path.name in {s.sha256 for s in SHARDS}]) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        before = server.count(SHARDS[0].name)
        store.read(0)
        assert server.count(SHARDS[0].name) == before == 1


def test_prefetch_goes_on_when_it_has_brought_what_was_asked_first(many_shards, tmp_path):
    with ShardStore(f"{many_shards.url}/shards", cache=ShardCache(tmp_path / "cache", 2**30, QUICK)) as store:
        shards = store.manifest.shards
        assert len(shards) > 10
        firsts = np.cumsum([0, *(shard.documents for shard in shards)]).tolist()
        deadline = time.monotonic() + 30
        for shard, first in zip(shards[:12], firsts):
            store.prefetch([first])
            while not (tmp_path / "cache" / shard.sha256).exists():
                assert time.monotonic() < deadline
                time.sleep(0.005)


def test_a_loader_prefetches_what_its_rank_reads_four_steps_later(server, tmp_path, monkeypatch):
    told, read, read_stored = [], [], ShardStore.read_stored

    def noted(store, document, *rest):
        read.append(document)
        return read_stored(store, document, *rest)

    monkeypatch.setattr(ShardStore, "prefetch", lambda store, documents: told.append(set(documents.tolist())))
    monkeypatch.setattr(ShardStore, "read_stored", noted)
    cache = ShardCache(tmp_path, 2**30, QUICK)
    with (
        ShardStore(f"{server.url}/shards", cache=cache) as store,
        loader(store, dp_rank=1, dp_size=2) as steps,
    ):
        of_steps = []
        for _ in range(9):
            read.clear()
            next(steps)
            of_steps.append(set(read))
    assert told[:5] == of_steps[4:]


def test_the_least_recently_read_goes_first(server, tmp_path):
    first, second, third = SHARDS[:3]
    cache = ShardCache(tmp_path, 2 * LARGEST, QUICK)

    def read(shard):
        cache.open(f"{server.url}/shards/{shard.name}", shard.sha256, shard.bytes).release()

    for shard, seconds in ((first, 1), (second, 2)):
        read(shard)
        os.utime(tmp_path / shard.sha256, (seconds, seconds))
    read(first)
    read(third)
    assert [(tmp_path / shard.sha256).exists() for shard in (first, second, third)] == [True, False, True]


def test_a_cache_that_evicts_what_is_read_side_by_side_warns_once(server, tmp_path, caplog):
    with ShardStore(f"{server.url}/shards", cache=ShardCache(tmp_path, LARGEST + 100, QUICK)) as store:
        numbers = [int(np.flatnonzero(store.shard_of(np.arange(len(store))) == shard)[0]) for shard in (0, 1)]
        for number in 3 * numbers:
            assert store.read(number).tolist() == tiny().store.read(number).tolist()
    (said,) = (record.getMessage() for record in caplog.records if "evicted" in record.getMessage())
    assert "shard-000000.tar was evicted between two reads" in said
    assert "(data.cache_gb)" in said


def test_a_failed_prefetch_is_told_to_who_reads(server, tmp_path):
    server.always[SHARDS[0].name] = status(403)
    with ShardStore(f"{server.url}/shards", cache=ShardCache(tmp_path, 2**30, QUICK)) as store:
        store.prefetch([0])
        with pytest.raises(DataError, match=r"shard-000000\.tar: 403 Forbidden"):
            store.read(0)


@pytest.mark.parametrize("workers", [0, 4])
def test_batches_from_a_url_are_those_from_the_disk(server, tmp_path, workers):
    server.body_seconds = 0.01
    server.faults[SHARD] = [status(503)]
    cache = ShardCache(tmp_path, 2**30, QUICK)

    def steps(store):
        with loader(store, workers=workers) as it:
            return [
                [(b.input_ids.tolist(), b.labels.tolist()) for b in step.micro_batches]
                for step in islice(it, 6)
            ]

    with ShardStore(f"{server.url}/shards", cache=cache) as store:
        assert steps(store) == steps(tiny().store)
