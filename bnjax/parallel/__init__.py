"""Where computations run: the mesh of devices, and several processes."""
