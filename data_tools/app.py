"""``roformer-dist data``: the commands of the modules beside this one, in the order of their use."""

from __future__ import annotations

import typer

from data_tools import build_commands, plan_commands

app = typer.Typer(
    help="Prepare text: corpus, tokenizer, shards, pack, inspect, verify.", no_args_is_help=True
)
for _command in (
    build_commands.corpus,
    build_commands.tokenizer,
    build_commands.shards,
    plan_commands.pack,
    plan_commands.inspect,
    plan_commands.verify,
):
    app.command()(_command)
