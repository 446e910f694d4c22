"""What people run: recipes, data, motion sources, training, evaluation, reports, the CLI."""
