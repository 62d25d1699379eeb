"""The CKA map of 20 layers of a CIFAR ResNet-18, each way in its own process, in turns.

    python tests/bench/bench_cka.py [--images 256] [--batch-size 128] [--device cuda] [--repeats 1]

forward: the network, its outputs kept by hooks; cka_map: on top of it; pairs: the usual loop, three
HSIC_1 for each pair of layers. Targets: 5 times as fast, and at most 0.5 GiB over the forward."""
import re
import subprocess
import sys
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from bench_views import options, peak, seconds  # noqa: E402

import cka  # noqa: E402


def hooked_resnet18(device):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=128)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model, outputs = model.eval().to(device), []
    for name, module in model.named_modules():
        if re.fullmatch(r"bn1|relu|layer\d\.\d(\.bn2)?|avgpool|fc", name):
            module.register_forward_hook(lambda m, x, y: outputs.append(y.clone()))

    def layers(x):
        outputs.clear()
        model(x)
        return [*outputs], [*outputs]
    return layers

def gram(X):
    X = X.flatten(1)
    X = X - X.mean(0)
    return (X @ X.T).fill_diagonal_(0)

def hsic(K, L):  # Eq. 3 of Nguyen et al. 2021
    n, one = len(K), torch.ones(len(K), 1, device=K.device)
    value = torch.trace(K @ L) + (one.T @ K @ one @ one.T @ L @ one).item() / ((n - 1) * (n - 2))
    return (value - (one.T @ K @ L @ one).item() * 2 / (n - 2)).item() / (n * (n - 3))

def pairs(batches):
    total = 0
    for acts, _ in batches:
        rows = [[[hsic(gram(a), gram(b)), hsic(gram(a), gram(a)), hsic(gram(b), gram(b))]
                 for b in acts] for a in acts]
        total = total + torch.tensor(rows, dtype=torch.float64)
    return total[..., 0] / (total[..., 1] * total[..., 2]).sqrt()

@torch.no_grad()
def measure(way, args, device):
    layers = hooked_resnet18(device)
    batches = torch.rand(args.images, 3, 32, 32).to(device).split(args.batch_size)
    layers(batches[0][:8])  # the libraries start
    ways = {"forward": lambda given: [None for _ in given], "cka_map": cka.cka_map, "pairs": pairs}
    print(f"{way:8} {seconds(device, ways[way], map(layers, batches))[0]:7.2f} s, "
          f"peak {peak(device):.2f} GiB", flush=True)

def main():
    args, device = options(__doc__, images=256, batch_size=128, repeats=1, way="")
    if args.way:
        return measure(args.way, args, device)
    for way in ["forward", "cka_map", "pairs"] * args.repeats:
        end = subprocess.run([sys.executable, *sys.argv, "--way", way], capture_output=True,
                             text=True, check=True)
        print(end.stdout.splitlines()[-1], flush=True)

if __name__ == "__main__":
    main()
