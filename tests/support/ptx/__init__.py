"""Runs the PTX of Triton's and nvcc's kernels on the CPU: numpy arrays, an element per thread.

Every access is checked: it lies in elements of the views that the launch was given, is aligned,
reads nothing that nobody wrote, and races with no other warp's or block's. Barriers, shuffles and
matrix accesses need all the threads they are for. An instruction that is not known is an error. See
docs/gpu.md for what that proves.

``parse`` reads the text, ``memory`` holds bytes and who accessed them, ``arithmetic`` has what is
computed of values alone, ``instructions`` what every opcode does: ``moves`` from and to memory,
``threads`` together, ``values`` of a thread alone, each for an instruction as ``context`` has it.
``copies`` are asynchronous. ``machine`` runs blocks, ``storages`` has tensors in the place of a
device's memory, and ``launch`` launches of Triton in the place of a device.
"""
