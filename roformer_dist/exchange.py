"""Behind ``roformer-dist import hf`` and ``export hf``: between Hugging Face folders and checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import tomli_w
import torch
from pydantic import TypeAdapter

from roformer_dist.config.data import Objective
from roformer_dist.config.model import ModelConfig
from roformer_dist.data.json_tokenizer import JsonTokenizer, is_json
from roformer_dist.engine.checkpoint import CheckpointReader
from roformer_dist.engine.checkpoint_files import Fragment
from roformer_dist.engine.initial import find_checkpoint, write_parameters
from roformer_dist.interop.family import Description
from roformer_dist.interop.files import TensorFiles, plan_shards, write_shards
from roformer_dist.interop.huggingface import (
    GENERATION,
    Read,
    choose_family,
    read_config,
    require_transformers,
    write_config,
)
from roformer_dist.interop.settings import TOKEN_IDS, HuggingFaceError
from roformer_dist.interop.source import resolve
from roformer_dist.interop.text import ImportedTokenizer
from roformer_dist.interop.tokenizer import TOKENIZER_FILES, TOKENIZER_FOLDER, convert_tokenizer
from roformer_dist.interop.weights import (
    check_constants,
    check_names,
    parameter_shapes,
    split,
    their_shape,
    their_tensors,
)

MODEL_TOML = "model.toml"
# Float32 values in one file of an imported checkpoint, which is also what is in memory at a time.
_PART_ELEMENTS = 2**29
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def import_hf(source: str, out: Path, *, ignore_keys: Collection[str] = ()) -> list[str]:
    """Write ``out/checkpoints/step_000000``, ``out/model.toml`` and ``out/tokenizer`` from a Hugging Face model.

    Args:
        source: a folder, or a name on the hub.
        ignore_keys: keys of ``config.json`` that the user says do not change what the model computes.

    Returns:
        Lines for the user: what was made, what was left out.

    Raises:
        ValueError: anything that cannot be carried over exactly, in one line.
    """
    _check_free(out)
    require_transformers()
    folder = resolve(source)
    read = read_config(folder / "config.json", ignore_keys)
    described, family = read.description, read.family
    files = TensorFiles(folder)
    shapes = parameter_shapes(described.model, described.objective)
    check_names(family, described.model, described.objective, shapes, files)
    check_constants(family, described.model, described.max_position_embeddings, files)
    sections = {
        "model": described.model.model_dump(mode="json"),
        "objective": described.objective.model_dump(mode="json"),
    }
    state = {
        "step": 0,
        "tokens_seen": 0,
        "config": sections,
        "huggingface": {"max_position_embeddings": described.max_position_embeddings, **read.token_ids},
    }
    try:
        checkpoint = write_parameters(out / "checkpoints", _parts(read, files, shapes), state)
        (out / MODEL_TOML).write_text(_toml(source, read), encoding="utf-8")
        copied = _copy_tokenizer(folder, out / TOKENIZER_FOLDER)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    return [
        f"{family.name}, {count:,} parameters: {checkpoint}",
        f"its model section: {out / MODEL_TOML}; a run starts from it with checkpoint.init_from = {str(out)!r}",
        *([f"its tokenizer: {out / TOKENIZER_FOLDER}"] if copied else []),
        *described.notes,
    ]


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: is there already; choose a new directory or remove it")


def _parts(read: Read, files: TensorFiles, shapes: dict[str, tuple[int, ...]]) -> Iterator[list[Fragment]]:
    """The parameters in files of a bounded size."""
    model, part, held = read.description.model, [], 0
    for weight in read.family.weights(model, read.description.objective):
        for name, tensor in split(weight, files.read(weight.theirs), shapes, model.head_size):
            if held and held + tensor.numel() > _PART_ELEMENTS:
                yield part
                part, held = [], 0
            part.append(Fragment(name, "parameter", shapes[name], 0, tensor.flatten(), "float32"))
            held += tensor.numel()
    yield part


def _toml(source: str, read: Read) -> str:
    described = read.description
    sections = {
        key: section.model_dump(mode="json", exclude_none=True)
        for key, section in (("model", described.model), ("objective", described.objective))
    }
    return (
        f"# Sections for a run that starts from {source}: add checkpoint.init_from and the run's own sections.\n"
        f"# Its max_position_embeddings is {described.max_position_embeddings}.\n" + tomli_w.dumps(sections)
    )


def _copy_tokenizer(folder: Path, target: Path) -> bool:
    """Copy a model's own tokenizer, and how it generates; whether there was a tokenizer."""
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for name in (*found, GENERATION):
        if (folder / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / name)
    return bool(found)


