"""What layer kinds, positions, score policies and scaling cannot do together is one line that says what can."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_example import BASE

from roformer_dist.config import ConfigError, load_config

MASKED = 'objective={kind="masked", mask_id=3}'
REROPE = 'model.rope.policy={kind="rerope", window=8}'
SELF_EXTEND = 'model.rope.policy={kind="self_extend", window=8, group=4}'
RELATIVE = 'model.position={kind="relative_bias"}'
ALIBI = 'model.position={kind="alibi"}'
ALONE = "parallel.sp_size=1"
LINEAR = 'model.layers=["linear", "full"]'

REFUSED: dict[tuple[str, ...], str] = {
    ('model.layers=["full", "full", "sliding"]', "model.sliding_window=4"): (
        "model: layers names 3 layers and num_layers = 2; shorten the pattern"
    ),
    ("model.layers=[]",): "model.layers = []: Tuple should have at least 1 item after validation, not 0",
    ('model.layers=["local"]',): (
        "model.layers.0 = 'local': Input should be 'full', 'sliding', 'linear' or 'no_position' (and 1 more)"
    ),
    ('model.layers=["sliding"]',): (
        "model: layers = ['sliding'] and sliding_window = None: sliding layers need a sliding_window, and nothing "
        "else reads it"
    ),
    ("model.sliding_window=4",): (
        "model: layers = ['full'] and sliding_window = 4: sliding layers need a sliding_window, and nothing else "
        "reads it"
    ),
    ('model.layers=["no_position"]', "model.position.kind=sinusoidal"): (
        "model: layers: no_position cannot be honoured with position.kind = 'sinusoidal', which no layer can leave "
        "out; use full"
    ),
    ('model.layers=["no_position"]', ALIBI): (
        "model: layers has no_position alone, so nothing would read position.kind = 'alibi'; set position.kind = "
        "'none' or add full layers"
    ),
    (LINEAR, RELATIVE): (
        "model: layers: linear has no scores to add position.kind = 'relative_bias' to; use position.kind = "
        "'rotary' or full layers"
    ),
    (LINEAR, REROPE): (
        "model: rope.policy = 'rerope' is about rotated softmax attention; it needs position.kind = 'rotary' and no "
        "linear layers"
    ),
    (REROPE, "model.position.kind=none"): (
        "model: rope.policy = 'rerope' is about rotated softmax attention; it needs position.kind = 'rotary' and no "
        "linear layers"
    ),
    (REROPE, "model.rope.rotary_value=true"): (
        "model: rope.rotary_value turns the values of plain rotary softmax attention; with linear layers, another "
        "position or a score policy it has no meaning"
    ),
    ('model.rope.policy={kind="self_extend", window=3, group=4}',): (
        "model: rope.policy: window = 3 is below group = 4: keys at the window's edge would seem nearer than those "
        "inside"
    ),
    ('model.position={kind="relative_bias", num_buckets=32, max_distance=16}',): (
        "model: position.max_distance = 16 must be greater than half of num_buckets = 32: so many distances have a "
        "bucket of their own"
    ),
    ('model.position={kind="relative_bias", num_buckets=6}',): (
        "model.position.num_buckets = 6: Input should be a multiple of 4"
    ),
    ("model.position.kind=sinusoidal", "model.embedding_size=15", "model.head_transform=true"): (
        "model: position.kind = 'sinusoidal' has pairs of sine and cosine; an embedding of 15 is odd"
    ),
    ('model.position={kind="learned", max_seq_len=31}',): (
        "train.seq_len = 32 is longer than model.position.max_seq_len = 31, the positions that have learned "
        "vectors; raise it or shorten the rows"
    ),
    (SELF_EXTEND, MASKED, ALONE): (
        "model.rope.policy = 'self_extend' tells near keys from those far behind, and objective.kind = 'masked' sees "
        "keys ahead too; use the causal objective or the plain policy"
    ),
    ('model.rope.scaling={kind="ntk", factor=1e290}',): (
        "model: rope.scaling.factor = 1e+290 makes a base beyond any number with theta = 10000.0 and 8 rotary "
        "dimensions; it must be below 1.55e+228"
    ),
    ('model.rope.scaling={kind="dynamic", factor=1e220, original_seq_len=32}',): (
        "model: rope.scaling.factor = 1e+220 makes a base beyond any number with theta = 10000.0 and 8 rotary "
        "dimensions; it must be below 3.61e+218"
    ),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize(
    ("overrides", "line"), REFUSED.items(), ids=lambda x: x[0][:60] if len(x) < 4 else ""
)
def test_what_does_not_fit_is_one_line(file: Path, overrides: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.removeprefix(f"{file}: ") == line


@pytest.mark.parametrize(
    "overrides",
    [
        ('model.rope.policy={kind="self_extend", window=4, group=4}', ALONE),
        ('model.position={kind="relative_bias", num_buckets=32, max_distance=17}', ALONE),
        ('model.position={kind="learned", max_seq_len=32}',),
        ('model.layers=["no_position", "full"]', ALIBI, ALONE),
        ('model.layers=["no_position"]',),
        ('model.rope.scaling={kind="ntk", factor=1.5e228}',),
        (LINEAR, MASKED),
        ('model.layers=["sliding", "no_position"]', "model.sliding_window=1"),
    ],
    ids=lambda x: x[0],
)
def test_what_is_just_inside_is_accepted(file: Path, overrides: tuple[str, ...]) -> None:
    load_config(file, overrides)


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        (REROPE, "model.rope.policy = 'rerope'"),
        (SELF_EXTEND, "model.rope.policy = 'self_extend'"),
        (RELATIVE, "model.position.kind = 'relative_bias'"),
        (ALIBI, "model.position.kind = 'alibi'"),
    ],
)
def test_what_a_ring_does_not_carry_is_refused(file: Path, override: str, refused: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override, "parallel={ring_size = 2}"])
    assert str(caught.value).removeprefix(f"{file}: ") == (
        f"{refused} needs all keys of a head in one process, and a ring (parallel: ring_size = 2) spreads them; "
        "set ring_size = 1 and share the sequence by ulysses_size"
    )
    load_config(file, [override, "parallel={ulysses_size = 2}"])
