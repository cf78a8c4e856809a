"""docs/composition.md from the choices of composition.py and what the configuration says of them. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from roformer_dist.parity.composition import (
    FACTORS,
    ZERO_COMPARED,
    ZERO_SWITCHES,
    Choice,
    pairs,
    switch_refusal,
)

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

What is compared where:

| test | short (`make test`) | slow too (`make test-all`) | ranks |
| --- | --- | --- | --- |
| parity/test_composition.py | every choice, every pair of families | every pair; the product below | threads |
| distributed/test_composed_meshes.py | every ZeRO stage once | every scheme with each; compilation | processes |
| distributed/test_zero_switches.py | the table of ZeRO's switches below | - | processes |

The product is position x scheme x layers x objective in full, in fp32. Processes are four, on gloo, through DeepSpeed;
threads are ranks of one process, without it. Threads run neither ZeRO nor compilation, which are the engine's: where a
row of the first test names them, the configuration is accepted and everything else is compared. Compilation is compared
with Ulysses, a ring and a hybrid. Every comparison of the first two has rows of one document and rows of several, of
any lengths: documents go with everything and are no column here. The kernels `varlen`
and `flash_attn` need a GPU that computes in bf16 and are refused elsewhere when a run starts; on one, they are compared
with the reference by `tests/unit/test_kernels_on_gpu.py` and by the preflight of every run that shares sequences.
"""

ZERO_INTRODUCTION = """\
"compared": trained on four processes of which two share each row (Ulysses), and loss, every gradient, gradient norm
and every parameter compared with plain PyTorch. "accepted" is compared nowhere: quantization needs CUDA, and a run
without it is refused at the start. "no" is refused when the configuration is read. The switches meet no other scheme
in a test; they do not change what a scheme sends.
"""
STAGES = range(4)


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
            "\n## ZeRO's switches\n",
            ZERO_INTRODUCTION,
            *_table(
                ("switch", *(f"stage {stage}" for stage in STAGES), "what is said at stage 0"), _switches()
            ),
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


def _switches() -> Iterator[tuple[str, ...]]:
    for switch in ZERO_SWITCHES:
        refused = [switch_refusal(switch, stage) for stage in STAGES]
        accepted = ["compared" if (switch, stage) in ZERO_COMPARED else "accepted" for stage in STAGES]
        cells = ("no" if reason else known for reason, known in zip(refused, accepted))
        yield switch, *cells, str(refused[0])


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
