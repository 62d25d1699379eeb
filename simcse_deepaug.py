# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.0", "numpy", "matplotlib", "tqdm", "safetensors"]
# ///
"""SimCSE with Deep Augmentation (Brüel-Gabrielsson et al., arXiv 2303.14537).

SimCSE (Gao et al., EMNLP 2021) passes every sentence twice through BERT; only the dropout masks
differ. Each first vector must find its partner among the second vectors of the batch:

    loss = mean over i of  -log  exp(cos(z_i, z'_i) / T) / sum_j exp(cos(z_i, z'_j) / T)

Deep Augmentation cuts the network f after layer l and puts a stronger dropout A between the parts,

    g^l(x) = f_above( A( f_below(x) ) ),    (Eq. 2)

on a random half of the 2N rows; BERT's own 10 % stays everywhere. With stop-gradient the augmented
rows send no gradient into f_below. Layers: 0 embeddings, 1-12 transformer layers, 13 output vector.
--mlm adds BERT's own loss, masked-language modelling, on equally augmented masked copies.

    python simcse_deepaug.py                                the lesson: without, and with
    python simcse_deepaug.py --train-file MY_LINES.txt --sts-dir data/SentEval/data/downstream
    python simcse_deepaug.py --eval-only --model FOLDER --sts-dir data/SentEval/data/downstream
    python simcse_deepaug.py --preset paper                 the paper's setting, for a GPU

The default run: a BERT from scratch on a grammar that has six words for a concept; only a word's
company tells its concept. Spearman x 100 of unseen pairs: before 9.8, SimCSE 32.9 ± 3.9, with
dropout at the embeddings 42.7 ± 3.1 (five seeds). On real text it costs instead: see the page.
"""
import argparse
import copy
import csv
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, stdev
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import BertWordPieceTokenizer
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

NAME = "simcse_deepaug"
FAMILIES = ["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet"]

# ==== 1 Settings ====

# SimCSE's README for bert-base; layer and rate: the best of the authors' grid with stop-gradient
PAPER = dict(model="bert-base-uncased", train_file="data/wiki1m_for_simcse.txt", layer=["8"],
             sts_dir="data/SentEval/data/downstream", rate=0.125, stop_grad=True, bucket=1,
             lr=3e-5, warmup=0.0, eval_every=125, select="dev")
# the paper's later version: regression on STS-B's training pairs, best dev score
STS_B = dict(model="bert-base-uncased", sts_dir=PAPER["sts_dir"], objective="supervised",
             layer=["none"], lr=1e-4, warmup=0.0, epochs=10, eval_every=30, select="dev")
# where and how a run computes, not what: --resume may change them
HOW = set("out resume device compile compare preset eval_only".split())

# --- the same in simclr, simcse, vicreg, topk, cka ---
class BadInput(ValueError):
    """What a user can put right: main() prints it as one line, exit code 2."""

def check(good, message):
    if not good:
        raise BadInput(message)
# --- end ---
# --- the same in simclr, simcse, vicreg, topk ---
def within(low, high, kind=float):  # an argparse type
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be from {low} to {high}")
        return kind(text)
    return number
# --- end ---

def first_line(e):
    return (str(e).strip() or repr(e)).splitlines()[0]

def targets_of(layer, last):
    """The layers that a value of --layer names: "none", "all", "4" or "3+4"; last: the output."""
    every = [str(l) for l in range(last + 1)]
    names = {"none": [], "all": every}.get(layer, layer.split("+"))
    check(set(names) <= set(every),
          f"--layer {layer}: 0 embeddings to {last} output, several as 3+4, none, all, auto")
    return sorted(set(map(int, names)))

def settings(argv=None):
    """The flags, checked; each --layer with each --seed is a run."""
    positive, count, rate = within(1e-9, 1e9), within(0, 10 ** 9, int), within(0, 0.999)
    yes_no, cuda = argparse.BooleanOptionalAction, torch.cuda.is_available()
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: check(False, f"{message} (see --help)")
    add = p.add_argument_group("Deep Augmentation").add_argument
    add("--layer", nargs="+", default=["none", "0"], metavar="L",
        help="0 embeddings, 1-12 layers, 13 output; 3+4; all; none; auto: by the CKA map of the "
             "--model or --init; several: runs")
    add("--rate", type=rate, default=0.5, help="dropout rate")
    add("--stop-grad", action=yes_no, default=False, help="no gradient from augmented rows below")
    add("--sample", type=within(1e-9, 1), default=0.5, help="share of the rows to augment")
    add("--transform", choices=["dropout", "channel", "pca"], default="dropout")
    add = p.add_argument_group("sentences").add_argument
    add("--train-file", help="UTF-8, a sentence a line, .csv or .tsv; default: a grammar's")
    add("--column", help="of a .csv or .tsv; default: the first")
    add("--sts-dir", help="SentEval's data/downstream: STS/ and SICK/; else the grammar's pairs")
    add("--max-length", type=within(4, 10 ** 4, int), default=32, help="tokens, in training")
    add = p.add_argument_group("network").add_argument
    add("--model", default="small", help="small: a new BERT; or a folder or name for transformers")
    add("--init", metavar="RUN", help="start from its weights")
    add("--depth", type=within(1, 1000, int), default=12, help="layers of the small BERT")
    add("--width", type=within(32, 10 ** 5, int), default=32, help="its hidden size: n times 32")
    add("--vocab-size", type=within(100, 10 ** 6, int), default=8000, help="its WordPieces")
    add("--dropout", type=rate, help="BERT's own; default: the model's, 0.1")
    add("--pooler", choices=["cls", "cls-mlp", "mean"], help="cls: [CLS], in training through an "
        "MLP; cls-mlp: at test too. Default: the folder's, else cls; small BERT: mean")
    add = p.add_argument_group("objective and training").add_argument
    add("--objective", choices=["simcse", "supervised"], default="simcse",
        help="supervised: regression on the training pairs of STS-B, or of the grammar")
    add("--temperature", type=positive, default=0.05)
    add("--mlm", action=yes_no, default=False, help="masked-language modelling too, weight 0.1")
    add("--preset", choices=["paper", "sts-b"], help="other defaults; sts-b: supervised")
    add("--epochs", type=count, default=1, help="0: untrained")
    add("--batch-size", type=within(2, 10 ** 6, int), default=64, help="of all processes")
    add("--bucket", type=within(1, 10 ** 6, int), default=10,
        help="batches sorted by length together; 1: random ones, as SimCSE's")
    add("--lr", type=positive, default=3e-3, help="peak, of Adam")
    add("--warmup", type=rate, default=0.1, help="share of the steps")
    add("--eval-every", type=count, default=125, help="steps between dev scores; 0: never")
    add("--select", choices=["last", "dev"], default="last", help="weights: last, or best on dev")
    add("--seed", nargs="+", type=count, default=[0], help="several: a run each")
    add("--deterministic", action="store_true", help="the same bits on CUDA, too")
    add = p.add_argument_group("run").add_argument
    add("--out", help=f"folder; default: runs/{NAME}-DATE-TIME")
    add("--resume", action="store_true", help="go on from --out's checkpoint")
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    add("--compile", action=yes_no, help="default: on CUDA with Triton, from 2,000 steps on")
    add("--eval-only", action="store_true", help="only score --model or --init")
    add("--compare", nargs="+", metavar="RUN", help="only compare")

    a = p.parse_args(argv)
    if a.preset:
        chosen = PAPER if a.preset == "paper" else STS_B
        p.set_defaults(**chosen)
        a = p.parse_args(argv)  # again: a flag beside the preset wins
        print(f"--preset {a.preset}: " + ", ".join(f"{k} {vars(a)[k]}" for k in chosen))
    a.layer, a.seed = list(dict.fromkeys(a.layer)), list(dict.fromkeys(a.seed))
    if a.eval_only:
        a.layer, a.mlm = ["none"], False
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trained = a.init or a.model != "small"
    check(cuda or a.device == "cpu", "--device cuda: there is none here")
    check(a.width % 32 == 0, "--width: a multiple of 32, the size of a head")
    check(a.batch_size % world == 0, f"--batch-size: a multiple of {world} processes")
    check(a.out or not a.resume, "--resume needs --out")
    check("" not in (a.train_file, a.init, a.sts_dir), "an empty name of a file")
    check(a.init or trained and a.objective == "simcse" or not a.eval_only,
          "--eval-only needs a trained network: --init, or but for supervised --model")
    check(trained or "auto" not in a.layer, "--layer auto needs a trained --model or --init")
    for layer in set(a.layer) - {"auto"}:
        targets_of(layer, a.depth + 1 if a.model == "small" else 10 ** 3)
    return a

