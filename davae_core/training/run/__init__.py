"""How any task is trained: the loop, its state, its processes."""
