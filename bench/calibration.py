"""Whether a classifier is as sure as it is right."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def calibration_error(logits: Float[np.ndarray, "row label"], labels: Int[np.ndarray, " row"], bins: int = 15) -> float:
    """Expected calibration error: mean |share right - mean confidence| over bins of equal width, weighted by rows.

    Source: Guo et al. 2017, "On calibration of modern neural networks", arXiv 1706.04599, with their 15 bins.
    """
    shares = np.exp(logits - logits.max(1, keepdims=True))
    confidence = (shares / shares.sum(1, keepdims=True)).max(1)
    right = logits.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(place, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def recalls(logits: Float[np.ndarray, "row label"], labels: Int[np.ndarray, " row"]) -> Float[np.ndarray, " label"]:
    """The share of each label's rows that is predicted right; NaN for a label without rows.

    From these, the accuracy under any other label proportions is their weighted mean.
    """
    right = np.bincount(labels, logits.argmax(1) == labels, minlength=logits.shape[1])
    rows = np.bincount(labels, minlength=logits.shape[1])
    return np.divide(right, rows, out=np.full(len(rows), np.nan), where=rows > 0)
