"""The kernel against dense attention in float32, as the backend "triton" calls it."""

import gc
from dataclasses import replace
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from defensivekv.attention import attend, causal_mask, triton
from defensivekv.cache import PrefixView, RaggedPrefix
from defensivekv.errors import InvalidInputError
from tests.attention.cases import Case, Sizes, sizes
from tests.kernels.interpreter import DEVICE, needs_kernels, teach_bfloat16

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EXAMPLES = 8 if DEVICE.type == "cpu" else 5
"""Each of them is likely to be compiled on a GPU."""

teach_bfloat16()
pytestmark = needs_kernels
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter cannot show this")

SMALL = Sizes(
    seed=0,
    groups=2,
    key_size=32,
    value_size=32,
    num_queries=1,
    tail=5,
    prompt=300,
    lengths=[[300, 0], [7, 129]],
    rows=[0, 1],
    mask=None,
    scaling=0.2,
    softcap=None,
    with_sinks=False,
)


def _on_device(
    case: Case,
) -> Case:
    view = case.view
    if view is not None:
        prefix = replace(view.prefix, keys=view.prefix.keys.to(DEVICE), values=view.prefix.values.to(DEVICE))
        view = PrefixView(prefix, view.rows)
    return replace(
        case,
        view=view,
        queries=case.queries.to(DEVICE),
        tail_keys=case.tail_keys.to(DEVICE),
        tail_values=case.tail_values.to(DEVICE),
        visible=None if case.visible is None else case.visible.to(DEVICE),
        sinks=None if case.sinks is None else case.sinks.to(DEVICE),
    )


def _check(size: Sizes, dtype: torch.dtype = torch.float32) -> None:
    case = size.case(dtype)
    output = _on_device(case).attend("triton")
    assert output.dtype == dtype
    torch.testing.assert_close(output.cpu().float(), case.expected(), rtol=0, atol=case.tolerance())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES)
