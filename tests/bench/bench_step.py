"""A training step end to end: train() of simclr_deepaug.py against the usual way, in turns.

    python tests/bench/bench_step.py [--arch small] [--batch-size 256] [--steps 10] [--repeats 3]
    python tests/bench/bench_step.py --device cuda --arch resnet18 --batch-size 1024

usual: PIL pictures in DataLoader workers, the same network in NCHW without Deep Augmentation, on
CUDA in bfloat16, mask and log-softmax, plain SGD, loss.item(). Target: 1.5, beside a GPU 8."""
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from bench_nt_xent import straightforward  # noqa: E402
from bench_views import finish, options, table, usual_loader  # noqa: E402

import simclr_deepaug as S  # noqa: E402


def one_run(flags):
    a = S.settings(flags)
    [a.layer], [a.seed] = a.layer, a.seed
    return a

def usual_rate(split, flags, device, steps, workers):
    a = one_run([*flags, "--layer", "none"])
    net = S.build(a, split, []).to(memory_format=torch.contiguous_format).train()
    net.layers[0] = nn.Identity()  # the transforms normalise
    optimizer = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9, weight_decay=1e-4)
    steps, warm = max(steps, 4 * workers), max(2, workers)  # workers deliver in waves
    n = (warm + steps + 2 * workers + 1) * a.batch_size  # more are in the making at the end
    clock = []
    for i, pair in enumerate(usual_loader(split.images, n, a.batch_size, workers)):
        if i in (warm, warm + steps):
            finish(device)
            clock.append(time.perf_counter())
        if i >= warm + steps:
            continue
        x = torch.cat(pair).to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z = net(x)
        loss = straightforward(*z.float().chunk(2), 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # for the progress line
    return steps * a.batch_size / (clock[1] - clock[0])

def ours_rate(split, flags, device):
    epochs = "4" if device.type == "cuda" else "1"
    a = one_run([*flags, "--layer", "4", "--epochs", epochs, "--warmup-epochs", "0"])
    with tempfile.TemporaryDirectory() as out:
        state = S.train(a, S.build(a, split, []), split, Path(out), dict, None)
    return state["step"] * a.batch_size / state["seconds"]

def main():
    args, device = options(__doc__, arch="small", batch_size=256, steps=10, repeats=3)
    cuda, rates = args.device == "cuda", {"ours": [], "usual": []}
    workers, n = (os.cpu_count(), 50_000) if cuda else (2, args.steps * args.batch_size)
    split = S.Split(32, *reversed(S.draw_shapes(n, 0, device)))
    flags = ["--views", "simclr", "--arch", args.arch, "--device", args.device,
             "--batch-size", str(args.batch_size)]
    ours_rate(split, flags, device)  # warms up
    for _ in range(args.repeats):
        rates["ours"].append(ours_rate(split, flags, device))
        rates["usual"].append(usual_rate(split, flags, device, args.steps, workers))
    table(rates, "images/s, two views each")

if __name__ == "__main__":
    main()
