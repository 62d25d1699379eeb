"""On which text does dropout at the embeddings help? The grammar of simcse_deepaug.py, changed in
one point at a time; and what runs on real text look at.

    python tests/bench/lesson_text.py [--seed 0 1 2] [--text default independent ...]
    python tests/bench/lesson_text.py --runs RUN RUN --train-file text60k.txt [--sts-dir ...]

Each text is trained on without and with dropout at layer 0. --runs: of the STS pairs, how the
similarity by each run goes with the share of content words and of function words (the 150
commonest) that two sentences have in common: standardised regression of its ranks."""
import contextlib
import io
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from bench_views import options  # noqa: E402

import simcse_deepaug as S  # noqa: E402


class Independent(S.Grammar):
    """The five concepts are drawn independently: a word's company tells nothing."""
    def __init__(self):
        super().__init__()
        grid = np.random.default_rng(5).integers([16, 16, 16, 16, 8], size=(80_000, 5))
        held = (grid[:, 0] + 2 * grid[:, 1] + grid[:, 2]) % 4 == 1
        self.seen, self.unseen = (np.unique(grid[rows], axis=0) for rows in (~held, held))

class Fillers(S.Grammar):
    """Six words around a sentence, of one of eight manners of speaking: not of its meaning."""
    def say(self, meaning, rng):
        sentence, manner = super().say(meaning, rng), rng.integers(8)
        words = [f"manner{manner}word{i}{'xy'[rng.integers(2)]}" for i in range(6)]
        return " ".join([*words[:3], sentence, *words[3:]])

GRAMMARS = {"default": S.Grammar, "independent": Independent, "fillers": Fillers,
            "both": type("Both", (Fillers, Independent), {})}

def texts(args):
    print(f"Spearman x 100 of unseen pairs, seeds {args.seed}")
    for how in args.text:
        with mock.patch.object(S, "Grammar", GRAMMARS[how]), \
                mock.patch.object(S, "export", lambda *_: 0.0), mock.patch.object(S, "draw"), \
                tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            rows = S.main(["--seed", *map(str, args.seed), "--eval-every=0", f"--out={out}/run"])
        cells = [f"{name} %.1f ± %.1f" % row["unseen"] for name, row in rows.items()]
        print(f"{how:14}", ", ".join(cells), flush=True)

def words_of(text):
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())

def looked_at(args):
    pairs = S.load_pairs(S.settings(["--sts-dir", args.sts_dir, "--train-file", args.train_file]))
    del pairs["train"]
    first, second = (sum((pair[i] for pair in pairs.values()), []) for i in (0, 1))
    common = {w for w, _ in Counter(words_of(Path(args.train_file).read_text())).most_common(150)}

    def shared(function):
        sets = [[{w for w in words_of(s) if (w in common) == function} for s in half]
                for half in (first, second)]
        return np.array([len(a & b) / max(1, len(a | b)) for a, b in zip(*sets)])
    X = np.stack([shared(False), shared(True)], 1)
    X = (X - X.mean(0)) / X.std(0)
    # what people gave, within each task
    found = {"scores": np.concatenate([(g - g.mean()) / g.std() for *_, g in pairs.values()])}
    for name in args.runs:
        a = S.settings(["--model", f"{name}/model", "--eval-only"])
        a.layer, a.seed = "none", 0
        tokenizer = S.load_tokenizer(a, [])
        u, v = S.encode(S.build(a, tokenizer), tokenizer, first + second).chunk(2)
        found[name] = torch.cosine_similarity(u, v).cpu().numpy()
    print(f"{len(first)} pairs; the regression's weights of content words, function words")
    for name, y in found.items():
        y = y.argsort().argsort().astype(float)
        weights = np.linalg.lstsq(X, (y - y.mean()) / y.std(), rcond=None)[0]
        print(f"{name:44}%.2f %.2f" % tuple(weights))

if __name__ == "__main__":
    S.transformers.logging.set_verbosity(50)
    args, _ = options(__doc__, seed=[0, 1, 2], text=[*GRAMMARS], runs=[""], train_file="",
                      sts_dir="data/SentEval/data/downstream")
    looked_at(args) if args.runs != [""] else texts(args)
