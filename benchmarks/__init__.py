"""Side-by-side timings and memory of DA-VAE and of what a user would run instead. Run by ``dev.py bench``.

    cases.py     what is compared with what
    sides.py     each side of a comparison: builds its model and gives the call to be timed
    core.py      the models in bare torch
    route.py     the same models in a real ComfyUI
    others.py    what other packages offer
    cost.py      operations and bytes of a call, from its shapes
    timing.py    sides in turn, medians and spread
    memory.py    peak of a call; `fresh.py` runs one side alone in a process of its own
    bounds.py    the limits that figures must keep
    record.py    what is written down
    report.py    table and plots from result files

Nothing here is part of the registry's package.
"""
