"""Multiple-choice evaluation and its statistics."""
