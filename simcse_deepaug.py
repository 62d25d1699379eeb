# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.0", "numpy", "matplotlib", "tqdm", "safetensors"]
# ///
"""SimCSE with Deep Augmentation: sentence embeddings, the whole method in one file.

Papers: Brüel-Gabrielsson, Wang, Baradad, Solomon, "Deep Augmentation", arXiv 2303.14537, Sections 5.2, 6 and App. B, C;
Gao, Yao, Chen, "SimCSE", EMNLP 2021.

SimCSE passes every sentence twice through BERT; only the dropout masks differ. Each first vector z_i must pick its
partner z'_i out of the batch's N second vectors:

    loss = mean over i of  -log  exp(cos(z_i, z'_i) / T) / sum_j exp(cos(z_i, z'_j) / T),     T = 0.05  (`simcse_loss`)

Deep Augmentation adds a stronger dropout A at one place, layer l (0 embeddings, 1-12 transformer layers, 13 output
vector; picture in section 4), to a random subset of the 2N rows (each with probability --sample, 0.5); BERT's own 10 %
stays everywhere. Rate 0.5 is the paper's untuned choice; its best run with stop-gradient has 0.125 (--preset paper).
With stop-gradient the augmented rows send no gradient into the layers up to l.

    g^l(x) = f_above( A( f_below(x) ) )                                                       (Eq. 2, `deep_augment`)

--mlm adds BERT's own loss, masked-language modelling, computed in a second, equally augmented pass. The paper finds
that this hurts plain SimCSE much more than Deep Augmentation (Fig. 7, 8), and believes that SimCSE, Deep Augmentation
and MLM together can train from scratch. The default run does that, on sentences from a small grammar; --model takes a
trained BERT instead.

Commands
    python simcse_deepaug.py                                       # a small BERT from scratch, layer 8, stop-gradient
    python simcse_deepaug.py --layer none                          # plain SimCSE + MLM: the baseline
    python simcse_deepaug.py --train-file lines.txt --sts-dir DIR  # your sentences, one a line; the STS tasks
    python simcse_deepaug.py --eval-only --model FOLDER --pooler mean --sts-dir DIR    # score any BERT-like encoder
    python simcse_deepaug.py --download                            # Wikipedia sentences, STS, bert-base-uncased
    python simcse_deepaug.py --preset paper                        # the paper's setting, for a GPU
    python simcse_deepaug.py --compare runs/*                      # Fig. 8's table and Fig. 6's figure of finished runs
    torchrun --nproc_per_node=4 simcse_deepaug.py --preset paper   # several GPUs, the same training

What to expect
    The default run takes about a minute on two CPU cores; Spearman x 100 on pairs of unseen combinations rises from
    18.0 ± 1.1 to 42.8 ± 2.3 (three seeds; without Deep Augmentation 46.5 ± 2.9). A BERT of width 64 from scratch on
    60,000 real sentences, average of the seven STS tasks: 48.4 before, SimCSE 53.5 ± 0.7, layer 12 with stop-gradient
    53.8 ± 1.2, layer 8 48.4 (all with MLM). So small a start does not show the paper's gain; docs/results.md has all
    that was measured. --eval-only gives all-MiniLM-L6-v2's published STS scores.

Deviations from the papers and their code
    1. Batches are bucketed by length: 10 batches are drawn at random, sorted by length and cut anew (SimCSE: random
       batches, which all reach 32 tokens). A sentence still meets any other one of its length.
    2. The last, ragged batch of an epoch is dropped, so that every loss has as many negatives.
    3. The small BERT is pooled by the mean of its tokens: at random weights its [CLS] says next to nothing of the
       sentence, and short training did not get away from that. A trained --model is pooled as in SimCSE.
    4. Layer 13 with stop-gradient does detach (in the authors' code a bug keeps it from doing so).
    5. The CKA maps of the layers (Fig. 10) compare means over tokens; the paper does not say what it compares.
    6. Positions count from a sentence's first token, so padding may stand on either side.
    7. --objective supervised regresses scores from |u - v|, u * v (Tai et al. 2015); the paper does not say from what.
    8. On CUDA the forward pass runs in bfloat16 (loss, weights and evaluation in float32).
    9. SimCSE's second pass, for MLM, goes through the network together with the first: the same numbers, half of the
       kernels; but --transform pca finds its components among the rows of both.
"""
import argparse
import copy
import csv
import hashlib
import importlib.util
import io
import json
import linecache
import logging
import math
import mmap
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import sys
import tarfile
import threading
import time
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

NAME = "simcse_deepaug"
SOURCE = Path(__file__).read_text(encoding="utf-8")                 # goes into every checkpoint
POOL = 10                                                            # batches that are sorted by length together
linecache.cache[__file__] = len(SOURCE), None, SOURCE.splitlines(True), __file__    # TorchScript reads it at the end of
#                                                                      a run, when the file may have been edited

# ----------------------------------------------------------------------------------------------------------------
# 1 Settings
# ----------------------------------------------------------------------------------------------------------------

# SimCSE's settings for bert-base, and the layer and rate that the authors' grid found best with stop-gradient
PAPER = dict(model="bert-base-uncased", train_file="data/wiki1m_for_simcse.txt", max_length=32, mlm=False,
             sts_dir="data/SentEval/data/downstream", layer=["8"], rate=0.125, batch_size=64, lr=3e-5, epochs=1,
             warmup=0.0, eval_every=125, select="dev")
# Flags that say where and how a run computes, not what: they may change on --resume and are no part of its name
# (of `preset` the name stands there, and the flags that it sets count).
FREE = {"out", "resume", "device", "download", "compile", "log_every", "save_every", "seeds", "compare", "export",
        "eval_only", "preset"}


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def fail(message: str):
    """One clear line on stderr and exit code 2."""
    print(f"{NAME}.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return random.Random(repr(numbers)).getrandbits(63)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see --help)")


def settings(argv=None) -> argparse.Namespace:
    """Read and check the flags. Anything wrong is told in one line before any work starts (exit code 2)."""
    p = Parser(description="SimCSE with Deep Augmentation.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("deep augmentation")
    g.add_argument("--layer", nargs="+", default=["8"], metavar="L",
                   help="0 embeddings, 1-12 transformer layers, 13 output vector; several; all; none; auto")
    g.add_argument("--rate", type=float, default=0.5, help="dropout rate, in [0, 1)")
    g.add_argument("--stop-grad", action=argparse.BooleanOptionalAction, default=True,
                   help="no gradient from augmented rows below the layer")
    g.add_argument("--sample", type=float, default=0.5, help="share of the batch's rows to augment, in (0, 1]")
    g.add_argument("--transform", choices=["dropout", "channel", "pca"], default="dropout",
                   help="element-wise dropout, dropout of features over all tokens, or removal of principal components")
    g.add_argument("--components", type=int, default=1, help="pca: how many leading components are removed")
    g = p.add_argument_group("sentences")
    g.add_argument("--train-file", default="", metavar="FILE", help="one sentence a line, UTF-8; empty: a grammar's")
    g.add_argument("--sts-dir", default="", metavar="DIR", help="holds STS/ and SICK/ as SentEval lays them out")
    g.add_argument("--max-length", type=int, default=32, help="tokens of a training sentence, [CLS] and [SEP] included")
    g.add_argument("--download", action="store_true", help="fetch what --preset paper needs into data/, and stop")
    g = p.add_argument_group("network and objective")
    g.add_argument("--model", default="small", help="small: a new BERT of --depth and --width; or a folder or hub name")
    g.add_argument("--depth", type=int, default=12, help="transformer layers of the small BERT")
    g.add_argument("--width", type=int, default=32, help="its hidden size, a multiple of 32 (the size of a head)")
    g.add_argument("--vocab-size", type=int, default=8000, help="its WordPieces, learned from the training sentences")
    g.add_argument("--dropout", type=float, help="BERT's own hidden and attention dropout; not given: the model's, 0.1")
    g.add_argument("--pooler", choices=["cls", "cls-mlp", "mean"],
                   help="[CLS], in training through an MLP; [CLS] through the MLP at test too; mean of the tokens. Not "
                        "given: cls for a trained --model, mean for the small BERT, whose [CLS] has learned nothing")
    g.add_argument("--objective", choices=["simcse", "supervised"], default="simcse",
                   help="supervised: regression on the STS-B training pairs")
    g.add_argument("--temperature", type=float, default=0.05, help="of the contrastive loss")
    g.add_argument("--mlm", action=argparse.BooleanOptionalAction, default=True, help="masked-language modelling too")
    g.add_argument("--mlm-weight", type=float, default=0.1)
    g.add_argument("--mlm-probability", type=float, default=0.15, help="share of the tokens to predict")
    g = p.add_argument_group("training")
    g.add_argument("--preset", choices=["default", "paper"], default="default", help=f"paper: {PAPER}")
    g.add_argument("--epochs", type=int, default=1)
    g.add_argument("--batch-size", type=int, default=64, help="sentences a step, two views each, over all processes")
    g.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW; falls linearly to 0")
    g.add_argument("--weight-decay", type=float, default=0.0)
    g.add_argument("--warmup", type=float, default=0.1, help="share of the run in which the learning rate rises")
    g = p.add_argument_group("run")
    g.add_argument("--out", default="", help="run folder; empty: runs/NAME-DATA-WHAT DIFFERS-sSEED")
    g.add_argument("--seed", type=int, default=0, help="fixes weights, order, masks and dropout")
    g.add_argument("--seeds", type=int, nargs="+", help="run each of these seeds and report mean ± std")
    g.add_argument("--resume", action="store_true", help="go on from the run folder's checkpoint.pt")
    g.add_argument("--init", default="", metavar="RUN", help="start from the weights of this run folder")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    g.add_argument("--compile", action="store_true", help="torch.compile the network (a minute to start, then faster)")
    g.add_argument("--deterministic", action="store_true", help="same bits every time on CUDA too (slower)")
    g.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    g.add_argument("--save-every", type=float, default=60, metavar="SECONDS", help="between checkpoints")
    g = p.add_argument_group("evaluation and export")
    g.add_argument("--eval-only", action="store_true", help="score --model (or --init) and stop")
    g.add_argument("--eval-every", type=int, default=125, metavar="STEPS", help="score on the dev pairs; 0: never")
    g.add_argument("--select", choices=["last", "dev"], default="last",
                   help="keep the last weights, or those with the best dev score")
    g.add_argument("--export", choices=["torchscript", "pt2"], default="torchscript", help="pt2: its format beside it")
    g.add_argument("--compare", nargs="+", metavar="RUN", help="only print and draw these finished runs")

    a = p.parse_args(argv)
    if a.preset == "paper":
        p.set_defaults(**PAPER)
        a = p.parse_args(argv)
    p.set_defaults(pooler="mean" if a.model == "small" else "cls")
    a.pooler = a.pooler or p.get_default("pooler")
    if a.eval_only:                                                  # nothing is augmented or predicted then
        a.layer, a.mlm = ["none"], False
    check_settings(a)
    differs = [f"{k.replace('_', '')}{'_'.join(map(str, v)) if isinstance(v, list) else Path(str(v)).name}"
               for k, v in config_of(a).items() if k not in ("train_file", "sts_dir", "seed") and v != p.get_default(k)]
    data = Path(a.train_file).stem if a.train_file else "grammar"
    a.name = "-".join([NAME, data] + ([a.preset] if a.preset != "default" else []) + differs)
    return a


def config_of(a) -> dict:
    """The flags that decide what is computed."""
    return {k: v for k, v in vars(a).items() if k not in FREE | {"name"}}


def check_settings(a: argparse.Namespace) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))                   # set by torchrun
    if not all(re.fullmatch(r"\d+", s) for s in a.layer) and a.layer not in (["none"], ["all"], ["auto"]):
        fail(f"--layer {' '.join(a.layer)}: give numbers (0 embeddings, then the transformer layers, then the output "
             f"vector), or all, none, auto")                         # whether the model has them: targets_of
    for ok, message in [
        (0 <= a.rate < 1, f"--rate {a.rate}: must be in [0, 1)"),
        (0 < a.sample <= 1, f"--sample {a.sample}: must be in (0, 1]"),
        (a.components >= 1, f"--components {a.components}: must be at least 1"),
        (a.dropout is None or 0 <= a.dropout < 1, f"--dropout {a.dropout}: must be in [0, 1)"),
        (a.layer != ["auto"] or importlib.util.find_spec("cka"), "--layer auto needs cka.py beside this script"),
        (a.layer != ["auto"] or a.init or a.model != "small",
         f"--layer auto reads a trained network: give one with --model, or make one with "
         f"`python {NAME}.py --layer none --out runs/base` and add --init runs/base"),
        (a.width % 32 == 0 and a.width > 0 and a.depth >= 1, "--width must be a multiple of 32, --depth at least 1"),
        (a.vocab_size >= 100, "--vocab-size must be at least 100"),
        (a.batch_size >= 2 and a.epochs >= 1, "--batch-size must be at least 2 and --epochs at least 1"),
        (a.max_length >= 4, "--max-length must be at least 4"),
        (0 < a.lr < math.inf and 0 < a.temperature < math.inf, "--lr and --temperature must be positive"),
        (0 <= a.weight_decay < math.inf, f"--weight-decay {a.weight_decay}: must not be negative"),
        (0 <= a.mlm_weight < math.inf, f"--mlm-weight {a.mlm_weight}: must not be negative"),
        (0 < a.mlm_probability < 1, f"--mlm-probability {a.mlm_probability}: must be in (0, 1)"),
        (0 <= a.warmup < 1, f"--warmup {a.warmup}: must be in [0, 1)"),
        (a.log_every >= 1 and a.eval_every >= 0, "--log-every must be at least 1, --eval-every not negative"),
        (a.save_every >= 0, f"--save-every {a.save_every}: must not be negative"),
        (a.select == "last" or a.eval_every, "--select dev needs --eval-every"),
        (not (a.eval_only and a.resume), "--eval-only scores --model or --init; there is nothing to resume"),
        (not a.eval_only or a.init or a.model != "small", "--eval-only needs a trained network: --model or --init"),
        (all(0 <= s < 2 ** 43 for s in [a.seed, *(a.seeds or [])]), "--seed and --seeds must be in 0 .. 2^43 - 1"),
        (len(set(a.seeds or [])) == len(a.seeds or []), "--seeds must differ from each other"),
        (not a.compile or shutil.which(os.environ.get("CXX", "g++")), "--compile needs a C++ compiler (g++)"),
        (world == 1 or not (a.seeds or a.download), "under torchrun: no --seeds, and --download beforehand"),
        (a.batch_size % world == 0, f"--batch-size {a.batch_size} must be a multiple of the {world} processes"),
        (a.device != "cuda" or torch.cuda.is_available(), "--device cuda: no CUDA device here; use --device cpu"),
    ]:
        if not ok:
            fail(message)


