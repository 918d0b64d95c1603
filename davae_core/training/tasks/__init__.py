"""What is trained: one module for each stage, and the parts of a single one."""
