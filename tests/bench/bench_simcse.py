"""simcse_deepaug.py against the usual ways, on one network of MiniLM's sizes, in turns.

    python tests/bench/bench_simcse.py [--device cuda] [--steps 4] [--repeats 2] [--sentences 1500]

A training step with Deep Augmentation at layer 4, in buckets of ten batches and of one, against
SimCSE's: random batches padded to 32 tokens, MLM in a second forward with the head on every token.
encode() against batches of 64, sorted as SentEval does and in file order, and one at a time. The
sentences are those in data/ where they lie, else the grammar's."""
import functools
import random
import sys
import tempfile
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from bench_views import ROOT, options, seconds, table  # noqa: E402

import simcse_deepaug as S  # noqa: E402


def settings(args, *words):
    sts = ROOT / "data/SentEval/data/downstream"
    words += ("--depth=6", "--width=384", "--pooler=mean", "--layer=4", "--batch-size",
              str(args.batch_size), *["--sts-dir", str(sts)] * sts.is_dir())
    a = S.settings([*words, "--device", args.device])
    a.layer, a.seed = "4", 0
    return a

def usual_steps(net, data, a, n):
    lm, tokenizer = net.lm.train(), data.tokenizer
    special = torch.tensor(tokenizer.all_special_ids, device=a.device)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-5, weight_decay=0.0)
    for _ in range(n):
        rows = torch.randint(len(data.lengths), (a.batch_size,)).repeat(2)
        ids = data.tokens[rows.to(a.device)].long()
        mask = (ids != tokenizer.pad_token_id).long()
        with torch.autocast(a.device, torch.bfloat16, enabled=a.device == "cuda"):
            h = lm.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            z1, z2 = S.mean_of_tokens(h, mask).float().chunk(2)
            cosines = F.cosine_similarity(z1.unsqueeze(1), z2.unsqueeze(0), dim=-1) / 0.05
            loss = F.cross_entropy(cosines, torch.arange(len(z1), device=a.device))
            if a.mlm:
                masked, index, targets = S.mask_tokens(ids, special, tokenizer.mask_token_id,
                                                       len(tokenizer))
                labels = torch.full_like(ids.flatten(), -100).index_copy(0, index, targets)
                logits = lm(input_ids=masked, attention_mask=mask).logits
                loss = loss + 0.1 * F.cross_entropy(logits.flatten(0, 1).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

def ours_seconds(net, data, a, n):
    """train() measures its steps itself, without the checkpoints before and after them."""
    rows, a.epochs = n * a.batch_size, 1
    data = S.SimpleNamespace(**{**vars(data), "lengths": data.lengths[:rows],
                                "tokens": data.tokens[:rows]})
    with tempfile.TemporaryDirectory() as out:
        return S.train(a, net, data, Path(out), {}, lambda tests: {}, None)["seconds"]

@torch.no_grad()
def usual_encode(net, tokenizer, columns, size, key=None):
    for column in columns:
        column = sorted(column, key=key) if key else column
        for start in range(0, len(column), size):
            x = tokenizer(column[start:start + size], padding=True, truncation=True,
                          max_length=net.longest, return_tensors="pt").to(net.lm.device)
            S.mean_of_tokens(net.lm.base_model(**x)[0], x["attention_mask"])

def main():
    args, device = options(__doc__, batch_size=64, steps=4, sentences=1500, repeats=2)
    for mlm in ("--no-mlm", "--mlm"):
        rates = {"buckets of ten": [], "random batches": [], "usual": []}
        ten, one = (settings(args, mlm, f"--bucket={bucket}") for bucket in (10, 1))
        data = S.load_data(ten)
        net = S.build(ten, data.tokenizer)
        usual_steps(net, data, ten, 1)
        for _ in range(args.repeats):
            taken = (ours_seconds(net, data, ten, args.steps),
                     ours_seconds(net, data, one, args.steps),
                     seconds(device, usual_steps, net, data, ten, args.steps)[0])
            for row, t in zip(rates.values(), taken):
                row.append(args.steps * args.batch_size / t)
        table(rates, f"sentences/s, {mlm}")
    columns = [c for name, (*pair, _) in data.pairs.items() if name != "dev" for c in pair]
    kept = sorted({*chain(*columns)})
    kept = {*random.Random(0).sample(kept, min(args.sentences, len(kept)))}
    columns = [[s for s in column if s in kept] for column in columns]
    sentences, tokenizer, rates = [*chain(*columns)], data.tokenizer, {}
    net.eval()
    usual = functools.partial(usual_encode, net, tokenizer, columns)
    ways = {"encode()": lambda: S.encode(net, tokenizer, sentences),
            "batches of 64, sorted": lambda: usual(64, lambda s: len(s.split())),
            "batches of 64, file order": lambda: usual(64), "one at a time": lambda: usual(1)}
    for name in [*ways] * args.repeats:
        rates.setdefault(name, []).append(len(sentences) / seconds(device, ways[name])[0])
    table(rates, "sentences/s")

if __name__ == "__main__":
    main()
