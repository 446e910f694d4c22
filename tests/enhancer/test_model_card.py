"""The card says what the run's files say, and no more."""

from __future__ import annotations

import yaml

from enhancer.evaluation.scores import summarise
from enhancer.model_card import model_card
from enhancer.recipe import build, to_yaml
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import write_json, write_text

ARMS = [{"name": "lambda0"}, {"name": "vdm", "source": "vdm", "weight": 0.5}]
ROW = {"id": "a", "question_type": "MR", "answer": "left", "options": ["left", "up"]}


def write_run(folder, evaluated=True, **training):
    raw = {"name": "mine", "data": {"root": "clips"}, "student": {"model": "Qwen/Qwen2.5-VL-3B-Instruct"},
           "training": {"steps": 7, **training}, "arms": ARMS}
    write_text(folder / "recipe.yaml", to_yaml(build(EnhanceRecipe, raw)))
    write_json(folder / "run.json", {"hashes": {"train": "c0ffee" * 10}, "versions": {"torch": "2.15.0"}})
    for arm, weight, right in (("vdm", 0.5, 3), ("lambda0", 0.0, 2)):
        place = folder / "arms" / arm / "seed3"
        write_json(place / "train.json", {"lambda": weight, "seed": 3, "samples": 40, "left_out": 2,
                                          "prior_source": "vdm" if weight else None})
        if evaluated:
            rows = [{**ROW, "predicted": "left" if n < right else "up", "correct": n < right} for n in range(4)]
            write_json(place / "scores.json", summarise(rows))
    return folder / "arms" / "vdm" / "seed3"


def test_card_of_an_aligned_student(tmp_path):
    place = write_run(tmp_path, lora={"rank": 8})
    text = model_card(tmp_path, place, "my-model", 0.0)
    _, header, body = text.split("---", 2)
    assert yaml.safe_load(header)["base_model"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    for expected in ('from_pretrained("my-model")',
                     "40 samples of `train.json` of `clips` (SHA-256 c0ffeec0ffeec0ff); 2 were left",
                     "source `vdm` with λ = 0.5 (constant), loss `l2`", "Teacher: `world`", "7 steps of 32 × 1 samples",
                     "LoRA of rank 8 on llm, merged", "| this model | 4 | 75.0% |", "| `lambda0`, seed3 | 4 | 50.0% |",
                     "torch 2.15.0"):
        assert expected in body, (expected, body)
    recipe = body.split("```yaml\n")[1].split("```")[0]
    assert build(EnhanceRecipe, yaml.safe_load(recipe)).training.lora.rank == 8


def test_card_of_the_control_and_without_scores(tmp_path):
    place = write_run(tmp_path, evaluated=False)
    text = model_card(tmp_path, place.parent.parent / "lambda0" / "seed3", "m", 1e-6)
    assert "None: trained on the answers alone" in text and "Not evaluated" in text and "at most 1e-06" in text
    assert "LoRA" not in text.split("## Recipe")[0]
