"""Making SimCLR's views: this repository's batched way against torchvision's transforms on PIL pictures.

    python tests/bench/bench_views.py [--device cpu|cuda] [--images 4096] [--repeats 3] [--quick]

ours     train_batches + two_views + Normalize of simclr_deepaug.py: the whole batch at once on the device
usual    what SupContrast does (main_supcon.py:146): transforms on one PIL picture at a time, twice per picture, in
         DataLoader workers (2 on a CPU, every core beside a GPU), the batch moved to the device

Both end with normalised float32 [2, B, 3, 32, 32] on the device. They alternate in one run; a DataLoader segment is
timed once all its workers are at work, and it works off all it was given, so none of its work falls into our time.
Then what drawing the order of the jitter operations once a batch, and not per picture, changes. Target: 8 times.
"""
import argparse
import ctypes
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torchvision import transforms as T

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import simclr_deepaug as S  # noqa: E402

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)          # CIFAR-100


class Twice(torch.utils.data.Dataset):
    """Picture i of a uint8 array [N, 32, 32, 3], transformed twice (TwoCropTransform)."""
    def __init__(self, array, n):
        self.array, self.n = array, n
        self.transform = T.Compose([
            T.RandomResizedCrop(32, scale=(0.2, 1.0)), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), T.RandomGrayscale(p=0.2),
            T.ToTensor(), T.Normalize(MEAN, STD)])

    def __len__(self):
        return self.n                                               # as many as asked for, whatever the array holds

    def __getitem__(self, i):
        picture = Image.fromarray(self.array[i % len(self.array)])
        return [self.transform(picture), self.transform(picture)]


def usual_loader(images, n, batch_size, workers):
    """The usual DataLoader over n pictures (uint8 [N, 3, 32, 32], the first ones again when n > N)."""
    data = Twice(images.cpu().permute(0, 2, 3, 1).contiguous().numpy(), n)
    return torch.utils.data.DataLoader(data, batch_size, shuffle=True, num_workers=workers, drop_last=True,
                                       pin_memory=torch.cuda.is_available(), persistent_workers=True)


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def header(device, **what):
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    print(f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}, "
          f"torchvision {torchvision.__version__}; " + ", ".join(f"{k} {v}" for k, v in what.items()))


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def pictures(args, device):
    """(uint8 [N, 3, 32, 32], name): CIFAR-100 where it lies in --data-dir, else drawn shapes."""
    if (Path(args.data_dir) / "cifar-100-python").is_dir():
        data = torchvision.datasets.CIFAR100(args.data_dir).data
        return torch.from_numpy(data).permute(0, 3, 1, 2).contiguous().to(device), "cifar100"
    return S.draw_shapes(8192, 0, device)[0], "shapes"


