"""Every formula of topk_rescue.py against a slow, plain form: values and gradients, and the edges of each."""
import copy
import math
from xml.etree import ElementTree

import pytest
import torch
import torchvision
from conftest import same_bits
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

import topk_rescue as S

CPU = torch.device("cpu")
PICTURES = S.draw_shapes(64, 0, "cpu")[0]
TINY = {"simclr": ["--projector", 32, 16], "mocov3": ["--projector", 32, 16],
        "dinov2": ["--projector", 32, 16, "--prototypes", 32, "--local-crops", 2]}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def flags(method="simclr", *words):
    return S.settings([str(w) for w in ["--method", method, *TINY[method], "--batch-size", 8, *words]])


def built(method="simclr", *words):
    """A Rescue in training mode, on pictures of 32 pixels."""
    return S.build(flags(method, *words), S.Split(None, 32, images=PICTURES), CPU).train()


def views(n=8, seed=0):
    return rand(n, 3, 32, 32, seed=seed), rand(n, 3, 32, 32, seed=seed + 1)


def unit(v):
    return v / v.square().sum().sqrt()


def close(got, expected, rtol=1e-4, floor=1e-5):
    """Equal up to float32: relative, and to the largest entry."""
    got, expected = torch.as_tensor(got).double(), torch.as_tensor(expected).double()
    torch.testing.assert_close(got, expected, rtol=rtol, atol=floor * max(expected.abs().max().item(), 1e-3))