# ----------------------------------------------------------------------------------------------------------------
# 2 Data
# ----------------------------------------------------------------------------------------------------------------

# The default corpus. A line of SCENES is one scene's words: who / did / what / where, three synonyms each.
SCENES = """
doctor,physician,medic / examined,inspected,checked / patient,casualty,sufferer / hospital,clinic,ward
cook,chef,baker / cooked,prepared,roasted / meal,dinner,supper / kitchen,canteen,pantry
farmer,grower,peasant / gathered,harvested,collected / crop,grain,wheat / field,meadow,barn
sailor,seaman,mariner / steered,guided,piloted / boat,ship,vessel / harbour,port,dock
singer,vocalist,soprano / performed,presented,rendered / song,tune,melody / theatre,opera,hall
teacher,tutor,instructor / explained,described,clarified / lesson,lecture,topic / classroom,school,academy
mechanic,engineer,technician / repaired,mended,fixed / machine,engine,motor / garage,workshop,factory
lawyer,attorney,advocate / studied,reviewed,analysed / contract,agreement,treaty / office,court,chamber
painter,artist,sculptor / admired,praised,celebrated / picture,portrait,mural / gallery,museum,studio
runner,athlete,player / watched,followed,observed / match,game,contest / stadium,arena,gym
merchant,trader,dealer / sold,traded,exchanged / fabric,cloth,textile / market,bazaar,shop
traveller,tourist,visitor / visited,toured,explored / castle,palace,fortress / mountains,hills,highlands
scientist,researcher,scholar / discovered,found,detected / planet,star,comet / observatory,laboratory,institute
builder,carpenter,mason / built,constructed,erected / house,cottage,cabin / village,hamlet,town
soldier,warrior,guard / defended,protected,secured / bridge,gate,wall / fort,camp,barracks
child,kid,youngster / lost,misplaced,mislaid / toy,doll,puppet / garden,yard,park
"""
TIMES = """in the morning,at dawn,at sunrise / in the evening,at dusk,at sunset / at night,at midnight,after dark
in winter,in december,in the cold / in summer,in july,in the heat / yesterday,recently,lately
long ago,once,in the past / today,now,this week"""
TEMPLATES = ["the {0} {1} the {2} in the {3} {4}", "{4} the {0} {1} the {2} in the {3}",
             "in the {3} the {0} {1} the {2} {4}", "the {2} was {1} by the {0} in the {3} {4}",
             "{4} , in the {3} , some {2} was {1} by the {0}", "it was {4} that this {0} {1} some {2} in the {3}",
             "it was the {0} who {1} this {2} in the {3} {4}",
             "this {2} , they say , was {1} in the {3} by some {0} {4}"]


class Grammar:
    """The default corpus: sentences about who did what to what, where and when, and pairs of them scored 0 to 5.

    A meaning is five concepts of three words each, told in one of eight word orders. Concepts go together as the rows
    of SCENES do: what the doctor does comes from his row or one of its four neighbours, and so on. So a word's company
    tells its concept; nothing else says that "physician" and "medic" are one. 24 % of the (who, did, what)
    combinations are kept out of training, for testing. A pair's score is the number of concepts shared: 0 unrelated,
    5 the same.
    """
    def __init__(self, seed: int):
        scenes = [[words.split(",") for words in row.split(" / ")] for row in SCENES.strip().splitlines()]
        times = [words.split(",") for words in TIMES.replace("\n", " / ").split(" / ")]
        self.words, self.seed, near = [*zip(*scenes), times], seed, np.arange(-2, 3)
        grid = np.stack(np.meshgrid(np.arange(16), near, near, near, near, indexing="ij"), -1).reshape(-1, 5)
        grid = grid.cumsum(1) % 16                                   # a concept's row: the one before's -2 ... +2
        grid[:, 4] //= 2                                             # there are only eight times
        grid = np.unique(grid, axis=0)
        held_out = (grid[:, 0] + 2 * grid[:, 1] + grid[:, 2]) % 4 == 1    # any two of the three still meet in training
        self.seen, self.unseen = grid[~held_out], grid[held_out]     # int64 [n, 5]

    def say(self, meaning, rng) -> str:
        words = [synonyms[concept][rng.integers(3)] for synonyms, concept in zip(self.words, meaning)]
        return TEMPLATES[rng.integers(len(TEMPLATES))].format(*words)

    def sentences(self, n: int) -> list:
        rng = np.random.default_rng((self.seed, 0))
        return [self.say(self.seen[i], rng) for i in rng.integers(len(self.seen), size=n)]

    def pairs(self, n: int, unseen: bool, part: int) -> tuple:
        """(n first sentences, n second ones, scores float64 [n]); `part` tells the draws of dev, test, ... apart."""
        rng, pool = np.random.default_rng((self.seed, part)), self.unseen if unseen else self.seen
        first, second, scores = [], [], np.arange(n) % 6
        for k in scores:
            while True:
                meaning = pool[rng.integers(len(pool))]
                others = pool[(pool == meaning).sum(1) == k]         # those that share exactly k concepts
                if len(others):
                    break
            first.append(self.say(meaning, rng))
            second.append(self.say(others[rng.integers(len(others))], rng))
        return first, second, scores.astype(float)


class Sentences:
    """Many tokenised sentences end to end: `tokens` int32 [T], in memory or memory-mapped; sentence i is
    tokens[starts[i]:starts[i + 1]]."""
    def __init__(self, tokens: np.ndarray, starts: np.ndarray, pad: int):
        self.tokens, self.starts, self.lengths, self.pad = tokens, starts, np.diff(starts), pad

    def __len__(self):
        return len(self.lengths)

    def digest(self) -> str:
        """Names the sentences: how many, and which."""
        return f"{len(self)} ({hashlib.sha256(np.ascontiguousarray(self.tokens)).hexdigest()[:12]})"

    def batch(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """(ids, mask), both int64 [B, L], padded on the right to the longest of these sentences."""
        lengths = self.lengths[index][:, None]
        column = np.arange(lengths.max())
        mask = column < lengths                                                               # [B, L]
        ids = np.where(mask, self.tokens[np.where(mask, self.starts[index][:, None] + column, 0)], self.pad)
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))


