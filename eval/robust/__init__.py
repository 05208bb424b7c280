"""How the robustness sets of ImageNet-1k are scored: a rule a file (eval/evaluators/robustness.py)."""
