"""Sections 4 and 5 of simclr_deepaug.py: the numbered network, and what Deep Augmentation does between its layers."""
import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import simclr_deepaug as S

ROWS = torch.tensor([True, False, True, True, False, False, True, False])


def network(*flags, size=16, seed=0, classes=0):
    """A Net in training mode with BatchNorm in eval mode (running statistics of its own), so rows are independent."""
    torch.manual_seed(seed)
    net = S.Net(S.settings(list(flags)), size, torch.full((3,), 0.4), torch.full((3,), 0.3), classes)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.3, 0.2)
    net.train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    return net


def some_images(n=8, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def flags_for(layer, transform="dropout", stop=True):
    return "--layer", str(layer), "--transform", transform, "--stop-grad" if stop else "--no-stop-grad"


def gradients(net, rows, weights):
    """Gradient of sum(weights * output) on the pictures and on every parameter, and the output."""
    images = some_images(len(rows)).requires_grad_()
    torch.manual_seed(7)
    out = net(images, rows)
    net.zero_grad()
    (out * weights).sum().backward()
    return images.grad, {k: p.grad for k, p in net.named_parameters()}, out.detach()


def number_of(parameter):
    """layers.stem.conv1.weight -> 0, ..."""
    return {name: l for l, name in S.LAYERS.items()}[parameter.split(".")[1]]


# --- gradients --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("transform", ["dropout", "channel", "pca"])
@pytest.mark.parametrize("layer", list(S.LAYERS))
def test_stop_gradient(layer, transform):
    """Below the layer: exactly zero from augmented rows, the bits of the un-augmented forward from clean rows."""
    weights = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    net, plain = network(*flags_for(layer, transform)), network("--layer", "none")
    images, params, out = gradients(net, ROWS, weights)
    clean = weights * ~ROWS.view(-1, 1)
    plain_images, plain_params, plain_out = gradients(plain, ROWS, clean)
    assert not images[ROWS].any() and images[~ROWS].any()
    assert torch.equal(images[~ROWS], plain_images[~ROWS])
    assert torch.equal(out[~ROWS], plain_out[~ROWS])
    assert not any(torch.equal(a, b) for a, b in zip(out[ROWS], plain_out[ROWS]))
    for name, grad in params.items():
        if number_of(name) <= layer:
            assert torch.equal(grad, plain_params[name]), name


@pytest.mark.parametrize("layer", list(S.LAYERS))
def test_layers_above_learn_from_augmented_rows_layers_below_do_not(layer):
    weights = torch.randn(8, 128, generator=torch.Generator().manual_seed(2)) * ROWS.view(-1, 1)
    _, params, _ = gradients(network(*flags_for(layer)), ROWS, weights)          # a loss on augmented rows alone
    for name, grad in params.items():
        assert grad.any() == (number_of(name) > layer), name
    images, params, _ = gradients(network(*flags_for(layer, stop=False)), ROWS, weights)
    assert images[ROWS].flatten(1).any(1).all() and not images[~ROWS].any()
    assert all(grad.any() for grad in params.values())


@pytest.mark.parametrize("transform", ["dropout", "channel", "pca"])
def test_gradient_through_the_layer_without_stop_gradient(transform):
    """Augmented rows: the mask or projection itself, as in the forward; clean rows: the identity."""
    h = low_rank(8, 108, 6).view(8, 12, 3, 3).requires_grad_()
    up = torch.randn(8, 12, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    out = S.deep_augment(h, ROWS, 0.5, False, transform, 2)
    (out * up).sum().backward()
    assert torch.equal(h.grad[~ROWS], up[~ROWS]) and torch.equal(out[~ROWS], h[~ROWS])
    if transform == "pca":                       # flat - (flat - mean) V V^T with mean and V held fixed
        flat = h.detach().flatten(1).double().numpy()
        v = np.linalg.svd(flat - flat.mean(0))[2][:2].T
        expected = up.flatten(1).double().numpy() @ (np.eye(108) - v @ v.T)
        np.testing.assert_allclose(h.grad[ROWS].flatten(1), expected[ROWS], atol=1e-4)
    else:
        torch.testing.assert_close(h.grad[ROWS], up[ROWS] * (out / h).detach()[ROWS])


# --- what the transforms do -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("transform", ["dropout", "channel"])
@pytest.mark.parametrize("shape", [(16, 40), (16, 8, 4, 4), (16, 5, 8)])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_expectation_is_preserved(transform, shape, rate):
    """E[A(h)] = h, each element kept with probability 1 - rate and scaled by 1 / (1 - rate)."""
    torch.manual_seed(0)
    h, rows = torch.ones(shape), torch.ones(16, dtype=torch.bool)
    draws = torch.stack([S.deep_augment(h, rows, rate, True, transform) for _ in range(400)])
    kept = draws > 0
    torch.testing.assert_close(draws[kept], torch.full_like(draws[kept], 1 / (1 - rate)))
    independent = 400 * (16 * shape[1 if len(shape) != 3 else 2] if transform == "channel" else h.numel())
    tolerance = 4.5 * (rate * (1 - rate) / independent) ** 0.5
    assert abs(kept.float().mean() - (1 - rate)) < tolerance
    worst = (kept.float().mean(0) - (1 - rate)).abs().max()
    assert worst < 5.5 * (rate * (1 - rate) / 400) ** 0.5


@pytest.mark.parametrize("shape, axes", [((6, 10, 4, 5), (2, 3)), ((6, 7, 10), (1,)), ((6, 10), ())])
def test_channel_drops_whole_channels(shape, axes):
    """[B, C, H, W]: all places of a channel; [B, L, C]: a feature over all tokens; another choice in every row."""
    torch.manual_seed(0)
    out = S.deep_augment(torch.ones(shape), torch.ones(6, dtype=torch.bool), 0.5, True, "channel")
    per_channel = out.mean(axes) if axes else out
    assert per_channel.shape == (6, 10) and set(per_channel.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(r.tolist()) for r in per_channel}) == 6


@pytest.mark.parametrize("transform", ["dropout", "channel"])
def test_rate_zero_is_the_identity_and_only_chosen_rows_change(transform):
    torch.manual_seed(0)
    h = torch.randn(8, 6, 4, 4)
    assert torch.equal(S.deep_augment(h, ROWS, 0.0, False, transform), h)
    before = h.clone()
    out = S.deep_augment(h, ROWS, 0.5, True, transform)
    changed = (out != h).flatten(1).any(1)
    assert torch.equal(changed, ROWS) and torch.equal(h, before)
    none, all_rows = torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
    assert torch.equal(S.deep_augment(h, none, 0.5, True, transform), h)
    assert (S.deep_augment(h, all_rows, 0.5, True, transform) != h).flatten(1).any(1).all()


# --- PCA --------------------------------------------------------------------------------------------------------------

def slow_removal(h, k):
    """With numpy: centre, exact SVD, take the k leading directions' share out of every row, keep the mean."""
    flat = h.double().flatten(1).numpy()
    centred = flat - flat.mean(0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:k]
    for direction in directions:
        for i in range(len(flat)):
            flat[i] -= (centred[i] @ direction) * direction
    return torch.from_numpy(flat).view(h.shape)


def low_rank(n, d, rank, noise=0.0):
    g = torch.Generator().manual_seed(0)
    scales = torch.tensor([20.0, 12, 6, 3, 2, 1])[:rank]
    return (torch.randn(n, rank, generator=g) * scales) @ torch.randn(rank, d, generator=g) / d ** 0.5 \
        + 3 * torch.randn(d, generator=g) + noise * torch.randn(n, d, generator=g)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", [(60, 48), (60, 3, 4, 4), (60, 6, 8), (5, 48)])
def test_pca_equals_an_exact_svd_when_the_rank_is_at_most_six(shape, k):
    h = low_rank(shape[0], 48, min(6, shape[0] - 1)).view(shape)
    got = S.remove_components(h, k)
    assert got.shape == h.shape and got.dtype == h.dtype
    torch.testing.assert_close(got, slow_removal(h, k).float(), rtol=0, atol=2e-4)     # float32 products of size 20
    torch.testing.assert_close(got.mean(0), h.mean(0), rtol=0, atol=2e-5)              # the mean is kept
    variance = torch.linalg.svdvals(h.double().flatten(1) - h.double().flatten(1).mean(0)) ** 2
    left = torch.linalg.svdvals(got.double().flatten(1) - got.double().flatten(1).mean(0)) ** 2
    torch.testing.assert_close(left[0], variance[k], rtol=1e-3, atol=1e-6)             # exactly the k leading are gone


def test_pca_is_close_to_exact_at_full_rank():
    """Randomised: with noise on all 200 directions the removed share of the first two is still above 99 %."""
    torch.manual_seed(0)
    h = low_rank(100, 200, 6, noise=0.3)
    error = (S.remove_components(h, 2) - slow_removal(h, 2)).norm() / (h - slow_removal(h, 2)).norm()
    assert error < 0.05


@pytest.mark.parametrize("h, components", [
    (torch.randn(1, 20), 1),                         # a batch of one: it is its own mean, nothing to remove
    (torch.full((9, 4, 3, 3), 2.5), 2),              # constant features
    (torch.zeros(9, 20), 1),
    (torch.randn(1, 20).expand(8, 20), 3)])          # identical rows
def test_pca_of_a_batch_without_variance_changes_nothing(h, components):
    torch.testing.assert_close(S.remove_components(h, components), h, rtol=0, atol=1e-5)


def test_pca_with_more_components_than_the_rank_leaves_the_mean():
    h = low_rank(30, 20, 3)
    for components in (3, 6, 25, 1000):
        torch.testing.assert_close(S.remove_components(h, components), h.mean(0).expand(30, 20), rtol=0, atol=1e-3)


def test_pca_in_half_precision_keeps_the_type():
    h = low_rank(30, 20, 6).bfloat16()
    out = S.remove_components(h, 1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), slow_removal(h.float(), 1).float(), rtol=0.02, atol=0.05)


