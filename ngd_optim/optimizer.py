"""NaturalCG: the natural-gradient step as a torch optimizer."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ngd_optim.cg import CGResult, conjugate_gradient
from ngd_optim.closure import Closure, Evaluation, ReplayedClosure, rewound_on_error
from ngd_optim.curvature import Curvature
from ngd_optim.damping import damping_factor
from ngd_optim.distributed import Ranks
from ngd_optim.linearize import Linearization, linearize_mean
from ngd_optim.model import QuadraticModel, Step, scaled_step
from ngd_optim.parameters import FlatParameters
from ngd_optim.report import StepReport, report_of
from ngd_optim.settings import check_settings, shared_settings
from ngd_optim.trust_region import MaxKL, Trial, TrustRegion, chosen_max_kl, line_search
from ngd_optim.verify import Experience, signature

Closures = Closure | Sequence[Closure]


class NaturalCG(Optimizer):
    """Natural-gradient, Gauss-Newton and trust-region steps by truncated conjugate gradients.

    Each step solves ``(F + λI) x = −g`` with products only, scales ``x`` to the trust region ``½ xᵀF x ≤ δ`` and
    searches along it (Martens 2010; Schulman et al. 2015).

    Args:
        params: parameters or parameter groups; ``lr``, ``damping`` and ``weight_decay`` may differ per group.
        lr: factor for the scaled step.
        max_kl: trust region δ: bound on the KL, in nats per sample, or on ``½ dᵀF d`` where the loss itself defines the
            metric, in the loss's unit. None: no bound. ``"auto"``: 0.01 where the closure returns a distribution or a
            KL, else None.
        trust_region: ``"clip"`` shrinks a step that leaves the region, ``"boundary"`` always goes to its edge (TRPO),
            ``"damped"`` to that of ``½ dᵀ(F + λI) d ≤ δ`` inside it (TRPO as it is commonly implemented).
        damping: ``λ``.
        adapt_damping: let ``λ`` follow the reduction ratio (Levenberg-Marquardt); the group's value is updated.
        min_damping, max_damping: range of the adapted damping.
        max_cg_iters: most CG iterations per step.
        cg_tol: CG stops at this relative residual.
        cg_progress_tol: CG stops when the model gains less than this fraction per iteration; 0: off.
        warm_start: CG starts from this multiple of the last solution; 0: from zero.
        max_backtracks: most times that the line search shrinks the step; 0: no line search, the scaled step is taken
            unless it is not finite.
        backtrack_ratio: factor of each shrinking.
        weight_decay: adds ``½ weight_decay ‖θ‖²`` to what is minimised.
        curvature: ``"auto"``, ``"fisher"``, ``"ggn"`` or ``"hessian"``; see :func:`~ngd_optim.linearize`.
        process_group: a ``torch.distributed`` process group whose ranks each have a part of the data: losses,
            gradients, products and KLs are then means over the ranks (each counts the same, however large its batch),
            and all ranks take the same step. Every rank calls ``step`` with as many closures. None: the group of the
            DistributedDataParallel module that the closure runs, if it runs one; else no communication.

    Raises:
        ValueError: a setting is out of range, or groups disagree on one that holds for the whole step.
        TypeError: as for any torch optimizer.

    Example:
        >>> model = torch.nn.Linear(64, 10)
        >>> optimizer = NaturalCG(model.parameters())
        >>> def closure():
        ...     return torch.nn.functional.cross_entropy(model(x), y)
        >>> loss = optimizer.step(closure)
    """

    process_group: Any = None
    """The ``torch.distributed`` process group whose ranks take the same steps; no part of ``state_dict``."""

    last_step: StepReport | None = None
    """What the last step did and why; None before the first. It is no part of ``state_dict``."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        max_kl: MaxKL = "auto",
        trust_region: TrustRegion = "clip",
        damping: float = 0.1,
        adapt_damping: bool = True,
        min_damping: float = 1e-8,
        max_damping: float = 1e6,
        max_cg_iters: int = 250,
        cg_tol: float = 1e-6,
        cg_progress_tol: float = 5e-3,
        warm_start: float = 0.9,
        max_backtracks: int = 10,
        backtrack_ratio: float = 0.8,
        weight_decay: float = 0.0,
        curvature: Curvature = "auto",
        process_group: Any = None,
    ) -> None:
        self.process_group = process_group
        defaults = {
            "lr": lr,
            "max_kl": max_kl,
            "trust_region": trust_region,
            "damping": damping,
            "adapt_damping": adapt_damping,
            "min_damping": min_damping,
            "max_damping": max_damping,
            "max_cg_iters": max_cg_iters,
            "cg_tol": cg_tol,
            "cg_progress_tol": cg_progress_tol,
            "warm_start": warm_start,
            "max_backtracks": max_backtracks,
            "backtrack_ratio": backtrack_ratio,
            "weight_decay": weight_decay,
            "curvature": curvature,
        }
        check_settings(defaults)
        super().__init__(params, defaults)
        self._complete()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After a copy, unpickling or ``load_state_dict``, which carry only what torch's optimizers carry."""
        super().__setstate__(state)
        self._complete()

    def _complete(self) -> None:
        if "_gradient_hooks" not in self.__dict__:  # load_state_dict keeps hooks, as torch's optimizers keep theirs
            self._gradient_hooks: OrderedDict[int, Callable[[NaturalCG], None]] = OrderedDict()
        self._experiences: dict[Any, Experience] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may set its own ``lr``, ``damping`` and ``weight_decay``."""
        super().add_param_group(param_group)
        try:
            check_settings(self.param_groups[-1])
            shared_settings(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise

    def register_gradient_hook(self, hook: Callable[["NaturalCG"], None]) -> RemovableHandle:
        """Have ``hook(optimizer)`` called once in every step: at the gradient, before the parameters move.

        It is the place to look at gradients, as between ``backward()`` and ``step()`` of a first-order optimizer: for a
        closure that calls ``backward``, ``.grad`` holds them. Changing them makes ``step`` raise ``RuntimeError``.
        ``handle.remove()`` ends it; it is no part of ``state_dict``.
        """
        hooks = self._gradient_hooks
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Closures, *, curvature_closure: Closures | None = None
    ) -> Tensor:
        """Take one step.

        Args:
            closure: computes the loss, and returns it alone or with a metric. It runs several times, always with the
                same random numbers. A list of closures stands for the mean of their losses and metrics, with the
                memory of one at a time.
            curvature_closure: gives the curvature in place of ``closure``, for example on a part of its data.

        Returns:
            The loss before the step, a detached 0-dim tensor. ``last_step`` tells the rest.

        Raises:
            TypeError, ValueError: there is no closure, or it returned something that is not a loss or a metric.
            RuntimeError: the closure holds something that cannot work, and the message says what to do instead; or
                another rank of the process group raised an exception.
            Exception: whatever the closure raises; the parameters, their ``requires_grad`` and ``.grad``, and torch's
                random numbers are then as before.
        """
        settings = shared_settings(self.param_groups)
        parameters = FlatParameters(self.param_groups)
        runs = [ReplayedClosure(function, parameters.tensors) for function in _closures(closure)]
        others = (
            []
            if curvature_closure is None
            else [ReplayedClosure(function, parameters.tensors) for function in _closures(curvature_closure)]
        )
        with parameters.restored_on_error(), rewound_on_error([*runs, *others]):
            ranks = Ranks(self.process_group, parameters.device, follow_ddp=True)
            point = self._linearize(runs, parameters, settings, ranks)
            ranks.together(lambda: self._call_gradient_hooks(runs[0], point, parameters))
            if others:
                point = point.with_curvature_of(self._linearize(others, parameters, settings, ranks))
            settings["max_kl"] = chosen_max_kl(settings["max_kl"], settings["trust_region"], point.has_kl)
            model = self._quadratic_model(point, parameters)
            solution = self._solve(model, point, parameters, settings)
            step = self._scale(solution, model, parameters, settings)
            ranks.check()
            trial = self._search(step, solution, point, parameters, settings)
        for run in [*runs, *others]:
            run.settle()
        runs[0].leave_gradients(parameters.unflatten(point.gradient), point.reached)
        self.process_group = ranks.group
        n_forward = sum(run.count for run in [*runs, *others])
        self.last_step = report_of(point, model, solution, step, trial, max(self._per_group("damping")), n_forward)
        self._adapt_damping(self.last_step, trial, settings)
        self._remember(solution, parameters)
        return point.loss

    def _linearize(
        self, runs: list[ReplayedClosure], parameters: FlatParameters, settings: dict[str, Any], ranks: Ranks
    ) -> Linearization:
        curvature = settings["curvature"]
        return linearize_mean(runs, parameters, curvature, partial(self._known, curvature), ranks).averaged(ranks)

    def _known(self, curvature: Curvature, run: ReplayedClosure, traced: Evaluation) -> Experience:
        """What earlier steps learnt of a closure with this code and this graph.

        It is not saved, and learnt anew if lost.
        """
        function = run.function
        while isinstance(function, partial):
            function = function.func
        code = getattr(function, "__code__", type(function))
        return self._experiences.setdefault((code, curvature, signature(traced)), Experience())

    def _call_gradient_hooks(self, run: ReplayedClosure, point: Linearization, parameters: FlatParameters) -> None:
        if not self._gradient_hooks:
            return
        before = [p.grad for p in parameters.tensors]
        run.leave_gradients(parameters.unflatten(point.gradient.clone()), point.reached)
        shown = [p.grad for p in parameters.tensors]
        values = parameters.flatten(shown)
        for hook in list(self._gradient_hooks.values()):
            hook(self)
        same = all(p.grad is gradient for p, gradient in zip(parameters.tensors, shown, strict=True))
        if not same or not torch.allclose(values, parameters.flatten(shown), rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(
                "a hook changed the gradients, which NaturalCG does not use again; to limit the step set max_kl, the "
                "trust region, in place of gradient clipping"
            )
        for p, gradient in zip(parameters.tensors, before, strict=True):
            p.grad = gradient

    def _per_group(self, name: str) -> list[float]:
        return [float(group[name]) for group in self.param_groups]

    def _quadratic_model(self, point: Linearization, parameters: FlatParameters) -> QuadraticModel:
        decay = parameters.spread(self._per_group("weight_decay"), point.used)
        damping = parameters.spread(self._per_group("damping"))
        gradient = point.gradient + decay * parameters.theta if any(self._per_group("weight_decay")) else point.gradient
        return QuadraticModel(gradient, point.curvature, decay, damping)

    def _solve(
        self, model: QuadraticModel, point: Linearization, parameters: FlatParameters, settings: dict[str, Any]
    ) -> CGResult:
        """Conjugate gradients, from a part of the last solution."""
        last = [
            self.state[p].get("solution") if u else None for p, u in zip(parameters.tensors, point.used, strict=True)
        ]
        return conjugate_gradient(
            model.system,
            -model.gradient,
            x0=parameters.flatten(last).mul_(settings["warm_start"]),
            max_iters=settings["max_cg_iters"],
            tol=settings["cg_tol"],
            progress_tol=settings["cg_progress_tol"],
            boundary=None if settings["max_kl"] is None else 2 * settings["max_kl"],
        )

    def _scale(
        self, solution: CGResult, model: QuadraticModel, parameters: FlatParameters, settings: dict[str, Any]
    ) -> Step:
        """The solution, cut to the trust region and multiplied by ``lr``."""
        lr = parameters.spread(self._per_group("lr"))
        return scaled_step(model, solution, parameters.theta, lr, settings["max_kl"], settings["trust_region"])

    def _search(
        self,
        step: Step,
        solution: CGResult,
        point: Linearization,
        parameters: FlatParameters,
        settings: dict[str, Any],
    ) -> Trial:
        """Move the parameters along the step as far as the objective and the KL allow, or not at all."""
        if solution.stop == "not_finite":
            return Trial.refused("the gradient or a curvature product is not finite")

        def evaluate(fraction: float) -> tuple[float, float | None]:
            parameters.move(step.direction, fraction)
            loss, kl = point.measure()
            return loss + step.decay_change(fraction), kl

        trial = line_search(
            evaluate,
            point.loss.item(),
            step.slope,
            max_kl=settings["max_kl"],
            max_backtracks=settings["max_backtracks"],
            backtrack_ratio=settings["backtrack_ratio"],
        )
        if not trial.accepted:
            parameters.restore()
            promised = step.predicted_decrease(1.0)
            if trial.backtracks and abs(promised) <= point.rounding:
                reason = f"rejected: the decrease that the model promises, {promised:.2g}, is below the loss's rounding"
                return replace(trial, overshot=False, reason=reason)
        return trial

    def _adapt_damping(self, report: StepReport, trial: Trial, settings: dict[str, Any]) -> None:
        if settings["adapt_damping"]:
            factor = damping_factor(report.reduction_ratio, accepted=report.accepted, overshot=trial.overshot)
            for group in self.param_groups:
                damping = float(group["damping"]) * factor
                group["damping"] = min(max(damping, settings["min_damping"]), settings["max_damping"])

    def _remember(self, solution: CGResult, parameters: FlatParameters) -> None:
        """Keep the solution for the next step's start."""
        for p, x in zip(parameters.tensors, parameters.unflatten(solution.solution), strict=True):
            self.state[p]["solution"] = x


def _closures(closure: Any) -> list[Closure]:
    closures = list(closure) if isinstance(closure, list | tuple) else [closure]
    if not closures:
        raise ValueError("step() needs at least one closure, got an empty list")
    for function in closures:
        if not callable(function):
            raise TypeError(f"step() needs a closure that computes the loss, or a list of them, got {function!r}")
    return closures
