"""Objectives: a network and its loss in one module; a batch in, losses out: `loss` is trained, the rest is logged."""