def tokenise(tokenizer, sentences: list, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(all token ids int32 [T], lengths int64 [N]), [CLS] and [SEP] included."""
    if not sentences:
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    ids = tokenizer(sentences, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    tokenizer.backend_tokenizer.no_truncation()                      # it would stay in the saved tokenizer
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, lengths.sum()), lengths


def in_memory(tokenizer, sentences: list, max_length: int) -> Sentences:
    tokens, lengths = tokenise(tokenizer, sentences, max_length)
    return Sentences(tokens, np.concatenate([[0], lengths.cumsum()]), tokenizer.pad_token_id)


def read_lines(path: Path, bar=None):
    """The sentences of a text file, one a line, without its empty lines, line by line through a memory map."""
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
            for number, line in enumerate(iter(text.readline, b""), start=1):
                if bar is not None:
                    bar.update(len(line))
                try:
                    sentence = line.decode("utf-8-sig").strip()
                except UnicodeDecodeError:
                    if bar is not None:
                        bar.close()                                  # else the message would stand behind it
                    fail(f"{path}, line {number}: not UTF-8; convert it with `iconv -f latin1 -t utf-8`")
                if sentence:
                    yield sentence
    except (OSError, ValueError) as e:                               # ValueError: mmap of an empty file
        if bar is not None:
            bar.close()
        fail(f"--train-file {path}: " + ("no such file" if not path.exists() else f"cannot be read ({e})"))


def fingerprint(path: Path, *more) -> str:
    """Names a file as it is now (place, size, time of writing) and the settings it is read with."""
    stat = path.stat()
    return hashlib.sha256(repr((str(path.resolve()), stat.st_size, stat.st_mtime_ns, *more)).encode()).hexdigest()[:12]


@contextmanager
def made_once(folder: Path):
    """A place to build `folder` in, which then becomes it. Two runs may build the same one: the first to end wins."""
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    beside.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        with suppress(OSError):                                      # it is there by now
            os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def learn_tokenizer(path: Path, vocab_size: int, folder: Path):
    """A lower-case WordPiece tokenizer as BERT's, learned from the lines of `path`; kept in `folder`."""
    from tokenizers import BertWordPieceTokenizer
    if not path.exists():
        fail(f"--train-file {path}: no such file")
    kept = folder / f"wordpiece-{fingerprint(path, vocab_size)}"
    if not kept.exists():
        pieces, letters = BertWordPieceTokenizer(lowercase=True), Counter()
        for line in read_lines(path):
            letters.update(pieces.normalize(line))
        # The trainer numbers the pieces of one letter in an order that differs every time, and breaks ties by it. Named
        # beforehand they have their place; a tokenizer of the finished vocabulary takes them for ordinary pieces.
        inside = ["##" + c for c in sorted(c for c, _ in letters.most_common(1000)) if not c.isspace()]
        pieces.train_from_iterator(read_lines(path), vocab_size=vocab_size, show_progress=False,
                                   special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *inside])
        pieces = BertWordPieceTokenizer(vocab=pieces.get_vocab(), lowercase=True)
        with made_once(kept) as part:
            transformers.BertTokenizerFast(tokenizer_object=pieces._tokenizer).save_pretrained(part)
    return transformers.AutoTokenizer.from_pretrained(kept)


def token_file(path: Path, tokenizer, max_length: int, folder: Path) -> Sentences:
    """The sentences of `path`, tokenised once into `folder` and from then on memory-mapped."""
    if not path.exists():
        fail(f"--train-file {path}: no such file")
    tokenizer.backend_tokenizer.no_truncation()                      # some come with a limit or a padding of their own
    tokenizer.backend_tokenizer.no_padding()
    kept = folder / f"tokens-{fingerprint(path, tokenizer.backend_tokenizer.to_str(), max_length)}"
    if not kept.exists():
        with made_once(kept) as part, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, leave=False,
                                               desc="tokenising") as bar:
            lengths, lines = [np.zeros(1, np.int64)], read_lines(path, bar)
            with open(part / "tokens.int32", "wb") as f:
                while chunk := list(islice(lines, 20_000)):
                    tokens, n = tokenise(tokenizer, chunk, max_length)
                    tokens.tofile(f)
                    lengths.append(n)
            np.save(part / "starts.npy", np.concatenate(lengths).cumsum())
    starts = np.load(kept / "starts.npy")
    if len(starts) < 2:
        fail(f"--train-file {path}: holds no sentence")
    return Sentences(np.memmap(kept / "tokens.int32", np.int32, mode="r"), starts, tokenizer.pad_token_id)


# SentEval's tasks: the years 2012-2016 consist of subsets; STS-B and SICK-R are one file each
YEARS = {12: "MSRpar MSRvid SMTeuroparl surprise.OnWN surprise.SMTnews", 13: "FNWN headlines OnWN",
         14: "deft-forum deft-news headlines OnWN images tweet-news",
         15: "answers-forums answers-students belief headlines images",
         16: "answer-answer headlines plagiarism postediting question-question"}


def read_pairs(path: Path, columns: tuple, skip: int = 0, scores: Path | None = None) -> tuple:
    """(first sentences, second sentences, scores float64 [n]) from a tab-separated file: columns = (first, second,
    score) by number; the scores may stand in a file of their own. Pairs without a score are left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[skip:]
    golds = scores.read_text(encoding="utf-8").split("\n") if scores else None
    while lines and not lines[-1].strip():
        lines.pop()
    if scores:
        golds = golds[:-1] if golds[-1] == "" else golds             # the line end of the last line
        if len(golds) != len(lines):
            fail(f"{scores} has {len(golds)} lines, {path} has {len(lines)}")
    first, second, values = [], [], []
    for i, line in enumerate(lines):
        cells = line.rstrip("\r").split("\t")
        try:
            gold = golds[i].strip() if scores else cells[columns[2]].strip()
            pair = cells[columns[0]], cells[columns[1]]
        except IndexError:
            fail(f"{path}, line {i + 1 + skip}: has {len(cells)} tab-separated cells, too few")
        if gold:
            if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", gold, re.IGNORECASE):
                fail(f"{scores or path}, line {i + 1 + skip}: the score {gold!r} is no number")
            first.append(pair[0])
            second.append(pair[1])
            values.append(float(gold))
    if not values:
        fail(f"{path}: holds no scored pair")
    return first, second, np.array(values)


def load_sts(folder: Path) -> tuple[dict, dict]:
    """({test task: (first sentences, second ones, scores)}, {"train", "dev": the same of STS-B}); what is not in the
    folder is named and left out. SentEval's "all": the subsets of a year are concatenated."""
    def subsets(year, names):
        at = folder / f"STS/STS{year}-en-test"
        parts = [read_pairs(at / f"STS.input.{n}.txt", (0, 1), scores=at / f"STS.gs.{n}.txt") for n in names.split()]
        first, second, scores = zip(*parts)
        return list(chain(*first)), list(chain(*second)), np.concatenate(scores)

    sources = {f"STS{year}": lambda y=year, n=names: subsets(y, n) for year, names in YEARS.items()}
    benchmark = folder / "STS/STSBenchmark"
    sources["STS-B"] = lambda: read_pairs(benchmark / "sts-test.csv", (5, 6, 4))
    sources["SICK-R"] = lambda: read_pairs(folder / "SICK/SICK_test_annotated.txt", (1, 2, 3), skip=1)
    sources["dev"] = lambda: read_pairs(benchmark / "sts-dev.csv", (5, 6, 4))
    sources["train"] = lambda: read_pairs(benchmark / "sts-train.csv", (5, 6, 4))
    found = {}
    for name, read in sources.items():
        try:
            found[name] = read()
        except FileNotFoundError as e:
            print(f"{name}: left out, there is no {e.filename}")
        except UnicodeDecodeError as e:
            fail(f"{name} in {folder}: not UTF-8 ({e})")
    tasks = {k: v for k, v in found.items() if k not in ("dev", "train")}
    if not tasks:
        fail(f"--sts-dir {folder}: holds none of the tasks; it must hold STS/ and SICK/ as SentEval's data/downstream")
    return tasks, {k: v for k, v in found.items() if k in ("dev", "train")}


def download() -> dict:
    """Fetch SimCSE's Wikipedia sentences, the STS tasks and bert-base-uncased from huggingface.co, check their sizes
    and say where they are. Returns {what: path}."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
    where, repo = {}, {"repo_id": "princeton-nlp/datasets-for-simcse", "repo_type": "dataset"}
    try:
        for name in ("wiki1m_for_simcse.txt", "senteval.tar"):
            path = Path(hf_hub_download(filename=name, local_dir="data", **repo))
            size = get_hf_file_metadata(hf_hub_url(filename=name, **repo)).size
            if path.stat().st_size != size:
                fail(f"--download: {path} has {path.stat().st_size} bytes instead of {size}; remove it and try again")
            where[name] = path
        model = PAPER["model"]
        where[model] = Path(snapshot_download(model, allow_patterns=["*.json", "vocab.txt", "model.safetensors"]))
    except Exception as e:                                           # no network, no such file, a full disk ...
        fail(f"--download: {first_line(e)}")
    folder = Path(PAPER["sts_dir"])
    with tarfile.open(where["senteval.tar"]) as tar:                 # of all its tasks, STS/ and SICK/
        for member in tar.getmembers():
            parts = Path(member.name).parts
            kept = [i for i, part in enumerate(parts) if part in ("STS", "SICK")]
            if kept and member.isfile():
                member.name = str(Path(*parts[kept[0]:]))
                tar.extract(member, folder, filter="data")
    where["STS tasks"] = folder
    for what, path in where.items():
        print(f"{what}: {path}")
    return where


def text_file(a, folder: Path) -> Path:
    """--train-file, or the grammar's sentences, written into `folder` the first time."""
    if a.train_file:
        return Path(a.train_file)
    path = folder / "grammar.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            part.write_text("\n".join(Grammar(0).sentences(20_000)) + "\n", encoding="utf-8")
    return path


def load_scored_pairs(a) -> tuple[dict, dict]:
    """(test tasks, dev and train pairs): of --sts-dir; without it the grammar's, if its sentences are trained on."""
    if a.sts_dir:
        return load_sts(Path(a.sts_dir))
    if a.train_file:
        print("no --sts-dir: nothing is scored")
        return {}, {}
    grammar = Grammar(0)
    return {"unseen": grammar.pairs(1500, True, 1)}, {"dev": grammar.pairs(900, False, 2),
                                                      "train": grammar.pairs(6000, False, 3)}


