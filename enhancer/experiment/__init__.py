"""`enhancer compare`: a matrix of students as one experiment with shared priors and trainings, and one report."""
