"""Objectives: a network and its loss in one module, batch in, dict of losses out; `loss` is trained, the rest is logged."""
