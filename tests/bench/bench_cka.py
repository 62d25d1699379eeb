"""The CKA map of all ResNet-18 layers: cka_map against a plain per-pair implementation with hooks, side by side.

    python tests/bench/bench_cka.py [--images 256] [--batch-size 128] [--device cpu] [--repeats 1]

Three variants, each in its own process (so that the memory of one does not hide that of another), on the same random
images and the same randomly initialised CIFAR ResNet-18 (3x3 stem, 32x32 pixels; 20 named layers):
    forward   the model alone, nothing kept
    cka_map   cka.cka_map through cka.module_activations
    per pair  the usual loop, as the package torch_cka does it: for every layer i its Gram matrix, for every layer j
              again that Gram matrix, and three HSIC_1 by their formula, with ones-vectors and matrix products. Its
              traps are left out so that the maps can be compared: outputs are cloned, features centred, no_grad is on;
              and it gets its activations from one forward pass, where torch_cka runs the model twice.
Targets: per pair takes at least 5 times as long as cka_map, which adds at most 0.5 GiB to the peak of the forward pass.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cka

VARIANTS = ("forward", "cka_map", "per pair")


def resnet18():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=128)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    odd_even = [name for block in blocks for name in (f"{block}.bn2", block)]  # before and after the addition
    return model.eval(), ["bn1", "relu", *odd_even, "avgpool", "fc"]


def per_pair(model, names, batches):
    def gram(X):
        X = X.flatten(1)
        X = X - X.mean(0)
        return (X @ X.T).fill_diagonal_(0)

    def hsic(K, L):  # eq. 3 of Nguyen et al. 2021, term by term
        n = len(K)
        ones = torch.ones(n, 1, device=K.device)
        product = K @ L
        value = torch.trace(product)
        value = value + (ones.T @ K @ ones @ ones.T @ L @ ones).item() / ((n - 1) * (n - 2))
        value = value - (ones.T @ product @ ones).item() * 2 / (n - 2)
        return value.item() / (n * (n - 3))

    outputs, sums = {}, torch.zeros(len(names), len(names), 3, dtype=torch.float64)
    modules = dict(model.named_modules())
    for name in names:
        modules[name].register_forward_hook(lambda m, args, out, name=name: outputs.update({name: out.clone()}))
    for x in batches:
        model(x)
        for i, a in enumerate(names):
            K = gram(outputs[a])
            kk = hsic(K, K)
            for j, b in enumerate(names):
                L = gram(outputs[b])
                sums[i, j] += torch.tensor([hsic(K, L), kk, hsic(L, L)], dtype=torch.float64)
    return sums[..., 0] / (sums[..., 1] * sums[..., 2]).sqrt()


def twice(acts):  # a function's own variable ends with it: a batch's activations are not held while the next is made
    return acts, acts


def memory(device):
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """Samples this process's resident memory every 2 ms (on CUDA the allocator's own peak is exact)."""

    def __init__(self, device):
        super().__init__(daemon=True)
        self.device, self.before, self.peak, self.stop = device, memory(device), 0, threading.Event()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.start()

    def run(self):
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, memory("cpu"))

    def done(self):
        self.stop.set()
        self.join()
        return (torch.cuda.max_memory_allocated() if self.device == "cuda" else self.peak) - self.before


@torch.no_grad()
def measure(variant, args):
    model, names = resnet18()
    model = model.to(args.device)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.rand(args.batch_size, 3, 32, 32, generator=generator).to(args.device)
               for _ in range(args.images // args.batch_size)]
    model(batches[0][:8])  # the libraries start
    peak = Peak(args.device)
    start = time.perf_counter()
    M = []
    if variant == "forward":
        for x in batches:
            model(x)
    elif variant == "per pair":
        M = per_pair(model, names, batches).tolist()
    else:
        with cka.module_activations(model, names) as run:
            M = cka.cka_map(twice(run(x)) for x in batches).tolist()
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "gib": peak.done() / 2**30, "map": M}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=1, help="rounds; the fastest time and the highest peak are kept")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.variant:
        print(json.dumps(measure(args.variant, args)))
        return None
    options = [f"--{key}={getattr(args, key.replace('-', '_'))}" for key in ("images", "batch-size", "device")]
    found = {}
    for variant in VARIANTS * args.repeats:
        command = [sys.executable, __file__, *options, "--variant", variant]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        now = json.loads(run.stdout)
        old = found.get(variant, now)
        found[variant] = {"seconds": min(now["seconds"], old["seconds"]), "gib": max(now["gib"], old["gib"]),
                          "map": now["map"]}
    forward, ours, plain = (found[variant] for variant in VARIANTS)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.images} images, batches of {args.batch_size}, 20 layers of ResNet-18, {where}")
    for variant in VARIANTS:
        print(f"{variant:9} {found[variant]['seconds']:7.2f} s   peak +{found[variant]['gib']:.2f} GiB")
    result = {"ratio": plain["seconds"] / ours["seconds"], "gib_over_forward": ours["gib"] - forward["gib"],
              "max_difference": (torch.tensor(ours["map"]) - torch.tensor(plain["map"])).abs().max().item()}
    print(f"per pair / cka_map: {result['ratio']:.1f} (target: at least 5)")
    print(f"cka_map's peak over the forward pass: {result['gib_over_forward']:.2f} GiB (target: at most 0.5)")
    print(f"largest difference of the two maps: {result['max_difference']:.1e}")
    return result


if __name__ == "__main__":
    main()
