"""The job of the matrices, as `enhancer.jobs` finds it."""

from enhancer.experiment.run import run_compare, validate_compare
from enhancer.experiment.schema import CompareRecipe
from enhancer.jobs import Job

JOBS = {"compare": Job(schema=CompareRecipe, run=run_compare, validate=validate_compare)}
