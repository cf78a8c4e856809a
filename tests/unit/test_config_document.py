"""docs/configuration.md is what the schema says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

import roformer_dist
from roformer_dist.config import ModelConfig, RunShape
from roformer_dist.config.document import markdown
from roformer_dist.config.section import Section

PAGE = Path(roformer_dist.__file__).parent.parent / "docs" / "configuration.md"
AGAIN = "python -m roformer_dist.config.document > docs/configuration.md"


def sections(base: type[BaseModel]) -> list[type[BaseModel]]:
    return [s for sub in base.__subclasses__() for s in (sub, *sections(sub))]


def test_the_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), f"write it again: {AGAIN}"
    assert AGAIN in markdown()


def test_the_command_writes_the_page_in_any_locale() -> None:
    command = [sys.executable, "-m", "roformer_dist.config.document"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert done.stdout.decode() == markdown()


def test_every_key_and_every_kind_is_on_the_page() -> None:
    page = markdown()
    for section in sections(Section):
        for name, field in section.model_fields.items():
            if name == "kind":
                assert f', kind = "{get_args(field.annotation)[0]}"' in page
            else:
                assert f"| `{name}` | " in page, f"{section.__name__}.{name}"


def test_rows_say_type_bounds_default_and_meaning() -> None:
    lines = markdown().splitlines()
    for line in (
        "| `seq_len` | integer > 0 | required | Tokens in a row: the trained context. |",
        "| `betas` | list of number ≥ 0 and < 1, number ≥ 0 and < 1 | `[0.9, 0.95]` | Decay of the two moments. |",
        '| `norm` | `"rms_norm"` or `"layer_norm"` | `"rms_norm"` | Kind of normalisation. |',
        "| `head_dim` | integer > 0 | see meaning | Width of one head; default: hidden_size / num_heads. |",
        "| `logging` | section | its defaults | What is written down. |",
    ):
        assert line in lines
    # Every table has four columns in every row.
    rows = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}


def test_the_glossary_is_in_order_and_has_the_keys_of_the_run_s_shape() -> None:
    terms = re.findall(
        r"^\| `(\w+)` \|", (PAGE.parent / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert terms == sorted(set(terms))
    shape = [name for section in (RunShape, ModelConfig) for name in section.__annotations__]
    named = [
        name for name in shape if name.endswith(("_size", "_len", "_heads", "_layers", "_dim", "_steps"))
    ]
    assert len(named) > 8
    assert set(named) <= set(terms)


def test_contributing_names_files_that_are_there() -> None:
    root = PAGE.parent.parent
    text = (PAGE.parent / "contributing.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:roformer_dist|data_tools|tests|docs|configs)/[\w/.]*)`", text)
    assert len(named) > 25
    assert [path for path in named if not (root / path).exists()] == []
