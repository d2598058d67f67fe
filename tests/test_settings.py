"""Defaults < benchmark < recipe < what the user set; what does not exist is refused by name."""

import copy
import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from concept_trak import settings
from concept_trak.attribution import prompts
from concept_trak.errors import UserError
from concept_trak.gradients import projectors
from concept_trak.gradients.cuda_mask import GPUS
from concept_trak.models.text_to_image import DTYPES
from concept_trak.registry import BENCHMARKS, OBJECTIVES, RANKERS, Registry
from concept_trak.settings import (
    DAMPINGS,
    REFERENCE,
    ROOT,
    Settings,
    as_dict,
    flat_fields,
    names,
    provenance,
    resolve,
    short_hash,
)
from concept_trak.store.dtypes import STORED_TYPES


def option(name):
    return next(f.metadata["option"] for f in flat_fields() if f.name == name)


def test_all_results_lie_in_results_dir_but_those_beside_a_default():
    for benchmark in ("emoji", "own", "abc"):
        given = resolve(benchmark, {})
        folder = settings.results_folder(given, "cad")
        assert folder == settings.ROOT / f"experiments/{benchmark}/results/cad"
        for place in ("x", "x/qual", "/x", "experiments/results", "../experiments/qual"):
            own = settings.results_folder(given.but(results_dir=place), "cad")
            assert own == Path(place) / "cad"


def test_what_the_user_sets_wins_over_recipe_benchmark_and_defaults():
    default, emoji = Settings().gen_guidance_scale, settings.EMOJI["gen_guidance_scale"]
    assert resolve("emoji", {}).gen_guidance_scale == emoji != default
    assert resolve("emoji", {"gen_guidance_scale": 5.5}).gen_guidance_scale == 5.5
    assert resolve("emoji", {"nfe": 4}).nfe == 4 != resolve("emoji", {}).nfe
    reference = resolve("emoji", {"recipe": "reference"})
    assert reference.f == "dps" and reference.nfe == REFERENCE["nfe"] != settings.EMOJI["nfe"]
    assert resolve("emoji", {"recipe": "reference", "f": "dsm"}).f == "dsm"


def test_recipe_reference_is_the_published_one():
    s = resolve("emoji", {"recipe": "reference"})
    assert {name: getattr(s, name) for name in REFERENCE} == REFERENCE
    published = (10, True, 7.5, "random_mask")
    assert (s.nfe, s.ddim_inversion, s.train_guidance_scale, s.proj_type) == published


def test_dampings_are_nine_decades_around_a_tenth_of_the_mean_eigenvalue():
    assert len(DAMPINGS) == 9 and DAMPINGS[4] == pytest.approx(0.1)
    assert [b / a for a, b in pairwise(DAMPINGS)] == pytest.approx([10] * 8)


# --- what is refused


@pytest.mark.parametrize(
    "overrides,word",
    [
        (
            {"recipe": "nonsense"},
            "RECIPE='nonsense' is unknown; set RECIPE to one of default, reference",
        ),
        ({"damping": 0.2}, "DAMPING=0.2"),
        ({"damping": float("nan")}, "DAMPING=nan"),
        ({"scope": "nonsense"}, "global"),
        ({"f": "nonsense"}, "F='nonsense' is unknown; set F to one of .*presence"),
        ({"dtype": "fp8"}, "bf16"),
        ({"store_dtype": "int8"}, "bfloat16"),
        (
            {"query_form": "slide"},
            "QUERY_FORM='slide' is unknown; set QUERY_FORM to one of slider, cfg, concept",
        ),
        ({"blocks": "layer"}, "BLOCKS"),
        (
            {"proj_type": "gauss"},
            "PROJ_TYPE='gauss' is unknown; set PROJ_TYPE to one of identity, .*logra",
        ),
        (
            {"proj_mask": "a1000"},
            "PROJ_MASK='a1000' is unknown; set PROJ_MASK to one of auto, portable, a100",
        ),
        (
            {"proj_backend": "jax"},
            "PROJ_BACKEND='jax' is unknown; set PROJ_BACKEND to one of own, dattri, trak",
        ),
        ({"nfe": 1}, "NFE=1"),
        ({"epochs": 0}, "EPOCHS=0"),
        ({"batch_size": 0}, "BATCH_SIZE=0"),
        ({"proj_dim": -1}, "PROJ_DIM"),
        ({"top_k": 0}, "TOP_K"),
        ({"num_split": 0}, "NUM_SPLIT"),
        ({"gen_num_inference_steps": 1000}, "at most 999"),
        ({"eta": -0.1}, "ETA"),
        ({"eta": float("nan")}, "ETA=nan"),
        ({"gen_guidance_scale": float("inf")}, "GEN_GUIDANCE_SCALE=inf"),
        ({"seed": -1}, "SEED"),
        ({"max_memory": "6XB"}, "MAX_MEMORY='6XB' is not a size"),
        ({"shards": "one"}, "SHARDS='one' is not a list"),
        ({"shards": "4"}, "SHARDS='4' names 4 but there are only 4 shards"),
        ({"task_idx": "3-1"}, "TASK_IDX='3-1' is not a list"),
        ({"gpu_ids": "0 one"}, "GPU_IDS='0 one' names 'one'"),
        (
            {"methods": "das,tracin"},
            "METHODS names 'tracin'; set METHODS to some of .*concept_trak",
        ),
    ],
)
def test_values_that_do_not_exist_are_refused_by_name(overrides, word):
    with pytest.raises(UserError, match=word):
        resolve("emoji", overrides)


