"""The peers of ``bench data``; a script that needs nothing of ours, because it runs in their environments.

``prepare NAME FOLDER`` writes the rows of ``FOLDER/rows.npy`` in the peer's own format;
``read NAME FOLDER BATCH EPOCHS`` reads them and prints its figures as a line of JSON.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS_PER_SHARD = 1024
IGNORE_INDEX = -100
# Input ids, labels and positions, int64 [rows, seq_len] each.
Fields = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Epoch = Callable[[], Iterable[Fields]]


def measure(epoch: Epoch, files: Iterable[Path], epochs: int, package: str) -> dict[str, Any]:
    """Time whole epochs: one from the disk, opening included, one to check what comes, and warm ones."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    cold = _timed(epoch)
    rows, total, tokens = 0, 0, 0
    for ids, _, _ in epoch():
        rows, tokens, total = rows + len(ids), tokens + ids.numel(), total + int(ids.sum())
    warm = [_timed(epoch) for _ in range(epochs)]
    return {
        "rows": rows,
        "tokens": tokens,
        "sum": total,
        "cold_seconds": cold[0],
        "warm_seconds": statistics.median(seconds for seconds, _ in warm),
        "warm_cpu_seconds": statistics.median(cpu for _, cpu in warm),
        "version": version(package),
    }


def _timed(epoch: Epoch) -> tuple[float, float]:
    start, cpu = time.perf_counter(), time.process_time()
    for _ in epoch():
        pass
    return time.perf_counter() - start, time.process_time() - cpu


