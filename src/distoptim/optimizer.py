"""The torch.optim.Optimizer face of every algorithm: step, average, flush, averaged, state_dict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distoptim import checks
from distoptim.comm import Communicator, connect
from distoptim.comm.codecs import Coding
from distoptim.comm.codecs import find as find_codec
from distoptim.comm.mesh import WorkerMesh, averaging_group
from distoptim.engine import checkpoint, evaluation
from distoptim.engine import membership as handshake
from distoptim.engine.clock import Pace
from distoptim.engine.engine import Engine
from distoptim.engine.hierarchy import Levels, check_levels, connect_levels
from distoptim.face import Face
from distoptim.fragments import Fragments, build, names, partition, trainable
from distoptim.options import Params, check_size, inner_optimizer, workers
from distoptim.periods import Tau
from distoptim.rule import Rule
from distoptim.version import __version__


class AveragingOptimizer(Face):
    """Base of all algorithms: a local (inner) optimizer on each worker, whose parameters are
    averaged every tau steps.

    `step()` is a local step of the inner optimizer; `average()` after it counts the step, merges a
    mean that is due and launches the next in the background. All workers must call `average()`
    equally often. At the start everybody gets rank 0's parameters.

    Args:
        params: parameters or param groups, for which a torch.optim.SGD is built; or any torch
            optimizer, which is then the inner one. Its list of parameters is fixed from here on;
            frozen ones are left out.
        rule: what is sent and how the mean meets the parameters.
        tau: local steps in a round, >= 1; or {step: tau}, or an object that chooses them
            (`PostLocal`, `AdaComm`, `HideCommunication`). More hides and saves more communication,
            and lets workers drift further.
        delay: local steps between launch and merge, in [0, tau]. 0 waits; tau hides a whole round.
        lr, momentum, dampening, weight_decay, nesterov: of the torch.optim.SGD, with its defaults.
        size: number of workers, checked if given (the original code's argument).
        group: the workers; None means all.
        device_mesh: says the workers instead, as its dimension called "replicate" or
            "dp_replicate", or its only one; the ranks along the others are one worker together
            (DDP, FSDP2, ...) and average DTensors shard by shard.
        levels: period in local steps -> smaller group of workers that also averages inside itself,
            blocking, as often; periods divide each other and every tau. One more copy of the model
            each.
        communicator: moves the bytes instead of torch.distributed (simulation, tests).
        fragments: in how many messages, evenly spread over the round, the parameters are averaged
            (1 to tau); or modules or lists of parameters, one per message. Must be equal on all
            workers.
        pattern: of n fragments: "sequential", runs of near equal size; "strided", parameter i in
            fragment i mod n.
        timeout_s: bound of every wait, in [0.001, 1e9] seconds; torch's own default of 30 minutes.
        average_in_step: let `step()` do what `average()` does, for frameworks that own the loop.
        reset_inner: forget the inner optimizer's state (momentum) at every merge instead of keeping
            it.
        codec: in which the difference to what all workers share travels: "bf16", "int8", "e3m0" or
            "2bit", with "+ef" behind it for error feedback, or an object; default None, float32.
            Fewer bytes for any number of workers. Float32 means on the CPU only. `averaged()` and
            levels send float32 always.

    Raises:
        ValueError: a value outside its range, or workers that disagree.
        CommunicationError: from `average()`: a worker is gone or a collective timed out.
    """

    def __init__(
        self,
        params: Params,
        *,
        rule: Rule,
        tau: Tau,
        delay: Tau,
        lr: float | Tensor | None = None,
        momentum: float | None = None,
        dampening: float | None = None,
        weight_decay: float | None = None,
        nesterov: bool | None = None,
        size: int | None = None,
        group: dist.ProcessGroup | None = None,
        device_mesh: DeviceMesh | None = None,
        levels: Mapping[int, dist.ProcessGroup] | None = None,
        communicator: Communicator | None = None,
        fragments: Fragments = 1,
        pattern: str = "sequential",
        timeout_s: float = 1800.0,
        average_in_step: bool = False,
        reset_inner: bool = False,
        codec: Coding | str | None = None,
    ) -> None:
        pace = Pace(tau, delay)
        checks.number("timeout_s", timeout_s, 1e-3, 1e9)
        checks.flag("average_in_step", average_in_step)
        checks.flag("reset_inner", reset_inner)
        if isinstance(params, AveragingOptimizer):
            raise ValueError("an averaging optimizer cannot be the inner optimizer of another")
        self.inner = inner_optimizer(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )
        members, _ = trainable(self.inner.param_groups)
        parts = partition(fragments, members, pace.period.smallest, pattern)
        check_size(
            size,
            workers({"group": group, "device_mesh": device_mesh, "communicator": communicator}),
        )
        group = averaging_group(group, device_mesh, communicator)
        if communicator is None:
            WorkerMesh(members).check(group, pace.period.measures)
        self._rule, self._tau, self._delay, self._parts = rule, tau, delay, parts
        self._codec = find_codec(codec)
        self._timeout_s, self._average_in_step, self._reset_inner = (
            timeout_s,
            average_in_step,
            reset_inner,
        )
        self._communicator = connect(group, timeout_s) if communicator is None else communicator
        groups = check_levels(levels, WorkerMesh(members), self._communicator, tau=tau)
        self._agree(list(groups))
        self._inner_groups = connect_levels(groups, timeout_s)
        self._build_engine()
        self._face()

    def _agree(self, levels: Sequence[int]) -> None:
        params, groups = trainable(self.inner.param_groups)
        handshake.introduce(
            self._communicator,
            {
                "distoptim version": __version__,
                "algorithm": type(self).__name__,
                "inner optimizer": type(self.inner).__name__,
                "tau": self._tau,
                "delay": self._delay,
                "levels": levels,
                "codec": repr(self._codec),
                **self._rule.facts(),
            },
            build(params, groups, self._parts),
            names(self.inner.param_groups),
        )

    @torch.no_grad()
    def _build_engine(self) -> None:
        params, groups = trainable(self.inner.param_groups)
        self._engine = Engine(
            build(params, groups, self._parts),
            self._rule,
            self._communicator,
            tau=self._tau,
            delay=self._delay,
            timeout_s=self._timeout_s,
            inner_lr=self._lr,
            forget=self._forget,
            reset_inner=self._reset_inner,
            codec=self._codec,
        )
        self._levels = Levels(self._engine, self._inner_groups, self._forget)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One local step of the inner optimizer; returns the closure's loss, if there is one."""
        self._engine.check_local()
        for name in ("grad_scale", "found_inf"):
            if name in self.__dict__:
                setattr(self.inner, name, getattr(self, name))
        try:
            loss = self.inner.step() if closure is None else self.inner.step(closure)
        finally:
            for name in ("grad_scale", "found_inf"):
                self.inner.__dict__.pop(name, None)
        if self._average_in_step:
            self._levels.tick()
        return loss

    def average(self, *, loss: Tensor | float | None = None, samples: float | None = None) -> None:
        """Count a local step; merge and launch what is due. The one extra line of a training loop.

        Args:
            loss: of this step, for a period that follows it (`AdaComm`); read at the launch, not
                here.
            samples: this step's, >= 0; a worker's payload then weighs as many as it had since the
                last launch. All workers say it, at every step, or none. By default all weigh the
                same.

        Raises:
            CommunicationError: a collective failed or timed out; parameters and anchor are valid
                and can be saved.
            FloatingPointError: no worker had finite parameters.
            ValueError: `samples` on some steps or workers only.
            RuntimeError: `average_in_step` is set; inside `averaged()`.
        """
        if self._average_in_step:
            raise RuntimeError("average_in_step=True: step() averages already")
        self._engine.pace.counts(samples is not None)
        if loss is not None or samples is not None:
            self._engine.pace.report(loss, samples)
        self._levels.tick()

    def flush(self) -> None:
        """Merge what is in flight and average the steps since the last launch, blocking.

        A new round begins.
        """
        self._levels.flush()

    def join(self) -> contextlib.AbstractContextManager[None]:
        """A `with` block around the loop of workers that may have different numbers of local steps.

        Who leaves the block goes on taking part in the others' means, with weight 0, until all have
        left; then all hold the workers' mean, weighted by the samples (else local steps) they had
        in the block. Leaving it by an exception communicates nothing.
        """
        return self._levels.join()

    @contextlib.contextmanager
    def averaged(self, module: torch.nn.Module | None = None) -> Iterator[None]:
        """Within the `with` block parameters are the workers' mean, for evaluation and saving; then
        local again.

        Entering is collective and blocks; rounds in flight go on untouched.

        Args:
            module: its floating-point buffers (batch-norm statistics) are averaged too.
        """
        with evaluation.averaged(self._engine, module):
            yield

    def consensus_distance(self) -> float:
        """Root mean square over the workers of |x_i - mean x|, the Euclidean norm.

        Collective, blocks.
        """
        return evaluation.consensus_distance(self._engine)

    def stats(self) -> dict[str, float]:
        """What this worker measured so far; costs nothing but reading.

        Returns: `steps`, `tau` (the present one), `syncs` (merged fragments); `exposed_s` (seconds
        the computation waited for communication), `hidden_s` (seconds of communication beside it),
        `overhead_s` (forming payloads, coding and merging), `computation_s` (time between the first
        and the last `average()` less the exposed part), `exposed_share` (exposed / computation),
        `bytes` (of the payloads: B bytes make each of m workers send 2 (m - 1)/m B on a ring; codes
        count as the payload that would make it send as much), `staleness` (mean local steps from
        launch to merge), `quarantined` (payloads of this worker that were not finite).
        """
        return self._engine.counters.report(self._engine.step, self._engine.tau)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict with one key more: "distoptim", all of this worker's
        rounds.

        Each worker saves its own. What is in flight is waited for and saved as its mean, so a
        resumed run is bit-equal to one that never stopped. With a codec and more than two workers
        the others must come to this or to their next `average()` too, for the second stage of a
        coded mean.
        """
        return {**self.inner.state_dict(), "distoptim": self._levels.save()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()`; load the model first. A plain optimizer's state dict starts a
        new run.

        Collective: all workers load, each what it saved. Where a failure has left them a round
            apart, all go on from
        the one that is furthest: from its anchor, if there is one. After a failure or `close()`
            nobody is asked.

        Raises:
            ValueError: it is of another algorithm or of other parameters, or a plain optimizer's on
                some workers only.
        """
        inner = dict(state_dict)
        ours = inner.pop("distoptim", None)
        if ours is not None:
            checkpoint.check(self._engine, ours)
        # A mean on its way still writes into its buffer.
        self._engine.settle()
        if self._engine.failure is None:
            params, _ = trainable(self.inner.param_groups)
            ours = handshake.reunite(self._communicator, params, ours)
        self.inner.load_state_dict(inner)
        if ours is not None:
            self._levels.load(ours)
        else:
            self._build_engine()

    def close(self) -> None:
        """Finish or abandon what is in flight and leave the communication groups; twice is fine."""
        self._levels.close()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the inner optimizer, the configuration and the rounds."""
        keep = (
            "inner",
            "_rule",
            "_tau",
            "_delay",
            "_parts",
            "_timeout_s",
            "_average_in_step",
            "_reset_inner",
            "_codec",
            "_communicator",
            "_inner_groups",
        )
        return {**{name: self.__dict__[name] for name in keep}, "saved": self._levels.save()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the engine around the copied parameters, without talking to anybody."""
        saved = state.pop("saved")
        self.__dict__.update(state)
        self._build_engine()
        self._levels.load(saved)
        self._face()

    def _lr(self, group: int) -> float:
        return float(self.inner.param_groups[group]["lr"])

    def _forget(self, params: Sequence[Tensor]) -> None:
        for p in params:
            self.inner.state.pop(p, None)
