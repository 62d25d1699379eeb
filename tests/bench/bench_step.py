"""A whole training step, end to end: simclr_deepaug.py's way against the usual way on the same network.

    python tests/bench/bench_step.py [--arch small] [--batch-size 256] [--steps 10] [--repeats 3] [--quick]
    python tests/bench/bench_step.py --device cuda --arch resnet18 --batch-size 1024

ours      the script's train(): batches, views, Net in channels_last (bf16 autocast on CUDA), Deep
          Augmentation at layer 4, nt_xent, fused SGD, log lines; on CUDA compiled (its default)
usual     PIL pictures in DataLoader workers (bench_views.py), the same Net in NCHW without Deep Augmentation, float32
          (on CUDA also under autocast), the straightforward NT-Xent (bench_nt_xent.py), plain SGD, loss.item() a step

They alternate in one run. The workers of the usual way have more batches to make than are timed, and what is left is
worked off before ours is timed. Targets: 1.5 times on the CPU, 8 times beside a GPU. Where the time of a step goes and
how near to the hardware's limit it is, also compiled: bench_train.py.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench_nt_xent import straightforward  # noqa: E402
from bench_views import finish, header, usual_loader  # noqa: E402

import simclr_deepaug as S  # noqa: E402


class Usual:
    def __init__(self, split, flags, device, steps, workers, autocast=False):
        self.device, self.batch, self.autocast = device, S.settings(flags).batch_size, autocast
        self.steps = max(steps, 4 * workers)                        # workers deliver in waves: time several of them
        self.net = S.build(one_run([*flags, "--layer", "none"]), split, [])
        self.net.layers[0] = nn.Identity()                    # the transforms normalise
        self.net = self.net.to(memory_format=torch.contiguous_format).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.5, momentum=0.9, weight_decay=1e-4)
        self.warm = max(2, workers)                                 # steps before the clock starts
        total = self.warm + self.steps + 2 * workers + 1            # the last ones are in the making when it stops
        self.loader = usual_loader(split.images, total * self.batch, self.batch, workers)

    def rate(self):
        start = end = None
        for i, (first, second) in enumerate(self.loader):
            if i == self.warm:
                finish(self.device)
                start = time.perf_counter()
            if i == self.warm + self.steps:
                finish(self.device)
                end = time.perf_counter()
            if end is not None:
                continue                                            # only to let the workers come to rest
            x = torch.cat([first, second]).to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                z = self.net(x)
            loss = straightforward(*z.float().chunk(2), 0.5)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()                                             # for the progress line
        return self.steps * self.batch / (end - start)


def one_run(flags):
    """Settings as main() hands them on: the one layer, the one seed."""
    a = S.settings(flags)
    [a.layer], [a.seed] = a.layer, a.seed
    return a


def train_rate(split, flags, device):
    """Pictures a second of the script's train(), log lines included."""
    epochs = 4 if device.type == "cuda" else 1
    a = one_run([*flags, "--epochs", str(epochs), "--warmup-epochs", "0"])
    net = S.build(a, split, [])
    finish(device)
    with tempfile.TemporaryDirectory() as out:
        state = S.train(a, net, split, Path(out), lambda: {}, None)
    return state["step"] * a.batch_size / state["seconds"]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--arch", choices=["small", "resnet18", "resnet34", "resnet50"], default="small")
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--steps", type=int, default=10, help="of a timed segment; ours on CUDA: 4 epochs of 50,000")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--workers", type=int, default=0, help="of the usual way; 0: 2 on the CPU, all cores beside a GPU")
    p.add_argument("--quick", action="store_true", help="a few seconds: does it run?")
    args = p.parse_args(argv)
    if args.quick:
        args.batch_size, args.steps, args.repeats, args.workers = 32, 2, 1, 1
    device, cuda = torch.device(args.device), args.device == "cuda"
    torch.backends.cudnn.benchmark = True                           # as run() sets it
    workers = args.workers or (os.cpu_count() if cuda else 2)
    images, labels = S.draw_shapes(50_000 if cuda else args.steps * args.batch_size, 0, device)
    split = S.Split(32, labels, images)
    flags = ["--layer", "4", "--views", "simclr", "--arch", args.arch, "--device", args.device,
             "--batch-size", str(args.batch_size)]
    header(device, arch=args.arch, batch=args.batch_size, steps=args.steps, repeats=args.repeats, workers=workers)

    ways = {"ours": lambda: train_rate(split, flags, device)}
    ways["ours"]()                                                  # warms up
    for name, autocast in [("usual, float32", False)] + [("usual, autocast", True)] * cuda:
        ways[name] = Usual(split, flags, device, args.steps, workers, autocast).rate
    rates = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            rates[name].append(way())

    print(f"\n{'images/s, two views each':28}{'median':>9}{'lowest':>9}{'highest':>9}{'/ usual':>9}")
    best = max((name for name in rates if name.startswith("usual")), key=lambda name: statistics.median(rates[name]))
    ratios = {name: statistics.median(x / u for x, u in zip(r, rates[best])) for name, r in rates.items()}
    for name, r in rates.items():
        print(f"{name:28}{statistics.median(r):9.0f}{min(r):9.0f}{max(r):9.0f}{ratios[name]:9.2f}")
    print(f"target: ours at least {8 if cuda else 1.5} times the usual way (the faster one)"
          + (f"; {50_000 / statistics.median(rates['ours']):.2f} s for 50,000 pictures" if cuda else ""))
    return {"rates": {name: statistics.median(r) for name, r in rates.items()}, "ratios": ratios}


if __name__ == "__main__":
    main()
