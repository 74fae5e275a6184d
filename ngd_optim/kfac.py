"""KFAC: a natural-gradient step of little more than one gradient, for streams of small batches."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from ngd_optim.common import Beginning
from ngd_optim.distributed import ParametersInParts, Ranks, ShardedModules
from ngd_optim.history import Followed
from ngd_optim.kernels import without_autocast
from ngd_optim.kronecker import KeptFactors, KroneckerFactors
from ngd_optim.layout import local_part
from ngd_optim.parameters import FlatParameters
from ngd_optim.reading import read
from ngd_optim.report import KFACReport
from ngd_optim.settings import KFACSettings, add_missing, to_plain_numbers
from ngd_optim.shown import show
from ngd_optim.stream import (
    NAMES,
    StreamState,
    check_stream_state,
    complete_stream_state,
    differentiate,
)
from ngd_optim.tracing import list_closures
from ngd_optim.transaction import all_or_nothing
from ngd_optim.watch import FactorWatch, WatchedModule

logger = logging.getLogger("ngd_optim")

_AT_START = (1, 2, 3, 4, 6, 8, 14)
"""After so many steps factors are renewed as well: the curvature grows fast then."""

_OLD = 3
"""Factors that have served so many times as many steps as they were to are told of."""

_RATE, _UPHILL = 0.2, 0.25
"""How fast the radius follows, and at which slope on new data, uphill, it stays as it is while ``lr`` is 1."""


class KFAC(Followed):
    """Momentum, preconditioned by Kronecker factors, in steps of a length that the factors measure.

    For endless streams of small batches: a step costs little more than a gradient. Every few steps
    the Kronecker factors of the layers (Martens & Grosse 2015) are renewed by one more pull-back, of
    a random draw, through the graph that the loss is differentiated in. The step is scaled to where
    their model of the KL, ``½ dᵀ(F + λI)d``, is the radius; and the radius follows what the next batch
    thinks of it.

    Args:
        params: parameters or parameter groups; ``lr`` and ``weight_decay`` may differ per group.
        lr: factor for the scaled step; for schedulers.
        momentum: of the gradients, in Nesterov's form.
        damping: ``λ`` relative to the mean eigenvalue of each layer's curvature.
        radius: ``δ`` at the first step: ``½ dᵀ(F + λI)d``, in the loss's unit. The group's value is updated.
        adapt_radius: let it follow the slope along the last step, as the next batch sees it.
        renew_every: steps with the same factors.
        factor_decay: share of the older factors in renewed ones.
        weight_decay: each step shrinks parameters by ``lr`` times this (decoupled: Loshchilov &
            Hutter 2019).
        shard_state: with several processes, let each keep an equal part of the optimizer's state and
            of its vectors, and let one of them invert each Kronecker factor (ZeRO, stage 1:
            Rajbhandari et al. 2020). The state then has ``DTensor``s: save it by
            ``torch.distributed.checkpoint``. With ``fully_shard`` that is so anyway.
        generator: draws the random vectors. None: one of the optimizer's own.
        process_group: a ``torch.distributed`` process group over whose ranks gradients and factors
            are averaged. None: the factors are, over the group of the DistributedDataParallel module
            that the closure runs, if it runs one; that averages the gradients itself.

    Raises:
        ValueError: a setting is out of range, or groups disagree on one that holds for the whole
            step.

    Examples:
        >>> import torch
        >>> from ngd_optim import KFAC
        >>> x, y = torch.randn(100, 64), torch.randint(0, 10, (100,))
        >>> model = torch.nn.Linear(64, 10)
        >>> optimizer = KFAC(model.parameters())
        >>> for _ in range(3):
        ...     with optimizer.watch():
        ...         loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> optimizer.last_step.accepted
        True
    """

    process_group: Any = None
    """The ``torch.distributed`` process group whose ranks take the same steps; no part of ``state_dict``."""

    generator: torch.Generator | None = None
    """Draws the random vectors; no part of ``state_dict``."""

    last_step: KFACReport | None = None
    """What the last step did and why; None before the first. It is no part of ``state_dict``."""

    _step_supports_amp_scaling = True  # so that a GradScaler comes here, and is refused

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        momentum: float = 0.95,
        damping: float = 0.003,
        radius: float = 3e-4,
        adapt_radius: bool = True,
        renew_every: int = 10,
        factor_decay: float = 0.85,
        weight_decay: float = 0.0,
        shard_state: bool = False,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in KFACSettings.allowed()}
        KFACSettings.check_each(defaults)
        super().__init__(params, defaults, generator, process_group)
        self._complete()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After a copy, unpickling or ``load_state_dict``, which carry only what torch's optimizers carry."""
        for group in state["param_groups"]:
            add_missing(group, {"shard_state": False})  # newer than the first saved ones
            KFACSettings.require_names(group, "KFAC")
            KFACSettings.check_each(group)
        check_stream_state(state["state"])
        super().__setstate__(state)
        self._complete()

    def _complete(self) -> None:
        self.begin_history()
        if "_watch" not in self.__dict__:
            self._watch = FactorWatch()
            self._ranks: Ranks | None = None
            self._drawing: torch.Generator | None = None
            self._known: Any = None
            self._group: Any = None
            self._has_told_of_age = False
        self._inverse: tuple[Any, Any] | None = None
        self._transaction: Any = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may set its own ``lr`` and ``weight_decay``."""
        if self.param_groups:  # which schedulers, and the radius's own steps, may have changed
            first = self.param_groups[0]
            names = [name for name, one in KFACSettings.allowed().items() if not one.per_group]
            add_missing(param_group, {name: first[name] for name in names})
        self._add_if(self._check_group, param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        to_plain_numbers(group, tuple(KFACSettings.allowed()))
        KFACSettings.check_each(group)
        KFACSettings.of(self.param_groups)

    @overload
    def watch(self) -> AbstractContextManager[None]: ...
    @overload
    def watch(self, module: nn.Module) -> WatchedModule: ...
    def watch(self, module: nn.Module | None = None) -> Any:
        """Watch where the loss is computed, for ``step()`` without a closure.

        ``with optimizer.watch(): loss = …`` sees the loss functions of the block; their gradients may
        be computed later. ``optimizer.watch(module)`` does so whenever that module runs: one in whose
        ``forward`` the loss is computed, as models of transformers do with labels, or a criterion.
        Both do nothing unless factors are due.

        Args:
            module: to be watched from now on.

        Returns:
            A context; or for a module a handle, whose ``remove()`` ends it. It is no part of
            ``state_dict``, and copies of the module are not watched.
        """
        if module is None:
            return self._watching()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"watch() takes a module whose forward computes the loss, got {show(module)}"
            )
        return WatchedModule(module, partial(self._watching, module))

    def _settings(self) -> KFACSettings:
        """Those of this step; a group's may have been changed, and are checked again."""
        for group in self.param_groups:
            KFACSettings.check_each(group)
        return KFACSettings.of(self.param_groups)

    def _parameters(self) -> tuple[FlatParameters, ShardedModules]:
        """Those of this step, and what ``fully_shard`` has made of their modules, which computes with other tensors."""
        params = [p for group in self.param_groups for p in group["params"]]
        modules = ShardedModules(params, self.process_group)
        if not all(map(modules.has_whole, params)):
            raise ValueError(
                "KFAC needs weights that are whole in a layer, and these lie over ranks (tensor parallel); "
                "use fully_shard alone, or NaturalCG"
            )
        return FlatParameters(self.param_groups, modules.weight if modules else None), modules

    def _is_due(self, state: StreamState, settings: KFACSettings) -> bool:
        is_known = self._inverse is not None and self._inverse[0][0] == state.parameters.key
        return state.is_due(settings.renew_every, _AT_START, is_known=is_known)

    def _find_group(self, modules: ShardedModules) -> Any:
        """The process group as far as it is known before the closure runs; to shard the state it must be."""
        group = modules.group or self.process_group or self._group
        if group is None and self.param_groups[0]["shard_state"]:
            group = self._group = Ranks.group_of(self._everything)
        return group

    def _own(
        self, parameters: FlatParameters, modules: ShardedModules, ranks: Ranks
    ) -> FlatParameters | ParametersInParts:
        """The parameters as the step's vectors lie."""
        if ranks.group is None or not (modules or self.param_groups[0]["shard_state"]):
            return parameters
        own = ranks.divide(parameters)
        if ranks.division is not None and not ranks.division.has_rows:  # replicas of parts
            ranks.division = None
            return parameters
        return own

    @contextmanager
    def _watching(self, module: nn.Module | None = None) -> Iterator[None]:
        """Watch the losses of the block if factors are due; ``module`` is about to run."""
        if module is not None and not torch.is_grad_enabled():
            yield  # it is only evaluated, and may be frozen by now, or of another dtype
            return
        settings = self._settings()
        state = StreamState(self._parameters()[0], self.state)
        if not self._is_due(state, settings):
            yield
            return
        with self._watching_for(state, settings.damping, module):
            yield

    @contextmanager
    def _watching_for(
        self, state: StreamState, damping: float, module: nn.Module | None = None
    ) -> Iterator[None]:
        parameters, (_, modules) = state.parameters, self._parameters()
        self._ranks = Ranks(self._find_group(modules), parameters.device, follow_ddp=True)
        if self._drawing is None:  # these serve all batches of a step
            self._drawing = self.generator or state.generator()
            own = self._own(parameters, modules, self._ranks)
            there = StreamState(parameters, self.state, own, self._ranks)
            inverse = self._invert(None, there, damping) if there.has_factors else None
            self._known = {} if inverse is None else inverse.pairs_on_all_ranks()
        watching = self._watch.watching(parameters, self._drawing, self._known)
        with self._ranks.noticing_ddp(module), watching:
            yield

    @all_or_nothing(
        attributes=("_inverse", "_has_told_of_age"),
        setting="radius",
        at_end=lambda optimizer: optimizer._forget_batch(),
    )
    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step.

        Args:
            closure: computes the loss, once, and may call ``backward``; ``.grad`` is what it leaves
                there. A list of closures stands for the mean of their losses. None: ``.grad`` is what
                the loop has left there, and :meth:`watch` has seen the losses.

        Returns:
            The loss before the step, detached; without a closure None.

        Raises:
            RuntimeError: no factors could be had, and the message says what to write.
            TypeError, ValueError: the closure returned something that is no loss.
            Exception: whatever the closure raises. Parameters, state and report are then as before, and
                what was watched for this step is forgotten; what the closure itself has changed, such
                as the numbers in ``.grad``, buffers and torch's random numbers, stays, as with torch's optimizers.
        """
        if self.__dict__.pop("grad_scale", None) is not None:
            raise RuntimeError(
                "KFAC takes no GradScaler, whose float16 has too little range for the curvature; use "
                "torch.autocast(..., dtype=torch.bfloat16), and call optimizer.step() yourself"
            )
        return self._step(closure)

    def _forget_batch(self) -> None:
        """Nothing is left of what was watched, also of a step that failed."""
        self._watch.take()
        self._ranks = self._drawing = self._known = None

    def _step(self, closure: Any) -> Tensor | None:
        settings = self._settings()
        self._transaction.cover(FlatParameters(self.param_groups))
        parameters, modules = self._parameters()
        state = StreamState(parameters, self.state)
        is_due = self._is_due(state, settings)
        group = self._find_group(modules)
        if closure is None and not state.steps and self._is_made_by_a_checkpoint():
            self._complete_state()
            return None

        # 1. The gradient, and the factors of this batch if they are due.
        functions = [] if closure is None else list_closures(closure)

        tensors = [p for group in self.param_groups for p in group["params"]]

        def run() -> tuple[Tensor | None, list[Tensor | None]]:
            if not functions:
                return None, [p.grad for p in parameters.params]
            with self._watching_for(state, settings.damping) if is_due else nullcontext():
                return differentiate(functions, parameters)

        def find_reached(found: tuple[Any, Sequence[Tensor | None]]) -> list[bool]:
            gradients = dict(zip(parameters.params, found[1], strict=True))
            return [gradients.get(p) is not None for p in tensors]

        # Without an engine that averages them, the gradients are this rank's, and ranks meet here first.
        averages = self.process_group is not None and not modules
        given = Ranks(self.process_group if averages else None, parameters.device, follow_ddp=False)
        beginning = Beginning(
            groups=self.param_groups,
            settings=settings,
            tensors=parameters.params,
            theta=parameters.read() if averages else None,
            state=self.state,
            whole_state=self._inverse is None,  # nothing was computed since it was loaded
            generator=None,
            calls=(len(functions), 0),
            names=NAMES,
        )
        given.begin_with(Beginning.length, beginning.common)
        (loss, gradients), flags = given.together_with_flags(run, find_reached, len(tensors))
        reached = [flag for p, flag in zip(tensors, flags, strict=True) if p.requires_grad]
        ranks = self._ranks or Ranks(group, parameters.device, follow_ddp=False)
        if not any(reached):
            raise ValueError(
                "no parameter of the optimizer has a gradient; call loss.backward() before step(), or "
                "was the model copied or built anew after the optimizer was made?"
            )
        own = self._own(parameters, modules, ranks)
        state = StreamState(parameters, self.state, own, ranks)
        gradient = ranks.mean(parameters.flatten(gradients)) if averages else own.flatten(gradients)

        with without_autocast():
            # 2. F as Kronecker factors, new ones mixed with the older (Martens & Grosse 2015, section 5).
            factors = self._renew(state, ranks, settings, len(functions)) if is_due else None
            solve = self._invert(factors, state, settings.damping)

            # 3. Momentum m, and x = (F + λI)⁻¹ m.
            momentum = state.flat("momentum").lerp_(gradient, 1 - settings.momentum)
            weight = state.weight * settings.momentum + 1 - settings.momentum
            mean = gradient.lerp(momentum / weight, settings.momentum)  # Nesterov's
            x = solve(mean)
            if not all(reached):  # the others stay where they are
                x *= own.repeat([float(one) for one in reached])
            step = own.spread(settings.lr) * x
            # The host waits once: the length of the step depends on these.
            slope, slope_of_step, slope_now, size, grad_norm, value = read(
                torch.dot(mean, x),
                torch.dot(mean, step),
                torch.dot(gradient, state.flat("last_step")),
                step.norm(),
                gradient.norm(),
                math.nan if loss is None else loss.to(parameters.device),
            )

            # 4. The radius δ, by what these data say of the last step, and s, with which ½ dᵀF d = δ.
            new_slope = slope_now / abs(state.last_slope) if state.last_slope else math.nan
            decrement = state.average_decrement(slope)
            radius = settings.radius
            if settings.adapt_radius and slope > 0 and math.isfinite(new_slope):
                factor = _radius_factor(new_slope, slope_of_step / slope)
                radius *= factor * state.fall_to(decrement)
            scale = math.sqrt(2 * radius / slope) if 0 < slope < math.inf else math.nan
            accepted = math.isfinite(scale * size * grad_norm)
            d = step.mul_(-scale)

        # 5. What the next step needs, and the report. Of a step that is refused nothing is left.
        if accepted:
            self._move(own, d, settings, reached)
            state.keep(
                momentum=momentum,
                weight=weight,
                step=d,
                slope=-scale * slope_of_step,
                decrement=decrement,
                factors=factors,
            )
            if factors is not None:
                complete_stream_state(self.state, parameters, getattr(own, "mesh", None))
            self._inverse = (parameters.key, settings.damping, ranks.division is None), solve
            for group in self.param_groups:
                group["radius"] = radius
        self.last_step = KFACReport(
            loss=value,
            grad_norm=grad_norm,
            step_norm=scale * size if accepted else 0.0,
            kl=radius if accepted else 0.0,
            new_slope=new_slope,
            radius=radius,
            damping=float(settings.damping),
            renewed=accepted and factors is not None,
            accepted=accepted,
            reason="accepted" if accepted else _why_refused(grad_norm, size),
        )
        return loss

    def _complete_state(self) -> None:
        parameters, modules = self._parameters()
        ranks = Ranks(self._find_group(modules), parameters.device, follow_ddp=False)
        own = self._own(parameters, modules, ranks)
        complete_stream_state(self.state, parameters, getattr(own, "mesh", None))

    def _is_made_by_a_checkpoint(self) -> bool:
        """Whether ``torch.distributed.checkpoint`` makes a state to load into: no rate, and no gradient but zero."""
        gradients = [p.grad for p in self._everything if p.grad is not None]
        is_still = all(float(group["lr"]) == 0 for group in self.param_groups)
        return is_still and not any(local_part(g).any() for g in gradients)

    def _renew(
        self, state: StreamState, ranks: Ranks, settings: KFACSettings, closures: int
    ) -> KeptFactors | None:
        """New factors, mixed with the older; None if this step has seen no losses, or its numbers are not finite."""
        estimate = self._watch.take()
        if not closures and ranks.group is None and Ranks.is_one_of_several():
            raise RuntimeError(_NO_GROUP)
        if closures > 1 and estimate is not None:  # these stand for the mean of their losses
            estimate = estimate.scale(1 / closures)
        new, older = KroneckerFactors.agreed([estimate], ranks), state.factors
        is_first = not state.has_factors
        if is_first and new is None:
            raise RuntimeError(_NOTHING_SEEN if estimate is None else _RANKS_DIFFER)
        if new is not None:
            # At the start they change fast, and the older count less.
            share = min(settings.factor_decay, state.draws / (state.draws + 2))
            new = new.normalise(known=older.layers or (), ranks=ranks)
            found = older.renew(new, share, ranks, keeps_unseen=True)
            if is_first or found.is_finite:
                return found
        if state.age >= _OLD * settings.renew_every and not self._has_told_of_age:
            self._has_told_of_age = True
            logger.warning("the factors in use are %d steps old. %s", state.age, _NOTHING_SEEN)
        return None

    def _invert(self, factors: KeptFactors | None, state: StreamState, damping: float) -> Any:
        """``r ↦ (F + λI)⁻¹ r``, with ``λ`` relative to the mean eigenvalue of each layer."""
        key = state.parameters.key, damping, state.own is state.parameters
        if factors is None and self._inverse is not None and self._inverse[0] == key:
            return self._inverse[1]
        return (factors or state.factors).invert(relative=damping)

    @staticmethod
    def _move(
        parameters: FlatParameters | ParametersInParts,
        d: Tensor,
        settings: KFACSettings,
        reached: Sequence[bool],
    ) -> None:
        decays = [lr * decay for lr, decay in zip(settings.lr, settings.weight_decay, strict=True)]
        parts = zip(
            parameters.params,
            parameters.lay_out(d),
            parameters.by_parameter(decays),
            reached,
            strict=True,
        )
        for p, change, decay, has_gradient in parts:
            if has_gradient and decay:
                p.mul_(1 - decay)
            if has_gradient:
                p.add_(change)


def _radius_factor(new_slope: float, lr: float) -> float:
    """By how much the radius changes.

    Where progress and noise balance, the slope that new data see is proportional to the step's length.
    So it is held against ``lr``: a schedule that shortens the steps leaves the radius as it is.
    """
    lr = min(1.0, lr)  # short steps, at the end of a schedule, say little about full ones
    return 2 ** (_RATE * lr * max(-1.0, min(1.0, _UPHILL * lr - new_slope)))


_NOTHING_SEEN = (
    "KFAC has seen no loss whose Kronecker factors it can take. Write `with optimizer.watch(): loss = ...` "
    "around the loss, or optimizer.watch(module) once for a module whose forward computes it (where "
    "torch.compile made a module of that, watch the compiled one), or call "
    "optimizer.step(closure); and let the loss come from a function of torch.nn.functional, such as "
    "cross_entropy or mse_loss, or from least_squares"
)
_NO_GROUP = (
    "torch.distributed runs several processes, and KFAC has not seen which of them take this step: let "
    "optimizer.watch() have the DistributedDataParallel module run within it, or watch that module, or "
    "give KFAC(process_group=torch.distributed.group.WORLD)"
)
_RANKS_DIFFER = "the ranks of the process group use their parameters in different layers"


def _why_refused(grad_norm: float, size: float) -> str:
    if not math.isfinite(grad_norm):
        return "the gradient is not finite"
    if not grad_norm:
        return "the gradient is zero"
    return "no descent" if math.isfinite(size) else "the direction is not finite"
