"""What is particular to a device: how much is worked on at a time, and the kernels for GPUs in Triton."""
