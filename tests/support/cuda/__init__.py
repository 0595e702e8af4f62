"""Runs CUDA C++ without a device: emulated by g++, and nvcc's PTX of the same source.

``sources`` compiles for the two and for counts, ``emulation`` calls what g++ built, ``proof`` runs
one call of a C interface everywhere, ``mutations`` plants bugs to see them found, ``resources``
counts registers and instructions. See docs/gpu.md for what that proves.
"""
