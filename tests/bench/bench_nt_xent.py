"""NT-Xent as one cross-entropy (simclr_deepaug.nt_xent) against the straightforward mask-and-log-softmax form.

    python tests/bench/bench_nt_xent.py [--device cpu|cuda] [--pictures 512 2048] [--repeats 15] [--quick]

For N pictures (2N x 2N similarities): milliseconds of forward and backward, the peak memory that both together
allocate above what was there before (on the CPU summed up from the profiler's allocation events, exact; on CUDA
torch.cuda.max_memory_allocated), and how far value and gradient lie from the same formula in float64.
The two forms alternate in one run.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")                      # no lines of the profiler's own; before torch

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import simclr_deepaug as S  # noqa: E402


def straightforward(z1, z2, temperature):
    """The form most repositories have: exp, eye masks, log of the masked sum, mean over the masked positives."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)                                               # [2N, d]
    similarity = z @ z.T / temperature                                                        # [2N, 2N]
    similarity = similarity - similarity.max(dim=1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), device=z.device, dtype=z.dtype)
    positives = torch.eye(len(z1), device=z.device, dtype=z.dtype).repeat(2, 2) * others
    weight = torch.exp(similarity) * others
    log_probability = similarity - torch.log(weight.sum(dim=1, keepdim=True))
    return -((positives * log_probability).sum(dim=1) / positives.sum(dim=1)).mean()


def forward_backward(loss, z1, z2, temperature=0.5):
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    value = loss(z1, z2, temperature)
    value.backward()
    return value.detach(), torch.cat([z1.grad, z2.grad])


def timed(loss, z1, z2):
    """Milliseconds of one forward and backward."""
    if z1.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    forward_backward(loss, z1, z2)
    if z1.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def peak_memory(loss, z1, z2):
    """MiB at the highest point of forward and backward above the start."""
    if z1.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(loss, z1, z2)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        forward_backward(loss, z1, z2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        highest = max(highest, now)
    return highest / 2**20


def measure(n, device, repeats, dim=128):
    g = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, n, dim, generator=g).to(device)
    z2 = z1 + 0.5 * z2                                              # pairs that are alike, as in training
    value, gradient = forward_backward(straightforward, z1.double(), z2.double())
    forms = {"ours: one cross-entropy": S.nt_xent, "mask and log-softmax": straightforward}
    result = {name: {"peak_mib": peak_memory(loss, z1, z2)} for name, loss in forms.items()}    # warms up, too
    times = {name: [] for name in forms}
    for _ in range(repeats):
        for name, loss in forms.items():
            times[name].append(timed(loss, z1, z2))
    for name, loss in forms.items():
        v, d = forward_backward(loss, z1, z2)
        result[name].update(ms=statistics.median(times[name]), value_error=(v - value).abs().item(),
                            gradient_error=((d - gradient).abs().max() / gradient.abs().max()).item())
    return result


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--pictures", type=int, nargs="+", default=[512, 2048], help="N; the matrices are 2N x 2N")
    p.add_argument("--repeats", type=int, default=15)
    p.add_argument("--quick", action="store_true", help="a few seconds: does it run?")
    args = p.parse_args(argv)
    if args.quick:
        args.pictures, args.repeats = [64, 128], 2
    from bench_views import header
    header(torch.device(args.device), repeats=args.repeats, dim=128)
    print(f"\n{'':30}{'N':>6}{'ms':>9}{'peak MiB':>10}{'value error':>13}{'gradient error':>16}")
    results = {}
    for n in args.pictures:
        results[n] = measure(n, args.device, args.repeats)
        for name, r in results[n].items():
            print(f"{name:30}{n:6}{r['ms']:9.2f}{r['peak_mib']:10.1f}{r['value_error']:13.1e}"
                  f"{r['gradient_error']:16.1e}")
        ours, plain = results[n].values()
        print(f"{'ours / straightforward':30}{n:6}{ours['ms'] / plain['ms']:9.2f}"
              f"{ours['peak_mib'] / plain['peak_mib']:10.2f}")
    return results


if __name__ == "__main__":
    main()
