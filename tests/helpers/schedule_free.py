"""Schedule-free SGD (Defazio et al. 2024, arXiv 2405.15682), which keeps y in the parameters, z in its state."""

from __future__ import annotations

import torch


class ScheduleFreeSGD(torch.optim.Optimizer):
    """z <- z - lr g(y); x <- (1 - 1/k) x + z/k; y <- (1 - beta) z + beta x.

    With `explicit`, x is kept in the state too, as the equations have it, instead of y's moving without.
    """

    def __init__(self, params, *, lr=0.1, beta=0.9, explicit=False):
        super().__init__(
            params, {"lr": lr, "beta": beta, "k": 0, "training": True, "explicit": explicit}
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for y in group["params"]:
                self._step(y, group)

    def _step(self, y, group):
        state = self.state[y]
        if not state:
            state["z"] = y.detach().clone()
            if group["explicit"]:
                state["x"] = y.detach().clone()
        z, lr, beta, c = state["z"], group["lr"], group["beta"], 1 / group["k"]
        if group["explicit"]:
            z.sub_(y.grad, alpha=lr)
            state["x"].lerp_(z, c)
            y.copy_((1 - beta) * z + beta * state["x"])
        else:
            y.lerp_(z, c).add_(y.grad, alpha=lr * (beta * (1 - c) - 1))
            z.sub_(y.grad, alpha=lr)

    def eval(self):
        """Parameters <- x."""
        self._to(False, lambda beta: 1 - 1 / beta)

    def train(self):
        """Parameters <- y."""
        self._to(True, lambda beta: 1 - beta)

    @torch.no_grad()
    def _to(self, training, weight):
        for group in self.param_groups:
            if group["training"] != training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight(group["beta"]))
                group["training"] = training
