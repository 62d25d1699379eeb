"""simcse_deepaug.py: its formulas against slow ones, the numbered layers against transformers, the
STS reader and scores, whole runs, the export, and what bad input gets. What all scripts promise
alike (Ctrl-C, kills, checkpoints, torchrun) stands in test_copies.py."""
import csv
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from conftest import SHARED, report_of, same_bits, state_of
from safetensors.torch import load_file

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
    a.layer, a.seed, a.compile = a.layer[0], a.seed[0], bool(a.compile)
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
    ids = torch.randint(5, vocab, (batch, length), generator=g)
    return torch.where(mask.bool(), ids, pad), mask

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
    z, z1, z2 = randn(1, 4).expand(10, 4), randn(6, 4), randn(6, 4, seed=1)
    for first, second, expected in ((z1[:1], z2[:1], 0), (z, z, math.log(10))):
        value, *gradients = value_and_gradients(S.simcse_loss, first, second, 0.05)
        assert value.item() == pytest.approx(expected, rel=1e-6)
        assert all(g.abs().max() < 1e-5 for g in gradients)
    assert abs(S.simcse_loss(z1, z2, 0.5) - S.simcse_loss(z2, z1, 0.5)) > 1e-3
    alike, apart = torch.tensor([[1, 0.01], [1, -0.01]]), torch.tensor([[0, 1.0], [0, -1]])
    expected = math.log(1 + math.exp(-4))
    assert S.simcse_loss(alike, apart, 0.005).item() == pytest.approx(expected, rel=1e-3)
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
    5 standard errors; the others keep theirs. As many places for all batches of a size."""
    torch.manual_seed(0)
    vocab, mask_id, special = 1000, 4, torch.tensor([0, 2, 3, 4])
    ids = torch.randint(vocab, (4000, 100))
    ids[:, 0], ids[:, 70], ids[:, 71:] = 2, 3, 0
    before = ids.clone()
    masked, index, targets = S.mask_tokens(ids, special, mask_id, vocab)
    assert torch.equal(ids, before)
    assert len(index.unique()) == len(index) == len(targets) == int(0.18 * 400_000) + 8
    chosen = index[targets >= 0]
    assert torch.equal(targets[targets >= 0], ids.flatten()[chosen])
    assert not torch.isin(ids.flatten()[chosen], special).any()
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
    for size in [4, 32] * 50:  # there is room for all but one batch in a million
        _, _, targets = S.mask_tokens(torch.full((size, size), 7), special, mask_id, vocab)
        assert len(targets) == min(size ** 2, int(0.18 * size ** 2) + 8) and (targets < 0).any()

# ==== Deep Augmentation acts at layer k ====

def flags_for(k, transform, stop="--stop-grad"):
    return f"--layer {k} --transform {transform} {stop} --rate 0.5"

@pytest.mark.parametrize("pooler", ["cls", "mean"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("k", LAYERS)
def test_augmentation_acts_at_its_layer(tokenizer, k, transform, pooler):
    """Below layer k nothing changes; from k on the chosen rows do, the others keep their bits."""
    net = network(tokenizer, flags_for(k, transform), "--pooler", pooler)
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
        out = states[k][ROWS]
        assert torch.equal(out, torch.where(out == 0, 0, 2 * clean[k][ROWS]))
        assert 0.25 < (out == 0).float().mean() < 0.75

@pytest.mark.parametrize("layer, targets", [
    ("1+3", [1, 3]), ("all", [0, 1, 2, 3, 4]), ("none", [])])
def test_several_layers_act_together_and_none_in_eval_mode(tokenizer, layer, targets):
    net = network(tokenizer, "--pooler cls-mlp --rate 0.5 --layer", layer)
    (ids, mask), plain = some_tokens(), network(tokenizer, "--pooler cls-mlp").eval()
    with torch.no_grad():
        states = [*net.states(ids, mask, ROWS), net(ids, mask, ROWS)]
    for l in LAYERS:
        share = (states[l][ROWS] == 0).float().mean()
        assert (0.25 < share < 0.75) == (l in targets) and states[l][~ROWS].all()
    net.eval()
    assert torch.equal(net(ids, mask, ROWS), plain(ids, mask))
    assert all(map(torch.equal, net.activations(ids, mask), plain.activations(ids, mask)))

def gradients(net, weights):
    """Of sum(weights * output), on what every layer gives before it is augmented."""
    raw, (ids, mask) = [], some_tokens()

    def keep(module, inputs, output):
        output.retain_grad()
        raw.append(output)
    modules = [*net.layers(), *[net.projector] * bool(net.projector)]
    handles = [m.register_forward_hook(keep) for m in modules]
    torch.manual_seed(7)
    (net(ids, mask, ROWS) * weights).sum().backward()
    [handle.remove() for handle in handles]
    return [h.grad for h in raw]

@pytest.mark.parametrize("pooler, stop", [
    ("cls", "--stop-grad"), ("mean", "--stop-grad"), ("cls", "--no-stop-grad")])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("k", LAYERS)
def test_with_stop_gradient_alone_augmented_rows_teach_nothing_up_to_their_layer(
        tokenizer, k, transform, pooler, stop):
    """They send exactly zero, the others the bits of the plain network; at layer n + 1, too, where
    the authors' detach never fires. Without stop-gradient they teach all layers."""
    net = network(tokenizer, flags_for(k, transform, stop), "--pooler", pooler)
    raw = gradients(net, randn(8, 32))
    clean = gradients(network(tokenizer, "--pooler", pooler), randn(8, 32))
    for l in range(len(raw)):
        assert torch.equal(raw[l][~ROWS], clean[l][~ROWS])
        assert raw[l][~ROWS].flatten(1).any(1).all(), l
        if stop == "--stop-grad" and l <= k:
            assert not raw[l][ROWS].any(), l
        else:
            assert raw[l][ROWS].flatten(1).any(1).all(), l
        assert l != k or not torch.equal(raw[l][ROWS], clean[l][ROWS])  # through the transform