def epoch_order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int, pool: int = POOL) -> np.ndarray:
    """Which sentences make which batch: int64 [steps, batch_size]; the ragged rest of the epoch is dropped.

    All sentences are shuffled and cut into pools of `pool` batches; inside a pool they are sorted by length, cut into
    batches and the batches shuffled. So a batch has little padding, yet any sentence of its length may be in it, and
    every epoch's batches differ. pool = 1: plain random batches.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))[:len(lengths) // batch_size * batch_size]
    batches = []
    for start in range(0, len(order), pool * batch_size):
        some = order[start:start + pool * batch_size]
        by_length = some[np.argsort(lengths[some], kind="stable")].reshape(-1, batch_size)
        batches.append(rng.permutation(by_length))
    return np.concatenate(batches)


def train_batches(train: Sentences, offset: int, a, step: int, steps: int, rank: int, world: int):
    """From this step on: (index [B], ids [2B, L], mask [2B, L]) of this process's B sentences, then of the B they are
    compared with: number i + `offset` in `train`. SimCSE: 0, the same again; pairs: how many there are."""
    while True:
        order = epoch_order(train.lengths[:len(train) - offset], a.batch_size, a.seed, step // steps)
        for batch in order[step % steps:]:
            mine = batch[rank::world]
            yield mine, *train.batch(np.concatenate([mine, mine + offset]))
            step += 1


# ----------------------------------------------------------------------------------------------------------------
# 3 Views: dropout makes the two views (section 4); what is made beforehand are the masks of --mlm
# ----------------------------------------------------------------------------------------------------------------


def mask_tokens(ids: Tensor, special: Tensor, probability: float, mask_id: int, vocab: int) -> tuple[Tensor, ...]:
    """BERT's masking (Devlin et al., Section 3.1) -> (masked ids [B, L], index [M], targets [M]).

    Every token that is not special (int64 ids of [CLS], [SEP], [PAD], ...) is chosen with this probability; of the
    chosen, 80 % become [MASK], 10 % a random token of the vocabulary, 10 % stay. index: places in ids.flatten().
    Works on the host, so that M is known there and nothing has to wait for the GPU.
    """
    flat = ids.flatten()
    index = ((torch.rand(flat.shape) < probability) & ~torch.isin(flat, special)).nonzero().squeeze(1)
    targets, draw = flat[index], torch.rand(len(index))
    replaced = torch.where(draw < 0.8, mask_id, torch.where(draw < 0.9, torch.randint(vocab, index.shape), targets))
    return flat.index_copy(0, index, replaced).view_as(ids), index, targets


# ----------------------------------------------------------------------------------------------------------------
# 4 Network: transformers' BERT, cut into numbered layers
# ----------------------------------------------------------------------------------------------------------------

# Section 5.2 and Appendix B number the layers of a 12-layer BERT 0-13; so does --layer. Which place that is:
#
#   tokens -> embeddings -> BertLayer 0 -> BertLayer 1 -> ... -> BertLayer 11 -> [CLS] -> MLP -> loss
#                       |             |              |                      |              |
#   --layer             0             1              2     ...             12             13
#
# The authors' code (a fork of transformers) acts on what *enters* BertLayer i, so its indices 0-11 are these places,
# its 12 is after the last layer and its 13 after the MLP: the same numbers. With n layers: 0 ... n, then n + 1.

def blocks_of(lm) -> nn.ModuleList:
    """The transformer layers of a masked-language model of one of the families this script knows."""
    return (lm.base_model.transformer if lm.config.model_type == "distilbert" else lm.base_model.encoder).layer


class Net(nn.Module):
    """Encoder, projector and masked-language head, with Deep Augmentation between the numbered layers.

    forward(ids [B, L], mask [B, L], rows bool [B] or None) -> z [B, dim]; with masked ids, their rows and the places to
    predict it returns (z, logits [M, vocabulary]).
    """
    def __init__(self, a, lm, targets: list):
        super().__init__()
        self.lm = lm                                                 # transformers' model: encoder and tied head
        dim, roberta = lm.config.hidden_size, "roberta" in lm.config.model_type or lm.config.model_type == "camembert"
        self.first_position = lm.config.pad_token_id + 1 if roberta else 0    # RoBERTa counts positions from here
        self.longest = lm.config.max_position_embeddings - self.first_position
        self.pooler, self.dim = a.pooler, dim
        self.projector = None                                        # SimCSE's MLP, new in every training
        if a.objective == "simcse" and a.pooler != "mean":
            self.projector = nn.Sequential(nn.Linear(dim, dim), nn.Tanh())
            nn.init.normal_(self.projector[0].weight, std=lm.config.initializer_range)
            nn.init.zeros_(self.projector[0].bias)
        self.relatedness = nn.Linear(2 * dim, 1) if a.objective == "supervised" else None
        self.targets, self.augmentation = targets, (a.rate, a.stop_grad, a.transform, a.components)

    def augmented(self, l: int, h, rows):
        return deep_augment(h, rows, *self.augmentation) if self.training and l in self.targets else h

    def states(self, ids, mask, rows=None) -> list:
        """Layers 0 ... n: the states of all tokens, n + 1 tensors [B, L, dim]."""
        position = (mask.cumsum(1) - 1).clamp(min=0) + self.first_position    # so padding may stand on either side
        attend = mask[:, None, None, :].bool()                       # [B, 1, 1, L]: nobody looks at padding
        h = self.augmented(0, self.lm.base_model.embeddings(input_ids=ids, position_ids=position), rows)
        states = [h]
        for l, block in enumerate(blocks_of(self.lm), start=1):
            h = self.augmented(l, block(h, attend), rows)
            states.append(h)
        return states

    def pooled(self, h, mask) -> Tensor:
        """The last layer's states [B, L, dim] -> one vector a sentence [B, dim]."""
        if self.pooler == "mean":
            return mean_of_tokens(h, mask)
        first = mask.argmax(1)[:, None, None].expand(-1, 1, h.shape[2])       # [CLS] stands behind padding on the left
        return h.gather(1, first).squeeze(1)

    def forward(self, ids, mask, rows=None, masked_ids=None, masked_rows=None, index=None):
        if masked_ids is None:
            states = self.states(ids, mask, rows)
            h = states[-1]
        else:                                                        # SimCSE's two passes (models.py) as one of 2B rows
            states = self.states(torch.cat([ids, masked_ids]), mask.repeat(2, 1), torch.cat([rows, masked_rows]))
            h, masked = states[-1].chunk(2)
        z = self.pooled(h, mask)
        if self.projector is not None and (self.training or self.pooler == "cls-mlp"):
            z = self.projector(z)
        z = self.augmented(len(states), z, rows)                     # the last number: the output vector
        return z if masked_ids is None else (z, self.mlm_logits(masked.flatten(0, 1)[index]))       # [M, vocab]

    def mlm_logits(self, h) -> Tensor:
        """transformers' masked-language head, tied to the word embeddings: [M, dim] -> [M, vocabulary]."""
        lm = self.lm
        if lm.config.model_type == "distilbert":
            return lm.vocab_projector(lm.vocab_layer_norm(lm.activation(lm.vocab_transform(h))))
        return (lm.cls if hasattr(lm, "cls") else lm.lm_head)(h)

    def activations(self, ids, mask) -> list:
        """Every numbered layer's output: 0 ... n [B, L, dim], zero at padding, and n + 1 [B, dim], which is the vector
        that training compares (after the MLP, if there is one)."""
        states = self.states(ids, mask)
        z = self.pooled(states[-1], mask)
        z = z if self.projector is None else self.projector(z)
        return [h * mask.unsqueeze(2) for h in states] + [z]


def mean_of_tokens(h: Tensor, mask: Tensor) -> Tensor:
    """[B, L, dim], [B, L] -> [B, dim]: the mean over the tokens that are not padding."""
    mask = mask.unsqueeze(2).to(h.dtype)
    return (h * mask).sum(1) / mask.sum(1).clamp(min=1)


FAMILIES = ["bert", "roberta", "xlm-roberta", "camembert", "distilbert"]


def first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]