# --- rows -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sample", [0.1, 0.5, 0.8, 1.0])
def test_rows_share_and_independence_over_the_two_views(sample):
    torch.manual_seed(0)
    rows = S.draw_rows(50_000, S.settings(["--sample", str(sample)]), "cpu")
    assert rows.shape == (100_000,) and rows.dtype == torch.bool
    assert abs(rows.float().mean() - sample) < 5 * (sample * (1 - sample) / 100_000) ** 0.5 + 1e-9
    first, second = rows.float().chunk(2)
    if sample < 1:
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.02
        assert abs(torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1]) < 0.02
    assert not torch.equal(rows, S.draw_rows(50_000, S.settings(["--sample", str(sample)]), "cpu")) or sample == 1


def test_cross_augments_exactly_one_view_of_each_pair():
    torch.manual_seed(0)
    first, second = S.draw_rows(10_000, S.settings(["--pairs", "cross"]), "cpu").chunk(2)
    assert torch.equal(first, ~second) and abs(first.float().mean() - 0.5) < 0.025


# --- in the network ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [["--layer", "all", "--sample", "1"], ["--layer", "-1", "4", "6"],
                                   ["--layer", "2", "--transform", "channel", "--rate", "0.9"],
                                   ["--layer", "3", "--transform", "pca", "--no-stop-grad"]])
