"""Preconditioners that need no layers: the curvature's diagonal or its largest eigenvalues.

Random vectors show them, through ``v ↦ F v``, so they fit every closure; Kronecker factors, where
the graph has them, tell more.

The optimizer's state has for each parameter ``sketch``, its rows of a sketch's basis; for the first
parameter also ``sketch_values`` and ``sketch_age``, and ``draws``, how often random vectors were
drawn.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngd_optim.distributed import Ranks
from ngd_optim.linearization import Point
from ngd_optim.parameters import FlatParameters, forget
from ngd_optim.preconditioners.base import Preconditioning, Solve
from ngd_optim.reading import read
from ngd_optim.shown import show
from ngd_optim.solvers import QuadraticModel

_SKETCH = ("sketch", "sketch_values", "sketch_age")
Product = Callable[[Tensor], Tensor]
DEFAULT_LARGEST_RANK = 160


class Sketch(NamedTuple):
    """What is kept of the curvature.

    Attributes:
        basis: orthonormal columns, shape (n, r); or the diagonal, shape (n, 1).
        values: their eigenvalues, largest first, shape (r,); empty for a diagonal.
        age: steps since it was drawn.
    """

    basis: Tensor
    values: Tensor
    age: int


@dataclass(frozen=True)
class Diagonal:
    """``M = diag(F) + λ``.

    It helps where parameters have units of their own, as the weights of features that were not
    scaled; in a network it often takes more iterations than none. The diagonal is exact, from the
    squares of the Jacobian's columns, where that is small and takes one pull-back: as a rule, up to
    128 MiB with one output per sample. Else it is estimated by ``z ⊙ F z`` (Bekas, Kokiopoulou &
    Saad 2007).

    Args:
        probes: products per estimate, with random signs ``z``.
        refresh: steps after which it is renewed.

    Raises:
        ValueError: one of them is below 1.

    Examples:
        >>> import torch
        >>> from ngd_optim import NaturalCG, Diagonal
        >>> w = torch.nn.Parameter(torch.ones(50))
        >>> optimizer = NaturalCG([w], preconditioner=Diagonal(probes=20))
        >>> loss = optimizer.step(lambda: (torch.arange(50) * w.square()).sum())
        >>> optimizer.last_step.preconditioner
        'diagonal'
    """

    probes: int = 10
    refresh: int = 10
    name = "diagonal"

    def __post_init__(self) -> None:
        _at_least_one(probes=self.probes, refresh=self.refresh)

    def draw(
        self,
        product: Product,
        n: int,
        shift: Tensor,
        old: Sketch | None,
        generator: torch.Generator,
    ) -> Sketch:
        """A new estimate."""
        total = torch.zeros_like(shift)
        for _ in range(self.probes):
            signs = (
                torch.randint(0, 2, (n,), generator=generator, device=generator.device)
                .mul_(2)
                .sub_(1)
                .to(shift)
            )
            # E[z ⊙ F z] = diag F for random signs z.
            total += signs * product(signs)
        return sketch_of_diagonal(total / self.probes)

    def solve(self, sketch: Sketch, shift: Tensor) -> Product:
        """``r ↦ M⁻¹ r``."""
        scale = sketch.basis.squeeze(1).abs() + shift
        floor = torch.finfo(scale.dtype).eps * scale.amax()
        inverse = torch.where(scale > floor, 1 / scale, 1.0)
        return lambda r: inverse * r


@dataclass(frozen=True)
class Nystrom:
    """``M = U Λ Uᵀ + λ`` from a randomised Nyström approximation (Frangella, Tropp & Udell 2023, algorithm 2.1).

    Args:
        rank: products per approximation at first, and columns of ``U``. It doubles where the
            smallest eigenvalue found is still ten times the damping, as one further down would help
            as well (section 5.4.2).
        largest_rank: where that ends; None: at 160, or at ``rank`` if that is more. ``U`` takes as
            much memory as this many copies of the parameters.
        refresh: steps after which it is renewed.

    Raises:
        ValueError: one of them is below 1, or ``largest_rank`` below ``rank``.

    Examples:
        >>> import torch
        >>> from ngd_optim import NaturalCG, Nystrom
        >>> w = torch.nn.Parameter(torch.ones(50))
        >>> optimizer = NaturalCG([w], preconditioner=Nystrom(rank=10))
        >>> loss = optimizer.step(lambda: (torch.arange(50) * w.square()).sum())
        >>> optimizer.last_step.preconditioner
        'nystrom'
    """

    rank: int = 20
    largest_rank: int | None = None
    refresh: int = 10
    name = "nystrom"

    def __post_init__(self) -> None:
        _at_least_one(rank=self.rank, refresh=self.refresh)
        if self.largest_rank is not None and self.largest_rank < self.rank:
            raise ValueError(
                f"largest_rank must be at least rank, got {self.largest_rank} < {self.rank}"
            )

    def draw(
        self,
        product: Product,
        n: int,
        shift: Tensor,
        old: Sketch | None,
        generator: torch.Generator,
    ) -> Sketch:
        """A new approximation, of the old one's rank at least."""
        largest = min(
            max(DEFAULT_LARGEST_RANK, self.rank)
            if self.largest_rank is None
            else self.largest_rank,
            n,
        )
        rank = min(largest, self.rank if old is None else len(old.values))
        basis, images = shift.new_zeros(n, 0), shift.new_zeros(n, 0)
        while True:
            more = torch.randn(
                n,
                rank - basis.shape[1],
                generator=generator,
                device=generator.device,
                dtype=torch.float64,
            ).to(shift)
            # New random directions, orthogonal to those that are known: no product is lost by
            # growing.
            more = torch.linalg.qr(more - basis @ (basis.T @ more)).Q
            images = torch.cat([images, torch.stack([product(column) for column in more.T], 1)], 1)
            basis = torch.cat([basis, more], 1)
            # The host waits, where a sketch is drawn: how wide it becomes depends on these.
            if not images.isfinite().all():
                return Sketch(
                    basis, images.new_full((1,), torch.nan), 0
                )  # the step will be refused
            sketch = _nystrom(basis, images)
            if rank == largest or sketch.values[-1] <= 10 * shift.mean():
                return sketch
            rank = min(2 * rank, largest)

    def solve(self, sketch: Sketch, shift: Tensor) -> Product:
        """``r ↦ M⁻¹ r``, where the eigenvalues that are not known count as the smallest one that is."""
        U, values = sketch.basis, sketch.values
        damping = shift.mean()
        scale, rounding = values + damping, torch.finfo(values.dtype)
        floor = (rounding.eps * scale[0]).clamp(min=rounding.tiny / rounding.eps)
        # M⁻¹ = U (Λ + λ)⁻¹Uᵀ + (λ_r + λ)⁻¹ (I − U Uᵀ), times λ_r + λ (Frangella et al. 2023).
        weights = (scale[-1].clamp(min=floor) / scale.clamp(min=floor)).sqrt() - 1

        def half(r: Tensor) -> Tensor:
            return r + U @ (weights * (U.T @ r))

        # As a square it is positive definite, however U is rounded.
        return lambda r: half(half(r))


