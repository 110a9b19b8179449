"""The package as a whole: light to import, floors kept, every public name real, the README's commands as run."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mmhooks
from mmhooks.errors import MMHooksError, UnknownSite

ROOT = Path(__file__).parent.parent
HEAVY = (
    "transformer_lens", "nnsight", "diffusers", "sentence_transformers", "datasets", "timm", "matplotlib",
    "open_clip", "transformers", "torchvision", "scipy", "pandas", "jinja2", "PIL",
)  # fmt: skip


def loaded_after(code: str) -> set[str]:
    """Top-level modules present after ``code`` ran in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(out.stdout.split())


def test_import_is_light() -> None:
    # Against torch's own import, so that what torch loads is not counted; names, not seconds: no flaking.
    extra = loaded_after("import mmhooks") - loaded_after("import torch")
    assert extra & set(HEAVY) == set()


def test_edits_need_torch_alone() -> None:
    extra = loaded_after("import mmhooks as mm; mm.FeatureSet; mm.Zero") - loaded_after("import torch")
    assert extra & {*HEAVY, "torchmetrics", "huggingface_hub", "rich", "typer"} == set()


@pytest.mark.parametrize("name", mmhooks.__all__)
def test_public_names_are_real(name: str) -> None:
    value = getattr(mmhooks, name)
    assert value is not None and name in dir(mmhooks)
    if name not in ("__version__",):
        assert (value.__doc__ or "").strip(), f"mm.{name} has no docstring"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="No mmhooks attribute maskk"):
        _ = mmhooks.maskk


def test_unknown_site_names_its_neighbours() -> None:
    error = UnknownSite("image.embd", ["image.embed", "text.embed", "image.pooled"], where="mini")
    assert isinstance(error, (MMHooksError, KeyError))
    assert "image.embed" in error.near and str(error).startswith(
        "no site of mini matches 'image.embd' (3 sites"
    )


def test_floors_are_kept() -> None:
    run = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    out = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "3 kept, 0 broken" in out.stdout


def test_floors_would_be_noticed(tmp_path: Path) -> None:
    """The contract bites: an import upwards, planted in a copy, breaks it."""
    import shutil

    shutil.copytree(
        ROOT / "mmhooks", tmp_path / "mmhooks", ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "mmhooks" / "hooks" / "features.py").open("a") as file:
        file.write("\n\ndef _up():\n    from mmhooks.report import Page\n    return Page\n")
    run = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    out = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert out.returncode != 0 and "mmhooks.hooks.features -> mmhooks.report" in out.stdout


def test_ruff_is_clean() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."], capture_output=True, text=True, cwd=ROOT
    )
    assert out.returncode == 0, out.stdout


def test_files_stay_readable() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for top in ("mmhooks", "recipes")
        for p in (ROOT / top).rglob("*.py")
        if (n := len(p.read_text().splitlines())) > (450 if p.parent.name == "measures" else 400)
    }
    # A measure is one file: its result, its metric and its function, with the arithmetic that belongs to it.
    assert long == {}


def test_no_exact_pins() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    assert wanted and [d for d in wanted if "==" in d] == []


