import io
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import defensivekv as dkv
from defensivekv.cache.tensor_file import ALIGNMENT, TensorFile, read_header, write_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]


def written(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    with path.open("wb") as file:
        write_tensors(file, tensors, metadata or {})
    return path


def drawn(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


tensors = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.builds(
        drawn,
        st.lists(st.integers(0, 9), max_size=3),
        st.sampled_from(DTYPES),
        st.integers(0, 9),
    ),
    max_size=6,
)


@settings(max_examples=60)
@given(held=tensors, metadata=st.dictionaries(st.sampled_from("abc"), st.text(max_size=20), max_size=3))
def test_tensors_come_back_bit_for_bit_and_any_reader_of_safetensors_reads_them(
    tmp_path_factory: pytest.TempPathFactory, held: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    path = written(tmp_path_factory.mktemp("file") / "x.kv", held, metadata)
    file, theirs = TensorFile(path), load_file(path)
    file.verify(file.names)
    assert file.names == held.keys() == theirs.keys()
    assert file.metadata.items() >= metadata.items()
    for name, tensor in held.items():
        for read in (file[name], theirs[name]):
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read, tensor)


def test_rows_lie_where_a_new_tensors_rows_would(tmp_path: Path) -> None:
    held = {
        "a": torch.arange(7, dtype=torch.int64),
        "keys": torch.randn(5, 16),
        "odd": torch.arange(3, dtype=torch.uint8),
        "values": torch.randn(3, 64).to(torch.bfloat16),
    }
    file = TensorFile(written(tmp_path / "x.kv", held))
    for name in ("keys", "values"):
        assert file[name].data_ptr() % ALIGNMENT == 0


def test_tensors_are_the_files_own_pages_and_writing_to_them_leaves_it_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "x.kv", {"a": torch.zeros(2**20)})
    tensor = TensorFile(path)["a"]
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in maps if line.endswith(str(path))]
    assert any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in ranges)
    before = path.read_bytes()
    tensor.fill_(1.0)
    assert path.read_bytes() == before


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    held = {"keys": torch.randn(4, 4), "positions": torch.arange(3, dtype=torch.int32)}
    whole = written(tmp_path / "x.kv", held, {"format": "test"}).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    path = tmp_path / "y.kv"
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        said = _damage(path)
        if place >= 8 + length:
            assert "keys is damaged" in said or "positions is damaged" in said
        elif not said:
            # The padding of the header may hold another kind of white space.
            assert json.loads(damaged[8 : 8 + length]) == json.loads(whole[8 : 8 + length])
        else:
            assert "y.kv" in said


def _damage(path: Path) -> str:
    """What is said of a damaged file; empty where nothing is."""
    try:
        file = TensorFile(path)
        file.verify(file.names)
    except dkv.DamagedContextError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, share: float) -> None:
    whole = written(tmp_path / "x.kv", {"keys": torch.randn(40, 40)}).read_bytes()
    path = tmp_path / "y.kv"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(dkv.DamagedContextError, match=r"y\.kv"):
        TensorFile(path)


@pytest.mark.parametrize("content", [b"", b"some text", b"\xff" * 64, struct.pack("<Q", 2) + b"{}", b"\x00" * 4096])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "y.kv"
    path.write_bytes(content)
    with pytest.raises(dkv.DamagedContextError, match=r"y\.kv is no stored context"):
        TensorFile(path)


def test_only_what_is_asked_for_is_verified_and_once(tmp_path: Path) -> None:
    path = written(tmp_path / "x.kv", {"a": torch.zeros(64), "b": torch.zeros(64)})
    file = TensorFile(path)
    file["b"][0] = 1.0
    file.verify(["a"])
    with pytest.raises(dkv.DamagedContextError, match="b is damaged"):
        file.verify(["b"])
    file["a"][0] = 1.0
    file.verify(["a"])


def test_a_header_is_read_from_the_first_bytes_alone() -> None:
    stream = io.BytesIO()
    write_tensors(stream, {"a": torch.zeros(1000)}, {"format": "test"})
    start = stream.getvalue()[: -4000 + 1]
    assert read_header(io.BytesIO(start), "it")["a"]["shape"] == [1000]
