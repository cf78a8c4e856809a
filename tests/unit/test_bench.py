"""The benchmark harness on trivial commands, and its reports; no peer needs to be installed."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from roformer_dist.bench.harness import (
    Contender,
    Group,
    Limits,
    Measured,
    Metric,
    Sample,
    Spread,
    ratios,
    run_group,
    run_sample,
)
from roformer_dist.bench.report import Result, as_json, result_table
from roformer_dist.bench.run import Plan, run_benchmark
from roformer_dist.bench.startup import METRICS as STARTUP_METRICS
from roformer_dist.bench.startup import startup_group

SECONDS = Metric("seconds", "seconds", lambda s: s.seconds, lambda value: f"{value:.2f}")
PYTHON = (sys.executable, "-I", "-S", "-c")


def python(name: str, code: str, role: str = "ours", **more: object) -> Contender:
    return Contender(name, role, (*PYTHON, code), **more)  # pyright: ignore[reportArgumentType]


def measured(role: str, *seconds: float, failure: str | None = None) -> Measured:
    contender = Contender(role, role, ("true",))  # pyright: ignore[reportArgumentType]
    return Measured(contender, [Sample(value, 1) for value in seconds], failure)


def render(result: Result) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result_table(result))
    return console.export_text()


# Figures


def test_a_ratio_compares_samples_of_one_round() -> None:
    # The machine is ten times slower in the second round and the third: medians would say 10 / 4 = 2.5.
    ours, peer = measured("ours", 1.0, 10.0, 10.0), measured("peer", 2.0, 20.0, 4.0)
    pairs = ratios(ours, peer, SECONDS)
    assert pairs == [0.5, 0.5, 2.5]
    assert Spread.of(pairs) == Spread(0.5, 0.5, 2.5)


def test_spread_is_median_smallest_and_largest() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 9.0]) == Spread(3.5, 1.0, 9.0)
    assert Spread.of([]) is None


def test_who_failed_has_no_ratio() -> None:
    assert ratios(measured("ours", 1.0), measured("peer", 2.0, failure="exit code 3"), SECONDS) == []
    assert ratios(measured("ours", 1.0, failure="exit code 3"), measured("peer", 2.0), SECONDS) == []


# Samples and rounds


def test_contenders_take_turns_and_warm_ups_do_not_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = f"open({str(log)!r}, 'a').write('%s')"
    group = Group("turns", {}, [python("A", line % "A"), python("B", line % "B", "peer")])
    seen: list[str] = []
    entries = run_group(group, rounds=2, warmups=1, limits=Limits(60), environment={}, advance=seen.append)
    assert log.read_text() == "ABABAB"
    assert "".join(seen) == "ABABAB"
    assert [len(entry.samples) for entry in entries] == [2, 2]


def test_peak_memory_is_the_childs_own() -> None:
    # This process holds far more than the children: nothing of it may be counted as theirs.
    ballast = bytearray(os.urandom(2**20)) * 192
    small = run_sample(python("small", "pass"), Limits(60), {})
    large = run_sample(python("large", "x = b'x' * (96 << 20)"), Limits(60), {})
    assert isinstance(small, Sample)
    assert isinstance(large, Sample)
    assert small.peak < 60 << 20 < len(ballast)
    assert large.peak - small.peak == pytest.approx(96 << 20, rel=0.1)


def test_environment_and_last_line_of_output_arrive() -> None:
    code = "import os, json; print('chatter'); print(json.dumps({'saw': os.environ['BENCH_TEST']}))"
    sample = run_sample(python("x", code, reports=True), Limits(60), {"BENCH_TEST": "yes"})
    assert isinstance(sample, Sample)
    assert sample.reported == {"saw": "yes"}


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("raise MemoryError('no room\\nfor it')", "exit code 1: for it"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("print('hello')", "its last line is no JSON: 'hello'"),
    ],
)
def test_a_failing_child_is_one_line(code: str, line: str) -> None:
    assert run_sample(python("x", code, reports=True), Limits(60), {}) == line


def test_a_program_that_is_not_there_is_one_line() -> None:
    answer = run_sample(Contender("x", "ours", ("/nonexistent/program",)), Limits(60), {})
    assert isinstance(answer, str)
    assert "/nonexistent/program" in answer
    assert "\n" not in answer


def test_a_child_that_hangs_is_ended_with_all_of_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"""if True:
        import os, time
        open({str(pid_file)!r}, 'w').write(str(os.getpid()))
        print('so far', flush=True)
        time.sleep(60)"""
    start = time.perf_counter()
    said = run_sample(python("x", code), Limits(timeout=2), {})
    assert said == "ended after 2 s (--timeout); its last line: so far"
    assert time.perf_counter() - start < 20
    pid = int(pid_file.read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.05)
    # A zombie that its new parent has not collected is over, too.
    assert "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts this on Linux only")
def test_memory_limit_makes_an_allocation_fail() -> None:
    code = "x = bytearray(512 << 20)"
    assert run_sample(python("x", code), Limits(60, 256 << 20), {}) == "exit code 1: MemoryError"


def test_who_failed_sits_out_and_the_others_go_on() -> None:
    group = Group("g", {}, [python("A", "pass"), python("B", "raise SystemExit(3)", "peer")])
    ours, peer = run_group(group, rounds=2, warmups=0, limits=Limits(60), environment={})
    assert len(ours.samples) == 2
    assert ours.failure is None
    assert peer.samples == []
    assert peer.failure == "exit code 3"


# Reports


def trivial_plan(peer: Contender) -> Plan:
    group = Group("trivial", {"what": "nothing"}, [python("A", "pass"), peer])
    return Plan("trivial", [group], (SECONDS,), {"samples": 2}, samples=2, warmup_rounds=0, limits=Limits(60))


def test_a_missing_peer_is_named_with_its_install_line(tmp_path: Path) -> None:
    install = 'transformers: not installed; pip install "roformer-dist[bench]"'
    console = Console(width=120, record=True, file=io.StringIO())
    file = tmp_path / "out.json"
    plan = trivial_plan(Contender("hf", "peer", ("/nonexistent",), missing=install))
    assert run_benchmark(plan, file, console) == 0
    text = console.export_text()
    # In the table, and as a line that can be copied.
    assert text.count("not installed; pip install") == 2
    assert install in text
    peer = json.loads(file.read_text())["groups"][0]["contenders"][1]
    assert (peer["name"], peer["status"], peer["message"]) == ("hf", "missing", install)


def test_a_failing_peer_is_reported_and_the_exit_code_is_1(tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    file = tmp_path / "out.json"
    assert run_benchmark(trivial_plan(python("B", "raise SystemExit('[odd]')", "peer")), file, console) == 1
    assert "B (trivial): exit code 1: [odd]" in console.export_text().splitlines()
    ours, peer = json.loads(file.read_text())["groups"][0]["contenders"]
    assert (ours["status"], peer["status"]) == ("measured", "failed")


def test_json_holds_figures_machine_versions_and_date(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    assert run_benchmark(trivial_plan(python("B", "pass", "peer")), file, Console(file=io.StringIO())) == 0
    content = json.loads(file.read_text())
    assert set(content) == {
        *("schema", "benchmark", "date", "finished", "machine", "versions", "load_average_at_end"),
        *("parameters", "groups", "conclusions"),
    }
    assert content["schema"] == 1
    assert content["date"].endswith("+00:00")
    assert {"cpu", "usable_cores", "memory_bytes", "load_average"} <= set(content["machine"])
    assert content["versions"]["torch"]
    assert content["parameters"] == {"samples": 2}
    (group,) = content["groups"]
    assert (group["title"], group["parameters"]) == ("trivial", {"what": "nothing"})
    ours, peer = (contender["figures"]["seconds"] for contender in group["contenders"])
    assert ours["ours_over_it"] is None
    assert len(peer["values"]) == 2
    pairs = [a / b for a, b in zip(ours["values"], peer["values"])]
    assert peer["ours_over_it"] == pytest.approx(
        {"median": sum(pairs) / 2, "low": min(pairs), "high": max(pairs)}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_json_into_a_directory_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its directory does not exist"):
        run_benchmark(trivial_plan(python("B", "pass")), tmp_path / "no" / "out.json")


def test_the_table_shows_medians_spread_and_ratio() -> None:
    entries = [measured("ours", 1.0, 3.0, 2.0), measured("peer", 4.0, 6.0, 4.0)]
    group = Group("g", {}, [entry.contender for entry in entries])
    text = render(Result(group, entries, (SECONDS,)))
    for cell in ("2.00", "1.00 to 3.00", "4.00", "4.00 to 6.00", "0.50", "0.25 to 0.50"):
        assert cell in text


# startup


def test_startup_compares_the_real_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    contenders = {contender.name: contender for contender in startup_group().contenders}
    assert contenders["roformer-dist --help"].role == "ours"
    for name in ("deepspeed", "torchrun"):
        command = contenders[f"{name} --help"].command
        assert command == (str(Path(sys.executable).parent / name), "--help")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    missing = {contender.name: contender.missing for contender in startup_group().contenders}
    assert missing["torchrun --help"] == "torchrun: not installed; pip install torch"
    assert missing["roformer-dist --help"] is None
    assert [metric.key for metric in STARTUP_METRICS] == ["seconds", "peak_bytes"]


def test_the_json_of_a_floor_has_a_ratio_too() -> None:
    entries = [measured("ours", 2.0), measured("floor", 1.0)]
    result = Result(Group("g", {}, []), entries, (SECONDS,))
    content = as_json("x", [result], parameters={}, facts={})
    assert content["groups"][0]["contenders"][1]["figures"]["seconds"]["ours_over_it"]["median"] == 2.0
