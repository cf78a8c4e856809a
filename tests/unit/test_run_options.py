"""train.compile, and options that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from config_example import BASE

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.config import ConfigError, ModelConfig, load_config
from roformer_dist.config.training import TrainConfig
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.options import apply_options
from roformer_dist.model.roformer import build_model
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.sequence_ops import single_sequence_ops

MODEL = ModelConfig(
    vocab_size=31, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=40, init_std=0.1
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.activation_offload=true"], 'set it to "full" or "selective"'),
        (["train.compile=true", "train.mlp_tile_tokens=8"], "choose one of them"),
        (["train.compile=true", "parallel.zero_stage=3"], "take zero_stage 2 or compile = false"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(BASE)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file, overrides)
    assert "\n" not in str(caught.value)


def test_without_a_compiler_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    network = build_model(MODEL, masked=False, seed=0)
    plain = TrainConfig(seq_len=24, tokens_per_step=24, num_steps=1)
    apply_options(network, plain, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"train.compile = true needs a C\+\+ compiler .*train.compile = false"
    ):
        apply_options(network, plain.model_copy(update={"compile": True}), torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_compiled_gradients_are_those_of_the_plain_run(mlp: str) -> None:
    model = MODEL.model_copy(update={"mlp": mlp})
    ids = torch.arange(24).view(1, 24)
    batch = Batch(ids, ids + 1, ids, ids, MaskSpec.from_lengths([10, 14], causal=True))

    def run(*, compiled: bool) -> tuple[float, list[torch.Tensor]]:
        network = build_model(model, masked=False, seed=0)
        train = TrainConfig(seq_len=24, tokens_per_step=24, num_steps=1, compile=compiled)
        apply_options(network, train, torch.device("cpu"))
        loss, _ = SummedLoss(network)(batch, single_sequence_ops(SdpaKernel()))
        return float(loss.detach()), list(torch.autograd.grad(loss, list(network.parameters())))

    (expected_loss, expected), (loss, found) = run(compiled=False), run(compiled=True)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    total = float(torch.stack([g.norm() for g in expected]).norm())
    for got, want in zip(found, expected, strict=True):
        assert float((got - want).norm()) <= 1e-5 * max(float(want.norm()), 1e-3 * total)
