"""Files behind URLs from a real HTTP server with scripted faults and a real S3-speaking server."""

import resource
import threading
import time
from collections.abc import Iterator

import fsspec
import pytest
from buckets import bucket, fsspec_finds
from fsspec.config import conf
from fsspec.implementations.local import LocalFileSystem
from http_with_faults import (
    cut,
    drip,
    hang_up,
    other_bytes,
    serving,
    short,
    short_without_length,
    silent,
    stall,
    status,
)
from test_data_tiny import tiny

from roformer_dist.data.cache import ShardCache
from roformer_dist.data.errors import DamagedDocument, DataError
from roformer_dist.data.files import sha256_file
from roformer_dist.data.loader import DamageFound, Loader
from roformer_dist.data.objective import CausalObjective
from roformer_dist.data.plan import load_plans
from roformer_dist.data.remote import RefusedError, RetryPolicy, download, read_bytes
from roformer_dist.data.stages import Source, Stage
from roformer_dist.data.store import ShardStore

QUICK = RetryPolicy(stall=0.4, give_up=20.0, first_wait=0.01, longest_wait=0.05)
SHARD = "shard-000001.tar"


@pytest.fixture
def server():
    with serving(tiny().root) as it:
        yield it


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of the tiny corpus in a bucket of a server that speaks S3; fsspec knows where it is."""
    with bucket("corpus", tiny().root / "shards") as endpoint, fsspec_finds(endpoint):
        yield "s3://corpus/shards"


def expected():
    return [tiny().store.read(document).tolist() for document in range(len(tiny().store))]


def delivered(url, folder, policy=QUICK, max_bytes=2**30):
    with ShardStore(url, cache=ShardCache(folder, max_bytes, policy)) as store:
        return [store.read(document).tolist() for document in range(len(store))]


def test_delivery_over_http_equals_the_local_one(server, tmp_path):
    assert delivered(f"{server.url}/shards", tmp_path) == expected()
    before = len(server.requests)
    assert delivered(f"{server.url}/shards", tmp_path) == expected()
    assert server.requests[before:] == ["/shards/manifest.json"]  # all else comes from the cache


def test_delivery_over_s3_equals_the_local_one(s3, tmp_path):
    assert delivered(s3, tmp_path) == expected()


def test_delivery_over_a_file_url_equals_the_local_one(tmp_path):
    assert delivered(f"file://{tiny().root}/shards", tmp_path) == expected()


@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.idx.npy", SHARD])
@pytest.mark.parametrize(
    "faults",
    [
        lambda server: [status(503), status(500), status(429)],
        lambda server: [short, short_without_length],
        lambda server: [hang_up, stall(server)],
        lambda server: [silent(server), status(502)],
    ],
    ids=["statuses", "short", "hang-up", "silent"],
)
def test_what_can_pass_is_tried_again(server, tmp_path, faults, name):
    server.faults[name] = faults(server)
    wanted = len(server.faults[name]) + 1
    if name == "manifest.json":  # read without knowing its hash: a short one cannot always be told
        server.faults[name] = [fault for fault in server.faults[name] if fault is not short_without_length]
        wanted = len(server.faults[name]) + 1
    assert delivered(f"{server.url}/shards", tmp_path) == expected()
    assert server.count(name) == wanted


def test_a_short_manifest_without_a_length_is_found(server, tmp_path):
    server.faults["manifest.json"] = [short_without_length]
    with pytest.raises(DataError, match=r"manifest\.json: not valid JSON"):
        delivered(f"{server.url}/shards", tmp_path)


def test_waits_grow_between_attempts(server, tmp_path):
    server.faults[SHARD] = [status(503)] * 5
    policy = RetryPolicy(stall=5, give_up=60, first_wait=0.1, longest_wait=0.4)
    started = time.monotonic()
    download(f"{server.url}/shards/{SHARD}", tmp_path / "file", policy=policy)
    # Drawn below 0.1, 0.2, 0.4, 0.4 and 0.4 s.
    assert server.count(SHARD) == 6
    assert 0.05 < time.monotonic() - started < 15


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_what_cannot_pass_is_one_line_at_once(server, tmp_path, code):
    server.always["manifest.json"] = status(code)
    with pytest.raises(RefusedError, match=rf"^{server.url}/shards/manifest\.json: {code} ") as caught:
        delivered(f"{server.url}/shards", tmp_path)
    assert "\n" not in str(caught.value)
    assert server.count("manifest.json") == 1


@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.idx.npy", SHARD])
def test_a_bucket_that_fails_for_a_while_is_tried_again(s3, tmp_path, monkeypatch, name):
    with serving(tmp_path, upstream=conf["s3"]["endpoint_url"]) as server:
        monkeypatch.setitem(conf, "s3", {**conf["s3"], "endpoint_url": server.url})
        server.faults[name] = [status(503), short, hang_up, stall(server)]
        assert delivered(s3, tmp_path / "cache") == expected()
        # Each fault was met, and then it came whole.
        assert server.count(name) == 5
        assert server.faults[name] == []


@pytest.mark.parametrize("fault", [cut, other_bytes])
def test_a_shard_that_is_wrong_in_its_bucket_is_quarantined(s3, tmp_path, monkeypatch, fault):
    with serving(tmp_path, upstream=conf["s3"]["endpoint_url"]) as server:
        monkeypatch.setitem(conf, "s3", {**conf["s3"], "endpoint_url": server.url})
        server.always[SHARD] = fault
        _, state = quarantining(s3, tmp_path / "cache")
        assert server.count(SHARD) == (2 if fault is other_bytes else 3)
        assert state.num_quarantined > 0


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://corpus/nothing", "404 Not Found"),
        ("s3://no-such-bucket/shards", "404 Not Found"),
    ],
)
def test_what_is_not_in_a_bucket_is_one_line_at_once(s3, tmp_path, url, said):
    started = time.monotonic()
    with pytest.raises(RefusedError, match=rf"^{url}/manifest\.json: {said}") as caught:
        delivered(url, tmp_path)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < QUICK.give_up / 2


def test_wrong_credentials_are_one_line(s3, tmp_path, monkeypatch):
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setitem(conf, "s3", {"endpoint_url": conf["s3"]["endpoint_url"]})
    with pytest.raises(RefusedError, match=r"redentials") as caught:
        delivered(s3, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_bucket_behind_a_failing_server_is_tried_again_and_given_up(monkeypatch, tmp_path):
    with serving(tmp_path) as server:
        server.always["manifest.json"] = status(503)
        monkeypatch.setitem(conf, "s3", {"endpoint_url": server.url, "key": "test", "secret": "test"})
        policy = RetryPolicy(stall=5, give_up=2.0, first_wait=0.05, longest_wait=0.1)
        with pytest.raises(
            DataError, match=r"gave up after \d+ attempts in .*503 Service Unavailable"
        ) as caught:
            delivered("s3://corpus/shards", tmp_path, policy)
        assert server.count("manifest.json") >= 3
        # The library's own attempts are not hidden among them.
        assert f"after {server.count('manifest.json')} attempts" in str(caught.value)


@pytest.mark.parametrize("fault", ["stall", "503", "short", "nobody"])
def test_giving_up_is_bounded_and_said(server, tmp_path, fault):
    url = f"{server.url}/shards/{SHARD}"
    answer = {"stall": stall(server), "503": status(503), "short": short}
    if fault == "nobody":
        url = "http://127.0.0.1:9/shards/" + SHARD
    else:
        server.always[SHARD] = answer[fault]
    policy = RetryPolicy(stall=0.4, give_up=1.5, first_wait=0.05, longest_wait=0.2)
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"{url}: gave up after \d+ attempts in \d s \(limit 1\.5 s\)"):
        download(url, tmp_path / "file", policy=policy)
    assert time.monotonic() - started < 1.5 + 5 * 0.4 + 2


def test_a_server_that_always_sends_something_does_not_hold_an_attempt_for_ever(server, tmp_path):
    server.always[SHARD] = drip(server, 70_000, 0.1)
    policy = RetryPolicy(stall=0.5, attempt=1.5, give_up=0.1, first_wait=0.01, longest_wait=0.01)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"too slow: \d{6,} bytes in 1\.5 s"):
        download(f"{server.url}/shards/{SHARD}", tmp_path / "file", policy=policy)
    assert 1.5 < time.monotonic() - started < 10


def test_single_bytes_are_no_progress(server, tmp_path):
    server.always[SHARD] = drip(server, 1, 0.05)
    policy = RetryPolicy(stall=0.5, give_up=0.1, first_wait=0.01, longest_wait=0.01)
    with pytest.raises(DataError, match=r"stalled: \d+ bytes in 0\.5 s"):
        download(f"{server.url}/shards/{SHARD}", tmp_path / "file", policy=policy)


class Hanging(LocalFileSystem):
    """A file system that is not asynchronous, whose first reads hang."""

    protocol = "hanging"
    cachable = False
    hangs = 0
    wake = threading.Event()

    def _open(self, path, mode="rb", **kwargs):
        file = open(path, mode)  # noqa: SIM115
        if Hanging.hangs:
            Hanging.hangs -= 1

            class Slow:
                def read(self, size=-1):
                    Hanging.wake.wait(60)
                    return b"late"

                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    file.close()

            return Slow()
        return file


def test_a_file_system_that_hangs_is_left_and_tried_again(tmp_path):
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    (tmp_path / "data").write_bytes(b"x" * 200_000)
    url, copy = f"hanging://{tmp_path}/data", tmp_path / "copy"
    Hanging.hangs = 2
    assert download(url, copy, sha256=sha256_file(tmp_path / "data"), policy=QUICK)
    Hanging.wake.set()  # what comes late is not written
    time.sleep(0.2)
    assert copy.read_bytes() == b"x" * 200_000
    Hanging.wake.clear()
    Hanging.hangs = 100
    with pytest.raises(DataError, match=r"gave up after .*stalled: 0 bytes in 0\.2 s"):
        download(url, copy, policy=RetryPolicy(stall=0.2, give_up=0.5, first_wait=0.01, longest_wait=0.02))
    # None of them keeps the process from ending.
    assert {thread.daemon for thread in threading.enumerate() if thread.name == "transfer"} == {True}
    Hanging.hangs = 0
    Hanging.wake.set()


def test_an_origin_with_other_bytes_is_told_after_two_downloads(server, tmp_path):
    server.always[SHARD] = other_bytes
    with pytest.raises(DataError, match=rf"{SHARD}: document \d+ is damaged"):
        delivered(f"{server.url}/shards", tmp_path)
    assert server.count(SHARD) == 2


def quarantining(url, folder):
    """Twelve steps of a training that leaves damage out: tokens of each batch, and the last state."""
    with ShardStore(url, cache=ShardCache(folder, 2**30, QUICK)) as store:
        plan = tiny().plan()
        with Loader(
            [Stage((Source(store, (plan,)),))],
            seed=5,
            seq_len=plan.seq_len,
            global_batch=4,
            micro_batch_size=4,
            dp_rank=0,
            dp_size=1,
            objective=CausalObjective(),
        ) as loader:
            batches = []
            while len(batches) < 12:
                try:
                    batches.append(next(loader).micro_batches[0].input_ids.tolist())
                except DamageFound as damage:
                    loader.load_state(loader.state.leave_out(damage.damage))
            return batches, loader.state


@pytest.mark.parametrize("fault", [cut, short_without_length, other_bytes])
def test_a_shard_whose_origin_is_wrong_is_quarantined_and_not_asked_for_until_the_end(
    server, tmp_path, fault
):
    server.always[SHARD] = fault
    url = f"{server.url}/shards"
    started = time.monotonic()
    batches, state = quarantining(url, tmp_path / "a")
    assert server.count(SHARD) == (2 if fault is other_bytes else 3)
    assert time.monotonic() - started < QUICK.give_up / 2
    assert state.num_quarantined > 0
    # Another node comes to the same, from downloads of its own.
    assert quarantining(url, tmp_path / "b") == (batches, state)
    with (
        ShardStore(url, cache=ShardCache(tmp_path / "c", 2**30, QUICK)) as store,
        pytest.raises(DamagedDocument, match=rf"{SHARD}: document \d+ is damaged"),
    ):
        store.read(state.quarantined[0][0])
    # Repaired at its origin, it is read again by the next process.
    del server.always[SHARD]
    assert delivered(url, tmp_path / "a") == expected()


def test_a_server_that_cannot_be_reached_is_no_damage(server, tmp_path):
    server.always[SHARD] = status(503)
    policy = RetryPolicy(stall=0.4, give_up=0.5, first_wait=0.01, longest_wait=0.05)
    with pytest.raises(DataError, match="gave up after") as caught:
        delivered(f"{server.url}/shards", tmp_path, policy)
    assert not isinstance(caught.value, DamagedDocument)


def test_a_disk_that_is_full_is_said_at_once(server, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(
            RefusedError, match=r"its copy in .* cannot be written \(File too large\); .* TMPDIR"
        ):
            download(f"{server.url}/shards/{SHARD}", tmp_path / "file", policy=QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert server.count(SHARD) == 1


def test_secrets_of_a_url_are_not_said(server, tmp_path):
    host = server.url.removeprefix("http://")
    url = f"http://user:secret@{host}/shards/nothing?signature=hidden"
    with pytest.raises(RefusedError, match="404 Not Found") as caught:
        read_bytes(url)
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_settings_of_fsspec_are_kept(server, tmp_path, monkeypatch):
    seen = []

    def answer(request, data):
        seen.append(request.headers["Authorization"])
        status(404)(request, data)

    server.always["file"] = answer
    monkeypatch.setitem(conf, "http", {"client_kwargs": {"headers": {"Authorization": "Bearer token"}}})
    with pytest.raises(RefusedError):
        read_bytes(f"{server.url}/file")
    assert seen == ["Bearer token"]


def test_settings_of_s3_are_kept_beside_ours(tmp_path, monkeypatch):
    seen = []

    def answer(request, data):
        seen.append(request.headers["User-Agent"])
        status(403)(request, data)

    with serving(tmp_path) as server:
        server.always["file"] = answer
        settings = {"endpoint_url": server.url, "key": "test", "secret": "test"}
        settings["config_kwargs"] = {"user_agent_extra": "of-the-user"}
        monkeypatch.setitem(conf, "s3", settings)
        with pytest.raises(RefusedError, match="403"):
            read_bytes("s3://corpus/file", QUICK)
    assert seen
    assert all("of-the-user" in agent for agent in seen)


def test_a_bucket_that_cannot_be_reached_may_pass(monkeypatch):
    settings = {"endpoint_url": "http://127.0.0.1:9", "key": "test", "secret": "test"}
    monkeypatch.setitem(conf, "s3", settings)
    with pytest.raises(DataError, match=r"gave up after \d+ attempts .*127\.0\.0\.1:9"):
        read_bytes("s3://corpus/file", RetryPolicy(stall=1, give_up=0.3, first_wait=0.01, longest_wait=0.1))


@pytest.mark.parametrize(
    ("url", "said"),
    [("file://{}/absent", "404 Not Found"), ("file://{}", "IsADirectoryError"), ("http:///x", "InvalidUrl")],
)
def test_what_is_no_file_or_no_url_is_refused_at_once(tmp_path, url, said):
    with pytest.raises(RefusedError, match=rf"{said}.*; check the URL"):
        read_bytes(url.format(tmp_path), RetryPolicy(give_up=0.2, first_wait=0.01, longest_wait=0.1))


@pytest.mark.parametrize("url", ["nosuch://a/b", "http://[bad/b"])
def test_a_url_that_nothing_can_open_is_one_line(url):
    with pytest.raises(DataError) as caught:
        read_bytes(url)
    assert "\n" not in str(caught.value)


def test_plans_and_buckets_come_from_urls(tmp_path):
    from roformer_dist.data.packing import make_plans
    from roformer_dist.data.plan import PackOptions, save_buckets

    tiny().plan().save(tmp_path / "plan.npz")
    plans = make_plans(tiny().store, 128, PackOptions(method="bucket", min_len=32, max_len=128))
    save_buckets(plans, tmp_path / "buckets")
    with serving(tmp_path) as server:
        server.faults["plan.npz"] = [status(503)]
        assert load_plans(f"{server.url}/plan.npz?a=b")[0].hash == tiny().plan().hash
        assert [plan.hash for plan in load_plans(f"{server.url}/buckets")] == [plan.hash for plan in plans]
        data = (tmp_path / "plan.npz").read_bytes()
        (tmp_path / "plan.npz").write_bytes(data[:-9])
        with pytest.raises(DataError, match=rf"^{server.url}/plan\.npz: not a plan, or damaged"):
            load_plans(f"{server.url}/plan.npz")
