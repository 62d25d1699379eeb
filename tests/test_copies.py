"""The scripts are copied alone, so what several of them need stands in each as the same text: this compares the texts.

Directly above a top-level definition (and its decorators) `# same text in: a.py, b.py` promises identical source.
"""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["simclr_deepaug.py", "simcse_deepaug.py", "vicreg_probe.py", "topk_rescue.py"]
MARK = re.compile(r"#\s*same text in:\s*(.*)")


def definitions(path: Path) -> dict:
    """{name: (text, files of its marker or None, line)} of the top-level def, class and assignment statements."""
    source = path.read_text(encoding="utf-8")
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        else:
            continue
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        mark = MARK.fullmatch(lines[first - 2].strip()) if first >= 2 else None
        files = sorted(f.strip() for f in mark[1].split(",")) if mark else None
        for name in names:
            found[name] = ("\n".join(lines[first - 1:node.end_lineno]), files, first)
    return found


def check(root: Path, scripts=SCRIPTS) -> list:
    """What is wrong with the copies in the scripts that exist, one line each; empty when all is well."""
    have = {s: definitions(root / s) for s in scripts if (root / s).exists()}
    wrong = []
    for script, names in have.items():
        loose = len([line for line in (root / script).read_text(encoding="utf-8").splitlines()
                     if MARK.fullmatch(line.strip())])
        marks = len({line for _, files, line in names.values() if files})
        if loose != marks:
            wrong.append(f"{script}: {loose - marks} marker(s) not directly above a top-level definition")
        for name, (text, files, line) in names.items():
            if files is None:
                continue
            where = f"{script}:{line} {name}"
            if script not in files:
                wrong.append(f"{where}: its marker does not list {script} itself")
            for other in files:
                if other not in scripts:
                    wrong.append(f"{where}: its marker lists {other}, which is no script")
                elif other in have and name not in have[other]:
                    wrong.append(f"{where}: missing in {other}")
                elif other in have and have[other][name][0] != text:
                    wrong.append(f"{where}: another text in {other}")
                elif other in have and have[other][name][1] != files:
                    wrong.append(f"{where}: the marker in {other} lists {have[other][name][1]}, not {files}")
    texts = {}
    for script, names in have.items():
        for name, (text, files, _) in names.items():
            if text.count("\n") >= 2 and text.lstrip().startswith(("def", "class", "async", "@")):
                texts.setdefault(text, []).append((script, name, files))
    for same in texts.values():
        bare = [f"{s} {n}" for s, n, files in same if files is None]
        if len({s for s, _, _ in same}) > 1 and bare:
            wrong.append(f"shared word for word without a marker: {', '.join(bare)}")
    return wrong


SHARED = "# same text in: a.py, b.py\n@property\ndef f(x):\n    y = x + 1\n    return y\n"
PLAIN = SHARED.split("\n", 1)[1]


@pytest.mark.parametrize("a, b, complaint", [
    (SHARED, SHARED, None),
    (SHARED, None, None),                                                          # b.py is not written yet
    (SHARED + "\n\ndef own():\n    a = 1\n    return a\n", SHARED, None),
    ("# same text in: a.py, b.py\nK = 200\n", "# same text in: a.py, b.py\nK = 200\n", None),
    ("def g():\n    pass\n", "def g():\n    pass\n", None),                        # two lines: too short to matter
    (SHARED, SHARED.replace("+ 1", "+ 2"), "another text in b.py"),
    (SHARED, SHARED.replace("@property\n", ""), "another text in b.py"),           # decorators belong to the text
    ("# same text in: a.py, b.py\nK = 200\n", "# same text in: a.py, b.py\nK = 100\n", "another text in b.py"),
    (SHARED, SHARED.replace("def f", "def g"), "missing in b.py"),
    (SHARED, "x = 1\n", "missing in b.py"),
    (SHARED, SHARED.replace("a.py, b.py", "a.py, b.py, c.py"), "the marker in b.py lists"),
    (SHARED, PLAIN, "the marker in b.py lists None"),
    (SHARED.replace("a.py, b.py", "b.py"), SHARED.replace("a.py, b.py", "b.py"), "does not list a.py itself"),
    (SHARED.replace("b.py", "d.py"), None, "which is no script"),
    (PLAIN, PLAIN, "without a marker: a.py f, b.py f"),
    ("class C:\n    x = 1\n    y = 2\n",) * 2 + ("without a marker",),
    (SHARED.replace("b.py\n", "b.py\n\n"), None, "not directly above"),            # a blank line between
    ("def f():\n    # same text in: a.py, b.py\n    x = 1\n", None, "not directly above"),
])
def test_checker_finds_each_kind_of_fault(tmp_path, a, b, complaint):
    for name, text in (("a.py", a), ("b.py", b)):
        if text is not None:
            (tmp_path / name).write_text(text)
    wrong = check(tmp_path, ["a.py", "b.py", "c.py"])
    assert any(complaint in w for w in wrong) if complaint else wrong == []


def test_copies_in_the_scripts_are_the_same_text():
    assert (ROOT / "simclr_deepaug.py").exists()
    assert check(ROOT) == []


def test_scripts_import_none_of_each_other_and_cka_only_inside_functions():
    """A script copied alone must start: of ours it imports at most cka.py, and that where it is used."""
    ours = {s.removesuffix(".py") for s in SCRIPTS}
    for script in [s for s in SCRIPTS + ["cka.py"] if (ROOT / s).exists()]:
        tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [node.module] if isinstance(node, ast.ImportFrom) else \
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not ours & set(names), f"{script}:{node.lineno}"
            assert "cka" not in names or node not in tree.body, f"{script}:{node.lineno}"
