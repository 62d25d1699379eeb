"""topk_rescue.py: what the rescue costs over its base step, and where it goes.

    python tests/bench/bench_rescue.py [--device cuda] [--methods simclr ...] [--k 4 64] [--quick]

A step is views, Rescue, backward and optimizer. base: --rescue none; the others alternate with it
in one run. "strong views": torchvision's RandAugment and the cutout of k pictures alone.
"operators": dispatched in an eager step, each a launch on a GPU or more.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench_views import finish, header, pictures  # noqa: E402

import topk_rescue as R  # noqa: E402

class Count(TorchDispatchMode):
    operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += not func.is_view
        return func(*args, **(kwargs or {}))

def stepper(words, images):
    a = R.settings(words)
    a = argparse.Namespace(**{**vars(a), **{name: getattr(a, name)[0] for name in R.RUNS}})
    a.k = 0 if a.rescue == "none" else a.k
    rescue = R.build(a, R.Split(32, torch.zeros(len(images)), images)).train()
    groups = R.parameter_groups(a, rescue.method)
    adam = a.optimizer == "adamw"
    optimizer = torch.optim.AdamW(groups, a.lr, fused=True) if adam else \
        torch.optim.SGD(groups, a.lr, 0.9, fused=True)
    if a.compile:
        rescue.method.compile(mode="reduce-overhead")
        rescue.student = torch.compile(rescue.student, mode="reduce-overhead")

    def step():
        if a.method != "simclr":
            rescue.method.update_target(0.1)
        loss, *_ = rescue(images[:a.batch_size], 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step

def seconds(work, repeats, device):
    finish(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    finish(device)
    return (time.perf_counter() - start) / repeats

def bench(method, images, args, device):
    common = ["--method", method, "--batch-size", str(args.batch_size), "--device", str(device),
              "--compile" if args.compile else "--no-compile", *args.flags]
    rows = {"base": ["--rescue", "none"],
            **{f"rescue, k = {k}": ["--rescue", "topk", "--k", str(k)] for k in args.k},
            f"deepaug, k = {args.k[-1]}": ["--rescue", "topk", "--k", str(args.k[-1]), "--strong",
                                           "deepaug", "--layer", "3"]}
    steps = {name: stepper([*common, *more], images) for name, more in rows.items()}
    counts = {}
    for name, step in steps.items():
        seconds(step, 3, device)
        if not args.compile:
            with Count() as counts[name]:
                step()
    times = [[seconds(step, args.steps, device) for step in steps.values()]
             for _ in range(args.repeats)]
    for i, name in enumerate(steps):
        ms = 1000 * statistics.median(row[i] for row in times)
        ratio = statistics.median(row[i] / row[0] for row in times)
        count = f", {counts[name].operators} operators" if counts else ""
        print(f"{method:7} {name:18} {ms:7.1f} ms, {1000 * args.batch_size / ms:7.0f} images/s, "
              f"{ratio:.2f} x base{count}")

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--data-dir", default="data")
    p.add_argument("--methods", nargs="+", default=["simclr", "mocov3", "dinov2"])
    p.add_argument("--k", nargs="+", type=int, default=[4, 64])
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--compile", action="store_true", help="with CUDA graphs, as train() does")
    p.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of topk_rescue.py")
    p.add_argument("--quick", action="store_true", help="seconds, only to see that it runs")
    args = p.parse_args()
    if args.quick:
        args.batch_size, args.k, args.steps, args.repeats = 64, [4], 1, 1
    device = torch.device(args.device)
    images, name = pictures(args, device)
    header(device, data=name, batch=args.batch_size, steps=args.steps, repeats=args.repeats)
    for k in args.k:
        R.strong_views(images[:k], 32)
        ms = 1000 * seconds(lambda k=k: R.strong_views(images[:k], 32), 5, device)
        print(f"strong views, k = {k}: {ms:.1f} ms")
    for method in args.methods:
        bench(method, images, args, device)
