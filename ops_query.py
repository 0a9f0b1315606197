"""One query vector from the embeddings of a question, and the relevance of tokens to it.

Shapes: N sets of L tokens with C features each; J text tokens with H features each. Sections and tables are those of the ReDiPrune
paper.
"""

import math

import torch
import torch.nn.functional as F

from .ops_tokens import MIN_NORM, cosines, inverse_norms

QUERY_WEIGHTINGS = ("exponential", "self_attention", "middle_peak", "average")


def build_query(embeddings: torch.Tensor, weighting: str = "exponential") -> torch.Tensor:
    """One query vector from the input embeddings of the text, q = sum_j w_j c_j (Eq. 1).

    `embeddings` (J, H) of any floating dtype; returns (H,) in fp32, zeros if J = 0. The weightings:

    - "exponential": c = A e with A = softmax(cosine(e, e)) by rows, w_j proportional to exp(3 j / (J - 1))
      with j from 0 (the authors' code);
    - "self_attention": c = A e, uniform w;
    - "middle_peak": c = e, w_j a Gaussian around the middle of the text with standard deviation J / 4;
    - "average": c = e, uniform w.

    Raises ValueError for any other weighting.
    """
    if weighting not in QUERY_WEIGHTINGS:
        raise ValueError(f"weighting must be one of {QUERY_WEIGHTINGS}, got {weighting!r}")
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must have shape (J, H), got {tuple(embeddings.shape)}")
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = embeddings.float()
        num_tokens = embeddings.shape[0]
        if num_tokens == 0:
            return embeddings.new_zeros(embeddings.shape[1])
        position = torch.arange(num_tokens, dtype=torch.float32, device=embeddings.device)
        if weighting == "exponential":
            weights = torch.exp(3 * position / max(1, num_tokens - 1))
        elif weighting == "middle_peak":
            weights = torch.exp(-((position - (num_tokens - 1) / 2) ** 2) / (2 * (num_tokens / 4) ** 2))
        else:
            weights = torch.ones_like(position)
        weights = weights / weights.sum()
        if weighting in ("exponential", "self_attention"):
            unit = F.normalize(embeddings, dim=-1, eps=MIN_NORM)
            weights = weights @ (unit @ unit.T).softmax(dim=-1)  # w (A e) = (w A) e
        return weights @ embeddings


def align_query(query: torch.Tensor, dim: int) -> torch.Tensor:
    """Bring `query` (N, D) to (N, dim) in fp32, without learning: if D > dim, averages of consecutive entries
    (blocks of D / dim, or adaptive average pooling where that is no integer); if D < dim, tiled and cut.
    """
    query = query.float()
    if query.shape[1] > dim:
        return F.adaptive_avg_pool1d(query, dim)
    return query.repeat(1, math.ceil(dim / query.shape[1]))[:, :dim]


@torch.no_grad()
def cosine_relevance(features: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Cosine of every token (N, L, C) with the query (N, C) of its set (Eq. 3), (N, L) fp32; 0 where either is zero."""
    features = features.float()
    return cosines(features, inverse_norms(features), query.float())
