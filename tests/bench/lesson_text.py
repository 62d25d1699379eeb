"""On which text does dropout at the embeddings help? The grammar of simcse_deepaug.py, changed in one
point at a time; and what runs on real text look at.

    python tests/bench/lesson_text.py [--seed 0 1 2] [--text default independent ...]
    python tests/bench/lesson_text.py --runs RUN RUN --train-file text60k.txt --sts-dir data/SentEval/data/downstream

default      as it is: a word's company tells its concept
independent  the five concepts of a sentence are drawn independently: a word's company tells nothing
fillers      six words around the sentence, two spellings each, all of one of eight manners of speaking,
             which tells nothing of its meaning
both         independent and fillers: what the words of a sentence tell of each other is the manner only

Each is trained without and with dropout at layer 0 and scored as ever. --runs: of the STS pairs, how
the similarity by each run's encoder goes with the share of content words and of function words (the
150 commonest of the text) that two sentences have in common: standardised regression of its ranks."""
import argparse
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import simcse_deepaug as S  # noqa: E402


def changed(how):
    class Grammar(S.Grammar):
        def __init__(self, seed=0):
            super().__init__(seed)
            if how in ("independent", "both"):
                rng = np.random.default_rng(5)
                grid = rng.integers([16, 16, 16, 16, 8], size=(80_000, 5))
                held = (grid[:, 0] + 2 * grid[:, 1] + grid[:, 2]) % 4 == 1
                self.seen, self.unseen = np.unique(grid[~held], axis=0), np.unique(grid[held], axis=0)

        def say(self, meaning, rng):
            sentence = super().say(meaning, rng)
            if how in ("default", "independent"):
                return sentence
            manner = rng.integers(8)
            words = [f"manner{manner}word{i}{'xy'[rng.integers(2)]}" for i in range(6)]
            return " ".join([*words[:3], sentence, *words[3:]])
    return Grammar

def texts(args):
    print(f"{'Spearman x 100, unseen pairs':30}{'before':>14}{'SimCSE':>16}{'layer 0':>16}   seeds {args.seed}")
    for how in args.text:
        rows = {}
        with mock.patch.object(S, "Grammar", changed(how)), tempfile.TemporaryDirectory() as folder, \
                mock.patch.object(S, "export", lambda *_: 0.0), mock.patch.object(S, "draw"), \
                contextlib.redirect_stdout(io.StringIO()):
            rows = S.main(["--seed", *map(str, args.seed), "--eval-every", "0", "--out", f"{folder}/run"])
        cells = ["%.1f ± %.1f" % row["unseen"] for row in rows.values()]
        print(f"{how:30}{cells[0]:>14}{cells[1]:>16}{cells[2]:>16}", flush=True)

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
    print(f"{len(first)} pairs; the regression's weights{'content words':>18}{'function words':>18}")
    for name in ["scores", *args.runs]:
        if name == "scores":  # what people gave, within each task
            y = np.concatenate([(g - g.mean()) / g.std() for *_, g in pairs.values()])
        else:
            a = S.settings(["--model", f"{name}/model", "--eval-only"])
            a.layer, a.seed = "none", 0
            tokenizer = S.load_tokenizer(a, [])
            u, v = S.encode(S.build(a, tokenizer), tokenizer, first + second).chunk(2)
            y = torch.cosine_similarity(u, v).cpu().numpy()
        y = y.argsort().argsort().astype(float)
        weights = np.linalg.lstsq(X, (y - y.mean()) / y.std(), rcond=None)[0]
        print(f"{name:44}{weights[0]:18.2f}{weights[1]:18.2f}")

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["default", "independent", "fillers", "both"]
    p.add_argument("--text", nargs="+", choices=names, default=names)
    p.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--runs", nargs="+", default=[], help="finished runs on real text")
    p.add_argument("--train-file", default="")
    p.add_argument("--sts-dir", default="data/SentEval/data/downstream")
    args = p.parse_args(argv)
    S.transformers.logging.set_verbosity(50)
    looked_at(args) if args.runs else texts(args)

if __name__ == "__main__":
    main()
