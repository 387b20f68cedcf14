"""The project itself: generated pages are current, examples run, files stay readable, other packages plug in."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spectraformer as sf
from spectraformer import registry
from spectraformer.catalogue import PAGES

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_made_from_the_code(name):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == PAGES[name](), "run `make docs`"


def test_the_page_of_variants_has_every_pair():
    page = (ROOT / "docs" / "variants.md").read_text(encoding="utf-8")
    table = [line.split("|")[1:-1] for line in page.splitlines() if re.match(r"\| (\w|\+)+ \| (U|B|D|L|–)", line)]
    assert len(table) == len(sf.COMPONENTS) and all(len(row) == len(sf.WEIGHTS) + 1 for row in table)


@pytest.mark.parametrize("component", sf.COMPONENTS)
def test_the_page_says_what_the_library_does(component):
    """Every refused pair raises, every other one builds; and the sign mark is that of the features."""
    rows = (ROOT / "docs" / "variants.md").read_text(encoding="utf-8").splitlines()
    header = next(line for line in rows if line.startswith("| f \\ W |")).split("|")[2:-1]
    cells = next(line for line in rows if line.startswith(f"| {component} |")).split("|")[2:-1]
    for weight, cell in zip(map(str.strip, header), map(str.strip, cells), strict=True):
        if cell == "–":
            with pytest.raises(ValueError, match="refused"):
                sf.FeatureMap(16, 32, component, weight)
            continue
        feature_map = sf.FeatureMap(16, 32, component, weight)
        assert feature_map.positive == (not cell.endswith("±")), weight
        assert cell[0] == feature_map.weight.claim.replace("vanishing", "biased")[0].upper(), weight


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_files_stay_readable(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert path.stem not in ("utils", "helpers", "common", "manager")


def test_data_flows_one_way():
    """Each module imports only from those above it in this order."""
    library = "checks ops weights components registry features attention packed multihead testing"
    benchmark = "config files baselines stretches model tasks checkpoint records interruption distributed randomness"
    benchmark += " captured evaluation nonfinite watch step train"
    order = f"{library} {benchmark} report inspection plan terminal sweep bench cli command".split()
    for path in SOURCES:
        parts = path.relative_to(ROOT / "src" / "spectraformer").with_suffix("").parts
        if parts[0] not in order:
            continue
        imported = set(re.findall(r"^from spectraformer\.(\w+)", path.read_text(encoding="utf-8"), re.M))
        below = [name for name in imported if name in order and order.index(name) > order.index(parts[0])]
        assert not below, f"{'/'.join(parts)} imports {below}"


def test_everything_public_is_documented():
    for name in sf.__all__:
        thing = getattr(sf, name)
        assert (thing.__doc__ or "").strip(), name
    assert re.fullmatch(r"\d+\.\d+\.\d+", sf.__version__)
    assert f"## {sf.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_library_needs_torch_alone():
    program = (
        "import sys, spectraformer, spectraformer.testing\n"
        "print(*sorted({'numpy', 'scipy', 'einops', 'hypothesis', 'pytest'} & set(sys.modules) - before))"
    )
    program = "import sys, torch\nbefore = set(sys.modules)\n" + program
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not run.stdout.strip()


@pytest.mark.parametrize("example", ["own_weight_matrix.py", "quickstart.py"])
def test_examples_run(example):
    run = subprocess.run([sys.executable, str(ROOT / "examples" / example)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_the_code_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["out"].shape == names["v"].shape


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Another package, installed: one weight matrix and one component function by entry points."""
    (tmp_path / "plugged.py").write_text(
        "from spectraformer.weights.gaussian import Gaussian\n"
        "from spectraformer.components.exponential import PosRF\n"
        "class Mine(Gaussian):\n    'A weight matrix of another package.'\n"
        "class MyFunction(PosRF):\n    'A component function of another package.'\n"
        "class Impostor(Gaussian):\n    'Takes a name that is taken.'\n"
    )
    info = tmp_path / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[spectraformer.weights]\nmy-weight = plugged:Mine\norf = plugged:Impostor\n"
        "[spectraformer.components]\nmyrf = plugged:MyFunction\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("plugged", None)


def test_other_packages_plug_in_by_entry_points(plugin):
    assert "my-weight" in sf.WEIGHTS and "myrf" in sf.COMPONENTS
    assert sf.parse_variant("myrf-my-weight") == ("myrf", "my-weight")
    feature_map = sf.FeatureMap(8, 16, "myrf", "my-weight")
    assert type(feature_map.weight).__name__ == "Mine" and type(feature_map.component).__name__ == "MyFunction"
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    assert sf.random_feature_attention(q, k, v, feature_map).isfinite().all()
    with pytest.raises(ValueError, match="did you mean 'my-weight'"):
        sf.FeatureMap(8, 16, "myrf", "my-wight")
    # Our own names stay ours.
    assert type(sf.FeatureMap(8, 16, "posrf", "orf").weight).__name__ == "Orthogonal"


def test_without_plugins_names_are_those_of_the_tables():
    assert list(sf.COMPONENTS)[:14] == list(registry.components.COMPONENTS)
    assert list(sf.WEIGHTS)[:19] == list(registry.weights.WEIGHTS)
    assert "my-weight" not in sf.WEIGHTS
    with pytest.raises(KeyError):
        sf.WEIGHTS["my-weight"]
