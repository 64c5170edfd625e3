"""Operators behind fastgrad: block-wise gradient statistics, sparse gradients and updates.

This package depends on torch alone (Triton kernels are loaded on machines that can run them)
and knows nothing of the ``fastgrad`` package above it. Import the operators from
``fastgrad_kernels.ops``; ``reference`` holds their plain definitions in float64.
"""
