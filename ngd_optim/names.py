"""The words that settings and reports may hold."""

from typing import Literal

Kind = Literal["fisher", "ggn", "hessian"]
"""What ``F`` is."""

Curvature = Literal["auto", Kind]
"""What ``F`` is asked to be."""

Backend = Literal["torch.func", "double-backward", "differences"]
"""What forms the products ``F v``: forward mode, the derivative of a gradient, or differences."""

BackendChoice = Literal["auto", Backend]

SolverName = Literal["auto", "cg", "dense", "sample"]
DampingScale = Literal["auto", "identity", "diagonal"]
DampingLimit = float | Literal["auto"]
TrustRegion = Literal["clip", "boundary", "damped"]
MaxKL = float | None | Literal["auto"]
PreconditionerName = Literal["auto", "kfac", "diagonal"]
