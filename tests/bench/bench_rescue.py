"""topk_rescue.py: what a step with rescue costs over the base step, in turns, and the strong views.

    python tests/bench/bench_rescue.py [--device cuda] [--methods simclr ...] [--k 4 64]

A step is views, Rescue, backward and optimizer. Eager: with compiled ones see bench_train.py."""
import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from bench_views import options, seconds, table  # noqa: E402

import topk_rescue as R  # noqa: E402


def stepper(words, images):
    a = R.settings(words)
    a = argparse.Namespace(**{**vars(a), **{name: getattr(a, name)[0] for name in R.RUNS}})
    a.k = 0 if a.rescue == "none" else a.k
    rescue = R.build(a, R.Split(32, torch.zeros(len(images)), images)).train()
    groups = R.parameter_groups(a, rescue.method)
    optimizer = torch.optim.AdamW(groups, a.lr, fused=True) if a.optimizer == "adamw" else \
        torch.optim.SGD(groups, a.lr, 0.9, fused=True)

    def steps(n):
        for _ in range(n):
            if a.method != "simclr":
                rescue.method.update_target(0.1)
            loss, *_ = rescue(images[:a.batch_size], 0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return steps

def main():
    args, device = options(__doc__, methods=["simclr", "mocov3", "dinov2"], k=[4, 64], steps=3,
                           batch_size=256, repeats=5)
    images = R.draw_shapes(8192, 0, device)[0]
    for k in args.k:
        taken = [seconds(device, R.strong_views, images[:k], 32)[0] for _ in range(5)]
        print(f"strong views, k = {k}: {1000 * min(taken):.1f} ms")
    for method in args.methods:
        words = ["--method", method, "--batch-size", str(args.batch_size), "--device", args.device,
                 "--no-compile", "--rescue"]
        rows = {f"k = {k}": ["topk", "--k", str(k)] for k in args.k}
        rows[f"deepaug, k = {k}"] = ["topk", "--k", str(k), "--strong", "deepaug", "--layer", "3"]
        ways = {name: stepper([*words, *row], images) for name, row in
                {**rows, "base": ["none"]}.items()}
        for steps in ways.values():
            steps(3)
        times = {name: [] for name in ways}
        for name in [*ways] * args.repeats:
            times[name].append(1000 * seconds(device, ways[name], args.steps)[0] / args.steps)
        table(times, f"ms, {method}")

if __name__ == "__main__":
    main()