# ==== 2 Method ====

# --- the same in simclr, simcse ---
def deep_augment(h, rows, rate, stop_grad, transform="dropout"):
    """A(h) on the chosen rows, h on the others (Eq. 2 and Section 3.2). In training only.
    h: hidden states [B, ...]; rows: bool [B]; rate in [0, 1). stop_grad: the chosen rows are
    detached: no gradient from them to the layers below. transform "dropout": of elements, so that
    E[A(h)] = h; "channel": of channels of [B, C, H, W] or features over all tokens of [B, L, C];
    "pca": see remove_component."""
    x = h.detach() if stop_grad else h
    if transform == "dropout":
        x = F.dropout(x, rate)
    elif transform == "channel":  # one number each: [B, C, 1, 1], [B, 1, C] or [B, C]
        one = x[..., :1, :1] if x.ndim == 4 else x[:, :1] if x.ndim == 3 else x
        x = x * F.dropout(torch.ones_like(one), rate)
    else:
        x = remove_component(x)
    return torch.where(rows.view(-1, *[1] * (h.ndim - 1)), x, h)

def remove_component(h):
    """h [B, ...] without its share in the batch's first principal component. As in the authors'
    modeling_bert.py:531: PCA of the batch as [B, D], the axis without gradient, in float32."""
    with torch.autocast(h.device.type, enabled=False):
        flat = h.float().flatten(1)  # [B, D]
        with torch.no_grad():
            centre = flat.mean(0)
            v = torch.pca_lowrank(flat, q=min(6, *flat.shape))[2][:, :1]  # [D, 1], length 1
        return (h - ((flat - centre) @ v @ v.T).view_as(h)).to(h.dtype)
# --- end ---

def simcse_loss(z1, z2, temperature):
    """SimCSE's Eq. 1 (its models.py:194). z1, z2: [N, d], row i of each a view of sentence i. Every
    first view must find its partner among the N second views, one way only, unlike NT-Xent."""
    z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
    return F.cross_entropy(z1 @ z2.T / temperature, torch.arange(len(z1), device=z1.device))

def mask_tokens(ids, special, mask_id, vocab):
    """BERT's masking (Devlin et al., Section 3.1): (masked ids [B, L], index [M], targets [M]).
    15 % of the tokens that are not special are chosen; of the chosen 80 % become [MASK], 10 % any
    of the `vocab` tokens, 10 % stay. index: places in ids.flatten(); M is the same for all ids of
    one size, for compiled graphs; targets beyond the chosen: -100."""
    chosen = (torch.rand(ids.shape, device=ids.device) < 0.15) & ~torch.isin(ids, special)
    draw = torch.rand(ids.shape, device=ids.device)
    masked = torch.where(chosen & (draw < 0.8), mask_id, ids)
    masked = torch.where(chosen & (draw >= 0.9), torch.randint_like(ids, vocab), masked)
    chosen, room = chosen.flatten(), int(0.18 * ids.numel()) + 8  # at batch 64: mean + 7 sigma
    index = chosen.int().argsort(descending=True, stable=True)[:room]
    return masked, index, torch.where(chosen, ids.flatten(), -100)[index]

def mlm_loss(logits, targets):
    """Mean cross-entropy of the masked tokens of all processes, 0 if there is none. logits [M,
    vocabulary]; targets [M], -100: none."""
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    count = (targets >= 0).sum()
    return gather(total[None]).sum() / gather(count[None]).sum().clamp(min=1)

# ==== 3 Network: transformers' BERT, cut into numbered layers ====

# The paper numbers a 12-layer BERT 0-13 (Section 5.2), so does --layer:
#
#   tokens -> embeddings -> BertLayer 0 -> BertLayer 1 ... BertLayer 11 -> [CLS] -> MLP -> loss
#                       |              |              |                |               |
#   --layer             0              1              2               12              13

