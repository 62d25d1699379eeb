"""The CKA map of all 20 layers of a CIFAR ResNet-18, side by side, each variant in its own process:

    forward   the network alone, its outputs kept by hooks
    cka_map   on top of it
    per pair  the usual loop, as in the package torch_cka but without its traps: for each pair of layers both Gram
              matrices and three HSIC_1, term by term
    old       (--old FILE) cka_map of another version of cka.py

    python tests/bench/bench_cka.py [--images 256] [--batch-size 128] [--device cpu] [--repeats 1] [--old FILE]

Targets: per pair takes 5 times as long as cka_map or more, which adds at most 0.5 GiB to the peak of the forward pass.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
import torchvision
from torch import nn

CKA = Path(__file__).resolve().parents[2] / "cka.py"


def memory(device):
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(path):
    spec = importlib.util.spec_from_file_location("cka", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hooked_resnet18(device):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=128)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    names = ["bn1", "relu", *(n for block in blocks for n in (f"{block}.bn2", block)), "avgpool", "fc"]
    model, outputs = model.eval().to(device), {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update({name: output.clone()}))

    def layers(x):
        outputs.clear()
        model(x)
        acts = [outputs[name] for name in names]
        return acts, acts
    return layers


def per_pair(batches, layers):
    def gram(X):
        X = X.flatten(1)
        X = X - X.mean(0)
        return (X @ X.T).fill_diagonal_(0)

    def hsic(K, L):  # Eq. 3 of Nguyen et al. 2021
        n, one = len(K), torch.ones(len(K), 1, device=K.device)
        value = torch.trace(K @ L) + (one.T @ K @ one @ one.T @ L @ one).item() / ((n - 1) * (n - 2))
        return (value - (one.T @ K @ L @ one).item() * 2 / (n - 2)).item() / (n * (n - 3))

    sums = 0
    for x in batches:
        acts, rows = layers(x)[0], []
        for a in acts:
            K = gram(a)
            kk = hsic(K, K)
            rows.append([[hsic(K, L), kk, hsic(L, L)] for L in map(gram, acts)])
        sums = sums + torch.tensor(rows, dtype=torch.float64)
    return sums[..., 0] / (sums[..., 1] * sums[..., 2]).sqrt()


@torch.no_grad()
def measure(variant, args):
    layers, g = hooked_resnet18(args.device), torch.Generator().manual_seed(1)
    batches = [torch.rand(args.batch_size, 3, 32, 32, generator=g).to(args.device)
               for _ in range(args.images // args.batch_size)]
    cka = load(args.old if variant == "old" else CKA)
    layers(batches[0][:8])  # the libraries start
    before, start, M = memory(args.device), time.perf_counter(), torch.zeros(0)
    if variant == "forward":
        for x in batches:
            layers(x)
    elif variant == "per pair":
        M = per_pair(batches, layers)
    else:
        M = cka.cka_map(map(layers, batches))
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "gib": (peak - before) / 2**30, "map": M.tolist()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=1, help="rounds; the fastest of each is shown")
    parser.add_argument("--old", metavar="FILE", help="another cka.py")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.variant:
        print(json.dumps(measure(args.variant, args)))
        return
    variants, found = ["forward", "cka_map", "per pair", *["old"] * bool(args.old)], {}
    for variant in variants * args.repeats:
        words = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--variant", variant]
        now = json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
        found[variant] = min(now, found.get(variant, now), key=lambda r: r["seconds"])
    for variant, r in found.items():
        off = (torch.tensor(r["map"]) - torch.tensor(found["cka_map"]["map"])).abs().max() if r["map"] else 0
        print(f"{variant:9} {r['seconds']:7.2f} s   {r['seconds'] / found['cka_map']['seconds']:5.2f} of cka_map   "
              f"peak +{r['gib']:.2f} GiB   differs by {off:.1e}")


if __name__ == "__main__":
    main()
