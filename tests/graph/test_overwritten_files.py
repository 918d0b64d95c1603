"""A model file may be overwritten in place, or cut off, while a server works with what it holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A process of its own: where a mapping is left, the system ends it.
PROGRAM = """
import shutil, sys
from pathlib import Path

root, base = (Path(argument) for argument in sys.argv[1:3])
sys.path.append(str(root))
sys.path[:] = [entry for entry in sys.path if entry not in ("", str(root))] + [str(root)]

import torch
from davae_core import tiny
from harness.graph import Graph
from harness.headless import HeadlessComfy
from harness.locate import find_comfyui
from harness.scratch import make_base
from harness.untrained import Family

make_base(base, root)
family = Family()
family.write(base / "models")
for kind, name in {"diffusion_models": tiny.MODEL, "text_encoders": tiny.TEXT_ENCODER}.items():
    shutil.copy(tiny.FOLDERS[kind] / name, base / "models" / kind)
comfy = HeadlessComfy(base, find_comfyui())

g = Graph()
davae = g.node("DAVAE_Loader", davae_name=family.davae_file, dtype="fp32")
base_model = g.node("UNETLoader", unet_name=family.model_file, weight_dtype="default")
adapted = g.node("DAVAE_Adapter", model=base_model, adapter_name=family.adapter_file, strength=1.0)
merged = g.node("DAVAE_ModelLoader", model_name=family.merged_file, dtype="auto")
small = g.node("DAVAE_TinySD35")
fast = g.node("DAVAE_FewSteps", model=adapted, lora_name=family.few_steps_file, strength=1.0)
loaded = {"vae": davae[0], "base_vae": davae[1], "davae": davae[2], "adapted": adapted, "merged": merged}
loaded["fast"] = fast
loaded["predicted"] = g.node(
    "DAVAE_PredictDetail",
    samples=g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
    davae=davae[2],
    predictor_name=family.predictor_file,
)
loaded |= {"small": small[0], "clip": small[1]}
for key, value in loaded.items():
    g.node("HarnessCapture", value=value, key=key)
objects = comfy.run(g.prompt).captured

ours = [family.davae_file, family.adapter_file, family.merged_file, family.predictor_file]
ours += [family.few_steps_file, tiny.MODEL, tiny.TEXT_ENCODER]
mapped = Path("/proc/self/maps")
if mapped.exists():
    lines = mapped.read_text()
    assert not [name for name in ours if name in lines], [name for name in ours if name in lines]
for file in (base / "models").rglob("*.safetensors"):
    if file.name in ours:
        with open(file, "r+b") as out:  # the same inode, as cp writes
            out.truncate(16)
            out.seek(0)
            out.write(b"no longer a model")

g = Graph()
node = {key: g.node("HarnessConstant", key=key) for key in loaded}
widths = {"context": family.model.context, "pooled": family.model.pooled}
text = {"positive": g.node("HarnessConditioning", **widths, seed=1)}
text["negative"] = g.node("HarnessConditioning", **widths, seed=2)
words = g.node("CLIPTextEncode", clip=node["clip"], text="3d peach")
settings = {"seed": 1, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
picture = g.node("EmptyImage", width=64, height=64, batch_size=1, color=255)
encoded = g.node("DAVAE_DetailEncode", image=picture, davae=node["davae"], size_rule="pad")
for key in ("adapted", "merged", "fast"):
    latent = g.node("KSampler", model=node[key], latent_image=encoded, **text, **settings)
    image = g.node("DAVAE_DetailDecode", samples=latent, davae=node["davae"], detail_strength=1.0)
    g.node("HarnessCapture", value=image, key=key)
stock = g.node("VAEEncode", pixels=picture, vae=node["base_vae"])
sampled = g.node(
    "KSampler", model=node["small"], latent_image=stock, positive=words, negative=words, **settings
)
g.node("HarnessCapture", value=g.node("VAEDecode", samples=encoded, vae=node["vae"]), key="stock")
g.node("HarnessCapture", value=sampled, key="sampled")
out = comfy.run(g.prompt, inputs=objects).captured
assert all(torch.isfinite(out[key]).all() for key in ("adapted", "merged", "fast", "stock"))
assert torch.isfinite(out["sampled"]["samples"]).all()
print("still there")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows does not let a mapped file be overwritten")
def test_a_file_that_is_overwritten_in_place_does_not_end_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(ROOT), str(tmp_path / "base")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ended.returncode == 0, f"ended with {ended.returncode}:\n{ended.stderr[-3000:]}"
    assert "still there" in ended.stdout