def mean_of_tokens(h, mask):
    """[B, L, dim], [B, L] -> [B, dim], without padding."""
    return (h * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

class Net(nn.Module):
    """Encoder, projector and masked-language head, with Deep Augmentation between the layers.
    forward(ids int64 [B, L], mask [B, L], rows bool [B]) -> z [B, dim]. With `places` the second
    half are masked copies, to predict there: (z [B/2, dim], logits [M, vocabulary])."""
    def __init__(self, a, lm):
        super().__init__()
        c, self.lm, self.pooler = lm.config, lm, a.pooler
        # the RoBERTas' positions start behind the padding's
        self.first = 0 if c.model_type in ("bert", "distilbert") else c.pad_token_id + 1
        self.dim, self.longest = c.hidden_size, c.max_position_embeddings - self.first
        self.projector = None  # SimCSE's MLP, not --model's
        if a.pooler == "cls-mlp" or a.pooler == "cls" and a.objective == "simcse":
            self.projector = nn.Sequential(nn.Linear(self.dim, self.dim), nn.Tanh())
            nn.init.normal_(self.projector[0].weight, std=c.initializer_range)
            nn.init.zeros_(self.projector[0].bias)
        self.scorer = nn.Linear(2 * self.dim, 1) if a.objective == "supervised" else None
        self.targets = targets_of(a.layer, len(self.layers()))
        self.augment = {k: getattr(a, k) for k in ("rate", "stop_grad", "transform")}

    def layers(self):
        base = self.lm.base_model
        return [base.embeddings, *(base.encoder if hasattr(base, "encoder") else
                                   base.transformer).layer]

    def augmented(self, l, h, rows):
        active = self.training and l in self.targets
        return deep_augment(h, rows, **self.augment) if active else h

    def states(self, ids, mask, rows=None):
        """The tokens' states after layers 0 ... n, each [B, L, dim]."""
        position = (mask.cumsum(1) - 1).clamp(min=0) + self.first  # padding on either side
        attend, bias, states = mask[:, None, None].bool(), (), []  # no token sees padding
        for l, layer in enumerate(self.layers()):
            if l == 0:
                h = layer(input_ids=ids, position_ids=position)
                if self.lm.config.model_type == "mpnet":
                    attend = torch.where(attend, 0.0, -1e9)
                    bias = (self.lm.base_model.encoder.compute_position_bias(h),)
            else:
                h = layer(h, attend, *bias)
            h = self.augmented(l, h[0] if isinstance(h, tuple) else h, rows)
            states.append(h)
        return states

    def pooled(self, h, mask):
        if self.pooler == "mean":
            return mean_of_tokens(h, mask)
        first = mask.argmax(1)[:, None, None].expand(-1, 1, self.dim)  # [CLS], behind padding
        return h.gather(1, first).squeeze(1)

    def forward(self, ids, mask, rows=None, places=None):
        h = self.states(ids, mask, rows)[-1]
        if places is not None:
            (h, masked), mask, rows = h.chunk(2), mask.chunk(2)[0], rows.chunk(2)[0]
        z = self.pooled(h, mask)
        if self.projector is not None and (self.training or self.pooler == "cls-mlp"):
            z = self.projector(z)
        z = self.augmented(len(self.layers()), z, rows)
        return z if places is None else (z, self.mlm_logits(masked.flatten(0, 1)[places]))

    def mlm_logits(self, h):
        """transformers' masked-language head: [M, dim] -> [M, vocabulary]."""
        lm = self.lm
        if lm.config.model_type == "distilbert":
            h = lm.vocab_layer_norm(lm.activation(lm.vocab_transform(h)))
            return lm.vocab_projector(h)
        return (lm.cls if hasattr(lm, "cls") else lm.lm_head)(h)

    def relatedness(self, u, v):
        """Predicted scores [B] of pairs [B, dim], from Tai et al.'s (2015) two."""
        return self.scorer(torch.cat([(u - v).abs(), u * v], dim=1).float()).squeeze(1)

    def activations(self, ids, mask):
        """Layers 0 ... n [B, L, dim], 0 at padding, and n + 1 [B, dim], as training compares it."""
        states = self.states(ids, mask)
        z = self.pooled(states[-1], mask)
        z = self.projector(z) if self.projector else z
        return [h * mask.unsqueeze(2) for h in states] + [z]

def st_file(model, name):
    file = Path(model, name)  # a file of sentence-transformers, "" without
    return file.read_text() if file.exists() else ""

def pooler_of(model):  # what its folder says, else cls
    how = json.loads(st_file(model, "1_Pooling/config.json") or '{"pooling_mode": "cls"}')
    how = how.get("pooling_mode") or [k for k, v in how.items() if k.startswith("pooling_m") and v]
    dense = "Dense" in st_file(model, "modules.json")
    kind = re.sub(r"\W|pooling_mode_|_tokens?", "", str(how))  # cls, mean, or something else
    check(kind == "cls" or kind == "mean" and not dense,
          f"pools by {kind}{' and a Dense layer' * dense}: give --pooler")
    return kind + "-mlp" * dense

def trained_mlp(model):
    """Weight and bias of the MLP that it carries: sentence-transformers' or BERT's own pooler."""
    if "Dense" in st_file(model, "modules.json"):
        check("Tanh" in st_file(model, "2_Dense/config.json"), "its Dense is no 2_Dense, tanh")
        weights = load_file(Path(model, "2_Dense", "model.safetensors"))
        return {k.removeprefix("linear."): v for k, v in weights.items()}
    base, info = AutoModel.from_pretrained(model, output_loading_info=True)
    check(hasattr(base, "pooler") and not any("pooler" in k for k in info["missing_keys"]),
          "--pooler cls-mlp: it carries no MLP (2_Dense, pooler)")
    return base.pooler.dense.state_dict()

def build(a, tokenizer):
    """The network of these flags and this seed."""
    torch.manual_seed(a.seed)
    state = load_checkpoint(Path(a.init) / "checkpoint.pt", {}) if a.init else None
    try:
        if a.model == "small":
            config = transformers.BertConfig(
                vocab_size=len(tokenizer), hidden_size=a.width, num_hidden_layers=a.depth,
                intermediate_size=4 * a.width, num_attention_heads=a.width // 32)
        else:
            config = AutoConfig.from_pretrained(a.model)
        check(config.model_type in FAMILIES, f"a {config.model_type}, not {', '.join(FAMILIES)}")
        for key in ("dropout", "attention_dropout", "hidden_dropout_prob",
                    "attention_probs_dropout_prob"):
            if a.dropout is not None and hasattr(config, key):
                setattr(config, key, a.dropout)
        if a.model == "small":
            lm = AutoModelForMaskedLM.from_config(config)
        else:
            lm, info = AutoModelForMaskedLM.from_pretrained(
                a.model, config=config, dtype=torch.float32, output_loading_info=True)
            lacks = [k for k in info["missing_keys"] if k.startswith(lm.base_model_prefix)]
            check(not lacks, f"its weights lack {lacks[:1]}")
        check(len(tokenizer) <= config.vocab_size,
              f"its tokenizer has {len(tokenizer)} pieces, its network {config.vocab_size}")
        if not a.pooler:
            a.pooler = state["flags"]["pooler"] if state else "mean" if a.model == "small" else \
                pooler_of(a.model)
            print(f"--pooler {a.pooler}")
        net = Net(a, lm)
        check(a.max_length <= net.longest, f"--max-length: at most {net.longest} tokens")
        if a.eval_only and a.pooler == "cls-mlp" and not a.init:
            net.projector[0].load_state_dict(trained_mlp(a.model))
    except Exception as e:  # of many kinds
        raise BadInput(f"--model {a.model}: {first_line(e)}") from None
    if state:
        try:
            net.load_state_dict(kept(state))
        except RuntimeError:
            raise BadInput(f"--init {a.init}: give its flags (--width, --objective ...)") from None
    lm.requires_grad_(a.mlm)  # without MLM its head is not trained
    lm.base_model.requires_grad_(True)
    return net.to(a.device)

# ==== 4 Data; the views are made by dropout ====

# The default corpus. A line is one scene: who / did / what / where, three synonyms each, and each
# also with an e: "doctor", "doctore", "physician" ... are six words for one concept.
SCENES = """\
doctor,physician,medic / examined,inspected,checked / patient,victim,sufferer / hospital,clinic,ward
cook,chef,baker / cooked,prepared,roasted / meal,dinner,supper / kitchen,canteen,pantry
farmer,grower,peasant / gathered,harvested,collected / crop,grain,wheat / field,meadow,barn
sailor,seaman,mariner / steered,guided,piloted / boat,ship,vessel / harbour,port,dock
singer,vocalist,soprano / performed,presented,rendered / song,tune,melody / theatre,opera,hall
teacher,tutor,coach / explained,described,taught / lesson,lecture,topic / classroom,school,academy
mechanic,engineer,fitter / repaired,mended,fixed / machine,engine,motor / garage,workshop,factory
lawyer,attorney,advocate / studied,read,analysed / contract,agreement,treaty / office,court,chamber
painter,artist,sculptor / admired,praised,lauded / picture,portrait,mural / gallery,museum,studio
runner,athlete,player / watched,followed,observed / match,game,contest / stadium,arena,gym
merchant,trader,dealer / sold,traded,exchanged / fabric,cloth,textile / market,bazaar,shop
pilgrim,tourist,visitor / visited,toured,explored / castle,palace,fortress / mountains,hills,dales
scientist,researcher,scholar / discovered,found,detected / planet,star,comet / lab,institute,faculty
builder,carpenter,mason / built,constructed,erected / house,cottage,cabin / village,hamlet,town
soldier,warrior,guard / defended,protected,secured / bridge,gate,wall / fort,camp,barracks
child,kid,youngster / lost,misplaced,mislaid / toy,doll,puppet / garden,yard,park
"""
TIMES = """in the morning,at dawn,at sunrise / in the evening,at dusk,at sunset
at night,at midnight,after dark / in winter,in december,in the cold
in summer,in july,in the heat / yesterday,recently,lately
long ago,once,in the past / today,now,this week"""
TEMPLATES = """the {0} {1} the {2} in the {3} {4}
{4} the {0} {1} the {2} in the {3}
in the {3} the {0} {1} the {2} {4}
the {2} was {1} by the {0} in the {3} {4}
{4} , in the {3} , some {2} was {1} by the {0}
it was {4} that this {0} {1} some {2} in the {3}
it was the {0} who {1} this {2} in the {3} {4}
this {2} , they say , was {1} in the {3} by some {0} {4}""".split("\n")

class Grammar:
    """Sentences of five concepts, and pairs of them scored 0 to 5 by the concepts shared. What the
    doctor does comes from his row or the two before or behind, and so on: a word's company tells
    its concept; nothing else says that "physician" and "medice" are one. 24 % of the (who, did,
    what) combinations are kept out of training, for testing."""
    def __init__(self):
        rows = [[c.split(",") for c in row.split(" / ")] for row in (SCENES + TIMES).split("\n")]
        scenes, times = rows[:16], [concept for row in rows[16:] for concept in row]
        self.words, near = [*zip(*scenes), times], np.arange(-2, 3)
        grid = np.stack(np.meshgrid(np.arange(16), *[near] * 4, indexing="ij"), -1).reshape(-1, 5)
        grid = grid.cumsum(1) % 16  # a concept's row: the one before's -2 ... +2
        grid[:, 4] //= 2  # there are only eight times
        grid = np.unique(grid, axis=0)
        held = (grid[:, 0] + 2 * grid[:, 1] + grid[:, 2]) % 4 == 1  # any two still meet in training
        self.seen, self.unseen = grid[~held], grid[held]  # int64 [n, 5]

    def say(self, meaning, rng):
        words = [synonyms[c][rng.integers(3)] for synonyms, c in zip(self.words, meaning)]
        words = [w + "e" * int(rng.integers(2)) for w in words[:4]] + words[4:]  # old spelling
        return TEMPLATES[rng.integers(len(TEMPLATES))].format(*words)

    def sentences(self, n):
        rng = np.random.default_rng((0, 0))
        return [self.say(self.seen[i], rng) for i in rng.integers(len(self.seen), size=n)]

    def pairs(self, n, pool, part):
        """(n first sentences, n second ones, scores [n]); part: tells dev, test, ... apart."""
        rng, first, second = np.random.default_rng((0, part)), [], []
        while len(first) < n:
            meaning = pool[rng.integers(len(pool))]
            others = pool[(pool == meaning).sum(1) == len(first) % 6]  # share exactly so many
            if len(others):
                first.append(self.say(meaning, rng))
                second.append(self.say(others[rng.integers(len(others))], rng))
        return first, second, np.arange(n) % 6.0

def read_text(file):
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"{file}, byte {e.start}: not UTF-8; try iconv -f latin1 -t utf-8") from None

def read_sentences(a):
    """The sentences to train on: a file's lines or column without empty ones, or the grammar's."""
    if not a.train_file:
        return Grammar().sentences(20_000)
    lines, kind = read_text(a.train_file).split("\n"), Path(a.train_file).suffix
    if kind in (".csv", ".tsv"):
        csv.field_size_limit(10 ** 9)
        how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
        table = csv.DictReader([line + "\n" for line in lines], **how)
        names = table.fieldnames or [""]
        column = a.column or names[0]
        check(column in names, f"--column {column}: {a.train_file} has {names}")
        lines = [row[column] or "" for row in table]
    sentences = [" ".join(line.split()) for line in lines if line.strip()]
    check(sentences, f"{a.train_file} holds no sentence")
    return sentences

# SentEval's tasks: the years 2012-2016 consist of subsets; STS-B and SICK-R are one file each
YEARS = {12: "MSRpar MSRvid SMTeuroparl surprise.OnWN surprise.SMTnews",
         13: "FNWN headlines OnWN",
         14: "deft-forum deft-news headlines OnWN images tweet-news",
         15: "answers-forums answers-students belief headlines images",
         16: "answer-answer headlines plagiarism postediting question-question"}

def read_pairs(file, columns, skip=0):
    """(first sentences, second ones, scores [n]) of a tab-separated file; columns: of first,
    second, score; the years' scores stand in a file beside. Pairs without a score are left out."""
    def lines(file):
        return read_text(file).removesuffix("\n").split("\n")

    rows, found, scores = lines(file)[skip:], [], str(file).replace(".input.", ".gs.")
    golds = lines(scores) if scores != str(file) else [None] * len(rows)
    check(len(golds) == len(rows), f"{scores} has {len(golds)} lines, {file} {len(rows)}")
    for number, (row, gold) in enumerate(zip(rows, golds), skip + 1):
        cells = row.split("\t")
        try:
            gold = cells[columns[2]] if gold is None else gold
            if gold.strip():
                found.append((cells[columns[0]], cells[columns[1]], float(gold)))
                check(math.isfinite(found[-1][2]), "caught below")
        except (IndexError, ValueError):
            raise BadInput(f"{file}, line {number}: no pair of sentences with a score") from None
    check(found, f"{file} holds no scored pair")
    first, second, golds = zip(*found)
    return list(first), list(second), np.array(golds)

def load_pairs(a):
    """{name: (first sentences, second ones, scores)} of the test tasks, of "dev" and "train": of
    --sts-dir, else the grammar's. What is not there is named and left out."""
    if not a.sts_dir:
        g = Grammar()
        return {} if a.train_file else {
            "unseen": g.pairs(1500, g.unseen, 1), "dev": g.pairs(900, g.seen, 2),
            "train": g.pairs(6000, g.seen, 3) if a.objective == "supervised" else None}
    root, pairs = Path(a.sts_dir), {}
    files = {f"STS{year}": [(f"STS/STS{year}-en-test/STS.input.{name}.txt", (0, 1))
                            for name in names.split()] for year, names in YEARS.items()}
    for name, part in {"STS-B": "test", "dev": "dev", "train": "train"}.items():
        files[name] = [(f"STS/STSBenchmark/sts-{part}.csv", (5, 6, 4))]
    files["SICK-R"] = [("SICK/SICK_test_annotated.txt", (1, 2, 3), 1)]
    for name, parts in files.items():  # "all" of SentEval: a year's subsets one after the other
        try:
            first, second, golds = zip(*(read_pairs(root / file, *how) for file, *how in parts))
            pairs[name] = [*itertools.chain(*first)], [*itertools.chain(*second)], np.hstack(golds)
        except FileNotFoundError as e:
            print(f"{name}: left out, there is no {e.filename}")
    check(set(pairs) - {"dev", "train"}, f"--sts-dir {root}: no task (STS/, SICK/) is there")
    return pairs

def learn_tokenizer(sentences, vocab_size):
    """A lower-case WordPiece tokenizer like BERT's."""
    pieces, inside = BertWordPieceTokenizer(lowercase=True), Counter()
    for sentence in sentences:
        inside.update(re.findall(r"(?<=\S)\S", pieces.normalize(sentence)))
    # beforehand: the trainer numbers letters inside words in another order each time
    named = sorted("##" + c for c, _ in inside.most_common(vocab_size // 4))
    pieces.train_from_iterator(
        sentences, vocab_size, show_progress=False, limit_alphabet=vocab_size // 2,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *named])
    pieces = BertWordPieceTokenizer(vocab=pieces.get_vocab(), lowercase=True)
    return transformers.BertTokenizerFast(tokenizer_object=pieces._tokenizer)

def load_tokenizer(a, sentences):
    """--model's; of the small BERT: --init's, or learned from the sentences."""
    if a.model == "small" and not a.init:
        return learn_tokenizer(sentences, a.vocab_size)
    folder = Path(a.init, "tokenizer").resolve() if a.model == "small" else a.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    except Exception as e:  # of many kinds: missing, damaged
        raise BadInput(f"{folder}: no tokenizer: {first_line(e)}") from None
    check(len(tokenizer) > 10, f"{folder}: no tokenizer")  # transformers makes an empty one
    check(tokenizer.pad_token and (tokenizer.mask_token or not a.mlm),
          f"{folder}: its tokenizer has no [PAD] or no [MASK]")
    return tokenizer

def load_data(a):
    """pairs to test with; tokens int32 [N, max_length], padded on the right; lengths [N]. Of N
    training pairs: tokens [2N, ...], first the first sentences; scores [N]."""
    pairs, scores = load_pairs(a), None
    train = pairs.pop("train", None)
    check("dev" in pairs or a.select == "last" and "auto" not in a.layer,
          "--select dev, --layer auto need dev pairs: --sts-dir with STS-B")
    if a.eval_only:
        sentences = []
    elif a.objective == "simcse":
        sentences = read_sentences(a)
    else:
        check(train and not (a.train_file and a.sts_dir),
              "--objective supervised trains on the pairs of --sts-dir, not on a --train-file")
        sentences = train[0] + train[1]
        scores = torch.tensor(train[2], dtype=torch.float32, device=a.device)
    box = [load_tokenizer(a, sentences) if os.environ.get("RANK", "0") == "0" else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    tokenizer, tokens = box[0], [np.zeros((0, a.max_length), np.int32)]
    for i in tqdm(range(0, len(sentences), 20_000), "tokenising", leave=False, disable=None):
        tokens.append(tokenizer(
            sentences[i:i + 20_000], truncation=True, padding="max_length", return_tensors="np",
            max_length=a.max_length)["input_ids"].astype(np.int32))
    tokens = np.concatenate(tokens)
    real = tokens != tokenizer.pad_token_id
    unknown = (tokens == tokenizer.unk_token_id).sum() / max(1, real.sum() - 2 * len(tokens))
    check(unknown < 0.5, f"{unknown:.0%} of the tokens are unknown to the tokenizer ([UNK])")
    return SimpleNamespace(
        tokenizer=tokenizer, tokens=torch.from_numpy(tokens).to(a.device), scores=scores,
        lengths=real.sum(1).reshape(1 if scores is None else 2, -1).max(0), pairs=pairs,
        unknown=unknown, digest=hashlib.sha256(tokens.tobytes()).hexdigest()[:12])

def epoch_order(lengths, batch_size, bucket, seed):
    """Which sentences make which batch: int64 [steps, batch_size]. All are shuffled and cut into
    buckets of so many batches, each sorted by length: little padding. bucket 1: random batches."""
    rng = np.random.default_rng(seed)
    order, batches = rng.permutation(len(lengths))[:len(lengths) // batch_size * batch_size], []
    for start in range(0, len(order), bucket * batch_size):
        some = order[start:start + bucket * batch_size]
        some = some[np.argsort(lengths[some], kind="stable")].reshape(-1, batch_size)
        batches.append(rng.permutation(some))
    return np.concatenate(batches)

def train_batches(data, a, step, steps, rank, world):
    """Endless batches of this process from `step` on: (index [B], ids int64 [2B, L]): its
    sentences, then what they are compared with: themselves, or the second ones of pairs. For
    compiled graphs L has at most four values."""
    lengths, unit = data.lengths, math.ceil(a.max_length / 4) if a.compile else 1
    partner = len(data.tokens) - len(lengths)  # how far behind a sentence it stands
    while True:
        epoch, first = divmod(step, steps)
        order = epoch_order(lengths, a.batch_size, a.bucket, (a.seed, epoch))[first:]
        index = torch.from_numpy(order[:, rank::world]).to(a.device)  # [steps left, B]
        for i, longest in zip(index, lengths[order].max(1)):
            both = torch.cat([i, i + partner])
            yield i, data.tokens[both, :math.ceil(longest / unit) * unit].long()
        step += len(order)

def learning_rate(step, a, total):
    """Linear warm-up, then linearly towards 0 (supervised: constant)."""
    warm = int(a.warmup * total)
    if step < warm:
        return a.lr * (step + 1) / warm
    return a.lr * (1 if a.objective == "supervised" else (total - step) / (total - warm))

# ==== 5 Training ====

# --- the same in simclr, simcse, vicreg, topk ---
def gather(z):
    """The rows [B, ...] of all processes as [W * B, ...]; only this one's carry a gradient."""
    if not dist.is_initialized():
        return z
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.detach().contiguous())
    parts[dist.get_rank()] = z
    return torch.cat(parts)

def save_checkpoint(path, state):
    """Written beside, then renamed: a kill leaves the old file or the new one, whole."""
    part = path.with_suffix(".part")
    try:
        torch.save(state, part)
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written (full disk?): {e}") from None
    os.replace(part, path)

def load_checkpoint(path, flags):
    """A checkpoint of this script and these flags; code in the file is not run."""
    try:
        assert not zipfile.ZipFile(path).testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
        script, was, _ = state["script"], state["flags"], dict(state["model"])
    except Exception:  # many kinds
        raise BadInput(f"{path} is missing, damaged, or no checkpoint") from None
    other = [f"{k} is {v}, was {was.get(k)}" for k, v in flags.items()
             if v != was.get(k) and k not in HOW]
    check(script == NAME, f"{path} was written by {script}.py")
    check(not other, f"--resume with other flags: {'; '.join(other)}")
    return state
# --- end ---
# --- the same in simclr, simcse ---
def alignment(z1, z2):
    """Mean squared distance of pairs, 0..4; z1, z2 normalised [n, d] (Wang & Isola 2020)."""
    return (z1 - z2).square().sum(1).mean()

def uniformity(z):
    """log mean exp(-2 |zi - zj|^2), i < j, z normalised [n, d]: 0 one point, -4 well spread."""
    return torch.pdist(z).square().mul(-2).exp().mean().log()

@torch.no_grad()
def meters(z1, z2):
    """Of embeddings [B, d]: alignment, uniformity, and embedding_std, of the normalised ones times
    sqrt(d): 1 spread evenly, 0 collapsed."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    return {"alignment": alignment(z1, z2).item(), "uniformity": uniformity(z1).item(),
            "embedding_std": z1.std(0).mean().item() * z1.shape[1] ** 0.5}
# --- end ---

def kept(state):
    """A finished checkpoint's weights: the last, or with --select dev the best."""
    return state["best"] if state["flags"]["select"] == "dev" else state["model"]

def train(a, net, data, out, flags, measure, state):
    """Train from the start, or on from a checkpoint's `state`; returns the last one. Every step
    reseeds, so no random state is saved, and measure(), which scores `net`, changes nothing."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    steps = len(data.lengths) // a.batch_size
    total = a.epochs * steps
    weights = [w for w in net.parameters() if w.requires_grad]
    optimizer = torch.optim.Adam(weights, a.lr, fused=True)

    def keep(step):
        state.update(step=step, model=net.state_dict(), optimizer=optimizer.state_dict())
        if rank == 0:
            save_checkpoint(out / "checkpoint.pt", state)

    def score(step, tests=False):
        if rank == 0:
            found, devs = measure(tests), [row.get("dev", 0) for row in state["probes"]]
            if a.select == "dev" and found["dev"] > max(devs, default=-math.inf):
                state["best"] = {k: v.cpu().clone() for k, v in net.state_dict().items()}
            state["probes"].append({"step": step, **found})
            net.train()

    if state:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        state = {"script": NAME, "flags": flags, "seconds": 0.0, "log": [], "probes": []}
        score(0, tests=True)
        keep(0)
    model = net if world == 1 else nn.parallel.DistributedDataParallel(net)
    if a.compile:
        torch.compiler.reset()
        # CUDA graphs, one a length: a small step waits for launches
        mode = "reduce-overhead" if world == 1 else None
        model = torch.compile(model, mode=mode, dynamic=False)
    tokenizer = data.tokenizer
    special = torch.tensor(tokenizer.all_special_ids).to(a.device)
    how = {} if sys.stderr.isatty() else {"mininterval": 10, "bar_format": "{l_bar}{r_bar}\n"}
    bar = tqdm(total=total * a.batch_size, initial=state["step"] * a.batch_size, unit="sentences",
               unit_scale=True, disable=rank > 0, **how)
    batches = train_batches(data, a, state["step"], steps, rank, world)
    recent, saved, begun = [], time.time(), time.time()
    net.train()
    for step in range(state["step"] + 1, total + 1):
        index, ids = next(batches)
        torch.manual_seed(hash((a.seed, step, rank)))  # this step's masks, rows, dropout
        mask, places = (ids != tokenizer.pad_token_id).long(), None
        if a.mlm:  # SimCSE's second pass, over masked copies: in one pass, half of the kernels
            masked, places, targets = mask_tokens(ids, special, tokenizer.mask_token_id,
                                                  len(tokenizer))
            ids, mask = torch.cat([ids, masked]), mask.repeat(2, 1)
        rows = torch.rand(len(ids), device=a.device) < a.sample
        with torch.autocast(a.device, torch.bfloat16, enabled=a.device == "cuda"):
            z = model(ids, mask, rows, places)
        z, logits = z if a.mlm else (z, None)
        masked_loss = mlm_loss(logits, targets) if a.mlm else z.new_zeros(())
        # the whole batch's loss, with the gradient for these rows; `world`: DDP takes the mean
        z1, z2 = z.float().chunk(2)
        if a.objective == "simcse":
            loss = simcse_loss(gather(z1), gather(z2), a.temperature)
        else:
            loss = F.mse_loss(gather(net.relatedness(z1, z2)), gather(data.scores[index]))
        optimizer.zero_grad()
        (world * (loss + 0.1 * masked_loss)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)  # as the Trainer that SimCSE used
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step - 1, a, total)
        optimizer.step()
        recent.append(torch.stack([loss, masked_loss]).detach())
        bar.update(a.batch_size)

        scoring = step == total and a.select == "dev" or \
            a.eval_every and step % a.eval_every == 0
        saving = step == total or time.time() - saved > 60
        if not (scoring or saving) and step % max(1, min(50, total // 100)):
            continue
        values = torch.stack(recent).mean(0).tolist()
        weight = sum(w.sum() for w in weights).item()
        check(math.isfinite(sum(values) + weight), f"the loss is not finite at about step {step}; "
              f"{out} keeps its checkpoint; try a smaller --lr in a new --out")
        seconds = time.time() - begun
        state["seconds"] += seconds
        state["log"].append({
            "step": step, "epoch": step / steps, "loss": values[0], "lr": lr,
            "sentences_per_second": a.batch_size * len(recent) / seconds,
            **meters(z1, z2), **({"mlm": values[1]} if a.mlm else {})})
        bar.set_postfix(loss=values[0], refresh=False)
        if scoring:
            score(step)
        if saving:
            keep(step)
            saved = time.time()
        recent, begun = [], time.time()
    bar.close()
    return state

# ==== 6 Evaluation ====

@torch.no_grad()
def encode(net, tokenizer, sentences, tokens_a_batch=None):
    """Embeddings float32 [n, dim], in eval mode: each distinct sentence once, those of one length
    together, cut only where the network ends."""
    net.eval()
    device = next(net.parameters()).device
    tokens_a_batch = tokens_a_batch or (8192 if device.type == "cuda" else 2048)
    place = {sentence: i for i, sentence in enumerate(dict.fromkeys(sentences))}
    ids = []
    if place:  # transformers fails on an empty list
        ids = tokenizer([*place], truncation=True, max_length=net.longest)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # memory peaks at once
    out, start = torch.empty(len(ids), net.dim, device=device), 0
    while start < len(order):
        some = order[start:start + max(1, tokens_a_batch // len(ids[order[start]]))]
        x = tokenizer.pad({"input_ids": [ids[i] for i in some]}, return_tensors="pt").to(device)
        out[some] = net(x["input_ids"], x["attention_mask"])
        start += len(some)
    return out[[place[sentence] for sentence in sentences]]

def spearman(x, y):
    """Spearman's rank correlation, -1..1: Pearson's of the ranks, in which equal values share
    their mean. 0 where it is undefined (a constant list). BadInput: NaN."""
    def ranks(values):
        _, which, count = np.unique(values, return_inverse=True, return_counts=True)
        return (count.cumsum() - (count - 1) / 2)[which] - (len(values) + 1) / 2

    check(not np.isnan([x, y]).any(), "NaN among the scores")
    x, y = ranks(x), ranks(y)
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else 0.0

@torch.no_grad()
def measure(net, data, tests=True):
    """Spearman * 100 of each task, "sts": their mean, and of "dev"; of the dev pairs alignment of
    those scored above 4 and uniformity (Section 6.2; lower is better). tests: all, else dev."""
    pairs = {k: v for k, v in data.pairs.items() if tests or k == "dev"}
    every = [s for first, second, _ in pairs.values() for s in first + second]
    z, result, tasks = encode(net, data.tokenizer, every), {}, [k for k in pairs if k != "dev"]
    for name, (first, _, golds) in pairs.items():
        u, v, z = z.tensor_split([len(first), 2 * len(first)])
        if net.scorer is not None:
            scores = net.relatedness(u, v).cpu().numpy()
        else:  # rounded: the cosines of equal vectors tie
            scores = F.cosine_similarity(u.double(), v.double()).cpu().numpy().round(12)
        result[name] = 100 * spearman(scores, golds)
        if name == "dev":
            u, v, alike = F.normalize(u, dim=1), F.normalize(v, dim=1), torch.tensor(golds > 4)
            if alike.any():
                result["alignment_dev"] = alignment(u[alike], v[alike]).item()
            result["uniformity_dev"] = uniformity(torch.cat([u, v])).item()
    return {**({"sts": mean(result[k] for k in tasks)} if tasks else {}), **result}

@torch.no_grad()
def layer_map(net, data):
    """Linear CKA of the layers 0 ... n + 1 on the dev sentences [n + 2, n + 2] (Fig. 10), and its
    co-adapted stretch. A layer is the mean of its tokens: [CLS] of layer 0 is always the same."""
    import cka
    net.eval()
    device = next(net.parameters()).device
    sentences = list(dict.fromkeys(data.pairs["dev"][0] + data.pairs["dev"][1]))

    def layers():
        for i in range(0, len(sentences), 256):
            x = data.tokenizer(sentences[i:i + 256], truncation=True, max_length=net.longest,
                               padding=True, return_tensors="pt").to(device)
            mask = x["attention_mask"]
            *states, z = net.activations(x["input_ids"], mask)
            acts = [mean_of_tokens(h, mask) for h in states] + [z]
            yield acts, acts

    M = cka.cka_map(layers())
    return M, cka.coadapted_stretch(M[:-1, :-1])

# --- the same in simclr, simcse, vicreg, topk ---
def draw(path, panels):
    """PNG of panels {title: {label of a line: [(x, y, std of y)]}}."""
    columns, rows = min(3, len(panels) or 1), math.ceil(len(panels) / 3) or 1
    figure = Figure((4.5 * columns, 3.5 * rows), layout="constrained")
    for i, (title, lines) in enumerate(panels.items()):
        axis = figure.add_subplot(rows, columns, i + 1, title=title)
        for label, points in lines.items():
            axis.errorbar(*zip(*points), fmt=".-", capsize=3, label=label)
        if 1 < len(lines) < 9:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
# --- end ---

# ==== 7 Export ====

def export(a, net, tokenizer, out, report):
    """Writes encoder.pt (TorchScript), tokenizer/, model/, weights.safetensors; returns the largest
    relative difference of encoder.pt, read back, from `net`, at other sizes."""
    live = copy.deepcopy(net).cpu().eval()  # traces bake the device in

    def example(batch, length, left=False):  # of all lengths down to 2
        lengths, place = torch.linspace(length, 2, batch).long()[:, None], torch.arange(length)
        mask = (place >= length - lengths if left else place < lengths).long()
        return torch.randint(live.lm.config.vocab_size, (batch, length)), mask

    names = ["embeddings", *(f"layer{l}" for l in range(1, len(live.layers()))), "output"]
    config = {"script": NAME, "layers": names, "layer_numbers": {n: l for l, n in enumerate(names)},
              "dim": live.dim, "longest": live.longest, "flags": vars(a), "measurements": report}
    worst, methods = 0.0, {"forward": example(3, 9, True), "activations": example(3, 9, True)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit|Converting|.is_grad")
        traced = torch.jit.trace_module(live, methods, check_trace=False, strict=False)
        saved = traced.save_to_buffer({"config.json": json.dumps(config)})
        (out / "encoder.pt").write_bytes(saved)
        loaded = torch.jit.load(out / "encoder.pt")
        for x in example(1, live.longest), example(7, min(32, live.longest), True), example(64, 3):
            for ours, theirs in zip([live(*x), *live.activations(*x)],
                                    [loaded(*x), *loaded.activations(*x)]):
                worst = max(worst, ((ours - theirs).norm() / ours.norm().clamp(min=1e-6)).item())
    assert worst <= 1e-4, f"the exported encoder differs from the live one by {worst:.2g}"
    model = out / "model"
    (live.lm if a.mlm else live.lm.base_model).save_pretrained(model)
    tokenizer("")  # a plain call: takes truncation and padding out of it again
    tokenizer.model_max_length = live.longest
    for folder in (out / "tokenizer", model):
        tokenizer.save_pretrained(folder)
    (out / "weights.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    # what sentence-transformers reads
    kinds = ["Transformer", "Pooling"] + ["Dense"] * (a.pooler == "cls-mlp")
    files = {"modules.json": [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
                               "type": f"sentence_transformers.models.{kind}"}
                              for i, kind in enumerate(kinds)],
             "1_Pooling/config.json": {"word_embedding_dimension": live.dim,
                                       "pooling_mode_cls_token": a.pooler != "mean",
                                       "pooling_mode_mean_tokens": a.pooler == "mean"}}
    if kinds[2:]:
        files["2_Dense/config.json"] = {
            "in_features": live.dim, "out_features": live.dim,
            "activation_function": "torch.nn.modules.activation.Tanh"}
    for name, content in files.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(json.dumps(content, indent=1))
    if kinds[2:]:
        save_file({f"linear.{k}": v for k, v in live.projector[0].state_dict().items()},
                  model / "2_Dense/model.safetensors")
    return worst

# ==== 8 Runs ====

def compare(folders):
    """Table (Fig. 8) and picture (Fig. 6, 12) of the finished runs in these folders, seeds pooled:
    {what tells runs apart: {measurement: (mean, std; 0 of one seed)}}."""
    runs, groups = {}, {}
    for file in (f for folder in folders for f in sorted(folder.glob("**/report.json"))):
        try:
            r = json.loads(file.read_text())
            flags = {k: v for k, v in r["flags"].items() if k not in HOW}
            check(r["script"] == NAME and r["probes"], "another script's")
            runs[str(flags)] = r["targets"], flags, r["probes"]  # each run once
        except Exception:
            print(f"{file}: left out, no finished run of this script")
    check(runs, "no finished run there")
    for _, flags, probes in sorted(runs.values(), key=lambda run: run[0]):
        name = ", ".join(f"{k} {v}" for k, v in flags.items() if k == "layer" or k != "seed" and
                         any(other.get(k) != v for _, other, _ in runs.values()))
        groups.setdefault(name, []).append(probes)

    def pooled(rows):  # the same probe of several seeds
        values = {k: [row[k] for row in rows if k in row] for k in rows[0]}
        return {k: (mean(v), stdev(v) if v[1:] else 0.0) for k, v in values.items()}

    table = {"before": pooled([probes[0] for seeds in groups.values() for probes in seeds])}
    panels = defaultdict(dict)
    for name, seeds in groups.items():
        layer, _, others = name.removeprefix("layer ").partition(", ")
        row = table[name] = pooled([probes[-1] for probes in seeds])
        if "sts" in row:
            panels["average Spearman by layer"].setdefault(others, []).append((layer, *row["sts"]))
        along = [pooled(rows) for rows in zip(*seeds)]  # a row an evaluation
        if "alignment_dev" in row:
            panels["alignment by uniformity, dev"][name] = [
                (r["uniformity_dev"][0], r["alignment_dev"][0], 0) for r in along]
    shown = [k for k in table["before"] if k != "step" and not k.endswith("_dev")]
    width = max(14, *map(len, table))
    print(f"{'Spearman x 100':{width}}" + "".join(f"{k:>14}" for k in shown))
    for name, row in table.items():
        cells = ["%.2f ± %.2f" % row[k] if k in row else "" for k in shown]
        print(f"{name:{width}}" + "".join(f"{c.removesuffix(' ± 0.00'):>14}" for c in cells))
    target = (folders[0] if len(folders) == 1 else folders[0].parent) / "compare.png"
    draw(target, panels)
    print(target)
    return table

def run(a, out, data):
    """One run, from data to report."""
    auto, a.layer = a.layer == "auto", "none" if a.layer == "auto" else a.layer
    net = build(a, data.tokenizer)
    if auto:  # Section 6.1: where the co-adapted stretch starts, or ends
        try:
            first, last = layer_map(net, data)[1]
            a.layer = str(first if a.stop_grad else last)
        except (ImportError, ValueError) as e:
            raise BadInput(f"--layer auto: {e}") from None
        net.targets = targets_of(a.layer, len(net.layers()))
    check(a.mlm or a.sample < 1 or not a.stop_grad or
          max(net.targets, default=-1) < len(net.layers()) - 1,
          "--sample 1 with stop-gradient at the end: nothing is left to train")
    state, report_file = None, out / "report.json"
    flags = {**vars(a), "sentences": data.digest, "processes": os.environ.get("WORLD_SIZE")}
    if report_file.exists() or (out / "checkpoint.pt").exists():  # with --resume only
        state = load_checkpoint(out / "checkpoint.pt", flags)
        with suppress(OSError, ValueError):
            return json.loads(report_file.read_text())
    chief = not dist.is_initialized() or dist.get_rank() == 0
    if chief:
        out.mkdir(parents=True, exist_ok=bool(a.out))
        versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
        (out / "config.json").write_text(json.dumps({"script": NAME, **vars(a), **versions}))
        print(f"{out}: {len(data.lengths)} sentences of {data.lengths.mean():.1f} tokens, "
              f"{data.unknown:.1%} of them [UNK], layer {a.layer}"
              f"{', no scores' * (not data.pairs)}")
    state = train(a, net, data, out, flags, lambda tests: measure(net, data, tests), state)
    if not chief:
        return {}
    net.load_state_dict(kept(state))
    log, final, step = state["log"], measure(net, data), state["step"]
    if a.select == "dev":
        step = max(state["probes"], key=lambda row: row["dev"])["step"]
    probes = [*state["probes"], {"step": step, **final}]
    report = {"script": NAME, "flags": vars(a), "targets": net.targets, **final,
              **{f"{k}_untrained": v for k, v in probes[0].items()}, "probes": probes,
              "steps": state["step"], "seconds": state["seconds"],
              "sentences_per_second": median([r["sentences_per_second"] for r in log] or [0])}
    report["export_difference"] = export(a, net, data.tokenizer, out, report)
    lines = [[*row] for row in log[:1]] + [[*row.values()] for row in log]
    (out / "metrics.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    draw(out / "curves.png", {  # of the second rows: the first probe has more keys
        f"{k} by step": {"": [(row["step"], row[k], 0) for row in rows if k in row]}
        for rows in (probes, log) for k in (rows[1:] or [{}])[0] if k not in ("step", "epoch")})
    with suppress(Exception):  # no cka.py that works, no dev sentences, too few
        import cka
        M, stretch = layer_map(net, data)
        cka.draw(out / "cka.png", [{"map": M.tolist(), "names_a": [*map(str, range(len(M)))],
                                    "run_a": out.name, "targets": net.targets,
                                    "stretch": stretch}])
    report_file.write_text(json.dumps(report, indent=1))
    return report

def main(argv=None):
    """Run a command line: one run's report, or several's table."""
    words, out = list(sys.argv[1:] if argv is None else argv), None
    transformers.logging.set_verbosity(50)  # no bars, no tables of weights that are not used
    transformers.logging.disable_progress_bar()
    try:
        a = settings(words)
        if a.compare:
            return compare([Path(f) for f in a.compare])
        if "RANK" in os.environ:  # started by torchrun
            if a.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(timeout=timedelta(hours=2))  # for the evaluation
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(a.deterministic)
        chief = os.environ.get("RANK", "0") == "0"
        runs = [argparse.Namespace(**{**vars(a), "layer": layer, "seed": seed})
                for layer, seed in itertools.product(a.layer, a.seed)]
        if a.eval_only:
            data = load_data(a)
            check(data.pairs, "no pairs: --sts-dir")
            result = measure(build(runs[0], data.tokenizer), data)
            print("\n".join(f"{k:16}{v:8.2f}" for k, v in result.items()))
            return result
        out = Path(a.out or f"runs/{NAME}-{time.strftime('%Y%m%d-%H%M%S')}")
        places = [out / f"layer-{r.layer}-seed-{r.seed}" if runs[1:] else out for r in runs]
        own = a.resume and any(NAME in str(f.read_bytes()) for f in out.rglob("config.json"))
        check(own or not (chief and out.exists() and any(out.iterdir())),
              f"--out {out} is not empty; --resume goes on with its own run")
        data = load_data(a)
        size = len(data.lengths)
        check(a.batch_size <= size, f"--batch-size: there are {size} sentences or pairs")
        long = a.device == "cuda" and a.epochs * (size // a.batch_size) >= 2000
        for r in runs:
            r.compile = long and bool(find_spec("triton")) if a.compile is None else a.compile
        reports = [run(r, place, data) for r, place in zip(runs, places)]
        table = compare([out]) if chief and data.pairs else {}
        return table if runs[1:] else reports[0]
    except (BadInput, OSError, SafetensorError) as e:
        print(f"{NAME}.py: error: {str(e).splitlines()[-1]}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        again = shlex.join([sys.argv[0], *words, *["--out", str(out)] * bool(out), "--resume"])
        print(f"\nstopped; to go on:\npython {again}")
        raise SystemExit(130) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