def test_eval_mode_has_no_augmentation(flags):
    images = some_images()
    net, plain = network(*flags), network("--layer", "none")
    assert not torch.equal(net(images, ROWS), plain(images, ROWS))               # in training mode it has
    net.eval(), plain.eval()
    assert torch.equal(net(images, ROWS), plain(images)) and torch.equal(net(images), plain(images))
    assert torch.equal(net.features(images), plain.features(images))


@pytest.mark.parametrize("targets", [[-1], [0], [1], [2], [3], [4], [5], [6], [1, 4], list(range(7))])
def test_augmentation_at_a_layer_changes_only_what_comes_after_it(targets):
    """Each layer's input and output, with and without: what enters layer l + 1 differs, up to layer l nothing does."""
    seen = []
    for flags in (["--layer", *map(str, targets)], ["--layer", "none"]):
        net, inputs, outputs = network(*flags), {}, {}
        for l, layer in zip(S.LAYERS, net.layers.values()):
            layer.register_forward_hook(lambda m, i, o, l=l, inputs=inputs, outputs=outputs:
                                        (inputs.update({l: i[0].clone()}), outputs.update({l: o.clone()}))[-1])
        inputs[7] = net(some_images(), ROWS)
        seen.append((inputs, outputs))
    (inputs, outputs), (plain_inputs, plain_outputs) = seen
    first = min(targets)
    for l in S.LAYERS:
        assert torch.equal(outputs[l], plain_outputs[l]) == (l <= first)
    for l in range(8):
        same_rows = (inputs[l] == plain_inputs[l]).flatten(1).all(1)
        assert same_rows[~ROWS].all() and same_rows[ROWS].any() == (l <= first)
        if l - 1 in targets:                                                    # half of them are exact zeros here
            assert (inputs[l][ROWS] == 0).float().mean() > 0.4


@pytest.mark.parametrize("flags, weights_stay, statistics_stay", [
    (["--layer", "4"], [], []),
    (["--layer", "none"], [], []),
    (["--layer", "2", "--freeze", "before"], [-1, 0, 1, 2], [-1, 0, 1, 2]),
    (["--layer", "2", "--freeze", "after"], [3, 4, 5, 6], [3, 4, 5, 6]),
    (["--layer", "1", "3", "--freeze", "before"], [-1, 0, 1, 2, 3], [-1, 0, 1, 2, 3]),
    (["--layer", "1", "3", "--freeze", "after"], [2, 3, 4, 5, 6], [2, 3, 4, 5, 6]),
    (["--layer", "3", "--sample", "1"], [-1, 0, 1, 2, 3], []),
    (["--layer", "3", "--sample", "1", "--no-stop-grad"], [], [])])
