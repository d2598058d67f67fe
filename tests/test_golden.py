"""What a rebuilding must not change: rows, scores, rankings, names of folders, files and variables,
defaults, exit statuses.

`tests/golden/` was written by `python tests/test_golden.py` before the library had packages.
On the processor that wrote it, rows must agree to 1e-6 of their norm and rankings exactly; another
processor rounds otherwise, there it is 1e-3. A change that is meant is written the same way, and
its commit says which value changed and why.
"""

import json
import platform
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from concept_trak import cli
from concept_trak.attribution.answer import answer
from concept_trak.attribution.task import AttributionTask
from concept_trak.report.write import attribute
from concept_trak.scoring.ranking import ranking
from concept_trak.settings import PRESETS, ROOT, as_dict, resolve

GOLDEN = Path(__file__).parent / "golden"
PICTURES, EVERY = 8, 8  # rows that are compared, and the step over their features


def machine():
    """What decides how a sum is rounded."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((s.partition(":")[2].strip() for s in lines if s.startswith("model name")), "")
    return {
        "cpu": name or platform.processor(),  # a cloud's says little of the generation
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__.partition("+")[0],
    }


def known():
    return json.loads((GOLDEN / "expected.json").read_text())


def tolerance():
    return 1e-6 if known()["machine"] == machine() else 1e-3


def few_pictures(folder):
    """The first training pictures of the embedded data, in a folder of their own."""
    lines = (ROOT / "data/emoji/metadata.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["split"] == "train"][:PICTURES]
    for line in kept:
        name = json.loads(line)["file_name"]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "data/emoji" / name, folder / name)
    (folder / "metadata.jsonl").write_text("\n".join(kept) + "\n")


def rows_of(recipe, folder):
    """(name of the store, its files, rows [8, k]) as `train-grad` writes them."""
    data, grads = folder / "data", folder / recipe
    if not data.exists():
        few_pictures(data)
    flags = [f"--data-dir={data}", f"--grad-dir={grads}", f"--recipe={recipe}", "--num-split=2"]
    pipeline = ROOT / "data/emoji/pipeline"
    model = f"--sd-model-path={pipeline}"
    assert cli.main(["train-grad", "--device=cpu", "--store-dtype=float32", model, *flags]) == 0
    (store,) = grads.iterdir()
    rows = np.concatenate([np.load(store / f"train_grad-{i}.npy") for i in range(2)])
    return store.name, sorted(p.name for p in store.iterdir()), rows


def files_below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def surface():
    """Names and defaults of every variable for each benchmark, and every script."""
    defaults = {name: as_dict(resolve(name, {})) for name in PRESETS}
    scripts = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "scripts").rglob("*.sh"))
    return {"defaults": defaults, "scripts": scripts}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("recipe", ["reference", "default"])
def test_rows_of_a_recipe_are_those_of_before(recipe, tmp_path, one_thread):
    name, files, rows = rows_of(recipe, tmp_path)
    expected, golden = known()["rows"][recipe], np.load(GOLDEN / "arrays.npz")[f"rows_{recipe}"]
    assert (name, files, list(rows.shape)) == tuple(expected[k] for k in ("name", "files", "shape"))
    error = np.linalg.norm(rows[:, ::EVERY] - golden, axis=1) / np.linalg.norm(golden, axis=1)
    assert error.max() <= tolerance()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), expected["norms"], rtol=tolerance())


def test_defaults_variables_and_scripts_are_those_of_before():
    found, before = surface(), known()["surface"]
    for benchmark, settings in before["defaults"].items():
        assert {k: found["defaults"][benchmark][k] for k in settings} == settings
    assert set(before["scripts"]) <= set(found["scripts"])


def test_scores_rankings_and_files_of_a_prompt_are_those_of_before(tmp_path, one_thread):
    """The committed store is accepted; the ranking is exact where rounding is the same."""
    task = AttributionTask(
        resolve("emoji", {"results_dir": str(tmp_path), "render_leastk": True}), "cpu"
    )
    task.settings = task.settings.but(grad_dir=str(tmp_path / "none"))
    base = attribute(task).parent
    expected, arrays = known(), np.load(GOLDEN / "arrays.npz")
    added = {f"{folder}/scores.{kind}" for folder in expected["folders"] for kind in ("csv", "npy")}
    assert set(files_below(base)) == {*expected["files"], *added}
    for i, folder in enumerate(expected["folders"]):
        kept = np.load(base / folder / "concept_grad.npy")
        golden = arrays["concept"][i : i + 1]
        error = np.linalg.norm(kept[:, ::EVERY] - golden) / np.linalg.norm(golden)
        assert error <= tolerance()
        record = json.loads((base / folder / "metrics.json").read_text())
        if tolerance() < 1e-3:
            before = expected["metrics"][folder]
            assert {k: record[k] for k in before} == before
    found = np.stack([concept.scores for concept in answer(task).concepts], 1)
    scale = np.abs(arrays["scores"]).max(-1, keepdims=True)
    assert (np.abs(found - arrays["scores"]) / scale).max() <= 100 * tolerance()
    if tolerance() < 1e-3:
        assert (ranking(found) == ranking(arrays["scores"])).all()


def rewrite(folder):
    """Write tests/golden/ from what the library does now."""
    torch.set_num_threads(1)
    rows = {recipe: rows_of(recipe, folder) for recipe in ("reference", "default")}
    results = folder / "results"
    task = AttributionTask(
        resolve("emoji", {"results_dir": str(results), "render_leastk": True}), "cpu"
    )
    base = attribute(task).parent
    folders = sorted(p.parent.name for p in base.rglob("concept_grad.npy"))
    records = {name: json.loads((base / name / "metrics.json").read_text()) for name in folders}
    apart = ("settings", "provenance")
    kept = {n: {k: v for k, v in r.items() if k not in apart} for n, r in records.items()}
    described = {
        recipe: {
            "name": name,
            "files": files,
            "shape": list(x.shape),
            "norms": np.linalg.norm(x, axis=1).tolist(),
        }
        for recipe, (name, files, x) in rows.items()
    }
    expected = {"machine": machine(), "surface": surface(), "rows": described, "metrics": kept}
    expected |= {"files": files_below(base), "folders": folders}
    (GOLDEN / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
    grads = [np.load(base / name / "concept_grad.npy")[:, ::EVERY] for name in folders]
    arrays = {f"rows_{recipe}": x[:, ::EVERY] for recipe, (_, _, x) in rows.items()}
    arrays |= {"concept": np.concatenate(grads)}
    scores = np.stack([concept.scores for concept in answer(task).concepts], 1)
    np.savez_compressed(GOLDEN / "arrays.npz", scores=scores, **arrays)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        rewrite(Path(temporary))
