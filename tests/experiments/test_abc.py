"""The AbC layout, its tasks, and the launcher's arguments; the scripts themselves run in
test_abc_scripts.py.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import standin

from concept_trak.attribution import multi_gpu
from concept_trak.attribution.naming import store_name
from concept_trak.attribution.task import AttributionTask
from concept_trak.attribution.train_grad import compute_gradients, open_store, train_grad
from concept_trak.datasets.encoded import EncodedData
from concept_trak.errors import UserError
from concept_trak.gradients.cuda_mask import generator_name
from concept_trak.parsing import parse_gpu_ids, parse_numbers
from concept_trak.settings import ROOT, resolve
from concept_trak.store.store import Store
from experiments.abc import evaluate, tasks
from experiments.scale import gradient_speed as bench_engine
from experiments.scale.literal_recipe import ReferenceImplementation


def write_json_files(root, cases, paths_a_kind=40):
    """json/ of a release with one entry more than the published tasks name, all prompts telling
    their own path.
    """
    prompts, kinds = {}, {"test_artchive": "object", "test_bamfg": "object"}
    (root / "json").mkdir(parents=True)
    for case in cases:
        group, entries = case.removeprefix("test_").split("_")[-1], []
        for number in range(max(tasks.MODELS[case]) + 2):
            synth = {
                kind: [
                    f"dataset/synth/{group}/{kind}/m{number}/samples/{i:05d}.png"
                    for i in range(paths_a_kind)
                ]
                for kind in ("gpt", kinds.get(case, "media"))
            }
            prompts |= {p: f"<new1> {p}" for ps in synth.values() for p in ps}
            entries.append(
                {
                    "exemplar": [],
                    "synth": synth,
                    "class_id": "x",
                    "category": None if group in ("artchive", "bamfg") else "fish",
                }
            )
        (root / f"json/{case}.json").write_text(json.dumps(entries))
    (root / "json/path_to_prompts.json").write_text(json.dumps(prompts))


def test_tasks_are_the_published_400_in_their_order(tmp_path):
    write_json_files(tmp_path, tasks.MODELS)
    made = tasks.make_tasks(tmp_path)
    assert len(made) == 400
    assert [t.test_case for t in made[:4]] == list(tasks.MODELS)
    assert [t.test_case_ind for t in made[80:84]] == [1, 1, 20, 12]
    assert [t.synth_image_path.split("/")[2] for t in made[36:44]] == ["gpt"] * 4 + [
        "object",
        "object",
        "media",
        "media",
    ]
    assert [t.seed for t in made[:16:4]] == [0, 4, 8, 12]
    assert (
        made[0].train_prompt == "A picture in the style of <new1> art"
        and made[2].train_prompt == "<new1> fish"
    )
    assert made[2].model_path == "models/imagenet/m0" and made[2].category == "fish"


def test_a_written_task_file_reads_back(tmp_path):
    write_json_files(tmp_path, ["test_artchive"])
    assert tasks.write_tasks(tmp_path, tmp_path / "configs/all.json") == 100
    assert tasks.read_tasks(tmp_path / "configs/all.json") == tasks.make_tasks(tmp_path)


def test_the_negative_prompt_drops_the_token_wherever_it_stands():
    def task(prompt):
        return tasks.Task("0.png", prompt, "c", 0, "m", "t", "art").negative_prompt

    assert (
        task("A <new1> fish") == "A fish"
        and task("<new1> fish") == "fish"
        and task("a <new1> among <new1> dinosaurs") == "a among dinosaurs"
    )


@pytest.mark.parametrize(
    "content, word",
    [("[{}]", "test_case_ind"), ("nonsense", "not JSON"), ("[3]", "test_case_ind"), ("{}", "list")],
)
def test_a_damaged_task_file_is_one_line(tmp_path, content, word):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=word):
        tasks.read_tasks(tmp_path / "t.json")


def test_missing_files_of_the_release_name_the_part_to_fetch(tmp_path):
    with pytest.raises(UserError, match="PARTS=json"):
        tasks.make_tasks(tmp_path)
    with pytest.raises(UserError, match="make_tasks.sh"):
        tasks.read_tasks(tmp_path / "none.json")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return standin.save_release(tmp_path_factory.mktemp("abc"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return standin.save_sd_standin(tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture(scope="module")
def attribution_task(release, sd):
    settings = resolve(
        "abc",
        {"sd_model_path": str(sd), "data_dir": str(release), "proj_dim": 300, "dtype": "fp32"},
    )
    return AttributionTask(settings, "cpu")


def test_encoded_rows_are_the_arrays_rows(attribution_task, release):
    x0, cond = attribution_task.data.batch(range(3, 5))
    assert len(attribution_task.data) == standin.ROWS
    assert np.array_equal(
        x0.numpy(), np.load(release / "laion_latents.npy")[3:5].astype(np.float32)
    )
    text = np.load(release / "laion_text_embeddings.npy")[3:5].astype(np.float32)
    assert np.array_equal(cond.embeddings.numpy(), text)
    assert attribution_task.train.captions[4] == "a dog number 4" and attribution_task.train.image(
        4
    ).size == (64, 64)


def test_num_train_bounds_the_rows_and_changes_the_content_hash(attribution_task, release):
    few = EncodedData(release, attribution_task.model, num_train=7)
    assert len(few) == 7 and len(few.pictures) == 7
    assert few.content_hash() != attribution_task.data.content_hash()


@pytest.mark.parametrize(
    "name, array, word",
    [
        ("laion_latents.npy", np.zeros((10, 4, 8, 8), np.float16), "10 rows but"),
        ("laion_latents.npy", np.zeros((80, 4, 16, 16), np.float16), "the model takes"),
        ("laion_text_embeddings.npy", np.zeros((40, 77, 1024), np.float16), "1024 wide"),
        ("laion_text_embeddings.npy", np.zeros((40, 77), np.float16), "3 dimensions"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, attribution_task, release, name, array, word):
    for file in ("laion_latents.npy", "laion_text_embeddings.npy"):
        (tmp_path / file).symlink_to(release / file)
    (tmp_path / name).unlink()
    np.save(tmp_path / name, array)
    with pytest.raises(UserError, match=word):
        EncodedData(tmp_path, attribution_task.model)


def test_a_truncated_array_is_refused(tmp_path, attribution_task, release):
    for file in ("laion_latents.npy", "laion_text_embeddings.npy"):
        (tmp_path / file).write_bytes((release / file).read_bytes()[:5000])
    with pytest.raises(UserError, match=r"remove it and make it: .* or fetch it \(some 20 GB\): "):
        EncodedData(tmp_path, attribution_task.model)


def test_missing_pictures_matter_only_when_they_are_shown(tmp_path, attribution_task, release):
    for file in ("laion_latents.npy", "laion_text_embeddings.npy"):
        (tmp_path / file).symlink_to(release / file)
    data = EncodedData(tmp_path, attribution_task.model)
    assert data.batch(range(2))[0].shape == (2, *standin.LATENT)
    with pytest.raises(UserError, match="PARTS=laion_subset"):
        _ = data.pictures


def test_recipe_reference_on_the_standin_equals_a_literal_computation(attribution_task):
    x0, cond = attribution_task.data.batch(range(2))
    got = compute_gradients(attribution_task, x0, cond, []).values
    want = ReferenceImplementation(
        attribution_task.model, attribution_task.cond_null, "attn2", 300, 0
    ).train_rows(x0, cond, 7.5)
    assert float(want.abs().max()) > 0
    assert bench_engine.row_error(got.numpy(), want.numpy()) < 1e-3


def test_abc_defaults_are_the_papers():
    s = resolve("abc", {})
    assert (s.recipe, s.f, s.nfe, s.ddim_inversion, s.normalize, s.train_guidance_scale) == (
        "reference",
        "dps",
        10,
        True,
        True,
        7.5,
    )
    assert (s.proj_type, s.proj_dim, s.num_split, s.eta, s.seed, s.layer, s.num_train) == (
        "random_mask",
        32768,
        16,
        0.1,
        0,
        "attn2",
        100_000,
    )
    assert store_name(s) == "attn2-dps-NFE10-norm-ddim-gs_7.5"
    assert s.on("cpu").dtype == "fp32" and s.on("cuda:0").dtype == "fp16"


def test_rows_of_another_seed_grid_or_lora_lie_elsewhere():
    names = {
        store_name(resolve("abc", o))
        for o in (
            {},
            {"proj_seed": 1},
            {"recipe": "default", "ddim_inversion": True, "f": "dps", "proj_type": "random_mask"},
            {"lora_path": "x.safetensors"},
            {"proj_dim": 100},
        )
    }
    assert len(names) == 5


@pytest.fixture
def released(attribution_task, tmp_path):
    """A task over a folder of raw shards without a manifest, as the release comes, and that
    folder.
    """
    rows = np.random.default_rng(0).standard_normal((standin.ROWS, 300)).astype(np.float32)
    settings = attribution_task.settings.but(grad_dir=str(tmp_path), proj_mask="a100")
    folder = tmp_path / store_name(settings)
    folder.mkdir()
    for i in range(2):
        rows[20 * i : 20 * i + 20].tofile(folder / f"train_grad-{i}.npy")
    return attribution_task.with_settings(settings), folder


def test_released_shards_are_adopted_with_the_mask_that_is_stated(released):
    attribution_task, folder = released
    store = open_store(attribution_task)
    assert (store.num_rows, store.layout) == (standin.ROWS, "raw")
    described = attribution_task.projection.describe()
    assert described["generator"] == generator_name("a100", attribution_task.projection.input_dim)
    assert store.identity["projection"] == described


def test_a_download_that_left_a_manifest_without_a_mask_is_adopted_on_first_use(released):
    attribution_task, folder = released
    Store.adopt_raw(folder, 300)
    assert "projection" in open_store(attribution_task).identity


def test_a_query_under_another_mask_is_refused_not_scored(released):
    attribution_task, _ = released
    open_store(attribution_task)
    with pytest.raises(UserError, match="PROJ_MASK=portable but"):
        open_store(
            attribution_task.with_settings(attribution_task.settings.but(proj_mask="portable"))
        )


def test_shards_whose_mask_is_not_clear_are_refused_with_the_reason(released):
    attribution_task, _ = released
    with pytest.raises(UserError, match="no mask clearly explains its columns"):
        open_store(attribution_task.with_settings(attribution_task.settings.but(proj_mask="auto")))


def test_more_released_rows_than_pictures_are_refused(released):
    attribution_task, folder = released
    np.zeros((10, 300), np.float32).tofile(folder / "train_grad-2.npy")
    with pytest.raises(UserError, match="so that both are of one release"):
        open_store(attribution_task)


def test_gpu_ids_are_numbers_or_cpus():
    assert parse_gpu_ids("0 1,2") == ["0", "1", "2"] and parse_gpu_ids("cpu cpu") == ["cpu", "cpu"]
    for bad in ("0 x", "1 1", "-1"):
        with pytest.raises(UserError, match="GPU_IDS"):
            parse_gpu_ids(bad)


def test_a_shards_process_gets_every_setting_and_its_own_place():
    settings = resolve("abc", {"gpu_ids": "0 3", "prompt": "a, b", "normalize": True})
    line = multi_gpu.command(settings, 5, "3")
    assert (
        line[line.index("--gpu_ids") + 1] == "3"
        and "--shards=5" in line
        and "--gpu-ids=" in line
        and "--prompt=a, b" in line
        and "--normalize=1" in line
    )
    assert "--cpu" in multi_gpu.command(settings, 5, "cpu") and "--device=cpu" in multi_gpu.command(
        settings, 5, "cpu"
    )


def test_a_shards_process_finds_its_folders_from_any_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = multi_gpu.command(resolve("emoji", {}), 0, "cpu")
    assert f"--data-dir={ROOT / 'data/emoji'}" in line
    folders = [
        flag.partition("=")[2] for flag in line if flag.startswith(("--grad-dir", "--sd-model"))
    ]
    assert len(folders) == 2 and all(Path(folder).is_absolute() for folder in folders)


def test_numbers_are_lists_and_ranges():
    assert parse_numbers("TASK_IDX", "3,7-9", 10, "tasks") == [3, 7, 8, 9]
    with pytest.raises(UserError, match="TASK_IDX='10' names 10"):
        parse_numbers("TASK_IDX", "10", 10, "tasks")


@pytest.fixture
def kept(attribution_task, tmp_path, monkeypatch):
    """changes of the settings -> (exemplar rows of a task, number of rows that were computed)."""
    made, compute = [], evaluate.compute_gradients
    monkeypatch.setattr(
        evaluate, "compute_gradients", lambda *a: made.append(len(a[1])) or compute(*a)
    )
    (tmp_path / "tasks.json").parent.mkdir(exist_ok=True)
    tasks.write_tasks(Path(attribution_task.settings.data_dir), tmp_path / "tasks.json")
    task = tasks.read_tasks(tmp_path / "tasks.json")[0]

    def rows(**changes):
        made.clear()
        fixed = {"grad_dir": str(tmp_path), "f": "dsm", "ddim_inversion": False, "nfe": 2}
        own = attribution_task.with_settings(attribution_task.settings.but(**fixed | changes))
        return evaluate.exemplar_rows(own, 0, task), sum(made)

    return rows


def test_exemplar_rows_are_kept_whatever_the_query_and_the_batch_size(kept):
    first, computed = kept()
    assert computed == len(first) > 1
    for change in ({"scope": "global"}, {"batch_size": 1}, {"eta": 0.9}, {"prompt": "a cat"}):
        again, computed = kept(**change)
        assert computed == 0 and (again == first).all(), change


@pytest.mark.parametrize("change", [{"proj_seed": 1}, {"normalize": False}, {"nfe": 3}], ids=str)
def test_exemplar_rows_of_other_settings_are_not_taken_for_these(change, kept):
    first, _ = kept()
    other, computed = kept(**change)
    assert computed == len(first) and (other != first).any()


TASK = {
    "synth_image_path": "synth/artchive/gpt/african/samples/00000.png",
    "prompt": "a <new1> cat",
    "test_case": "test_artchive",
    "test_case_ind": 0,
    "model_path": "models/artchive/african",
    "train_prompt": "a <new1>",
    "category": "art",
}
OUTSIDE = ["../../outside", "/etc", "models/../../outside", "a\0b", "x" * 300]


@pytest.mark.parametrize("path", OUTSIDE)
def test_the_model_of_a_task_lies_in_the_data_folder(release, path):
    settings = resolve("abc", {"data_dir": str(release)})
    with pytest.raises(UserError, match="the task's model .*(no path below|lies outside)"):
        evaluate.token_path(settings, tasks.Task(**TASK | {"model_path": path}))


@pytest.mark.parametrize("case", ["../../outside", "../laion_subset/../../x", "a\0b", "x" * 300])
def test_the_test_case_of_a_task_lies_in_the_data_folder(release, case):
    with pytest.raises(UserError, match="the test case .*(no path below|lies outside)"):
        tasks.exemplars(release, tasks.Task(**TASK | {"test_case": case}))


@pytest.mark.parametrize("path", ["../../x.jpg", "/etc/passwd", "dataset/../../x.jpg", 3, None])
def test_an_exemplar_lies_in_the_data_folder(tmp_path, path):
    (tmp_path / "json").mkdir()
    (tmp_path / "json/test_artchive.json").write_text(json.dumps([{"exemplar": [path]}]))
    with pytest.raises(UserError, match="entry 0: the exemplar .*(outside|no path below)"):
        tasks.exemplars(tmp_path, tasks.Task(**TASK))


@pytest.mark.parametrize(
    "field, value",
    [
        *(("test_case_ind", v) for v in (-1, True, "0", 1.0, None)),
        *(("synth_image_path", v) for v in ("a/b.png", "a/99999999999999999999.png", 7)),
        *((name, v) for name in ("prompt", "model_path", "category") for v in (None, 3, [])),
    ],
)
def test_a_value_that_a_task_cannot_have_is_named(tmp_path, field, value):
    (tmp_path / "t.json").write_text(json.dumps([TASK, TASK | {field: value}]))
    with pytest.raises(UserError, match=f"task 1: {field} is"):
        tasks.read_tasks(tmp_path / "t.json")


def captions_in_another_order(root):
    path = root / "laion_subset/captions.txt"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def pictures_exchanged(root):
    one, other = (root / f"laion_subset/images/{i:08d}.jpg" for i in (3, 4))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def a_picture_before_all(root):
    images = root / "laion_subset/images"
    (images / "00000000-new.jpg").write_bytes((images / "00000007.jpg").read_bytes())


@pytest.fixture(scope="module")
def first_time(release, sd, tmp_path_factory):
    """The settings of released rows that were shown with their pictures once."""
    root = tmp_path_factory.mktemp("first")
    shutil.copytree(release, root / "abc")
    given = {"sd_model_path": str(sd), "data_dir": str(root / "abc"), "num_split": 1}
    quick = {"recipe": "default", "f": "dsm", "proj_dim": 32, "num_train": 8, "nfe": 2}
    settings = resolve("abc", given | quick | {"grad_dir": str(root / "grads"), "dtype": "fp32"})
    train_grad(AttributionTask(settings, "cpu"))
    open_store(AttributionTask(settings, "cpu"))
    return settings


@pytest.mark.parametrize(
    "change", [captions_in_another_order, pictures_exchanged, a_picture_before_all]
)
def test_released_rows_are_not_shown_with_other_pictures_than_the_first_time(
    tmp_path, first_time, change
):
    for folder in (first_time.data_dir, first_time.grad_dir):
        shutil.copytree(folder, tmp_path / Path(folder).name)
    settings = first_time.but(data_dir=str(tmp_path / "abc"), grad_dir=str(tmp_path / "grads"))
    assert open_store(AttributionTask(settings, "cpu")).num_rows == 8
    change(tmp_path / "abc")
    with pytest.raises(UserError, match="not those of the first time.*laion_subset"):
        open_store(AttributionTask(settings, "cpu"))
