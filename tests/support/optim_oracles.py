"""The equations of the optimizers in plain torch, one tensor at a time, written without the library."""

import math

import torch
from torch import nn

from hf_rezero.optim import LAMB, LARS, Muon, RAdam, Ranger, RangerLARS, centralize_gradients, lookahead


def centralized(g, output_dim=0):
    """Yong et al. 2020, equation 1: each output unit's gradient loses its mean."""
    units = [unit - unit.mean() for unit in g.unbind(output_dim)]
    return torch.stack(units, output_dim)


def rectification(t, beta2):
    """r_t of Liu et al. 2020, algorithm 2; None where the variance is intractable."""
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho <= 5:
        return None
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


def moments(g, s, h):
    """m, v and their corrections 1 - b^t."""
    beta1, beta2 = h["betas"]
    s["exp_avg"] = beta1 * s.get("exp_avg", 0) + (1 - beta1) * g
    s["exp_avg_sq"] = beta2 * s.get("exp_avg_sq", 0) + (1 - beta2) * g**2
    return s["exp_avg"], s["exp_avg_sq"], 1 - beta1 ** s["step"], 1 - beta2 ** s["step"]


def adam_update(g, s, h):
    m, v, correction1, correction2 = moments(g, s, h)
    return (m / correction1) / ((v / correction2).sqrt() + h["eps"])


def adamw(p, g, s, h):
    return p - h["lr"] * h["weight_decay"] * p - h["lr"] * adam_update(g, s, h)


def radam(p, g, s, h):
    m, v, correction1, correction2 = moments(g, s, h)
    r = rectification(s["step"], h["betas"][1])
    if r is None and not h.get("degenerated_to_sgd", True):
        return p
    p = p - h["lr"] * h["weight_decay"] * p
    if r is None:
        return p - h["lr"] * m / correction1
    return p - h["lr"] * r * math.sqrt(correction2) / correction1 * m / (v.sqrt() + h["eps"])


def lamb(p, g, s, h, r=1.0):
    u = adam_update(g, s, h)
    if p.ndim < 2:
        return p - h["lr"] * r * u
    u = u + h["weight_decay"] * p
    ratio = p.norm() / u.norm() if p.norm() > 0 and u.norm() > 0 else 1.0
    return p - h["lr"] * r * ratio * u


def ranger_lars(p, g, s, h):
    return lamb(p, g, s, h, rectification(s["step"], h["betas"][1]) or 0.0)


def sgd(p, g, s, h):
    """torch.optim.SGD."""
    g = g + h["weight_decay"] * p
    if h["momentum"]:
        s["momentum_buffer"] = h["momentum"] * s.get("momentum_buffer", 0) + g
        g = s["momentum_buffer"]
    return p - h["lr"] * g


def lars(p, g, s, h):
    """You et al. 2017, algorithm 1, with the clip of LARC and the momentum of Nesterov."""
    lr, wd = h["lr"], h["weight_decay"]
    if p.ndim < 2:
        ratio, wd = 1.0, 0.0
    elif p.norm() == 0 or g.norm() == 0:
        ratio = 1.0
    else:
        ratio = h["trust_coefficient"] * p.norm() / (g.norm() + wd * p.norm())
        if h["clip"]:
            ratio = min(ratio / lr, 1.0)
    step = lr * ratio * (g + wd * p)
    u = s["momentum_buffer"] = h["momentum"] * s.get("momentum_buffer", 0) + step
    return p - (step + h["momentum"] * u if h["nesterov"] else u)


def outer_step(fast, s, h):
    """Lookahead, and SNOO with `outer_momentum`: Nesterov momentum along slow - fast."""
    mu, pull = h.get("outer_momentum", 0.0), s["slow"] - fast
    if mu:
        s["slow_momentum"] = mu * s.get("slow_momentum", 0) + pull
        pull = mu * s["slow_momentum"] + pull
    s["slow"] = s["slow"] - h["alpha"] * pull
    return s["slow"]


