"""What a prior's file says by itself: its own words' maps, scores of words and heads, how it was made."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from enhancer.visualize.students import stored_maps
from enhancer.visualize.views import METRICS, SOURCE, TEACHER, ClipView, HeadsView
from enhancer.visualize.words import stored_curves, word_views
from vdm_priors.errors import RecipeError
from vdm_priors.extract import ExtractionSettings
from vdm_priors.prior import MotionPrior


def settings_of(prior: MotionPrior) -> ExtractionSettings | None:
    """The settings that a prior was made with; None if this version does not know them."""
    recorded = prior.provenance.get("settings") or {}
    if set(recorded) - {f.name for f in fields(ExtractionSettings)}:
        return None
    try:
        settings = ExtractionSettings(**recorded)
        settings.validate()
    except (RecipeError, TypeError, ValueError):
        return None
    return settings


def stored_view(prior: MotionPrior, name: str) -> ClipView:
    """What a prior's file alone can show."""
    facts = prior.provenance
    source = str(facts.get("source") or "prior")
    words = word_views(prior)
    if source == "vdm" and (settings := settings_of(prior)):
        curves = stored_curves(prior, settings)
        for word in words:
            word.curve = curves.get((word.start, word.end))
    places = [n for n, word in enumerate(words) if word.selected]
    kind, shown = (TEACHER, "teacher") if source == "vdm" else (SOURCE, source)
    maps = stored_maps(shown, kind, prior.grid, prior.maps.numpy(), places, len(words), "the prior's own words only")
    view = ClipView(
        name,
        prior.text,
        [float(t) for t in facts.get("seconds") or []],
        None,
        words,
        [maps],
        heads=stored_heads(prior),
        provenance=facts,
    )
    view.facts = _facts(prior, source)
    if not facts.get("word_scores"):
        view.lacks("tokens", f"No motion scores: the source {source} makes none.")
    if view.heads is None:
        view.lacks(
            "heads",
            "No head scores: "
            + ("head selection was off." if source == "vdm" else f"the source {source} has no heads."),
        )
    return view


def stored_heads(prior: MotionPrior) -> HeadsView | None:
    """Head scores of a prior's provenance as rows of layers; one row where it does not say how many heads a layer
    has."""
    scores = prior.provenance.get("head_scores")
    if not isinstance(scores, dict) or not all(scores.get(name) for name in (*METRICS, "selected")):
        return None
    count, heads = len(scores["selected"]), prior.provenance.get("attention_heads")
    by_layer = (prior.provenance.get("settings") or {}).get("head_scope") == "layer_head"
    if not by_layer:
        rows = ["mean over layers"]
    elif heads and count % heads == 0:
        listed = (prior.provenance.get("settings") or {}).get("layers") or range(count // heads)
        rows = [f"layer {layer}" for layer in listed]
    else:
        rows = ["all layers, one after another"]
    shape = (len(rows), count // len(rows))
    metrics = {name: np.array(scores[name], np.float64).reshape(shape) for name in METRICS}
    return HeadsView(
        rows, metrics, np.array(scores["selected"], bool).reshape(shape), list(range(len(rows))), prior.grid
    )


def _facts(prior: MotionPrior, source: str) -> list[tuple[str, str]]:
    facts = prior.provenance
    frames, rows, columns = prior.grid.shape
    shown = [
        ("source", source if not facts.get("model") else f"{source}, {facts['model']}"),
        ("prior", f"{len(prior.words)} words × {frames} latent frames × {rows} × {columns} cells"),
    ]
    settings = facts.get("settings") or {}
    told = [
        f"{name.replace('_', ' ')} {settings[name]}"
        for name in ("steps", "guidance", "harvest_at", "direction", "head_scope")
        if name in settings
    ]
    if told:
        shown.append(("settings", ", ".join(told)))
    confidence = facts.get("confidence") or {}
    measured = [
        f"{name} {confidence[name]['prior']:.2f}"
        for name in ("concentration", "mobility")
        if isinstance(confidence.get(name), dict)
    ]
    if measured:
        shown.append(("confidence (0 to 1)", ", ".join(measured)))
    if facts.get("not_covered"):
        shown.append(("beyond the teacher's text limit", ", ".join(map(str, facts["not_covered"]))))
    return shown
