"""Work of single commands that is more than a call."""