@pytest.mark.parametrize("k", LAYERS)
def test_the_masked_copies_are_augmented_with_rows_of_their_own(tokenizer, k):
    net, plain = network(tokenizer, flags_for(k, "dropout")), network(tokenizer)
    (ids, mask), places = some_tokens(), torch.arange(8) * 11 + 1  # each sentence's second token
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

@pytest.mark.parametrize("name", S.FAMILIES)
def test_every_family_is_computed_and_exported_as_transformers_does(name, tokenizer, tmp_path):
    """States, masked-language logits and vectors are transformers' own, with padding on either
    side or none; from the exported files, too, read as sentence-transformers does."""
    folder, first = tmp_path / "model", 0 if "bert" in (name, name.removeprefix("distil")) else 2
    config = transformers.AutoConfig.for_model(
        name, vocab_size=320, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=48, hidden_dim=48, pad_token_id=first // 2,
        max_position_embeddings=20 + first)
    torch.manual_seed(1)
    roughen(transformers.AutoModelForMaskedLM.from_config(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    a = one_run("--layer 2 --dropout 0 --max-length 9 --model", folder)
    net = S.build(a, tokenizer).eval()
    assert net.longest == 20 and net.pooler == "cls" and len(net.layers()) == 4
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids, mask = some_tokens(length=20, vocab=320, pad=config.pad_token_id)
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
    modules = [m["path"] for m in json.loads((folder / "modules.json").read_text())]
    assert modules == ["", "1_Pooling", "2_Dense"][:len(modules)]
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
        values = np.asarray(values)
        found = [(values < v).sum() + (1 + (values == v).sum()) / 2 for v in values]
        return np.array(found) - np.mean(found)
    x, y = ranks(x), ranks(y)
    return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())

@pytest.mark.parametrize("n, levels", [(2, 0), (3, 0), (50, 0), (200, 6), (101, 2), (80, 30)])
def test_spearman_equals_the_textbook(n, levels):
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    y = rng.integers(levels, size=n) / 5 if levels else rng.normal(size=n)
    for u, v in ((x, y), (y, x), (y, np.roll(y, 1)), (x, -x)):
        assert S.spearman(u, v) == pytest.approx(slow_spearman(u, v), abs=1e-12)

def test_spearman_is_0_where_it_is_undefined_and_nan_is_refused():
    assert S.spearman([5, 5, 5], [1, 2, 3]) == 0 == S.spearman([1, 2, 3], [5, 5, 5])
    for bad in (([1, math.nan], [1, 2]), ([1, 2], [math.nan, 2])):
        with pytest.raises(S.BadInput, match="NaN"):
            S.spearman(*bad)

def some_lengths(n):
    return np.random.default_rng(0).integers(4, 33, size=n)

@pytest.mark.parametrize("n, size, bucket", [(1000, 16, 10), (1000, 16, 1), (37, 8, 3)])
def test_every_epoch_takes_each_sentence_once_in_an_order_of_its_own(n, size, bucket):
    seeds = [(0, 0), (0, 1), (0, 2), (1, 0)]  # (seed, epoch)
    orders = [S.epoch_order(some_lengths(n), size, bucket, seed) for seed in seeds]
    for order, seed in zip(orders, seeds):
        assert order.shape == (n // size, size) and {*order.flatten()} < {*range(n)}
        assert len(np.unique(order)) == order.size
        assert np.array_equal(order, S.epoch_order(some_lengths(n), size, bucket, seed))
    assert not any(map(np.array_equal, orders, orders[1:] + orders[:1]))
    assert len({frozenset(order.flatten()) for order in orders}) > 1  # others are left out

def test_a_bucket_is_sorted_by_length_and_its_batches_come_in_any_order():
    """So little of a batch is padding; bucket 1: batches that know nothing of the lengths."""
    lengths, same = some_lengths(1000), np.full(1000, 9)
    order, plain = (S.epoch_order(lengths, 16, bucket, (0, 0)) for bucket in (10, 1))
    assert [set(x) for x in plain] == [set(x) for x in S.epoch_order(same, 16, 1, (0, 0))]
    shares = [lengths[o].sum() / (lengths[o].max(1) * 16).sum() for o in (order, plain)]
    assert shares[0] > 0.88 and shares[1] < 0.65
    for start in range(0, len(order), 10):
        batches = [sorted(lengths[batch]) for batch in order[start:start + 10]]
        assert sum(sorted(batches), []) == sorted(sum(batches, []))
        assert len(batches) < 5 or batches not in (sorted(batches), sorted(batches)[::-1])

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

@pytest.mark.parametrize("preset, published", [
    ("paper", dict(batch_size=64, lr=3e-5, epochs=1, temperature=0.05, max_length=32, layer="8",
                   rate=0.125, stop_grad=True, mlm=False, bucket=1, warmup=0, eval_every=125,
                   select="dev", pooler=None)),
    ("sts-b", dict(objective="supervised", lr=1e-4, batch_size=64, select="dev", warmup=0,
                   layer="none", mlm=False))])
def test_presets_take_the_published_constants_and_a_flag_beside_them_wins(preset, published):
    for words, other in (("", {}), ("--mlm --layer 6 --lr 0.1", dict(mlm=True, layer="6", lr=0.1))):
        a = vars(one_run("--preset", preset, words))
        assert {k: a[k] for k in published} == {**published, **other}

# ==== the grammar, tokens, encoding ====

ROWS_OF_WORDS = [row.split(" / ") for row in (S.SCENES + S.TIMES).split("\n")]
SLOTS = [*zip(*ROWS_OF_WORDS[:16]), sum(ROWS_OF_WORDS[16:], [])]  # who, did, what, where, when
CONCEPTS = [{w: c for c, words in enumerate(slot) for w in words.split(",")} for slot in SLOTS]

def concepts(sentence):
    """What a sentence says, read off its words: (who, did, what, where, when), each once."""
    found = [{slot[w] for w in re.findall(rf"\b({'|'.join(slot)})e?\b", sentence)}
             for slot in CONCEPTS]
    assert [len(f) for f in found] == [1] * 5, (sentence, found)
    return tuple(f.pop() for f in found)

def test_unseen_meanings_are_never_trained_on_and_scores_count_shared_concepts():
    """(who, did, what) of the test pairs occur in no sentence of training, dev or train pairs, but
    any two of them do. No word stands for two concepts."""
    words = [w for slot in CONCEPTS for w in slot]
    assert len({w + e for w in words for e in ("", "e")}) == 2 * (16 * 4 * 3 + 8 * 3)
    g = S.Grammar()
    seen, unseen = ({tuple(m[:3]) for m in meanings} for meanings in (g.seen, g.unseen))
    assert seen and unseen and not seen & unseen
    assert 0.15 < len(g.unseen) / (len(g.seen) + len(g.unseen)) < 0.35
    sentences = g.sentences(2000)
    assert len({*sentences}) > 0.98 * 2000 and {concepts(s)[:3] for s in sentences} <= seen
    assert {c for s in sentences for c in enumerate(concepts(s))} == {
        (slot, c) for slot, n in enumerate((16, 16, 16, 16, 8)) for c in range(n)}
    for i in (0, 1):
        assert {m[i:i + 2] for m in unseen} <= {m[i:i + 2] for m in seen}
    for pool, part, names in ((g.unseen, 1, unseen), (g.seen, 2, seen)):
        first, second, scores = g.pairs(300, pool, part)
        assert np.unique(scores, return_counts=True)[1].tolist() == [50] * 6
        for u, v, score in zip(first, second, scores):
            assert sum(x == y for x, y in zip(concepts(u), concepts(v))) == score, (u, v)
            assert {concepts(u)[:3], concepts(v)[:3]} <= names
        assert sum(u == v for u, v in zip(first, second)) < 5  # paraphrases, not copies
    assert g.sentences(50) == S.Grammar().sentences(50)
    assert g.pairs(30, g.unseen, 1)[0] != g.pairs(30, g.unseen, 3)[0]

def test_the_learned_vocabulary_is_always_the_same_and_covers_chinese():
    """Rust's maps come in another order in every call. Of 3,000 characters none is unknown."""
    first, second = (S.learn_tokenizer(S.Grammar().sentences(500), 400) for _ in range(2))
    assert first.get_vocab() == second.get_vocab() and len(first) > 200
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

@pytest.fixture(scope="module")
def drawn_sts(tmp_path_factory):
    """The seven tasks in SentEval's layout, of the grammar's pairs: 12 a subset, one of them
    without a score, 24 of STS-B and of SICK-R. Those of score 3 are twins."""
    folder, g, part = tmp_path_factory.mktemp("drawn"), S.Grammar(), itertools.count(10)

    def write(file, n, line, head=""):
        rows = enumerate(zip(*g.pairs(n, g.unseen, next(part))))
        rows = [line.format(i, a, a if s == 3 else b, s) for i, (a, b, s) in rows]
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(head + "".join(rows))
    for year, names in S.YEARS.items():
        for name in names.split():
            file = f"STS/STS{year}-en-test/STS.input.{name}.txt"
            write(file, 12, "{1}\t{2}\n")
            golds = ["\n", *(f"{i % 6}\n" for i in range(1, 12))]
            (folder / file.replace("input", "gs")).write_text("".join(golds))
    for split in ("train", "dev", "test"):
        write(f"STS/STSBenchmark/sts-{split}.csv", 24, "main\tnews\t2012\t{0}\t{3}\t{1}\t{2}\n")
    write("SICK/SICK_test_annotated.txt", 24, "{0}\t{1}\t{2}\t{3}\tNEUTRAL\n",
          "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n")
    return folder

@pytest.fixture(scope="module")
def real_sts(tmp_path_factory):
    """The real STS files; skips where they are missing."""
    if not (SHARED / "unpack.py").exists():
        pytest.skip("no ../shared/data: real data is not here")
    to = tmp_path_factory.mktemp("real")
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

@pytest.mark.parametrize("kind, counts", [
    ("drawn_sts", [55, 33, 66, 55, 55, 24, 24, 24, 24]),
    ("real_sts", [3108, 1500, 3750, 3000, 1186, 1379, 4927, 1500, 5749])])
def test_sts_files_and_scores_are_those_of_a_plain_evaluation(kind, counts, request):
    """Counts and pairs as published; on the same embeddings the scores to 1e-6 (x 100), ties
    included. No dropout and no truncation in them."""
    folder = request.getfixturevalue(kind)
    pairs = S.load_pairs(one_run("--sts-dir", folder))
    assert {k: len(v[2]) for k, v in pairs.items()} == dict(zip([*TASKS, "dev", "train"], counts))
    plain = plain_tasks(folder)
    assert all(sorted(zip(*pairs[name])) == sorted(rows) for name, rows in plain.items())
    tokenizer = S.learn_tokenizer(pairs["dev"][0], 1500)
    net = roughen(S.build(one_run("--depth 1 --layer none"), tokenizer))
    del pairs["train"]
    sentences = [s for first, second, _ in pairs.values() for s in first + second]
    embeddings = dict(zip(sentences, S.encode(net, tokenizer, sentences).double().numpy()))
    result = S.measure(net, S.SimpleNamespace(tokenizer=tokenizer, pairs=pairs))
    scores = []
    for name, rows in plain.items():
        cosines, golds = [], [gold for *_, gold in rows]
        for first, second, _ in rows:
            u, v = embeddings[first], embeddings[second]
            cosines.append(round(u @ v / math.sqrt((u @ u) * (v @ v)), 12))  # twins tie
        assert len({*golds}) <= len(golds) / 4 and len({*cosines}) < len(cosines)  # many ties
        scores.append(100 * slow_spearman(cosines, golds))
        assert result[name] == pytest.approx(scores[-1], abs=1e-6) and 0 < abs(scores[-1]) < 95
    assert result["sts"] == pytest.approx(sum(scores) / 7, abs=1e-6)
    u, v = (torch.tensor(np.stack([embeddings[s] for s in half])) for half in pairs["dev"][:2])
    u, v, alike = F.normalize(u), F.normalize(v), torch.tensor(pairs["dev"][2] > 4)
    expected = {"alignment_dev": S.alignment(u[alike], v[alike]).item(),
                "uniformity_dev": S.uniformity(torch.cat([u, v])).item()}
    assert {k: result[k] for k in expected} == pytest.approx(expected, rel=1e-4, abs=1e-9)

# ==== whole runs ====

def flags(texts, *more):
    """Eight steps on the 128 sentences or pairs. Texts in `more` are split, paths are not."""
    more = ("--depth 2 --vocab-size 300 --batch-size 16 --layer 2 --eval-every 2 --device cpu "
            "--stop-grad --mlm --lr 0.01", *more)
    words = [w for m in more for w in (m.split() if isinstance(m, str) else [str(m)])]
    train = [] if "supervised" in words else ["--train-file", str(texts / "text.txt")]
    return [*train, "--sts-dir", str(texts / "sts"), *words]

@pytest.fixture(scope="module")
def done(texts, tmp_path_factory):
    """A finished run; tests change nothing in its folder."""
    out = tmp_path_factory.mktemp("done") / "run"
    S.main(flags(texts, "--select dev --out", out))
    return out

@pytest.fixture
def live(done):
    """Its network in eval mode."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(done / "tokenizer")
    return S.build(one_run("--depth 2 --layer 2 --device cpu --init", done), tokenizer).eval()

def test_the_run_folder_holds_what_the_design_says(done):
    assert {p.name for p in done.iterdir()} == {
        "config.json", "metrics.csv", "checkpoint.pt", "encoder.pt", "weights.safetensors", "model",
        "tokenizer", "report.json", "curves.png", "cka.png", "compare.png"}
    assert all(picture.stat().st_size > 5000 for picture in done.glob("*.png"))
    report, config = report_of(done), json.loads((done / "config.json").read_text())
    assert {"sts", "sts_untrained", "dev", "seconds", "sentences_per_second", "alignment_dev",
            "uniformity_dev", "STS-B"} <= {*report}
    assert report["steps"] == 8 and report["export_difference"] < 1e-4 and report["targets"] == [2]
    assert config["torch"] == torch.__version__ and config["layer"] == "2"
    rows = list(csv.DictReader((done / "metrics.csv").read_text().splitlines()))
    assert [int(r["step"]) for r in rows] == [*range(1, 9)] and float(rows[0]["mlm"]) > 4

def test_select_dev_keeps_the_best_weights_and_training_goes_on_from_them(texts, done, tmp_path):
    report, state = report_of(done), state_of(done)
    assert [p["step"] for p in state["probes"]] == [0, 2, 4, 6, 8]
    best = max(state["probes"], key=lambda p: p["dev"])
    assert 0 < best["step"] < 8 and report["dev"] == best["dev"]
    weights = load_file(done / "weights.safetensors")
    assert all(torch.equal(w, state["best"][f"lm.{k}"]) for k, w in weights.items())
    again = S.main(flags(texts, "--out", tmp_path / "run", "--init", done))
    assert again["sts_untrained"] == report["sts"] != again["sts"]

@pytest.mark.parametrize("text", [
    "", "--layer none", "--layer 3", "--layer all", "--no-stop-grad", "--rate 0.1", "--sample 1",
    "--transform channel", "--transform pca", "--no-mlm", "--seed 3", "--dropout 0", "--lr 0.02",
    "--temperature 0.5", "--bucket 1", "--warmup 0.5", "--max-length 10", "--epochs 2"])
def test_every_experiment_changes_the_result_and_scoring_does_not(texts, done, tmp_path, text):
    words = flags(texts, text, "--out", tmp_path / "run")
    del words[2:4]  # no --sts-dir
    report = S.main(words)
    assert "sts" not in report and report["steps"] == (16 if "epochs" in text else 8)
    equal = same_bits(state_of(tmp_path / "run")["model"], state_of(done)["model"])
    assert equal == (text == "")
    encoder = torch.jit.load(tmp_path / "run/encoder.pt")
    assert encoder(*some_tokens()).isfinite().all()

def test_several_values_make_runs_and_compare_pools_the_seeds(texts, tmp_path, capsys):
    out = tmp_path / "runs"
    words = flags(texts, "--layer none 1+2 --seed 0 1 --no-mlm --eval-every 0 --out", out)
    table, said = S.main(words), capsys.readouterr().out
    assert [*table] == ["before", "layer none", "layer 1+2"]
    for name in ("none", "1+2"):
        values = [report_of(out / f"layer-{name}-seed-{s}")["sts"] for s in (0, 1)]
        found = table[f"layer {name}"]["sts"]
        assert found == pytest.approx((np.mean(values), np.std(values, ddof=1)))
        assert "%.2f ± %.2f" % found in said
    (out / "layer-none-seed-1/report.json").write_text("{")
    again = S.main(["--compare", str(out)])
    assert again["layer none"]["sts"][1] == 0 and "left out" in capsys.readouterr().out
    assert again["layer 1+2"] == table["layer 1+2"]
    assert S.main([*words, "--resume"])["layer none"] == table["layer none"]

# ==== a step, and two processes ====

def prepared(words, texts):
    """The settings, data and network of six steps without dropout."""
    a = one_run("--depth 2 --vocab-size 300 --dropout 0 --layer 1 --rate 0 --stop-grad --sample 1 "
                "--batch-size 20 --lr 0.3 --device cpu --train-file", texts / "text.txt", words)
    if a.objective == "supervised":
        a.train_file, a.sts_dir = None, texts / "sts"
    data = S.load_data(a)
    return a, data, S.build(a, data.tokenizer)

def trained(words, texts, out):
    """Its losses and weights afterwards."""
    a, data, net = prepared(words, texts)
    out.mkdir(exist_ok=True)
    state = S.train(a, net, data, out, {}, lambda tests: {}, None)
    losses = [row[k] for row in state["log"] for k in ("loss", "mlm") if k in row]
    return losses, net.state_dict()

def assert_alike(run, other):
    assert run[0] == pytest.approx(other[0], rel=1e-4)
    for k, v in other[1].items():
        torch.testing.assert_close(run[1][k], v, rtol=1e-3, atol=2e-5)

def plain_descent(weights, lr, fused):
    """In place of Adam, which makes large steps of the rounding in gradients near 0."""
    return torch.optim.SGD(weights, lr)

KINDS = {"simcse": "--pooler cls", "supervised": "--objective supervised", "mlm": "--mlm"}

def unmasked(ids, special, mask_id, vocab):
    """A masking that is a function of the sentences, not of the random state."""
    chosen = (ids % 5 == 0) & (ids > 4)
    index = chosen.flatten().nonzero()[:, 0]
    return torch.where(chosen, mask_id, ids), index, ids.flatten()[index]

@pytest.mark.parametrize("words", [*KINDS.values(), "--mlm --compile"])
def test_a_step_descends_the_clipped_gradient_of_the_loss(words, texts, tmp_path, monkeypatch):
    """Of Eq. 1, also with a tenth of BERT's own loss; of the pairs' squared errors. Compiled as on
    CUDA, but without the minute that a C++ compiler takes."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: compiled(
        model, backend="aot_eager", dynamic=dynamic))
    monkeypatch.setattr(S, "mask_tokens", unmasked)
    monkeypatch.setattr(torch.optim, "Adam", plain_descent)
    words += " --layer none --warmup 0 --batch-size 128"  # all there is
    _, data, net = prepared(words, texts)
    ids, mask = data.tokens.long(), (data.tokens > 0).long()
    z = net.train()(ids, mask)
    loss = S.simcse_loss(z, z, 0.05)
    if "supervised" in words:
        loss = (net.relatedness(*z.chunk(2)) - data.scores).square().mean()
    elif "mlm" in words:
        masked, index, targets = unmasked(ids, None, data.tokenizer.mask_token_id, None)
        states = net.states(masked, mask)[-1].flatten(0, 1)[index]
        loss = loss + 0.1 * F.cross_entropy(net.mlm_logits(states), targets)
    loss.backward()
    used = {k: p for k, p in net.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(p.grad.square().sum() for p in used.values()))
    _, weights = trained(words, texts, tmp_path)
    for k, p in used.items():
        expected = p - 0.3 * p.grad / max(1, norm)
        torch.testing.assert_close(weights[k], expected, rtol=1e-3, atol=2e-5)

