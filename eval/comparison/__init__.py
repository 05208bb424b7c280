"""Comparing ways of pretraining at equal computing: plan, run, statistics, curves, words."""
