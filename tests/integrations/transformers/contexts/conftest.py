"""A bucket on a server of this machine, that speaks as S3 does."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Bucket:
    """Its name, and how fsspec gets there."""

    name: str
    options: dict[str, Any]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str) -> Bucket:
    s3fs = pytest.importorskip("s3fs")
    region = {"region_name": "eu-west-1"}
    options = {"key": "test", "secret": "test", "endpoint_url": s3_server, "client_kwargs": region}
    name = uuid.uuid4().hex
    s3fs.S3FileSystem(**options).mkdir(name)
    return Bucket(name, options)
