"""NT-Xent as one cross-entropy (nt_xent) against the usual mask and log-softmax, in turns.

    python tests/bench/bench_nt_xent.py [--device cuda] [--pictures 512 2048] [--repeats 15]

Of N pictures, 2N x 2N similarities: forward and backward, and the memory that they take at most."""
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no lines of the profiler's own; before torch

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from bench_views import options, seconds, table  # noqa: E402

import simclr_deepaug as S  # noqa: E402


def straightforward(z1, z2, temperature):
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # [2N, d]
    similarity = z @ z.T / temperature  # [2N, 2N]
    similarity = similarity - similarity.max(dim=1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), device=z.device, dtype=z.dtype)
    positives = torch.eye(len(z1), device=z.device, dtype=z.dtype).repeat(2, 2) * others
    weight = torch.exp(similarity) * others
    log_probability = similarity - torch.log(weight.sum(dim=1, keepdim=True))
    return -((positives * log_probability).sum(dim=1) / positives.sum(dim=1)).mean()

def forward_backward(loss, z1, z2):
    loss(z1.clone().requires_grad_(), z2.clone().requires_grad_(), 0.5).backward()

def peak_memory(loss, z1, z2):
    """MiB above the start."""
    if z1.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(loss, z1, z2)
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_backward(loss, z1, z2)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    now = highest = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        highest = max(highest, now)
    return highest / 2 ** 20

def main():
    args, device = options(__doc__, pictures=[512, 2048], repeats=15)
    losses = {"ours": S.nt_xent, "usual": straightforward}
    for n in args.pictures:
        z1, z2 = torch.randn(2, n, 128).to(device)
        print(f"N = {n}")  # the memory first: this warms up, too
        table({name: [peak_memory(loss, z1, z2)] for name, loss in losses.items()}, "MiB")
        times = [[1000 * seconds(device, forward_backward, loss, z1, z2)[0]
                  for loss in losses.values()] for _ in range(args.repeats)]
        table(dict(zip(losses, zip(*times))), "ms")

if __name__ == "__main__":
    main()