PLACES = {f.name for f in flat_fields() if f.metadata["option"].place}


def test_a_path_that_is_needed_is_never_the_working_folder():
    """All that are texts with a default, and name no word, number or choice."""
    told = {f.name: f.metadata["option"] for f in flat_fields() if f.type == "str" and f.default}
    words = ("prompt", "target_concepts", "layer", "max_memory", "task_idx", "selection")
    words += ("listen_host",)
    assert PLACES == {name for name, o in told.items() if not o.choices} - {*words}


@pytest.mark.parametrize("name", sorted(PLACES))
@pytest.mark.parametrize("empty", ["", " ", "\n"])
@pytest.mark.parametrize("benchmark", ["emoji", "own", "abc"])
def test_an_empty_path_is_refused(name, empty, benchmark):
    with pytest.raises(UserError, match=f"^{name.upper()} is empty.*unset {name.upper()}$"):
        resolve(benchmark, {name: empty})


def test_values_with_an_inner_grammar_are_kept_as_they_were_written():
    given = {"shards": "1, 2-3", "max_memory": "500 MB", "methods": "das,trak", "gpu_ids": "0,1"}
    assert given.items() <= as_dict(resolve("emoji", given)).items()


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(
        UserError, match="benchmark 'nonsense' is unknown; set --benchmark to one of emoji"
    ):
        resolve("nonsense", {})


def test_choices_are_those_of_the_modules_that_use_them():
    assert option("f").allowed() == OBJECTIVES.names()
    assert set(OBJECTIVES.names()) == {
        *("contrast", "contrast_llr", "presence", "dps", "dsm", "dtrak", "das", "das_mean")
    }
    assert {"concept_trak", "trak", "d_trak", "das"} <= set(RANKERS.names())
    assert "emoji" in BENCHMARKS.names()
    assert set(option("dtype").choices) == {"auto", *DTYPES}
    assert set(option("store_dtype").choices) == set(STORED_TYPES)
    assert option("query_form").choices == prompts.QUERY_FORMS
    assert set(option("proj_type").choices) == {*projectors.KINDS, "logra"}
    assert option("proj_mask").choices == ("auto", "portable", *GPUS)
    assert set(option("recipe").choices) == set(settings.RECIPES)


@pytest.mark.parametrize("benchmark", settings.PRESETS)
def test_every_setting_says_what_it_is_and_allows_its_defaults(benchmark):
    for field in flat_fields():
        about = field.metadata["option"]
        assert about.help and "\n" not in about.help
        assert type(field.default).__name__ == field.type
        about.check(field.name.upper(), getattr(resolve(benchmark, {}), field.name))


# --- by stage, and flat


def test_a_setting_is_read_by_its_stage_and_by_its_own_name():
    s = resolve("emoji", {"layer": "attn1", "top_k": 3})
    assert s.rows.layer == s.layer == "attn1" and s.report.top_k == s.top_k == 3
    assert len(set(names())) == len(flat_fields()) and not set(names()) & settings.SECTIONS.keys()
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = s.no_such_field
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.rows.layer = "attn2"


def test_a_copy_has_the_changes_and_nothing_else():
    s = resolve("emoji", {"layer": "attn1"})
    changed = s.but(f="dsm", normalize=False)
    assert (changed.f, changed.normalize, s.f, s.normalize) == ("dsm", False, "contrast_llr", True)
    differing = {k for k, v in as_dict(changed).items() if as_dict(s)[k] != v}
    assert differing == {"f", "normalize"} and changed.but(f=s.f, normalize=True) == s
    assert Settings.of(s.flat()) == s
    with pytest.raises(TypeError, match="no_such_field"):
        s.but(no_such_field=1)


