"""Section 3 of simclr_deepaug.py, the views, against torchvision's own operations with the same parameters."""
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as V

import simclr_deepaug as S

ROUNDING = 2e-6    # both sides compute in float32, in another order of operations: a dozen roundings of 6e-8


def pictures(n, height=32, width=32, seed=0):
    """Drawn shapes with saturated colours and grey, black and white pixels among them, uint8 [n, 3, H, W]."""
    images = S.draw_shapes(n, seed, "cpu")[0].float()
    g = torch.Generator().manual_seed(seed)
    images = images + 90 * torch.randn(n, 3, 1, 1, generator=g)
    images = V.resize(images, [height, width]).clamp(0, 255).round().to(torch.uint8)
    images[:, :, 0, 0], images[:, :, 0, 1], images[:, :, 1, 0] = 0, 255, 127
    images[:, 0, 1, 1], images[:, 1, 1, 1], images[:, 2, 1, 1] = 255, 0, 0
    return images


def column(values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def between(lo, hi, n, seed=0):
    return (torch.rand(n, 1, 1, 1, generator=torch.Generator().manual_seed(seed)) * (hi - lo) + lo)


# --- each operation ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ours, theirs", [(S.brightness, V.adjust_brightness), (S.contrast, V.adjust_contrast),
                                          (S.saturation, V.adjust_saturation)])
def test_lerps_equal_torchvision(ours, theirs):
    """Brightness, contrast and saturation, a factor per picture, 0 and the neutral 1 included."""
    x = pictures(40).float() / 255
    factors = torch.cat([column([0.0, 1.0, 2.0]), between(0.6, 1.4, 37)])
    expected = torch.stack([theirs(p, f.item()) for p, f in zip(x, factors)])
    torch.testing.assert_close(ours(x, factors), expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(ours(x, factors)[1], x[1], rtol=0, atol=ROUNDING)


def test_hue_equals_torchvision():
    """Hue over the whole circle; torchvision goes through HSV and back, so its own rounding is a little larger."""
    x = pictures(40).float() / 255
    shifts = torch.cat([column([0.0, 0.5, -0.5, 1 / 3]), between(-0.5, 0.5, 36)])
    expected = torch.stack([V.adjust_hue(p, f.item()) for p, f in zip(x, shifts)])
    torch.testing.assert_close(S.hue(x, shifts), expected, rtol=0, atol=5e-6)


def test_gray_equals_torchvision_and_leaves_the_input():
    x = pictures(8).float() / 255
    before = x.clone()
    torch.testing.assert_close(S.gray(x), V.rgb_to_grayscale(x, num_output_channels=1), rtol=0, atol=ROUNDING)
    assert torch.equal(x, before)


@pytest.mark.parametrize("height, width, out", [(32, 32, 32), (32, 32, 9), (20, 47, 33), (64, 40, 16), (7, 5, 32)])
def test_crop_resize_flip_matrices_equal_torchvision(height, width, out):
    """Up- and down-scaling, pictures that are not square, crops at every border, single pixels, the whole picture."""
    boxes = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1), (0, width - 3, 4, 3),
             (height - 5, 0, 5, width), (0, 0, height, 2), (1, 1, height - 2, width - 2), (2, 1, 3, 4)]
    x = pictures(len(boxes), height, width).float() / 255
    top, left, h, w = torch.tensor(boxes, dtype=torch.float32).T
    flip = torch.arange(len(boxes)) % 2 == 1
    rows = S.resize_matrix(top, h, height, out, torch.zeros(len(boxes), dtype=torch.bool))
    columns = S.resize_matrix(left, w, width, out, flip)
    got = rows.unsqueeze(1) @ x @ columns.unsqueeze(1).mT
    for i, box in enumerate(boxes):
        expected = V.resized_crop(x[i], *box, [out, out], antialias=True)
        expected = V.hflip(expected) if flip[i] else expected
        torch.testing.assert_close(got[i], expected, rtol=0, atol=ROUNDING, msg=lambda m, box=box: f"{box}: {m}")


