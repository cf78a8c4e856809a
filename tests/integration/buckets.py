"""A real server that speaks S3, on loopback, in a thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec


@contextmanager
def bucket(name: str, *paths: Path) -> Iterator[str]:
    """The endpoint of a server whose bucket ``name`` holds ``paths``, files or folders, under their own names.

    Servers of one process share their buckets, so each has a name of its own. Key and secret are "test".
    """
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        fs = fsspec.filesystem(
            "s3", endpoint_url=endpoint, key="test", secret="test", skip_instance_cache=True
        )
        fs.mkdir(name)
        for path in paths:
            fs.put(str(path), f"{name}/{path.name}", recursive=path.is_dir())
        yield endpoint
    finally:
        moto.stop()


@contextmanager
def fsspec_finds(endpoint: str) -> Iterator[None]:
    """In this process, ``s3://`` is the server at ``endpoint``, as in fsspec's configuration file."""
    from fsspec.config import conf

    before = dict(conf)
    conf["s3"] = {"endpoint_url": endpoint, "key": "test", "secret": "test"}
    try:
        yield
    finally:
        conf.clear()
        conf.update(before)