def test_settings_reach_a_spawned_process_as_they_are():
    s = resolve("abc", {"prompt": "a cat"})
    assert copy.deepcopy(s) == s
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(as_dict, (s,)) == as_dict(s)


def test_auto_dtype_is_decided_by_the_device():
    s = resolve("abc", {})
    assert (s.dtype, s.on("cpu").dtype, s.on("cuda:1").dtype) == ("auto", "fp32", "fp16")
    assert resolve("abc", {"dtype": "bf16"}).on("cpu").dtype == "bf16"


# --- registries


def test_an_objective_of_ones_own_is_allowed_while_it_is_registered():
    with OBJECTIVES.temporary("toy", object()):
        assert resolve("emoji", {"f": "toy"}).f == "toy"
    with pytest.raises(UserError, match="F='toy' is unknown"):
        resolve("emoji", {"f": "toy"})


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry whose home registers 1 as "one"."""
    (tmp_path / "home_of_one.py").write_text("import registries\nregistries.NUMBERS.add('one', 1)")
    module = type(sys)("registries")
    module.NUMBERS = Registry("NUMBER", "home_of_one")
    monkeypatch.setitem(sys.modules, "registries", module)
    monkeypatch.syspath_prepend(tmp_path)
    yield module.NUMBERS
    sys.modules.pop("home_of_one", None)


def test_the_home_of_a_registry_is_imported_when_it_is_first_asked(registry):
    registry.add("two", 2)
    assert registry.get("two") == 2 and "home_of_one" not in sys.modules
    assert registry.get("one") == 1 and registry.names() == ("two", "one")
    with pytest.raises(UserError, match="NUMBER='three' is unknown; set NUMBER to one of two, one"):
        registry.get("three")


def test_a_name_is_registered_once_and_a_temporary_entry_leaves_no_trace(registry):
    with registry.temporary("three", 3):
        assert registry.names() == ("three", "one")  # the home is imported inside the block
    assert registry.names() == ("one",)
    with registry.temporary("one", "another"):
        assert registry.get("one") == "another"
    assert registry.get("one") == 1
    with pytest.raises(ValueError, match="'one' is registered twice"):
        registry.register("one")(11)


# --- paths


def test_the_embedded_data_bring_their_own_model(tmp_path):
    def model(**given):
        return resolve("emoji", {"data_dir": str(tmp_path), **given}).sd_model_path

    assert model() == str(ROOT / "data/emoji/pipeline")
    (tmp_path / "pipeline").mkdir()
    assert model() == str(tmp_path / "pipeline")
    assert model(sd_model_path="mine") == "mine"
    other = resolve("own", {"data_dir": str(tmp_path)})
    assert other.sd_model_path == Settings().sd_model_path


def test_paths_are_given_from_the_checkout_or_from_where_an_installed_package_is_called(tmp_path):
    package, folder = tmp_path / "lib/concept_trak", tmp_path / "elsewhere"
    shutil.copytree(Path(settings.__file__).parent, package, ignore=shutil.ignore_patterns("__py*"))
    folder.mkdir()
    told = (
        "from concept_trak.settings import *; print(ROOT, EMOJI['data_dir'], provenance()['git'])"
    )

    def root():
        run = [sys.executable, "-c", told]
        env = os.environ | {"PYTHONPATH": str(package.parent)}
        return subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True).stdout

    assert root() == f"{folder} {folder}/data/emoji None\n"
    (package.parent / "pyproject.toml").touch()
    assert root().startswith(f"{package.parent} {package.parent}/data/emoji")


def test_recorded_settings_are_json_and_do_not_depend_on_where_the_repository_lies():
    recorded = as_dict(resolve("emoji", {}))
    assert set(recorded) == set(names()) and recorded["proj_backend"] == "own"
    assert str(ROOT) not in json.dumps(recorded) and recorded["data_dir"] == "data/emoji"


def test_digest_depends_on_content_and_not_on_order():
    assert (
        short_hash({"a": 1, "b": 2}) == short_hash({"b": 2, "a": 1}) != short_hash({"a": 1, "b": 3})
    )
    assert len(short_hash([])) == 10


def test_provenance_names_versions_python_machine_and_commit():
    made = provenance()
    assert set(made) == {"versions", "python", "machine", "git"}
    assert made["versions"]["torch"] and made["versions"]["diffusers"]
    assert set(made["versions"]) == set(settings.PACKAGES)
    json.dumps(made)