class Oracle:
    """`rule` for tensors one at a time, in fp64; `k` in the options puts Lookahead around it."""

    def __init__(self, groups, rule, **options):
        self.rule = rule
        self.groups = []
        for group in groups:
            params = [p.detach().double().clone() for p in group["params"]]
            self.groups.append(options | group | {"params": params, "states": [{} for _ in params], "count": 0})

    def step(self, grads):
        """One step on the gradients, a list for each group with None where there is none."""
        for h, gs in zip(self.groups, grads, strict=True):
            for i, g in enumerate(gs):
                if g is not None:
                    h["params"][i] = self.update(h["params"][i], g, h["states"][i], h)
            h["count"] += 1
            if "k" in h and h["count"] % h["k"] == 0:
                for i, s in enumerate(h["states"]):
                    if "slow" in s:
                        h["params"][i] = outer_step(h["params"][i], s, h)

    def update(self, p, g, s, h):
        if not s:
            s["step"] = 0
            if "k" in h:
                s["slow"] = p
        s["step"] += 1
        least = 3 if h.get("conv_only") else 2
        if h.get("centralize") and h.get("output_dim", 0) is not None and p.ndim >= least:
            g = centralized(g, h.get("output_dim", 0))
        return self.rule(p, g, s, h)


def follow(optimizer, oracle, steps=24, rtol=1e-9, atol=1e-10, absent=lambda t, i: False, after_step=None):
    """Take the steps on random gradients with both, and compare parameters and state after each.

    `absent` says at which step t the i-th parameter has no gradient. The learning rates are the optimizer's.
    """
    random = torch.Generator().manual_seed(1)
    for t in range(steps):
        count = 0
        for group, h in zip(optimizer.param_groups, oracle.groups, strict=True):
            h["lr"] = group["lr"]
            for p in group["params"]:
                g = torch.randn(p.shape, dtype=torch.float64, generator=random) * 1.3 ** (t % 5)
                p.grad = None if absent(t, count) else g.to(p.dtype)
                count += 1
        grads = [[None if p.grad is None else p.grad.double() for p in g["params"]] for g in optimizer.param_groups]
        optimizer.step()
        oracle.step(grads)
        compare(optimizer, oracle, f"after step {t + 1}", rtol, atol)
        if after_step:
            after_step()


def compare(optimizer, oracle, when, rtol, atol):
    for i, (group, h) in enumerate(zip(optimizer.param_groups, oracle.groups, strict=True)):
        for j, (p, expected, s) in enumerate(zip(group["params"], h["params"], h["states"], strict=True)):
            where = f"parameter {j} of group {i}, {tuple(p.shape)}, {when}"
            state = optimizer.state.get(p, {})
            names = s.keys() - ({"step"} if oracle.rule is sgd else set())  # torch's SGD counts nothing
            assert state.keys() == names, where
            pairs = {"itself": (p.detach(), expected)} | {name: (state[name], s[name]) for name in names}
            for name, (a, b) in pairs.items():
                a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
                if a.shape != b.shape or not torch.allclose(a, b, rtol, atol):  # as assert_close, but fast
                    raise AssertionError(f"{name} of {where}: {a}, the equation gives {b}")


SHAPES = [(4, 3), (5, 2, 3, 3), (3,), (1,), (3, 6)]


def two_groups(dtype=torch.float64, lr=(0.03, 0.1), weight_decay=(0.1, 0.0)):
    """Two groups of matrices, convolutions, a vector, and a gate and a matrix of zeros, with their own rates."""
    random = torch.Generator().manual_seed(0)
    groups = []
    for rate, wd, dim in zip(lr, weight_decay, (0, 1), strict=True):
        params = [nn.Parameter(torch.randn(s, generator=random, dtype=torch.float64).to(dtype)) for s in SHAPES]
        for p in params[3:]:
            nn.init.zeros_(p)
        groups.append({"params": params, "lr": rate, "weight_decay": wd, "output_dim": dim})
    return groups


