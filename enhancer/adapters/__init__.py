"""Codec adapters in recipes: reading clips by groups of pictures, training in stages, evaluation with controls."""
