"""How fast the four scripts train: their own train(), measured from outside.

    python tests/bench/bench_train.py [--device cuda] [--rows simclr dinov2 ...] [--steps 20]

A row is a script's main(), on CUDA at the papers' sizes, eager and compiled, on the CPU the default
run's network, up to train(); which then runs with those very arguments: two stretches of steps to
warm up, five timed ones, and on CUDA a few steps watched for host syncs (there must be none but
for log lines) and a few under the profiler, for the sum of its kernels. "of rate": operations of
all matrix products and convolutions of a step, over its time, over what a large matrix product
reaches (bf16 on CUDA, float32 on the CPU).
"""
import argparse
import contextlib
import importlib
import inspect
import io
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/bench")]
from bench_views import finish, header  # noqa: E402

SENTENCES = "--width 768 --vocab-size 30522 --layer 8 --stop-grad --eval-every 0"
RESCUE = "--preset cifar --dataset shapes --rescue topk"
ROWS = {  # row: (script, flags on CUDA, flags on the CPU)
    "simclr": ("simclr_deepaug",
               "--views simclr --layer 4 --arch resnet18 --batch-size 1024",
               "--views simclr --layer 4"),
    "simcse": ("simcse_deepaug", SENTENCES, "--layer 8 --eval-every 0"),
    "simcse+mlm": ("simcse_deepaug", f"{SENTENCES} --mlm", "--layer 8 --mlm --eval-every 0"),
    "vicreg": ("vicreg_probe", "--arch RES-5-250 --projector 2048 2048", ""),
    "rescue": ("topk_rescue", RESCUE, "--rescue topk"),
    "mocov3": ("topk_rescue", f"{RESCUE} --method mocov3", "--method mocov3 --rescue topk"),
    "dinov2": ("topk_rescue", f"{RESCUE} --method dinov2", "--method dinov2 --rescue topk"),
}
WARM, TIMED, WATCHED = 2, 5, 5  # stretches, stretches, steps

class Enough(Exception):
    """main() has come to train(), or train() to the last step that is asked for."""

def matrix_rate(device):
    """FLOP/s of a large matrix product."""
    cuda = device.type == "cuda"
    n, dtype, times = (8192, torch.bfloat16, []) if cuda else (2048, torch.float32, [])
    x = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(13):
        finish(device)
        start = time.perf_counter()
        x @ x
        finish(device)
        times.append(time.perf_counter() - start)
    return 2 * n ** 3 / statistics.median(times[3:])

class Training:
    """A script's train(), with the arguments that main(flags) calls it with."""
    def __init__(self, row, device):
        script, *flags = ROWS[row]
        self.device, self.module = device, importlib.import_module(script)
        self.train, self.folder = self.module.train, tempfile.TemporaryDirectory()

        def caught(*args):
            self.bound = inspect.signature(self.train).bind(*args)
            raise Enough
        with mock.patch.object(self.module, "train", caught), contextlib.suppress(Enough), \
                contextlib.redirect_stdout(io.StringIO()):
            self.module.main([*flags[device.type == "cpu"].split(), "--device", device.type,
                              "--out", f"{self.folder.name}/run"])
        self.a = self.bound.arguments["a"]
        self.a.epochs = 10 ** 6  # on_step says when it is enough
        self.bound.arguments["measure"] = lambda *_: {}  # no probes

    def run(self, on_step, compiled=False):
        """Train until on_step(number of steps done) raises Enough."""
        done = itertools.count(1)
        hook = register_optimizer_step_post_hook(lambda *_: on_step(next(done)))
        self.a.compile = compiled
        torch._dynamo.reset()
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Enough):
                self.train(*self.bound.args, **self.bound.kwargs)
        finally:
            hook.remove()

    def flops(self):
        """Of the second step."""
        totals = []

        def on_step(done):
            totals.append(counter.get_total_flops())
            if done == 2:
                raise Enough
        with FlopCounterMode(display=False) as counter:
            self.run(on_step)
        return totals[1] - totals[0]

    def measure(self, steps, compiled=False):
        """(pictures a second of each stretch, host syncs as (file, line), ms of kernels a step)."""
        last, times = steps * (WARM + TIMED), []
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        profile = torch.profiler.profile(activities=activities)

        def on_step(done):
            if done % steps == 0 and steps * WARM <= done <= last:
                finish(self.device)
                times.append(time.perf_counter())
            if self.device.type == "cpu":
                if done == last:
                    raise Enough
            elif done == last:
                torch.cuda.set_sync_debug_mode("warn")
            elif done == last + WATCHED:
                torch.cuda.set_sync_debug_mode("default")
                finish(self.device)
                profile.start()
            elif done == last + 2 * WATCHED:
                finish(self.device)
                profile.stop()
                raise Enough
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.run(on_step, compiled)
        kernels = 0
        for e in profile.events() if self.device.type == "cuda" else ():
            if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation:
                kernels += e.time_range.elapsed_us() / 1000 / WATCHED
        syncs = {(Path(w.filename).name, w.lineno) for w in caught
                 if "called a synchroniz" in str(w.message)}
        rates = [self.a.batch_size * steps / (b - a) for a, b in itertools.pairwise(times)]
        return rates, syncs, kernels

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    p.add_argument("--steps", type=int, default=20, help="of one timed stretch")
    args = p.parse_args(argv)
    device, results = torch.device(args.device), {}
    limit = matrix_rate(device)
    header(device, matrix_product=f"{limit / 1e12:.2f} TFLOP/s")
    print(f"{'row':12}{'':9}{'batch':>6}{'images/s':>10}{'lowest':>9}{'highest':>9}{'ms':>9}"
          f"{'of rate':>9}{'kernels':>9}{'syncs':>7}{'GiB':>7}")
    for row in args.rows:
        training = Training(row, device)
        flops, batch = training.flops(), training.a.batch_size
        for compiled in [False, True][:1 + (device.type == "cuda")]:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rates, syncs, kernels = training.measure(args.steps, compiled)
            rate = results[row, compiled] = statistics.median(rates)
            print(f"{row:12}{'compiled' if compiled else 'eager':9}{batch:6}{rate:10.0f}"
                  f"{min(rates):9.0f}{max(rates):9.0f}{1000 * batch / rate:9.2f}"
                  f"{100 * flops * rate / batch / limit:8.1f}%", end="")
            if device.type == "cuda":
                memory = torch.cuda.max_memory_allocated() / 2 ** 30
                print(f"{kernels:9.2f}{len(syncs):7}{memory:7.2f}", *sorted(syncs), end="")
            print(flush=True)
    return results

if __name__ == "__main__":
    main()
