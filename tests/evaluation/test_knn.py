"""k-NN: the original's numbers, whatever the chunks; ties, bounds and bad inputs."""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dino.evaluation import KNNResult, knn_classify, nearest_neighbours
from dino.evaluation.knn import BANK_CHUNK, QUERY_CHUNK, similarity_chunks

Reference = Callable[[str], dict[str, Any]]
Data = tuple[Tensor, Tensor, Tensor, Tensor]
CPU = torch.device("cpu")
NOT_COMPARED = torch.empty(0)  # confusion


def official(reference: Reference, dtype: torch.dtype) -> tuple[Data, dict[int, KNNResult]]:
    arrays = reference("knn.npz")
    names = ("train_features", "train_labels", "test_features", "test_labels")
    bank, bank_labels, queries, query_labels = (torch.from_numpy(arrays[name]) for name in names)
    expected = {k: KNNResult(*arrays[f"k{k}"].tolist(), NOT_COMPARED) for k in (5, 10, 20, 100)}
    return (bank.to(dtype), bank_labels, queries.to(dtype), query_labels), expected


def plain_knn(data: Data, num_classes: int, k: int, temperature: float) -> KNNResult:
    """Neighbour by neighbour in Python; equal similarities by bank row, equal votes by class."""
    bank, bank_labels, queries, query_labels = data
    unit = [row / row.norm() for row in bank]
    top1 = top5 = 0
    for query, label in zip(queries, query_labels.tolist(), strict=True):
        similarities = [float(row @ (query / query.norm())) for row in unit]
        nearest = sorted(range(len(unit)), key=lambda row: (-similarities[row], row))[:k]
        votes = torch.zeros(num_classes, dtype=torch.float64)
        for row in nearest:
            votes[bank_labels[row]] += torch.tensor(similarities[row] / temperature, dtype=torch.float64).exp()
        order = sorted(range(num_classes), key=lambda c: (-float(votes[c]), c))
        top1 += label == order[0]
        top5 += label in order[: min(5, k, num_classes)]
    return KNNResult(top1 * 100.0 / len(queries), top5 * 100.0 / len(queries), NOT_COMPARED)