def one_of_two(rank, texts, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    S.mask_tokens, torch.optim.Adam = unmasked, plain_descent
    for kind, words in KINDS.items():
        torch.save(trained(words, texts, folder / kind), folder / f"{kind}{rank}.pt")
    dist.destroy_process_group()

def test_two_processes_give_the_losses_and_weights_of_one(processes, texts, tmp_path, monkeypatch):
    """All rows are detached at layer 1; the masked tokens are shared unevenly."""
    monkeypatch.setattr(S, "mask_tokens", unmasked)
    monkeypatch.setattr(torch.optim, "Adam", plain_descent)
    children = [processes(target=one_of_two, args=(rank, texts, tmp_path)) for rank in (0, 1)]
    for child in children:
        child.start()
    one = {kind: trained(words, texts, tmp_path / "one") for kind, words in KINDS.items()}
    [child.join(120) for child in children]
    for kind, rank in itertools.product(KINDS, (0, 1)):
        assert_alike(torch.load(tmp_path / f"{kind}{rank}.pt", weights_only=True), one[kind])

# ==== export ====

def test_encoder_needs_torch_alone_and_equals_the_live_network_gradients_too(done, live, tmp_path):
    """A process that knows nothing of the script loads it: at other batch sizes and lengths, with
    padding on either side, in float64, fine-tuned."""
    inputs = [some_tokens(*size) for size in ((1, 3), (7, 3), (7, 32), (1, 512))]
    inputs += [to_the_left(*x) for x in inputs]
    torch.save(inputs, tmp_path / "in.pt")
    code = ("import sys, torch; m = torch.jit.load(sys.argv[1]); torch.set_grad_enabled(False)\n"
            "out = [[m(*x), m(*x), m.activations(*x)] for x in torch.load('in.pt')]\n"
            "torch.save(out, 'out.pt')")
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", code, done / "encoder.pt"],
                   cwd=tmp_path, check=True)
    for (ids, mask), (y, again, acts) in zip(inputs, torch.load(tmp_path / "out.pt")):
        assert torch.equal(y, again), "two calls differ: dropout is in the export"
        with torch.no_grad():
            expected = [live(ids, mask), *live.activations(ids, mask)]
        for ours, theirs in zip([y, *acts], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    extra, x = {"config.json": ""}, some_tokens(7, 12)
    encoder = torch.jit.load(done / "encoder.pt", _extra_files=extra).train()
    config = json.loads(extra["config.json"])
    assert config["layers"] == ["embeddings", "layer1", "layer2", "output"]
    assert (config["dim"], config["longest"], config["flags"]["pooler"]) == (32, 512, "mean")
    assert config["measurements"]["sts"] == report_of(done)["sts"]
    for net in (encoder, live):
        net(*x).square().sum().backward()
    got, expected = ({k: p.grad for k, p in net.named_parameters() if p.grad is not None}
                     for net in (encoder, live))
    assert got.keys() == expected.keys() and len(got) > 30
    for k, grad in got.items():
        bound = 1e-4 * float(grad.abs().max()) + 1e-6
        torch.testing.assert_close(grad, expected[k], rtol=1e-3, atol=bound)
    assert encoder.double()(*x).dtype == torch.float64

@pytest.mark.parametrize("how, dense, pooler", [
    ({"pooling_mode": "mean"}, False, "mean"), ({"pooling_mode": ["cls"]}, False, "cls"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, True, "cls-mlp"),
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, False, "mean"),
    (None, False, "cls"), ({"pooling_mode": "mean"}, True, None),
    ({"pooling_mode": "max"}, False, None),
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
    "--pooler cls", "--pooler cls-mlp --no-mlm", "--pooler mean --no-mlm --select dev",
    "--pooler cls-mlp --objective supervised --no-mlm"])