def matrices(params):
    """Muon takes nothing else."""
    return [p for p in params if p.ndim == 2]


# Every optimizer of the library, and the generic parts over several of torch: from parameters or groups, and a rate.
EVERY = {
    "radam": lambda params, lr=0.01: RAdam(params, lr=lr, weight_decay=0.1),
    "ranger": lambda params, lr=0.01: Ranger(params, lr=lr, weight_decay=0.1),
    "lars": lambda params, lr=0.01: LARS(params, lr=lr, weight_decay=0.1, trust_coefficient=0.5),
    "larc": lambda params, lr=0.01: LARS(params, lr=lr, trust_coefficient=0.02, clip=True, nesterov=True),
    "ranger_lars": lambda params, lr=0.01: RangerLARS(params, lr=lr, weight_decay=0.1),
    "lamb": lambda params, lr=0.01: LAMB(params, lr=lr, weight_decay=0.1),
    "muon": lambda params, lr=0.01: Muon(params, lr=lr, weight_decay=0.1),
    "lookahead+adamw_fused": lambda params, lr=0.01: lookahead(torch.optim.AdamW(params, lr=lr, fused=True)),
    "lookahead+adamw_foreach": lambda params, lr=0.01: lookahead(torch.optim.AdamW(params, lr=lr, foreach=True)),
    "lookahead+sgd": lambda params, lr=0.01: lookahead(torch.optim.SGD(params, lr=lr, momentum=0.9)),
    "lookahead+adafactor": lambda params, lr=0.01: lookahead(torch.optim.Adafactor(params, lr=lr)),
    "lookahead+torch_muon": lambda params, lr=0.01: lookahead(torch.optim.Muon(matrices(params), lr=lr)),
    "snoo+adamw": lambda params, lr=0.01: lookahead(torch.optim.AdamW(params, lr=lr), k=3, alpha=0.7, momentum=0.5),
    "snoo+torch_muon": lambda params, lr=0.01: lookahead(torch.optim.Muon(matrices(params), lr=lr), k=3, momentum=0.5),
    "gc+sgd": lambda params, lr=0.01: centralize_gradients(torch.optim.SGD(params, lr=lr)),
    "gc+lookahead+radam": lambda params, lr=0.01: lookahead(centralize_gradients(RAdam(params, lr=lr)), k=6),
}


class Net(nn.Module):
    """x + resweight tanh(W x + b), then a head; `late` joins when it is told to, `never` does not."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)
        self.resweight = nn.Parameter(torch.zeros(1))
        self.late, self.never = nn.Parameter(torch.ones(6, 6)), nn.Parameter(torch.ones(2))
        self.to(dtype)

    def forward(self, x, late=False):
        x = x + self.resweight * self.body(x).tanh()
        return self.head(x @ self.late if late else x)

    def loss(self, t):
        """The loss on the t-th batch; `late` takes part from the 11th on."""
        random = torch.Generator().manual_seed(t)
        x = torch.randn(8, 6, generator=random).to(self.resweight.dtype)
        return (self(x, late=t > 10) - x[:, :3].sin()).pow(2).mean()


def train(net, optimizer, batches):
    """Steps on the batches of these numbers; their losses."""
    losses = []
    for t in batches:
        optimizer.zero_grad()
        loss = net.loss(t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_state(actual, expected):
    """Equality to the bit, with the types, of two state dicts of optimizers."""
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for key, entry in expected["state"].items():
        assert actual["state"][key].keys() == entry.keys()
        for name, value in entry.items():
            other = actual["state"][key][name]
            if isinstance(value, torch.Tensor):
                assert other.dtype == value.dtype and torch.equal(other, value), name
            else:
                assert type(other) is type(value) and other == value, name
