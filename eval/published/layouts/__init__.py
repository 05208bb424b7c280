"""One file per way in which published sets lie on disk: each holds `read(tree, split, published) -> Listing`.

What `options` a layout takes from a split is in its docstring. A layout names every picture that belongs to the split,
whether it is there or not; `registry` looks which are, joins and checks.
"""
