import pytest

from cemq.build import resolve_recipe
from cemq.errors import InputError
from cemq.pipelines.batches import read_conditions
from cemq.recipe import Recipe, find_calibration, load_recipe, make_recipe, recipe_for, recipe_names, shipped


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_every_shipped_recipe_is_valid_and_its_calibration_file_exists(name):
    recipe = load_recipe(name)
    assert recipe.model
    if recipe.calib:
        assert read_conditions(find_calibration(recipe.calib))
    assert recipe.model.startswith("builtin:") or "not yet run" in recipe.note


def test_the_shipped_prompts_are_many_and_differ():
    prompts = read_conditions(shipped("calib_data") / "prompts.txt")
    assert len(prompts) == len(set(prompts)) >= 190


def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: builtin:dit-digits\nbugdet: 10\n")
    with pytest.raises(InputError, match=r"unknown key .*'bugdet'.*did you mean 'budget'"):
        load_recipe(str(file))


def test_a_value_of_the_wrong_type_is_refused():
    with pytest.raises(InputError, match="steps='many' is wrong"):
        make_recipe({"steps": "many"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounding": "floor"}, "rounding='floor' is wrong: input should be 'gptq' or 'nearest'"),
        ({"low_rank": -1}, "low_rank=-1 is wrong"),
        ({"components": "transformer"}, "components='transformer' is wrong"),
        ({"bits_budget": "few"}, "bits_budget='few' is wrong"),
        ({"lowrank": 8}, "unknown key in settings 'lowrank'.*did you mean 'low_rank'"),
    ],
)
def test_wrong_settings_of_quantization_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        make_recipe(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tolerance": -0.1}, "tolerance=-0.1 is wrong"),
        ({"planning_samples": 0}, "planning_samples=0 is wrong"),
        ({"target_psnr": "high"}, "target_psnr='high' is wrong"),
        ({"sensitivity_points": 4}, "unknown key in settings 'sensitivity_points'"),
        ({"correcton": "drift"}, "unknown key in settings 'correcton'.*did you mean 'correction'"),
    ],
)
def test_wrong_settings_of_planning_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        make_recipe(fields)


def test_by_default_the_search_chooses_predictors_and_correction():
    recipe = Recipe()
    assert (recipe.solver, recipe.predictor, recipe.correction, recipe.effort) == ("search", "auto", "auto", "normal")
    assert (recipe.tolerance, recipe.target_psnr) == (0.15, None)


def test_settings_of_planning_are_read_from_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text("budget: auto\ntarget_psnr: 30.5\ncorrection: drift\neffort: thorough\n")
    recipe = load_recipe(str(tmp_path / "a.yaml"))
    assert (recipe.budget, recipe.target_psnr, recipe.correction, recipe.effort) == ("auto", 30.5, "drift", "thorough")


def test_settings_of_quantization_are_read_from_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text("rounding: nearest\nlow_rank: 8\nbits_budget: 5\ncomponents: [text_encoder]\n")
    recipe = load_recipe(str(tmp_path / "a.yaml"))
    assert (recipe.rounding, recipe.low_rank, recipe.bits_budget) == ("nearest", 8, 5.0)
    assert recipe.components == ["text_encoder"]


@pytest.mark.parametrize(("text", "message"), [("- a\n", "holds no settings"), ("a: [", "is not YAML")])
def test_a_malformed_file_is_refused(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_a_missing_file_and_an_unknown_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match=r"unknown recipe 'dit-digit'.*did you mean 'dit-digits'"):
        load_recipe("dit-digit")


def test_settings_win_over_the_recipe_and_the_recipe_over_the_defaults():
    plan = resolve_recipe("builtin:dit-digits", None, {"budget": "5x", "scheme": None, "call": {"guidance_scale": 1.5}})
    assert (plan.budget, plan.steps, plan.call, plan.samples) == ("5x", 50, {"guidance_scale": 1.5}, Recipe().samples)
    assert recipe_for("builtin:dit-digits") == "dit-digits"
    assert recipe_for("someone/something") is None


def test_a_recipe_may_be_used_for_another_model():
    plan = resolve_recipe("/some/folder", "dit-digits", {})
    assert (plan.model, plan.steps) == ("/some/folder", 50)


def test_no_model_is_refused():
    with pytest.raises(InputError, match="no model"):
        resolve_recipe(None, None, {})
