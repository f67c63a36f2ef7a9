"""Triton kernels. Triton comes with builds of torch for GPUs: nothing imports these modules where it is not used."""
