"""Runs the PTX of Triton kernels on the CPU: numpy arrays, an element per thread.

Every access is checked: it lies in elements of the views that the launch was given, is aligned,
reads nothing that nobody wrote, and races with no other warp's or block's. Barriers, shuffles and
matrix accesses need all the threads they are for. An instruction that is not known is an error. See
docs/gpu.md for what that proves.

``parse`` reads the text, ``memory`` holds bytes and who accessed them, ``arithmetic`` has what is
computed of values alone, ``instructions`` everything else by opcode, ``machine`` runs blocks, and
``launch`` does so in the place of a device.
"""
