"""The GPU's path without a GPU: the scripts' own train() on CUDA tensors that have shapes and no values.

tests/gpu is the real test. What can be known without a device is: every tensor of a step is on it (mixing devices
raises), nothing reads a value or copies from unpinned memory in a step (both wait for the GPU), autocast gives bfloat16
activations and a float32 loss. Backward does not run: autograd wants a driver before it starts.
"""
import argparse
import contextlib
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import simclr_deepaug as S
import simcse_deepaug as T
import topk_rescue as R
import vicreg_probe as V

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: tests/gpu runs on it")


class Waits(AssertionError):
    """The host would wait for the GPU."""


class PretendCuda(TorchDispatchMode):
    """Operators with a CUDA tensor, or that make one, run on shapes alone; all others run as ever."""
    def __init__(self):
        super().__init__()
        self.fake, self.strict = FakeTensorMode(allow_non_fake_inputs=True), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        on_cuda = [x for x in leaves if isinstance(x, FakeTensor)]
        if not on_cuda and not any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves):
            return func(*args, **kwargs)
        if name.startswith("_fused_"):                              # in place; torch has no shapes-only form of it
            return None
        if self.strict:
            if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"):
                raise Waits(f"{name} reads values")
            host = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
            blocking = name in ("_to_copy", "copy_") and not (kwargs.get("non_blocking") or args[2:] == (True,))
            to_host = torch.device(kwargs.get("device") or "cuda").type == "cpu"
            if blocking and (host or to_host):
                raise Waits(f"{name} of {[tuple(x.shape) for x in host or on_cuda]} between host and GPU")
            filled = name.startswith("index_put") and args[2].dim() == 0 and args[2].device.type == "cpu"
            if any(isinstance(i, FakeTensor) and i.dtype == torch.bool for i in tree_leaves(args[1:])) \
                    and name in ("index", "index_put", "index_put_") and not filled:          # a number: masked_fill
                raise Waits(f"{name} with a mask asks how many")
        with self.fake:
            return func(*args, **kwargs)


def moved(module, device, memory_format=None):
    """Module.to: parameters and buffers replaced by CUDA tensors of the same shape."""
    for m in module.modules():
        for table in (m._parameters, m._buffers):
            for name, value in table.items():
                if value is not None:
                    new = torch.empty(value.shape, dtype=value.dtype, device=device)
                    if memory_format and new.dim() == 4:
                        new = new.contiguous(memory_format=memory_format)
                    table[name] = nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
    return module


@pytest.fixture
def pretend():
    """The dispatch mode, entered, in a torch that believes in its GPU where it asks on the way."""
    patches = [mock.patch("torch.cuda._lazy_init", lambda: None),
               mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
               mock.patch("torch.cuda.is_bf16_supported", lambda *a, **k: True),
               mock.patch.object(torch.Tensor, "pin_memory", lambda self: self.clone()),
               mock.patch.object(nn.Module, "to", moved)]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield stack.enter_context(PretendCuda())


class Enough(Exception):
    pass


def three_steps(pretend, train, net, seen):
    """train() for three steps; from the second on nothing may wait. seen: output dtypes of the network, losses."""
    steps = []

    def backward(loss):
        seen.append(loss)
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    def on_step(*_):
        steps.append(1)
        pretend.strict = True                                       # constants are made and copied in the first step
        if len(steps) == 3:
            raise Enough
    hook = register_optimizer_step_post_hook(on_step)
    try:
        with mock.patch.object(torch.Tensor, "backward", backward), pytest.raises(Enough):
            train()
    finally:
        hook.remove()
        pretend.strict = False
    for loss in seen:
        assert loss.is_cuda and loss.dtype == torch.float32 and loss.dim() == 0
    assert len(seen) == 3


def outputs_of(net):
    """The dtypes that the network's forward returns from now on."""
    dtypes = []
    net.register_forward_hook(lambda m, i, out: dtypes.extend(x.dtype for x in tree_leaves(out)
                                                              if isinstance(x, torch.Tensor)))
    return dtypes


@pytest.mark.parametrize("flags", ["--arch resnet18 --views simclr",
                                   "--layer all --transform channel --views crop",
                                   "--layer 3 --optimizer lars --pairs cross",
                                   "--layer 3 --objective supervised --freeze before"])