def tied_data() -> Data:
    """Rows whose normalised dot products are exact in binary, most of them equal to many others."""
    generator = torch.Generator().manual_seed(3)
    diagonals = 0.5 - torch.randint(0, 2, (24, 4), generator=generator)  # each coordinate 0.5 or -0.5
    vertices = torch.cat([torch.eye(4), -torch.eye(4), diagonals])
    bank = vertices[torch.randint(0, len(vertices), (120,), generator=generator)]
    queries = vertices[torch.randint(0, len(vertices), (50,), generator=generator)]
    labels = torch.randint(0, 6, (170,), generator=generator)
    return bank.double(), labels[:120], queries.double(), labels[120:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunks", [(BANK_CHUNK, QUERY_CHUNK), (64, 200), (7, 3)])
def test_the_numbers_are_exactly_those_of_the_original(
    reference: Reference, dtype: torch.dtype, chunks: tuple[int, int]
) -> None:
    data, expected = official(reference, dtype)
    result = knn_classify(*data, 7, [5, 10, 20, 100], 0.07, bank_chunk=chunks[0], query_chunk=chunks[1])
    assert result == expected


def test_lengths_of_the_features_do_not_matter(reference: Reference) -> None:
    (bank, bank_labels, queries, query_labels), expected = official(reference, torch.float64)
    lengths = torch.linspace(0.01, 100, len(bank), dtype=torch.float64)[:, None]
    scaled = knn_classify(bank * lengths, bank_labels, queries * 7, query_labels, 7, [5, 10, 20, 100])
    assert scaled == expected


@pytest.mark.parametrize("k", [1, 2, 7, 30, 120])
@pytest.mark.parametrize("chunks", [(BANK_CHUNK, QUERY_CHUNK), (1, 1), (11, 4), (40, 50)])
def test_ties_are_decided_the_same_way_in_every_chunking(k: int, chunks: tuple[int, int]) -> None:
    data = tied_data()
    result = knn_classify(*data, 6, [k], 0.5, bank_chunk=chunks[0], query_chunk=chunks[1])
    assert result[k] == plain_knn(data, 6, k, 0.5)


@pytest.mark.parametrize("chunks", [(1, 1), (5, 50), (120, 7)])
def test_neighbours_come_nearest_first_and_equal_ones_in_the_order_of_the_bank(chunks: tuple[int, int]) -> None:
    bank, _, queries, _ = tied_data()
    similarities, rows = nearest_neighbours(bank, queries, 40, bank_chunk=chunks[0], query_chunk=chunks[1])
    expected, order = (queries @ bank.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(rows, order[:, :40])
    assert torch.equal(similarities, expected[:, :40])


def test_a_fully_collapsed_network_is_judged_by_the_first_rows() -> None:
    labels = torch.tensor([2] * 5 + [0] * 95)
    ones = torch.ones(100, 8)
    result = knn_classify(ones, labels, ones, labels, 3, [5, 20], bank_chunk=13)
    assert result[5].top1 == 5.0  # the first five rows all say class 2
    assert result[20].top1 == 95.0


@pytest.mark.parametrize("num_queries", [1, 3, 99, 101])
def test_any_number_of_queries_and_classes(num_queries: int) -> None:
    """The original divides the queries into 100 chunks and fails below 100."""
    generator = torch.Generator().manual_seed(num_queries)
    bank, queries = torch.randn(80, 5, generator=generator), torch.randn(num_queries, 5, generator=generator)
    labels = torch.randint(0, 30, (80 + num_queries,), generator=generator)
    data = (bank.double(), labels[:80], queries.double(), labels[80:])
    for num_classes in (30, 1000):
        assert knn_classify(*data, num_classes, [10])[10] == plain_knn(data, num_classes, 10, 0.07)


def test_top5_is_cut_to_the_neighbours_and_to_the_classes() -> None:
    bank = torch.eye(6)
    labels = torch.arange(6)
    query, truth = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]), torch.tensor([2])
    results = knn_classify(bank, labels, query, truth, 6, [1, 2, 3, 6])
    assert [results[k].top5 for k in (1, 2, 3, 6)] == [0.0, 0.0, 100.0, 100.0]
    two_classes = knn_classify(bank, labels % 2, query, torch.tensor([1]), 2, [6])
    assert two_classes[6] == KNNResult(0.0, 100.0, NOT_COMPARED)


def test_more_neighbours_than_images_uses_the_whole_bank_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    data = tied_data()
    with caplog.at_level(logging.WARNING, logger="dino"):
        result = knn_classify(*data, 6, [120, 200])
    assert list(result) == [120, 200]
    assert result[200] == result[120]
    assert "k=200" in caplog.text
    assert "only 120 images" in caplog.text


def test_a_low_temperature_does_not_overflow() -> None:
    """exp(1 / 0.001) is beyond float32; the nearest neighbour decides then."""
    data = tuple(part.float() if part.is_floating_point() else part for part in tied_data())
    bank, bank_labels, queries, query_labels = data
    queries = queries + 0.01 * torch.randn(queries.shape, generator=torch.Generator().manual_seed(0))
    sharp = knn_classify(bank, bank_labels, queries, query_labels, 6, [20], 1e-3)[20]
    assert sharp.top1 == plain_knn((bank.double(), bank_labels, queries.double(), query_labels), 6, 20, 2e-3).top1


def test_half_precision_is_raised_and_float64_is_kept(reference: Reference) -> None:
    (bank, bank_labels, queries, query_labels), _ = official(reference, torch.float64)
    assert nearest_neighbours(bank, queries, 3)[0].dtype == torch.float64
    assert nearest_neighbours(bank.bfloat16(), queries.bfloat16(), 3)[0].dtype == torch.float32
    low = knn_classify(bank.half(), bank_labels, queries.half(), query_labels, 7, [20])
    rounded = knn_classify(bank.half().float(), bank_labels, queries.half().float(), query_labels, 7, [20])
    assert low == rounded


