"""What a user holds: a torch.optim.Optimizer around another, whose parameters are averaged."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distoptim.comm import Codec, ErrorFeedback, Link
from distoptim.comm.mesh import WorkerMesh
from distoptim.construction import ToldToAll
from distoptim.engine import checkpoint, evaluation, membership, saved
from distoptim.engine.calls import Calls, EngineCalls
from distoptim.engine.clock import Clock
from distoptim.engine.engine import Engine, Inner, tick_together
from distoptim.engine.hierarchy import Hierarchy, check_levels, connect_levels
from distoptim.engine.history import Recording, Span, trace
from distoptim.engine.likeness import look_for_ddp
from distoptim.engine.master_weights import MasterWeights
from distoptim.engine.module_statistics import ModuleStatistics
from distoptim.fragments import Fragment, build, is_fsdp1, names, partition, trainable, unfit
from distoptim.inner_state import StateCopies
from distoptim.module_state import parts_of
from distoptim.periods import Tau
from distoptim.rule import Rule
from distoptim.settings import Options, Params, SyncSettings, whole_signature
from distoptim.version import __version__
from distoptim.watch import Watch

if TYPE_CHECKING:
    from typing_extensions import Unpack


# Where a residual and an outer momentum swing (docs/compression.md): bits a number, momentum, decay.
_FEW_BITS = 3
_STRONG = 0.5
_BEARABLE = 0.8
_MANY = 2**16


class AveragingOptimizer(torch.optim.Optimizer, metaclass=ToldToAll):
    """Base of all algorithms: a local (inner) optimizer on each worker, averaged every tau steps.

    `step()` is a local step of the inner optimizer; `average()` after it counts the step, merges a
    mean that is due and launches the next in the background. All workers must call `average()` equally
    often. At the start everybody gets rank 0's parameters.

    Args:
        params: parameters or param groups, for which a torch.optim.SGD is built; or any torch
            optimizer, which is then the inner one. Its list of parameters is fixed from here on;
            frozen ones are left out.
        rule: what is sent and how the mean meets the parameters; or a function that makes it for a
            number of workers.
        tau: local steps in a round, >= 1; or {step: tau}, or an object that chooses them (`PostLocal`,
            `AdaComm`, `HideCommunication`, `EqualTime`). More hides and saves more communication, and lets workers
            drift further.
        delay: local steps between launch and merge, in [0, tau]. 0 waits; None (the default here)
            hides a whole round.
        lr: learning rate of the torch.optim.SGD, >= 0; with its default, as the next four.
        momentum: of the torch.optim.SGD, >= 0.
        dampening: of the torch.optim.SGD's momentum.
        weight_decay: of the torch.optim.SGD, >= 0.
        nesterov: whether the torch.optim.SGD's momentum is Nesterov's.
        size: number of workers, checked if given (the original code's argument).
        group: the workers; None means all.
        device_mesh: says the workers instead, as its dimension called "replicate" or "dp_replicate",
            or its only one; the ranks along the others are one worker together (DDP, FSDP2, ...) and
            average DTensors shard by shard.
        levels: period in local steps -> smaller group of workers that also averages inside itself,
            blocking, as often; periods divide each other and every tau. One more copy of the model
            each.
        communicator: moves the bytes instead of torch.distributed (simulation, tests).
        fragments: in how many messages, evenly spread over the round, the parameters are averaged (1
            to tau); or modules or lists of parameters, one per message. Must be equal on all workers.
        pattern: of n fragments: "sequential", runs of near equal size; "strided", parameter i in
            fragment i mod n.
        timeout_s: bound of every wait, in [0.001, 1e9] seconds; torch's own default of 30 minutes.
        average_in_step: let `step()` do what `average()` does, for frameworks that own the loop. A
            step that a GradScaler skips counts too, so that workers stay in phase.
        reset_inner: forget the inner optimizer's state (momentum) at every merge instead of keeping
            it.
        codec: in which the difference to what all workers share travels: "bf16", "int8", "e3m0",
            "2bit", "1bit" or "top64", with "+ef" behind it for error feedback ("+ef0.95" for one that
            decays), or an object; default None, float32. Fewer bytes for any number of workers. Float32
            means on the CPU only. `averaged()` and levels send float32 always.
        streams: connections at once over which a message goes in parts, 1 to 64, or "auto" (default):
            as many as round trip and size are worth. For long fat links, of which one connection of
            gloo uses a part; each costs files and threads.
        offload: True: anchors, outer state and messages are in host memory (pinned, beside a GPU), which
            leaves a GPU's memory to the model and lets `codec=` go with it; launch and merge then wait for copies
            between the two. Equal numbers, and nothing else, for parameters on CPUs.
        module: the model that is trained, or several. Its buffers and frozen parameters get rank 0's
            values at the start, as its other parameters do, and what is changed or added in it later
            is noticed. Without it that holds for the parameters handed over.
        sync_module: False: only compare these buffers and frozen parameters at the start.

    Attributes:
        inner: the optimizer that makes the local steps.
        engine: keeps the rounds; for simulators, integrations and tests, which may read it.
        calls: what all workers call together, on that engine and on those of levels; for the library itself.

    Raises:
        ValueError: a value outside its range, or workers that disagree.
        CommunicationError: from `average()`: a worker is gone or a collective timed out.
    """

    inner: torch.optim.Optimizer
    engine: Engine
    calls: Calls
    _recording: Recording | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let tooltips show every argument instead of `**options`."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__signature__ = whole_signature(cls.__init__)  # type: ignore[attr-defined]  # inspect's

    def __init__(
        self,
        params: Params,
        *,
        rule: Rule | Callable[[int], Rule],
        tau: Tau,
        delay: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        settings = SyncSettings(tau=tau, delay=delay, **options)
        if isinstance(params, AveragingOptimizer):
            raise ValueError("an averaging optimizer cannot be the inner optimizer of another")
        inner = settings.inner_optimizer(params)
        self._members = trainable(inner.param_groups)
        self._state_copies = StateCopies(inner)
        if settings.reset_inner and self._state_copies.names:
            raise ValueError(
                f"reset_inner=True: {list(self._state_copies.names)} of the inner optimizer's state are "
                "declared as copies of the parameters, which would be forgotten too; allowed is False"
            )
        members, _ = self._members
        untrained = _untrained(settings.modules, inner, members)
        period = settings.period
        parts = partition(settings.fragments, members, period.smallest, settings.pattern)
        self._rule = _fit(rule, settings)
        mesh = WorkerMesh(members)
        if settings.communicator is None:
            # What is frozen lies on ranks of one worker, too, or would be overwritten by another shard.
            WorkerMesh([*members, *untrained.values()]).check(
                settings.averaging_group(), period.measures
            )
        # torch's base class first, for its hooks: it sets groups and state, which are inner's here.
        super().__init__([{"params": []}], inner.defaults)
        self.inner = inner
        self._settings = settings
        self._parts = parts
        self._communicator = settings.connect()
        if self._communicator.elastic:
            membership.check_elastic(settings, self._rule, self._fragments())
        try:
            settings.check_offload(self._communicator)
            groups = check_levels(settings.levels, mesh, self._communicator, tau=tau)
            self._watch = Watch(inner, members, settings.modules)
        except (ValueError, TypeError) as error:
            membership.refuse(lambda: self._communicator, error, mesh)
            raise
        self._agree(list(groups), untrained)
        # Making their groups is collective: only now all are known to have the same.
        self._levels = connect_levels(groups, settings.timeout_s, settings.streams)
        for level in self._levels.values():
            level.prepare(self._largest_message(self._fragments(), coded=False))
        self._build()
        membership.take_part(self.engine, untrained)

    def _agree(self, levels: Sequence[int], untrained: dict[str, Tensor]) -> None:
        """Compare with all workers what must be equal; everybody gets rank 0's parameters."""
        settings = self._settings
        facts = {
            "distoptim version": __version__,
            "algorithm": type(self).__name__,
            "inner optimizer": type(self.inner).__name__,
            "tau": settings.tau,
            "delay": settings.delay,
            "levels": list(levels),
            "reset_inner": settings.reset_inner,
            "sync_module": settings.sync_module,
            "order of modules": _first_parameters(settings.modules, self._members[0]),
            "copies": list(self._state_copies.names),
            "copies that are there": self._state_copies.held(self._members[0]),
            "codec": repr(settings.coding),
            "streams": settings.streams,
            **self._rule.facts(),
        }
        fragments = self._fragments()
        before = _fingerprint(fragments)
        membership.agree(
            self._communicator,
            facts,
            fragments,
            names(self.inner.param_groups),
            start=before,
            untrained=untrained,
            sync=settings.sync_module,
        )
        coded = settings.coding is not None
        self._communicator.prepare(self._largest_message(fragments, coded=coded), coded=coded)
        self._overwritten = (before, _fingerprint(fragments))

    def _largest_message(self, fragments: Sequence[Fragment], *, coded: bool) -> int:
        """Bytes of the largest fragment, as it travels."""
        coding = self._settings.coding if coded else None
        codec = coding if coding is None or isinstance(coding, Codec) else coding.codec
        return max(
            (
                f.numel * f.dtype.itemsize if codec is None else codec.nbytes(f.numel)
                for f in fragments
            ),
            default=0,
        )

    def _fragments(self) -> list[Fragment]:
        """Made anew at each call."""
        offload = self._settings.offload
        return build(*self._members, self._parts, self._state_copies, offload=offload)

    @torch.no_grad()
    def _build(self) -> None:
        """Make the engine, and the levels below it, from parameters that all workers share."""
        settings = self._settings
        self._has_stepped = False
        fragments = self._fragments()
        inner = Inner(self.inner, reset_at_merge=settings.reset_inner)
        self._master_weights = MasterWeights(self.inner, self._state_copies)
        self.engine = Engine(
            fragments,
            self._rule,
            Clock(settings.period, settings.delay),
            self._communicator,
            inner=inner,
            watch=self._watch,
            timeout_s=settings.timeout_s,
            codec=settings.coding,
            statistics=self._statistics(fragments),
        )
        if self._recording is not None:
            self.engine.counters.follow = self._recording.follow
        self.calls = EngineCalls(self.engine)
        if self._levels:
            self.calls = Hierarchy(
                self.engine, self._levels, inner=inner, timeout_s=settings.timeout_s
            )

    def _statistics(self, fragments: Sequence[Fragment]) -> ModuleStatistics | None:
        """Where nobody else may be asked for the module's: those that fit into the first message."""
        if not self._communicator.elastic:
            return None
        own = {id(p) for p in self._members[0]}
        found = parts_of(self._settings.modules, own).statistics.values()
        fit = [t for t in found if t.dtype == fragments[0].dtype and t.device.type == "cpu"]
        return ModuleStatistics(fit) if fit else None

    # ---- a training loop's calls ------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One local step of the inner optimizer; returns the closure's loss, if there is one.

        Whatever it raises, also out of closure and hooks, the other workers are told.
        """
        with self.calls.telling():
            self.engine.check_local()
            args = () if closure is None else (closure,)
            for pre in self._optimizer_step_pre_hooks.values():
                pre(self, args, {})
            self._master_weights.follow()
            loss = self._local_step(closure)
            self._master_weights.look()
            for post in self._optimizer_step_post_hooks.values():
                post(self, args, {})
            if not self._has_stepped:
                self._look_for_ddp()
            if self._settings.average_in_step:
                self.engine.weights.report(None)
                self.calls.tick()
        return loss

    # torch wraps `step` of every class to run hooks. Ours runs the inner optimizer's, which torch has
    # wrapped already: wrapped as well, global hooks would run twice.
    step.hooked = True  # type: ignore[attr-defined]  # torch's mark of what it need not wrap

    def _look_for_ddp(self) -> None:
        """Once, after the first step, before which nobody has to have wrapped the model."""
        self._has_stepped = True
        if look_for_ddp(self._members[0], self._communicator):
            # It would say the same again, some rounds later.
            self.engine.syncs[0].likeness = None

    def _local_step(self, closure: Callable[[], Any] | None) -> Any:
        """One step of the inner optimizer, which subclasses may make in another way, by this one.

        With what a GradScaler has left on this object, where it knows that we take it.
        """
        scaling = {
            name: self.__dict__[name]
            for name in ("grad_scale", "found_inf")
            if name in self.__dict__
        }
        if scaling and not getattr(self.inner, "_step_supports_amp_scaling", False):
            if float(scaling.get("found_inf") or 0):
                return None
            if scaling.get("grad_scale") is not None:
                self._unscale(scaling["grad_scale"])
            scaling = {}
        for name, value in scaling.items():
            setattr(self.inner, name, value)
        try:
            return self.inner.step() if closure is None else self.inner.step(closure)
        finally:
            for name in scaling:
                self.inner.__dict__.pop(name, None)

    @torch.no_grad()
    def _unscale(self, scale: Tensor) -> None:
        groups = self.inner.param_groups
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, float(1 / scale))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler is to call `step` always, and let it skip what overflowed.

        Where `step` averages too it must be called, or workers that skip fall out of phase.
        """
        inner = bool(getattr(self.inner, "_step_supports_amp_scaling", False))
        return inner or self._settings.average_in_step

    def average(self, *, loss: Tensor | float | None = None, samples: float | None = None) -> None:
        """Count a local step; merge and launch what is due. The one extra line of a training loop.

        Args:
            loss: of this step, for a period that follows it (`AdaComm`); read at the launch, not here.
            samples: this step's, 0 or 1e-6 to 1e9; a worker's payload then weighs as many as it had since the last
                launch. All workers say it, at every step, or none. By default all weigh the same.

        Raises:
            CommunicationError: a collective failed or timed out, workers are in unlike calls, with
                `samples` and without, or one cannot go on; parameters and anchor are valid and can be
                saved.
            FloatingPointError: no worker had finite parameters.
            ValueError: `samples` on some steps only, or none that are allowed; a parameter that was
                unfrozen, replaced, converted, moved or resized. The others are told (CommunicationError).
            RuntimeError: `average_in_step` is set; inside `averaged()`.
        """
        engine = self.engine
        # As `telling`, written out on the path of every round.
        try:
            if self._settings.average_in_step:
                raise RuntimeError("average_in_step=True: step() averages already")
            if samples is not None or engine.weights.counted is not False:
                engine.weights.report(samples)
            if loss is not None:
                engine.clock.report(loss)
            self.calls.tick()
        except Exception as error:
            self.calls.tell(error)
            raise

    def flush(self) -> None:
        """Merge what is in flight and average the steps since the last launch; a new round begins.

        Blocking and collective.
        """
        with self.calls.telling():
            self.calls.flush()

    def join(self) -> contextlib.AbstractContextManager[None]:
        """A `with` block around the loop of workers that may have different numbers of local steps.

        Who leaves the block goes on taking part in the others' means, with weight 0, until all have
        left; then all hold the workers' mean, weighted by the samples (else local steps) they had in
        the block. Leaving it by an exception communicates nothing.
        """
        return self.calls.join()

    @contextlib.contextmanager
    def averaged(self, module: torch.nn.Module | None = None) -> Iterator[None]:
        """Within the `with` block parameters are the workers' mean; then local again.

        For evaluation and saving. Entering is collective and blocks; rounds in flight go on untouched.

        Args:
            module: the one that is trained. Its statistics (batch norm's, and what
                `distoptim.statistics` declares) are averaged too; what is a worker's own (spectral
                norm's vectors, and what `distoptim.local` declares) is left alone; all else must be
                equal on all workers, and is left alone.

        Raises:
            ValueError: on all workers, naming what of the module differs, or is trained by another
                optimizer (see `distoptim.averaged`).
        """
        with self._master_weights.untouched(), evaluation.averaged([self.calls], module):
            yield

    def consolidate(self, module: torch.nn.Module | None = None) -> None:
        """Parameters become the workers' mean for good: x_i <- mean of x_j, as at the end of a run.

        What is in flight moves the anchor and is no more in flight; a new round begins at this step.
        Twice changes nothing more. Blocking and collective.

        Args:
            module: the one that is trained; its statistics become the mean too, as in `averaged`.

        Raises:
            ValueError: as `averaged`.
        """
        evaluation.consolidate([self.calls], module)

    def average_module(self, module: torch.nn.Module) -> None:
        """The workers' mean of any other module, in place: of a moving average of the weights.

        Parameters, trainable or not, and statistics (batch norm's, and what `distoptim.statistics`
        declares) are averaged. What is a worker's own is left alone; all else, such as integers and
        masks, must be equal on all workers. Rounds go on untouched. Blocking and collective.

        Args:
            module: a copy, such as `torch.optim.swa_utils.AveragedModel`; of equal shapes everywhere.

        Raises:
            ValueError: this optimizer trains its parameters, or something in it differs that is not
                averaged; on all workers.
        """
        evaluation.average_module(self.calls, module)

    def consensus_distance(self) -> float:
        """Root mean square over the workers of |x_i - mean x|, the Euclidean norm.

        Collective, blocks.
        """
        return evaluation.consensus_distance(self.calls)

    def stats(self) -> dict[str, float]:
        """What this worker measured so far; costs nothing but reading.

        Returns: `steps`, `tau` (the present one), `syncs` (merged fragments); `exposed_s` (seconds the
            computation waited for communication), `hidden_s` (seconds of communication beside it),
            `overhead_s` (forming payloads, coding and merging), `computation_s` (time between the first
            and the last `average()` less these two), `exposed_share` (exposed / computation),
            `bytes` (of the payloads: B bytes make each of m workers send 2 (m - 1)/m B on a ring; codes
            count as the payload that would make it send as much), `staleness` (mean local steps from
            launch to merge), `quarantined` (payloads of this worker that were not finite), `lost` (means
            that never came) and `catch_ups` (how often it took over what others share). Where workers come
            and go (`Elastic`) also `joins`, `losses` and `leaves`, of all workers, as this one has seen them.
        """
        engine = self.engine
        measured = engine.counters.report(engine.step, engine.clock.tau)
        return {**measured, **self._communicator.tally()}

    def history(self) -> list[Span]:
        """What this worker did last: local steps, waits, launches, merges and means in flight, some 16,000 spans.

        Kept always, at the cost of a tuple for each.
        """
        return [Span(*span) for span in self.engine.counters.spans]

    def export_trace(self, path: str | Path) -> None:
        """Write `history()` as a trace for chrome://tracing or Perfetto, with the profiler's labels.

        Args:
            path: a JSON file, overwritten.
        """
        found = trace(self.history(), worker=self._communicator.ranks[self._communicator.rank])
        Path(path).write_text(json.dumps(found), encoding="utf-8")

    def record(self, folder: str | Path) -> None:
        """From here on, write all that `history()` shows to a file: `distoptim timeline FOLDER` draws it.

        Until `close()`; about 60 bytes a local step.

        Args:
            folder: the same on all workers, or one for each; each writes its own worker-RANK.jsonl.

        Raises:
            ValueError: this worker records already.
        """
        if self._recording is not None:
            raise ValueError(f"record({str(folder)!r}): this optimizer records already")
        name = type(self).__name__
        counters = self.engine.counters
        before = counters.spans[-1] if counters.spans else None
        self._recording = Recording(Path(folder), self._communicator, algorithm=name, after=before)
        counters.follow = self._recording.follow

    def link(self) -> Link | None:
        """The link to the other workers as measured at construction: latency and each one's rate.

        The rate is that of the parameters' broadcast, on one connection that has just begun: of small
        models too low. None where nothing was measured (one worker, virtual ones, nccl).
        """
        return self._communicator.link

    @property
    def local_step(self) -> int:
        """Local steps that have been counted; of a worker that has joined or caught up, the others'."""
        return self.engine.step

    @torch.no_grad()
    def anchor_digest(self) -> str:
        """In hex, equal on workers exactly where what they share (anchors, outer state) is bit-equal."""
        return checkpoint.digest(self.engine)

    @property
    def rounds(self) -> int:
        """Means merged so far, of the first fragment; equal on all workers at the end of a round.

        Where workers make different numbers of local steps (`EqualTime`), calls that all make together
        go by it: `while optimizer.rounds < 100`.
        """
        return self.engine.syncs[0].merges

    def close(self) -> None:
        """Finish or abandon what is in flight and leave the communication groups; twice is fine.

        Waits, for a minute at most, for the others to close too, to compare the numbers of local steps;
        not after a failure, and not while an exception passes.

        Raises:
            CommunicationError: on all workers, if they are in unlike calls, or have made unlike numbers
                of local steps.
        """
        try:
            self.calls.close()
        finally:
            if self._recording is not None:
                self._recording.close(self.engine.counters.spans)
                self._recording = None
                self.engine.counters.follow = None

    # ---- saving and resuming ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict with one key more, "distoptim": this worker's rounds.

        Each worker saves its own. What is in flight is waited for and saved as its mean, so a resumed
        run is bit-equal to one that never stopped. With a codec and more than two workers the others
        must come to this or to their next `average()` too, for the second stage of a coded mean.
        """
        with self.calls.telling():
            for pre in self._optimizer_state_dict_pre_hooks.values():
                pre(self)
            rounds = {
                **checkpoint.save(self.calls),
                "parameters": _fingerprint(self._fragments()),
                "shard": WorkerMesh(self._members[0]).coordinates,
            }
            state = {**self.inner.state_dict(), checkpoint.KEY: rounds}
            for post in self._optimizer_state_dict_post_hooks.values():
                state = post(self, state) or state
            # Last, since a hook may change what is saved.
            return checkpoint.sealed(state) if checkpoint.KEY in state else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()`, after the model was loaded. A plain optimizer's starts a new run.

        Collective: all workers load, each what it saved. Where a failure has left them a round apart,
        all go on from the one that is furthest: from its anchor, if there is one. After a failure or
        `close()` nobody is asked. Where workers come and go (`Elastic`) it is not collective: who is less
        far than another catches up at the next mean.

        A worker's damaged or unfit state is an error on all workers, and nothing is changed.

        Raises:
            ValueError: it is damaged, of another algorithm, of other parameters or shards, or no state
                at all; a plain optimizer's on some workers only; workers saved different anchors; or
                the model was loaded before the optimizer was made.
            CommunicationError: on all workers, if one is in another call.
        """
        try:
            state, ours = self._read(state_dict)
            refusal = None
        except Exception as error:  # noqa: BLE001  # of hooks, too; raised once all have heard
            state = {}
            ours = None
            refusal = error
        # A mean on its way still writes into its buffer.
        self.engine.settle()
        alone = self._communicator.elastic or self.engine.reducer.failure is not None
        if not alone:
            ours = membership.catch_up(self.calls, ours, refusal)
        elif refusal is not None:
            raise refusal
        with self.calls.telling():
            self.inner.load_state_dict(state)
            # Before the rounds may move x.
            self._master_weights.restore(state)
            if ours is None:
                self._build()
            elif self._communicator.elastic:
                membership.go_on(self.engine, ours)
            else:
                self.calls.load_state_dict(ours)
            for post in self._optimizer_load_state_dict_post_hooks.values():
                post(self)

    def _read(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The inner optimizer's state and the rounds, if there are any, all of which fits.

        Raises:
            ValueError: something does not.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(
                f"load_state_dict({str(state_dict)[:60]}): allowed is what state_dict() has returned"
            )
        state = dict(state_dict)
        if checkpoint.KEY in state:
            checkpoint.verify(state)
        for pre in self._optimizer_load_state_dict_pre_hooks.values():
            state = pre(self, state) or state
        ours = None
        if checkpoint.KEY in state:
            ours = checkpoint.understood(state.pop(checkpoint.KEY))
            saved.check_rounds(self.engine, ours)
            self._check_shard(ours)
            self._check_order(ours)
        elif self._communicator.elastic:
            raise ValueError(
                "a plain optimizer's state beside workers that come and go (Elastic), which says nothing of "
                "a run: allowed is this worker's own file"
            )
        saved.check_inner(self.inner, state)
        if ours is None:
            self._check_plain(state)
        return state, ours

    def _check_plain(self, state: Mapping[str, Any]) -> None:
        """Whether a plain optimizer's state, which fits, may be taken over; subclasses may refuse it.

        Raises:
            ValueError: it may not.
        """

    def _check_shard(self, rounds: dict[str, Any]) -> None:
        """Whether the rounds are of the same shards; older versions do not say."""
        mine = WorkerMesh(self._members[0]).coordinates
        found = rounds.get("shard", mine)
        if found != mine:
            raise ValueError(
                f"checkpoint is of the shards at {str(found)[:60]} of a worker's mesh, this rank holds "
                f"those at {mine}: each rank loads its own file"
            )

    def _check_order(self, rounds: dict[str, Any]) -> None:
        """Whether the parameters beside which the rounds were saved are still there.

        They are lost where the model was loaded first and the optimizer, which gives everybody rank
        0's, was made after it.
        """
        before, after = self._overwritten
        # Of any type, where the file is damaged.
        found = rounds.get("parameters")
        if isinstance(found, int) and found == before != after == _fingerprint(self._fragments()):
            raise ValueError(
                "parameters were loaded before the optimizer was made, which has given everybody rank "
                "0's: make the optimizer first, then load the model, then call load_state_dict()"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the inner optimizer, the settings and the rounds."""
        keep = [
            "inner",
            "_rule",
            "_settings",
            "_members",
            "_state_copies",
            "_parts",
            "_communicator",
            "_levels",
            "_overwritten",
        ]
        self._master_weights.follow()
        kept = {name: self.__dict__[name] for name in keep}
        return {**kept, "saved": checkpoint.save(self.calls)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the engine around the copied parameters, without talking to anybody."""
        rounds = state.pop("saved")
        super().__init__([{"params": []}], state["inner"].defaults)
        self.__dict__.update(state)
        self._watch = Watch(self.inner, self._members[0], self._settings.modules)
        self._build()
        self._master_weights.look()
        self.calls.load_state_dict(rounds)

    # ---- what stays the inner optimizer's ---------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the anchors were cut at construction.

        Raises:
            ValueError: always, once the optimizer is made.
        """
        params = param_group["params"]
        if not isinstance(params, list) or params:
            raise ValueError(
                "the parameters of a distoptim optimizer are fixed at construction; make a new one"
            )

    def train(self) -> None:
        """Tell the inner optimizer that training goes on; for those that have train(), else nothing.

        Schedule-free ones put the weights in the parameters at which gradients are taken.
        """
        self._switch("train")

    def eval(self) -> None:
        """Tell the inner optimizer that parameters are evaluated; for those that have eval().

        Within, `averaged()` is the mean of the weights to be evaluated.
        """
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        tell = getattr(self.inner, mode, None)
        if callable(tell):
            tell()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.inner.zero_grad(set_to_none)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's own, so that schedulers work in any order."""
        return self.inner.param_groups if "inner" in self.__dict__ else []

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        # torch's constructor sets them before there is an inner optimizer.
        if "inner" in self.__dict__:
            self.inner.param_groups = value

    @property
    def state(self) -> Any:
        """The inner optimizer's own."""
        return self.inner.state if "inner" in self.__dict__ else {}

    @state.setter
    def state(self, value: Any) -> None:
        if "inner" in self.__dict__:
            self.inner.state = value


def averaged(
    model: torch.nn.Module, *optimizers: AveragingOptimizer
) -> contextlib.AbstractContextManager[None]:
    """`AveragingOptimizer.averaged` of a model of which several optimizers train a part each.

    Args:
        model: that is trained.
        optimizers: one or more, over the same workers, in any order.

    Raises:
        ValueError: as there; optimizers over other numbers of workers, or none.
    """
    return evaluation.averaged(_calls("averaged", model, optimizers), model)


def consolidate(model: torch.nn.Module, *optimizers: AveragingOptimizer) -> None:
    """`AveragingOptimizer.consolidate` of a model of which several optimizers train a part each.

    Args:
        model: that is trained.
        optimizers: one or more, over the same workers, in any order.

    Raises:
        ValueError: as `averaged`.
    """
    evaluation.consolidate(_calls("consolidate", model, optimizers), model)


def _calls(
    call: str, model: torch.nn.Module, optimizers: Sequence[AveragingOptimizer]
) -> list[Calls]:
    if not optimizers or not all(isinstance(o, AveragingOptimizer) for o in optimizers):
        raise ValueError(
            f"{call}(model, *{list(optimizers)}): allowed are one or more optimizers of distoptim"
        )
    sizes = [o.engine.communicator.size for o in optimizers]
    if len(set(sizes)) > 1:
        raise ValueError(f"{call}(): optimizers over {sizes} workers; allowed are the same ones")
    # Their means go one after the other, so that all workers have to have one order: the model's.
    order = {id(p): i for i, p in enumerate(model.parameters())}
    return sorted(
        (o.calls for o in optimizers),
        key=lambda calls: min(
            order.get(id(p), len(order)) for s in calls.engine.syncs for p in s.fragment.params
        ),
    )


def _fit(rule: Rule | Callable[[int], Rule], settings: SyncSettings) -> Rule:
    """The rule for so many workers; whether its momentum bears the codec's residuals is looked at."""
    # Asked for every rule, since it also refuses workers that would each train alone.
    workers = settings.workers()
    made = rule if isinstance(rule, Rule) else rule(workers)
    momentum = made.facts().get("outer_momentum", 0.0)
    if isinstance(settings.coding, ErrorFeedback) and isinstance(momentum, float):
        _look_for_swings(settings.coding, momentum)
    return made


def _look_for_swings(coding: ErrorFeedback, momentum: float) -> None:
    """Warn where what a codec keeps comes too late for a momentum of the means."""
    bits = 8 * coding.codec.nbytes(_MANY) / _MANY
    if bits > _FEW_BITS or momentum < _STRONG or coding.decay <= _BEARABLE:
        return
    warnings.warn(
        f"{coding!r} under an outer momentum of {momentum:g}: what so few bits lose comes too late, "
        'and long runs may leave the minimum; let it decay (codec="2bit+ef0.7"), or take "e3m0+ef"',
        RuntimeWarning,
        stacklevel=6,
    )


@torch.no_grad()
def _fingerprint(fragments: Sequence[Fragment]) -> int:
    """Of the parameters as they are now."""
    return sum(fragment.fingerprint() for fragment in fragments)


def _first_parameters(modules: Sequence[torch.nn.Module], members: Sequence[Tensor]) -> list[int]:
    """Of several modules, each one's first parameter among those that are averaged; -1 where it has none."""
    if len(modules) < 2:
        return []
    index = {id(p): i for i, p in enumerate(members)}
    return [
        min((index[id(p)] for p in m.parameters() if id(p) in index), default=-1) for m in modules
    ]


def _untrained(
    modules: Sequence[torch.nn.Module], inner: torch.optim.Optimizer, members: Sequence[Tensor]
) -> dict[str, Tensor]:
    """By name, the buffers and frozen parameters, which are to be equal at the start too.

    Raises:
        ValueError: the modules hold none of these.
    """
    own = {id(p) for p in members}
    theirs = {id(p) for module in modules for p in module.parameters()}
    if theirs and not theirs & own:
        raise ValueError(
            f"module={type(modules[0]).__name__}: none of its parameters is this optimizer's; allowed "
            "is the module that is trained"
        )
    parts = parts_of(modules, own)
    handed = {
        f"param_groups[{k}]['params'][{i}]": p
        for k, group in enumerate(inner.param_groups)
        for i, p in enumerate(group["params"])
        if id(p) not in own and id(p) not in theirs
    }
    untrained = {**parts.statistics, **parts.equal, **handed}
    for name, value in untrained.items():
        if is_fsdp1(value):
            raise ValueError(f"cannot make {name!r} equal: {unfit(value)}")
    return untrained


# As __init_subclass__ does for others.
AveragingOptimizer.__signature__ = whole_signature(AveragingOptimizer.__init__)  # type: ignore[attr-defined]  # inspect's


def average_together(
    optimizers: Sequence[AveragingOptimizer],
    *,
    losses: Sequence[Tensor | float] | None = None,
    samples: Sequence[float | None] | None = None,
    before_launch: Callable[[], object] | None = None,
) -> None:
    """`average()` of several virtual workers of one process, in lockstep.

    Called one after the other they would wait for each other for ever.

    Args:
        optimizers: of all workers, without levels.
        losses: of this step, worker by worker, for a period that follows them.
        samples: of this step, worker by worker.
        before_launch: called between merges and launches.

    Raises:
        CommunicationError: as `AveragingOptimizer.average`.
    """
    engines = [optimizer.engine for optimizer in optimizers]
    for engine, loss in zip(engines, losses or (), strict=False):
        engine.clock.report(loss)
    for engine, count in zip(engines, samples or len(engines) * [None], strict=False):
        engine.weights.report(count)
    tick_together(engines, before_launch=before_launch)