def same_gradients(fast: nn.Module, slow: nn.Module, rtol=2e-3, floor=1e-3):
    """Of every parameter; `slow` is a float64 copy. Returns how many parameters had one."""
    count = 0
    for (name, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            close(p.grad, q.grad, rtol=rtol, floor=floor)
            count += 1
    return count


# --- SimCLR and MoCo v3 -----------------------------------------------------------------------------------------------

def slow_contrast(anchors, candidates, partner, itself, temperature):
    """Mean over the anchors of -log softmax of the partner, among all candidates but the anchor itself."""
    total = 0
    for i, z in enumerate(anchors):
        e = [(unit(z) @ unit(c) / temperature).exp() for c in candidates]
        total = total - (e[partner[i]] / sum(x for j, x in enumerate(e) if j != itself[i])).log()
    return total / len(anchors)


def test_simclr_is_nt_xent_of_both_views_in_one_pass():
    r = built()
    x, y = views()
    slow = copy.deepcopy(r.method).double()
    loss, z_a, z_b = r.method(x, y, None, 0.0)
    z = slow.online(torch.cat([x, y]).double())[1]                   # BatchNorm sees the 16 rows together
    close(torch.cat([z_a, z_b]), z)
    n = len(x)
    expected = slow_contrast(z, z, [*range(n, 2 * n), *range(n)], range(2 * n), 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert same_gradients(r.method, slow) == len(list(r.method.parameters()))
    assert z_a.requires_grad and z_b.requires_grad


@pytest.mark.parametrize("n, temperature", [(7, 0.2), (7, 1.0), (2, 0.5), (1, 0.2)])
def test_moco_loss_is_cross_entropy_times_2t_over_the_keys(n, temperature):
    """Query i picks key i among the n keys: n - 1 negatives, no other query among them; the keys get no gradient."""
    q, k = (3 * randn(n, 5, seed=s) for s in (0, 1))
    slow = q.double().requires_grad_()
    expected = 2 * temperature * slow_contrast(slow, k.double(), range(n), [-1] * n, temperature)
    expected.backward()
    q.requires_grad_()
    loss = S.moco_loss(q, k, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    close(q.grad, slow.grad)
    if n > 2:                                                        # rows pick among columns, not columns among rows
        assert abs(S.moco_loss(k, q.detach(), temperature).item() - loss.item()) > 1e-4


def test_moco_loss_takes_half_precision_in_float32():
    q, k = randn(6, 5).bfloat16(), randn(6, 5, seed=1).bfloat16()
    got = S.moco_loss(q, k, 0.2)
    assert got.dtype == torch.float32 and torch.equal(got, S.moco_loss(q.float(), k.float(), 0.2))


@pytest.mark.parametrize("arch", ["small", "vit-tiny"])
def test_mocov3_is_the_sum_of_both_directions_with_keys_of_the_target(arch):
    r = built("mocov3", "--arch", arch)
    m = r.method
    with torch.no_grad():                                            # a target unlike the online network
        for i, p in enumerate(m.target.parameters()):
            p.add_(0.05 * randn(*p.shape, seed=i))
    x, y = views()
    slow = copy.deepcopy(m).double()
    q_a, q_b = (slow.predictor(slow.online(v.double())[1]) for v in (x, y))                   # each view by itself
    with torch.no_grad():
        k_a, k_b = (slow.target(v.double())[1] for v in (x, y))
    expected = sum(2 * 0.2 * slow_contrast(q, k, range(8), [-1] * 8, 0.2) for q, k in ((q_a, k_b), (q_b, k_a)))
    loss, z_a, z_b = m(x, y, None, 0.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    close(z_a, k_a, rtol=1e-3, floor=1e-4)
    close(z_b, q_b, rtol=1e-3, floor=1e-4)
    assert not z_a.requires_grad and z_b.requires_grad
    loss.backward()
    expected.backward()
    assert same_gradients(m, slow, floor=5e-3) >= 15  # 8 rows of BatchNorm: rounding differs between CPUs
    assert not any(p.requires_grad or p.grad is not None for p in m.target.parameters())


def test_mocov3s_target_moves_by_its_parameters_only():
    m = built("mocov3", "--momentum", 0.9).method
    assert m.updates == "before"
    with torch.no_grad():
        for i, p in enumerate(m.online.parameters()):
            p.add_(0.1 * randn(*p.shape, seed=i))
    m.student(views()[0])
    online = {k: v.clone() for k, v in m.online.state_dict().items()}
    before = {k: v.clone() for k, v in m.target.state_dict().items()}
    names, differ = {n for n, _ in m.target.named_parameters()}, 0
    m.update_target(0.25)
    momentum = 1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2
    for name, now in m.target.state_dict().items():
        if name in names:
            close(now, momentum * before[name].double() + (1 - momentum) * online[name].double(), floor=1e-6)
            differ += not torch.equal(now, before[name])
        else:                                                        # BatchNorm's statistics
            assert torch.equal(now, before[name]), name
    assert differ == len(names) and same_bits(dict(m.online.state_dict()), online)
    m.anchor(views()[1])                                             # they come from the keys' own passes
    moved = [k for k in before if "running" in k and not torch.equal(m.target.state_dict()[k], before[k])]
    assert len(moved) == sum("running" in k for k in before) > 0
    assert all(torch.equal(m.online.state_dict()[k], v) for k, v in online.items())


@pytest.mark.parametrize("method", ["mocov3", "dinov2"])
def test_momentum_starts_at_its_flag_and_ends_at_one(method):
    m = built(method, "--momentum", 0.75).method
    with torch.no_grad():
        for p in [*m.online.parameters(), *(m.prototypes.parameters() if method == "dinov2" else [])]:
            p.fill_(4.0)
        mine = [*m.target.parameters(), *(m.target_prototypes.parameters() if method == "dinov2" else [])]
        for p in mine:
            p.fill_(8.0)
    m.update_target(0.0)
    assert all((p == 7).all() for p in mine)                         # .75 * 8 + .25 * 4
    m.update_target(1.0)
    assert all((p == 7).all() for p in mine)


def test_cosine_to_one():
    assert S.cosine_to_one(0.99, 0.0) == pytest.approx(0.99, abs=1e-15) and S.cosine_to_one(0.99, 1.0) == 1
    for p in (0.1, 0.5, 0.9):                                        # main_moco.py, adjust_moco_momentum
        assert S.cosine_to_one(0.99, p) == pytest.approx(1 - 0.5 * (1 + math.cos(math.pi * p)) * (1 - 0.99), abs=1e-15)
    assert S.cosine_to_one(1.0, 0.3) == 1 and S.cosine_to_one(0.0, 0.5) == pytest.approx(0.5)


def test_heads_are_those_of_the_published_codes():
    def shape(head):
        return [(type(m).__name__, *([*m.weight.shape[::-1]] if isinstance(m, nn.Linear) else [])) for m in head]

    norm, relu, gelu = ("BatchNorm1d",), ("ReLU",), ("GELU",)
    m = built().method
    assert shape(m.online.projector) == [("Linear", 128, 32), relu, ("Linear", 32, 16)]
    m = built("mocov3").method                                       # a ResNet: two layers, predictor ends in Linear
    assert shape(m.online.projector) == [("Linear", 128, 32), norm, relu, ("Linear", 32, 16), norm]
    assert shape(m.predictor) == [("Linear", 16, 32), norm, relu, ("Linear", 32, 16)]
    v = built("mocov3", "--arch", "vit-tiny").method                 # a ViT: three, predictor ends in BatchNorm
    assert shape(v.online.projector) == [("Linear", 64, 32), norm, relu, ("Linear", 32, 32), norm, relu,
                                         ("Linear", 32, 16), norm]
    assert shape(v.predictor) == [("Linear", 16, 32), norm, relu, ("Linear", 32, 16), norm]
    for head in (m.online.projector, v.online.projector, v.predictor):
        assert not head[-1].affine and head[1].affine and head[0].bias is None
    d = built("dinov2").method
    assert shape(d.online.projector) == [("Linear", 64, 32), gelu, ("Linear", 32, 32), gelu, ("Linear", 32, 16)]
    for linear in d.online.projector[::2]:
        assert 0.017 < linear.weight.std() < 0.023 and not linear.bias.any()
    assert tuple(d.prototypes.weight.shape) == (32, 16) and d.prototypes.bias is None
    close(d.prototypes.weight.norm(dim=1), torch.ones(32))           # weight-normed, of length 1 at the start


# --- DINOv2's parts ---------------------------------------------------------------------------------------------------

def test_cross_entropy_to_equals_loops():
    targets, logits = F.softmax(randn(3, 4, 5), -1), 2 * randn(3, 4, 5, seed=1)
    slow = logits.double().requires_grad_()
    expected = torch.stack([torch.stack([
        -sum(t * math.log(math.exp(x / 0.1) / sum(math.exp(y / 0.1) for y in row)) for t, x in zip(ts, row))
        for ts, row in zip(a, b)]) for a, b in zip(targets.double(), slow.tolist())])
    logits.requires_grad_()
    got = S.cross_entropy_to(targets, logits, 0.1)
    assert got.shape == (3, 4)
    close(got, expected)
    got.sum().backward()
    close(logits.grad, (F.softmax(slow.detach() / 0.1, -1) - targets.double()) / 0.1)         # (p - t) / T
    broadcast = S.cross_entropy_to(targets[0], logits, 0.1)          # one target for many crops
    assert torch.equal(broadcast[1], S.cross_entropy_to(targets[0], logits[1], 0.1))
    assert S.cross_entropy_to(targets, 1e4 * logits, 0.04).isfinite().all()
    assert S.cross_entropy_to(targets, logits.bfloat16(), 0.1).dtype == torch.float32


def slow_sinkhorn(logits, temperature, iterations=3):
    """dinov2 dino_clstoken_loss.py, entry by entry: q[k][i] for prototype k and row i."""
    n, k = len(logits), len(logits[0])
    top = max(map(max, logits))
    q = [[math.exp((logits[i][j] - top) / temperature) for i in range(n)] for j in range(k)]
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        q = [[x / sum(row) / k for x in row] for row in q]           # every prototype weighs 1/K
        sums = [sum(q[j][i] for j in range(k)) for i in range(n)]
        q = [[q[j][i] / sums[i] / n for i in range(n)] for j in range(k)]                     # every row 1/n
    return torch.tensor([[q[j][i] * n for j in range(k)] for i in range(n)], dtype=torch.float64)


@pytest.mark.parametrize("n, k, temperature", [(6, 4, 0.07), (3, 8, 0.3), (1, 5, 0.1), (5, 2, 0.04)])
def test_sinkhorn_knopp_equals_loops(n, k, temperature):
    logits = (0.3 * randn(n, k, seed=n)).requires_grad_()
    got = S.sinkhorn_knopp(logits, temperature)
    close(got, slow_sinkhorn(logits.tolist(), temperature))
    close(got.sum(1), torch.ones(n))
    assert not got.requires_grad


def test_sinkhorn_knopp_spreads_over_the_prototypes():
    """A prototype that wins every row by softmax gets about its share n/K; the order within a row's ties stays."""
    logits = 0.1 * randn(64, 8)
    logits[:, 3] += 0.3
    got = S.sinkhorn_knopp(logits, 0.1)
    close(got.sum(1), torch.ones(64))
    assert F.softmax(logits / 0.1, 1).sum(0)[3] > 30
    assert ((got.sum(0) - 8).abs() < 0.4).all()
    longer = S.sinkhorn_knopp(logits, 0.1, iterations=60)
    close(longer.sum(0), torch.full((8,), 8.0), rtol=1e-3)


def test_sinkhorn_knopp_of_large_logits_does_not_overflow():
    logits = 0.3 * randn(6, 4)
    for shift in (100, -100):                                        # exp(100 / .04) is far beyond float64
        close(S.sinkhorn_knopp(logits + shift, 0.04), slow_sinkhorn((logits + shift).tolist(), 0.04), rtol=1e-3)
    assert S.sinkhorn_knopp(logits.bfloat16(), 0.04).dtype == torch.float32


def test_sinkhorn_knopp_of_widely_spread_logits_stays_finite():
    """One row far below the others: its e^-125 is zero in float32, and 0 / 0 would be in every later loss."""
    logits = 0.1 * randn(6, 4)
    logits[0] -= 5
    got = S.sinkhorn_knopp(logits, 0.04)
    assert got.isfinite().all()
    close(got, slow_sinkhorn(logits.tolist(), 0.04), rtol=1e-3)


def test_teachers_targets_apply_the_centre_at_the_next_step():
    t = S.TeacherTargets(flags("dinov2", "--centering", "centering"))
    batches = [2 * randn(n, 32, seed=n) + 1 for n in (5, 9, 4)]
    centre = [0.0] * 32
    for logits in batches:
        expected = []
        for row in logits.tolist():
            e = [math.exp((x - c) / 0.5) for x, c in zip(row, centre)]
            expected.append([x / sum(e) for x in e])
        got = t(logits.requires_grad_(), 0.5)
        assert not got.requires_grad and not t.centre.requires_grad
        close(got, torch.tensor(expected, dtype=torch.float64))
        centre = [0.9 * c + 0.1 * sum(x) / len(x) for c, x in zip(centre, zip(*logits.tolist()))]
        close(t.centre[0], torch.tensor(centre, dtype=torch.float64))
    assert "centre" in t.state_dict()                                # goes on after --resume
    s = S.TeacherTargets(flags("dinov2", "--centering", "sinkhorn"))
    assert torch.equal(s(batches[0], 0.5), S.sinkhorn_knopp(batches[0], 0.5)) and not s.centre.any()


def slow_koleo(x):
    rows = [unit(v) for v in x]
    total = 0
    for i, v in enumerate(rows):
        j = max((j for j in range(len(rows)) if j != i), key=lambda j: (v @ rows[j]).item())
        total = total - ((v - rows[j]).square().sum().sqrt() + 1e-8).log()
    return total / len(rows)


@pytest.mark.parametrize("n, d", [(9, 4), (2, 6), (30, 3)])
def test_koleo_equals_loops(n, d):
    x = 3 * randn(n, d, seed=n)
    slow = x.double().requires_grad_()
    expected = slow_koleo(slow)
    expected.backward()
    x.requires_grad_()
    got = S.koleo(x)
    got.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    close(x.grad, slow.grad, rtol=1e-3, floor=1e-4)                  # through both ends: the neighbour is pushed too


def test_koleo_pushes_duplicates_apart_and_stays_finite():
    x = randn(6, 5)
    x[4] = x[1]
    x.requires_grad_()
    got = S.koleo(x)
    got.backward()
    assert got.isfinite() and got > S.koleo(randn(6, 5)) and x.grad.isfinite().all()
    assert S.koleo(torch.zeros(3, 4)).isfinite()
    near = randn(4, 5)
    near[1] = near[0] + 0.01 * randn(5, seed=9)
    near.requires_grad_()
    S.koleo(near).backward()
    moved = F.normalize((near - 1e-5 * near.grad).detach(), dim=1)
    start = F.normalize(near.detach(), dim=1)
    assert (moved[0] - moved[1]).norm() > (start[0] - start[1]).norm()
    assert S.koleo(near.bfloat16()).dtype == torch.float32


# --- masks ------------------------------------------------------------------------------------------------------------

def borders(mask):
    """Neighbouring patches of which one is masked; mask [n, side, side]."""
    return ((mask[:, 1:] != mask[:, :-1]).sum() + (mask[:, :, 1:] != mask[:, :, :-1]).sum()).item()


@pytest.mark.parametrize("side", [1, 2, 4, 7, 16])
def test_block_masks_have_exactly_the_asked_number(side):
    counts = torch.arange(200) % (side * side + 1)                   # from none to all
    mask = S.block_masks(counts, side)
    assert mask.shape == (200, side * side) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == counts.tolist()


@pytest.mark.parametrize("side, least", [(4, 0.8), (16, 0.35)])
def test_masks_are_mostly_blocks(side, least):
    """Their border is far shorter than that of as many patches strewn at random, and no side is preferred. (Corners
    are masked less often: fewer rectangles reach them, in the published masks too.)"""
    torch.manual_seed(0)
    mask, _, _ = S.draw_masks(400, side, CPU)
    mask = mask[mask.any(1)]
    counts = mask.sum(1, keepdim=True)
    strewn = torch.rand(mask.shape).argsort(1).argsort(1) < counts
    assert borders(mask.view(-1, side, side)) < least * borders(strewn.view(-1, side, side))
    share = (mask.float().mean(0) / mask.float().mean()).view(side, side)
    assert 0 < share.min() and share.max() < 2.5
    for half in (share[:side // 2], share[side // 2:], share[:, :side // 2], share[:, side // 2:]):
        assert 0.88 < half.mean() < 1.12
    wide = mask.view(-1, side, side).any(1).sum(1).float() / mask.view(-1, side, side).any(2).sum(1)
    assert 0.85 < (wide.log().mean().exp()) < 1.18                   # as often lying as standing


@pytest.mark.parametrize("side, crops", [(2, 2), (2, 16), (4, 16), (4, 6), (16, 40)])
def test_draw_masks_shares_places_and_weights(side, crops):
    for seed in range(5):
        torch.manual_seed(seed)
        mask, places, weights = S.draw_masks(crops, side, CPU)
        patches, counts = side * side, mask.sum(1).tolist()
        assert mask.shape == (crops, patches)
        masked = sorted(c for c in counts if c)
        assert len(masked) == crops // 2
        for i, c in enumerate(masked):                               # one in each of equal strata of .1 to .5
            low, high = (0.1 + 0.4 * j * 2 / crops for j in (i, i + 1))
            assert max(1, int(low * patches)) <= c <= max(1, int(high * patches + 1e-4))
        expected = [i for i, m in enumerate(mask.flatten().tolist()) if m]
        assert places.tolist() == expected
        assert weights.tolist() == pytest.approx([1 / counts[i // patches] for i in expected])
        assert weights.sum().item() == pytest.approx(crops // 2, rel=1e-5)


def test_which_crops_are_masked_is_drawn():
    torch.manual_seed(0)
    often = sum(S.draw_masks(8, 4, CPU)[0].any(1).float() for _ in range(200)) / 200
    assert 0.35 < often.min() and often.max() < 0.65


# --- the whole DINOv2 loss --------------------------------------------------------------------------------------------

def slow_prototypes(prototypes, z):
    """Weight-normed prototypes' logits of one row."""
    g, v = prototypes.parametrizations.weight.original0, prototypes.parametrizations.weight.original1
    return torch.stack([g[j, 0] * unit(v[j]) @ unit(z) for j in range(len(v))])


def slow_entropy(t, logits, temperature):
    e = (logits / temperature - (logits / temperature).max()).exp()
    return -(t * (e / e.sum()).log()).sum()


def slow_dinov2(m, crops, mask, local, temperature, how):
    """crops [2B, ...], first views then second; local [L * B, ...], crop by crop. Crops go through one by one."""
    n, b = len(crops), len(crops) // 2
    student = [m.online(x[None], k[None]) for x, k in zip(crops, mask)]
    with torch.no_grad():
        teacher = [m.target(x[None]) for x in crops]
        where = [(i, p) for i in range(n) for p in range(mask.shape[1]) if mask[i, p]]
        cls = torch.stack([slow_prototypes(m.target_prototypes, z[0]) for _, z, _ in teacher])
        patch = torch.stack([slow_prototypes(m.target_prototypes, m.target.projector(teacher[i][2][0, p]))
                             for i, p in where])
        if how == "sinkhorn":
            t_cls, t_patch = (slow_sinkhorn(x.tolist(), temperature) for x in (cls, patch))
        else:
            t_cls, t_patch = (F.softmax((x - c.centre) / temperature, 1)
                              for x, c in ((cls, m.cls_targets), (patch, m.patch_targets)))
    logits = [slow_prototypes(m.prototypes, z[0]) for _, z, _ in student]
    small = [] if local is None else [slow_prototypes(m.prototypes, m.online(x[None])[1][0]) for x in local]
    pairs, dino = 0, 0
    for picture in range(b):
        mine = [picture, b + picture]
        others = [("global", i) for i in mine] + [("local", i) for i in range(len(small)) if i % b == picture]
        for i in mine:
            for kind, j in others:
                if (kind, j) != ("global", i):                       # never a crop with itself
                    dino = dino + slow_entropy(t_cls[i], (logits if kind == "global" else small)[j], 0.1)
                    pairs += 1
    dino = dino / pairs
    ibot = 0
    for t, (i, p) in zip(t_patch, where):
        out = slow_prototypes(m.prototypes, m.online.projector(student[i][2][0, p]))
        ibot = ibot + slow_entropy(t, out, 0.1) / mask[i].sum() / n
    spread = sum(slow_koleo([student[i][0][0] for i in half]) for half in (range(b), range(b, n)))
    return dino + ibot + 0.1 * spread, cls, patch


def distinct_dinov2(*words):
    """A network whose teacher is another, with centres."""
    r = built("dinov2", *words)
    m = r.method
    with torch.no_grad():
        for i, p in enumerate([*m.target.parameters(), *m.target_prototypes.parameters()]):
            p.add_(0.1 * randn(*p.shape, seed=i))
        m.cls_targets.centre.copy_(0.1 * randn(1, 32))
        m.patch_targets.centre.copy_(0.1 * randn(1, 32, seed=1))
        m.prototypes.parametrizations.weight.original0.copy_(1 + 0.1 * rand(32, 1))
    return r


@pytest.mark.parametrize("how, crops, progress, temperature", [
    ("centering", 2, 0.15, 0.055), ("centering", 0, 0.0, 0.04), ("sinkhorn", 2, 0.8, 0.07)])
def test_dinov2_equals_a_loop_over_pairs_of_crops(monkeypatch, how, crops, progress, temperature):
    """Value, every parameter's gradient, z's and the next centre; T rises over .3 of the training, from .04 to .07."""
    r = distinct_dinov2("--centering", how, "--local-crops", crops)
    m, b = r.method, 4
    (x, y), local = views(b), rand(crops * b, 3, 16, 16, seed=5) if crops else None
    torch.manual_seed(3)
    masks = S.draw_masks(2 * b, 4, CPU)
    monkeypatch.setattr(S, "draw_masks", lambda *_: masks)
    slow = copy.deepcopy(m).double()
    expected, cls, patch = slow_dinov2(slow, torch.cat([x, y]).double(), masks[0],
                                       None if local is None else local.double(), temperature, how)
    before = [t.centre.double() for t in (m.cls_targets, m.patch_targets)]
    loss, z_a, z_b = m(x, y, local, progress)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert same_gradients(m, slow) == len([p for p in m.parameters() if p.requires_grad])
    for t, c, logits in zip((m.cls_targets, m.patch_targets), before, (cls, patch)):
        close(t.centre, 0.9 * c + 0.1 * logits.mean(0) if how == "centering" else c)
    with torch.no_grad():                                            # the first view's teacher, the second's student
        close(z_a, slow.target(x.double())[1], floor=1e-4)
        close(z_b, slow.online(y.double(), masks[0][b:])[1], floor=1e-4)
    assert not z_a.requires_grad and z_b.requires_grad


def test_the_teacher_sees_whole_crops_in_eval_mode_and_gets_no_gradient():
    r = built("dinov2", "--drop-path", 0.5)
    m, seen = r.method, []
    assert m.online.training and not any(x.training for x in m.target.modules())
    assert any(getattr(x, "drop_prob", 0) == 0.5 for x in m.target.modules())    # it would matter
    for net, name in ((m.online, "student"), (m.target, "teacher")):
        def spy(images, mask=None, rows=None, body=net.body, name=name, **rest):
            seen.append((name, len(images), images.shape[-1], None if mask is None else mask.sum().item() > 0))
            return body(images, mask, rows, **rest)
        net.body = spy
    loss, chosen, *_ = r(PICTURES[:8], 0.1)
    assert seen == [("teacher", 16, 32, None), ("student", 16, 32, True), ("student", 16, 16, None),
                    ("student", 1, 32, None)]                        # the last: the strong view of k = 1 picture
    assert chosen.tolist() == sorted(chosen.tolist()) and len(chosen) == 1
    loss.backward()
    frozen = [*m.target.parameters(), *m.target_prototypes.parameters()]
    assert frozen and not any(p.requires_grad or p.grad is not None for p in frozen)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)
    assert torch.equal(m.anchor(views()[0]), m.anchor(views()[0]))   # no stochastic depth
    r.eval()
    r.train()
    assert m.online.training and not m.target.training
    assert m.kept is m.target and m.updates == "after"


def test_dinov2s_teacher_follows_network_and_prototypes():
    m = distinct_dinov2("--momentum", 0.9).method
    centre = m.cls_targets.centre.clone()
    pairs = [*zip(m.target.parameters(), m.online.parameters(), strict=True),
             *zip(m.target_prototypes.parameters(), m.prototypes.parameters(), strict=True)]
    expected = [0.95 * t.double() + 0.05 * o.double() for t, o in pairs]
    m.update_target(0.5)                                             # half way from .9 to 1
    for (t, _), e in zip(pairs, expected):
        close(t, e, floor=1e-6)
    assert torch.equal(m.cls_targets.centre, centre)


def test_small_crops_are_small_shares_with_the_third_blur(monkeypatch):
    """local_crops: crop by crop, .05 of the picture up to --crop-min; blur and solarising are first, second, local."""
    asked, seen, real = [], [], S.crop_boxes
    monkeypatch.setattr(S, "crop_boxes", lambda n, h, w, scale, device: (
        asked.append((n, scale)), real(n, h, w, scale, device))[1])
    a = built("dinov2", "--blur", 1, 0.1, 0.5, "--solarize", 0, 0.2, "--crop-min", 0.4).a
    assert a.local_size == 16
    assert S.local_crops(PICTURES[:3], a).shape == (6, 3, 16, 16)
    S.common_view(PICTURES[:3], 32, a, 0)
    assert asked == [(6, (0.05, 0.4)), (3, (0.4, 1.0))]
    monkeypatch.setattr(S, "make_views", lambda x, size, *rest, **more: seen.append((x, rest, more)))
    for which in (0, 1):
        S.common_view(PICTURES[:3], 32, a, which)
    S.local_crops(PICTURES[:3], a)
    assert [rest[1:3] for _, rest, _ in seen] == [(1.0, 0.0), (0.1, 0.2), (0.5, 0.2)]
    assert torch.equal(seen[2][0], torch.cat([PICTURES[:3]] * 2))


# --- the rescue -------------------------------------------------------------------------------------------------------

def test_choose():
    s = torch.tensor([0.1, 0.9, -0.5, 0.8, 0.3, 0.95])
    assert S.choose(s, "topk", 3).tolist() == [1, 3, 5] and S.choose(s, "topk", 1).tolist() == [5]
    assert S.choose(s, "hardest", 2).tolist() == [0, 2] and S.choose(s, "hardest", 4).tolist() == [0, 2, 3, 4]
    assert S.choose(s, "all", 6).tolist() == list(range(6))
    for how in ("topk", "hardest", "random"):
        assert S.choose(s, how, 6).tolist() == list(range(6))
        tied = S.choose(torch.ones(6), how, 3).tolist()              # k different ones, ascending
        assert tied == sorted(set(tied)) and len(tied) == 3
    assert S.choose(torch.tensor([0.5, 0.9, 0.5, 0.9, 0.1]), "topk", 2).tolist() == [1, 3]
    torch.manual_seed(0)
    draws = [S.choose(s, "random", 2) for _ in range(600)]
    assert all(d[0] < d[1] for d in draws)
    often = torch.cat(draws).bincount(minlength=6) / 600             # whatever the similarity: a third each
    assert ((often - 1 / 3).abs() < 0.07).all()


def test_own_share_of_one_process_is_the_chosen_rows():
    x = randn(6, 2, 3)
    assert torch.equal(S.own_share(x, torch.tensor([1, 4, 5])), torch.stack([x[1], x[4], x[5]]))
    assert torch.equal(S.own_share(PICTURES, torch.tensor([7])), PICTURES[7:8])


class Given(nn.Module):
    """A base method with embeddings that the test gives: base loss = sum of z_a w + z_b w."""
    def __init__(self, z_a, z_b, w, z_s):
        super().__init__()
        self.z_a, self.z_b, self.w, self.z_s, self.asked = z_a, z_b, w, z_s, []

    def forward(self, view_a, view_b, local, progress):
        return ((self.z_a + 2 * self.z_b) * self.w).sum(), self.z_a, self.z_b

    def student(self, view, rows=None):
        self.asked.append((view, rows))
        return self.z_s


@pytest.mark.parametrize("how", ["topk", "hardest"])
def test_rescue_is_minus_s_times_the_mean_cosine_of_the_chosen(monkeypatch, how):
    """Equations 1 and 2, value and gradients: only the chosen rows of z_a get the term's, and z_s."""
    n, k, s = 8, 3, 0.7
    z_a, z_b, w, z_s = 2 * randn(n, 5), randn(n, 5, seed=1), randn(n, 5, seed=2), 3 * randn(k, 5, seed=3)
    slow = [z.double().requires_grad_() for z in (z_a, z_b, z_s)]
    cosine = [(unit(a) @ unit(b)).item() for a, b in zip(z_a, z_b)]
    chosen = sorted(sorted(range(n), key=lambda i: cosine[i] * (-1 if how == "topk" else 1))[:k])
    cos_s = [unit(slow[0][i]) @ unit(slow[2][j]) for j, i in enumerate(chosen)]
    base = ((slow[0] + 2 * slow[1]) * w.double()).sum()
    expected = base - s * sum(cos_s) / k
    expected.backward()
    given = Given(*(z.requires_grad_() for z in (z_a, z_b)), w, z_s.requires_grad_())
    strong = []
    monkeypatch.setattr(S, "strong_views", lambda images, size: (strong.append(images), images / 255)[1])
    r = S.Rescue(flags("simclr", "--k", k, "--s", s, "--rescue", how), given, 32)
    loss, got, out_a, out_b, similarity, measured = r(PICTURES[:n], 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and got.tolist() == chosen
    for z, e in zip((z_a, z_b, z_s), slow):
        close(z.grad, e.grad)
    rest = [i for i in range(n) if i not in chosen]
    assert torch.equal(z_a.grad[rest], w[rest]) and (z_a.grad[chosen] != w[chosen]).any(1).all()
    close(similarity, torch.tensor(cosine))
    close(measured, torch.tensor([base.item(), sum(cosine) / n, sum(cosine[i] for i in chosen) / k,
                                  sum(cos_s).item() / k]))
    assert not any(t.requires_grad for t in (out_a, out_b, similarity, measured))
    assert torch.equal(out_a, z_a) and torch.equal(out_b, z_b)
    assert len(strong) == 1 and torch.equal(strong[0], PICTURES[chosen])
    assert torch.equal(given.asked[0][0], PICTURES[chosen] / 255) and given.asked[0][1] is None


def one_step(method, *words, seed=5):
    r = built(method, *words)
    torch.manual_seed(seed)
    loss, chosen, *_, measured = r(PICTURES[:8], 0.2)
    loss.backward()
    return r, loss.detach(), chosen, measured, {n: p.grad for n, p in r.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["simclr", "mocov3", "dinov2"])
def test_k_zero_is_the_base_method_and_k_n_is_all_to_the_bit(method):
    r, loss, chosen, measured, gradients = one_step(method, "--k", 0)
    assert chosen is None and measured[0] == loss and measured[2:].isnan().all()
    state = {k: v.clone() for k, v in r.state_dict().items()}
    base = built(method, "--rescue", "none")                         # by hand: two views, small crops, the method
    torch.manual_seed(5)
    x, y = (S.common_view(PICTURES[:8], 32, base.a, i) for i in (0, 1))
    local = S.local_crops(PICTURES[:8], base.a) if method == "dinov2" else None
    expected = base.method(x, y, local, 0.2)[0]
    expected.backward()
    assert torch.equal(loss, expected.detach()) and same_bits(dict(base.state_dict()), state)
    assert same_bits({n: p.grad for n, p in base.named_parameters() if p.grad is not None}, gradients)
    zero = one_step(method, "--k", 3, "--s", 0)                      # a weight of nothing changes nothing either
    assert torch.equal(zero[1], loss) and same_bits(zero[4], gradients) and len(zero[2]) == 3
    assert same_bits(dict(zero[0].state_dict()), state)              # BatchNorm's statistics among them

    every, all_ = one_step(method, "--k", 8), one_step(method, "--rescue", "all")
    assert every[2].tolist() == all_[2].tolist() == list(range(8))
    assert torch.equal(every[1], all_[1]) and same_bits(every[4], all_[4]) and same_bits(every[3], all_[3])
    assert not same_bits(every[4], gradients)
    s = every[0].a.s
    assert every[1].item() == pytest.approx((every[3][0] - s * every[3][3]).item(), rel=1e-6)
    assert torch.equal(every[3][0], loss)


@pytest.mark.parametrize("method, through", [("simclr", True), ("mocov3", False), ("dinov2", False)])
def test_which_side_gets_the_terms_gradient(method, through):
    """All but the rescue term is taken away: simclr's z_a gets it on the chosen rows, a target network's never."""
    r, seen = built(method, "--k", 2), {}
    real = r.method.forward

    def forward(*rest):
        loss, z_a, z_b = real(*rest)
        seen["z_a"] = z_a.detach().requires_grad_(z_a.requires_grad)
        return loss.detach() * 0, seen["z_a"], z_b

    r.method.forward = forward
    loss, chosen, *_ = r(PICTURES[:8], 0.2)
    loss.backward()
    assert seen["z_a"].requires_grad == through
    if through:
        assert seen["z_a"].grad.any(1).nonzero()[:, 0].tolist() == chosen.tolist()
    got = {n.split(".")[0] for n, p in r.method.named_parameters() if p.grad is not None and p.grad.any()}
    assert got == {"simclr": {"online"}, "mocov3": {"online", "predictor"}, "dinov2": {"online"}}[method]


@pytest.mark.parametrize("method", ["simclr", "mocov3"])
def test_strong_views_pass_by_running_statistics(monkeypatch, method):
    """One row is enough, its z does not depend on the others, buffers stay, and training mode comes back."""
    r = built(method, "--k", 1)
    r(PICTURES[8:16], 0.0)                                           # statistics other than 0 and 1
    before, passes, student = {}, [], r.method.student

    def spy(view, rows=None):
        before.update({k: v.clone() for k, v in r.method.state_dict().items()})
        passes.append((view, student(view, rows)))
        return passes[-1][1]

    r.method.student = spy
    loss, chosen, *_ = r(PICTURES[:8], 0.0)
    loss.backward()
    assert len(chosen) == 1 and loss.isfinite()
    assert same_bits(dict(r.method.state_dict()), before) and all(m.training for m in r.modules())
    view, z = passes[-1]
    assert view.shape == (1, 3, 32, 32)
    r.eval()
    with torch.no_grad():
        close(student(torch.cat([view, rand(3, 3, 32, 32)]))[:1], z)
    with S.running_statistics(r):
        pass
    assert not any(m.training for m in r.modules())                  # nothing is switched on that was off


@pytest.mark.parametrize("method, layer, below", [
    ("simclr", 2, ["backbone.conv1.", "backbone.bn1.", "layer1.", "layer2."]), ("mocov3", 6, ["backbone", "projector"]),
    ("dinov2", 1, ["embeddings", "layer.0."])])
def test_deep_augmentation_of_the_strong_rows(method, layer, below):
    """The strong view is the second one again; with stop-gradient the layers up to `layer` get nothing from it."""
    for stop in (True, False):
        words = ["--layer", layer, "--k", 3, "--stop-grad" if stop else "--no-stop-grad"]
        r = built(method, "--strong", "deepaug", *words)
        real, student, asked = r.method.forward, r.method.student, []

        def forward(view_a, view_b, *rest, real=real, asked=asked):
            loss, z_a, z_b = real(view_a, view_b, *rest)
            asked[:] = [view_b]                                      # what came before was the base method's own
            return loss.detach() * 0, z_a.detach(), z_b

        def spy(view, rows=None, student=student, asked=asked):
            asked.append((view, rows))
            return student(view, rows)

        r.method.forward, r.method.student = forward, spy
        loss, chosen, *_ = r(PICTURES[:8], 0.0)
        loss.backward()
        view_b, (view, rows) = asked
        assert torch.equal(view, view_b[chosen]) and rows.tolist() == [True] * 3
        grads = {n: p.grad is not None and bool(p.grad.any()) for n, p in r.method.named_parameters()
                 if p.requires_grad and "mask_token" not in n and not n.startswith("prototypes")}
        lower = {n for n in grads if any(part in n for part in below)}
        assert lower and len(lower) < len(grads)
        assert all(grads[n] for n in grads if n not in lower)
        assert not any(grads[n] for n in lower) if stop else all(grads[n] for n in lower)


def test_share_and_rate_of_the_strong_rows():
    """--sample: the share of rows that Deep Augmentation changes; the base method's passes have none of it."""
    r = built("simclr", "--strong", "deepaug", "--layer", 6, "--rate", 0.75, "--sample", 0.25, "--rescue", "all",
              "--batch-size", 64)
    asked, student = [], r.method.student

    def spy(view, rows=None):
        asked.append((view, rows, student(view, rows)))
        return asked[-1][2]

    r.method.student = spy
    r(PICTURES, 0.0)
    (base, none, _), (view, rows, z) = asked
    assert none is None and len(base) == 128 and rows.dtype == torch.bool and 6 <= rows.sum() <= 28
    r.eval()
    clean = student(view)
    zeros = z == 0
    assert not zeros[~rows].any() and 0.6 < zeros[rows].float().mean() < 0.9
    close(z[~rows], clean[~rows])
    close(z[rows][~zeros[rows]], 4 * clean[rows][~zeros[rows]])      # inverted dropout: 1 / (1 - .75)


# --- strong views -----------------------------------------------------------------------------------------------------

def affine(*six):
    return lambda p: p.transform(p.size, Image.AFFINE, six)


# name: (published range, PIL's operation at strength v and width n, largest difference, share of pixels beyond it).
# Enhancers round otherwise; of a nearest neighbour at exact halves either is right.
PUBLISHED = {
    "AutoContrast": ((0, 0), lambda p, v, n: ImageOps.autocontrast(p), 1, 0),
    "Brightness": ((0.05, 0.95), lambda p, v, n: ImageEnhance.Brightness(p).enhance(v), 1, 0),
    "Color": ((0.05, 0.95), lambda p, v, n: ImageEnhance.Color(p).enhance(v), 1, 0),
    "Contrast": ((0.05, 0.95), lambda p, v, n: ImageEnhance.Contrast(p).enhance(v), 1, 0),
    "Equalize": ((0, 0), lambda p, v, n: ImageOps.equalize(p), 0, 0),
    "Identity": ((0, 0), lambda p, v, n: p, 0, 0),
    "Posterize": ((4, 8), lambda p, v, n: ImageOps.posterize(p, int(v)), 0, 0),
    "Rotate": ((-30, 30), lambda p, v, n: p.rotate(v), 0, 0.02),
    "Sharpness": ((0.05, 0.95), lambda p, v, n: ImageEnhance.Sharpness(p).enhance(v), 1, 0),
    "ShearX": ((-0.3, 0.3), lambda p, v, n: affine(1, v, 0, 0, 1, 0)(p), 0, 0.005),
    "ShearY": ((-0.3, 0.3), lambda p, v, n: affine(1, 0, 0, v, 1, 0)(p), 0, 0.005),
    "Solarize": ((0, 256), lambda p, v, n: ImageOps.solarize(p, min(v, 255)), 0, 0),
    "TranslateX": ((-0.3, 0.3), lambda p, v, n: affine(1, 0, round(v * n), 0, 1, 0)(p), 0, 0),
    "TranslateY": ((-0.3, 0.3), lambda p, v, n: affine(1, 0, 0, 0, 1, round(v * n))(p), 0, 0)}


def test_the_table_of_operations_is_the_published_one():
    assert list(S.OPERATIONS) == sorted(PUBLISHED) and len(S.OPERATIONS) == 14
    for name, (low, high, _) in S.OPERATIONS.items():
        top = 9 if name == "Posterize" else PUBLISHED[name][0][1]    # int(v) of 4 .. 9: five numbers, equally often
        assert (low, high) == (PUBLISHED[name][0][0], top), name


@pytest.mark.parametrize("name", PUBLISHED)
def test_operation_equals_pils(name):
    (low, high), pil, largest, beyond = PUBLISHED[name]
    smooth = F.interpolate(rand(2, 3, 4, 4), size=45, mode="bicubic").clamp(0.02, 0.9)
    for picture in [*PICTURES[:3], *(smooth * 255).byte()]:          # 32 and 45 pixels a side
        n = picture.shape[-1]
        for t in (0.0, 0.13, 0.42, 0.5, 0.77, 1.0):
            v = low + (high - low) * t
            got = S.OPERATIONS[name][2](picture, v)
            assert got.dtype == torch.uint8 and got.shape == picture.shape
            expected = V.pil_to_tensor(pil(V.to_pil_image(picture), v, n))
            assert ((got.int() - expected.int()).abs() > largest).float().mean() <= beyond, v
    edges = S.OPERATIONS[name][2](torch.full((3, 8, 8), 77, dtype=torch.uint8), low)          # a constant picture
    assert edges.shape == (3, 8, 8)


def spied(monkeypatch, record):
    """All operations leave the picture alone and record (name, strength)."""
    spies = {name: (low, high, lambda x, v, name=name: (record.append((name, v)), x)[1])
             for name, (low, high, _) in S.OPERATIONS.items()}
    monkeypatch.setattr(S, "OPERATIONS", spies)


def test_strengths_and_operations_are_drawn_uniformly_two_with_probability_half(monkeypatch):
    record = []
    spied(monkeypatch, record)
    torch.manual_seed(0)
    n = 4000
    S.strong_views(torch.zeros(n, 3, 2, 2, dtype=torch.uint8), 2)
    assert abs(len(record) / n - 1) < 0.05                           # 2 * .5 a picture
    by_name = {name: torch.tensor([v for m, v in record if m == name]) for name in S.OPERATIONS}
    for name, values in by_name.items():
        (low, high), count = PUBLISHED[name][0], len(values)
        high = 9 if name == "Posterize" else high
        assert abs(count / len(record) - 1 / 14) < 0.02, name
        assert low <= values.min() and values.max() <= high
        if high > low:
            share = (values - low) / (high - low)
            assert share.min() < 0.03 and share.max() > 0.97 and abs(share.mean() - 0.5) < 0.07, name
            assert abs(share.std() - 12 ** -0.5) < 0.04, name
    bits = by_name["Posterize"].int()
    assert sorted(set(bits.tolist())) == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("size", [32, 33, 7])
def test_cutout_is_a_grey_square_of_half_the_side_around_a_uniform_centre(monkeypatch, size):
    """FixMatch's: centre uniform; starts at the border at the earliest, so it is cut only at the far ones."""
    spied(monkeypatch, [])
    torch.manual_seed(0)
    n, side = 3000, size // 2
    got = S.strong_views(torch.full((n, 3, size, size), 255, dtype=torch.uint8), size)
    assert got.dtype == torch.float32 and got.shape == (n, 3, size, size)
    cut = got != 1
    assert (got[cut] == torch.tensor(127 / 255)).all() and (cut.any(1) == cut.all(1)).all()
    rows, columns = cut[:, 0].any(2), cut[:, 0].any(1)               # [n, size]
    assert torch.equal(cut[:, 0], rows.unsqueeze(2) & columns.unsqueeze(1))                   # a rectangle
    expected = torch.zeros(size)                                     # how often a square starts at each place
    for step in range(1000 * size):                                  # of evenly spaced centres
        expected[int(max(0.0, (step + 0.5) / 1000 - side / 2))] += 1 / (1000 * size)
    for line in (rows, columns):
        start = line.int().argmax(1)
        assert torch.equal(line.sum(1), (size - start).clamp(max=side))
        stop = start + line.sum(1)
        assert all(line[i, start[i]:stop[i]].all() for i in range(0, n, 50))
        often = start.bincount(minlength=size) / n
        assert ((often - expected).abs() < 0.03).all() and (often[expected == 0] == 0).all()
    starts = torch.stack([rows.int().argmax(1), columns.int().argmax(1)]).float()
    assert abs(torch.corrcoef(starts)[0, 1]) < 0.08                  # both axes by themselves, each picture its own


def test_cutout_equals_pils_rectangle(monkeypatch):
    """The same square drawn by ImageDraw (whose corners are inclusive), around the centre that was drawn."""
    spied(monkeypatch, [])
    real, centres = torch.rand, []
    monkeypatch.setattr(torch, "rand", lambda *s, **k: (centres.append(real(*s, **k)), centres[-1])[1])
    torch.manual_seed(1)
    got = S.strong_views(PICTURES[:20], 32)
    y, x = next(c for c in centres if c.shape == (2, 20, 1))[..., 0] * 32
    for view, picture, cy, cx in zip(got, PICTURES, y.tolist(), x.tolist()):
        p = V.to_pil_image(picture)
        top, left = int(max(0, cy - 8)), int(max(0, cx - 8))
        ImageDraw.Draw(p).rectangle((left, top, left + 15, top + 15), (127, 127, 127))
        assert torch.equal((view * 255).round().byte(), V.pil_to_tensor(p))


def test_a_draw_without_operations_leaves_the_picture(monkeypatch):
    monkeypatch.setattr(S, "OPERATIONS", {k: v for k, v in S.OPERATIONS.items() if k == "Identity"})
    images = PICTURES[:16]
    torch.manual_seed(0)
    got, copy_ = S.strong_views(images, 32), images.clone()
    same = got == images / 255
    assert torch.equal(images, copy_) and 0.7 < same.float().mean() < 0.95
    assert (got[~same] == torch.tensor(127 / 255)).all()


def test_every_picture_has_draws_of_its_own_and_the_seed_decides():
    images = PICTURES[:1].repeat(40, 1, 1, 1)
    torch.manual_seed(0)
    got = S.strong_views(images, 32)
    assert len({v.numpy().tobytes() for v in got}) == 40
    torch.manual_seed(0)
    assert torch.equal(S.strong_views(images, 32), got)
    corners = {v[:, -1, 0].numpy().tobytes() for v in got}           # a cutout alone gives them one other value only
    assert len(corners) > 5 and got.min() >= 0 and got.max() <= 1


@pytest.mark.parametrize("height, width, size", [(45, 33, 32), (20, 31, 33), (32, 32, 17)])
def test_pictures_of_another_size_are_resized_and_cut_to_the_centre(monkeypatch, height, width, size):
    spied(monkeypatch, [])
    images = (F.interpolate(rand(3, 3, 5, 5), size=(height, width), mode="bilinear") * 255).byte()
    got = S.strong_views(images, size)
    assert got.shape == (3, 3, size, size)
    for view, picture in zip(got, images):                           # PIL: short side to size, then the middle
        p = V.to_pil_image(picture)
        w, h = (size, int(size * height / width)) if width < height else (int(size * width / height), size)
        left, top = round((w - size) / 2), round((h - size) / 2)
        expected = V.pil_to_tensor(p.resize((w, h), Image.BILINEAR).crop((left, top, left + size, top + size)))
        free = (view - 127 / 255).abs().amax(0) > 1e-3
        assert free.float().mean() > 0.6
        assert ((view * 255).round() - expected)[:, free].abs().max() <= 1


def test_strong_views_of_odd_sizes():
    for size in (31, 5):
        torch.manual_seed(0)
        got = S.strong_views((rand(60, 3, size, size) * 255).byte(), size)
        assert got.shape == (60, 3, size, size) and got.isfinite().all() and 0 <= got.min() and got.max() <= 1


# --- network and parameters -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("side, dim", [(1, 8), (3, 16), (4, 64)])
def test_sine_positions_equal_loops(side, dim):
    got, quarter = S.sine_positions(side, dim), dim // 4
    assert got.shape == (1, 1 + side * side, dim) and not got[0, 0].any()
    for p in range(side * side):
        row, column = divmod(p, side)
        expected = []
        for place, f in ((column, math.sin), (column, math.cos), (row, math.sin), (row, math.cos)):
            expected += [f(place / 10_000 ** (i / quarter)) for i in range(quarter)]
        assert got[0, 1 + p].tolist() == pytest.approx(expected, abs=1e-6)


def test_mocov3s_vit_has_fixed_positions_and_a_frozen_patch_projection():
    r = built("mocov3", "--arch", "vit-tiny")
    b = r.method.online.backbone.embeddings
    fixed = {"backbone.embeddings.position_embeddings", "backbone.embeddings.patch_embeddings.projection.weight",
             "backbone.embeddings.patch_embeddings.projection.bias"}
    assert {n for n, p in r.method.online.named_parameters() if not p.requires_grad} == fixed
    torch.testing.assert_close(b.position_embeddings, S.sine_positions(4, 64), rtol=0, atol=0)
    before = {n: p.clone() for n, p in r.method.named_parameters() if n.split(".", 1)[1] in fixed}
    optimizer = torch.optim.AdamW(S.parameter_groups(r.a, r.method), 0.1, weight_decay=0.1)
    r(PICTURES[:8], 0.0)[0].backward()
    optimizer.step()
    r.method.update_target(0.0)
    assert len(before) == 6
    assert all(torch.equal(p, before[n]) for n, p in r.method.named_parameters() if n in before)
    for method in ("simclr", "dinov2"):                              # theirs are learnt
        assert all(p.requires_grad for p in built(method, "--arch", "vit-tiny").method.online.parameters())


@pytest.mark.parametrize("method", ["simclr", "mocov3"])
def test_parameter_groups_of_one_group(method):
    m = built(method).method
    group, = S.parameter_groups(flags(method), m)
    assert [id(p) for p in group["params"]] == [id(p) for p in m.parameters() if p.requires_grad]


def test_parameter_groups_of_dinov2():
    """Every trained parameter once; .9 a block from the head down, patch projection .2 of that; no decay on vectors."""
    m = built("dinov2").method
    groups = S.parameter_groups(flags("dinov2"), m)
    of = {id(p): g for g in groups for p in g["params"]}
    trained = {n: p for n, p in m.named_parameters() if p.requires_grad}
    assert sum(len(g["params"]) for g in groups) == len(of) == len(trained)
    assert set(of) == {id(p) for p in trained.values()}
    depths = {"online.backbone.embeddings.": 0, "online.backbone.layernorm.": 5, "online.projector.": 5,
              "prototypes.": 5, **{f"online.backbone.encoder.layer.{i}.": i + 1 for i in range(4)}}
    for name, p in trained.items():
        (prefix, depth), = [(k, d) for k, d in depths.items() if name.startswith(k)]
        scale = 0.9 ** (5 - depth) * (0.2 if ".patch_embeddings." in name else 1)
        g = of[id(p)]
        assert g["scale"] == pytest.approx(scale), name
        assert g["last"] == (prefix == "prototypes.")
        vector = name.endswith("bias") or "norm" in name.split("parametrizations")[0] or "lambda1" in name
        assert g["decay"] != vector, name
    assert sum(g["last"] for g in groups) == 1 and 5 <= len(groups) <= 16


# --- measures of the transfer probes ----------------------------------------------------------------------------------

def slow_average_precision(score, y):
    """VOC 2007, devkit's VOCevaldet with 11 points."""
    order = sorted(range(len(y)), key=lambda i: -score[i])
    best = []
    for t in range(11):
        precisions, right = [0.0], 0
        for place, i in enumerate(order, 1):
            right += y[i]
            if 10 * right >= t * sum(y):                             # recall >= t / 10, in whole numbers
                precisions.append(right / place)
        best.append(max(precisions))
    return 100 * sum(best) / 11


@pytest.mark.parametrize("n, positives", [(50, 10), (30, 3), (40, 20), (7, 1), (5, 5), (60, 11)])
def test_average_precision_equals_loops(n, positives):
    for seed in range(5):
        score, y = randn(n, seed=seed), torch.zeros(n, dtype=torch.long)
        y[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:positives]] = 1
        assert S.average_precision_11(score, y) == pytest.approx(slow_average_precision(score.tolist(), y.tolist()))


def test_average_precision_at_its_edges():
    y = torch.tensor([0, 1, 0, 1])
    assert S.average_precision_11(y.float(), y) == 100
    assert S.average_precision_11(torch.tensor([4.0, 3, 2, 1]), y) == pytest.approx(50)       # 1/2 and 2/4
    assert S.average_precision_11(randn(4), torch.ones(4, dtype=torch.long)) == 100
    assert S.average_precision_11(randn(4), torch.zeros(4, dtype=torch.long)) == 0


def test_mean_per_class_equals_loops():
    y = torch.tensor([0, 0, 0, 0, 2, 2, 5])                          # 1, 3 and 4 do not occur
    predicted = torch.tensor([0, 0, 0, 1, 2, 5, 3])
    assert S.mean_per_class(predicted, y) == pytest.approx(100 * (3 / 4 + 1 / 2 + 0) / 3, rel=1e-6)
    assert S.mean_per_class(y, y) == 100 and S.mean_per_class(y + 1, y) == 0
    y, predicted = torch.randint(5, (2, 60), generator=torch.Generator().manual_seed(0))
    expected = sum(100 * sum(p == c for p, q in zip(predicted.tolist(), y.tolist()) if q == c) / y.tolist().count(c)
                   for c in range(5)) / 5
    assert S.mean_per_class(predicted, y) == pytest.approx(expected, rel=1e-6)


def test_split_by_class():
    y = torch.randint(4, (200,), generator=torch.Generator().manual_seed(0))
    y[y == 3] = 7                                                    # labels may have gaps
    y[:3] = torch.tensor([9, 9, 9])                                  # a class with fewer than asked for
    fit, held = S.split_by_class(y, 5, 10)
    assert fit.tolist() == sorted(set(fit.tolist())) and held.tolist() == sorted(set(held.tolist()))
    assert not set(fit.tolist()) & set(held.tolist())
    for c, (n_fit, n_held) in {0: (5, 10), 1: (5, 10), 2: (5, 10), 7: (5, 10), 9: (3, 0)}.items():
        assert (y[fit] == c).sum() == n_fit and (y[held] == c).sum() == n_held
    all_fit, rest = S.split_by_class(y, 30, 10 ** 9)                 # everything else
    assert len(all_fit) + len(rest) == 200 and (y[all_fit] == 0).sum() == 30
    first = y.eq(0).nonzero()[:5, 0].tolist()
    assert (y[fit] == 0).sum() == 5 and fit[y[fit] == 0].tolist() != first                    # drawn, not the first
    assert torch.equal(S.split_by_class(y, 5, 10)[0], fit)           # and always the same ones


def voc(*objects):
    """What torchvision's VOCDetection reads from a file with these (name, difficult)."""
    xml = "".join(f"<object><name>{n}</name><difficult>{d}</difficult></object>" for n, d in objects)
    return torchvision.datasets.VOCDetection.parse_voc_xml(ElementTree.fromstring(f"<annotation>{xml}</annotation>"))


@pytest.mark.parametrize("objects, expected", [
    ([("cat", 0)], {"cat": 1}), ([("dog", 1)], {"dog": -1}), ([("dog", 1), ("dog", 1)], {"dog": -1}),
    ([("dog", 1), ("dog", 0)], {"dog": 1}), ([("dog", 0), ("dog", 1)], {"dog": 1}),
    ([("dog", 1), ("dog", 0), ("dog", 1), ("sofa", 1), ("person", 0)], {"dog": 1, "sofa": -1, "person": 1})])
def test_voc_labels(objects, expected):
    got = S.voc_labels(voc(*objects))
    assert got.dtype == torch.long
    assert {S.VOC[c]: v for c, v in enumerate(got.tolist()) if v} == expected


def test_voc_has_its_twenty_classes():
    assert len(S.VOC) == len(set(S.VOC)) == 20 and S.VOC == sorted(S.VOC)