def test_frozen_layers(flags, weights_stay, statistics_stay):
    assert S.frozen_layers(S.settings(flags)) == (weights_stay, statistics_stay)


@pytest.mark.parametrize("flags", [["--layer", "2", "--freeze", "before"], ["--layer", "2", "--freeze", "after"],
                                   ["--layer", "2", "--sample", "1"], ["--layer", "2"]])
def test_what_real_training_leaves_unchanged(flags, few, tmp_path):
    """Two real steps through main(): frozen weights and BatchNorm statistics keep their bits, all others change."""
    words = ["--dataset", "folder", "--data-dir", few, "--workers", "0", "--epochs", "1", "--batch-size", "100",
             "--image-size", "16", "--out", tmp_path / "run", "--lr", "0.3", "--warmup-epochs", "0", *flags]
    S.main([str(w) for w in words])
    a = S.settings([str(w) for w in words])
    split, _, classes = S.load_folder(a, "cpu")
    before = S.build(a, split, classes, "cpu").state_dict()
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    weights_stay, statistics_stay = S.frozen_layers(a)
    for name, value in before.items():
        if name.startswith("layers.input"):
            continue
        stays = statistics_stay if "running" in name or "tracked" in name else weights_stay
        assert torch.equal(value, after[name]) == (number_of(name) in stays), name


# --- the network itself -----------------------------------------------------------------------------------------------

def explicit_block(block, x):
    """The residual of a torchvision block, functional and out of place."""
    pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if hasattr(block, "conv3"):
        pairs.append((block.conv3, block.bn3))
    h = x
    for i, (conv, bn) in enumerate(pairs):
        h = F.conv2d(h, conv.weight, None, conv.stride, conv.padding)
        h = F.batch_norm(h, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        h = h.relu() if i < len(pairs) - 1 else h
    return h


@pytest.mark.parametrize("arch", ["small", "resnet18", "resnet50"])
def test_block_outputs_equal_torchvisions_blocks(arch):
    """Even: the block's own forward, the same bits. Odd: the residual, not overwritten by the in-place addition."""
    net = network("--arch", arch, "--layer", "none").eval()
    with torch.no_grad():
        h = net.layers["stem"](net.layers["input"](some_images(2)))
        for s in (1, 2, 3, 4):
            for block in net.layers[f"layer{s}"]:
                before = h.clone()
                odd, even = S.block_outputs(block, h)
                torch.testing.assert_close(odd, explicit_block(block, before), rtol=1e-4, atol=1e-4)
                assert torch.equal(even, block(before)) and torch.equal(h, before)
                assert (odd < 0).any() and odd.data_ptr() != even.data_ptr()
                h = even


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_features_equal_torchvisions_own_forward_at_224(arch):
    """The same weights under torchvision's keys: normalise, forward without the last layer."""
    net = network("--arch", arch, "--layer", "none", size=224).eval()
    theirs = getattr(torchvision.models, arch)(weights=None).eval()
    theirs.fc = nn.Identity()
    keys = {k.removeprefix("layers.").removeprefix("stem."): v for k, v in net.state_dict().items()
            if not k.startswith(("layers.input", "layers.head"))}
    theirs.load_state_dict(keys)
    images = some_images(1, 224)
    with torch.no_grad():
        expected = theirs((images - 0.4) / 0.3)
        torch.testing.assert_close(net.features(images), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(net(images), net.layers["head"](expected), rtol=1e-4, atol=1e-4)


def test_neuron_counts_of_figure_2():
    """ResNet-18 at 32 px. (Figure 2 writes "s=2" beside layer 1, but its own count, 32^2 * 64, is that of stride 1.)"""
    net, counts = network("--arch", "resnet18", "--layer", "none", size=32).eval(), []
    with torch.no_grad():
        h = some_images(1, 32)
        for layer in net.layers.values():
            h = layer(h)
            counts.append(h.numel())
    assert counts == [3072, 65536, 65536, 32768, 16384, 8192, 512, 128]


@pytest.mark.parametrize("arch", ["small", "resnet50"])
def test_activations_agree_with_the_layers_and_their_numbers(arch):
    """Every number's activation is that layer's output; the last two are features() and forward()."""
    net = network("--arch", arch, "--layer", "none", "--head-layers", "3").eval()
    with torch.no_grad():
        acts, h = net.activations(some_images(2)), some_images(2)
        names = {number: name for name, number in net.numbered().items()}
        for l, layer in zip(S.LAYERS, net.layers.values()):
            h = layer(h)
            assert l == -1 or torch.equal(acts[names[l]], h)
        assert torch.equal(acts["avgpool"], net.features(some_images(2))) and list(acts)[-1] == "head"