def stored_rows(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens (uint16 or uint32) and the documents' lengths (int32) of each row."""
    rows = np.load(folder / "rows.npy", mmap_mode="r")
    lengths, offsets = np.load(folder / "lengths.npy"), np.load(folder / "offsets.npy")
    for number in range(len(rows)):
        yield rows[number], lengths[offsets[number] : offsets[number + 1]]


def batch_of(samples: list[tuple[np.ndarray, np.ndarray]]) -> Fields:
    """What a step needs of rows: ids, the next id inside each document, positions that start again."""
    fields = np.empty((3, len(samples), len(samples[0][0])), dtype=np.int64)
    for row, (tokens, lengths) in enumerate(samples):
        ids, labels, positions = fields[:, row]
        ids[:] = tokens
        labels[:-1] = ids[1:]
        ends = np.cumsum(lengths)
        labels[ends - 1] = IGNORE_INDEX
        positions[:] = np.arange(len(tokens))
        positions -= np.repeat(ends - lengths, lengths)
    return tuple(torch.from_numpy(fields))  # pyright: ignore[reportReturnType] - three of them


def _dtype(folder: Path) -> np.dtype[Any]:
    return np.load(folder / "rows.npy", mmap_mode="r").dtype


def _write_tars(folder: Path) -> list[str]:
    """Rows as tars of samples with two members."""
    names, tar = [], None
    for number, (tokens, lengths) in enumerate(stored_rows(folder)):
        if number % ROWS_PER_SHARD == 0:
            if tar:
                tar.close()
            names.append(f"rows-{len(names):06d}.tar")
            tar = tarfile.open(folder / names[-1], "w")  # noqa: SIM115
        assert tar
        for suffix, array in (("tokens", tokens), ("lengths", lengths)):
            member = tarfile.TarInfo(f"{number:09d}.{suffix}")
            member.size = array.nbytes
            tar.addfile(member, io.BytesIO(array.tobytes()))
    if tar:
        tar.close()
    return names


def _prepare_webdataset(folder: Path) -> None:
    _write_tars(folder)


def _open_webdataset(folder: Path, batch: int) -> Epoch:
    import webdataset as wds

    dtype, names = _dtype(folder), sorted(map(str, folder.glob("rows-*.tar")))

    def decoded(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        return np.frombuffer(sample["tokens"], dtype), np.frombuffer(sample["lengths"], np.int32)

    stream = wds.WebDataset(names, shardshuffle=len(names)).shuffle(1000).map(decoded)  # pyright: ignore
    return lambda: stream.batched(batch, collation_fn=batch_of)


def _prepare_mosaic(folder: Path) -> None:
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    columns = {"tokens": f"ndarray:{_dtype(folder).name}", "lengths": "ndarray:int32"}
    with MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for tokens, lengths in stored_rows(folder):
            writer.write({"tokens": np.array(tokens), "lengths": lengths})


def _open_mosaic(folder: Path, batch: int) -> Epoch:
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=batch)
    return lambda: DataLoader(dataset, batch_size=batch, collate_fn=_collate_named)


def _collate_named(samples: list[dict[str, np.ndarray]]) -> Fields:
    return batch_of([(sample["tokens"], sample["lengths"]) for sample in samples])


def _prepare_litdata(folder: Path) -> None:
    from litdata.streaming import Cache  # pyright: ignore[reportMissingImports]

    cache = Cache(str(folder / "litdata"), chunk_bytes="64MB")
    for number, (tokens, lengths) in enumerate(stored_rows(folder)):
        cache[number] = {"tokens": np.array(tokens), "lengths": lengths}
    cache.done()
    cache.merge(1)


def _open_litdata(folder: Path, batch: int) -> Epoch:
    from litdata import StreamingDataLoader, StreamingDataset  # pyright: ignore[reportMissingImports]

    dataset = StreamingDataset(str(folder / "litdata"), shuffle=True, drop_last=False)
    return lambda: StreamingDataLoader(dataset, batch_size=batch, collate_fn=_collate_named)


def _prepare_energon(folder: Path) -> None:
    from megatron.energon.epathlib import EPath  # pyright: ignore[reportMissingImports]
    from megatron.energon.flavors import webdataset  # pyright: ignore[reportMissingImports]

    preparator = getattr(webdataset, "WebdatasetPreparator", None)
    if preparator is None:
        from megatron.energon.flavors.webdataset.prepare import (  # pyright: ignore[reportMissingImports]
            WebdatasetPreparator as preparator,
        )
    names = _write_tars(folder)
    preparator.prepare_dataset(
        EPath(str(folder)), names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n", encoding="utf-8"
    )


def _open_energon(folder: Path, batch: int) -> Epoch:
    from megatron import energon  # pyright: ignore[reportMissingImports]

    dtype = _dtype(folder)

    @energon.stateless
    def cook(sample: dict[str, Any]) -> Any:
        return {
            "tokens": np.frombuffer(sample["tokens"], dtype),
            "lengths": np.frombuffer(sample["lengths"], np.int32),
            **energon.basic_sample_keys(sample),
        }

    class Encoder(energon.DefaultTaskEncoder):
        cookers = [energon.Cooker(cook)]  # noqa: RUF012 - the class's interface

        @energon.stateless
        def batch(self, samples: list[Any]) -> Any:
            return _collate_named(samples)

        @energon.stateless
        def encode_batch(self, batch: Any) -> Any:
            return batch

    def epoch() -> Iterable[Fields]:
        workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
        dataset = energon.get_train_dataset(
            folder,
            worker_config=workers,
            batch_size=batch,
            shuffle_buffer_size=1000,
            max_samples_per_sequence=None,
            task_encoder=Encoder(),
            repeat=False,
        )
        return energon.get_loader(dataset)

    return epoch


Prepare = Callable[[Path], None]
Open = Callable[[Path, int], Epoch]
PEERS: dict[str, tuple[Prepare, Open]] = {
    "webdataset": (_prepare_webdataset, _open_webdataset),
    "mosaicml-streaming": (_prepare_mosaic, _open_mosaic),
    "litdata": (_prepare_litdata, _open_litdata),
    "megatron-energon": (_prepare_energon, _open_energon),
}


def _on_first_use(open_it: Callable[[], Epoch]) -> Epoch:
    """The epochs of what is opened with the first of them, so that opening is in its time."""
    opened: list[Epoch] = []

    def epoch() -> Iterable[Fields]:
        if not opened:
            opened.append(open_it())
        return opened[0]()

    return epoch


def main(command: str, name: str, folder: Path, *numbers: str) -> None:
    """Run one command; see the top of the file."""
    prepare, opened = PEERS[name]
    own = folder / name
    if command == "prepare":
        own.mkdir()
        for array in ("rows.npy", "lengths.npy", "offsets.npy"):
            (own / array).symlink_to(folder / array)
        prepare(own)
        return
    batch, epochs = map(int, numbers)
    files = [path for path in own.rglob("*") if path.is_file()]
    figures = measure(_on_first_use(lambda: opened(own, batch)), files, epochs, name)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve(), *sys.argv[4:])
