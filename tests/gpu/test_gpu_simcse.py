"""What simcse_deepaug.py does differently on CUDA: no host sync in a step, bf16, a moved encoder. Else all skipped."""
import json

import pytest
import torch

import simcse_deepaug as T

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run on CUDA, and its folder."""
    here = tmp_path_factory.mktemp("run")
    (here / "lines.txt").write_text("\n".join(T.Grammar(0).sentences(512)))
    out = here / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        report = T.main(["--train-file", "lines.txt", "--epochs", "1", "--out", str(out), "--device", "cuda"])
    return here, out, report


def parts(here):
    """The pieces of train()'s step: settings, network on CUDA, token file, tokenizer."""
    a = T.settings(["--train-file", str(here / "lines.txt"), "--dropout", "0"])
    tokenizer = T.load_tokenizer(a, here / "none", here / "text")
    net = T.build(a, T.load_config(a), tokenizer, CUDA).train()
    return a, net, T.token_file(here / "lines.txt", tokenizer, 32, here / "text"), tokenizer


def test_a_run_trains_and_exports_on_cuda(run):
    _, out, report = run
    assert report["steps"] == 8 and report["export_difference"] <= 1e-4
    assert json.loads((out / "config.json").read_text())["device"] == "cuda"


def test_the_exported_encoder_moves_to_cuda_and_back(run):
    encoder = torch.jit.load(str(run[1] / "encoder.pt"))
    ids = torch.randint(5, 100, (7, 32))
    mask = (torch.arange(32) < torch.tensor([[32], [3], [8], [31], [2], [16], [20]])).long()
    on_cpu = encoder(ids, mask), encoder.activations(ids, mask)
    encoder.to("cuda")
    on_cuda = encoder(ids.to(CUDA), mask.to(CUDA)), encoder.activations(ids.to(CUDA), mask.to(CUDA))
    torch.testing.assert_close(on_cuda[0].cpu(), on_cpu[0], rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(on_cuda[1], on_cpu[1]):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)


def test_loss_and_gradient_equal_the_cpu(run):
    a, net, data, _ = parts(run[0])
    net.targets = []                                                 # dropout draws other masks on another device
    ids, mask = data.batch(torch.arange(16).repeat(2).numpy())
    results = []
    for device in (CUDA, torch.device("cpu")):
        net.to(device).zero_grad()
        loss = T.simcse_loss(*net(ids.to(device), mask.to(device)).chunk(2), a.temperature)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in net.parameters()
                                                if p.grad is not None])))
    (loss, gradient), (same, same_gradient) = results
    assert loss == pytest.approx(same, rel=1e-3)
    assert (gradient - same_gradient).norm() <= 1e-2 * same_gradient.norm() + 1e-6


def test_a_training_step_never_waits_for_the_gpu(run):
    """Batch, masks, both passes, losses, clipping and AdamW, as in train()."""
    a, net, data, tokenizer = parts(run[0])
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, a.lr, fused=True)
    special = torch.tensor(tokenizer.all_special_ids)
    batches = T.train_batches(data, 0, a, 0, len(data) // a.batch_size, 0, 1)

    def to_device(x):
        return x.pin_memory().to(CUDA, non_blocking=True)

    def step():
        _, ids, mask = next(batches)
        masked, places, targets = map(to_device, T.mask_tokens(ids, special, 0.15, tokenizer.mask_token_id,
                                                               len(tokenizer)))
        ids, mask = to_device(ids), to_device(mask)
        rows, others = torch.rand(2, len(ids), device=CUDA) < a.sample
        with torch.autocast("cuda", torch.bfloat16):
            z, logits = net(ids, mask, rows, masked, others, places)
        loss = T.simcse_loss(*z.chunk(2), a.temperature) + a.mlm_weight * T.mlm_loss(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.detach()

    losses = [step() for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses += [step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
