"""A folder that says something twice, and differently: what transformers goes by, or one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exchanged import SCALINGS, TRAINED, load_ours, our_logits, some_tokens, their_logits, their_model

from roformer_dist.exchange import import_hf
from roformer_dist.interop.settings import HuggingFaceError


@pytest.mark.parametrize("nested", [{}, {"original_max_position_embeddings": 16}], ids=["alone", "both"])
@pytest.mark.parametrize("kind", ["yarn", "longrope", "llama3"])
def test_a_trained_length_beside_the_rotation_goes_before_the_one_in_it(
    kind: str, nested: dict[str, Any], tmp_path: Path
) -> None:
    rope = {key: value for key, value in SCALINGS[kind].items() if key not in ("factor", *nested)}
    rope |= {"rope_theta": 5000.0, "factor": 4.0, **nested}
    their_model("LlamaForCausalLM").save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rope_parameters": rope, "original_max_position_embeddings": 8}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    import_hf(str(tmp_path / "theirs"), tmp_path / "ours")
    network, objective = load_ours(tmp_path / "ours" / "checkpoints" / "step_000000")
    tokens = some_tokens(TRAINED)
    torch.testing.assert_close(
        our_logits(network, objective, tokens), their_logits(theirs, tokens), rtol=0, atol=1e-5
    )


def test_weights_in_one_file_and_others_in_shards_are_refused(tmp_path: Path) -> None:
    theirs = their_model("LlamaForCausalLM")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    import_hf(str(tmp_path / "theirs"), tmp_path / "shards")
    theirs.save_pretrained(tmp_path / "one")
    (tmp_path / "one/model.safetensors").rename(tmp_path / "theirs/model.safetensors")
    with pytest.raises(HuggingFaceError, match=r"are two models, .* reads the first; remove the one"):
        import_hf(str(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
