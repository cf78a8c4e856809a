"""Tensors from theirs to ours and back: renamed, split, stacked, re-paired; a few at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from roformer_dist.config.data import Objective
from roformer_dist.config.model import ModelConfig
from roformer_dist.interop.family import Family, Pairing, Weight
from roformer_dist.interop.files import TensorFiles
from roformer_dist.interop.settings import HuggingFaceError
from roformer_dist.model.roformer import build_for

Shapes = Mapping[str, tuple[int, ...]]
# Per-head rows or entries that a rotation pairs up.
_ROTATED = re.compile(r"attention\.[qk]_(proj|norm)\.(weight|bias)$")


def parameter_shapes(model: ModelConfig, objective: Objective) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of ours, without memory for it."""
    with torch.device("meta"):
        network = build_for(model, objective, seed=0)
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def their_shape(weight: Weight, shapes: Shapes) -> tuple[int, ...]:
    """The shape that ``weight`` has on their side."""
    parts = [shapes[name] for name in weight.ours]
    return (sum(part[0] for part in parts), *parts[0][1:])


def check_names(
    family: Family, model: ModelConfig, objective: Objective, shapes: Shapes, files: TensorFiles
) -> None:
    """Every tensor of theirs is used and has the shape that the configuration says.

    Raises:
        HuggingFaceError: the first that is missing, of another shape, or left over.
    """
    expected = {weight.theirs: their_shape(weight, shapes) for weight in family.weights(model, objective)}
    for name, shape in expected.items():
        if name not in files.shapes:
            raise HuggingFaceError(
                f"{files.folder}: weight {name} is missing; the configuration says {list(shape)}"
            )
        if files.shapes[name] != shape:
            found = files.shapes[name]
            hint = ", which is its transpose" if found == shape[::-1] else ""
            raise HuggingFaceError(
                f"{files.folder}: weight {name} has shape {list(found)}{hint}; the configuration says {list(shape)}"
            )
    known = expected.keys() | family.constants(model, 1).keys() | family.duplicates(model).keys()
    known |= family.unused(model, objective).keys()
    for name in files.shapes:
        if name not in known and not re.fullmatch(family.ignored, name):
            raise HuggingFaceError(
                f"{files.folder}: weight {name} has no place in the model that config.json says"
            )


def check_constants(
    family: Family, model: ModelConfig, max_position_embeddings: int, files: TensorFiles
) -> None:
    """Tied copies are copies, and saved tables are those that the configuration says.

    Raises:
        HuggingFaceError: one is not.
    """
    for name, original in family.duplicates(model).items():
        if name in files.shapes and not torch.equal(files.read(name), files.read(original)):
            raise HuggingFaceError(
                f"{files.folder}: {name} differs from {original}, but config.json ties them: set "
                "tie_word_embeddings = false there"
            )
    for name, constant in family.constants(model, max_position_embeddings).items():
        if name not in files.shapes:
            continue  # it can be made anew
        if files.shapes[name] != constant.shape:
            difference = f"its shape is {list(files.shapes[name])} and not {list(constant.shape)}"
        else:
            found, made = files.read(name), constant.make()
            off = (found - made).abs().max().item()
            # Sines and cosines of float64 angles rounded once: by at most eps / 4, as none is above 1.
            if off <= torch.finfo(files.stored(name).dtype).eps / 4 + 1e-6:
                continue
            difference = f"it is off by {off:.1g}"
        raise HuggingFaceError(
            f"{files.folder}: {name} is not the table of rope_theta = {model.rope.theta} and "
            f"max_position_embeddings = {max_position_embeddings}: {difference}; transformers computes with the table "
            "and ignores both keys of a RoFormer: set them to what it was made with"
        )


def split(weight: Weight, tensor: Tensor, shapes: Shapes, head_dim: int) -> Iterator[tuple[str, Tensor]]:
    """``tensor`` of theirs as parameters of ours, float32."""
    tensor = tensor.to(torch.float32)
    if len(weight.ours) == 1:
        yield weight.ours[0], tensor.contiguous()
        return
    by_head = tensor.unflatten(0, (-1, len(weight.ours), head_dim))
    for index, name in enumerate(weight.ours):
        yield name, by_head[:, index].reshape(shapes[name])


def join(weight: Weight, tensors: list[Tensor], head_dim: int) -> Tensor:
    """Parameters of ours as the tensor of theirs."""
    if len(tensors) == 1:
        return tensors[0].contiguous()
    by_head = [tensor.unflatten(0, (-1, head_dim)) for tensor in tensors]
    return torch.stack(by_head, dim=1).flatten(0, 2).contiguous()


def pair_order(rotary_dim: int, head_dim: int, source: Pairing, target: Pairing) -> Tensor:
    """``x[order]`` has under ``target`` the pairs that x has under ``source``; dimensions past rotary_dim stay."""
    order = torch.arange(head_dim)
    pairs = torch.arange(rotary_dim)
    if (source, target) == ("interleaved", "half"):
        order[:rotary_dim] = pairs.view(-1, 2).T.flatten()
    elif (source, target) == ("half", "interleaved"):
        order[:rotary_dim] = pairs.view(2, -1).T.flatten()
    return order


def paired_as(name: str, tensor: Tensor, model: ModelConfig, target: Pairing) -> Tensor:
    """A parameter of ours in a model that computes the same with the other pairing."""
    if not _ROTATED.search(name) or model.rope.pairing == target:
        return tensor
    head_dim = model.head_size
    order = pair_order(model.rope.rotary_dim(head_dim), head_dim, model.rope.pairing, target)
    return tensor.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)


def their_tensors(
    family: Family,
    model: ModelConfig,
    objective: Objective,
    max_position_embeddings: int,
    read: Callable[[str], Tensor],
) -> dict[str, Callable[[], Tensor]]:
    """Each tensor of theirs, made only when it is called for; ``read`` gives a parameter of ours."""

    def made(weight: Weight) -> Callable[[], Tensor]:
        def make() -> Tensor:
            ours = [paired_as(name, read(name), model, family.pairing) for name in weight.ours]
            return join(weight, ours, model.head_size)

        return make

    tensors = {weight.theirs: made(weight) for weight in family.weights(model, objective)}
    constants = family.constants(model, max_position_embeddings)
    tensors |= {name: constant.make for name, constant in constants.items()}
    for name, original in family.unused(model, objective).items():
        tensors[name] = tensors[original]
    return tensors
