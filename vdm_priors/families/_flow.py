"""Flow models' schedules, read off diffusers' schedulers.

The default sampler of a model may be of a higher order or random (UniPC, ancestral). The flow itself is the same
ordinary differential equation, and Euler's method on the sampler's own σ grid follows it both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from vdm_priors.errors import ModelError
from vdm_priors.schedules import FlowSchedule


def require_flow(scheduler: Any, name: str) -> None:
    """Raises ModelError for a scheduler that does not say a flow's σ down to 0."""
    config = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return
    wanted = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "final_sigmas_type": "zero"}
    wrong = {key: config.get(key) for key, value in wanted.items() if config.get(key) != value}
    if wrong:
        raise ModelError(
            f"The teacher {name} has the scheduler {type(scheduler).__name__} with {wrong}, which is no flow's; "
            f"inversion needs {wanted} in its scheduler_config.json, or a FlowMatchEulerDiscreteScheduler."
        )


def flow_schedule(
    scheduler: Any, options: Callable[[int], dict[str, Any]] | None = None, fewest_steps: int = 1
) -> FlowSchedule:
    """The σ grid of a scheduler, set as the model's pipeline sets it.

    `options(steps)` are the pipeline's arguments of `set_timesteps`, the number of steps unless said. Where σ is
    counted from noise to the clip (`invert_sigmas`), it is turned round and the timesteps are kept.
    """
    total = int(scheduler.config.num_train_timesteps)
    turned = bool(scheduler.config.get("invert_sigmas", False))

    def grid(steps: int) -> tuple[list[float], list[float]]:
        scheduler.set_timesteps(**(options(steps) if options else {"num_inference_steps": steps}))
        sigmas = scheduler.sigmas.double().tolist()
        return scheduler.timesteps.tolist(), [1 - sigma for sigma in sigmas] if turned else sigmas

    def timestep_of(sigma: float) -> float:
        return (1 - sigma if turned else sigma) * total

    return FlowSchedule(grid, timestep_of, total, fewest_steps)