def test_simclr(pretend, flags, tmp_path):
    """10,000 steps: a log step, which may wait, is then every 50th."""
    a = S.settings(["--layer", "none", *flags.split(), "--batch-size", "32", "--epochs", "2500"])
    a.layer, a.seed = a.layer[0], a.seed[0]
    split = S.Split(32, torch.zeros(128, dtype=torch.long, device=CUDA),
                    torch.zeros(128, 3, 32, 32, dtype=torch.uint8, device=CUDA))
    a.device = "cuda"
    net = S.build(a, split, list(range(20)))
    dtypes = outputs_of(net)
    with mock.patch.object(S, "save_checkpoint"):
        three_steps(pretend, lambda: S.train(a, net, split, tmp_path, dict, None), net, [])
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("flags", ["--layer 2 --blur 0.5", "--objective simclr --arch resnet18",
                                   "--objective supervised --views none"])
def test_vicreg(pretend, flags, tmp_path):
    a = V.settings([*flags.split(), "--batch-size", "32", "--epochs", "2500", "--no-compile"])
    a = argparse.Namespace(**{**vars(a), **{name: getattr(a, name)[0] for name in V.RUNS}})
    a.device, a.views, a.lr = "cuda", a.views or "simclr", 0.1
    split = V.Split(32, torch.zeros(128, dtype=torch.long, device=CUDA),
                    torch.zeros(128, 3, 32, 32, dtype=torch.uint8, device=CUDA))
    net = moved(V.Net(a, 32, 20), CUDA, torch.channels_last)
    dtypes, state = outputs_of(net), {"step": 0, "seconds": 0.0, "log": [], "probes": []}
    with mock.patch.object(V, "save_checkpoint"):
        three_steps(pretend, lambda: V.train(a, net, split, tmp_path, print, state), net, [])
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("flags", ["--rescue none --arch resnet18", "--strong deepaug",
                                   "--strong deepaug --rescue random --method mocov3 --k 8",
                                   "--strong deepaug --method dinov2 --centering centering --layer 2"])
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")    # a copy of the student becomes the teacher
def test_topk(pretend, flags, tmp_path):
    """Not with RandAugment: torchvision's geometric operations copy a small matrix to the device."""
    a = R.settings(["--rescue", "topk", *flags.split(), "--batch-size", "32", "--epochs", "2500", "--no-compile"])
    a = argparse.Namespace(**{**vars(a), **{name: getattr(a, name)[0] for name in R.RUNS}})
    a.k, a.device = 0 if a.rescue == "none" else a.k, "cuda"
    split = R.Split(32, torch.zeros(128, dtype=torch.long, device=CUDA),
                    torch.zeros(128, 3, 32, 32, dtype=torch.uint8, device=CUDA))
    rescue = R.build(a, split)
    with mock.patch.object(R, "save_checkpoint"):
        three_steps(pretend, lambda: R.train(a, rescue, split, tmp_path, dict, None), rescue, [])


@pytest.mark.parametrize("flags", ["--mlm --layer 0", "--layer all --transform channel",
                                   "--objective supervised --layer 3+13"])
def test_simcse(pretend, flags, tmp_path):
    a = T.settings([*flags.split(), "--batch-size", "8", "--epochs", "2500", "--eval-every", "0"])
    a.layer, a.seed, a.device, a.compile = a.layer[0], a.seed[0], "cuda", False
    tokenizer = T.learn_tokenizer(T.Grammar().sentences(100), 300)
    pairs = a.objective == "supervised"
    data = T.SimpleNamespace(tokens=torch.zeros(200 if pairs else 100, 32, dtype=torch.int32, device=CUDA),
                             scores=torch.zeros(100, device=CUDA) if pairs else None,
                             lengths=T.np.arange(100) % 9 + 4, tokenizer=tokenizer)
    net = T.build(a, tokenizer)
    with mock.patch.object(T, "save_checkpoint"):
        three_steps(pretend, lambda: T.train(a, net, data, tmp_path, {}, lambda tests: {}, None), net, [])


def test_the_alarm_works(pretend):
    x = torch.ones(4, device=CUDA)
    pretend.strict = True
    for waits in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.cpu(), lambda: torch.ones(4).to(CUDA),
                  lambda: bool(x.sum() > 0), lambda: x.tolist()):
        with pytest.raises(Waits):
            waits()
    with pytest.raises(RuntimeError, match="driver"):               # it copies where no mode sees it
        torch.tensor([1.0, 2.0], device=CUDA)
    torch.ones(4).pin_memory().to(CUDA, non_blocking=True)          # does not wait
    with pytest.raises(RuntimeError, match="device"):
        x + torch.ones(4)
