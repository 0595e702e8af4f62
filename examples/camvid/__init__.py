"""Segmentation of street scenes, trained, calibrated and evaluated with the fused ops.

    python -m examples.camvid --data CAMVID --quick --out runs/quick
    python -m examples.camvid --data CAMVID --study uper psp --quick --out runs/study
    torchrun --nproc-per-node 2 -m examples.camvid --data CAMVID --out runs/two

docs/camvid.md tells what it does and what came out.
"""
