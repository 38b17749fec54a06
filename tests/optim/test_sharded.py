"""Two FSDP2 ranks with uneven shards equal one process; FSDP1 is refused where it would be silently wrong."""

import copy
import traceback
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch import nn

from hf_rezero import LAMB, LARS, Muon, RAdam, Ranger, RangerLARS, centralize_gradients, lookahead, param_groups


pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
SHARDED = {
    "radam": lambda groups: RAdam(groups, lr=0.01),
    "radam, foreach": lambda groups: RAdam(groups, lr=0.01, fused=False),
    "ranger": lambda groups: Ranger(groups, lr=0.01, k=4),
    "ranger, foreach": lambda groups: Ranger(groups, lr=0.01, k=4, fused=False),
    "lars": lambda groups: LARS(groups, lr=0.1, trust_coefficient=0.1),
    "larc, nesterov": lambda groups: LARS(groups, lr=0.1, trust_coefficient=0.1, clip=True, nesterov=True),
    "ranger_lars": lambda groups: RangerLARS(groups, lr=0.1, k=4),
    "lamb": lambda groups: LAMB(groups, lr=0.02),
    "muon": lambda groups: Muon(groups, lr=0.02),
    "lookahead+adamw fused": lambda groups: lookahead(torch.optim.AdamW(groups, lr=0.01, fused=True), k=4),
    "snoo+adamw": lambda groups: lookahead(torch.optim.AdamW(groups, lr=0.01, foreach=True), k=4, momentum=0.5),
    "gc+sgd": lambda groups: centralize_gradients(torch.optim.SGD(groups, lr=0.1, momentum=0.9)),
}
STEPS, STOP = 9, 6


class Transposed(nn.Module):
    """Weight (in, out), so that centralisation goes along the sharded dimension."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.3)

    def forward(self, x):
        return x @ self.weight


Transposed.__name__ = "Conv1D"  # by which param_groups knows it


class Small(nn.Module):
    """5 and 3 rows on two ranks, a gate that one of them has nothing of, a convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv1d(1, 3, 3, padding=1), nn.Linear(12, 5)
        self.across, self.down = Transposed(5, 7), nn.Linear(7, 3)
        self.resweight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x = x + self.resweight * self.conv(x.unsqueeze(1)).mean(1)
        return self.down(self.across(self.up(x).tanh()))


def build(name, shard=None):
    torch.manual_seed(0)
    model = Small()
    if shard:
        shard(model)
    return model, SHARDED[name](param_groups(model, weight_decay=0.05))


def step(model, optimizer, t):
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(t))
    optimizer.zero_grad()
    (model(x) - x[:, :3].sin()).pow(2).mean().backward()
    optimizer.step()


def whole(model):
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in model.named_parameters()
    }


def compare_with_one_process(name):
    from torch.distributed.checkpoint import state_dict as dcp
    from torch.distributed.fsdp import fully_shard

    reference, optimizer = build(name)
    initial = whole(reference)
    for t in range(STEPS):
        step(reference, optimizer, t)
    model, optimizer = build(name, fully_shard)
    for t in range(STOP):
        step(model, optimizer, t)
    weights, state = copy.deepcopy((dcp.get_model_state_dict(model), dcp.get_optimizer_state_dict(model, optimizer)))
    for t in range(STOP, STEPS):
        step(model, optimizer, t)
    for key, value in whole(model).items():
        torch.testing.assert_close(value, whole(reference)[key], rtol=1e-5, atol=1e-6, msg=lambda m: f"{key}: {m}")  # noqa: B023
        assert not torch.equal(value, initial[key]), f"{key} has not moved"

    resumed, second = build(name, fully_shard)
    dcp.set_model_state_dict(resumed, weights)
    dcp.set_optimizer_state_dict(resumed, second, state)
    for t in range(STOP, STEPS):
        step(resumed, second, t)
    for key, value in whole(model).items():
        assert torch.equal(whole(resumed)[key], value), f"{key} is another after the resume"


def ignored_parameters():
    """A group with sharded and plain tensors."""
    from torch.distributed.fsdp import fully_shard

    for make in (Ranger, LARS, LAMB, Muon):
        torch.manual_seed(0)
        model = Small()
        fully_shard(model, ignored_params={model.down.weight})
        optimizer = make(model.parameters(), lr=0.01)
        for t in range(7):
            step(model, optimizer, t)


def worker(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    checks = {name: lambda name=name: compare_with_one_process(name) for name in SHARDED}
    checks |= {"ignored parameters": ignored_parameters, "fsdp1": fsdp1}
    failures = {}
    try:
        for name, check in checks.items():
            try:
                check()
                failures[name] = None
            except Exception:
                failures[name] = traceback.format_exc()
            dist.barrier()
    finally:
        torch.save(failures, f"{folder}/{rank}.pt")
        dist.destroy_process_group()


def fsdp1():
    """Both forms of FSDP1, each rank by itself."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    alone, _ = dist.new_subgroups(group_size=1)
    for use_orig_params in (False, True):
        model = FSDP(Small(), alone, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        makers = {"Ranger": Ranger, "RangerLARS": RangerLARS, "LARS": LARS, "LAMB": LAMB, "Muon": Muon}
        makers["gradient centralisation"] = lambda p, lr: centralize_gradients(torch.optim.SGD(p, lr=lr))
        for technique, make in makers.items():
            with pytest.raises(ValueError, match=f"{technique} needs whole weight matrices.*FSDP2"):
                make(list(model.parameters()), lr=0.1)
        for optimizer in (RAdam(model.parameters()), lookahead(torch.optim.AdamW(model.parameters()), k=2)):
            before = [p.detach().clone() for p in model.parameters()]
            for t in range(3):
                step(model, optimizer, t)
            assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What every rank found, by check; one start of the processes for all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    return {name: [first[name], second[name]] for name in first}


@pytest.mark.parametrize("name", SHARDED)
def test_two_ranks_equal_one_process_and_resume_to_the_bit(name, outcomes):
    assert outcomes[name] == [None, None], "\n".join(filter(None, outcomes[name]))


def test_groups_of_sharded_and_plain_tensors(outcomes):
    assert outcomes["ignored parameters"] == [None, None], "\n".join(filter(None, outcomes["ignored parameters"]))


def test_fsdp1_is_refused_where_matrices_are_needed(outcomes):
    assert outcomes["fsdp1"] == [None, None], "\n".join(filter(None, outcomes["fsdp1"]))
