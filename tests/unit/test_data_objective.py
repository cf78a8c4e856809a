import numpy as np
import pytest
from test_data_order import page_hash
from test_data_tiny import VOCAB_SIZE

from roformer_dist.batch import IGNORE_INDEX
from roformer_dist.data.errors import DataError
from roformer_dist.data.objective import MaskedObjective

MASKED = MaskedObjective(mask_id=4, vocab_size=VOCAB_SIZE)


def test_masked_objective_proportions():
    n = 400_000
    tokens, counters = np.full(n, 50), np.arange(n)
    inputs, labels = MASKED.apply(tokens, tokens, counters, seed=1)
    hidden = labels != IGNORE_INDEX
    assert abs(hidden.mean() - 0.15) < 0.003
    assert (labels[hidden] == 50).all()
    assert (inputs[~hidden] == 50).all()
    assert abs((inputs[hidden] == 4).mean() - 0.8) < 0.006
    random = hidden & (inputs != 4) & (inputs != 50)
    assert abs(random.sum() / hidden.sum() - 0.1) < 0.005
    assert inputs[random].min() == 0
    assert inputs[random].max() == VOCAB_SIZE - 1
    again, _ = MASKED.apply(tokens, tokens, counters, seed=2)
    assert not np.array_equal(again, inputs)
    # Each token's draw depends on its own counter only.
    part, _ = MASKED.apply(tokens[:9], tokens[:9], counters[1000:1009], seed=1)
    assert np.array_equal(part, inputs[1000:1009])


def test_masked_draws_are_what_the_format_page_says():
    counters, tokens = np.arange(500, 900), np.full(400, 50)
    expected = []
    for counter in counters.tolist():
        hidden, kind = ((page_hash(9, n, counter) >> 11) / 2**53 for n in (0, 1))
        random = page_hash(9, 2, counter) % VOCAB_SIZE
        new = 4 if kind < 0.8 else random if kind < 0.9 else 50
        expected.append((new, 50) if hidden < 0.15 else (50, IGNORE_INDEX))
    inputs, labels = MASKED.apply(tokens, tokens, counters, seed=9)
    assert list(zip(inputs.tolist(), labels.tolist())) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_probability": 0.0}, "mask_probability=0.0"),
        ({"replace_with_mask": 0.95}, "replace_with_mask=0.95"),
        ({"mask_id": VOCAB_SIZE}, f"mask_id={VOCAB_SIZE}"),
    ],
)
def test_masked_objective_refuses_bad_values(values, message):
    with pytest.raises(DataError, match=message):
        MaskedObjective(**{"mask_id": 4, "vocab_size": VOCAB_SIZE, **values})
