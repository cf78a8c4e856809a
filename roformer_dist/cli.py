"""The one command, ``roformer-dist``: it parses, calls and prints. Whatever is heavy is imported when used."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_tools.app import app as data_app
from roformer_dist import __version__
from roformer_dist.bench.app import bench_app
from roformer_dist.engine.ranks import end_process
from roformer_dist.exchange_app import export_app, import_app
from roformer_dist.generate_app import ProcessesOption, generate, start_processes

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="Long-context pretraining of rotary-position transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
launch_app = typer.Typer(help="Start all processes of a run.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(launch_app, name="launch")
app.add_typer(bench_app, name="bench")
app.add_typer(import_app, name="import")
app.add_typer(export_app, name="export")
app.command()(generate)

ConfigOption = Annotated[str, typer.Option("--config", help="TOML configuration of the run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one key, section.key=value; may be repeated.", metavar="KEY=VALUE"),
]
RunDirOption = Annotated[
    str | None, typer.Option("--run-dir", help="Directory of the run; default runs/NAME.", metavar="DIR")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON on standard output.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Directory for everything it makes.")] = Path(
        "quickstart"
    ),
    json_output: JsonOption = False,
) -> None:
    """The whole path on a real corpus: text, tokenizer, shards, training on two processes, report.

    Run it again and it reuses what is there, or goes on where it was stopped.

    Example: roformer-dist quickstart --out quickstart
    """
    from roformer_dist.quickstart import run_quickstart

    raise typer.Exit(run_quickstart(out, json_output=json_output))


@app.command()
def train(config: ConfigOption, overrides: SetOption = None, run_dir: RunDirOption = None) -> None:
    """ONE rank of a run, which is all of it when no launcher set rank variables; resumes by itself.

    Example: roformer-dist train --config configs/quickstart.toml --set parallel.sp_size=1
    """
    from roformer_dist.train import main as train_rank

    arguments = ["--config", config]
    for override in overrides or []:
        arguments += ["--set", override]
    raise typer.Exit(train_rank(arguments + (["--run-dir", run_dir] if run_dir else [])))


@launch_app.command()
def local(
    config: ConfigOption,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start; default: parallel.sp_size, one model replica.")
    ] = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and stop.")] = False,
) -> None:
    """All ranks on this machine, through the deepspeed launcher. Ctrl-C saves; the same command resumes.

    Example: roformer-dist launch local --config configs/quickstart.toml --processes 2
    """
    import shlex

    from roformer_dist.config import derive, load_config
    from roformer_dist.launching.local import free_port, local_command, run_local
    from roformer_dist.launching.outcome import report_outcome

    settings = load_config(config, overrides or [])
    count = processes or settings.parallel.sp_size
    derive(settings, count)
    command = local_command(
        config, processes=count, overrides=overrides or [], run_dir=run_dir, port=free_port()
    )
    if dry_run:
        print(shlex.join(command))
        return
    directory = Path(run_dir or Path("runs") / settings.name)
    code, interrupted = run_local(command)
    raise typer.Exit(report_outcome(directory, code, interrupted=interrupted))


@app.command()
def parity(
    config: ConfigOption,
    overrides: SetOption = None,
    sp: Annotated[
        int | None, typer.Option("--sp", min=1, max=64, help="Ranks that share a row; default: sp_size.")
    ] = None,
    ring: Annotated[
        int | None, typer.Option("--ring", min=1, help="How many of them are a ring; default: ring_size.")
    ] = None,
    zero: Annotated[
        int | None, typer.Option("--zero", min=0, max=3, help="ZeRO stage, of real processes.")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="Real processes under DeepSpeed instead of threads."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Is the mesh right? A small copy of a configuration, mesh against one process; exit code 1 if it is not.

    Example: roformer-dist parity --config configs/8b_128k_sp8_zero3.toml --sp 4
    """
    from roformer_dist.parity.command import run_parity

    ok = run_parity(
        config, overrides or [], sp=sp, ring=ring, zero=zero, processes=processes, as_json=json_output
    )
    raise typer.Exit(0 if ok else EXIT_FAILED)


@app.command()
def extrapolate(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", help="A checkpoint, or a run's directory for its newest.")
    ],
    lengths: Annotated[
        str | None,
        typer.Option(help="Contexts in tokens, 512,1024,…; default: 1, 2, 4, 8 times the trained length."),
    ] = None,
    methods: Annotated[str, typer.Option(help="RoPE scaling rules.")] = "none,linear,ntk,yarn",
    out: Annotated[
        Path | None, typer.Option("--out", help="Default: extrapolation in the run's directory.")
    ] = None,
    token_budget: Annotated[
        int, typer.Option(help="About how many tokens to feed; more narrows the intervals.")
    ] = 400_000,
    retrieval_trials: Annotated[
        int | None,
        typer.Option(
            min=0, help="Passages to find again at every length and depth; default: 2, or 0 if long."
        ),
    ] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Keep the report of this very checkpoint, if there.")
    ] = False,
    processes: ProcessesOption = None,
    ulysses_size: Annotated[
        int | None, typer.Option(min=1, help="How many of the processes trade tokens for heads.")
    ] = None,
    ring_size: Annotated[
        int | None, typer.Option(min=1, help="Between how many of them keys and values go round.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Perplexity by length and position and retrieval by depth beyond the trained length.

    Example: roformer-dist extrapolate --checkpoint runs/quickstart --lengths 512,1024,2048,4096
    """
    import json

    from rich.console import Console

    start_processes(processes)
    from roformer_dist.extrapolate import Spread, run_extrapolate

    summary = run_extrapolate(
        checkpoint,
        lengths=_integers("--lengths", lengths) if lengths else None,
        methods=methods.split(","),
        out=out,
        token_budget=token_budget,
        retrieval_trials=retrieval_trials,
        reuse=reuse,
        console=Console(stderr=json_output),
        spread=Spread(processes, ulysses_size, ring_size),
    )
    if json_output and summary is not None:
        print(json.dumps(summary, indent=2))


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} {text!r}: write whole numbers with commas between, such as 512,1024"
        ) from None


def _usage(error: typer.TyperException) -> int:
    """A mistake on the command line in one line; a group of commands named alone shows what it holds."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ != "NoArgsIsHelpError":  # its help is printed already
        message = " ".join(error.format_message().split()).rstrip(".")
        hint = f"; see {context.command_path} --help" if context else ""
        print(f"error: {message}{hint}", file=sys.stderr)
    return EXIT_INPUT


def _run() -> int | str | None:
    """The exit code: user errors are one line and 2."""
    try:
        return app(prog_name="roformer-dist", standalone_mode=False)
    except typer.TyperException as error:
        return _usage(error)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_INPUT
    except SystemExit as error:
        return error.code


def main() -> None:
    """Entry point: user errors are one line and exit code 2; an interrupt is exit code 130."""
    try:
        code = _run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)
    started_by = {"LOCAL_RANK", "SLURM_PROCID"} & os.environ.keys()
    if started_by and "roformer_dist.engine.group" in sys.modules:  # a rank among others
        end_process(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


if __name__ == "__main__":
    main()
