"""The command: help with examples, one line for a user's mistake, exit codes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import roformer_dist
from roformer_dist import cli, train
from roformer_dist.cli import app

RECIPE = Path(roformer_dist.__file__).parent.parent / "configs" / "quickstart.toml"
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of ``roformer-dist ARGUMENTS``, in this process."""
    monkeypatch.setattr(sys, "argv", ["roformer-dist", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def commands(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    children = getattr(command, "commands", None)
    if children is None:
        return [path]
    return [found for name, child in children.items() for found in commands(child, (*path, name))]


COMMANDS = commands(typer.main.get_command(app))


def test_the_commands_of_the_design_are_there() -> None:
    data = {("data", name) for name in ("corpus", "tokenizer", "shards", "pack", "inspect", "verify")}
    assert data | {("quickstart",), ("train",), ("launch", "local"), ("extrapolate",), ("generate",)} <= set(
        COMMANDS
    )


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_of_itself(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    assert re.search(rf"Example: roformer-dist {' '.join(path)}\b", " ".join(result.output.split()))


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == roformer_dist.__version__


def test_dry_run_prints_a_line_that_a_shell_reads_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "it's a run.toml"
    file.write_text(RECIPE.read_text())
    override = 'model.rope.scaling={kind = "linear", factor = 2.0}'
    arguments = ["--config", str(file), "--set", override, "--run-dir", str(tmp_path / "r 1")]
    assert main(monkeypatch, "launch", "local", *arguments, "--dry-run") == 0
    command = shlex.split(capsys.readouterr().out)
    assert command[command.index("--module") + 1 :] == ["roformer_dist.train", *arguments]
    # As many processes as share a sequence, unless told otherwise.
    assert command[command.index("--num_accelerators") + 1] == "2"
    assert not (tmp_path / "r 1").exists()
    assert (
        main(
            monkeypatch,
            "launch",
            "local",
            *arguments,
            "--processes",
            "4",
            "--set",
            "train.micro_batch_size=4",
            "--dry-run",
        )
        == 0
    )
    assert "--num_accelerators 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "No such option: --nonsense; see roformer-dist --help"),
        (["bench", "tra"], "No such command 'tra'"),
        (["train"], "Missing option '--config'; see roformer-dist train --help"),
        *(
            (
                ["launch", "local", "--config", str(RECIPE), "--processes", count],
                "Invalid value for '--processes'",
            )
            for count in ("0", "-2", "two")
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(monkeypatch, *arguments) == 2
    out, err = capfd.readouterr()
    assert err.startswith(f"error: {message}")
    assert (err.count("\n"), out) == (1, "")


def test_a_group_alone_shows_its_commands(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "data") == 2
    out, err = capfd.readouterr()
    assert "shards" in out
    assert err == ""


@pytest.mark.parametrize("command", [("launch", "local"), ("train",)], ids=" ".join)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "no.toml"], "error: no.toml: no such configuration file"),
        (
            ["--config", str(RECIPE), "--set", "model.num_head=4"],
            f"error: {RECIPE}: model.num_head: unknown key",
        ),
        (["--config", str(RECIPE), "--set", "seed"], "error: --set 'seed': write section.key=value"),
    ],
    ids=["file", "key", "override"],
)
def test_a_user_s_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    arguments: list[str],
    message: str,
) -> None:
    assert main(monkeypatch, *command, *arguments) == 2
    out, err = capfd.readouterr()
    assert err.startswith(message)
    assert (err.count("\n"), out) == (1, "")


def test_processes_that_do_not_fit_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(RECIPE), "--processes", "3", "--dry-run"]
    assert main(monkeypatch, "launch", "local", *arguments) == 2
    assert capfd.readouterr().err.startswith("error: parallel.sp_size = 2 does not divide the 3 processes")


def test_a_mistake_that_every_rank_finds_is_said_by_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    said = []
    for rank in "01":
        for name, value in (place | {"RANK": rank}).items():
            monkeypatch.setenv(name, value)
        assert train.main(["--config", "no.toml"]) == 2
        said.append(capfd.readouterr().err)
    assert said == ["error: no.toml: no such configuration file\n", ""]


def test_rank_variables_that_make_no_sense_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert train.main(["--config", str(RECIPE)]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: rank variables are incomplete")
    assert err.count("\n") == 1


def test_the_installed_command_is_this_one() -> None:
    script = Path(sys.executable).with_name("roformer-dist")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == roformer_dist.__version__
