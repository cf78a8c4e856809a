import importlib.util
import io
import json
from pathlib import Path

import pytest
import sentencepiece
from rich.console import Console
from test_data_tiny import tiny, tiny_texts

from roformer_dist.bench import run, tokenize
from roformer_dist.bench.harness import Sample
from roformer_dist.bench.tokenize import TokenizeJob, TokenizeSettings, prepare, same_tokens, tokenize_groups


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed, on a wide terminal."""
    output = io.StringIO()
    console = Console(file=output, width=200)
    real = run.run_benchmark
    monkeypatch.setattr(run, "run_benchmark", lambda plan, file: real(plan, file, console))
    return output


def test_ours_and_sentencepiece_do_the_same_work_and_absent_peers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: io.StringIO
) -> None:
    find = importlib.util.find_spec
    absent = ("tokenizers", "datatrove")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    settings = TokenizeSettings(
        (str(tiny().root / "text"),), ("documents", "long"), tiny().tokenizer.path, processes=2
    )
    assert run.run_tokenize(settings, 1, 120.0, tmp_path / "out.json") == 0
    content = json.loads((tmp_path / "out.json").read_text())
    texts = list(tiny_texts().values())
    tokens = sum(len(tiny().tokenizer.encode(text)) for text in texts)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tiny().tokenizer.path))
    plain = sum(len(raw.encode(text)) for text in texts)  # without escapes: U+2581 is one token, and lost
    documents, long = content["groups"]
    for entry, expected in zip(documents["contenders"], (tokens, plain)):
        [sample] = entry["samples"]
        assert sample["reported"]["tokens"] == expected
        assert sample["reported"]["bytes"] == sum(len(text.encode()) for text in texts)
        assert sample["reported"]["cpu_seconds"] > 0
        assert entry["figures"]["mb_per_second"]["median"] > 0
    newlines = len(texts) - 1
    found = [entry["samples"][0]["reported"]["tokens"] for entry in long["contenders"][:2]]
    assert found == [tokens + newlines, plain + newlines]
    status = {entry["name"]: entry["status"] for group in content["groups"] for entry in group["contenders"]}
    wanted = {"ours": "measured", "sentencepiece": "measured", "tokenizers": "missing"}
    assert status == wanted
    assert "tokenizers: not installed; pip install tokenizers" in quiet.getvalue()


@pytest.mark.slow
def test_writing_shards_is_measured(tmp_path: Path, quiet: io.StringIO) -> None:
    settings = TokenizeSettings((str(tiny().root / "text"),), ("shards",), tiny().tokenizer.path, processes=2)
    assert run.run_tokenize(settings, 1, 120.0, tmp_path / "out.json") == 0
    [group] = json.loads((tmp_path / "out.json").read_text())["groups"]
    measured = [entry for entry in group["contenders"] if entry["status"] == "measured"]
    # Both write an EOS after each document.
    tokens = [entry["samples"][0]["reported"]["tokens"] for entry in measured]
    assert tokens == [tiny().store.num_tokens] * len(tokens)
    if len(measured) == 1:
        assert 'datatrove: not installed; pip install "datatrove[processing]"' in quiet.getvalue()


def test_what_is_prepared_is_bounded_and_a_tokenizer_is_trained(tmp_path: Path) -> None:
    settings = TokenizeSettings((str(tiny().root / "text"),), vocab_size=300, max_mb=0.01, long_mb=0.005)
    facts = prepare(settings, tmp_path)
    assert 10_000 <= facts["bytes"] < 12_000
    assert 4990 < facts["long_bytes"] <= 5000
    groups = tokenize_groups(settings, tmp_path, facts)
    assert [len(group.contenders) for group in groups] == [3, 3, 2]
    job = TokenizeJob.from_json(groups[1].contenders[0].command[-1])
    assert (job.contender, job.workload, job.processes) == ("ours", "long", 1)


def test_another_tokenizer_is_refused() -> None:
    def sample(tokens: int) -> Sample:
        return Sample(1.0, 1, {"tokens": tokens})

    assert same_tokens(sample(10_000), sample(10_001)) is None
    assert "9,900 tokens against our 10,000" in (same_tokens(sample(10_000), sample(9_900)) or "")


def test_unknown_workloads_name_themselves() -> None:
    with pytest.raises(ValueError, match="--workloads 'words': choose from documents, long, shards"):
        TokenizeSettings(("x",), workloads=("words",))


@pytest.mark.skipif(importlib.util.find_spec("tokenizers") is None, reason="tokenizers is not installed")
def test_the_converted_tokenizer_gives_the_same_ids() -> None:
    from roformer_dist.bench.tokenize_child import convert

    converted = convert(tiny().tokenizer.path)
    for text in tiny_texts().values():
        assert converted.encode(text, add_special_tokens=False).ids == tiny().tokenizer.encode(text).tolist()


def test_rates_are_megabytes_over_seconds() -> None:
    sample = Sample(9.0, 1, {"bytes": 3_000_000, "seconds": 2.0, "cpu_seconds": 4.0, "tokens": 5})
    assert [metric.value(sample) for metric in tokenize.METRICS] == [1.5, 0.75]