def grown_heap():
    """Let glibc keep freed memory, as it does in a training process whose heap has grown: there make_views takes the
    same time with and without this. In a fresh process every new tensor would pay for its pages anew, which says
    something about malloc and nothing about the views (it more than doubles their time; --fresh-heap shows it)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)                                   # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 ** 31 - 1)                                # M_TRIM_THRESHOLD


# ---- speed

def ours_rate(split, a, device, n):
    normalize = S.Normalize(torch.tensor(MEAN), torch.tensor(STD)).to(device)
    batches = S.train_batches(split, a, 0, len(split) // a.batch_size, 0, 1)
    for _ in range(2):
        normalize(S.two_views(next(batches)[0], split.size, a))
    finish(device)
    start, rounds = time.perf_counter(), max(1, n // a.batch_size)
    for _ in range(rounds):
        normalize(S.two_views(next(batches)[0], split.size, a))
    finish(device)
    return rounds * a.batch_size / (time.perf_counter() - start)


def usual_rate(loader, device):
    batches = iter(loader)
    for _ in range(loader.num_workers):                             # every worker has delivered: all are at work
        next(batches)
    start, n = time.perf_counter(), 0
    for first, second in batches:
        n += len(torch.stack([first, second]).to(device, non_blocking=True)[0])
    finish(device)
    return n / (time.perf_counter() - start)


# ---- what the order does

ORDERS = torch.tensor(list(itertools.permutations(range(4))))                                # [24, 4]


def crops(images):
    """Random resized crops and flips, and the five parameters of each picture, as make_views draws them."""
    n, device = len(images), images.device
    top, left, h, w = S.crop_boxes(n, 32, 32, (0.2, 1.0), device)
    rows = S.resize_matrix(top, h, 32, 32, torch.zeros(n, dtype=torch.bool, device=device))
    columns = S.resize_matrix(left, w, 32, 32, torch.rand(n, device=device) < 0.5)
    x = rows.unsqueeze(1) @ (images.float() / 255) @ columns.unsqueeze(1).mT
    on = torch.rand(n, 1, 1, 1, device=device) < 0.8
    factors = [torch.where(on, torch.empty(n, 1, 1, 1, device=device).uniform_(neutral - s, neutral + s), neutral)
               for s, neutral in ((0.4, 1.0), (0.4, 1.0), (0.4, 1.0), (0.1, 0.0))]
    return x, factors, torch.rand(n, 1, 1, 1, device=device) < 0.2


def jitter(x, factors, order, grayed):
    """The script's colour operations with these factors; order int64 [n]: row of ORDERS for each picture."""
    out = torch.empty_like(x)
    for o in order.unique().tolist():
        chosen = (order == o).nonzero()[:, 0]
        y = x[chosen]
        for op in ORDERS[o].tolist():
            y = S.adjust(y, op, factors[op][chosen])
        out[chosen] = y
    return torch.where(grayed, S.rgb_to_grayscale(out), out)


QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Pixels:
    """Histogram of pixel values per channel over many views, and the mean pixel of every batch."""
    def __init__(self):
        self.counts, self.means = torch.zeros(3, 4096, dtype=torch.float64), []

    def add(self, views):
        index = (views.clamp(0, 1) * 4095).round().long().transpose(0, 1).flatten(1).cpu()    # [3, n * 1024]
        self.counts += torch.stack([torch.bincount(c, minlength=4096) for c in index])
        self.means.append(views.mean((0, 2, 3)).cpu())

    def numbers(self):
        """Mean, standard deviation, quantiles, all in /255 and per channel: [9, 3]."""
        p, value = self.counts / self.counts.sum(1, keepdim=True), torch.arange(4096, dtype=torch.float64) / 4095
        mean = p @ value
        std = (p @ value ** 2 - mean ** 2).sqrt()
        quantiles = [value[(p.cumsum(1) < q).sum(1).clamp(max=4095)] for q in QUANTILES]
        return 255 * torch.stack([mean, std, *quantiles])

    def shift(self, other):
        """How far a batch's mean pixel lies from the other's, same draws: root mean square over batches, in /255."""
        return 255 * (torch.stack(self.means) - torch.stack(other.means)).square().mean().sqrt().item()


