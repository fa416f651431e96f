"""Virtual workers: this process holds all of them, on a virtual clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from distoptim.comm import Communicator
from distoptim.optimizer import AveragingOptimizer
from distoptim.simulator.cluster import Cluster
from distoptim_experiments import optimizers, records
from distoptim_experiments.config import DTYPES, POWERSGD, SYNCHRONOUS, RunConfig
from distoptim_experiments.machines import Machines
from distoptim_experiments.training import checkpoint
from distoptim_experiments.training.evaluation import goes_on, score, worker_accuracy
from distoptim_experiments.training.loop import Observer, Run
from distoptim_experiments.training.low_rank import LowRankMean
from distoptim_experiments.training.methods.base import Costs, batch_loss
from distoptim_experiments.training.problem import Problem
from distoptim_experiments.training.workers import Workers
from distoptim_experiments.training.world import Seat


def check_virtual(config: RunConfig, machines: Machines | None = None) -> None:
    """Whether virtual workers can make a run, on these machines.

    Raises:
        ValueError: something of it exists with real workers only, or nobody could go on without one that is
            lost.
    """
    if machines is not None and machines.churns(seed=0) is not None and config.synchronous:
        raise ValueError(
            f"{config.algorithm} on machines that come and go (churn, lose_every_s): allowed is a method "
            "with rounds"
        )
    if config.slowdown != "none":
        raise ValueError(
            f"slowdown={config.slowdown!r} is for real workers; virtual ones have that of Machines"
        )
    for name in ("latency_ms", "bandwidth_gbit_s"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name}={getattr(config, name)!r} emulates a link between real workers; virtual ones "
                "have that of Machines"
            )
    if config.levels:
        raise ValueError(
            f"levels={config.levels!r}: virtual workers are in no process group that could be a part; "
            "use `distoptim train` or `compare`"
        )
    if config.island_size > 1:
        raise ValueError(
            f"island_size={config.island_size}: a virtual worker is one machine; use "
            "`distoptim train` or `compare`"
        )


@final
class Virtual(Workers):
    """All workers of a run.

    "ddp" averages the gradients before every step, and runs as Local SGD with tau = 1 on the clock:
    its messages are as large, and parameters that are equal stay so. It does not overlap with the
    backward pass. "powersgd" is the same with low-rank gradients; for the clock its messages are as large as
    ddp's.

    Where machines come and go, those that are there deal the training set out anew whenever that changes,
    as `ElasticWorker` does.

    Args:
        problem: what is learned.
        machines: the virtual machines.
        threads: workers computed at the same time; default one per processor core.

    Attributes:
        cluster: the workers.

    Raises:
        ValueError: see `check_virtual`.
    """

    def __init__(self, problem: Problem, machines: Machines, *, threads: int | None = None) -> None:
        config = problem.config
        check_virtual(config, machines)
        self.problem = problem
        self.seat = Seat(workers=config.workers, virtual=True)
        self.machines = machines
        self._low_rank = _low_rank(config)
        self._batches = [problem.batches(worker) for worker in range(config.workers)]
        self.cluster = Cluster(
            workers=config.workers,
            model=problem.model,
            optimizer=self._optimizer,
            threads=threads,
            synchronous=self._low_rank or config.algorithm == SYNCHRONOUS,
            compute=machines.compute(seed=config.seed),
            network=machines.network(),
            churn=machines.churns(seed=config.seed),
            heartbeat_s=machines.heartbeat_s,
        )
        # To whom, when, and of what generation the training set was dealt out.
        self._dealt = (list(range(config.workers)), 0, 0)
        # Of what has happened to the members, so much is in the record.
        self._told = 0

    def _deal(self, members: Sequence[int], turn: int, generation: int) -> None:
        self._dealt = (list(members), turn, generation)
        for index, worker in enumerate(members):
            self._batches[worker] = self.problem.batches(index, of=len(members), turn=turn)

    def _optimizer(
        self, params: Iterable[Tensor], communicator: Communicator
    ) -> AveragingOptimizer:
        config = self.problem.config
        if config.synchronous:
            config = config.replace(algorithm="local-sgd", tau=1, options={})
        optimizer = optimizers.build(config, params, communicator=communicator)
        assert isinstance(optimizer, AveragingOptimizer)
        return optimizer

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Rank by rank, since all are in this process."""
        return self.cluster.optimizers

    @property
    def parameters(self) -> int:
        """Numbers in one worker's model."""
        return sum(p.numel() for p in self.cluster.models[0].parameters())

    def begin(self) -> None:
        """Virtual workers begin together by themselves."""

    def step(self, step: int) -> Sequence[float]:
        """Of all workers, in lockstep; a whole round of equal time, if there are such."""
        membership = self.cluster.membership
        if membership is not None and membership.generation != self._dealt[-1]:
            self._deal(membership.present, self.cluster.steps, membership.generation)
        losses = self.cluster.step(self._loss)
        if self.problem.config.equal_time:
            while self.cluster.optimizers[0].rounds <= step:
                losses += self.cluster.step(self._loss)
        return losses

    def _loss(self, model: nn.Module, worker: int) -> Any:
        dtype = DTYPES[self.problem.config.dtype]
        return batch_loss(model, *next(self._batches[worker]), dtype)

    def seconds(self) -> float:
        """By the virtual clock of the last worker."""
        return self.cluster.seconds()

    def evaluate(self) -> dict[str, float]:
        """Takes no virtual time."""
        there = [self.cluster.models[worker] for worker in self.cluster.present]
        own = [worker_accuracy(model, self.problem.data) for model in there]
        return {
            **score(self.cluster.mean_model(), self.problem.data),
            "worker_accuracy": sum(own) / len(own),
        }

    def verdict(self, losses: Sequence[float]) -> int:
        """There is no vote: all losses are here, and signals are this process's own affair."""
        if not goes_on(losses):
            raise FloatingPointError("no worker's loss is finite")
        return 0

    def so_far(self) -> dict[str, float | None]:
        """Of all workers."""
        totals = self.totals()
        costs = Costs(exposed_s=totals["exposed_s"])
        return {
            "exposed_share": costs.exposed_share(totals["seconds"]),
            "tau": totals.get("tau"),
        }

    def totals(self) -> dict[str, Any]:
        """Means over the workers, by their virtual clocks."""
        stats = self.cluster.stats()
        rounds = {name: stats[name] for name in ("tau", "staleness", "quarantined")}
        return {
            "seconds": stats["seconds"],
            "exposed_s": stats["exposed_s"],
            # What the optimizer measures is this computer's time; no virtual worker's clock moves.
            "overhead_s": 0.0,
            "hidden_s": stats["hidden_s"],
            "bytes": self._low_rank.nbytes if self._low_rank else int(stats["bytes"]),
            "syncs": int(stats["syncs"]),
            **({} if self.problem.config.synchronous else rounds),
        }

    def events(self) -> list[records.Line]:
        """What has happened to the members since this was asked last; times are virtual."""
        membership = self.cluster.membership
        if membership is None:
            return []
        new = membership.happened[self._told :]
        self._told += len(new)
        return [
            records.Membership(
                step=self.cluster.steps,
                time=change.seconds,
                what=change.what,
                worker=str(change.worker),
                why="as planned",
                members=[str(worker) for worker in membership.present],
            )
            for change in new
        ]

    def barrier(self) -> None:
        """Nothing to wait for: no other process takes part."""

    def state_dict(self) -> dict[str, Any]:
        """Of all workers; takes no virtual time."""
        return {
            "cluster": self.cluster.state_dict(),
            "batches": [batches.state_dict() for batches in self._batches],
            "dealt": self._dealt,
            **({"low_rank": self._low_rank.state_dict()} if self._low_rank else {}),
        }

    def load_state_dict(self, state_dict: dict[str, Any], *, own: bool) -> None:
        """Of as many workers.

        Raises:
            ValueError: there were more or fewer.
        """
        if not own:
            raise ValueError(
                f"workers={self.seat.workers}: the checkpoint is of another number of virtual workers"
            )
        self.cluster.load_state_dict(state_dict["cluster"])
        if self._low_rank:
            self._low_rank.load_state_dict(state_dict["low_rank"])
        dealt = state_dict.get("dealt", self._dealt)
        if tuple(dealt) != self._dealt:
            self._deal(*dealt)
        for batches, saved in zip(self._batches, state_dict["batches"], strict=True):
            batches.load_state_dict(saved)

    def close(self) -> None:
        """End the files that the optimizers write."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, AveragingOptimizer):
                optimizer.close()


def _low_rank(config: RunConfig) -> LowRankMean | None:
    if config.algorithm != POWERSGD:
        return None
    return LowRankMean(rank=int(config.options.get("approximation_rank", 1)), seed=config.seed)


def run(
    config: RunConfig,
    machines: Machines,
    folder: Path,
    *,
    label: str | None = None,
    observers: Iterable[Observer] = (),
    threads: int | None = None,
) -> None:
    """Run and record. Killed, it goes on at the last checkpoint; no checkpoint is left at the end.

    Args:
        config: the run.
        machines: the virtual machines.
        folder: for the record.
        label: the run's name in tables; default its algorithm.
        observers: get every line too.
        threads: workers computed at the same time; default one per processor core.
    """
    check_virtual(config, machines)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = Run(
        Virtual(Problem(config, device=device), machines, threads=threads),
        folder,
        label=label,
        observers=observers,
        resume=checkpoint.exists(folder),
        keep_checkpoint=False,
    )
    made.train()
    made.close()