def export_hf(
    checkpoint: Path,
    out: Path,
    *,
    max_position_embeddings: int | None,
    max_shard_size: str,
    dtype: str,
    tokenizer: Path | None,
) -> list[str]:
    """Write a checkpoint as a folder that ``AutoModel...from_pretrained`` loads.

    Args:
        checkpoint: one of ours, or a run's or an import's directory for its newest.
        max_position_embeddings: default: the import's own, or the length the run was trained at.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        tokenizer: a sentencepiece model of ours; default: the run's, or the imported one.

    Returns:
        Lines for the user.

    Raises:
        ValueError: the checkpoint, or a model that Hugging Face's architectures cannot express.
    """
    _check_free(out)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: give one of {', '.join(DTYPES)}")
    require_transformers()
    path = find_checkpoint(checkpoint, report=lambda text: print(text, flush=True))
    reader = CheckpointReader(path)
    model, objective = checkpoint_sections(reader)
    family = choose_family(model, objective)
    length = max_position_embeddings or _length(reader, model)
    description = Description(model, objective, length)
    values = family.write(description)  # what cannot be written is refused before anything is
    shapes = parameter_shapes(model, objective)
    tensors = their_tensors(family, model, objective, length, lambda name: _parameter(reader, name))
    their_shapes = {weight.theirs: their_shape(weight, shapes) for weight in family.weights(model, objective)}
    their_shapes |= {name: constant.shape for name, constant in family.constants(model, length).items()}
    their_shapes |= {n: their_shapes[original] for n, original in family.unused(model, objective).items()}
    plan = plan_shards(their_shapes, DTYPES[dtype], max_shard_size)
    found = tokenizer or _tokenizer_of(reader, path)
    out.mkdir(parents=True, exist_ok=True)
    try:
        token_ids = _write_tokenizer(found, out, reader, length)
        write_config(family, values | {"dtype": dtype}, token_ids, out)
        if tokenizer is not None:
            _check_tokenizer(tokenizer, out, model.vocab_size)
        files = write_shards(out, tensors, plan, DTYPES[dtype])
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return [
        f"{values['architectures'][0]} of step {reader.step}: {out}, {len(files)} files, {dtype}",
        f"tokenizer: {found}" if _is_written(out) else "no tokenizer: give one with --tokenizer",
    ]


def checkpoint_sections(reader: CheckpointReader) -> tuple[ModelConfig, Objective]:
    """The model and objective of a checkpoint, a run's or an import's."""
    config = reader.state["config"]
    return (
        ModelConfig.model_validate(config["model"]),
        TypeAdapter(Objective).validate_python(config["objective"]),
    )


def _parameter(reader: CheckpointReader, name: str) -> torch.Tensor:
    shape = reader.parameters[name]
    return reader.read(name, "parameter", 0, torch.Size(shape).numel()).reshape(shape)


def _length(reader: CheckpointReader, model: ModelConfig) -> int:
    imported = reader.state.get("huggingface")
    if imported:
        return imported["max_position_embeddings"]
    if model.rope.scaling.kind == "dynamic":
        return model.rope.scaling.original_seq_len
    return reader.state["config"]["train"]["seq_len"]


def _tokenizer_of(reader: CheckpointReader, path: Path) -> Path | None:
    """What the run's data was made with, or what was imported."""
    imported = path.parent.parent / TOKENIZER_FOLDER
    if imported.is_dir():
        return imported
    data: dict[str, Any] = reader.state["config"].get("data", {})
    named = Path(data["tokenizer"]) if data else None
    if named is None or not named.is_file():
        return None
    return named.parent if is_json(named) else named


def _check_tokenizer(named: Path, out: Path, vocab_size: int) -> None:
    """ValueError unless the files of ``named``, copied to ``out``, are a tokenizer for so many rows of an embedding."""
    if not _is_written(out):
        raise ValueError(f"--tokenizer {named}: none of {', '.join(TOKENIZER_FILES)} is in it")
    tokens = ImportedTokenizer(out).vocab_size
    if tokens > vocab_size:
        raise ValueError(
            f"--tokenizer {named}: has {tokens} tokens, model.vocab_size = {vocab_size}; give the tokenizer that the "
            "checkpoint was trained with"
        )


def _is_written(out: Path) -> bool:
    return any((out / name).is_file() for name in TOKENIZER_FILES)


def _write_tokenizer(source: Path | None, out: Path, reader: CheckpointReader, length: int) -> dict[str, Any]:
    """Put the tokenizer's files into ``out``; the token ids for ``config.json``."""
    if source is None or source.is_dir():
        if source is not None:
            _copy_tokenizer(source, out)
        imported = reader.state.get("huggingface", {})
        if not imported and source is not None and (source / "tokenizer.json").is_file():
            imported = JsonTokenizer(source / "tokenizer.json").special_ids
        return {key: imported[key] for key in TOKEN_IDS if imported.get(key) is not None}
    try:
        return convert_tokenizer(source, out, length)
    except OSError as error:
        raise HuggingFaceError(f"{source}: {error}") from None