@given(sizes())
def test_the_kernel_equals_dense_attention(dtype: torch.dtype, size: Sizes) -> None:
    _check(size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_head_sizes(head_size: int, dtype: torch.dtype) -> None:
    _check(replace(SMALL, key_size=head_size, value_size=head_size, scaling=head_size**-0.5), dtype)


@pytest.mark.parametrize(("key_size", "value_size"), [(192, 128), (64, 256), (16, 1)])
def test_keys_and_values_of_different_sizes(key_size: int, value_size: int) -> None:
    _check(replace(SMALL, key_size=key_size, value_size=value_size, scaling=0.1), torch.float16)


@pytest.mark.parametrize("groups", range(1, 17))
def test_group_sizes(groups: int) -> None:
    _check(replace(SMALL, groups=groups, lengths=[[130, 3]], rows=[0]), torch.float16)


@pytest.mark.parametrize(
    "lengths",
    [[1500, 1, 0, 2], [0, 0, 0, 128], [127, 128, 129, 1], [0, 0, 0, 0]],
    ids=["one giant", "empty before", "around a chunk", "all empty"],
)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_lengths_of_heads(lengths: list[int], with_sinks: bool) -> None:
    _check(replace(SMALL, prompt=1500, lengths=[lengths], rows=[0], with_sinks=with_sinks))


@pytest.mark.parametrize(
    ("rows", "groups"),
    [([1, 0, 1], 2), ([1], 4), ([1] * 9, 4), ([0, 1, 1, 1, 1, 1], 7)],
    ids=["reordered", "one left out", "several tiles", "a tile across readers"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_that_share_a_prefix(rows: list[int], groups: int, dtype: torch.dtype) -> None:
    _check(replace(SMALL, rows=rows, groups=groups), dtype)


@pytest.mark.parametrize("prompt", [0, 300])
@pytest.mark.parametrize("tail", [0, 1, 200])
def test_without_prefix_or_tail(prompt: int, tail: int) -> None:
    lengths = SMALL.lengths if prompt else [[0, 0], [0, 0]]
    _check(replace(SMALL, prompt=prompt, lengths=lengths, tail=tail))


@pytest.mark.parametrize("mask", [None, (False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("hides", [False, True])
def test_masks_of_the_tail(mask: tuple[bool, bool] | None, hides: bool) -> None:
    _check(replace(SMALL, mask=mask, hides=hides, num_queries=3, tail=150))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("scaling", [0.01, 1.0])
def test_softcaps(softcap: float, scaling: float) -> None:
    _check(replace(SMALL, softcap=softcap, scaling=scaling, with_sinks=True))


@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_that_see_nothing_give_zero(with_sinks: bool) -> None:
    case = replace(SMALL, lengths=[[0, 0], [0, 129]], num_queries=2, mask=(True, True), with_sinks=with_sinks).case(
        torch.float32
    )
    case = _on_device(replace(case, visible=torch.zeros(2, 4, 2, 5, dtype=torch.bool)))
    output = case.attend("triton")
    assert (output[0] == 0).all()
    assert (output[1, :2] == 0).all()
    assert (output[1, 2:] != 0).all()


def _with_room(tail: Tensor, capacity: int, value: float) -> Tensor:
    return torch.nn.functional.pad(tail, (0, 0, 0, capacity - tail.shape[2]), value=value)


@pytest.mark.parametrize("count_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_tail_counted_on_the_device_is_not_read_beyond_its_count(
    count_dtype: torch.dtype, num_queries: int, with_mask: bool
) -> None:
    mask = (True, True) if with_mask else None
    case = replace(SMALL, num_queries=num_queries, tail=140, mask=mask).case(torch.float32)
    moved = _on_device(case)
    visible = moved.visible
    output = triton.attend(
        moved.queries,
        moved.view,
        _with_room(moved.tail_keys, 400, float("nan")),
        _with_room(moved.tail_values, 400, float("nan")),
        used=torch.tensor(140, dtype=count_dtype, device=DEVICE),
        visible=None if visible is None else torch.nn.functional.pad(visible, (0, 260), value=True),
        scaling=case.scaling,
        softcap=None,
        sinks=None,
    )
    torch.testing.assert_close(output.cpu(), case.expected(), rtol=0, atol=case.tolerance())


def test_a_tail_of_which_nothing_is_used_is_not_read() -> None:
    case = replace(SMALL, tail=0).case(torch.float32)
    moved = _on_device(case)
    garbage = torch.full((2, 2, 40, 32), float("nan"), device=DEVICE)
    none = torch.zeros((), dtype=torch.int32, device=DEVICE)
    output = triton.attend(
        moved.queries,
        moved.view,
        garbage,
        garbage,
        used=none,
        visible=None,
        scaling=case.scaling,
        softcap=None,
        sinks=None,
    )
    torch.testing.assert_close(output.cpu(), case.expected(), rtol=0, atol=case.tolerance())


def test_nothing_is_read_around_segments_and_tails() -> None:
    case = replace(SMALL, lengths=[[130, 7], [200, 300], [129, 0]], rows=[2, 0]).case(torch.float32)
    moved = _on_device(case)
    assert moved.view is not None
    prefix = moved.view.prefix
    unread = slice(prefix.segment(1, 0).start, prefix.segment(1, 1).stop)
    held = []
    for entries in (prefix.keys, prefix.values):
        entries[unread] = float("nan")
        held.append(torch.nn.functional.pad(entries, (0, 0, 50, 50), value=float("nan"))[50:-50])
    prefix = replace(prefix, keys=held[0], values=held[1])
    moved = replace(
        moved,
        view=PrefixView(prefix, moved.view.rows),
        tail_keys=_with_room(moved.tail_keys, 50, float("nan"))[:, :, :5],
        tail_values=_with_room(moved.tail_values, 50, float("nan"))[:, :, :5],
    )
    torch.testing.assert_close(moved.attend("triton").cpu(), case.expected(), rtol=0, atol=case.tolerance())


def test_any_layout_of_queries_tail_and_mask_is_read() -> None:
    case = replace(SMALL, num_queries=3, mask=(True, True)).case(torch.float32)
    moved = _on_device(case)
    assert moved.visible is not None

    def turned(tensor: Tensor, *dims: int) -> Tensor:
        return tensor.transpose(*dims).contiguous().transpose(*dims)

    layouts = replace(
        moved,
        queries=turned(moved.queries, 1, 2),
        tail_keys=turned(moved.tail_keys, 1, 2),
        tail_values=turned(moved.tail_values, 2, 3),
        visible=turned(moved.visible, 1, 3),
    )
    torch.testing.assert_close(layouts.attend("triton").cpu(), case.expected(), rtol=0, atol=case.tolerance())


def test_what_is_read_is_not_written() -> None:
    case = _on_device(replace(SMALL, num_queries=2, mask=(True, True), with_sinks=True).case(torch.float16))
    assert case.view is not None
    read = [case.queries, case.tail_keys, case.tail_values, case.view.prefix.keys, case.view.prefix.values]
    read += [tensor for tensor in (case.visible, case.sinks) if tensor is not None]
    before = [tensor.clone() for tensor in read]
    case.attend("triton")
    assert all(torch.equal(now, then) for now, then in zip(read, before, strict=True))


def test_the_work_is_kept_as_long_as_the_view() -> None:
    case = _on_device(SMALL.case(torch.float32))
    assert case.view is not None
    work = triton.work_of(case.view)
    assert triton.work_of(case.view) is work
    assert triton.work_of(PrefixView(case.view.prefix, (1, 1))) is not work
    kept = ref(work)
    del work, case
    gc.collect()
    assert kept() is None


def test_what_the_kernel_cannot_serve_is_refused() -> None:
    for size, dtype in ((SMALL, torch.float64), (replace(SMALL, key_size=257), torch.float32)):
        with pytest.raises(InvalidInputError, match="'triton' cannot serve"):
            _on_device(size.case(dtype)).attend("triton")


@pytest.mark.parametrize(("num_queries", "is_chosen"), [(1, True), (32, True), (33, False)])
def test_auto_reads_few_queries_on_a_gpu_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch, num_queries: int, is_chosen: bool
) -> None:
    case = _on_device(replace(SMALL, num_queries=num_queries, tail=40).case(torch.float16))
    called = []
    real = triton.attend

    def spy(*arguments: Tensor, **options: float) -> Tensor:
        called.append(True)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(triton, "attend", spy)
    case.attend("auto")
    assert bool(called) == (is_chosen and DEVICE.type == "cuda")


@needs_gpu
def test_a_captured_graph_is_replayed_while_the_tail_grows() -> None:
    case = replace(SMALL, tail=140, key_size=128, value_size=128).case(torch.float16)
    moved = _on_device(case)
    used = torch.tensor(140, device=DEVICE)

    def read() -> Tensor:
        return triton.attend(
            moved.queries,
            moved.view,
            moved.tail_keys,
            moved.tail_values,
            used=used,
            visible=None,
            scaling=case.scaling,
            softcap=None,
            sinks=None,
        )

    read()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = read()
    for count in (1, 2, 129, 140):
        used.fill_(count)
        graph.replay()
        hidden = torch.arange(140) >= count
        expected = replace(case, visible=~hidden.view(1, 1, 1, -1)).expected()
        torch.testing.assert_close(output.cpu().float(), expected, rtol=0, atol=case.tolerance())


@needs_gpu
def test_entries_beyond_the_reach_of_32_bits_are_read() -> None:
    far, count, size = 2**24 + 64, 300, 128
    torch.manual_seed(0)
    keys = torch.zeros(far + count, size, dtype=torch.float16, device=DEVICE)
    keys[far:] = torch.randn(count, size)
    values = torch.randn(far + count, 16).to(DEVICE, torch.float16)
    prefix = RaggedPrefix(keys, values, torch.empty(0, dtype=torch.int32), ((far, count),))
    queries = torch.randn(1, 2, 1, size).to(DEVICE, torch.float16)
    nothing = torch.empty(1, 2, 0, size, dtype=torch.float16, device=DEVICE), queries.new_empty(1, 2, 0, 16)
    output = attend(queries, PrefixView(prefix, (0,)), *nothing, scaling=0.1, backend="triton")
    weights = (queries[0, 1].float() @ keys[far:].float().T * 0.1).softmax(-1)
    torch.testing.assert_close(output[0, 1].float(), weights @ values[far:].float(), rtol=0, atol=1e-2)


def test_a_causal_tail_is_as_under_a_causal_mask() -> None:
    case = _on_device(replace(SMALL, num_queries=4, tail=6).case(torch.float32))
    masked = replace(case, visible=causal_mask(4, 6, DEVICE))
    torch.testing.assert_close(case.attend("triton"), masked.attend("triton"), rtol=0, atol=1e-6)
