"""Defaults < benchmark < recipe < what the user set; what does not exist is refused."""

import dataclasses
import json

import pytest

from concept_trak import settings
from concept_trak.errors import UserError
from concept_trak.models.text_to_image import DTYPES
from concept_trak.rows import objectives
from concept_trak.settings import DAMPINGS, REFERENCE, ROOT, as_dict, digest, provenance, resolve
from concept_trak.store.writer import STORED_TYPES


def test_what_the_user_sets_wins_over_recipe_benchmark_and_defaults():
    assert (
        resolve("emoji", {}).gen_guidance_scale
        == settings.EMOJI["gen_guidance_scale"]
        != settings.Settings().gen_guidance_scale
    )
    assert resolve("emoji", {"recipe": "reference"}).f == "dps"
    assert resolve("emoji", {"recipe": "reference", "f": "dsm"}).f == "dsm"
    assert resolve("emoji", {"gen_guidance_scale": 3.0}).gen_guidance_scale == 3.0


def test_recipe_reference_is_the_published_one():
    s = resolve("emoji", {"recipe": "reference"})
    assert {name: getattr(s, name) for name in REFERENCE} == REFERENCE
    assert (s.nfe, s.ddim_inversion, s.train_guidance_scale, s.proj_type) == (
        10,
        True,
        7.5,
        "random_mask",
    )


def test_dampings_are_nine_decades_around_a_tenth_of_the_mean_eigenvalue():
    assert len(DAMPINGS) == 9 and DAMPINGS[4] == pytest.approx(0.1)
    assert [b / a for a, b in zip(DAMPINGS, DAMPINGS[1:])] == pytest.approx([10] * 8)


@pytest.mark.parametrize(
    "overrides,word",
    [
        ({"recipe": "nonsense"}, "reference"),
        ({"damping": 0.2}, "DAMPING=0.2"),
        ({"scope": "nonsense"}, "global"),
        ({"f": "nonsense"}, "presence"),
        ({"dtype": "fp8"}, "bf16"),
        ({"store_dtype": "int8"}, "bfloat16"),
        ({"nfe": 1}, "NFE=1"),
        ({"epochs": 0}, "EPOCHS=0"),
        ({"batch_size": 0}, "BATCH_SIZE=0"),
        ({"proj_dim": -1}, "PROJ_DIM"),
        ({"top_k": 0}, "TOP_K"),
        ({"num_split": 0}, "NUM_SPLIT"),
        ({"gen_num_inference_steps": 1000}, "at most 999"),
        ({"eta": -0.1}, "ETA"),
        ({"eta": float("nan")}, "ETA"),
        ({"seed": -1}, "SEED"),
    ],
)
def test_values_that_do_not_exist_are_refused_by_name(overrides, word):
    with pytest.raises(UserError, match=word):
        resolve("emoji", overrides)


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(UserError, match="emoji"):
        resolve("nonsense", {})


def test_choices_are_those_of_the_modules_that_use_them():
    assert settings.CHOICES["f"] == ("contrast", "presence", "dps", "dsm", "dtrak", "das") and set(
        settings.CHOICES["f"]
    ) == set(objectives.TRAIN_OBJECTIVES)
    assert set(settings.CHOICES["dtype"]) == {"auto", *DTYPES} and set(
        settings.CHOICES["store_dtype"]
    ) == set(STORED_TYPES)


def test_recorded_settings_are_json_and_do_not_depend_on_where_the_repository_lies():
    recorded = as_dict(resolve("emoji", {}))
    assert set(recorded) == {f.name for f in dataclasses.fields(settings.Settings)}
    assert str(ROOT) not in json.dumps(recorded) and recorded["data_dir"] == "data/emoji"


def test_digest_depends_on_content_and_not_on_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    assert len(digest([])) == 10


def test_provenance_names_versions_python_machine_and_commit():
    made = provenance()
    assert set(made) == {"versions", "python", "machine", "git"}
    assert (
        made["versions"]["torch"]
        and made["versions"]["diffusers"]
        and set(made["versions"]) == set(settings.PACKAGES)
    )
    json.dumps(made)
