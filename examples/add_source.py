"""A motion source of your own: extend/sources/background.py, filled into a store and held against the ground truth.

    python examples/add_source.py
"""

from __future__ import annotations

from pathlib import Path

from clips import samples, world

import enhancer.sources

# the file belongs into enhancer/sources/; while you try it out, add its folder to that package's path instead
enhancer.sources.__path__.append(str(Path(__file__).parent / "extend" / "sources"))

from enhancer.agreement import agreement, mean_interval, on_grid, words_map  # noqa: E402
from enhancer.filling import fill_store, stored_prior  # noqa: E402
from enhancer.sources import SourceContext, build_source  # noqa: E402
from enhancer.video.clip import Sampling  # noqa: E402
from enhancer.world.truth import load_truth  # noqa: E402
from vdm_priors.store import PriorStore  # noqa: E402

clips, truth, store = samples("test"), load_truth(world()), PriorStore(world() / "priors")

for name in ("background", "frame_difference", "codec"):
    context = SourceContext(samples=clips, store=store, sampling=Sampling(frames=9), truth=truth)
    filled = fill_store(build_source(name, context), clips, store)  # what is stored already is not made again
    scores = []
    for sample, key in filled.rows:
        prior = stored_prior(store, key)
        evidence = truth.evidence(sample.video.name, sample.question, prior.words, prior.grid)
        known = evidence.sum(dim=(1, 2, 3)) > 0  # words that the ground truth speaks of
        words = [word for word, speaks in zip(prior.words, known.tolist(), strict=True) if speaks]
        found = on_grid(words_map(prior, words), prior.grid, prior.grid)
        scores.append(agreement(found, on_grid(evidence[known].mean(dim=0), prior.grid, prior.grid), prior.grid)["auc"])
    auc = mean_interval(scores)
    print(f"{name:17s} AUC {auc['mean']:.2f} [{auc['low']:.2f}, {auc['high']:.2f}] on {auc['n']} clips, "
          f"{filled.made} priors made, {filled.reused} found")
    for problem in filled.problems:
        print(f"  {problem.id}: {problem.reason}")
