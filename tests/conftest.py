"""Shared by all tests: one thread (this suite's nets are tiny, and tests may share the machine), real data if there."""
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch is imported; child processes inherit it

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

def same_bits(a, b) -> bool:
    """Two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b

class Trap:
    """Unpickled, it runs code."""
    def __reduce__(self):
        return eval, ("open('sprung', 'w')",)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test downloads anything: what tries hears that there is no network."""
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("the tests have no network")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


@pytest.fixture
def refused(request, capsys):
    """refused(words): main(words) of the module's SCRIPT leaves with code 2, one line on stderr (a bar may have wiped
    itself away) and no new file here but in runs/text, where sentences are prepared, and an empty folder data, which
    torchvision makes before it downloads. Returns the line."""
    script = request.module.SCRIPT

    def files():
        passed = [Path("runs"), *(p for p in Path().glob("data") if p.is_dir() and not any(p.iterdir()))]
        return sorted(p for p in Path().rglob("*") if Path("runs/text") not in (p, *p.parents) and p not in passed)

    def call(words):
        before = files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            script.main([str(w) for w in words])
        lines = [line.rsplit("\r")[-1] for line in capsys.readouterr().err.split("\n") if line.strip()]
        assert end.value.code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{script.NAME}.py: error: ")
        assert files() == before, "a refused command wrote something"
        return lines[0]
    return call


@pytest.fixture
def cli(tmp_path):
    """cli("simclr_deepaug.py", "--layer", "9") -> finished process (text), run as a user would, in tmp_path."""
    def call(script, *words, timeout=300, env=None):
        return subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], cwd=tmp_path, text=True,
                              capture_output=True, timeout=timeout, env={**os.environ, **(env or {})})
    return call


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A folder of 240 drawn pictures, 32x32 PNG in four class folders: a run on them takes seconds."""
    from PIL import Image

    import simclr_deepaug as S
    root = tmp_path_factory.mktemp("few")
    images, labels = S.draw_shapes(1200, 0, "cpu")
    for c in range(4):
        (root / f"class{c}").mkdir()
        for i, picture in enumerate(images[labels == 5 * c][:60]):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(root / f"class{c}" / f"{i:02}.png")
    return root


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """A folder with the real data sets restored by ../shared/data/unpack.py; skips where it is missing."""
    if not (SHARED / "unpack.py").exists():
        pytest.skip("no ../shared/data: real data is not here")
    to = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(SHARED / "unpack.py"), "--to", str(to), "cifar-100", "cifar-10"], check=True,
                   capture_output=True)
    return to


@pytest.fixture(scope="session")
def real_data_or_none(request):
    return request.getfixturevalue("real_data") if (SHARED / "unpack.py").exists() else None
