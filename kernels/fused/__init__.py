"""Triton kernels, one op a file; installed as `pyglobenc.kernels`."""