def test_every_pooler_gives_one_vector_in_all_files(texts, tmp_path, words, capsys):
    """encoder.pt, model/ through AutoModel and the sentence-transformers files; --eval-only of the
    folder or of --init pools alike, and a tokenizer that does not cut at the training's length."""
    out = tmp_path / "run"
    report = S.main(flags(texts, words, "--out", out))
    assert math.isfinite(report["sts"]) and (out / "model/2_Dense").exists() == ("mlp" in words)
    x = some_tokens(7, 20)
    with torch.no_grad():
        expected = torch.jit.load(out / "encoder.pt")(*x)
    theirs = as_the_files_say(out / "model", *x)
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)
    weights = load_file(out / "weights.safetensors")
    assert same_bits(weights, load_file(out / "model/model.safetensors"))
    assert any(k.startswith("bert.") for k in weights) == ("--no-mlm" not in words)
    supervised = "--objective supervised" if "supervised" in words else ""
    for source in [["--init", out], ["--model", out / "model"]][:1 if supervised else 2]:
        capsys.readouterr()
        scores = S.main(flags(texts, supervised, "--eval-only", *source))
        assert scores == pytest.approx({k: report[k] for k in scores}, abs=1e-4)
        assert "sts" in scores and words.split(" --")[0] + "\n" in capsys.readouterr().out
    for folder in ("tokenizer", "model"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(out / folder)
        assert len(tokenizer(" ".join(["the doctor"] * 100))["input_ids"]) > 200
        assert tokenizer.model_max_length == 512

def test_cls_mlp_reads_the_mlp_that_published_models_carry_as_their_pooler(
        texts, done, tmp_path, monkeypatch, refused):
    """Princeton's SimCSE models: pooler.dense. A folder without one is refused, for the scores
    would depend on the seed."""
    folder, words = tmp_path / "model", flags(texts, "--eval-only --pooler cls-mlp --model")
    base = transformers.AutoModel.from_pretrained(done / "model")
    with torch.no_grad():
        base.pooler.dense.weight.copy_(randn(32, 32))
        base.pooler.dense.bias.copy_(randn(32))
    base.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(done / "tokenizer").save_pretrained(folder)
    scores = [S.main([*words, str(folder), "--seed", seed]) for seed in "01"]
    assert scores[0] == scores[1] != S.main(flags(texts, "--eval-only --model", folder))
    monkeypatch.chdir(tmp_path)
    assert "carries no MLP" in refused([*words, done / "model"])

# ==== bad input ====

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
SPOILT = [  # a model's folder, its file, what is replaced there by what
    ("gpt2", "config.json", b': "bert"', b': "gpt2"'),
    ("deeper", "config.json", b'layers": 2', b'layers": 4'),
    ("lfs", "model.safetensors", b".+", POINTER),
    ("lfstokenizer", "tokenizer.json", b".+", POINTER),
    ("otherdense", "modules.json", b".+", b'[{"path": "2_Dense"}]')]

@pytest.fixture(scope="module")
def bad_things(texts, done, tmp_path_factory):
    """A folder of what people may have. run, sts and text.txt are good."""
    at = tmp_path_factory.mktemp("bad")
    for name, good in (("run", done), ("sts", texts / "sts"), ("text.txt", texts / "text.txt")):
        (at / name).symlink_to(good)
    shutil.copytree(texts / "sts", at / "nodev", ignore=lambda *_: ["sts-dev.csv"])
    (at / "empty").mkdir()
    (at / "empty.txt").write_text("\n \n")
    (at / "empty.csv").write_text("")
    (at / "latin.txt").write_bytes(b"good\n\ncaf\xe9\n")
    (at / "chinese.csv").write_text("a,b\n\u4e2d\u6587,x\n\u4e2d\u6587,y\n")
    for name, file, old, new in SPOILT:
        path = shutil.copytree(done / "model", at / name) / file
        path.write_bytes(re.sub(old, new, path.read_bytes(), flags=re.DOTALL))
    for name, files in (("noweights", "*.safetensors"), ("notokenizer", "*token*")):
        for file in shutil.copytree(done / "model", at / name).glob(files):
            file.unlink()
    folder = shutil.copytree(done / "model", at / "fewwords")
    S.learn_tokenizer(S.Grammar().sentences(300), 400).save_pretrained(folder)
    return at

@pytest.mark.parametrize("words, says", [
    ("--layer 4", "--layer 4 0 embeddings 3 output auto"), ("--layer 14 --depth 12", "13 output"),
    ("--layer auto", "auto --init"), ("--width 40", "--width 32"),
    ("--max-length 3", "--max-length"), ("--max-length 513", "--max-length 512"),
    ("--layer 3 --sample 1 --no-mlm", "nothing is left to train"),
    ("--layer 2 --sample 1 --no-mlm", "nothing is left to train"),
    ("--objective supervised --train-file text.txt", "not on a --train-file"),
    ("--eval-only", "--model --init"), ("--init nowhere", "nowhere"),
    ("--init run --width 64", "--init run --width"),
    ("--resume --out run --select dev --max-length 9", "sentences max_length was"),
    ("--resume --out run/model", "run/model --resume"),
    ("--train-file empty.txt", "no sentence"), ("--train-file empty.csv", "no sentence"),
    ("--train-file latin.txt", "latin.txt byte 9 UTF-8 iconv"), ("--train-file sts", "sts"),
    ("--train-file chinese.csv --column c", "--column c 'a', 'b'"),
    ("--train-file chinese.csv --batch-size 2 --layer none --model run/model", "unknown [UNK]"),
    ("--sts-dir empty", "--sts-dir empty"), ("--sts-dir nodev --select dev", "dev"),
    ("--sts-dir nodev --layer auto --init run", "dev"),
    ("--model nothing", "nothing"), ("--model gpt2", "gpt2 bert roberta"),
    ("--model noweights", "--model noweights"), ("--model lfs", "--model lfs"),
    ("--model deeper", "--model deeper lack"),
    ("--model notokenizer", "no tokenizer"), ("--model lfstokenizer", "no tokenizer"),
    ("--model fewwords", "fewwords"),
    ("--model otherdense --pooler cls-mlp --eval-only", "otherdense tanh"),
    ("--model run/model --eval-only --objective supervised", "--eval-only --init supervised")])
def test_bad_input_is_one_line_and_writes_nothing(refused, bad_things, monkeypatch, words, says):
    """Exit code 2, no new file, no change to what is there; refused() looks."""
    monkeypatch.chdir(bad_things)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it tries 46 s
    line = refused(flags(Path(), words))
    for part in says.split():
        assert part in line

STS_FILES = {
    "golds": "STS/STS13-en-test/STS.gs.FNWN.txt", "test": "STS/STSBenchmark/sts-test.csv",
    "pairs": "STS/STS13-en-test/STS.input.FNWN.txt", "sick": "SICK/SICK_test_annotated.txt"}

@pytest.mark.parametrize("file, change, says", [
    ("golds", lambda x: x[:-1], "gs.FNWN.txt 11 input.FNWN.txt 12"),
    ("golds", lambda x: [*x[:4], b"four\n", *x[5:]], "FNWN.txt line 5"),
    ("golds", lambda x: [b"nan\n", *x[1:]], "FNWN.txt line 1"),
    ("golds", lambda x: [b"\n"] * len(x), "no scored pair"),
    ("pairs", lambda x: [*x[:2], b"only one sentence\n", *x[3:]], "input.FNWN.txt line 3"),
    ("pairs", lambda x: [], "12 1"), ("pairs", lambda x: [b"caf\xe9", *x[1:]], "STS13 UTF-8"),
    ("test", lambda x: [*x[:6], x[6].replace(b"\t", b" "), *x[7:]], "sts-test.csv line 7"),
    ("sick", lambda x: [x[0], b"1\ta b\tc d\tinf\tNEUTRAL\n", *x[2:]], "annotated.txt line 2"),
    ("sick", lambda x: x[:1], "SICK_test_annotated.txt no scored pair")])
def test_sts_files_that_are_not_whole_are_named(drawn_sts, tmp_path, file, change, says):
    shutil.copytree(drawn_sts, tmp_path / "sts")
    path = tmp_path / "sts" / STS_FILES[file]
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(S.BadInput) as error:
        S.load_pairs(one_run("--sts-dir", tmp_path / "sts"))
    for part in says.split():
        assert part in str(error.value)

def test_missing_tasks_are_named_and_line_ends_do_not_matter(drawn_sts, tmp_path, capsys):
    before = S.load_pairs(one_run("--sts-dir", drawn_sts))
    folder = shutil.copytree(drawn_sts, tmp_path / "sts")
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
