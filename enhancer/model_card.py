"""The model card (README.md) of an exported student: what it was trained on, aligned to, and how it scored."""

from __future__ import annotations

from pathlib import Path

import yaml

from enhancer.recipe_schema import CONTROL
from enhancer.runfolder import read_json
from enhancer.table import BASE, percent

NAME = "README.md"
LOADING = '''```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```'''


def model_card(run: Path, place: Path, name: str, difference: float) -> str:
    """The card's text, from the files of a run and of one of its students (<run>/arms/<arm>/seed<k>).

    difference: largest difference of the exported logits from the trained student's.
    """
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    record, trained = read_json(run / "run.json", {}), read_json(place / "train.json", {})
    arm = next(arm for arm in recipe["arms"] if arm["name"] == place.parent.name)
    base = recipe["student"]["model"]
    header = {"library_name": "transformers", "pipeline_tag": "video-text-to-text",
              "tags": ["motion-enhancer", "video"]}
    if "/" in base and not Path(base).is_dir():
        header["base_model"] = base
    parts = [f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {name}",
             f"`{base}`, fine-tuned by motion-enhancer: arm `{arm['name']}`, seed {trained.get('seed')}, of the run "
             f"`{recipe['name']}`. A plain transformers checkpoint: nothing of the training's alignment is in it.",
             LOADING.format(name=name),
             "## Data\n\n" + _data(recipe, record, trained),
             "## Motion prior\n\n" + _prior(recipe, arm, trained),
             "## Training\n\n" + _training(recipe["training"], trained, difference),
             "## Scores\n\n" + _scores(run, place, arm),
             "## Recipe\n\n```yaml\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) + "```",
             "Versions: " + ", ".join(" ".join(pair) for pair in record.get("versions", {}).items()) + "."]
    return "\n\n".join(parts) + "\n"


def _data(recipe: dict, record: dict, trained: dict) -> str:
    data = recipe["data"]
    where = f"`{data['train']}` of `{data['root']}`" if data["root"] else "the synthetic world of the recipe below"
    digest = record.get("hashes", {}).get("train")
    sampling = recipe["student"]["sampling"]
    rate = f", {sampling['frames']} a clip"
    if sampling["fps"]:
        rate = f", at most {sampling['frames']} at {sampling['fps']:g} a second"
    return (f"{trained.get('samples')} samples of {where}" + (f" (SHA-256 {digest[:16]})" if digest else "")
            + f"; {trained.get('left_out', 0)} were left out. Frames: evenly spaced{rate}.")


def _prior(recipe: dict, arm: dict, trained: dict) -> str:
    if arm["source"] == CONTROL:
        return "None: trained on the answers alone (λ = 0)."
    source, aligned = trained.get("prior_source"), recipe["training"]["alignment"]
    text = (f"Attention aligned to the source `{source}` with λ = {trained.get('lambda'):g} ({aligned['schedule']}), "
            f"loss `{aligned['loss']}`, aligner `{aligned['aligner']}`, "
            f"compared on the {aligned['compare_on']}'s grid.")
    if "vdm" in str(source):
        text += f" Teacher: `{recipe['teacher']['model']}`, conditioned on the {recipe['teacher']['text']}."
    return text


def _training(settings: dict, trained: dict, difference: float) -> str:
    lora = settings.get("lora")
    rates = ", ".join(f"{part} {settings[f'learning_rate_{part}']:g}" for part in ("llm", "merger", "vision"))
    adapted = f" LoRA of rank {lora['rank']} on {', '.join(lora['parts'])}, merged." if lora else ""
    return (f"{settings['steps']} steps of {settings['batch_size']} × {settings['accumulate']} samples a process, peak "
            f"learning rates {rates}, weight decay {settings['weight_decay']:g}, {settings['schedule']}.{adapted} The "
            f"exported model's logits differ from the trained one's by at most {difference:g}.")


def _scores(run: Path, place: Path, arm: dict) -> str:
    rows = []
    students = [("this model", place), ("base model", run / BASE)]
    others = sorted(other for other in run.glob("arms/*/seed*") if other != place)
    students += [(f"`{other.parent.name}`, {other.name}", other) for other in others]
    for called, folder in students:
        overall = read_json(folder / "scores.json", {}).get("overall")
        if overall and overall["accuracy"] is not None:
            interval = f"{percent(overall['low'])} to {percent(overall['high'])}"
            rows.append(f"| {called} | {overall['n']} | {percent(overall['accuracy'])} | {interval} |")
    if not rows or not rows[0].startswith("| this model"):
        return "Not evaluated in its run."
    head = "| | questions | accuracy | 95% interval (Wilson) |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n\nThe test questions of the run's data; intervals are over questions, not seeds."
