"""The curvature product of a closure that has been traced: how it is formed at first, and then."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ngd_optim.curvature import OutputMetric, ScalarMetric, flat_product, penalty_of
from ngd_optim.distributed import Ranks
from ngd_optim.jacobian import SqrtGGN, compute_cheap_diagonal, square_root_of
from ngd_optim.linearization.checks import ON_ANOTHER_RANK, Experience, known_to, why_not
from ngd_optim.parameters import FlatParameters
from ngd_optim.recording import CannotReplayError, Memory, Recall, Recording
from ngd_optim.tracing import ReplayedClosure, twice_differentiable


class _Attempt(NamedTuple):
    """A product and how to form others, or why not by this backend, or why not by a recording."""

    result: Tensor | None = None
    formed: Recording | Callable[[Tensor], Tensor] | None = None
    cannot_follow: str | None = None
    cannot_replay: str | None = None


class TracedProduct:
    """The product of a traced closure on flat vectors: recorded when first used, where that works, then replayed."""

    def __init__(
        self,
        run: ReplayedClosure,
        metric: OutputMetric | ScalarMetric,
        parameters: FlatParameters,
        experience: Experience,
        memory: Memory,
        ranks: Ranks,
        *,
        record: bool = True,
        loss: Tensor | None = None,
    ) -> None:
        self._loss = loss
        self._memory = memory
        self._ranks = ranks
        self._record = record
        self._run = run
        self._metric: OutputMetric | ScalarMetric | None = metric
        self._parameters = parameters
        self._experience = experience
        self._formed: Recording | Callable[[Tensor], Tensor] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """The curvature times a flat vector."""
        if self._formed is None:
            return self._first(v)
        return self._formed(v)

    def square_root(self) -> SqrtGGN | None:
        """That of a metric at outputs, None if it is indefinite; to be asked before any product."""
        assert isinstance(self._metric, OutputMetric)
        assert self._loss is not None
        run, select = self._run, self._metric.select

        def outputs_now() -> Sequence[Tensor] | None:
            there = run.tried()
            return None if there is None else select(there)

        return square_root_of(self._metric, self._loss, self._parameters, outputs_now)

    def compute_cheap_diagonal(self) -> Tensor | None:
        """That of ``F`` for a metric at outputs, where it takes as little as some products; before any product."""
        assert isinstance(self._metric, OutputMetric)
        return compute_cheap_diagonal(self._metric, self._parameters)

    def _first(self, v: Tensor) -> Tensor:
        experience = self._experience
        with twice_differentiable():
            attempt = self._ranks.together(lambda: self._attempt(v))
        reasons = attempt.cannot_follow, attempt.cannot_replay
        cannot_follow, cannot_replay = self._ranks.any([reason is not None for reason in reasons])
        if cannot_follow:
            if attempt.cannot_follow is not None:
                experience.fall_back(attempt.cannot_follow)
        elif cannot_replay:
            experience.form_directly(attempt.cannot_replay or ON_ANOTHER_RANK)
        else:
            assert attempt.result is not None
            self._formed = attempt.formed
            if isinstance(attempt.formed, Recording):
                self._metric = self._loss = None  # and with it the graph: the recording holds what it needs of that
            return attempt.result
        return self._first(v)

    def _attempt(self, v: Tensor) -> _Attempt:
        try:
            direct, memory = self._direct(), known_to(self._experience.backend, self._memory)
            if not (self._record and self._experience.replays):
                with Recall(memory):
                    return _Attempt(direct(v), direct)
            recording = Recording(direct, v, memory)
            return _Attempt(recording.take_result(), recording)
        except CannotReplayError as error:
            return _Attempt(cannot_replay=f"they cannot be recorded: {error}")
        except RuntimeError as error:  # the closure now does what this backend cannot follow
            if self._experience.backend == "double-backward" and not self._experience.spare:
                raise
            return _Attempt(cannot_follow=why_not(error, self._experience.backend))

    def _direct(self) -> Callable[[Tensor], Tensor]:
        assert self._metric is not None
        params = self._parameters.tensors
        penalty = penalty_of(self._run, params) if self._experience.penalty else None
        products = [self._metric.product(self._run, params, self._experience.backend)]
        return flat_product(products if penalty is None else [*products, penalty], self._parameters)
