"""Evaluators and the report: a run folder -> results.jsonl -> one HTML page."""
