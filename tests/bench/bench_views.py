"""SimCLR's views: a whole batch at once on the device, against torchvision on PIL pictures.

    python tests/bench/bench_views.py [--device cuda] [--images 4096] [--fresh-heap]

usual: as SupContrast (main_supcon.py:146), a picture at a time, twice, in a DataLoader's workers,
timed once all are at work. Both give normalised float32 [2, B, 3, 32, 32]. Target: 8 times."""
import argparse
import ctypes
import os
import re
import statistics
import sys
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
from PIL import Image
from torchvision import transforms as T

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import simclr_deepaug as S  # noqa: E402

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # CIFAR-100

class Twice(torch.utils.data.Dataset):
    """n pictures of a uint8 array [N, 32, 32, 3], round and round, transformed twice."""
    def __init__(self, array, n):
        self.array, self.n = array, n
        self.transform = T.Compose([
            T.RandomResizedCrop(32, scale=(0.2, 1.0)), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), T.RandomGrayscale(p=0.2),
            T.ToTensor(), T.Normalize(MEAN, STD)])

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return [self.transform(Image.fromarray(self.array[i % len(self.array)])) for _ in "12"]

def usual_loader(images, n, batch_size, workers):
    data = Twice(images.cpu().permute(0, 2, 3, 1).contiguous().numpy(), n)
    return torch.utils.data.DataLoader(
        data, batch_size, shuffle=True, num_workers=workers, drop_last=True,
        pin_memory=torch.cuda.is_available(), persistent_workers=True)

def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize()

def seconds(device, f, *args):
    """(how long f(*args) takes, its result)."""
    finish(device)
    start = time.perf_counter()
    result = f(*args)
    finish(device)
    return time.perf_counter() - start, result

def peak(device):
    """GiB that this process has taken at most."""
    return torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else \
        getrusage(RUSAGE_SELF).ru_maxrss / 2 ** 20

def header(device, **what):
    info = Path("/proc/cpuinfo")
    cpu = re.findall("model name.*: (.*)", info.read_text() if info.exists() else "") or ["CPU"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu[0]
    print(f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch "
          f"{torch.__version__};", ", ".join(f"{k} {v}" for k, v in what.items()))

def options(doc, **defaults):
    """The command line's flags, --device and these, and the device."""
    p = argparse.ArgumentParser(description=doc,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for name, value in defaults.items():
        kind = type(value[0] if isinstance(value, list) else value)
        how = {"action": "store_true"} if value is False else {
            "type": kind, "default": value, "nargs": "+" if isinstance(value, list) else None}
        p.add_argument("--" + name.replace("_", "-"), **how)
    args = p.parse_args()
    header(device := torch.device(args.device), flags=vars(args))
    return args, device

def table(rates, unit):
    """Of {name: one number a round}: medians, and their ratio to the last, round by round."""
    *_, last = rates.values()
    for name, row in rates.items():
        ratio = statistics.median(a / b for a, b in zip(row, last))
        print(f"{name:28}{statistics.median(row):12.2f} {unit}, {ratio:.2f} of the last")

def grown_heap():
    """glibc keeps freed memory, as in a training process whose heap has grown: in a fresh one new
    tensors pay for their pages anew, more than half of the time of the views."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD

def ours_rate(split, a, device, rounds):
    normalize = S.Normalize(torch.tensor(MEAN), torch.tensor(STD)).to(device)
    batches = S.train_batches(split, a, 0, len(split) // a.batch_size, 0, 1)

    def work(rounds):
        for _ in range(rounds):
            normalize(S.two_views(next(batches)[0], split.size, a))
    work(2)
    return rounds * a.batch_size / seconds(device, work, rounds)[0]

def usual_rate(loader, device):
    batches = iter(loader)
    for _ in range(loader.num_workers):  # every worker has delivered
        next(batches)
    taken, n = seconds(device, lambda: sum(len(torch.stack(pair).to(device)[0])
                                           for pair in batches))
    return n / taken

def main():
    args, device = options(__doc__, images=4096, batch_size=256, repeats=3, fresh_heap=False)
    if not args.fresh_heap:
        grown_heap()
    images, batch = S.draw_shapes(8192, 0, device)[0], args.batch_size
    workers = os.cpu_count() if args.device == "cuda" else 2
    a = S.settings(["--views", "simclr", "--batch-size", str(batch), "--device", args.device])
    a.seed, split = 0, S.Split(32, torch.full((len(images),), -1), images)
    segment = max(args.images, batch * 4 * workers)  # enough batches for every worker
    loader = usual_loader(images, segment + batch * workers, batch, workers)
    rates = {"ours": [], "usual": []}
    rounds = segment // batch * (50 if args.device == "cuda" else 4)  # as many seconds
    for _ in range(args.repeats):
        rates["ours"].append(ours_rate(split, a, device, rounds))
        rates["usual"].append(usual_rate(loader, device))
    table(rates, "images/s, two views each")

if __name__ == "__main__":
    main()
