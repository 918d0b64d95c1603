"""Damaged and hostile files for every loader and converter: ``python3 dev.py soak --files N``; and a server that is
disturbed while it draws: ``python3 dev.py soak --minutes N``.

    originals   a small good file or folder of every kind that is read
    damage      ways to spoil safetensors files, JSON and pickles that know their structure
    subjects    what reads them, and whether what came out makes sense
    worker      one process that spoils and reads, file after file, and measures
    outcomes    what can happen, counted
    report      the table of docs/RELIABILITY.md
    server      the server soak: what happens to it, and what must not
    prompts     what it draws
    saboteur    a custom-node pack for it: memory, hashes of weights, calls that run out of memory

File ``i`` of a seed is always the same one, so that a run goes on where it stopped and a find can be looked at alone.
"""
