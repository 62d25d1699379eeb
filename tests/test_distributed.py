"""Two processes (gloo, CPU) give the loss and gradients of one process with the whole batch.

The network is the script's own, in training mode as far as Deep Augmentation goes, but with its BatchNorm in eval
mode: statistics of the whole batch would need SyncBatchNorm, which exists on CUDA only. tests/gpu covers that.
"""
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import simclr_deepaug as S

WORLD, B = 2, 6                                                      # processes, pictures in each


def network(stop_grad, seed=0):
    a = S.settings(["--layer", "2", "6", "--rate", "0.4", "--stop-grad" if stop_grad else "--no-stop-grad"])
    torch.manual_seed(seed)
    net = S.Net(a, 32, torch.full((3,), 0.5), torch.full((3,), 0.25)).train()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    return net


def batch(rank):
    """(first and second views of the pictures that this process gets [2B, 3, 32, 32], rows to augment [2B])"""
    g = torch.Generator().manual_seed(10 + rank)
    return torch.rand(2 * B, 3, 32, 32, generator=g), torch.rand(2 * B, generator=g) < 0.5


def forward(net, rank):
    views, rows = batch(rank)
    torch.manual_seed(20 + rank)                                     # the same dropout masks wherever it runs
    return net(views, rows)                                          # [2B, 128]


def worker(rank, folder):
    """One of the processes: loss and gradients of the script's network, then of bare embeddings and of gather."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        result = {}
        for stop_grad in (True, False):
            net = network(stop_grad, seed=rank)                      # DistributedDataParallel sends rank 0's weights
            model = torch.nn.parallel.DistributedDataParallel(net)
            loss = S.nt_xent(*forward(model, rank).chunk(2), 0.5)
            loss.backward()
            result[stop_grad] = loss.detach(), {k: p.grad for k, p in net.named_parameters()}
        z = torch.randn(2, B, 16, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        loss = S.nt_xent(*z, 0.2)
        loss.backward()
        result["embeddings"] = loss.detach(), z.grad
        x = torch.full((2, 3), float(rank), requires_grad=True)
        rows = S.gather(x)
        (rows * torch.arange(12.0).view(4, 3) * (rank + 1)).sum().backward()
        result["gather"] = rows.detach(), x.grad
        torch.save(result, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process saved."""
    folder = str(tmp_path_factory.mktemp("two"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simclr_deepaug", "cka"])
    children = [context.Process(target=worker, args=(rank, folder)) for rank in range(WORLD)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(WORLD)]


def slow_nt_xent(z1, z2, temperature):
    """SimCLR's Algorithm 1 with loops: every view against its partner and the 2N - 2 views of other pictures."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    n, total = len(z1), 0
    for i in range(2 * n):
        others = torch.stack([z[i] @ z[j] / temperature for j in range(2 * n) if j != i])
        total = total + torch.logsumexp(others, 0) - z[i] @ z[(i + n) % (2 * n)] / temperature
    return total / (2 * n)


@pytest.mark.parametrize("stop_grad", [True, False])
def test_two_processes_give_the_loss_and_gradients_of_one(results, stop_grad):
    """The mean loss over processes and DDP's averaged gradients equal one process's on the whole batch."""
    net = network(stop_grad)
    halves = [forward(net, rank).chunk(2) for rank in range(WORLD)]
    loss = slow_nt_xent(torch.cat([h[0] for h in halves]), torch.cat([h[1] for h in halves]), 0.5)
    loss.backward()
    assert sum(r[stop_grad][0] for r in results).item() / WORLD == pytest.approx(loss.item(), abs=1e-6)
    for k, p in net.named_parameters():
        assert p.grad.abs().max() > 0, k
        for r in results:
            torch.testing.assert_close(r[stop_grad][1][k], p.grad, atol=1e-6, rtol=1e-5, msg=lambda m, k=k: f"{k}: {m}")


def test_stop_gradient_matters_in_this_comparison(results):
    """Below the layer the two kinds differ, so the test above would notice a lost detach; above they agree in loss."""
    with_stop, without = results[0][True][1], results[0][False][1]
    assert results[0][True][0] == results[0][False][0]
    assert not torch.allclose(with_stop["layers.stem.conv1.weight"], without["layers.stem.conv1.weight"], atol=1e-4)


def test_gradients_reach_the_other_processs_embeddings(results):
    """For bare embeddings: the mean of the processes' losses has the whole batch's gradient at every row."""
    z = [torch.randn(2, B, 16, generator=torch.Generator().manual_seed(r)).requires_grad_() for r in range(WORLD)]
    loss = slow_nt_xent(torch.cat([z[0][0], z[1][0]]), torch.cat([z[0][1], z[1][1]]), 0.2)
    loss.backward()
    assert sum(r["embeddings"][0] for r in results).item() / WORLD == pytest.approx(loss.item(), abs=1e-6)
    for rank in range(WORLD):
        torch.testing.assert_close(results[rank]["embeddings"][1] / WORLD, z[rank].grad, atol=1e-6, rtol=1e-5)


def test_gather_is_in_order_and_sums_gradients(results):
    for rank, r in enumerate(results):
        rows, grad = r["gather"]
        assert rows.tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
        weight = torch.arange(12.0).view(4, 3)[2 * rank:2 * rank + 2]
        assert torch.equal(grad, weight * 1 + weight * 2)            # from process 0 and from process 1


def test_gather_in_one_process_is_the_identity():
    z = torch.randn(3, 4)
    assert S.gather(z) is z


def test_torchrun_trains_end_to_end_and_one_process_writes(few, tmp_path):
    """Real torchrun: it ends well, the folder is written once, the batch is shared by both, the encoder loads."""
    words = ["--dataset", "folder", "--data-dir", few, "--workers", "0", "--batch-size", "32", "--epochs", "2",
             "--device", "cpu", "--out", "run"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           S.__file__, *map(str, words)], cwd=tmp_path, text=True, capture_output=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run"]           # no second run moved the first one aside
    assert done.stdout.count("steps an epoch") == 1 and done.stdout.count("encoder.pt") == 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 2 * (216 // 32) and "linear" in report
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    assert torch.jit.load(tmp_path / "run" / "encoder.pt")(torch.rand(3, 3, 32, 32)).shape == (3, 128)
