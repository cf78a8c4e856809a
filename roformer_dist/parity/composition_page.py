"""docs/composition.md from the choices of composition.py and what the configuration says of them. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from roformer_dist.parity.composition import FACTORS, Choice, pairs

INTRODUCTION = """\
# What composes

This page is generated from `roformer_dist/parity/composition.py`; do not edit it. After a change there, or to what a
configuration refuses:

    python -m roformer_dist.parity.composition > docs/composition.md

Each pair of choices below was put into a configuration, everything else as in the first choice of its kind. It either
is refused when the configuration is read, in one line, or it works: then it stands in at least one configuration that
is trained for three steps on its mesh and in one process, and loss, every parameter's gradient, gradient norm and what
the steps changed are compared, within the bounds of [parity.md](parity.md) (bf16: at most twice the error of one
process in bf16, both against float64, over three seeds).

- `pytest tests/parity/test_composition.py -m "not slow"`: every choice, and every pair of families
- `pytest tests/parity/test_composition.py`: every pair of choices, and position x scheme x layers x objective in full
- `pytest tests/distributed/test_composed_meshes.py`: through DeepSpeed on four processes: ZeRO and compilation

Every comparison has rows of one document and rows of several, of any lengths: documents go with everything and are no
column here. Ranks are threads of one process, but for ZeRO and compilation, which are the engine's: these run on real
processes, every ZeRO stage in the short run and each with each scheme in the full one. The kernels `varlen`
and `flash_attn` need a GPU that computes in bf16 and are refused elsewhere when a run starts; on one, they are compared
with the reference by `tests/unit/test_kernels_on_gpu.py` and by the preflight of every run that shares sequences.
"""


def markdown() -> str:
    """The whole page."""
    refused = [(row, reason) for row, reason in pairs() if reason is not None]
    numbers = {reason: number for number, reason in enumerate(_reasons(refused), start=1)}
    against = {frozenset(row.items()): numbers[_general(reason)] for row, reason in refused}
    return "\n".join(
        [
            INTRODUCTION,
            "## Choices\n",
            *_table(("kind", "choice", "family", "keys"), _choices()),
            "\n## With each scheme\n",
            "A number is that of the reason in the next table.\n",
            *_table(("kind", "choice", *FACTORS["scheme"]), _with_schemes(against)),
            "\n## Refused\n",
            "All other pairs work.\n",
            *_table(("", "choice", "with", "reason and what fits"), _refused(refused, numbers)),
            "",
        ]
    )


def _choices() -> Iterator[tuple[str, ...]]:
    for kind, choices in FACTORS.items():
        for name, choice in choices.items():
            yield kind, name, choice.family, _keys(choice)


def _keys(choice: Choice) -> str:
    return ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in choice.keys.items()) or "defaults"


def _with_schemes(against: dict[frozenset[tuple[str, str]], int]) -> Iterator[tuple[str, ...]]:
    for kind, choices in FACTORS.items():
        for name in choices if kind != "scheme" else ():
            found = (against.get(frozenset([("scheme", s), (kind, name)])) for s in FACTORS["scheme"])
            yield kind, name, *(f"no ({number})" if number else "yes" for number in found)


def _refused(refused: list[tuple[dict[str, str], str]], numbers: dict[str, int]) -> Iterator[tuple[str, ...]]:
    """One line for a choice and a reason, with all choices that it meets there."""
    met: dict[tuple[str, int], list[str]] = {}
    for row, reason in refused:
        (kind, name), (other, choice) = row.items()
        met.setdefault((f"{kind}: {name}", numbers[_general(reason)]), []).append(f"{other}: {choice}")
    texts = {number: reason for reason, number in numbers.items()}
    for (choice, number), others in met.items():
        yield str(number), choice, "; ".join(others), texts[number]


def _reasons(refused: list[tuple[dict[str, str], str]]) -> list[str]:
    return list(dict.fromkeys(_general(reason) for _, reason in refused))


def _general(reason: str) -> str:
    """A reason without the size of the ring, which schemes differ in."""
    return reason.replace("ring_size = 4)", "ring_size > 1)").replace("ring_size = 2)", "ring_size > 1)")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