@contextmanager
def quiet_transformers():
    """No progress bars and no table of the weights that a sentence encoder does not use."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def load_config(a):
    """The sizes of the network: of --model, or of the small BERT (whose vocabulary is not known yet)."""
    if a.model == "small":
        config = transformers.BertConfig(hidden_size=a.width, num_hidden_layers=a.depth, intermediate_size=4 * a.width,
                                         num_attention_heads=a.width // 32)
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(a.model, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as e:
            fail(f"--model {a.model}: {first_line(e)}")
        if config.model_type not in FAMILIES:
            fail(f"--model {a.model} is a {config.model_type}; this script knows {', '.join(FAMILIES)}")
    if a.dropout is not None:
        names = ("dropout", "attention_dropout") if config.model_type == "distilbert" else \
            ("hidden_dropout_prob", "attention_probs_dropout_prob")
        for name in names:
            setattr(config, name, a.dropout)
    return config


def targets_of(a, n: int) -> list | None:
    """--layer as numbers, for a network of n transformer layers; None for auto."""
    if a.layer[0] in ("none", "all", "auto"):
        return {"none": [], "all": list(range(n + 2)), "auto": None}[a.layer[0]]
    targets = sorted({int(l) for l in a.layer})
    if targets[-1] > n + 1:
        fail(f"--layer {targets[-1]}: no such layer (8 is the default); there are 0 embeddings, 1-{n} layers, "
             f"{n + 1} output vector; or all, none, auto")
    return targets


def build(a, config, tokenizer, device) -> Net:
    """The network of these flags: --model with its weights, or a small BERT with the random weights of this seed."""
    torch.manual_seed(a.seed)
    if a.model == "small":
        config.vocab_size = len(tokenizer)
        lm = transformers.AutoModelForMaskedLM.from_config(config)
    else:
        try:
            with quiet_transformers():
                lm, info = transformers.AutoModelForMaskedLM.from_pretrained(
                    a.model, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as e:
            fail(f"--model {a.model}: {first_line(e)}")
        lacks = [k for k in info["missing_keys"] if k.startswith(lm.base_model_prefix)]
        if lacks:
            fail(f"--model {a.model}: its weights lack {lacks[0]}" + (f" and {len(lacks) - 1} more" * (len(lacks) > 1)))
        if a.mlm and info["missing_keys"]:
            print(f"{a.model} holds no masked-language head: it starts untrained")
    if len(tokenizer) > lm.config.vocab_size:
        fail(f"--model {a.model}: its tokenizer has {len(tokenizer)} pieces, its network only {lm.config.vocab_size}")
    net = Net(a, lm, targets_of(a, config.num_hidden_layers) or [])
    lm.requires_grad_(a.mlm)                                         # without MLM its head is not trained
    lm.base_model.requires_grad_(True)
    return net.to(device)


# ----------------------------------------------------------------------------------------------------------------
# 5 Deep Augmentation
# ----------------------------------------------------------------------------------------------------------------


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def deep_augment(h: Tensor, rows: Tensor, rate: float, stop_grad: bool, transform: str = "dropout",
                 components: int = 1) -> Tensor:
    """A(h) on the chosen rows, h on the others (Eq. 2; Section 3.2 of the paper). Call it in training only.

    h: hidden states [B, ...]; rows: bool [B]; rate in [0, 1).
    stop_grad: the chosen rows are detached, so they send no gradient to the layers below; those above get it all.
    transform "dropout": inverted dropout of single elements, E[A(h)] = h. "channel": of whole channels ([B, C, H, W])
    or features over all tokens ([B, L, C]). "pca": see remove_components; `rate` is not used.
    No indexing and no host sync (but pca): it costs one pass over h and compiles.
    """
    x = h.detach() if stop_grad else h
    if transform == "dropout":
        x = F.dropout(x, rate)
    elif transform == "channel":
        one = x[..., :1, :1] if x.ndim == 4 else x[:, :1] if x.ndim == 3 else x    # [B, C, 1, 1], [B, 1, C], [B, C]
        x = x * F.dropout(torch.ones_like(one), rate)
    else:
        x = remove_components(x, components)
    return torch.where(rows.view(-1, *[1] * (h.ndim - 1)), x, h)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def remove_components(h: Tensor, components: int) -> Tensor:
    """h [B, ...] without its projection on the batch's `components` leading principal directions; the mean stays.

    The authors' PCA variant (their transformers fork, modeling_bert.py:531): the whole batch, flattened to [B, D]
    and centred, gets a randomised PCA of 6 components, fitted without gradient in float32. Cost: six products of
    [B, D] with [D, 6] (two power iterations) and small factorisations, for which CUDA makes the host wait.
    """
    with torch.autocast(h.device.type, enabled=False):
        flat = h.float().flatten(1)                                                           # [B, D]
        with torch.no_grad():
            mean = flat.mean(0)
            _, _, v = torch.pca_lowrank(flat, q=min(max(6, components), *flat.shape))
            v = v[:, :components]                                                             # [D, K], orthonormal
        return (h - ((flat - mean) @ v @ v.T).view_as(h)).to(h.dtype)


# ----------------------------------------------------------------------------------------------------------------
# 6 Loss
# ----------------------------------------------------------------------------------------------------------------


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
class Gather(torch.autograd.Function):
    """The rows of all processes [B, d] -> [world * B, d]; a row's gradient is the sum of what all processes send it."""
    @staticmethod
    def forward(ctx, z):
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def gather(z: Tensor) -> Tensor:
    return Gather.apply(z) if dist.is_initialized() else z


