"""NaturalCG: the natural-gradient step as a torch optimizer."""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ngd_optim.advice import Advice
from ngd_optim.convergence import Progress
from ngd_optim.distributed import ParametersInParts, Ranks, ShardedModules
from ngd_optim.gradient_hooks import GradientHooks
from ngd_optim.history import Followed
from ngd_optim.kernels import twice_differentiable
from ngd_optim.linearization import Learnt, Linearization, Point, linearize_mean
from ngd_optim.names import (
    BackendChoice,
    Curvature,
    DampingLimit,
    DampingScale,
    MaxKL,
    SolverName,
    TrustRegion,
)
from ngd_optim.parameters import FlatParameters
from ngd_optim.preconditioners import Preconditioner, build_preconditioner
from ngd_optim.report import StepReport, build_report
from ngd_optim.settings import (
    COMMON_SETTINGS,
    SETTINGS,
    Settings,
    add_missing,
    check_initial,
    check_owner,
    check_settings,
    to_plain_numbers,
)
from ngd_optim.solvers import (
    ConjugateGradients,
    QuadraticModel,
    Solver,
    build_solver,
    curvature_diagonal,
)
from ngd_optim.start import Start, begin, divide
from ngd_optim.state import check_state, complete_state
from ngd_optim.step import Damping, Descent, choose_max_kl
from ngd_optim.tangent import Tangent
from ngd_optim.transaction import all_or_nothing

Closures = Callable[[], Any] | Sequence[Callable[[], Any]]

_USUAL_DAMPING = 1e6
"""What ``max_damping="auto"`` stands for with conjugate gradients, unless the damping is larger at the start."""


