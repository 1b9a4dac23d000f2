"""Weighted k-NN classification with cosine similarity (paper, section 4.1; original: eval_knn.py, knn_classifier).

Shapes: N rows of the bank, M queries, D features, k neighbours, C classes.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dino import preemption
from dino.ranks import any_rank, gather_objects, own_part
from dino.run import NonFiniteFeaturesError

log = logging.getLogger("dino")

# One chunk of similarities is 512 x 16384 values: 32 MiB in float32, whatever the size of bank and queries.
BANK_CHUNK = 16384
QUERY_CHUNK = 512


@dataclass(frozen=True)
class KNNResult:
    """Shares of correctly classified queries [%], and the class that each was taken for."""

    top1: float
    top5: float
    predictions: Tensor = field(compare=False)  # [M] int64


def knn_classify(
    bank_features: Tensor,
    bank_labels: Tensor,
    query_features: Tensor,
    query_labels: Tensor,
    num_classes: int,
    neighbours: Sequence[int],
    temperature: float = 0.07,
    *,
    bank_chunk: int = BANK_CHUNK,
    query_chunk: int = QUERY_CHUNK,
    device: torch.device | None = None,
) -> dict[int, KNNResult]:
    """Lets the k nearest bank rows of each query vote for its class, for several k in one search.

    A neighbour votes with exp(cosine similarity / temperature). `top5` counts a hit among the first min(5, k, C)
    classes, as the original. Equal similarities are ordered by bank row and equal votes by class, so that the result
    does not depend on the sizes of the chunks. A k beyond the size of the bank uses the whole bank, with a notice.

    Under several ranks all of them call it with the same arguments; each classifies its own part of the queries.

    Args:
        bank_features: [N, D], not necessarily normalised; float64 is kept, anything lower is raised to float32.
        bank_labels: [N], whole numbers from 0 to C - 1.
        query_features: [M, D].
        query_labels: [M], as `bank_labels`.
        bank_chunk: rows of the bank that are compared at a time.
        query_chunk: queries that are compared at a time.
        device: where features are compared; None: where the bank is. Moved there: all queries, one chunk of the bank.

    Returns:
        The result for each k of `neighbours`, in their order.

    Raises:
        ValueError: for empty or mismatched features, labels outside of 0 to C - 1, or options out of range.
        NonFiniteFeaturesError: for features that are not finite.
        Preempted: a signal came to this rank or another.
    """
    _check(bank_features, bank_labels, num_classes, "bank")
    _check(query_features, query_labels, num_classes, "query")
    _check_options(neighbours, temperature)
    if bank_features.shape[1] != query_features.shape[1]:
        raise ValueError(f"a bank of {bank_features.shape[1]} features a row, queries of {query_features.shape[1]}")
    bank_size = len(bank_features)
    if max(neighbours) > bank_size:
        log.warning("k-NN with k=%d: the bank has only %d images, so all of them vote", max(neighbours), bank_size)
    device = bank_features.device if device is None else device
    largest = min(max(neighbours), bank_size)
    own = own_part(len(query_features), query_chunk)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        similarities, rows = nearest_neighbours(
            bank_features, query_features[own], largest, bank_chunk=bank_chunk, query_chunk=query_chunk, device=device
        )
        # NaN counts as the largest value in topk and sort, so a single broken row shows here.
        if any_rank(not bool(similarities.isfinite().all())):
            raise NonFiniteFeaturesError("k-NN")
        # Relative to the nearest neighbour, which leaves the order of the votes as it is and cannot overflow.
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        labels = bank_labels.to(device)[rows]
        targets = query_labels[own].to(device)
        hits = _votes(weights, labels, targets, num_classes, set(neighbours), query_chunk)
    preemption.check()
    parts = gather_objects(hits)
    return {k: _result([part[min(k, bank_size)] for part in parts], query_labels.cpu()) for k in neighbours}


def _result(of_ranks: Sequence[tuple[Tensor, int]], labels: Tensor) -> KNNResult:
    """From the predictions and top-5 hits of each rank, which are those of one part of the labels [M] after another."""
    predictions = torch.cat([predicted for predicted, _ in of_ranks])
    top1, top5 = int((predictions == labels).sum()), sum(hits for _, hits in of_ranks)
    return KNNResult(top1 * 100.0 / len(labels), top5 * 100.0 / len(labels), predictions)


def nearest_neighbours(
    bank: Tensor,
    queries: Tensor,
    k: int,
    *,
    bank_chunk: int = BANK_CHUNK,
    query_chunk: int = QUERY_CHUNK,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """The k bank rows of largest cosine similarity for each query: (similarities, rows), both [M, k], nearest first.

    Beyond the inputs it needs 2 * M * k values and one chunk of similarities. Equal similarities keep the order of the
    bank. k is at most N.

    Raises:
        Preempted: a signal came to this rank or another; every rank must call it, with queries or without.
    """
    assert 1 <= k <= len(bank), f"k={k} of a bank of {len(bank)}"
    device = bank.device if device is None else device
    best = torch.empty(len(queries), 0, dtype=_compute_type(queries), device=device)
    best_rows = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    merged: list[tuple[Tensor, Tensor]] = []
    chunks = similarity_chunks(bank, queries, bank_chunk, query_chunk, device)
    for first_row, first_query, similarity in preemption.until_requested(chunks):
        span = slice(first_query, first_query + len(similarity))
        values, rows = _top(similarity, min(k, similarity.shape[1]))
        # Rows of earlier chunks come first, so that a stable sort keeps the order of the bank among equals.
        values = torch.cat([best[span], values], dim=1)
        rows = torch.cat([best_rows[span], rows + first_row], dim=1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        merged.append((values[:, :k], rows.gather(1, order)[:, :k]))
        if span.stop == len(queries):
            best, best_rows = (torch.cat(parts) for parts in zip(*merged, strict=True))
            merged = []
    preemption.check()
    return best.reshape(len(queries), k), best_rows.reshape(len(queries), k)  # [0, k] without queries


def similarity_chunks(
    bank: Tensor, queries: Tensor, bank_chunk: int, query_chunk: int, device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    """Cosine similarities piece by piece: (first bank row, first query, [at most query_chunk, at most bank_chunk]).

    All queries come for the first rows of the bank, then all for the next: each row of the bank is moved to `device`
    and normalised once.
    """
    dtype = _compute_type(queries)
    queries = normalize(queries.to(device, dtype), dim=1)
    for first_row in range(0, len(bank), bank_chunk):
        rows = normalize(bank[first_row : first_row + bank_chunk].to(device, dtype), dim=1)
        for first_query in range(0, len(queries), query_chunk):
            yield first_row, first_query, queries[first_query : first_query + query_chunk] @ rows.T


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, largest first; of equal ones the first columns.

    `topk` alone promises nothing about equal values, so rows with more than k candidates are sorted in full. These are
    rare, unless features have collapsed to one point.
    """
    values, columns = similarity.topk(k, dim=1)
    undecided = (similarity >= values[:, -1:]).sum(dim=1, dtype=torch.int32) > k
    if bool(undecided.any()):
        rows_values, rows_columns = similarity[undecided].sort(dim=1, descending=True, stable=True)
        values[undecided], columns[undecided] = rows_values[:, :k], rows_columns[:, :k]
    columns, order = columns.sort(dim=1)
    values, by_value = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, by_value)


