"""Recipes: every fault at once, overrides, defaults, and all shipped recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from enhancer.jobs import find_job, load_recipe
from enhancer.recipe import build, describe, differences, option, to_plain, to_yaml
from enhancer.recipe_files import apply_override, find_recipe, list_recipes, read_raw
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import changes
from vdm_priors.errors import RecipeError

MINIMAL = {"name": "t", "world": {}, "arms": [{"name": "lambda0"}, {"name": "vdm", "source": "vdm"}]}


@dataclass
class Inner:
    rate: float = option(0.1, "how fast", min=0, max=1)
    kind: str = option("a", "which", choices=("apple", "banana", "a"))


@dataclass
class Outer:
    name: str = option(help="its name", pattern="[a-z]+")
    steps: int = option(3, "how many", min=1)
    inner: Inner = option(Inner())
    maybe: Inner | None = option(None, "or nothing")
    items: list[Inner] = option([], "several")
    shares: dict[str, float] = field(default_factory=dict, metadata={"min": 0})
    numbers: list[int] | None = option(None)


def test_values_are_converted_and_defaults_filled():
    made = build(Outer, {"name": "x", "steps": 5, "inner": {"rate": 1}, "items": [{"kind": "banana"}], "maybe": {}})
    assert made == Outer("x", 5, Inner(1.0, "a"), Inner(), [Inner(0.1, "banana")])
    assert isinstance(made.inner.rate, float)
    assert build(Outer, {"name": "x"}).items is not build(Outer, {"name": "x"}).items


def test_all_faults_are_reported_together_with_path_and_nearest_key():
    raw = {"name": "X1", "stepz": 5, "inner": {"rat": 1, "kind": "aple", "rate": 7}, "items": [{"rate": "fast"}, 3],
           "steps": 0, "shares": {"a": -1}, "numbers": [1, "b"], "maybe": 4, "what_is_this": 1}
    with pytest.raises(RecipeError) as caught:
        build(Outer, raw)
    text = str(caught.value)
    for expected in ("stepz: unknown key; did you mean 'steps'?", "inner.rat: unknown key; did you mean 'inner.rate'?",
                     "inner.kind: must be one of apple, banana, a, not 'aple'; did you mean 'apple'?",
                     "inner.rate: must be between 0 and 1, not 7", "items.0.rate: must be a number, not 'fast'",
                     "items.1: must be a mapping of keys, not 3", "steps: must be at least 1, not 0", "name: must match [a-z]+",
                     "shares: must be at least 0, not -1", "numbers: must be a list of whole numbers or null",
                     "maybe: must be a mapping", "what_is_this: unknown key; known here: name, steps"):
        assert expected in text, (expected, text)
    assert "12 errors" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(value):
    with pytest.raises(RecipeError, match="finite"):
        build(Outer, {"name": "x", "inner": {"rate": value}})


def test_required_key():
    with pytest.raises(RecipeError, match=r"name: required, but missing \(its name\)"):
        build(Outer, {})


def test_overrides_reach_lists_by_name_and_number():
    raw = {"arms": [{"name": "vdm", "weight": 1}], "a": {"b": 1}}
    for override in ("arms.vdm.weight=0.5", "arms.0.source=oracle", "a.c.d=[1, 2]", "e=1e-3", "f=", "g=x=y", "h=null"):
        apply_override(raw, override)
    assert raw == {"arms": [{"name": "vdm", "weight": 0.5, "source": "oracle"}], "a": {"b": 1, "c": {"d": [1, 2]}},
                   "e": 1e-3, "f": "", "g": "x=y", "h": None}


@pytest.mark.parametrize("override, message", [
    ("noequals", "not of the form"), ("=3", "not of the form"), ("a.b.c=1", "a.b', which is a single value"),
    ("arms.nobody.weight=1", "has no element 'nobody' .it has vdm"), ("a=[1", "not readable YAML")])
def test_bad_overrides(override, message):
    with pytest.raises(RecipeError, match=message):
        apply_override({"arms": [{"name": "vdm"}], "a": {"b": 1}}, override)


@pytest.mark.parametrize("text, message", [("a: [1", "not a readable recipe"), ("- 1", "is not a recipe"), ("a: 1\na: 2", "duplicate")])
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_raw(path)


def test_enhance_recipe_checks_between_keys():
    raw = {"name": "t", "arms": [{"name": "a", "source": "none", "weight": 1}, {"name": "a", "source": "oracle"}], "seeds": [1, 1]}
    with pytest.raises(RecipeError) as caught:
        build(EnhanceRecipe, raw)
    for expected in ("arms.a: the name is used 2 times", "arms.a.weight: an arm without a prior", "ground truth", "data.root: required",
                     "seeds: needs one or more different"):
        assert expected in str(caught.value)


def test_a_mode_given_later_counts_more_than_its_keys_in_the_file(tmp_path):
    raw = read_raw(find_recipe("quickstart"), ["teacher.extraction.mode=kept_keys"])  # harvest_at: noise in the file
    extraction = build(EnhanceRecipe, raw).teacher.extraction
    assert (extraction.harvest_at, extraction.memory_from, extraction.mode) == ("denoise", "inversion", None)
    assert yaml.safe_load(to_yaml(build(EnhanceRecipe, raw)))["teacher"]["extraction"]["mode"] is None


@pytest.mark.parametrize(("overrides", "found"), [
    (["mode=kept_keys", "guidance=3"], {"guidance": 3.0, "memory_from": "inversion", "harvest_at": "denoise"}),
    (["guidance=3", "mode=kept_keys"], {"guidance": 1.0, "memory_from": "inversion", "harvest_at": "denoise"}),
    (["mode=inversion", "reconstruction=true"], {"harvest_at": "inversion", "reconstruction": True}),
    (["mode=kept_keys", "steps=3"], {"steps": 3, "guidance": 1.0, "memory_from": "inversion"}),
    (["mode=kept_keys", "mode=plain"], {"guidance": 1.0, "memory": False}),
    (["mode=plain", "mode=null"], {"harvest_at": "denoise"}),
])
def test_of_a_mode_and_a_key_in_overrides_the_later_counts(overrides, found):
    raw = read_raw(find_recipe("quickstart"), ["teacher.extraction={}"])
    for override in overrides:
        apply_override(raw, f"teacher.extraction.{override}")
    extraction = build(EnhanceRecipe, raw).teacher.extraction
    assert {name: getattr(extraction, name) for name in found} == found


@pytest.mark.parametrize(("keys", "message"), [
    ({"mode": "inversion", "reconstruction": True},
     "teacher.extraction: mode: inversion stands for reconstruction: false, but beside it is reconstruction: true"),
    ({"mode": "quick"}, "teacher.extraction: mode must be one of paper, no_guidance"),
    ({"mode": [1]}, "teacher.extraction: mode must be one of paper"),
])
def test_a_mode_and_a_key_against_it_in_a_file(keys, message):
    raw = read_raw(find_recipe("quickstart"))
    raw["teacher"]["extraction"] = keys
    with pytest.raises(RecipeError) as error:
        build(EnhanceRecipe, raw)
    assert message in str(error.value) and "1 error" in str(error.value)


def test_a_mode_elsewhere_is_a_key_like_others():
    raw = {"adapter": {"mode": "a", "memory": 1}}
    apply_override(raw, "adapter.mode=plain")
    assert raw == {"adapter": {"mode": "plain", "memory": 1}}


def test_yaml_round_trip():
    recipe = build(EnhanceRecipe, MINIMAL)
    assert build(EnhanceRecipe, yaml.safe_load(to_yaml(recipe))) == recipe
    assert recipe.weight(recipe.arms[0]) == 0 and recipe.weight(recipe.arms[1]) == 1.0


def test_changes_between_runs_of_a_folder():
    old = to_plain(build(EnhanceRecipe, MINIMAL))
    more = to_plain(build(EnhanceRecipe, {**MINIMAL, "seeds": [0, 1], "threads": 2, "arms": [*MINIMAL["arms"], {"name": "new"}]}))
    assert changes(old, more) == []
    other = to_plain(build(EnhanceRecipe, {**MINIMAL, "training": {"steps": 7}, "arms": [{"name": "vdm", "source": "vdm", "weight": 2}]}))
    assert changes(old, other) == ["training.steps: 400 -> 7", "arms.vdm.weight: None -> 2.0"]
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []


def test_find_recipe_by_path_and_name(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # away from the repository's own recipes
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "evidence.yaml").write_text("# Purpose: shows it\nname: x\n")
    (tmp_path / "plain.yaml").write_text("# just this\n")
    assert [(r.name, r.purpose) for r in list_recipes(tmp_path)] == [("plain", "just this"), ("world/evidence", "shows it")]
    assert find_recipe("world/evidence", tmp_path) == find_recipe("recipes/world/evidence.yaml", tmp_path)
    assert find_recipe(str(tmp_path / "plain.yaml")) == tmp_path / "plain.yaml"
    with pytest.raises(RecipeError, match="Did you mean 'world/evidence'"):
        find_recipe("world/evidense", tmp_path)


def test_unknown_job():
    with pytest.raises(RecipeError, match="did you mean 'enhance'"):
        find_job("enhanse")


SHIPPED = list_recipes()


def test_there_are_shipped_recipes():
    assert "quickstart" in [recipe.name for recipe in SHIPPED]


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda r: r.name)
def test_shipped_recipes_are_valid_and_have_their_header(recipe):
    load_recipe(recipe.path)
    header = [line for line in recipe.path.read_text().splitlines() if line.startswith("#")]
    for part in ("Purpose:", "Command:", "Hardware:", "Minutes:", "Expected:"):
        assert any(part in line for line in header), part
    with pytest.raises(RecipeError, match="nonsense: unknown key"):
        load_recipe(recipe.path, ["nonsense=1"])


RATES = ("learning_rate_llm", "learning_rate_merger", "learning_rate_vision")


def test_default_learning_rates_are_the_papers():
    training = build(EnhanceRecipe, MINIMAL).training
    assert [getattr(training, rate) for rate in RATES] == [1e-5, 1e-5, 2e-6]  # METHOD.md: MotionEnhancer, section on training
    assert (training.weight_decay, training.warmup, training.schedule) == (0.1, 0.03, "cosine")


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda r: r.name)
def test_recipes_that_train_the_small_student_say_its_learning_rates(recipe):
    raw = read_raw(recipe.path)
    other = raw["job"] in ("world_teacher", "compare", "adapter", "adapter_probe")
    if other or raw.get("student", {}).get("model", "world") != "world":
        return
    training = raw["training"]["training"] if raw["job"] == "world_student" else raw["training"]
    assert all(training[rate] >= 1e-4 or training[rate] == 0 for rate in RATES)  # 0 freezes; small ones are for large models


def test_every_key_of_the_reference_has_a_help_text():
    rows = describe(EnhanceRecipe)
    assert len(rows) > 60
    assert [row.path for row in rows if not row.help] == []
    paths = [row.path for row in rows]
    assert "arms.<name>.weight" in paths and "teacher.extraction.steps" in paths


def test_quickstart_file_is_commented():
    lines = Path(find_recipe("quickstart")).read_text().splitlines()
    leaves = [line for line in lines if line.strip() and not line.startswith("#")]
    assert sum("#" in line for line in leaves) > len(leaves) / 2
