"""Tensors in, tensors out: the mathematics of a run, on torch and numpy alone.

Shape suffixes: M prompts, N candidates, E ensemble members, T tokens, B pairs, D features, V vocabulary.
"""
