"""Tests of servers, through their clients: stock vLLM and ours, each started once; `make test-vllm` runs them."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from defensivekv.needleworld import demo_model
from tests.integrations.vllm.serving.server import Server

if find_spec("vllm") is None or find_spec("openai") is None:
    collect_ignore_glob = ["test_*.py"]

BUDGET = 0.2

_COMMANDS = {
    "stock": [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", demo_model()],
    "evicting": [
        *(str(Path(sys.executable).with_name("defensivekv")), "serve", demo_model()),
        *("--policy", "defensivekv", "--budget", str(BUDGET)),
    ],
}


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Both, which start beside each other."""
    folder = tmp_path_factory.mktemp("servers")
    started: dict[str, Server] = {}
    try:
        for name, command in _COMMANDS.items():
            started[name] = Server(command, folder / f"{name}.log")
        for server in started.values():
            server.wait()
        yield started
    finally:
        for server in started.values():
            server.stop()


@pytest.fixture(scope="session", params=["stock", "evicting"])
def server(servers: dict[str, Server], request: pytest.FixtureRequest) -> Server:
    """Each in turn: what holds of stock vLLM holds of ours."""
    return servers[request.param]


@pytest.fixture(scope="session")
def evicting(servers: dict[str, Server]) -> Server:
    return servers["evicting"]


@pytest.fixture(scope="session")
def stock(servers: dict[str, Server]) -> Server:
    return servers["stock"]


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with server.connect() as connected:
        yield connected
