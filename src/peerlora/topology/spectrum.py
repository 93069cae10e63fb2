"""Eigenvalues of mixing matrices: from all of a dense one, and from products alone where it is sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.sparse import csc_array, diags_array
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs, eigsh, splu

Vector = Float[np.ndarray, " client"]
Product = Callable[[Vector], Vector]

_TOLERANCE = 1e-12  # of an eigenvalue, relative
_VECTORS, _RESTARTS = 60, 40  # that Lanczos keeps, and its restarts; where eigenvalues lie closer, others are used
_NOTHING = 1e-14  # of a random vector's norm: what leaves no more is J itself
_NEAR = 1e-13  # beyond 1, where the factorisation for eigenvalues near 1 is made
_lanczos: Any = eigsh  # whose stub has a tolerance that is a whole number


def largest_eigenvalue(M: Any) -> float:
    """The largest eigenvalue of a symmetric matrix."""
    if isinstance(M, np.ndarray):
        return float(np.linalg.eigvalsh(M)[-1])
    return _extreme(M, "LA")


def smallest_eigenvalue(M: Any) -> float:
    """The smallest eigenvalue of a symmetric matrix."""
    if isinstance(M, np.ndarray):
        return float(np.linalg.eigvalsh(M)[0])
    return _extreme(M, "SA")


def _extreme(M: Any, which: str) -> float:
    found = _lanczos(M, k=1, which=which, v0=_start(M.shape[0]), tol=1e-9, return_eigenvectors=False)
    return float(found[0])


def second_modulus(W: Any) -> float:
    """The second largest modulus of the eigenvalues of a matrix, of which the largest is 1."""
    clients = W.shape[0]
    if clients == 1:
        return 0.0
    if isinstance(W, np.ndarray):
        return float(np.sort(np.abs(np.linalg.eigvals(W)))[-2])
    found = eigs(W, k=2, which="LM", v0=_start(clients), ncv=min(clients, _VECTORS), return_eigenvectors=False)
    return float(np.sort(np.abs(found))[0])


def mean_gram(matrices: Sequence[Any], weights: Sequence[int]) -> Product:
    """The product with ``sum_k w_k W_k^T W_k``, which is never formed."""
    total = float(sum(weights))

    def product(x: Vector) -> Vector:
        return sum(w / total * (W.T @ (W @ x)) for W, w in zip(matrices, weights, strict=True))  # pyright: ignore

    return product


def chain_gram(matrices: Sequence[Any]) -> Product:
    """The product with ``P^T P`` for ``P = W_last ... W_first``."""

    def product(x: Vector) -> Vector:
        for W in matrices:
            x = W @ x
        for W in reversed(matrices):
            x = W.T @ x
        return x

    return product


def largest_off_mean(product: Product, clients: int, matrix: Any = None) -> float:
    """The largest eigenvalue of ``M - J`` for a symmetric M with ``M 1 = 1``, by Lanczos from products alone.

    ``product`` multiplies by M.  ``matrix``: M itself where it is sparse, for graphs such as large rings whose
    eigenvalues lie too close together for products: then its eigenvalues near 1 are found by a factorisation.
    """

    def deflated(x: np.ndarray) -> np.ndarray:
        return product(x.ravel()) - x.mean()

    if clients == 1:
        return 0.0
    if clients <= 3:  # too few for Lanczos
        return float(np.linalg.eigvalsh(np.stack([deflated(row) for row in np.eye(clients)]))[-1])
    start = _start(clients)
    if float(np.linalg.norm(deflated(start))) < _NOTHING * float(np.linalg.norm(start)):
        return 0.0
    operator = LinearOperator((clients, clients), matvec=deflated, dtype=float)  # pyright: ignore[reportCallIssue]
    options = {"k": 1, "which": "LA", "v0": start, "ncv": min(clients - 1, _VECTORS), "tol": _TOLERANCE}
    restarts = 10 * clients if matrix is None else _RESTARTS
    try:
        found = _lanczos(operator, **options, maxiter=restarts, return_eigenvectors=False)
    except ArpackNoConvergence:
        if matrix is None:
            raise
        return _second_near_one(matrix)
    return max(0.0, float(found[0]))


def _second_near_one(M: Any) -> float:
    """The second largest eigenvalue of M, whose largest is 1, from a factorisation of ``(1 + tiny) I - M``.

    Whose inverse has the eigenvalues ``1 / (1 + tiny - lambda)``, far apart where those of M are close.
    """
    clients = M.shape[0]
    factors = splu(csc_array(diags_array(np.full(clients, 1 + _NEAR)) - M))

    def inverse(x: np.ndarray) -> np.ndarray:
        y = factors.solve(x.ravel() - x.mean())
        return y - y.mean()

    operator = LinearOperator((clients, clients), matvec=inverse, dtype=float)  # pyright: ignore[reportCallIssue]
    found = _lanczos(operator, k=1, which="LA", v0=_start(clients), ncv=20, tol=1e-10, return_eigenvectors=False)
    return 1 + _NEAR - 1 / float(found[0])


def _start(clients: int) -> Vector:
    """The first vector of an iteration: the same for all, since the answer must not depend on a seed."""
    return np.random.default_rng(0).standard_normal(clients)