def test_chunks_cover_every_pair_once_and_none_exceeds_its_limit() -> None:
    bank, queries = torch.randn(101, 4), torch.randn(23, 4)
    full = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(bank).T
    seen = torch.zeros_like(full)
    for first_row, first_query, similarity in similarity_chunks(bank, queries, 10, 4, CPU):
        assert similarity.shape[0] <= 4
        assert similarity.shape[1] <= 10
        place = (slice(first_query, first_query + len(similarity)), slice(first_row, first_row + similarity.shape[1]))
        seen[place] += 1
        torch.testing.assert_close(similarity, full[place])
    assert bool((seen == 1).all())


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that were made inside and still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.live:
                storage = tensor.untyped_storage()
                self.live[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.live.values()))
        return output


def test_memory_grows_with_the_chunk_and_not_with_bank_times_queries() -> None:
    """All similarities at once would take 32 MB."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(8000, 4, generator=generator), torch.randn(1000, 4, generator=generator)
    labels = torch.randint(0, 10, (8000,), generator=generator)

    def peak(bank_chunk: int, query_chunk: int) -> int:
        with LiveMemory() as memory:
            knn_classify(bank, labels, queries, labels[:1000], 10, [10], bank_chunk=bank_chunk, query_chunk=query_chunk)
        return memory.peak

    chunk_bytes = 4 * 1000 * 100
    assert peak(8000, 1000) > 32e6  # the measure sees what is there
    assert chunk_bytes < peak(1000, 100) < 4 * chunk_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neighbours": []}, r"neighbours=\[\]"),
        ({"neighbours": [0]}, r"neighbours=\[0\]"),
        ({"neighbours": [5, 5]}, "different"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"bank_labels": torch.full((120,), 6)}, "bank labels run from 6 to 6"),
        ({"query_labels": torch.full((50,), -1)}, "query labels run from -1"),
        ({"bank_labels": torch.zeros(7, dtype=torch.int64)}, "120 rows of features but labels"),
        ({"query_features": torch.ones(50, 3)}, "4 features a row, queries of 3"),
        ({"query_features": torch.ones(0, 4), "query_labels": torch.ones(0)}, r"\[0, 4\]"),
        ({"bank_features": torch.full((120, 4), torch.nan)}, "not finite"),
        ({"query_features": torch.full((50, 4), torch.inf)}, "not finite"),
    ],
)
def test_bad_inputs_are_refused_in_one_sentence(change: dict[str, Any], message: str) -> None:
    bank, bank_labels, queries, query_labels = tied_data()
    inputs = {
        "bank_features": bank,
        "bank_labels": bank_labels,
        "query_features": queries,
        "query_labels": query_labels,
        "num_classes": 6,
        "neighbours": [5],
    }
    with pytest.raises(ValueError, match=message):
        knn_classify(**(inputs | change))


def test_a_single_broken_row_of_the_bank_is_noticed_whatever_the_chunks() -> None:
    bank, bank_labels, queries, query_labels = tied_data()
    bank[57] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        knn_classify(bank, bank_labels, queries, query_labels, 6, [1], bank_chunk=10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_numbers_are_the_same_on_a_gpu(reference: Reference) -> None:
    for dtype in (torch.float64, torch.float32):
        data, expected = official(reference, dtype)
        result = knn_classify(*data, 7, [5, 10, 20, 100], device=torch.device("cuda"))
        assert result == expected
    data = tied_data()
    result = knn_classify(*data, 6, [30], 0.5, device=torch.device("cuda"), bank_chunk=11)
    assert result[30] == plain_knn(data, 6, 30, 0.5)