@pytest.mark.parametrize("size, kernel", [(32, 3), (24, 5), (32, 23)])
def test_blur_matrix_equals_torchvision(size, kernel):
    """Reflected borders, a sigma per picture; sigma 0 leaves the picture alone."""
    x = pictures(6, size, size).float() / 255
    sigma = torch.tensor([0.1, 0.35, 0.8, 1.3, 2.0, 0.0])
    m = S.blur_matrix(sigma, size, kernel).unsqueeze(1)
    got = m @ x @ m.mT
    for i in range(5):
        expected = V.gaussian_blur(x[i], [kernel, kernel], [sigma[i].item()] * 2)
        torch.testing.assert_close(got[i], expected, rtol=0, atol=ROUNDING)
    assert torch.equal(got[5], x[5])


def recorded(monkeypatch, *args, **options):
    """make_views, and the parameters that it really drew: wrappers around the real functions write them down."""
    log = {"order": [], "flip": [], "sigma": None}

    def spy(name, key, pick):
        real = getattr(S, name)

        def call(*a):
            result = real(*a)
            pick(log, a, result)
            return result
        monkeypatch.setattr(S, name, call)

    for op in ("brightness", "contrast", "saturation", "hue"):
        spy(op, op, lambda log, a, r, op=op: log["order"].append((op, a[1].flatten().tolist())))
    spy("crop_boxes", "boxes", lambda log, a, r: log.update(boxes=torch.stack(r, 1).int().tolist()))
    spy("resize_matrix", "flip", lambda log, a, r: log["flip"].append(a[4].tolist()))
    spy("blur_matrix", "sigma", lambda log, a, r: log.update(sigma=a[0].tolist(), kernel=a[2]))
    views = S.make_views(*args, **options)
    monkeypatch.undo()
    return views, log


def replay(picture, i, log, size, is_gray, solarize=False):
    """The same view by torchvision: a float tensor in 0..1, or the 8-bit chain when `picture` is a PIL image."""
    x = V.resized_crop(picture, *log["boxes"][i], [size, size], antialias=True)
    x = V.hflip(x) if log["flip"][1][i] else x
    for op, factors in log["order"]:
        x = getattr(V, f"adjust_{op}")(x, factors[i])
    x = V.rgb_to_grayscale(x, num_output_channels=3) if is_gray else x
    if log["sigma"] and log["sigma"][i]:
        x = V.gaussian_blur(x, [log["kernel"]] * 2, [log["sigma"][i]] * 2)
    return V.solarize(x, 0.5) if solarize else x


def is_gray(view):
    return torch.allclose(view[0], view[1], atol=1e-6) and torch.allclose(view[0], view[2], atol=1e-6)


@pytest.mark.parametrize("height, width, size, blur, solarize", [
    (32, 32, 32, 0.0, 0.0), (40, 28, 24, 0.5, 0.0), (24, 48, 32, 0.5, 1.0)])
def test_whole_view_equals_torchvision_with_the_same_parameters(monkeypatch, height, width, size, blur, solarize):
    """The chain as a whole, so the order, the flip of columns and the placing of each operation too."""
    torch.manual_seed(3)
    images = pictures(60, height, width)
    views, log = recorded(monkeypatch, images, size, 0.2, blur, solarize)
    assert not any(log["flip"][0]) and 15 < sum(log["flip"][1]) < 45
    worst, close = 0.0, 0
    for i in range(60):
        expected = replay(images[i].float() / 255, i, log, size, is_gray(views[i]), solarize)
        error = (views[i] - expected).abs()
        close += error.mean() < 1e-4
        if not solarize:                        # hue of a nearly grey pixel amplifies its rounding by 1 / chroma
            worst = max(worst, error.max().item())
    assert worst < 1e-4 and close == 60         # solarising jumps at 0.5: single pixels may fall on the other side


def test_difference_from_the_8_bit_PIL_chain(monkeypatch):
    """SupContrast's chain rounds to 8 bits after every operation: about 1 to 1.5 of 255 on average, never half a
    picture off."""
    torch.manual_seed(0)
    images = pictures(150)
    views, log = recorded(monkeypatch, images, 32)
    errors = []
    for i, view in enumerate(views):
        pil = Image.fromarray(images[i].permute(1, 2, 0).numpy())
        theirs = np.asarray(replay(pil, i, log, 32, is_gray(view)), dtype=np.float32)
        errors.append((view.permute(1, 2, 0).numpy() * 255 - theirs))
    errors = np.stack(errors)
    print(f"8-bit PIL chain: mean |difference| {np.abs(errors).mean():.2f}/255, mean difference {errors.mean():.2f}")
    assert 0.2 < np.abs(errors).mean() < 2.5
    assert np.abs(errors).mean((1, 2, 3)).max() < 12


