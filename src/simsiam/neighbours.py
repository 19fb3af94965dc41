"""Exact nearest neighbours by cosine similarity, computed in blocks to bound memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from simsiam import kernels
from simsiam.config import UserError

_QUERIES = 512
"""Queries that are compared at a time."""
_GROUP = 16
"""Columns of which `_largest` takes the maximum first."""
_BANK_BLOCK = 1 << 25
"""Values of the bank that are normalised and held at a time (128 MiB of float32)."""
_BLOCK = 1 << 22
"""Values of stored vectors that are read and held at a time: all of ImageNet's would be 10 GB."""


def top_k(
    queries: Tensor | np.ndarray,
    bank: Tensor | np.ndarray,
    k: int,
    *,
    exclude_self: bool = False,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k rows of the bank that are most similar to each query.

    Args:
        queries, bank: float [Q,D] and [N,D], of any scale; arrays may be read-only or memory-mapped.
        k: at most N (N-1 with `exclude_self`) neighbours are returned.
        exclude_self: the queries are the bank; row i is excluded from its own neighbours, but its duplicates are not.
        device: where to compute; None: the device of `bank`.
    Returns:
        Cosine similarities, float32 [Q,k], descending, and indices into the bank, int64 [Q,k], on the CPU. A row of
        zeros has similarity 0 to everything. Ties are in no particular order.
    Raises:
        UserError: a value is NaN or infinite.
    """
    assert queries.ndim == 2 and bank.ndim == 2 and queries.shape[1] == bank.shape[1]
    assert k >= 1 and (not exclude_self or len(queries) == len(bank))
    if device is None:
        device = bank.device if isinstance(bank, Tensor) else torch.device("cpu")
    k = max(0, min(k, len(bank) - exclude_self))
    scores = torch.full((len(queries), k), -torch.inf)
    indices = torch.zeros(len(queries), k, dtype=torch.int64)
    bank_block = max(1, _BANK_BLOCK // max(1, bank.shape[1]))
    for first in range(0, len(bank), bank_block):
        part = unit_rows(bank[first : first + bank_block], device)
        buffer = part.new_empty(min(_QUERIES, len(queries)), len(part))
        for start in range(0, len(queries), _QUERIES):
            rows = slice(start, start + _QUERIES)
            query = unit_rows(queries[rows], device)
            similarity = torch.mm(query, part.T, out=buffer[: len(query)])
            if exclude_self:
                similarity.diagonal(start - first).fill_(-torch.inf)
            best, which = (found.cpu() for found in _largest(similarity, min(k, len(part))))
            which += first
            if first:  # merge with the best of the earlier blocks
                best, order = torch.cat([scores[rows], best], 1).topk(k, dim=1)
                which = torch.cat([indices[rows], which], 1).gather(1, order)
            scores[rows, : best.shape[1]], indices[rows, : best.shape[1]] = best, which
    return scores.clamp_(-1, 1), indices  # rounding may exceed 1 slightly


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return `values.topk(k, dim=1)`, [Q,N] -> [Q,k] twice.

    If rows are long and there is no kernel, first take the maxima of groups of columns: the k groups with the largest
    maxima hold the k largest values. That reads the rows once and sorts a tenth of them.
    """
    if kernels.usable(values) and k > 0:
        return kernels.largest(values, k)
    count = values.shape[1] // _GROUP
    if count <= 4 * k:
        return values.topk(k, dim=1)
    maxima = values[:, : count * _GROUP].view(-1, _GROUP, count).amax(1)  # column c is in group c % count
    groups = maxima.topk(k, dim=1, sorted=False).indices
    columns = (groups[:, None] + count * torch.arange(_GROUP, device=values.device)[:, None]).flatten(1)
    rest = torch.arange(count * _GROUP, values.shape[1], device=values.device).expand(len(values), -1)
    columns = torch.cat([columns, rest], 1)
    best, which = values.gather(1, columns).topk(k, dim=1)
    return best, columns.gather(1, which)


def unit_rows(rows: Tensor | np.ndarray, device: torch.device | None = None) -> Tensor:
    """Scale rows to unit length, float32 [N,D]; rows of zeros stay. Raises UserError if a value is NaN or infinite."""
    if isinstance(rows, np.ndarray):
        rows = torch.from_numpy(rows.astype(np.float32))
    rows = rows.to(device, torch.float32)
    # Divide by the largest value first: squares of very large or small values leave the range of float32.
    low, high = rows.aminmax(dim=1, keepdim=True)
    peak = torch.maximum(high, -low)
    if not peak.isfinite().all():
        raise UserError(
            "The embeddings are not finite: the encoder diverged. Use an earlier checkpoint, or train again."
        )
    rows = rows / torch.where(peak > 0, peak, 1.0)
    return rows.div_(rows.norm(dim=1, keepdim=True).clamp(min=1))


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of `rows` rows of `width` values, `_BLOCK` values each.

    Write the results into one array that is allocated beforehand: small arrays that are kept between large ones that are
    freed fragment the memory to several times the size of both.
    """
    step = max(1, _BLOCK // max(1, width))
    return (slice(start, start + step) for start in range(0, rows, step))
