"""One file per evaluator; the file name is its name on the command line."""