def order_effect(images, args, a, split, device):
    torch.manual_seed(0)
    script, batch, picture, again = Pixels(), Pixels(), Pixels(), Pixels()
    gaps, size, seconds = [], args.batch_size, {"batch": 0.0, "picture": 0.0}
    for _ in range(max(8, args.views // size)):
        chosen = images[torch.randint(len(images), (size,), device=device)]
        x, factors, grayed = crops(chosen)
        one_order, (own, other) = torch.randint(24, (1,)).repeat(size), torch.randint(24, (2, size))
        views = {}
        for name, order in (("batch", one_order), ("picture", own), ("again", other)):
            finish(device)
            start = time.perf_counter()
            views[name] = jitter(x, factors, order.to(device), grayed)
            finish(device)
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
        script.add(S.two_views(chosen, split.size, a)[:size])
        for pixels, name in ((batch, "batch"), (picture, "picture"), (again, "again")):
            pixels.add(views[name])
        gaps.append((views["picture"] - views["again"]).abs().mean((1, 2, 3)).cpu())
    gap, n = 255 * torch.cat(gaps), size * len(gaps)
    print(f"\nThe order of brightness, contrast, saturation and hue, {n} views (all differences in /255)")
    print(f"  the same picture with the same parameters, two random orders: mean |difference| {gap.mean():.2f}, "
          f"median {gap.median():.2f}, 95 % below {gap.quantile(0.95):.2f}, largest {gap.max():.1f}")
    print("  pixel distribution, mean of 3 channels      mean     std " + "".join(f"{f'q{q}':>7}" for q in QUANTILES))
    for name, p in (("make_views itself (one order a batch)", script), ("same draws, one order a batch", batch),
                    ("same draws, an order per picture", picture), ("  the same with other orders", again)):
        print(f"  {name:40}" + "".join(f"{v:8.2f}"[1:] if i > 1 else f"{v:8.2f}"
                                       for i, v in enumerate(p.numbers().mean(1).tolist())))
    differ = (batch.numbers() - picture.numbers()).abs().max().item()
    noise = (again.numbers() - picture.numbers()).abs().max().item()
    print(f"  largest difference of these numbers in any channel, batch against picture: {differ:.3f}; "
          f"picture against picture with other orders (noise): {noise:.3f}")
    print(f"  what it does change, one batch's mean pixel against the same batch with an order per picture: "
          f"{batch.shift(picture):.3f}; other orders per picture (noise): {again.shift(picture):.3f}")
    print(f"  colours only, an order per picture takes {seconds['picture'] / seconds['batch']:.1f} times as long")
    return {"same_parameters": gap.mean().item(), "distribution": differ, "noise": noise}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--images", type=int, default=4096, help="pictures of one timed segment, ours and usual")
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--workers", type=int, default=0, help="of the usual way; 0: 2 on the CPU, all cores beside a GPU")
    p.add_argument("--views", type=int, default=20_480, help="views of the comparison of orders")
    p.add_argument("--data-dir", default=str(ROOT / "data"))
    p.add_argument("--fresh-heap", action="store_true", help="see grown_heap")
    p.add_argument("--quick", action="store_true", help="a few seconds: does it run?")
    args = p.parse_args(argv)
    if not args.fresh_heap:
        grown_heap()
    if args.quick:
        args.images, args.batch_size, args.repeats, args.views, args.workers = 128, 32, 1, 256, 1
    device = torch.device(args.device)
    workers = args.workers or (os.cpu_count() if args.device == "cuda" else 2)
    images, data = pictures(args, device)
    a = S.settings(["--views", "simclr", "--batch-size", str(args.batch_size),
                    "--device", args.device])
    a.seed, split = 0, S.Split(32, torch.full((len(images),), -1), images)
    segment = max(args.images, args.batch_size * 4 * workers)       # enough batches for every worker
    loader = usual_loader(images, segment + args.batch_size * workers, args.batch_size, workers)
    n_ours = segment * (1 if args.quick else 50 if args.device == "cuda" else 4)     # ours is faster: as many seconds
    header(device, data=data, batch=args.batch_size, workers=workers, repeats=args.repeats)
    with torch.no_grad():
        ours, usual = zip(*((ours_rate(split, a, device, n_ours), usual_rate(loader, device))
                            for _ in range(args.repeats)))
        ratio = statistics.median(o / u for o, u in zip(ours, usual))
        print(f"\n{'images/s, two views each':34}{'median':>9}{'lowest':>9}{'highest':>9}")
        for name, rates in (("ours: batched on the device, eager", ours), ("usual: PIL in DataLoader workers", usual)):
            print(f"{name:34}{statistics.median(rates):9.0f}{min(rates):9.0f}{max(rates):9.0f}")
        print(f"ours / usual, median of {args.repeats} pairs: {ratio:.1f} (target: at least 8)")
        effect = order_effect(images, args, a, split, device)
    return {"ours": statistics.median(ours), "usual": statistics.median(usual), "ratio": ratio, **effect}


if __name__ == "__main__":
    main()