def sketch_of_diagonal(diagonal: Tensor) -> Sketch:
    """The sketch that a diagonal makes."""
    return Sketch(diagonal.unsqueeze(1), diagonal.new_zeros(0), 0)


def _nystrom(basis: Tensor, images: Tensor) -> Sketch:
    """Eigenvectors and eigenvalues of ``Y (Ωᵀ Y)⁻¹ Yᵀ`` for ``Y = F Ω``, by a shift that keeps it definite."""
    nu = torch.finfo(images.dtype).eps * images.norm() + torch.finfo(images.dtype).tiny
    shifted = images + nu * basis
    core = basis.T @ shifted
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    inverse_root = vectors * values.clamp(min=nu).rsqrt()
    U, roots, _ = torch.linalg.svd(shifted @ inverse_root, full_matrices=False)
    return Sketch(U, (roots.square() - nu).clamp(min=0), 0)


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if not (isinstance(count, int) and count >= 1):
            raise ValueError(f"{name} must be an integer, at least 1, got {show(count)}")


# A saved optimizer names the one that it was made with; 0.1.0 kept them in another module.
torch.serialization.add_safe_globals(
    [
        Diagonal,
        Nystrom,
        (Diagonal, "ngd_optim.sketches.Diagonal"),
        (Nystrom, "ngd_optim.sketches.Nystrom"),
    ]
)


class Sketched(Preconditioning):
    """From products. The state has each parameter's part of the sketch, and for the first the rest."""

    def __init__(
        self,
        kind: Diagonal | Nystrom,
        parameters: FlatParameters,
        state: MutableMapping[Tensor, dict[str, Any]],
        generator: torch.Generator | None,
    ) -> None:
        self._kind = kind
        self._parameters = parameters
        self._state = state
        own = [state.get(p, {}) for p in parameters.params]
        self._draws = own[0].get("draws", 0)
        self._generator = generator or torch.Generator(device="cpu").manual_seed(self._draws)
        self._sketch = _load_sketch(own, parameters)

    def build(self, point: Point, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        """Drawn anew where what earlier steps left is too old or of another kind."""

        def counted(v: Tensor) -> Tensor:
            self.products += 1
            return model.curvature(v)

        kind, shift, old = self._kind, model.shift, self._sketch
        if (
            old is None
            or len(old.basis) != len(shift)
            or bool(len(old.values)) != isinstance(kind, Nystrom)
        ):
            old = None
        if old is None or old.age >= kind.refresh:
            diagonal = point.compute_cheap_diagonal() if isinstance(kind, Diagonal) else None
            old = (
                kind.draw(counted, len(shift), shift, old, self._generator)
                if diagonal is None
                else sketch_of_diagonal(diagonal)
            )
            self._draws += 1
        self._sketch = old._replace(age=old.age + 1)
        # The host waits once a step: what is not finite would be kept for ever.
        if not all(read(old.basis.isfinite().all(), old.values.isfinite().all())):
            self._sketch = None
            return None  # the step will be refused
        self.name = kind.name
        return kind.solve(old, shift)

    def keep(self, iterations: int) -> None:
        """The sketch, with its age."""
        if self._sketch is None:
            return
        # A parameter may have no part in this one, or be no longer the first.
        forget(self._state, _SKETCH)
        basis, values, age = self._sketch
        tensors = self._parameters.params
        for p, part in zip(tensors, basis.split(self._parameters.sizes), strict=True):
            self._state[p]["sketch"] = part
        self._state[tensors[0]] |= {
            "sketch_values": values,
            "sketch_age": age,
            "draws": self._draws,
        }


def _load_sketch(own: Sequence[Mapping[str, Any]], parameters: FlatParameters) -> Sketch | None:
    """What the state holds of the last sketch; None if there is none, or it was of other parameters."""
    values, age = own[0].get("sketch_values"), own[0].get("sketch_age", -1)
    if values is None or age < 0 or not all("sketch" in entry for entry in own):
        return None
    widths = {entry["sketch"].shape[1] for entry in own}
    if widths != {len(values) or 1}:
        return None
    basis = torch.cat([entry["sketch"] for entry in own]).to(parameters.dtype)
    return Sketch(basis, values.to(basis), age)