def simcse_loss(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """SimCSE's loss (its Eq. 1; models.py:194): z1, z2 [B, d], row i of each a view of sentence i.

    -log( exp(cos(z1_i, z2_i) / T) / sum_j exp(cos(z1_i, z2_j) / T) ), the mean over i: every first view must find its
    partner among the N second views. One direction only, unlike NT-Xent. With several processes every one takes its
    own z1 as anchors and everybody's z2 as candidates; the mean over processes is the loss of the whole batch.
    """
    z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
    partner = torch.arange(len(z1), device=z1.device) + (dist.get_rank() * len(z1) if dist.is_initialized() else 0)
    return F.cross_entropy(z1 @ gather(z2).T / temperature, partner)                          # logits [B, N]


def mlm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the masked tokens of all processes; 0 if none was masked. [M, vocabulary], [M]."""
    count = torch.full((), float(len(targets)), device=logits.device)    # torch.tensor(...) would wait for the GPU
    total, world = count.clone(), 1
    if dist.is_initialized():
        dist.all_reduce(total)
        world = dist.get_world_size()                                # DistributedDataParallel divides by it
    return F.cross_entropy(logits.float(), targets, reduction="sum") * world / total.clamp(min=1)


def relatedness(net: Net, u: Tensor, v: Tensor) -> Tensor:
    """--objective supervised: the score predicted for pairs of sentence vectors [B, d] -> [B], from |u - v| and u * v
    (Tai et al. 2015, the usual head for these tasks)."""
    return net.relatedness(torch.cat([(u - v).abs(), u * v], dim=1).float()).squeeze(1)


# ----------------------------------------------------------------------------------------------------------------
# 7 Training
# ----------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, a, steps: int) -> float:
    """Linear warm-up over the first --warmup of the run, then linear decay towards 0. steps: steps of one epoch."""
    total = a.epochs * steps
    warm = int(a.warmup * total)
    return a.lr * ((step + 1) / warm if step < warm else (total - step) / (total - warm))


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean squared distance of pairs, 0..4; z1 and z2 normalised [n, d] (Wang & Isola 2020, alpha = 2)."""
    return (z1 - z2).square().sum(1).mean()


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def uniformity(z: Tensor) -> Tensor:
    """log of the mean of exp(-2 |zi - zj|^2) over pairs i < j, z normalised [n, d] (Wang & Isola 2020, t = 2): 0 if
    all are one point, about -4 if many points spread evenly over the sphere."""
    return torch.pdist(z).square().mul(-2).exp().mean().log()


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
@torch.no_grad()
def meters(z1: Tensor, z2: Tensor) -> dict:
    """Is it collapsing? From the two views' embeddings [B, d]:

    embedding_std   std over the batch of the normalised embedding times sqrt(d): 1 spread evenly, 0 collapsed
    effective_rank  exp of the entropy of the singular values (Roy & Vetterli 2007): 1 .. min(B - 1, d)
    alignment, uniformity   as above, of this batch; for both lower is better
    """
    z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
    x = (z1 - z1.mean(0)).double()
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x               # eigenvalues s²: cheaper than an SVD
    s = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    s = s / s.sum().clamp(min=1e-12)
    return {"embedding_std": z1.std(0).mean().item() * z1.shape[1] ** 0.5,
            "effective_rank": torch.exp(-torch.xlogy(s, s).sum()).item(),
            "alignment": alignment(z1, z2).item(), "uniformity": uniformity(z1).item()}


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
@contextmanager
def written_whole(path: Path):
    """Write beside the target, then rename: a kill at any moment leaves the old file or the new one, whole."""
    beside = path.with_name(path.name + ".part")
    yield beside
    os.replace(beside, path)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def save_json(path: Path, content: dict) -> None:
    with written_whole(path) as part:
        part.write_text(json.dumps(content, indent=1, default=str))


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def load_checkpoint(path: Path, device="cpu") -> dict:
    if not path.exists():
        fail(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        script, parts = state["script"], set(state) >= {"config", "data", "model", "optimizer", "step"}
    except Exception:                                                # a damaged file raises many kinds of errors
        fail(f"{path} is damaged or no checkpoint: remove it, or take another")
    if script != NAME:
        fail(f"{path} was written by {script}.py, not by this script")
    if not parts:
        fail(f"{path} is damaged: it lacks parts of a checkpoint")
    return state


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
class Interrupted(BaseException):
    """Ctrl-C or SIGTERM arrived; args[0] is the signal's number."""


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def interrupt(number: int):
    raise Interrupted(number)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
@contextmanager
def on_signals(handler):
    """Call handler(signal number) on Ctrl-C and SIGTERM; a second one ends the program at once."""
    if threading.current_thread() is not threading.main_thread():    # some notebooks: signals stay as they are
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def first_time(number, frame):
        for n in numbers:
            signal.signal(n, signal.SIG_DFL)
        handler(number)

    before = [signal.signal(n, first_time) for n in numbers]
    try:
        yield
    finally:
        for n, old in zip(numbers, before):
            signal.signal(n, old)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def stops(stop: list, ask: bool, device) -> bool:
    """Has a signal arrived? Several processes must leave at the same step: they agree on it, only when `ask`ed."""
    if not dist.is_initialized():
        return bool(stop)
    if not ask:
        return False
    flag = torch.tensor(len(stop), device=device)
    dist.all_reduce(flag)
    return flag.item() > 0


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def checkpoint_to_resume(a, out: Path, device) -> dict | None:
    """The run folder's checkpoint if it is this script's and was made with the same flags."""
    if not (out / "checkpoint.pt").exists():
        print(f"--resume: no checkpoint in {out} yet, so this run starts at the beginning")
        return None
    state = load_checkpoint(out / "checkpoint.pt", device)
    was = state["config"]
    changed = [f"--{k.replace('_', '-')} is {v}, was {was.get(k)}" for k, v in config_of(a).items() if v != was.get(k)]
    if changed:
        fail(f"--resume with other flags than the checkpoint's: {'; '.join(changed)}")
    return state


def train(a, net: Net, train_set: Sentences, offset: int, scores: Tensor | None, tokenizer, dev, out: Path, device,
          steps: int, state: dict | None) -> dict:
    """Train to the last epoch, from the start or from `state`. Every step reseeds from (seed, step, process): so no
    random state needs saving, a resumed run meets the same masks and dropout, and evaluation in between changes
    nothing. offset: see train_batches; scores: of the pairs, for --objective supervised; steps: of one epoch. Returns
    what was measured."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, a.lr, weight_decay=a.weight_decay, fused=True)

    step, log, evals, spent = 0, [], {}, 0.0                         # log: the rows of metrics.csv
    if state:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, log, evals, spent = state["step"], state["metrics"], state["evals"], state["seconds"]

    model = net
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    if a.compile:
        model = torch.compile(model, dynamic=True)

    sentences = train_set.digest()

    def save():
        if log:
            with written_whole(out / "metrics.csv") as part, open(part, "w", newline="") as f:
                writer = csv.DictWriter(f, log[0])
                writer.writeheader()
                writer.writerows(log)
        save_json(out / "evals.json", evals)
        with written_whole(out / "checkpoint.pt") as part:
            torch.save({"script": NAME, "config": config_of(a), "data": sentences, "model": net.state_dict(),
                        "optimizer": optimizer.state_dict(), "step": step, "metrics": log, "evals": evals,
                        "source": SOURCE, "seconds": spent + time.time() - begun}, part)

    def evaluate():
        """The dev pairs, Fig. 12's two measures, and with --select dev the best weights so far in best.pt."""
        best = max((e["dev"] for e in evals.values()), default=-math.inf)
        evals[str(step)] = dev_quality(net, tokenizer, dev, device)
        if a.select == "dev" and evals[str(step)]["dev"] > best:
            with written_whole(out / "best.pt") as part:
                torch.save({k: v.cpu() for k, v in net.state_dict().items()}, part)
        net.train()

    def to_device(x):
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x

    total, last = a.epochs * steps, False
    losses, stop = [], []                                            # losses stay on the device until they are logged
    special = torch.tensor(tokenizer.all_special_ids)
    batches = train_batches(train_set, offset, a, step, steps, rank, world)
    begun = saved = logged = time.time()
    bar = tqdm(total=total, initial=step, unit="step", disable=rank > 0, dynamic_ncols=True)
    if dev and a.eval_every and step == 0 and rank == 0:
        evaluate()
        logged = time.time()
    net.train()
    with on_signals(stop.append):                                    # Ctrl-C and SIGTERM wait for the end of a step
        while step < total and not last:
            lr = learning_rate(step, a, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            index, ids, mask = next(batches)                                                  # ids, mask: [2B, L]
            torch.manual_seed(mix(a.seed, step, rank))               # fixes this step's masks, rows and dropout
            masked = ()
            if a.mlm:
                masked_ids, places, targets = map(to_device, mask_tokens(
                    ids, special, a.mlm_probability, tokenizer.mask_token_id, len(tokenizer)))
                masked = masked_ids, torch.rand(len(ids), device=device) < a.sample, places
            ids, mask = to_device(ids), to_device(mask)
            rows = torch.rand(len(ids), device=device) < a.sample    # once a batch, over both views
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                output = model(ids, mask, rows, *masked)
            z, logits = output if a.mlm else (output, None)                                   # [2B, dim], [M, pieces]
            if a.objective == "simcse":
                objective = simcse_loss(*z.chunk(2), a.temperature)
            else:
                objective = F.mse_loss(relatedness(net, *z.chunk(2)), to_device(scores[index]))
            masked_loss = mlm_loss(logits, targets) if a.mlm else torch.zeros_like(objective)
            loss = objective + a.mlm_weight * masked_loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)                   # the Trainer that SimCSE used clips at 1
            optimizer.step()
            losses.append(torch.stack([loss, objective, masked_loss]).detach())
            step += 1
            bar.update()

            evaluate_now = dev and a.eval_every and (step % a.eval_every == 0 or step == total)
            last = step == total or stops(stop, step % a.log_every == 0, device)
            save_now = last or evaluate_now or time.time() - saved > a.save_every
            if step % a.log_every == 0 or save_now:
                values, now = torch.stack(losses).tolist(), time.time()                       # the one wait
                for i, (value, _, _) in enumerate(values):
                    if not math.isfinite(value):
                        fail(f"the loss is {value} at step {step - len(values) + i + 1}; any checkpoint before it is "
                             f"kept in {out}. A smaller --lr usually helps")
                sums = [statistics.mean(column) for column in zip(*values)]
                log.append({"step": step, "epoch": step / steps, "loss": sums[0], "objective": sums[1], "mlm": sums[2],
                            "lr": lr, "sentences_per_second": a.batch_size * len(values) / (now - logged),
                            **meters(*z.detach().chunk(2))})
                bar.set_postfix_str(f"loss {sums[0]:.3f}, {log[-1]['sentences_per_second']:.0f} sentences/s")
                losses, logged = [], now
                if save_now:
                    if rank == 0 and all(p.isfinite().all() for p in net.parameters()):
                        if evaluate_now:
                            evaluate()
                            bar.write(f"step {step}: dev Spearman {evals[str(step)]['dev']:.2f}")
                        save()
                    logged = saved = time.time()                     # evaluating and saving are no part of the speed
    bar.close()
    if stop or step < total:
        raise Interrupted(stop[0] if stop else signal.SIGTERM)
    return {"seconds": spent + time.time() - begun, "steps": step, "epochs": a.epochs, "loss": log[-1]["loss"],
            "sentences_per_second": statistics.median(r["sentences_per_second"] for r in log),
            "lowest_embedding_std": min(r["embedding_std"] for r in log)}


# ----------------------------------------------------------------------------------------------------------------
# 8 Evaluation
# ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(net: Net, tokenizer, sentences: list, device, tokens_a_batch: int = 0) -> Tensor:
    """Embeddings float32 [n, dim] in eval mode. Each distinct sentence is encoded once; those of similar length
    together, so there is next to no padding; not truncated but to the longest that the network takes."""
    net.eval()
    tokens_a_batch = tokens_a_batch or (8192 if device.type == "cuda" else 2048)    # a CPU's caches hold fewer
    place = {sentence: i for i, sentence in enumerate(dict.fromkeys(sentences))}
    data = in_memory(tokenizer, list(place), net.longest)
    order = np.argsort(-data.lengths, kind="stable")                 # longest first: memory peaks at once
    out, start = torch.empty(len(data), net.dim, device=device), 0
    while start < len(order):
        some = order[start:start + max(1, tokens_a_batch // data.lengths[order[start]])]
        ids, mask = data.batch(some)
        out[torch.from_numpy(some).to(device)] = net(ids.to(device), mask.to(device)).float()
        start += len(some)
    return out[torch.tensor([place[s] for s in sentences], dtype=torch.long, device=device)]


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks 1 ... n, float64; equal values share the mean of their ranks."""
    _, which, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[which]


def spearman(x, y) -> float:
    """Spearman's rank correlation of two lists of numbers, -1..1, exact with ties: Pearson's of the ranks. 0 where it
    is undefined (a constant list). ValueError: NaN."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if np.isnan(x).any() or np.isnan(y).any():
        raise ValueError("spearman: the scores hold NaN")
    x, y = ranks(x) - (len(x) + 1) / 2, ranks(y) - (len(y) + 1) / 2
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


@torch.no_grad()
def similarity(net: Net, u: Tensor, v: Tensor) -> np.ndarray:
    """Scores of pairs, float64 [n]: the cosine; with --objective supervised what its head predicts."""
    if net.relatedness is not None:
        return relatedness(net, u, v).double().cpu().numpy()
    return F.cosine_similarity(u.double(), v.double()).cpu().numpy().round(12)    # equal vectors tie: 1, not 1 ± 1e-15


def score(net: Net, tokenizer, tasks: dict, device) -> dict:
    """Spearman * 100 of every task, "sts": their mean, "sts_tasks": how many they are. {} without tasks."""
    if not tasks:
        return {}
    z = encode(net, tokenizer, list(chain.from_iterable(first + second for first, second, _ in tasks.values())), device)
    result, start = {}, 0
    for name, (first, _, golds) in tasks.items():
        u, v = z[start:start + 2 * len(first)].chunk(2)
        result[name] = 100 * spearman(similarity(net, u, v), golds)
        start += 2 * len(first)
    return {**result, "sts": statistics.mean(result.values()), "sts_tasks": len(tasks)}


def scored_tasks(report: dict) -> list:
    """The keys of the test tasks' scores in a report, and "sts" if they are several."""
    tasks = [k for k in report if re.fullmatch(r"STS1[2-6]|STS-B|SICK-R|unseen", k)]
    return tasks + ["sts"] * (len(tasks) > 1)


def dev_quality(net: Net, tokenizer, dev: tuple, device) -> dict:
    """"dev": Spearman * 100 on the dev pairs; alignment of those scored above 4 and uniformity of all its sentences
    (Section 6.2 and Fig. 12; SimCSE's Section 5 takes the same). Lower is better for both."""
    first, second, golds = dev
    u, v = encode(net, tokenizer, first + second, device).chunk(2)
    alike = torch.from_numpy(golds > 4).to(device)
    result = {"dev": 100 * spearman(similarity(net, u, v), golds)}
    u, v = F.normalize(u, dim=1), F.normalize(v, dim=1)
    if alike.any():
        result["alignment_dev"] = alignment(u[alike], v[alike]).item()
    return {**result, "uniformity_dev": uniformity(torch.cat([u, v])).item()}


def measure(net: Net, tokenizer, tasks: dict, dev, device) -> dict:
    """score and dev_quality together, as flat numbers."""
    return {**score(net, tokenizer, tasks, device), **(dev_quality(net, tokenizer, dev, device) if dev else {})}


@torch.no_grad()
def layer_map(net: Net, tokenizer, dev: tuple, device, output=True) -> Tensor:
    """Linear CKA between the layers 0 ... n + 1 on the dev sentences, float64 [n + 2, n + 2] (Fig. 10, 37).

    A layer is represented by the mean of its tokens: [CLS] of layer 0 is the same for all sentences, and whole
    sequences would mostly tell how long the sentences are. output=False leaves n + 1 out. ValueError: too few.
    """
    from cka import cka_map
    net.eval()
    data = in_memory(tokenizer, list(dict.fromkeys(dev[0] + dev[1])), net.longest)
    size = min(256, len(data))

    def layers():
        for start in range(0, len(data) - size + 1, size):
            ids, mask = (x.to(device) for x in data.batch(np.arange(start, start + size)))
            *states, z = net.activations(ids, mask)
            acts = [mean_of_tokens(h, mask) for h in states] + [z] * output
            yield acts, acts

    return cka_map(layers())


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def save_figure(figure, path: Path) -> None:
    figure.tight_layout()
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=110)


def draw_figures(a, net: Net, tokenizer, dev, out: Path, device, report: dict, stretch: tuple | None) -> None:
    """curves.png: the run; cka.png: the map of the layers, black crosses at the co-adapted stretch of the network that
    training started from (if it was a trained one; else of this one), red ones where Deep Augmentation acted."""
    with open(out / "metrics.csv") as f:
        log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    evals = json.loads((out / "evals.json").read_text())
    figure = Figure((12, 6))
    axes = figure.subplots(2, 3).flat
    for axis, key in zip(axes, ["objective", "mlm", "effective_rank"]):
        axis.plot([row["step"] for row in log], [row[key] for row in log])
        axis.set(title={"objective": a.objective + " loss", "mlm": "masked-language loss"}.get(key, "effective rank"),
                 xlabel="step")
    if evals:
        axes[3].plot([int(step) for step in evals], [e["dev"] for e in evals.values()], "o-")
        axes[3].set(title="dev pairs, Spearman x 100", xlabel="step")
        x, y = ([e.get(k, math.nan) for e in evals.values()] for k in ("uniformity_dev", "alignment_dev"))
        axes[4].plot(x, y, "-", color="lightgray")
        points = axes[4].scatter(x, y, c=[int(step) for step in evals])
        figure.colorbar(points, label="step")
        axes[4].set(title="dev pairs (Fig. 12), lower is better", xlabel="uniformity", ylabel="alignment")
    keys = scored_tasks(report)
    for i, (suffix, label) in enumerate([("_untrained", "before"), ("", "after")]):
        axes[5].bar(np.arange(len(keys)) + 0.4 * i, [report[k + suffix] for k in keys], 0.4, label=label)
    axes[5].set_xticks(np.arange(len(keys)) + 0.2, keys, rotation=45)
    axes[5].set(title="test tasks, Spearman x 100")
    axes[5].legend()
    figure.suptitle(out.name)
    save_figure(figure, out / "curves.png")

    try:
        if dev is None:
            raise ValueError("no dev sentences")
        from cka import coadapted_stretch, draw
        layers = layer_map(net, tokenizer, dev, device)
        names = ["0 embeddings", *map(str, range(1, len(layers) - 1)), f"{len(layers) - 1} output"]
        draw(out / "cka.png", [{"map": layers.tolist(), "names_a": names, "targets": net.targets, "run_a": out.name,
                                "stretch": stretch or coadapted_stretch(layers[:-1, :-1])}])
    except (ImportError, ValueError) as e:                           # no cka.py beside this script; too few sentences
        print(f"no map of the layers: {e}")


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def mean_std(values: list) -> tuple[float, float | None]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def pm(value: tuple[float, float | None]) -> str:
    return f"{value[0]:.2f}" + ("" if value[1] is None else f" ± {value[1]:.2f}")


def compare(runs: list) -> dict:
    """One table of finished runs as Figure 8, seeds pooled, and compare.png: average by layer as in Figures 6 and 7."""
    groups = {}                                                      # {flags but the seed: {seed: report}}
    for folder in runs:
        path = Path(folder) / "report.json"
        r = json.loads(path.read_text()) if path.exists() else {}
        if r.get("script") != NAME or "sts" not in r:
            if not Path(folder).is_file() and Path(folder).name != "text":    # runs/* holds more than runs
                print(f"{folder}: left out, no finished and scored run of this script")
            continue
        r["run"] = re.sub(r"[-/]s\d+$", "", str(folder))
        key = tuple(sorted((k, str(v)) for k, v in r["flags"].items() if k != "seed"))
        if groups.setdefault(key, {}).setdefault(r["flags"]["seed"], r) is not r:
            print(f"{folder}: left out, this seed of the same flags is counted already")
    if not groups:
        fail("--compare: none of these folders holds a finished, scored run of this script")
    values = {k: {v for key in groups for kk, v in key if kk == k} for k, _ in next(iter(groups))}
    varying = [k for k, v in values.items() if len(v) > 1 and k not in ("layer", "stop_grad")]
    tasks = list(dict.fromkeys(t for by_seed in groups.values() for r in by_seed.values() for t in scored_tasks(r)))
    print(f"{'layer':>6} {'stop':>5} {'rate':>6} {'mlm':>4} {'seeds':>5} "
          + " ".join(f"{t:>14}" for t in tasks) + "  run")
    table, lines = {}, {}                                            # lines: {label: [(layer, mean, std)]}
    for by_seed in groups.values():
        rs = list(by_seed.values())
        f, name, targets = rs[0]["flags"], rs[0]["run"], rs[0]["layers_augmented"]
        means = {t: mean_std([r[t] for r in rs if t in r]) for t in tasks if any(t in r for r in rs)}
        table[name] = {**means, "sts": mean_std([r["sts"] for r in rs]), "seeds": len(rs)}
        stop, rate = (("yes" if f["stop_grad"] else "no"), f["rate"]) if targets else ("-", "-")
        print(f"{','.join(map(str, targets)) or 'none':>6} {stop:>5} {rate:>6} "
              f"{'yes' if f['mlm'] else 'no':>4} {len(rs):5} "
              + " ".join(f"{pm(means[t]) if t in means else '-':>14}" for t in tasks) + f"  {name}")
        if len(targets) < 2:
            label = f"{'with' if f['stop_grad'] else 'without'} stop-gradient" if targets else "no Deep Augmentation"
            label = ", ".join([label, *(f"{k} {f.get(k)}" for k in varying)])
            lines.setdefault(label, []).append(((targets or [None])[0], *mean_std([r["sts"] for r in rs])))
    figure = Figure((7, 4.5))
    axis = figure.subplots()
    for i, (label, points) in enumerate(sorted(lines.items())):
        layer, mean, std = zip(*sorted(points))
        if layer[0] is None:                                         # the baseline: a line across
            for m in mean:
                axis.axhline(m, color=f"C{i}", linestyle="--", label=label)
        else:
            axis.errorbar(layer, mean, [s or 0 for s in std], color=f"C{i}", fmt="o-", capsize=3, label=label)
    axis.set(xlabel="layer of Deep Augmentation", ylabel="average Spearman x 100")
    axis.legend()
    path = Path(runs[0]).parent / "compare.png"
    save_figure(figure, path)
    print(f"drawn: {path}")
    return table


# ----------------------------------------------------------------------------------------------------------------
# 9 Export
# ----------------------------------------------------------------------------------------------------------------


class Traced(nn.Module):
    """What is traced: eval mode, so without Deep Augmentation and without the training-only MLP."""
    def __init__(self, net: Net):
        super().__init__()
        self.net = net

    def forward(self, input_ids, attention_mask):
        return self.net(input_ids, attention_mask)

    def activations(self, input_ids, attention_mask):
        return self.net.activations(input_ids, attention_mask)


class Encoder(nn.Module):
    """What leaves this script. input_ids, attention_mask int64 [B, L], padding on either side -> embeddings [B, dim].

    Scripted around the traced network, for a trace cannot refuse anything: too long a sentence would end in an index
    error deep inside."""
    def __init__(self, traced, longest: int):
        super().__init__()
        self.traced, self.longest = traced, longest

    def check(self, input_ids: Tensor, attention_mask: Tensor):
        if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
            raise ValueError("input_ids and attention_mask must both be [batch, length]")
        if input_ids.size(1) > self.longest:
            raise ValueError(f"{input_ids.size(1)} tokens are too many: this encoder takes at most {self.longest}")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.check(input_ids, attention_mask)
        return self.traced(input_ids, attention_mask)

    @torch.jit.export
    def activations(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        self.check(input_ids, attention_mask)
        return self.traced.activations(input_ids, attention_mask)


def random_sentences(net: Net, batch: int, length: int, left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask) [batch, length] of sentences of all lengths down to 2, padded on the left or on the right."""
    ids = torch.randint(net.lm.config.vocab_size, (batch, length))
    column, lengths = torch.arange(length), torch.linspace(length, 2, batch).long()[:, None]
    mask = (column >= length - lengths if left else column < lengths).long()
    return torch.where(mask.bool(), ids, net.lm.config.pad_token_id), mask


def export(a, net: Net, tokenizer, out: Path, report: dict) -> float:
    """Write encoder.pt (TorchScript), model/ (a folder for transformers' AutoModel and for sentence-transformers) and
    weights.safetensors (its weights alone); read the encoder back.

    Returns the largest difference between the file's encoder and the live one, relative to the largest activation,
    over forward and activations at several batch sizes, lengths and sides of padding. Above 1e-4 it is an error.
    """
    live = copy.deepcopy(net).cpu().eval()                           # on the CPU: traces bake the device in
    n = live.lm.config.num_hidden_layers
    names = ["embeddings", *(f"layer{l}" for l in range(1, n + 1)), "output"]
    config = {"script": NAME, "layers": names, "layer_numbers": {name: l for l, name in enumerate(names)},
              "dim": live.dim, "longest": live.longest, "pooler": a.pooler, "flags": config_of(a),
              "measurements": report}
    traced, example = Traced(live).eval(), random_sentences(live, 3, 9, left=True)
    with torch.no_grad(), quiet_transformers(), warnings.catch_warnings(), written_whole(out / "encoder.pt") as part:
        warnings.filterwarnings("ignore", message=".*torch.jit|Encountering a list|Converting a tensor|`is_gradient")
        encoder = torch.jit.trace_module(traced, {"forward": example, "activations": example}, check_trace=False)
        encoder = torch.jit.script(Encoder(encoder, live.longest).eval())
        torch.jit.save(encoder, str(part), _extra_files={"config.json": json.dumps(config, default=str)})
        loaded = torch.jit.load(str(part))
        worst = 0.0
        for batch, length, left in ((1, live.longest, False), (7, min(32, live.longest), True), (64, 3, False)):
            x = random_sentences(live, batch, length, left)
            for ours, theirs in zip([live(*x), *live.activations(*x)], [loaded(*x), *loaded.activations(*x)]):
                worst = max(worst, ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-6)).item())
        if not worst <= 1e-4:
            raise RuntimeError(f"the exported encoder differs from the live one by {worst:.2g}")
    if a.export == "pt2":
        with torch.no_grad(), written_whole(out / "encoder.pt2") as part:
            dynamic = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2, max=live.longest)}
            program = torch.export.export(traced, example, dynamic_shapes=(dynamic, dynamic))
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            part.write_bytes(buffer.getvalue())
    shutil.rmtree(out / "model", ignore_errors=True)
    with made_once(out / "model") as part, quiet_transformers():
        (live.lm if a.mlm else live.lm.base_model).save_pretrained(part)
        tokenizer.save_pretrained(part)
        describe_to_sentence_transformers(live, part)
    with written_whole(out / "weights.safetensors") as part:
        shutil.copy(out / "model" / "model.safetensors", part)
    return worst


def describe_to_sentence_transformers(net: Net, folder: Path) -> None:
    """The files by which sentence-transformers knows how to pool."""
    dense = net.pooler == "cls-mlp" and net.projector is not None
    modules = ["Transformer", "Pooling"] + ["Dense"] * dense
    paths = ["", "1_Pooling", "2_Dense"]
    save_json(folder / "modules.json", [{"idx": i, "name": str(i), "path": paths[i], "type":
                                         f"sentence_transformers.models.{m}"} for i, m in enumerate(modules)])
    save_json(folder / "sentence_bert_config.json", {"max_seq_length": net.longest, "do_lower_case": False})
    (folder / "1_Pooling").mkdir(exist_ok=True)
    save_json(folder / "1_Pooling" / "config.json", {
        "word_embedding_dimension": net.dim, "pooling_mode_cls_token": net.pooler != "mean",
        "pooling_mode_mean_tokens": net.pooler == "mean", "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False})
    if dense:
        (folder / "2_Dense").mkdir(exist_ok=True)
        save_json(folder / "2_Dense" / "config.json", {"in_features": net.dim, "out_features": net.dim, "bias": True,
                                                       "activation_function": "torch.nn.modules.activation.Tanh"})
        save_file({f"linear.{k}": v for k, v in net.projector[0].state_dict().items()},
                  folder / "2_Dense" / "model.safetensors")


# ----------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------


def load_tokenizer(a, out: Path, folder: Path):
    """The tokenizer of --model; for the small BERT that of the run it goes on from, or one learned from the text."""
    if a.model == "small":
        for run in [out] * a.resume + [Path(a.init), Path(a.init).parent] * bool(a.init):
            if (run / "tokenizer").is_dir():
                return transformers.AutoTokenizer.from_pretrained(run / "tokenizer")
        return learn_tokenizer(text_file(a, folder), a.vocab_size, folder)
    files = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")
    if Path(a.model).is_dir() and not any((Path(a.model) / f).exists() for f in files):
        fail(f"--model {a.model}: no tokenizer there (looked for {', '.join(files)})")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(a.model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        fail(f"--model {a.model}: its tokenizer cannot be read: {first_line(e)}")
    if tokenizer.pad_token_id is None or (a.mlm and tokenizer.mask_token_id is None):
        fail(f"--model {a.model}: its tokenizer has no [PAD] or, for --mlm, no [MASK]; without it use --no-mlm")
    return tokenizer


def load_initial(a, net: Net) -> None:
    """The weights of --init: those its run kept. A projector or head that it lacks stays new; the encoder must fit."""
    path = Path(a.init) / "checkpoint.pt" if Path(a.init).is_dir() else Path(a.init)
    state = load_checkpoint(path)
    weights, best, own = state["model"], path.with_name("best.pt"), net.state_dict()
    if state["config"].get("select") == "dev" and best.exists():
        weights = torch.load(best, map_location="cpu", weights_only=True)
    fits = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    lacks = sorted({k.split(".")[0] for k in own if k not in fits})
    if "lm" in lacks:
        fail(f"--init {a.init}: its network has other sizes; give the flags it was trained with (--width, ...)")
    if lacks:
        print(f"--init {a.init} has no {', '.join(lacks)}: new")
    net.load_state_dict({**own, **fits})


def run(a) -> dict:
    """One seed from data to report. Returns the report (report.json)."""
    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(a.device, int(os.environ.get("LOCAL_RANK", 0)) if a.device == "cuda" else None)
    chief = not dist.is_initialized() or dist.get_rank() == 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    if a.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    out = Path(a.out or f"runs/{a.name}-s{a.seed}")
    state = checkpoint_to_resume(a, out, device) if a.resume else None
    config = load_config(a)
    targets_of(a, config.num_hidden_layers)                          # refuses a layer that is not there

    folder = out.parent / "text"                                     # what is made of the text once, for all runs
    tasks, pairs = load_scored_pairs(a)
    dev = pairs.get("dev")
    if dev is None and (a.select == "dev" or a.layer == ["auto"]):
        fail("--select dev and --layer auto need dev pairs: give --sts-dir a folder with STS-B")
    if a.objective == "supervised" and "train" not in pairs:
        fail("--objective supervised needs the training pairs of STS-B: --sts-dir")
    if chief:
        tokenizer = load_tokenizer(a, out, folder)
    if dist.is_initialized():
        dist.barrier()                                               # the others find what the first one made
        tokenizer = load_tokenizer(a, out, folder)
    net = build(a, config, tokenizer, device)
    if a.init:
        load_initial(a, net)
    if a.eval_only:
        report = measure(net, tokenizer, tasks, dev, device)
        show_scores(report)
        return report

    if a.objective == "supervised":
        first, second, golds = pairs["train"]
        train_set = in_memory(tokenizer, first + second, min(a.max_length, net.longest))
        offset, scores = len(first), torch.from_numpy(golds).float()
    else:
        if chief:
            train_set = token_file(text_file(a, folder), tokenizer, min(a.max_length, net.longest), folder)
        if dist.is_initialized():
            dist.barrier()
            train_set = token_file(text_file(a, folder), tokenizer, min(a.max_length, net.longest), folder)
        offset, scores = 0, None
    sentences = len(train_set) - offset
    if a.batch_size > sentences:
        fail(f"--batch-size {a.batch_size} is more than the {sentences} training sentences or pairs")
    if state and state["data"] != train_set.digest():
        fail(f"--resume with other sentences: the run had {state['data']}, now there are {train_set.digest()}")
    steps = sentences // a.batch_size                                # of one epoch; the ragged rest is dropped
    before = {k: v.cpu().clone() for k, v in net.state_dict().items()}
    stretch = None
    if dev and (a.init or a.model != "small") and importlib.util.find_spec("cka"):
        from cka import coadapted_stretch
        with suppress(ValueError):                                   # too few sentences for a map
            stretch = coadapted_stretch(layer_map(net, tokenizer, dev, device, output=False))
    if a.layer == ["auto"]:                                          # Section 6.1 and Fig. 10: with stop-gradient the
        if stretch is None:                                          # first co-adapted layer, without it the last
            fail("--layer auto: too few dev sentences for a map of the layers")
        net.targets = [stretch[0] if a.stop_grad else stretch[1]]
        print(f"--layer auto: layers {stretch[0]}-{stretch[1]} are co-adapted, so layer {net.targets[0]}")

    if a.stop_grad and a.sample == 1 and config.num_hidden_layers + 1 in net.targets and scores is None and not a.mlm:
        fail("--sample 1 with stop-gradient at the output vector sends no gradient anywhere: nothing is left to train")

    if chief and not a.resume:
        if out.exists():                                             # nothing is lost: the older run moves aside
            older = next(p for i in range(1, 10**6) if not (p := out.with_name(f"{out.name}.{i}")).exists())
            out.rename(older)
            print(f"{out} was there: moved to {older}")
    if chief:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(out / "tokenizer")
        save_json(out / "config.json", {
            **vars(a), "python": sys.version, "torch": torch.__version__, "transformers": transformers.__version__,
            "device_name": torch.cuda.get_device_name() if a.device == "cuda" else f"{torch.get_num_threads()} threads",
            "processes": world, "script_sha256": hashlib.sha256(SOURCE.encode()).hexdigest()})
        print(f"{out}: {sentences} sentences of {train_set.lengths.mean():.1f} tokens, {steps} steps an epoch, "
              f"{config.num_hidden_layers} layers, augmented: {net.targets or 'none'}")

    report = train(a, net, train_set, offset, scores, tokenizer, dev, out, device, steps, state)
    if not chief:
        return {}
    if a.select == "dev":
        net.load_state_dict(torch.load(out / "best.pt", map_location=device, weights_only=True))

    report.update(measure(net, tokenizer, tasks, dev, device))
    trained = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(before)
    report.update({f"{k}_untrained": v for k, v in measure(net, tokenizer, tasks, dev, device).items()})
    net.load_state_dict(trained)
    report.update({"script": NAME, "run": out.name, "layers_augmented": net.targets, "stretch": stretch,
                   "flags": config_of(a)})
    save_json(out / "report.json", report)                           # now: whatever export and figures may meet
    report["export_difference"] = export(a, net, tokenizer, out, report)
    draw_figures(a, net, tokenizer, dev, out, device, report, stretch)
    save_json(out / "report.json", report)
    show(report, out)
    return report


def show_scores(report: dict) -> None:
    """Spearman * 100 of every task, before training too where it was measured. Nothing without tasks."""
    keys = scored_tasks(report) + [k for k in ("dev", "alignment_dev", "uniformity_dev") if k in report]
    if not keys:
        return
    before = any(k + "_untrained" in report for k in keys)
    print(f"\n{'Spearman x 100':24}" + (f"{'before':>10}{'after':>10}" if before else ""))
    for k in keys:
        label = f"average of {report['sts_tasks']} task(s)" if k == "sts" else k
        print(f"{label:24}" + (f"{report[k + '_untrained']:10.2f}" if before else "") + f"{report[k]:10.2f}")


def show(report: dict, out: Path) -> None:
    """The summary at the end of a run."""
    show_scores(report)
    print(f"{report['steps']} steps in {report['seconds']:.0f} s, {report['sentences_per_second']:.0f} sentences/s, "
          f"two views each; the exported encoder differs from the live one by {report['export_difference']:.1g}")
    print(f"in {out}: {', '.join(sorted(p.name + '/' * p.is_dir() for p in out.iterdir()))}")


def main(argv=None) -> dict:
    """Run the command line `argv` (default: the program's own). Returns the report; with --seeds the means and
    standard deviations; with --compare the table; with --eval-only the scores; with --download where things lie."""
    a = settings(argv)
    if a.compare:
        return compare(a.compare)
    if a.download:
        return download()
    words = sys.argv[1:] if argv is None else list(argv)
    if "RANK" in os.environ and not dist.is_initialized():           # started by torchrun
        if a.device != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if a.device != "cpu" and torch.cuda.is_available() else "gloo",
                                timeout=timedelta(hours=2))          # the others wait while the first one evaluates
    try:
        with on_signals(interrupt):
            reports = [run(argparse.Namespace(**{**vars(a), "seed": seed, "out": f"{a.out}/s{seed}" if a.out else ""}))
                       for seed in a.seeds or []]
            if not reports:
                return run(a)
        numbers = [k for k, v in reports[0].items() if isinstance(v, (int, float))]
        table = {k: mean_std([r[k] for r in reports]) for k in numbers}
        for k in ("sts_untrained", "sts"):
            if k in table:
                print(f"{k:18} {pm(table[k])}  over seeds {a.seeds}")
        return table
    except Interrupted as stopped:
        go_on = shlex.join([w for w in words if w != "--resume"] + ["--resume"])
        python = f"torchrun --nproc_per_node={dist.get_world_size()}" if dist.is_initialized() else "python"
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"\nstopped; nothing is lost. To go on:\n{python} {shlex.quote(os.path.relpath(__file__))} {go_on}")
        raise SystemExit(128 + stopped.args[0]) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
