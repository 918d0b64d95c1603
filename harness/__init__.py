"""A real ComfyUI for tests, demo and benchmarks: find it, give it an environment and a base directory, run graphs.

    locate       which ComfyUI (COMFYUI_DIR, or a copy from the package registry); standard library only
    environment  which packages it needs and the virtual environment that holds them; standard library only
    scratch      a ComfyUI base directory with this pack linked into its custom_nodes
    probe        a test-only node pack that carries Python objects in and out of a graph
    graph        writes prompts in ComfyUI's API format
    headless     runs graphs in this process, without a server
    server       runs ComfyUI's own server as a subprocess
    browser      opens ComfyUI's front end in Chromium

Nothing here is imported by the nodes; users of the pack never need it.
"""