class NaturalCG(Followed):
    """Natural-gradient, Gauss-Newton and trust-region steps by truncated conjugate gradients.

    Each step solves ``(F + λI) x = −g``, by products with ``F`` unless it is a small least-squares
    problem, scales ``x`` to the trust region ``½ xᵀF x ≤ δ`` and searches along it (Martens 2010;
    Schulman et al. 2015).

    Args:
        params: parameters or parameter groups; ``lr``, ``damping`` and ``weight_decay`` may differ
            per group.
        lr: factor for the scaled step.
        max_kl: trust region δ: bound on the KL, in nats per sample, or on ``½ dᵀF d`` where the
            loss itself defines the metric, in the loss's unit. None: no bound. ``"auto"``: 0.01
            where the closure returns a distribution or a KL, else None.
        trust_region: ``"clip"`` shrinks a step that leaves the region, ``"boundary"`` always goes
            to its edge (TRPO), ``"damped"`` to that of ``½ dᵀ(F + λI) d ≤ δ`` inside it (TRPO as it
            is commonly implemented).
        damping: ``λ`` at the first step. It has the loss's units: scale the loss by 1000, or sum
            over 1000 samples in place of a mean, and scale ``λ`` by 1000.
        adapt_damping: let ``λ`` follow the reduction ratio (Levenberg-Marquardt); the group's value
            is updated.
        min_damping: least adapted damping. ``"auto"``: 1e-8 for conjugate gradients, 1e-30 for
            direct solvers; less if 1e-7 times ``damping``, or a hundredth of the curvature along the
            step, ``dᵀF d / ‖d‖²``, is less.
        max_damping: largest adapted damping. ``"auto"``: 1e6 for conjugate gradients, 1e16 for
            direct solvers, or 1e7 times ``damping`` if that is more.
        max_cg_iters: most CG iterations per step.
        cg_tol: CG stops at this relative residual.
        cg_progress_tol: CG stops when the model gains less per iteration than this fraction of its
            average gain so far; 0: off. See :func:`~ngd_optim.conjugate_gradient`.
        warm_start: CG starts from the last solution, at most this multiple of it; 0: from zero.
        preconditioner: what CG is preconditioned by, which changes how many iterations it needs and
            never what it solves. ``"kfac"``: Kronecker factors of the curvature (Martens & Grosse
            2015), for all weights that the closure uses in matrix products and convolutions, and a
            diagonal for the rest. ``"auto"``: that, where it stands for half of the parameters at
            least and costs little beside the products; else none. None: nothing.
            :class:`~ngd_optim.Nystrom` and :class:`~ngd_optim.Diagonal`, or ``"diagonal"``: without
            layers. Or a function ``r ↦ M⁻¹ r`` of flat vectors, in the order of the parameters.
        max_backtracks: most times that the line search shrinks the step; 0: no line search, the
            scaled step is taken unless it is not finite.
        backtrack_ratio: factor of each shrinking.
        weight_decay: adds ``½ weight_decay ‖θ‖²`` to what is minimised.
        curvature: ``"auto"``, ``"fisher"``, ``"ggn"`` or ``"hessian"``; see
            :func:`~ngd_optim.linearize`.
        backend: what forms the products: ``"double-backward"``, the derivative of a gradient
            through the graph that is there; ``"torch.func"``, forward mode through what was
            recorded of the closure; ``"differences"`` of outputs or gradients, less exact.
            ``"auto"``: the first that is right; forward mode first if hooks look at gradients or
            the closure has convolutions.
        solver: how the system is solved: ``"cg"``; ``"dense"``, exactly, for few parameters;
            ``"sample"``, exactly, in the space of the model's outputs, for fewer outputs than
            parameters. ``"auto"``: one of the direct solvers where the loss is
            :func:`~ngd_optim.least_squares` and the problem small enough for it, else ``"cg"``.
            With a direct solver and ``adapt_damping``, a step that does not lower the loss is
            solved again with more damping, at the same Jacobian, in place of a line search.
        damping_scale: what the damping is relative to. ``"identity"``: nothing, ``λI`` is added.
            ``"diagonal"``: the largest diagonal of ``F`` so far, ``λ diag(F)`` is added (Marquardt
            1963; Moré 1978), which makes the step independent of the parameters' units. What all
            diagonals have lost is forgotten; where a step has other data than the last one, what
            was before counts 0.7 times. ``"auto"``:
            ``"diagonal"`` for direct solvers, else ``"identity"``.
        momentum: ``μ``: the damping pulls to ``μ`` times the last solution in place of zero
            (SPRING: Goldshlager, Abrahamsen & Lin 2024), unless that was rejected; a system that is
            solved again has none. It is not what ``OneCycleLR`` and ``CyclicLR`` cycle: they ask for
            ``cycle_momentum=False``.
        geodesic: bend the steps of direct solvers for :func:`~ngd_optim.least_squares` by the
            residuals' second derivative along them (geodesic acceleration: Transtrum & Sethna
            2012), at one more run of the closure. Where they bend too much, the system is solved
            again with more damping.
        xtol: a step has ``converged`` if it is at most ``xtol (xtol + ‖θ‖)`` long. These three are
            as in ``scipy.optimize.least_squares``; they change no step, only what
            :attr:`converged` and ``last_step`` say of it.
        ftol: also if the loss falls by at most ``ftol`` times the loss, or by no more than its
            rounding, and as promised (a reduction ratio above 1/4).
        gtol: also if ``‖g‖∞ ≤ gtol``, in the unit of the loss ÷ that of the parameters.
        cuda_graphs: replay curvature products by CUDA graphs: one launch for each. They hold what a
            product reads and computes from step to step. Where that cannot be, the log says why, and
            products are as without. It has not been run on a GPU yet.
        shard_state: with several processes, let each keep an equal part of the optimizer's state and
            of the vectors of a step, and let one of them invert each Kronecker factor (ZeRO, stage 1:
            Rajbhandari et al. 2020), at no more traffic. The state then has ``DTensor``s: save it by
            ``torch.distributed.checkpoint``. Models of ``fully_shard`` have most of it in parts anyway.
        generator: draws the random vectors from which preconditioners are estimated. None: one of
            the optimizer's own, so that the same steps give the same numbers; torch's global one is
            left alone.
        process_group: a ``torch.distributed`` process group whose ranks each have a part of the
            data. Losses, gradients, products and KLs are then means over the ranks, each of which
            counts the same, however large its batch; all ranks take the same step. Every rank calls
            ``step`` with as many closures. None: that of the mesh over which ``fully_shard`` has
            spread the parameters, or of the DistributedDataParallel module that the closure runs;
            if there is neither, no communication.

    Raises:
        ValueError: a setting is out of range, or groups disagree on one that holds for the whole
            step.
        TypeError: as for any torch optimizer.

    Examples:
        >>> import torch
        >>> from ngd_optim import NaturalCG
        >>> x, y = torch.randn(100, 64), torch.randint(0, 10, (100,))
        >>> model = torch.nn.Linear(64, 10)
        >>> optimizer = NaturalCG(model.parameters())
        >>> def closure():
        ...     return torch.nn.functional.cross_entropy(model(x), y)
        >>> loss = optimizer.step(closure)
        >>> optimizer.last_step.new_loss < loss
        tensor(True)
    """

    process_group: Any
    """The ``torch.distributed`` process group whose ranks take the same steps; no part of ``state_dict``."""

    generator: torch.Generator | None
    """Draws the random vectors of a preconditioner; no part of ``state_dict``."""

    last_step: StepReport | None
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
        min_damping: DampingLimit = "auto",
        max_damping: DampingLimit = "auto",
        max_cg_iters: int = 250,
        cg_tol: float = 1e-6,
        cg_progress_tol: float = 0.5,
        warm_start: float = 0.9,
        preconditioner: Preconditioner = "auto",
        max_backtracks: int = 10,
        backtrack_ratio: float = 0.8,
        weight_decay: float = 0.0,
        curvature: Curvature = "auto",
        backend: BackendChoice = "auto",
        solver: SolverName = "auto",
        damping_scale: DampingScale = "auto",
        momentum: float = 0.0,
        geodesic: bool = True,
        xtol: float = 1e-8,
        ftol: float = 1e-8,
        gtol: float = 0.0,
        cuda_graphs: bool = False,
        shard_state: bool = False,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in SETTINGS}
        check_settings(defaults)
        super().__init__(params, defaults, generator, process_group)
        self._complete()
        if max_damping == "auto" and damping > _USUAL_DAMPING:
            warnings.warn(
                f"damping={damping:g} is above the {_USUAL_DAMPING:g} that max_damping='auto' stands "
                "for: it is kept, and the limit moves with it; if that is the loss's scale, divide "
                "the loss by it, or set max_damping to choose the limit",
                stacklevel=2,
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After a copy, unpickling or ``load_state_dict``."""
        for group in state["param_groups"]:
            check_owner(group)
            add_missing(group, _DEFAULTS)
            check_settings(group)
            # Older versions took this from the optimizer that loads.
            at_start = state.get("defaults", self.__dict__.get("defaults", _DEFAULTS))["damping"]
            add_missing(group, {"initial_damping": at_start})
            check_initial(group)
        check_state(state["state"], [p for g in state["param_groups"] for p in g["params"]])
        super().__setstate__(state)
        self._complete()

    def _complete(self) -> None:
        self.begin_history()
        # Schedulers take an optimizer whose defaults have a momentum for one of heavy balls, and cycle it.
        self.defaults.pop("momentum", None)
        # No attributes of the class: wrappers of Lightning and Fabric are subclasses, which look for
        # what they lack in the optimizer.
        for name in ("last_step", "process_group", "generator"):
            self.__dict__.setdefault(name, None)
        # load_state_dict keeps hooks, as torch's optimizers keep theirs.
        if "_gradient_hooks" not in self.__dict__:
            self._gradient_hooks = GradientHooks()
        self._advice = Advice()
        self._progress = Progress()
        self._experiences: Learnt = {}
        self._transaction: Any = None
        self._has_met = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may set its own ``lr``, ``damping`` and ``weight_decay``."""
        # Else it is one of those that the optimizer is made with.
        if "momentum" not in self.defaults:
            first = self.param_groups[0]
            add_missing(param_group, {name: first[name] for name in COMMON_SETTINGS})
        # The limits of the damping are around it, as it is in the first group.
        add_missing(param_group, {"initial_damping": float(self.defaults["damping"])})
        self._add_if(self._check_group, param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        to_plain_numbers(group)
        check_settings(group)
        Settings.of(self.param_groups)

    def register_gradient_hook(self, hook: Callable[["NaturalCG"], None]) -> RemovableHandle:
        """Have ``hook(optimizer)`` called once in every step: at the gradient, before the parameters move.

        It is the place to look at gradients, as between ``backward()`` and ``step()`` of a
        first-order optimizer: for a closure that calls ``backward``, ``.grad`` holds them. Changing
        them makes ``step`` raise ``RuntimeError``. ``handle.remove()`` ends it; it is no part of
        ``state_dict``.
        """
        return self._gradient_hooks.register(hook)

    def linearize(self, closure: Callable[[], Any]) -> Linearization:
        """A closure at the present parameters, as :func:`~ngd_optim.linearize` finds it, for steps of your own.

        It has this optimizer's ``curvature`` and ``backend``, and checks the closure's derivatives
        only the first time, as ``step`` does. It knows this process alone.

        Raises:
            Exception: as for :func:`~ngd_optim.linearize`.
        """
        settings = Settings.of(self.param_groups)
        return Linearization.of(
            closure,
            FlatParameters(self.param_groups),
            settings.curvature,
            settings.backend,
            self._experiences,
        )

    @all_or_nothing(
        attributes=("process_group", "_has_met", "_advice", "_progress"), setting="damping"
    )
    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Closures | None = None, *, curvature_closure: Closures | None = None
    ) -> Tensor:
        """Take one step.

        Args:
            closure: computes the loss, and returns it alone or with a metric. It runs once; see
                *Get started* for when it runs again. A list of closures stands for the mean of their
                losses and metrics, with the memory of one at a time.
            curvature_closure: gives the curvature in place of ``closure``, for example on a part of
                its data.

        Returns:
            The loss before the step, a detached 0-dim tensor. ``last_step`` tells the rest.

        Raises:
            TypeError, ValueError: there is no closure, it returned something that is not a loss or
                a metric, or its loss depends on none of the parameters.
            RuntimeError: the closure holds something that cannot work, and the message says what to
                do instead; or another rank of the process group raised an exception.
            Exception: whatever the closure raises; the parameters, their ``requires_grad`` and
                ``.grad``, and torch's random numbers are then as before.
        """
        if closure is None and curvature_closure is None and self._stands_still():
            # torch.distributed.checkpoint has optimizers make their state in this way.
            self._complete_state()
            return torch.zeros((), device=self._device)
        modules = ShardedModules(self._everything, self.process_group)
        with Ranks(
            modules.group or self._find_group(),
            self._device,
            follow_ddp=True,
            parameters=self._everything,
        ) as ranks:
            return self._step(closure, curvature_closure, ranks, modules)

    def _complete_state(self) -> None:
        parameters, settings = FlatParameters(self.param_groups), Settings.of(self.param_groups)
        modules = ShardedModules(self._everything, self.process_group)
        ranks = Ranks(modules.group or self._find_group(), parameters.device, follow_ddp=False)
        own = divide(parameters, settings, modules, ranks)
        complete_state(self.state, parameters, settings, getattr(own, "mesh", None))

    def _find_group(self) -> Any:
        """The process group as far as it is known before the closure runs; to shard the state it must be."""
        if self.process_group is None and any(g["shard_state"] for g in self.param_groups):
            return Ranks.group_of(self._everything)
        return self.process_group

    def _step(
        self,
        closure: Closures | None,
        curvature_closure: Closures | None,
        ranks: Ranks,
        modules: ShardedModules,
    ) -> Tensor:
        start = begin(
            closure,
            curvature_closure,
            ranks,
            modules,
            groups=self.param_groups,
            state=self.state,
            whole_state=not self._has_met,
            generator=self.generator,
            transaction=self._transaction,
        )
        settings, own, last = start.settings, start.own, start.last
        with twice_differentiable():
            # 1. What is known here: loss, gradient, curvature product (Amari 1998; Schraudolph 2002).
            start.compare_values()
            preconditioning = build_preconditioner(
                settings.preconditioner, start.parameters, self.state, self.generator, ranks
            )
            point = self._linearize(start, preconditioning)
            # If the closure has put them elsewhere, that is where they are.
            theta = own.read() if point.writes_parameters else ranks.own(start.theta)

            # 2. The quadratic model m(d) = gᵀd + ½ dᵀ(F + W)d, and what solves for its minimum.
            # W: the weight decay, where the closure uses a parameter at all.
            decay = own.spread(settings.weight_decay, point.used)
            gradient = point.model_gradient
            if any(settings.weight_decay):
                gradient = gradient + decay * theta
            new_slope = last.slope_on_new_data(point, gradient)
            is_new = not math.isnan(new_slope)
            max_kl = choose_max_kl(settings.max_kl, settings.trust_region, point.has_kl)
            solver = _choose_solver(start, point, preconditioning, max_kl)
            curvature: Callable[[Tensor], Tensor] = point.product
            if point.writes_parameters and not solver.is_direct and ranks.group is None:
                point.product.form(gradient)  # before the parameters are moved
                tangent = Tangent(point, start.parameters, theta, gradient)
                gradient, curvature = tangent(gradient), tangent.project(curvature)
            model = QuadraticModel(
                gradient,
                curvature,
                decay,
                scale=_damping_scale(start, solver, point, is_new=is_new),
                centre=last.momentum(point.used, settings.momentum),
            )

            # 3. The damping λ, which follows what this step's data say of the last step (Levenberg 1944).
            # Above a third, the last step fitted the noise of its own batch: λ grows.
            damping = Damping(
                self.param_groups,
                adapts=settings.adapt_damping,
                lowest=settings.min_damping,
                highest=settings.max_damping,
                exact=solver.is_direct,
                at_start=self.param_groups[0]["initial_damping"],
            )
            if not point.is_least_squares:  # its residuals may all vanish: noise is no matter
                damping.adapt_to_new_data(new_slope)

            # 4. Down: solve (F + W + λI) x = −g, cut x to ½ xᵀF x ≤ δ, search along it (Schulman et al. 2015,
            #    appendix C), or solve again with more damping where that is cheap (Marquardt 1963).
            descent = Descent(
                point,
                own,
                theta,
                solver,
                damping,
                settings.lr,
                max_kl,
                trust_region=settings.trust_region,
                max_backtracks=settings.max_backtracks,
                backtrack_ratio=settings.backtrack_ratio,
                geodesic=settings.geodesic,
                is_first=not last.exists,
                on_new_data=is_new,
            )
            outcome = descent(model, check=ranks.check)

        # 5. What the next step needs, and the report.
        # Side effects of one run: the closures' own, of the first time that they ran.
        for run in start.runs:
            run.settle()
        start.closures[0].leave_gradients(own.lay_out(point.gradient), point.reached)
        self.process_group = ranks.group
        report = build_report(
            point,
            outcome,
            settings,
            theta,
            max_kl=max_kl,
            new_slope=new_slope,
            initial_damping=self.param_groups[0]["initial_damping"],
            solver=solver.name,
            preconditioner=preconditioning.name,
            n_forward=sum(run.count for run in start.runs),
            n_product=outcome.solution.products + outcome.step.products + preconditioning.products,
        )
        self.last_step = report
        self._advice = self._advice.after(report, outcome, point)
        self._progress = self._progress.after(report.new_loss, is_new_data=is_new)
        if point.is_finite and outcome.solution.not_finite == "product":
            self._experiences.clear()  # another way to form products may do
        if outcome.trial.forgets:
            return point.loss  # the next step goes on as if these data had not been there
        damping.lower_floor(outcome.curvature(report.step_norm))
        damping.adapt(
            report.reduction_ratio, accepted=report.accepted, overshot=outcome.trial.overshot
        )
        last.keep(outcome, report.new_loss, settings.lr)
        if point.bend is not None:
            last.adapt_smoothing(
                outcome.step.predicted_decrease(1.0),
                point.hidden_by_rounding,
                report.reduction_ratio,
                accepted=report.accepted,
            )
        preconditioning.keep(report.cg_iters)
        complete_state(self.state, start.parameters, settings, getattr(own, "mesh", None))
        self._has_met = True
        return point.loss

    def _linearize(self, start: Start, preconditioning: Any) -> Point:
        """The closures at the parameters, and the curvature closures in place of their curvature."""
        linearize = partial(
            linearize_mean,
            start.parameters,
            start.settings.curvature,
            start.settings.backend,
            self._experiences,
            start.ranks,
            smoothing=start.last.smoothing,
            captures=start.settings.cuda_graphs,
        )
        # One closure's graph is at hand until products are formed: its metric is shown when it is known
        # that there will be a preconditioner.
        shows = not (start.others or start.is_alone)
        point = linearize(start.closures, preconditioning.observe if shows else None)
        self._show_gradients(start, point)
        if start.others:
            other = linearize(start.others, preconditioning.observe)
            _require(other.used, "the curvature closure")
            point = point.with_curvature_of(other)
        _require(point.reached, "the loss")
        return point

    @property
    def converged(self) -> bool:
        """Whether the last step met a tolerance (``xtol``, ``ftol``, ``gtol``).

        False before the first step, and before the first one after ``load_state_dict``. Parameters that
        are set by hand are not noticed: give each fit an optimizer of its own.

        Raises:
            RuntimeError: for many steps on the same data the loss has not become lower, as where it is NaN or
                ``lr=0``: ``while not optimizer.converged`` would never end.
        """
        if self.last_step is None:
            return False
        if self._has_met and self.last_step.converged:
            return True
        self._progress.check(self.last_step.reason)
        return False

    def _show_gradients(self, start: Start, point: Point) -> None:
        """To the hooks, which some ranks alone may have."""
        own, parameters = start.own, start.parameters
        is_shown = bool(self._gradient_hooks)
        if isinstance(own, ParametersInParts) and own.gathers:
            (is_shown,) = start.ranks.any([is_shown])
        flat = point.gradient.clone() if is_shown else point.gradient
        gradients = own.lay_out(flat) if is_shown else []

        def show() -> None:
            if self._gradient_hooks:
                whole = flat if own is parameters else None
                run = start.closures[0]
                self._gradient_hooks(self, run, point.reached, parameters, gradients, whole)

        start.ranks.together(show)

    @property
    def _device(self) -> torch.device:
        return self._everything[0].device

    def _stands_still(self) -> bool:
        """Whether every learning rate and every gradient is zero."""
        return all(float(group["lr"]) == 0 for group in self.param_groups) and not any(
            p.grad is not None and p.grad.any() for p in self._everything
        )


_DEFAULTS = {name: inspect.signature(NaturalCG).parameters[name].default for name in SETTINGS}


def _choose_solver(
    start: Start, point: Point, preconditioning: Any, max_kl: float | None
) -> Solver:
    settings = start.settings
    # CG ends on the trust region's edge, xᵀF x = 2δ, if the curvature is negative (Steihaug
    # 1983). Only a Hessian's is so by more than rounding.
    unbounded = math.inf if point.kind == "hessian" else None
    conjugate_gradients = ConjugateGradients(
        x0=start.last.solution(point.used).mul_(settings.warm_start),
        max_iters=settings.max_cg_iters,
        tol=settings.cg_tol,
        progress_tol=settings.cg_progress_tol,
        boundary=unbounded if max_kl is None else 2 * max_kl,
        form=point.product.form,
        precondition=lambda model: preconditioning.precondition(point, model, start.ranks),
        reject=preconditioning.reject,
    )
    solver = build_solver(settings.solver, point, conjugate_gradients)
    if start.is_alone and not solver.is_direct:
        with torch.enable_grad():
            start.ranks.together(lambda: preconditioning.observe(point.graph.get()[1]))
    return solver


def _damping_scale(start: Start, solver: Solver, point: Point, *, is_new: bool) -> Tensor | None:
    """The largest diagonal of the curvature so far, flat, 1 where it is zero; None for the identity."""
    setting = start.settings.damping_scale
    if setting == "identity" or (setting == "auto" and not solver.is_direct):
        return None
    if not point.is_finite:
        return None  # the step will be refused
    largest = start.last.largest_curvature(curvature_diagonal(solver, point), forgets=is_new)
    return torch.where(largest > 0, largest, 1.0)


def _require(flags: Sequence[bool], what: str) -> None:
    if not any(flags):
        raise ValueError(
            f"{what} depends on none of the optimizer's parameters; was the model copied or built "
            "anew after the optimizer was made?"
        )
