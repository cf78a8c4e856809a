"""What cannot be imported exactly is one line that names it, and nothing is left behind."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanged import TRAINED, load_ours, our_logits, some_tokens, their_logits, their_model
from safetensors.torch import load_file, save_file

from roformer_dist import cli
from roformer_dist.exchange import import_hf

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def saved(folder: Path, change: Change, architecture: str = "LlamaForCausalLM", **values: Any) -> Path:
    """A model's folder with something changed in its configuration or weights."""
    their_model(architecture, **values).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def set_key(key: str, value: Any) -> Change:
    return lambda config, tensors: config.update({key: value})


def set_rope(**values: Any) -> Change:
    return lambda config, tensors: config["rope_parameters"].update(values)


UP = "model.layers.1.mlp.up_proj.weight"
CHANGES: dict[str, tuple[Change, str]] = {
    "unknown_key": (set_key("logit_cap", 30.0), "logit_cap = 30.0 is not understood.*--ignore-key logit_cap"),
    "activation": (set_key("hidden_act", "relu"), "hidden_act = 'relu'"),
    "model_type": (set_key("model_type", "bert"), "model_type = 'bert'"),
    "architecture": (set_key("architectures", ["LlamaForTokenClassification"]), "architectures"),
    "rope_type": (
        set_key("rope_parameters", {"rope_type": "proportional", "rope_theta": 1e4}),
        "rope_type = 'proportional'",
    ),
    "rope_key": (
        set_key("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "bend": 3}),
        "rope_parameters.bend = 3",
    ),
    "partial": (
        set_key("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor = 0.5",
    ),
    "no_length": (
        set_key("max_position_embeddings", 0),
        "max_position_embeddings = 0 must be a whole number from 1",
    ),
    "negative_length": (set_key("max_position_embeddings", -1), "max_position_embeddings = -1 must be"),
    "beyond_any_size": (
        set_key("hidden_size", 10**30),
        r"hidden_size = 10{30} must be a whole number from 1 to 1048576",
    ),
    "beyond_any_depth": (set_key("num_hidden_layers", 10**9), "num_hidden_layers = 1000000000 must be"),
    "no_base": (set_rope(rope_theta=None), "rope_parameters.rope_theta is missing"),
    "rope_list": (set_key("rope_parameters", []), "rope_parameters"),
    "yarn_factor": (set_rope(rope_type="yarn", factor=[]), "rope_parameters"),
    "dynamic_factor": (set_rope(rope_type="dynamic", factor=[]), "rope_parameters"),
    "eos": (set_key("eos_token_id", "end"), "eos_token_id"),
    "nan": (lambda c, t: t[UP][3].fill_(float("nan")), f"{UP} holds values that are NaN or infinite"),
    "infinite": (lambda c, t: t[UP][3].fill_(float("inf")), f"{UP} holds values that are NaN or infinite"),
    "bytes": (lambda c, t: t.update({UP: t[UP].to(torch.int8)}), f"weight {UP} is stored as I8"),
    "doubles": (lambda c, t: t.update({UP: t[UP].double()}), f"weight {UP} is stored as F64"),
    "leftover": (lambda c, t: t.update(extra=torch.ones(2)), "weight extra has no place"),
    "missing": (lambda c, t: t.pop(UP), f"weight {UP} is missing"),
    "transposed": (lambda c, t: t.update({UP: t[UP].T}), f"{UP} .*which is its transpose"),
    "shape": (lambda c, t: t.update({UP: t[UP][1:]}), f"{UP} has shape"),
    "untied_copy": (
        lambda c, t: [c.update(tie_word_embeddings=True), t["lm_head.weight"].add_(1)],
        "lm_head.weight differs",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_model_that_is_not_what_its_configuration_says_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, named = CHANGES[case]
    folder = saved(tmp_path / "theirs", change, tie_word_embeddings=False)
    capsys.readouterr()  # what transformers says while it saves
    assert said(monkeypatch, capsys, str(folder), tmp_path / "out", named)
    assert not (tmp_path / "out").exists()


def said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    out: Path,
    named: str,
    *options: str,
) -> bool:
    """Whether ``import hf`` ends with code 2 and one line that matches."""
    monkeypatch.setattr(sys, "argv", ["roformer-dist", "import", "hf", source, "--out", str(out), *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    text = capsys.readouterr().err
    assert caught.value.code == 2, text
    assert len(text.splitlines()) == 1, text
    assert re.search(named, text), text
    return True


@pytest.mark.parametrize("key", ["nonsuch", "hidden_size", "transformers_version"])
def test_a_key_to_ignore_that_ignores_nothing_is_a_mistake(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(saved(tmp_path / "theirs", lambda config, tensors: None))
    capsys.readouterr()
    assert said(
        monkeypatch,
        capsys,
        folder,
        tmp_path / "out",
        f"--ignore-key {key}: .*no such key",
        "--ignore-key",
        key,
    )


@pytest.mark.parametrize("names", [[3], [None], [{}], ["../model.safetensors"], [""], ["gone.safetensors"]])
def test_an_index_that_names_no_files_beside_it_is_one_line(
    names: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "theirs", lambda config, tensors: None)
    index = {"weight_map": {str(i): name for i, name in enumerate([*names, "model.safetensors"])}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    capsys.readouterr()
    assert said(monkeypatch, capsys, str(folder), tmp_path / "out", "download the model again")


@pytest.mark.parametrize("text", ['{"eos_token_id": "end"}', '{"eos_token_id": []}', "[", "[1]"])
def test_a_damaged_generation_config_is_one_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "theirs", lambda config, tensors: None)
    (folder / "generation_config.json").write_text(text)
    capsys.readouterr()
    assert said(monkeypatch, capsys, str(folder), tmp_path / "out", r"generation_config\.json")


def test_one_label_is_refused_by_the_name_of_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(
        tmp_path / "theirs", lambda config, tensors: None, "RoFormerForSequenceClassification", num_labels=1
    )
    capsys.readouterr()
    assert said(
        monkeypatch, capsys, str(folder), tmp_path / "out", r"our objective\.num_labels refuses 1: .* 2$"
    )


def test_pickled_weights_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "theirs", lambda config, tensors: None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    capsys.readouterr()
    assert said(monkeypatch, capsys, str(folder), tmp_path / "out", "pickled weights run code")


def test_a_damaged_file_and_a_name_that_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "theirs", lambda config, tensors: None)
    (folder / "model.safetensors").write_bytes(b"nothing")
    capsys.readouterr()
    assert said(monkeypatch, capsys, str(folder), tmp_path / "out", r"model\.safetensors: .*download")
    assert said(monkeypatch, capsys, str(tmp_path / "no"), tmp_path / "out", "no such directory")


def test_without_the_extra_the_command_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert said(monkeypatch, capsys, str(tmp_path), tmp_path / "out", r"roformer-dist\[hf\]")


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 700.0, "rope_scaling": None},
        {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {
            "rope_theta": 700.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ],
)
def test_configurations_of_older_releases_are_read(old: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del config["rope_parameters"]
        config.update(old)

    folder = saved(tmp_path / "theirs", change, num_key_value_heads=2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    import_hf(str(folder), tmp_path / "ours")
    network, objective = load_ours(tmp_path / "ours" / "checkpoints" / "step_000000")
    assert network.config.rope.theta == 700.0
    tokens = some_tokens(TRAINED)
    torch.testing.assert_close(
        our_logits(network, objective, tokens), their_logits(theirs, tokens), rtol=0, atol=1e-5
    )


def test_older_gpt_neox_configurations_are_read(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del config["rope_parameters"]
        config.update(rotary_pct=0.5, rotary_emb_base=700)

    folder = saved(tmp_path / "theirs", change, "GPTNeoXForCausalLM", hidden_act="gelu")
    import_hf(str(folder), tmp_path / "ours")
    network, _ = load_ours(tmp_path / "ours" / "checkpoints" / "step_000000")
    assert (network.config.rope.theta, network.config.rope.partial) == (700.0, 0.5)


@pytest.mark.parametrize(
    "says",
    [
        {"rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
)
def test_a_roformer_whose_table_is_another_than_its_configuration_says_is_refused(
    says: dict[str, Any], tmp_path: Path
) -> None:
    folder = saved(tmp_path / "theirs", lambda config, tensors: config.update(says), "RoFormerForMaskedLM")
    with pytest.raises(ValueError, match="transformers computes with the table"):
        import_hf(str(folder), tmp_path / "ours")


TABLE = "roformer.encoder.embed_positions.weight"


@pytest.mark.parametrize("length", [TRAINED, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_table_is_compared_as_exactly_as_its_file_holds_it(
    dtype: torch.dtype, length: int, tmp_path: Path
) -> None:
    def as_dtype(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[TABLE] = tensors[TABLE].to(dtype)

    folder = saved(tmp_path / "theirs", as_dtype, "RoFormerForMaskedLM", max_position_embeddings=length)
    import_hf(str(folder), tmp_path / "ours")
    # One entry off by more than its rounding.
    tensors = load_file(folder / "model.safetensors")
    off = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}[dtype]
    tensors[TABLE][-1, 0] += off
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="transformers computes with the table"):
        import_hf(str(folder), tmp_path / "again")


def test_a_float32_table_of_a_base_that_is_hardly_another_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "theirs", set_key("rope_theta", 10010.0), "RoFormerForMaskedLM")
    with pytest.raises(ValueError, match=r"rope_theta = 10010\.0 .* off by 0\.0"):
        import_hf(str(folder), tmp_path / "ours")


def test_a_table_of_another_length_is_refused_without_making_one(tmp_path: Path) -> None:
    folder = saved(tmp_path / "theirs", set_key("max_position_embeddings", 2**40), "RoFormerForMaskedLM")
    with pytest.raises(ValueError, match=r"its shape is \[32, 8\] and not \[1099511627776, 8\]"):
        import_hf(str(folder), tmp_path / "ours")


def test_keys_that_the_user_knows_to_be_harmless_are_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path / "theirs", set_key("note", "mine"))
    lines = import_hf(str(folder), tmp_path / "ours", ignore_keys=["note"])
    assert not any("tokenizer" in line for line in lines)  # it has none


def test_an_import_has_no_data_to_evaluate_on_before_a_run_started_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import_hf(str(saved(tmp_path / "theirs", lambda config, tensors: None)), tmp_path / "ours")
    capsys.readouterr()
    for command, part in (
        (["extrapolate"], "checkpoint.init_from"),
        (["generate", "--prompt", "a"], "has no tokenizer; put the model's tokenizer files there"),
        (["generate", "--prompt", "a", "--set", "model.vocab_size=no"], "model.vocab_size = 'no'"),
    ):
        monkeypatch.setattr(sys, "argv", ["roformer-dist", *command, "--checkpoint", str(tmp_path / "ours")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        err = capsys.readouterr().err
        assert ended.value.code == 2
        assert part in err
        assert err.count("\n") == 1
