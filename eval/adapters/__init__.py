"""Small trained additions to a frozen trunk.

Each is a module with only its own parameters, called as `adapter(trunk, images) -> features B D`: the trunk is shared
by all of them, and neither its weights nor its gradients change.
"""
