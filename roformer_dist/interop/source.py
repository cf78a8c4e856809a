"""Where a model to import is: a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from roformer_dist.interop.files import INSTALL
from roformer_dist.interop.settings import HuggingFaceError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Never the pickled ones, and nothing that runs.
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt"]


def resolve(source: str) -> Path:
    """The local folder of ``source``; a name such as ``organisation/model`` or ``organisation/model@main`` is fetched.

    Raises:
        HuggingFaceError: there is no such folder, and nothing of that name could be fetched.
    """
    if Path(source).is_dir():
        return Path(source)
    if not _HUB_NAME.fullmatch(source):
        raise HuggingFaceError(f"{source}: no such directory, and not a name on the hub (organisation/model)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise HuggingFaceError(f"{source}: no such directory; to fetch it from the hub: {INSTALL}") from None
    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_WANTED))
    except Exception as error:  # the hub's own errors have no common base
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise HuggingFaceError(
            f"{source}: no such directory, and it could not be fetched from the hub: {first}"
        ) from None