def test_readme_commands_and_ci_agree() -> None:
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- test command -->\n+```bash\n(.+?)\n```", readme, re.S)
    assert block is not None and '".[test]"' in block.group(1) and "pytest" in block.group(1)
    awk = (ROOT / ".ci" / "run").read_text()
    program = re.search(r"awk '(.+?)' \"\$root/README.md\"", awk, re.S)
    assert program is not None
    out = subprocess.run(
        ["awk", program.group(1), str(ROOT / "README.md")], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == block.group(1).strip()


def test_readme_example_runs() -> None:
    """The fifteen lines, as printed: what is left of each embedding is what masking by hand leaves."""
    block = re.search(r"```python\n(.+?)\n```", (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    check = """
with torch.no_grad():
    x = model.encode_image(pixels)
    unit = x / x.norm(dim=-1, keepdim=True)
    f = sae.encode(unit)
    change = torch.where(imgd.mask, -f, torch.zeros(())) @ sae.W_dec
    print(torch.nn.functional.cosine_similarity(unit + change, unit).mean())
"""
    out = subprocess.run(
        [sys.executable, "-c", block.group(1) + check], capture_output=True, text=True, cwd=ROOT
    )
    assert out.returncode == 0, out.stderr
    shown, by_hand = (float(v) for v in re.findall(r"tensor\(([-0-9.]+)", out.stdout))
    assert abs(shown - by_hand) < 2e-4 and shown < 0.999


def test_readme_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    targets = [*re.findall(r"\]\(([^)#:]+)\)", text), *re.findall(r'src(?:set)?="([^":]+)"', text)]
    assert [t for t in targets if not (ROOT / t).exists()] == []


# -- the command -----------------------------------------------------------------------------------------------


def cli(*args: str) -> tuple[int, str]:
    app = importlib.import_module("mmhooks.cli").app
    result = CliRunner().invoke(app, list(args))
    return result.exit_code, result.output


def test_command_help_and_version() -> None:
    code, text = cli("--help")
    assert code == 0 and all(word in text for word in ("models", "sites", "pairs", "recipes/modality.py"))
    assert cli("--version") == (0, f"{mmhooks.__version__}\n")


@pytest.mark.parametrize("module", ["mmhooks", "mmhooks.cli"])
def test_the_command_without_its_script(module: str) -> None:
    out = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert (out.returncode, out.stdout) == (0, f"{mmhooks.__version__}\n")
    if module == "mmhooks":
        help = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT
        )
        assert "Usage: mmhooks " in help.stdout


def test_an_interrupt_ends_the_command_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mmhooks, "load", interrupted)
    code, text = cli("sites", "mini")
    assert code == 130 and "Traceback" not in text and len(text.strip().splitlines()) <= 1


def test_command_lists_models() -> None:
    code, text = cli("models")
    assert code == 0 and "mini-declip" in text and re.search(r"ViT-B-32 .*openai", text)


def test_command_lists_sites() -> None:
    code, text = cli("sites", "mini", "image.blocks.*.resid_post")
    assert code == 0 and text.split() == [f"image.blocks.{i}.resid_post" for i in range(6)]


def test_command_says_errors_in_one_sentence() -> None:
    code, text = cli("sites", "mini", "image.blocks.*.resid_pots")
    assert code == 1 and text.startswith("mmhooks: no site of") and "Traceback" not in text


def test_command_shows_pairs(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a black square\n")
    code, text = cli("pairs", f"{tmp_path}/")
    assert code == 0 and text.startswith("1 pairs") and "a black square" in text
    code, text = cli("pairs", f"{tmp_path}/nowhere/")
    assert code == 1 and text.startswith("mmhooks: ")


def underscored_imports(source: str, ours: set[str]) -> list[str]:
    """Underscored names that ``source`` takes from one of ``ours``, by importing them or as ``module._name``."""
    tree = ast.parse(source)
    taken, modules = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module in ours):
            taken += [f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name)]
            modules |= {a.asname or a.name for a in node.names if f"{node.module}.{a.name}" in ours}
        elif isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name in ours}
    return taken + [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr)
        if isinstance(node.value, ast.Name) and node.value.id in modules
    ]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_no_module_takes_an_underscored_name_of_another() -> None:
    files = [*(ROOT / "mmhooks").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    ours = {name.removeprefix("recipes.").removesuffix(".__init__") for name in names.values()}
    found = {
        names[p]: bad for p in files if (bad := underscored_imports(p.read_text(encoding="utf-8"), ours))
    }
    assert not found, f"give these names a public one: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "from a.b import _c",
        "from a.b import c, _c as d",
        "from .b import _c",
        "def f():\n    from a.b import _c",
        "from a import b\nb._c()",
        "from a import b as d\nd._c",
        "import top\ntop._c",
    ],
)
def test_every_way_to_take_an_underscored_name_is_found(source: str) -> None:
    assert underscored_imports(source, {"a", "a.b", "top"})
    assert not underscored_imports(source.replace("_c", "c"), {"a", "a.b", "top"})
    assert not underscored_imports(source.replace("_c", "__c__"), {"a", "a.b", "top"})