def _votes(
    weights: Tensor, labels: Tensor, targets: Tensor, num_classes: int, neighbours: set[int], chunk: int
) -> dict[int, tuple[Tensor, int]]:
    """The classes [M] that win, and the number of queries whose class is among the first min(5, k, C), for each k up to
    the size of the bank.

    Args:
        weights: [M, k] votes of the neighbours, nearest first.
        labels: [M, k] their classes.
        targets: [M] the true classes.
    """
    largest = weights.shape[1]
    wanted = {min(k, largest) for k in neighbours}
    winners: dict[int, list[Tensor]] = {k: [] for k in wanted}
    hits = dict.fromkeys(wanted, 0)
    classes = torch.arange(num_classes, device=weights.device)
    for first in preemption.until_requested(range(0, len(targets), chunk)):
        weight, label, target = (part[first : first + chunk] for part in (weights, labels, targets))
        votes = weight.new_zeros(len(weight), num_classes)
        for position in range(largest):
            # One neighbour of every query at a time: no two land in one cell, so the sum has one order everywhere.
            column = label[:, position : position + 1]
            votes.scatter_(1, column, votes.gather(1, column) + weight[:, position : position + 1])
            k = position + 1
            if k in wanted:
                of_target = votes.gather(1, target[:, None])
                before = (votes > of_target) | ((votes == of_target) & (classes < target[:, None]))
                within = min(5, k, num_classes)
                # Of equal votes the first class, which argmax does not promise.
                most = torch.where(votes == votes.amax(dim=1, keepdim=True), classes, num_classes).amin(dim=1)
                winners[k].append(most.cpu())
                hits[k] += int((before.sum(dim=1) < within).sum())
    none = torch.empty(0, dtype=torch.int64)
    return {k: (torch.cat([none, *winners[k]]), hits[k]) for k in wanted}


def _compute_type(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _check(features: Tensor, labels: Tensor, num_classes: int, name: str) -> None:
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name} features have the shape {list(features.shape)}; k-NN needs [rows, features]")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"{name}: {len(features)} rows of features but labels of the shape {list(labels.shape)}")
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0 or largest >= num_classes:
        raise ValueError(
            f"{name} labels run from {smallest} to {largest}: use 0 to num_classes - 1 = {num_classes - 1}"
        )


def _check_options(neighbours: Sequence[int], temperature: float) -> None:
    if not neighbours or min(neighbours) < 1 or len(set(neighbours)) != len(neighbours):
        raise ValueError(f"neighbours={list(neighbours)}: give one or more different whole numbers of at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: use a number above 0, such as the original's 0.07")
