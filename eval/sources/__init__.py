"""One file per form of evaluation data: each gives keys, labels and a way to read one picture."""