# --- distributions ----------------------------------------------------------------------------------------------------

def quantiles(values):
    return torch.quantile(values.double(), torch.linspace(0.05, 0.95, 10, dtype=torch.double))


@pytest.mark.parametrize("height, width", [(32, 32), (48, 24), (24, 40)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    """Area, ratio and place against get_params."""
    torch.manual_seed(0)
    n, picture = 4000, torch.zeros(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(picture, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    ours = torch.stack(S.crop_boxes(4 * n, height, width, (0.2, 1.0), "cpu"), 1)
    top, left, h, w = ours.T
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all() and torch.equal(ours, ours.round())
    for name, f in {"area": lambda b: b[:, 2] * b[:, 3] / (height * width),
                    "log ratio": lambda b: (b[:, 3] / b[:, 2]).log(),
                    "vertical centre": lambda b: (b[:, 0] + b[:, 2] / 2) / height,
                    "horizontal centre": lambda b: (b[:, 1] + b[:, 3] / 2) / width}.items():
        a, b = f(ours.double()), f(theirs.double())
        assert abs(a.mean() - b.mean()) < 0.015, (name, a.mean(), b.mean())
        assert (quantiles(a) - quantiles(b)).abs().max() < 0.05, (name, quantiles(a), quantiles(b))


@pytest.mark.parametrize("height, width", [(20, 120), (120, 20), (1, 50), (1, 1)])
def test_crop_boxes_of_long_pictures_stay_inside(height, width):
    """Where hardly a try fits (torchvision then takes the middle, we cut the first try: see the docstring)."""
    torch.manual_seed(0)
    top, left, h, w = S.crop_boxes(2000, height, width, (0.2, 1.0), "cpu")
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    assert len(left.unique()) > 10 or width < 100


def areas(n):
    """4x4 pictures with two greys and one colour: from a view's pixels every jitter factor can be read back."""
    image = torch.full((3, 4, 4), 115, dtype=torch.uint8)
    image[:, 2] = 140
    image[0, 3], image[1, 3], image[2, 3] = 140, 120, 105
    return image.expand(n, 3, 4, 4)


def test_jitter_and_gray_are_applied_as_often_and_as_strongly_as_torchvisions():
    """p .8 and .2, independent of each other; contrast factors uniform in .6-1.4, hue in -.1-.1, own per picture."""
    torch.manual_seed(0)
    n = 20_000
    before = areas(1)[0].float() / 255
    views = S.make_views(areas(n), 4, crop_min=0)
    colour = views[:, :, 3, 0]
    chroma = colour.amax(1) - colour.amin(1)
    grey = chroma < 1e-5
    difference = (views[:, 0, 2, 0] - views[:, 0, 0, 0]) / (before[0, 2, 0] - before[0, 0, 0])   # brightness * contrast
    unjittered = torch.where(grey.view(n, 1, 1, 1), S.gray(before[None]), before)
    jittered = (views - unjittered).abs().amax((1, 2, 3)) > 1e-3
    assert abs(jittered.float().mean() - 0.8) < 0.012 and abs(grey.float().mean() - 0.2) < 0.012
    assert abs((jittered & grey).float().mean() - 0.16) < 0.012
    assert len(difference[jittered].unique()) > 0.9 * jittered.sum()                             # own factors

    drawn = jittered & ~grey
    saturation = (chroma / (before[0, 3, 0] - before[2, 3, 0]) / difference)[drawn]
    assert 0.59 < saturation.min() < 0.62 and 1.38 < saturation.max() < 1.41
    assert abs(saturation.mean() - 1) < 0.01 and abs(saturation.std() - 0.8 / 12 ** 0.5) < 0.01
    r, g, b = colour[drawn].double().T                             # greatest channel stays red or turns: full formula
    angle = torch.atan2(3 ** 0.5 * (g - b), 2 * r - g - b) / (2 * torch.pi)
    r, g, b = before[:, 3, 0].double()
    turn = (angle - torch.atan2(3 ** 0.5 * (g - b), 2 * r - g - b) / (2 * torch.pi) + 0.5) % 1 - 0.5
    assert turn.abs().max() < 0.115 and turn.max() > 0.08 and turn.min() < -0.08 and abs(turn.mean()) < 0.005
    for product in (difference[drawn], saturation):                # factors are independent of one another
        assert abs(torch.corrcoef(torch.stack([product, turn.float()]))[0, 1]) < 0.05


def test_brightness_and_contrast_factors_are_uniform():
    """One grey: the level gives brightness. Two greys: their spread around the mean gives contrast as well."""
    torch.manual_seed(1)
    n = 20_000
    level = S.make_views(torch.full((n, 3, 2, 2), 128, dtype=torch.uint8), 2, crop_min=0)[:, 0, 0, 0] / (128 / 255)
    level = level[(level - 1).abs() > 1e-3]
    assert 0.598 < level.min() < 0.602 and 1.398 < level.max() < 1.402
    assert (quantiles(level) - torch.linspace(0.64, 1.36, 10)).abs().max() < 0.015
    two = torch.full((n, 3, 2, 2), 110, dtype=torch.uint8)
    two[:, :, 1] = 140
    two = S.make_views(two, 2, crop_min=0)[:, 0, :, 0]
    contrast = (two[:, 1] - two[:, 0]) / 30 / (two.mean(1) / 125)
    contrast = contrast[(contrast - 1).abs() > 1e-3]
    assert 0.598 < contrast.min() < 0.602 and 1.398 < contrast.max() < 1.402
    assert (quantiles(contrast) - torch.linspace(0.64, 1.36, 10)).abs().max() < 0.015


def test_flips_half_and_blurs_and_solarizes_as_often_as_asked():
    torch.manual_seed(0)
    n = 4000
    ramp = (torch.arange(8) * 20 + 50).to(torch.uint8).expand(n, 3, 8, 8)
    views = S.make_views(ramp, 8)
    assert abs((views[:, 0, 4, 7] < views[:, 0, 4, 0]).float().mean() - 0.5) < 0.03
    spot = torch.full((n, 3, 9, 9), 60, dtype=torch.uint8)
    spot[:, :, 4, 4] = 110
    views = S.make_views(spot, 9, crop_min=0, blur=0.3)
    spread = (views[:, 0, 4, 5] - views[:, 0, 0, 0]) / (views[:, 0, 4, 4] - views[:, 0, 0, 0])
    blurred = (spread > 1e-4).float().mean().item()       # sigma under .24 moves less than that: 7 % of the blurs
    assert abs(blurred - 0.3 * (1 - 0.14 / 1.9)) < 0.03 and spread.max() < 1
    views = S.make_views(torch.full((n, 3, 2, 2), 250, dtype=torch.uint8), 2, crop_min=0, solarize=0.3)[:, 0, 0, 0]
    assert abs((views < 0.42).float().mean() - 0.3) < 0.03                 # .58 or more became .42 or less


def test_order_of_jitter_varies_between_batches(monkeypatch):
    """All 24 orders occur, about equally often; within a batch there is one."""
    seen = {}
    images = pictures(1, 4, 4)
    torch.manual_seed(0)
    for _ in range(600):
        order = tuple(op for op, _ in recorded(monkeypatch, images, 4, 0)[1]["order"])
        seen[order] = seen.get(order, 0) + 1
    assert set(seen) == set(itertools.permutations(["brightness", "contrast", "saturation", "hue"]))
    assert 8 <= min(seen.values()) and max(seen.values()) <= 50


def test_what_one_order_per_batch_changes():
    """Over batches nothing: the mixture of orders is torchvision's. Within one batch all pictures share an order: the
    mean and the spread of its pixel values are then within 1/255 and 2/255 of the mixture's."""
    images = pictures(500).float() / 255
    factors = [between(0.6, 1.4, 500, 1), between(0.6, 1.4, 500, 2), between(0.6, 1.4, 500, 3),
               between(-0.1, 0.1, 500, 4)]
    views = {}
    for order in itertools.permutations(range(4)):
        views[order] = images
        for op in order:
            views[order] = (S.brightness, S.contrast, S.saturation, S.hue)[op](views[order], factors[op])
    means, stds = torch.tensor([(x.mean() * 255, x.std() * 255) for x in views.values()]).T
    off, spread = (means - means.mean()).abs(), (stds - stds.mean()).abs()
    moved = (views[0, 1, 2, 3] - views[3, 2, 1, 0]).abs().mean() * 255
    jitter = (views[0, 1, 2, 3] - images).abs().mean() * 255
    print(f"one order a batch: its mean is off by {off.mean():.2f}/255 (at most {off.max():.2f}), its std by "
          f"{spread.mean():.2f} (at most {spread.max():.2f}); between two orders a view moves by {moved:.2f}/255, "
          f"by the jitter itself by {jitter:.2f}")
    assert off.max() < 1 and spread.max() < 2 and 0.5 < moved < jitter / 2


# --- the function as a whole ------------------------------------------------------------------------------------------

def test_views_are_reproducible_and_differ():
    """The same seed gives the same bits; another seed, another call or another row gives another view."""
    images = pictures(1).repeat(6, 1, 1, 1)
    torch.manual_seed(5)
    first, second = S.make_views(images, 32), S.make_views(images, 32)
    torch.manual_seed(5)
    assert torch.equal(S.make_views(images, 32), first)
    torch.manual_seed(6)
    assert not torch.equal(S.make_views(images, 32), first) and not torch.equal(first, second)
    assert len({view.numpy().tobytes() for view in first}) == 6            # each picture has parameters of its own


def test_crop_min_zero_changes_colours_only(monkeypatch):
    """Workers have cropped already: no crop, no flip, and pixels of one colour stay of one colour."""
    torch.manual_seed(0)
    monkeypatch.setattr(S, "crop_boxes", None)                             # would raise if it were called
    monkeypatch.setattr(S, "resize_matrix", None)
    images = pictures(64)
    views = S.make_views(images, 32, crop_min=0)
    for image, view in zip(images, views):
        _, group = image.flatten(1).unique(dim=1, return_inverse=True)
        low = torch.full((3, int(group.max()) + 1), 9.0).scatter_reduce(1, group.expand(3, -1), view.flatten(1), "amin")
        high = torch.full_like(low, -9.0).scatter_reduce(1, group.expand(3, -1), view.flatten(1), "amax")
        assert (high - low).max() < 1e-5


@pytest.mark.parametrize("height, width, size, options", [
    (32, 32, 32, {}), (17, 50, 24, {"blur": 1.0, "solarize": 1.0}), (1, 1, 8, {}), (32, 32, 8, {"crop_min": 1.0}),
    (64, 3, 16, {"crop_min": 0.01})])
def test_shape_and_range(height, width, size, options):
    """float32 in 0..1, whatever comes in; black and white pictures make no NaN."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, height, width), dtype=torch.uint8)
    images[0], images[1] = 0, 255
    views = S.make_views(images, size, **options)
    assert views.shape == (40, 3, size, size) and views.dtype == torch.float32
    assert torch.isfinite(views).all() and views.min() >= -1e-6 and views.max() <= 1 + 1e-6


def test_two_views_stacks_first_views_then_second_views():
    """Row i and row i + B show picture i; crops [B, 2, ...] made by workers go to the same places."""
    torch.manual_seed(0)
    a = S.settings([])
    split = S.Split(None, 8, images=torch.zeros(0))
    levels = torch.tensor([20, 120, 200], dtype=torch.uint8).view(3, 1, 1, 1)
    views = torch.stack([S.two_views(levels.expand(3, 3, 8, 8), split, a) for _ in range(300)])
    order = views.mean((2, 3, 4)).view(300, 2, 3).mean(0)
    assert (order[:, 0] < order[:, 1]).all() and (order[:, 1] < order[:, 2]).all()
    pairs = torch.tensor([[10, 60], [110, 160], [200, 230]], dtype=torch.uint8).view(3, 2, 1, 1, 1)
    views = torch.stack([S.two_views(pairs.expand(3, 2, 3, 8, 8), split, a) for _ in range(300)])
    torch.testing.assert_close(views.mean((0, 2, 3, 4)) * 255, torch.tensor([10., 110, 200, 60, 160, 230]), rtol=0.06,
                               atol=0)
